"""A student's log.csv, a row for every update, read from the device once an interval. Used by distill.py."""

import math
from typing import Any

from torch import Tensor

from support import log, training
from support.checkpoint import Checkpoint

MAX_ROWS = 10_000  # a training of more updates logs every second, third, ... of them


class Diverged(ValueError):
    """A KL, a loss or a gradient is not finite."""


class UpdateLog:
    """A row of log.csv for every update.

    cfg: distill.Config. record (log_interval, 5 + 3N): see distill.Learner. tasks: the N names. csv: None
    where another process writes. first: the step that the run began or went on with.
    """

    def __init__(
        self,
        cfg: Any,
        record: Tensor,
        tasks: list[str],
        csv: log.Log | None,
        first: int,
        checkpoint: Checkpoint,
    ):
        self.cfg = cfg
        self.record = record
        self.tasks = tasks
        self.csv = csv
        self.checkpoint = checkpoint
        # rows logged before, and when they were: the first update has an interval of its own
        self.written = max(first // cfg.log_interval * cfg.log_interval, min(first, 1))
        self.seconds = checkpoint.seconds
        self.every = -(-cfg.steps // MAX_ROWS)

    def write(self, step: int, held: list[float]) -> str:
        """The rows of the updates since the last call, up to `step`; held (N,): the held-out KLs after it.

        Returns the interval's line. Raises Diverged where an update was not finite: it was not applied, nor
        any after it, so the parameters are still the last good ones.
        """
        rows = self.record[: step % self.cfg.log_interval + 1].tolist()
        rows = rows[-(step + 1 - self.written) :]
        now = self.checkpoint.seconds
        for i, row in enumerate(rows, self.written):
            self._check_finite(i, row)
            if (i + 1) % self.every and i not in (0, step):
                continue
            seconds = self.seconds + (now - self.seconds) * (i + 1 - self.written) / len(rows)
            self.csv.row(**self._cells(i, row, seconds, held if i == step else None))
        self.csv.flush()
        self.written = step + 1
        self.seconds = now
        loss, cosine, *_ = rows[-1]
        kls = " ".join(f"{x:.3f}" for x in held)
        text = f"loss {loss:6.3f} | held-out KL {kls} | cos {cosine:5.2f}"
        return log.progress(step + 1, self.cfg.steps, now, text)

    def _cells(self, i, row, seconds, held):
        N = len(self.tasks)
        loss, cosine, projected, norm, norm_after, *each = row
        cells = {
            "step": i + 1,
            "loss": loss,
            "lr": training.learning_rate(i, self.cfg.steps, self.cfg.lr, self.cfg.warmup),
            "cosine": cosine,
            "projected": int(projected),
            "grad_norm": norm,
            "surgered_norm": norm_after,
            "seconds": seconds,
        }
        for j, task in enumerate(self.tasks):
            cells[f"share_{task}"] = each[j]
            cells[f"kl_{task}"] = each[N + j]
            cells[f"alignment_{task}"] = each[2 * N + j]
            cells[f"heldout_kl_{task}"] = held and held[j]
        return cells

    def _check_finite(self, i, row):
        N = len(self.tasks)
        loss, _, _, norm, _, *each = row
        if math.isfinite(loss + norm):
            return
        shares = each[:N]
        kls = each[N : 2 * N]
        bad = next((j for j, x in enumerate(kls) if not math.isfinite(x)), shares.index(max(shares)))
        raise Diverged(
            f"loss {loss:.4g}, gradient norm {norm:.4g} in step {i + 1} of the student, "
            f"learning from teacher {self.tasks[bad]}: stopped; the student before that step is"
        )

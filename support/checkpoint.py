"""A training that can be stopped and resumed to the bit. Used by teacher.py and distill.py."""

import hashlib
import json
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from support import UserError, files, processes, reason, signals
from support.log import Log, TensorBoard, WandB
from support.signals import Stopped


class Checkpoint:
    """All that a training changes, in RUN/checkpoint.safetensors.

        state = {"theta": theta, ...}
        checkpoint = Checkpoint(out, cfg, state, {"windows": generator}, about=..., settings=...)
        first, log = checkpoint.restore()
        with checkpoint:
            for step in range(first, steps):
                ...
                checkpoint.after(step + 1)

    cfg: a dataclass with resume, checkpoint_interval, tensorboard and wandb.
    state: tensors, restored in place.
    generators: torch.Generators, saved besides those of Python, numpy and torch itself.
    about: JSON that must not have changed when a run is resumed (the description of the data).
    settings: the run's, for Weights & Biases.

    Inside `with`, SIGTERM and SIGINT wait for the end of an update, and then end the run with a checkpoint.
    """

    NAME = "checkpoint.safetensors"

    def __init__(
        self,
        out_dir: Path | str,
        cfg: Any,
        state: Mapping[str, Tensor],
        generators: Mapping[str, torch.Generator],
        about: Any,
        settings: Mapping[str, Any],
    ):
        self.path = Path(out_dir) / self.NAME
        self.cfg = cfg
        self.state = state
        self.generators = generators
        self.settings = settings
        about = json.dumps(about, sort_keys=True).encode()
        self.about_hash = hashlib.blake2b(about, digest_size=16).hexdigest()
        self.log = None
        self.log_size = 0  # bytes of log.csv that belong to the checkpoint
        self.last_saved_step = None
        self.seconds_before_resume = 0.0
        self.start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Training time so far, including the time before a resume."""
        return self.seconds_before_resume + time.perf_counter() - self.start

    def restore(self) -> tuple[int, Log | None]:
        """The number of updates done, 0 where nothing is resumed; and the log, on rank 0 only.

        Raises UserError where the checkpoint is damaged or belongs to other data.
        """
        resumable = int(self.cfg.resume and self.path.exists())
        step = self._restore() if processes.broadcast_int(resumable) else 0
        for x in self.state.values():
            processes.broadcast(x)
        if not processes.rank():
            trackers = []
            for tracker, wanted in ((TensorBoard, self.cfg.tensorboard), (WandB, self.cfg.wandb)):
                if wanted:
                    trackers.append(tracker(self.path.parent, self.settings, step))
            self.log = Log(self.path.with_name("log.csv"), self.log_size, tuple(trackers))
        return step, self.log

    def _restore(self):
        try:
            with safetensors.safe_open(self.path, "pt") as f:
                meta = json.loads(f.metadata()["about"])
                tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - it is no dict
            if meta["about"] != self.about_hash:
                raise UserError(
                    f"{self.path} was written for other data; --overwrite in place of --resume begins anew"
                )
            for name, x in self.state.items():
                x.copy_(tensors[name].view(x.shape))
            self._restore_generators(meta, tensors)
            self.seconds_before_resume = float(meta["seconds"])
            self.log_size = int(meta["log"])
            step = int(meta["step"])
        except UserError:
            raise
        except Exception as e:  # noqa: BLE001 - a damaged file fails in any of these steps, in its own way
            raise UserError(
                f"{self.path} is damaged ({reason(e)}); --overwrite in place of --resume begins anew"
            ) from None
        print(f"resumed from {self.path} after {step} updates", flush=True)
        return step

    def _restore_generators(self, meta, tensors):
        rank = processes.rank()
        for name, generator in self.generators.items():
            generator.set_state(tensors[f"generator {name}"])
        torch.set_rng_state(tensors["generator torch"][rank].clone())
        if torch.cuda.is_available() and "generator cuda" in tensors:
            torch.cuda.set_rng_state(tensors["generator cuda"][rank].clone())
        version, numbers, gauss = meta["python"]
        random.setstate((version, tuple(numbers), gauss))
        kind, *position = meta["numpy"]
        np.random.set_state((kind, tensors["generator numpy"].numpy().view(np.uint32), *position))

    def save(self, step: int) -> None:
        """Write the checkpoint. All processes of a job call this; rank 0 writes.

        Raises UserError where the file can't be written.
        """
        of_every_rank = {"generator torch": processes.gathered(torch.get_rng_state())}
        if torch.cuda.is_available():
            of_every_rank["generator cuda"] = processes.gathered(torch.cuda.get_rng_state())
        if processes.rank():
            self.last_saved_step = step
            return
        self.log.flush()
        kind, numbers, *position = np.random.get_state()
        tensors = {k: x.detach().cpu().clone().contiguous() for k, x in self.state.items()}
        tensors |= {f"generator {k}": g.get_state() for k, g in self.generators.items()}
        tensors |= {"generator numpy": torch.from_numpy(numbers.view(np.int32)), **of_every_rank}
        meta = {
            "step": step,
            "seconds": self.seconds,
            "log": self.log.size,
            "about": self.about_hash,
            "python": random.getstate(),
            "numpy": [kind, *position],
        }
        files.write(self.path, safetensors.torch.save(tensors, {"about": json.dumps(meta)}))
        self.last_saved_step = step

    def after(self, step: int) -> None:
        """To be called after each update; step: how many are done.

        Saves if that is due. Raises Stopped, with a checkpoint, if a signal asked the run to end.
        """
        signum = processes.end_requested(step)
        if signum is None and step % self.cfg.checkpoint_interval:
            return
        try:
            self.save(step)
        except UserError as e:
            print(f"{e}; the run goes on without this checkpoint", file=sys.stderr, flush=True)
        if signum is not None:
            saved = self.last_saved_step == step
            remedy = "; the same command with --resume goes on from there" if saved else ", not saved"
            raise Stopped(signum, f"stopped after {step} updates{remedy}")

    def __enter__(self):
        signals.begin_deferring()
        self.start = time.perf_counter()
        return self

    def __exit__(self, exception, *_):
        signals.end_deferring(failed=exception is not None)

    def finish(self) -> None:
        """The run is complete, its metrics.json written: remove the checkpoint, send trackers the metrics."""
        self.path.unlink(missing_ok=True)
        metrics = {}
        for name, task in files.read_json(self.path.with_name("metrics.json"))["tasks"].items():
            metrics |= {f"{name}/{k}": v for k, v in task.items() if isinstance(v, float)}
        self.log.track(step=self.cfg.steps, **metrics)
        for tracker in self.log.trackers:
            tracker.close()

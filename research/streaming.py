"""Teachers that arrive one after the other -> research/results/streaming.csv

    python -m research.streaming --case builtin
    python -m research.streaming --table          # what docs/study.md shows of these rows

One student; in each phase of `--steps` updates one more teacher is there, in an order drawn by the seed. A
phase begins with the weights of the one before it, as `distill.py --student` does, and has a learning rate
schedule of its own. A row for each stream: the KLs to all teachers on held-out episodes, at tenths of each
phase. Streams, by how the arrived teachers share a batch:

    equal       equal shares                            newest      half to the newest, the rest evenly
    novelty 2   --curriculum novelty, and so on         alone       all to the newest
    ..., memory     of earlier teachers, `--memory` windows each are all that is left
    alone, a-gem    no gradient against that of a batch of the memory (Chaudhry et al. 2019, arXiv 1812.00420)
    ..., previous   no gradient against the last update (--surgery previous)

Cases and teachers are those of research/study.py. One thread.
"""

import dataclasses
import functools
import json
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import curriculum
import data
import distill
from research import learners, study, study_rows
from research.markdown import table
from research.statistics import cell, geometric
from research.tables import RESULTS
from research.variants import CASES
from support import cli, machine

CURRICULA = {
    "equal": curriculum.all_at_once,
    "newest": lambda d, *_: towards_newest(d, 0.5),
    "alone": lambda d, *_: towards_newest(d, 1.0),
    "dro": curriculum.dro,
    "novelty 1": functools.partial(curriculum.novelty, power=1.0),
    "novelty 2": curriculum.novelty,
    "novelty 4": functools.partial(curriculum.novelty, power=4.0),
}
OF_MEMORY = ("equal", "newest", "novelty 2")
RUNS = (
    *CURRICULA,
    *(f"{name}, memory" for name in OF_MEMORY),
    "alone, a-gem",
    "alone, previous",
    "novelty 2, previous",
)
POINTS = 10  # of a phase
KEY = ("case", "steps", "memory", "run", "seed")
ROWS = RESULTS / "streaming.csv"


@dataclasses.dataclass
class Config:
    case: Literal[tuple(CASES)] = "builtin"
    runs: tuple[Literal[RUNS], ...] = RUNS
    seeds: tuple[int, ...] = tuple(range(5))
    steps: int = 300  # updates of a phase
    memory: int = 2048  # windows of each earlier teacher
    table: bool = False  # make no students


def towards_newest(d: Tensor, share: float) -> Tensor:  # (n,) -> (n,)
    """So much of the batch to the last, the rest evenly to the others."""
    n = len(d)
    if n == 1:
        return torch.ones_like(d)
    return torch.cat((d.new_full((n - 1,), (1 - share) / (n - 1)), d.new_tensor([share])))


def over_arrived(choose: Any, arrived: list[int]) -> Any:
    """The curriculum `choose` over these teachers, oldest first; the others get nothing."""

    def chosen(d: Tensor, step: Tensor, s: Tensor, generator: torch.Generator) -> Tensor:
        s = s[arrived] / s[arrived].sum()
        return torch.zeros_like(d).index_copy(
            0, torch.tensor(arrived), choose(d[arrived], step, s, generator)
        )

    return chosen


class Memory:
    """Windows, of which `kept` (a batch of some for each task) are all that is left of the tasks in `old`."""

    def __init__(self, windows: data.Windows, kept: data.Batch, old: list[int]):
        self.windows = windows
        self.kept = kept
        self.old = old

    def __getattr__(self, name: str) -> Any:
        return getattr(self.windows, name)

    def sample(self, B: int, shares: Tensor, generator: torch.Generator) -> data.Batch:
        """As data.Windows.sample, but old tasks' windows are drawn from those that were kept."""
        batch = self.windows.sample(B, shares, generator)
        for i in self.old:
            (at,) = torch.where(batch.task == i)
            (kept,) = torch.where(self.kept.task == i)
            drawn = kept[torch.randint(len(kept), (len(at),), generator=generator)]
            batch = put(batch, at, self.kept, drawn)
        return batch


def put(batch: data.Batch, at: Tensor, other: data.Batch, drawn: Tensor) -> data.Batch:
    """The batch with these of another's windows in the places `at`."""

    def placed(x: Tensor, y: Tensor, dim: int = 0) -> Tensor:
        return x.index_copy(dim, at, y.index_select(dim, drawn))

    own = map(placed, batch[:-1], other[:-1])
    return data.Batch(*own, placed(batch.targets, other.targets, 1))


def stream(case: study.Case, run: str, seed: int, memory: int) -> list[list[float]]:
    """The KLs (points, N) of a stream."""
    name, *options = run.split(", ")
    surgery = "none" if set(options) <= {"memory"} else "previous"
    cfg = dataclasses.replace(case.cfg, curriculum="all", surgery=surgery, seed=seed)
    cfg = dataclasses.replace(cfg, warmup=cfg.steps // 10, log_interval=cfg.steps // POINTS)
    student, generator = distill.make_student(cfg, case.tasks, case.models)
    N = len(case.tasks)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed)).tolist()
    kept = case.windows.sample(memory * N, torch.full((N,), 1 / N), torch.Generator().manual_seed(seed))
    kls = []
    for k in range(N):
        windows = case.windows
        if {"memory", "a-gem"} & set(options):
            windows = Memory(windows, kept, order[:k])
        kind = functools.partial(learners.AGem, order[:k]) if "a-gem" in options else distill.Learner
        learner = kind(cfg, student, case.models, windows, generator)
        learner.choose = over_arrived(CURRICULA[name], order[: k + 1])
        kls += study.train(case, learner).kl
    return [[row[i] for i in order] for row in kls]


# ---- the table ---------------------------------------------------------------------------------------------


def measures(kls: np.ndarray) -> dict[str, float]:  # (points, N), teachers in the order of their arrival
    """What a stream comes to; a teacher counts from the end of the first tenth of its phase."""
    N = kls.shape[1]
    points = len(kls) // N
    worst = [kls[t, : t // points + 1].max() for t in range(len(kls))]
    mean = [kls[t, : t // points + 1].mean() for t in range(len(kls))]
    ends = kls[points - 1 :: points]  # (N, N): after each phase
    new = np.diag(ends)
    return {
        "worst": float(np.mean(worst)),
        "mean": float(np.mean(mean)),
        "last worst": float(kls[-1].max()),
        "newest": float(np.exp(np.log(new[1:]).mean())),
        "forgetting": float(np.exp(np.log(kls[-1, :-1] / new[:-1]).mean())),
    }


def tables(rows: list[dict[str, str]]) -> str:
    """Each stream against equal shares on the same seeds, as Markdown."""
    found = {}
    for row in rows:
        of_case = found.setdefault(tuple(row[k] for k in KEY[:3]), {})
        of_case.setdefault(row["run"], {})[row["seed"]] = measures(np.array(json.loads(row["kl"])))
    lines = []
    for (case, steps, memory), runs in found.items():
        for run, of_seeds in runs.items():
            seeds = sorted(set(of_seeds) & set(runs.get("equal", {})))
            if not seeds:
                continue
            ratios = {}
            for name in ("worst", "mean", "last worst", "newest"):
                ratios[name] = np.array([of_seeds[s][name] / runs["equal"][s][name] for s in seeds])
            cells = [cell(geometric, [x], "{:.2f}") for x in ratios.values()]
            forgetting = geometric([np.array([of_seeds[s]["forgetting"] for s in seeds])])
            about = [f"{case}, {steps} updates a phase, memory {memory}", run, str(len(seeds))]
            lines.append([*about, *cells, f"{forgetting:.2f}"])
    head = ["streams", "shares", "seeds", "worst KL", "mean KL", "worst KL in the end"]
    return table([*head, "newest's KL", "last KL / first"], lines)


def main(cfg: Config) -> None:
    torch.set_num_threads(1)
    if cfg.table:
        print(tables(study_rows.read(ROWS)))
        return
    cli.at_least(cfg, steps=POINTS, memory=1)
    wanted = [(run, seed) for seed in cfg.seeds for run in cfg.runs]
    keys = [dict(zip(KEY, (cfg.case, cfg.steps, cfg.memory, *x), strict=True)) for x in wanted]
    keys = [key for key in keys if not study_rows.find(ROWS, key)]
    if not keys:
        return
    case = study.Case(study.Config(case=cfg.case, steps=cfg.steps))
    for key in keys:
        kls = np.round(stream(case, key["run"], key["seed"], cfg.memory), 5)
        study_rows.add(ROWS, {**key, "kl": json.dumps(kls.tolist()), "commit": machine.commit()})
        print(f"{cfg.case}, {key['run']}, seed {key['seed']}: worst KL {kls[-1].max():.4f}", flush=True)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)

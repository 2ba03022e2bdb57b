"""Does novelty over cells find by itself what --top does by hand? -> research/results/cells.csv

    python -m research.cells
    python -m research.cells --table              # what docs/study.md shows of these rows

A cell is a teacher and a band of its training episodes by return: the lower half of the timesteps, the best
ones (data.best_rows), and those between. A curriculum takes cells for teachers; to the student all cells of a
task are that task. A row for each student: KLs to the cells of held-out episodes, evaluated retention, and
the gap between returns and targets. Runs:

    uniform             every timestep alike, as --top 1
    top                 half of the batch from the best, as --top 0.1
    novelty, uniform    KL^2 of teachers, every timestep of a teacher alike
    novelty, top        the default: KL^2 of teachers, half of each from its best
    cells 1, cells 2    KL, or KL^2, of cells

Teachers are those of research/study.py's case `builtin`. One thread; run several processes.
"""

import dataclasses
import json
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import curriculum
import data
import distill
import evaluate
import model as dt
import teacher
from policy import Policy
from research import study, study_rows
from research.markdown import table
from research.statistics import cell, mean
from research.tables import RESULTS
from research.variants import CASES
from support import cli, machine

BANDS = ("low", "middle", "best")
LOW = 0.5  # of the timesteps
RUNS = ("uniform", "top", "novelty, uniform", "novelty, top", "cells 1", "cells 2")
KEY = ("case", "steps", "run", "seed")
ROWS = RESULTS / "cells.csv"


@dataclasses.dataclass
class Config:
    case: Literal[tuple(CASES)] = "builtin"
    runs: tuple[Literal[RUNS], ...] = RUNS
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = distill.Config.steps
    episodes: int = 20  # of each task, in the evaluation
    table: bool = False  # make no students


def cells_of(dataset: data.Dataset) -> list[data.Dataset]:
    """The same with each band's training and held-out episodes, one of each at least."""
    of_bands = [dataset] * len(BANDS)
    for part in ("train", "held_out"):
        rows = getattr(dataset, part)
        first = data.first_rows(rows)
        by_return = np.argsort(rows[first, -2], kind="stable")
        n_best = (first >= len(rows) - data.best_rows(first, len(rows))).sum() if part == "train" else 0
        n_best = int(n_best or max(1, round(0.1 * len(first))))
        ends = np.cumsum(np.diff(np.append(first, len(rows)))[by_return])
        n_low = int(np.clip((ends <= LOW * len(rows)).sum(), 1, len(first) - n_best - 1))
        chosen = np.split(by_return, [n_low, len(first) - n_best])
        of_bands = [data.of_episodes(d, part, np.sort(c)) for d, c in zip(of_bands, chosen, strict=True)]
    return of_bands


class Case:
    """Teachers, their cells in order of task and band, and windows of these with targets."""

    def __init__(self, cfg: Config):
        options = {k: v for k, v in CASES[cfg.case].items() if k != "share"}
        self.cfg = distill.Config(**options, steps=cfg.steps, device="cpu", log_interval=cfg.steps)
        self.cfg = dataclasses.replace(self.cfg, curriculum="all", top=1.0)
        self.teachers = teacher.find(self.cfg)
        bands = len(BANDS)
        self.tasks = [t.task for t in self.teachers for _ in BANDS]
        self.models = [t.model for t in self.teachers for _ in BANDS]
        self.groups = tuple(i // bands for i in range(len(self.tasks)))
        sets = distill.load_sets(self.cfg, [t.task for t in self.teachers])
        cells = [c for s in sets for c in cells_of(s)]
        self.windows, self.held_out = distill.make_windows(
            self.cfg, self.tasks, cells, self.models[0].cfg.context
        )
        distill.cache_targets(self.models, self.windows)
        self.held_out_targets = distill.live_targets(self.models, self.held_out)
        sizes = self.windows.size.view(-1, bands).float()
        self.uniform = sizes / sizes.sum(1, keepdim=True)  # (teachers, bands)
        self.top = 0.5 * self.uniform
        self.top[:, -1] += 0.5

    def curriculum(self, run: str) -> Any:
        """The function from cells' KLs to their shares."""
        within = self.top if run.endswith("top") else self.uniform
        if run.startswith("cells"):
            return lambda d, *args: curriculum.novelty(d, *args, power=float(run.split()[1]))

        def of_teachers(d: Tensor, step: Tensor, s: Tensor, generator: torch.Generator) -> Tensor:
            d = (d.view_as(within) * within).sum(1)
            choose = curriculum.novelty if run.startswith("novelty") else curriculum.all_at_once
            return (choose(d, step, s, generator)[:, None] * within).flatten()

        return of_teachers


def student(case: Case, run: str, seed: int, episodes: int) -> dict[str, Any]:
    """Train and evaluate one. Returns its row, without KEY."""
    cfg = dataclasses.replace(case.cfg, seed=seed)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    sizes = {"n_layer": cfg.n_layer, "n_embd": cfg.n_embd, "tokens": cfg.tokens, "groups": case.groups}
    sizes["context"] = case.models[0].cfg.context
    model = dt.DecisionTransformer(dt.ModelConfig.of(case.tasks, **sizes))
    model.bfloat16 = machine.bfloat16(cfg)
    learner = distill.Learner(cfg, model, case.models, case.windows, generator)
    learner.choose = case.curriculum(run)

    def forget_the_cell():  # the embedding of a task would tell the student which cell a window is of
        model.embed_task.weight.data.zero_()

    forget_the_cell()
    trained = study.train(case, learner, after=forget_the_cell)
    retention = []
    gaps = []
    for i, found in enumerate(case.teachers):
        policy = Policy.of(model, found.task, i * len(BANDS))
        options = (episodes, evaluate.SEED)
        metrics = evaluate.measured(policy, found.task, found.task.target, *options, found.metrics)
        sweep = evaluate.sweep(policy, found.task, evaluate.sweep_episodes(episodes), evaluate.SEED)
        retention.append(metrics["retention"])
        gaps.append(evaluate.target_gap(sweep, found.metrics.get("data"), found.task))
    return {
        "kl": json.dumps(np.round(trained.kl[-1], 5).tolist()),
        "shares": json.dumps(np.round(trained.shares, 4).tolist()),
        "retention": json.dumps(np.round(retention, 4).tolist()),
        "gap": json.dumps(np.round(gaps, 4).tolist()),
        "commit": machine.commit(),
    }


def tables(rows: list[dict[str, str]]) -> str:
    """Means over seeds, as Markdown."""
    groups = {}
    for row in rows:
        groups.setdefault((row["case"], row["steps"], row["run"]), []).append(row)
    lines = []
    for (case, steps, run), of_seeds in groups.items():
        values = {
            k: np.array([json.loads(row[k]) for row in of_seeds])
            for k in ("kl", "shares", "retention", "gap")
        }
        bands = [values[k].reshape(len(of_seeds), -1, len(BANDS)) for k in ("kl", "shares")]
        kl = bands[0].mean((0, 1))
        share = bands[1].sum(1).mean(0)
        worst = np.array([x.max() for x in values["kl"]])
        retention = values["retention"]
        measured = [worst, retention.mean(1), retention.min(1), values["gap"].mean(1)]
        means = [cell(mean, [x]) for x in measured]
        shown = [*(f"{x:.2f}" for x in share), *(f"{x:.3f}" for x in kl)]
        lines.append([f"{case}, {steps} updates", run, str(len(of_seeds)), *shown, *means])
    head = ["students", "shares", "seeds", *(f"share of {b}" for b in BANDS), *(f"KL of {b}" for b in BANDS)]
    return table([*head, "worst cell's KL", "retention, mean", "worst task", "gap to target"], lines)


def main(cfg: Config) -> None:
    torch.set_num_threads(1)
    if cfg.table:
        print(tables(study_rows.read(ROWS)))
        return
    cli.at_least(cfg, steps=1, episodes=1)
    case = None
    for seed in cfg.seeds:
        for run in cfg.runs:
            key = dict(zip(KEY, (cfg.case, cfg.steps, run, seed), strict=True))
            if study_rows.find(ROWS, key):
                continue
            case = case or Case(cfg)
            row = student(case, run, seed, cfg.episodes)
            study_rows.add(ROWS, {**key, **row})
            print(
                f"{cfg.case}, {run}, seed {seed}: retention {row['retention']}, gap {row['gap']}", flush=True
            )


if __name__ == "__main__":
    cli.run(main, Config, __doc__)

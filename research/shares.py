"""Shares of the batch and the KLs they lead to -> research/results/shares.csv

    python -m research.shares --case builtin --seeds 0 1 2
    python -m research.shares --case mt10 --runs equal "novelty 2"
    python -m research.shares --table             # what docs/study.md shows of these rows

A row for each student, which is not evaluated: only its KLs to every second held-out episode are measured, at
tenths of its training. A student whose row is there is skipped. Runs:

    equal       equal shares
    random      fixed shares, exp of normal numbers, drawn by the seed: what the law is fitted to
    law         fixed shares ~ c^(1 / a), c being the KLs of tuning seed 100 with equal shares
    default     --curriculum novelty
    novelty 2   --novelty-power 2, and so on, without a limit to the share of one teacher (curriculum.MOST)
    integral    variants.integral, steered by the held-out episodes that nothing is measured on

Teachers are those of distill.py, seed 0, trained where they are missing. `--planted` adds noise of its own
to the targets of one task in every window, which no student can learn. One thread; run several processes.
"""

import dataclasses
import functools
import json
import math
import time
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

import curriculum
import data
import distill
import teacher
from research import study_rows, variants
from research.little_data import TASKS
from research.markdown import table
from research.statistics import cell
from research.tables import RESULTS
from support import cli, machine

CASES: dict[str, dict[str, Any]] = {  # options of distill.py
    "builtin": {"envs": TASKS["builtin"]},
    "thirdparty": {"datasets": TASKS["thirdparty"]},
    "nine": {"envs": (*TASKS["builtin"], "halfcheetah-back"), "datasets": TASKS["thirdparty"]},
    "mt10": {"envs": ("mt10",), "teacher_top": 1.0, "top": 1.0, "n_embd": 116},
    "opposed": {"envs": ("halfcheetah", "halfcheetah-back"), "share": True},
    "mt10 shared": {"envs": ("mt10",), "teacher_top": 1.0, "top": 1.0, "n_embd": 124, "share": True},
    "mt50": {"envs": ("mt50",), "teacher_top": 1.0, "top": 1.0, "n_embd": 280, "share": True},
}
RUNS: dict[str, dict[str, Any]] = {
    "equal": {"curriculum": "all"},
    "random": {"curriculum": "weights"},
    "law": {"curriculum": "weights"},
    "default": {"curriculum": "novelty"},
    "novelty 1": {"curriculum": "novelty 1"},
    "novelty 2": {"curriculum": "novelty 2"},
    "novelty 4": {"curriculum": "novelty 4"},
    "dro": {"curriculum": "dro"},
    "dro 0.003": {"curriculum": "dro 0.003"},
    "dro 0.03": {"curriculum": "dro 0.03"},
    "integral": {"curriculum": "integral"},
}
GROUP = ("case", "tasks", "steps", "n_embd", "planted")
ROWS = RESULTS / "shares.csv"
TUNING_SEED = 100
STEERING_TIMESTEPS = 512  # of each task, on which `integral` measures the KLs,
STEERING_COST = 0.05  # and what that may cost of an update, which takes three times a forward
SPREAD = 0.7  # of the logarithms of random shares


@dataclasses.dataclass
class Config:
    case: Literal[tuple(CASES)] = "builtin"
    runs: tuple[Literal[tuple(RUNS)], ...] = tuple(RUNS)
    seeds: tuple[int, ...] = tuple(range(10))
    tasks: tuple[int, ...] = ()  # of the case's, by number; default: all
    steps: int = 1000
    n_embd: int = 0  # 0: the case's
    planted: int = -1  # number of the task whose targets nobody can learn
    table: bool = False  # make no students


class Case:
    """Teachers and windows with their targets: half of the held-out episodes are measured, half may steer."""

    def __init__(self, cfg: Config):
        options = dict(CASES[cfg.case])
        names = {"envs": data.expanded(options.get("envs", ())), "datasets": options.get("datasets", ())}
        every = [(kind, name) for kind, of_kind in names.items() for name in of_kind]
        every = [every[i] for i in cfg.tasks] if cfg.tasks else every
        options |= {kind: tuple(name for k, name in every if k == kind) for kind in names}
        if cfg.n_embd:
            options["n_embd"] = cfg.n_embd
        self.cfg = distill.Config(**options, steps=cfg.steps, device="cpu", log_interval=cfg.steps // 10)
        found = teacher.find(self.cfg)
        self.tasks = [t.task for t in found]
        self.models = [t.model for t in found]
        context = self.models[0].cfg.context
        sets = distill.load_sets(self.cfg, self.tasks)
        measured, steering = zip(*map(halves, sets), strict=True)
        self.windows, self.held_out = distill.make_windows(self.cfg, self.tasks, measured, context)
        distill.cache_targets(self.models, self.windows)
        self.held_out_targets = distill.live_targets(self.models, self.held_out)
        steering = data.Windows([s.held_out for s in steering], self.tasks, context)
        steering = steering.spread(max(1, STEERING_TIMESTEPS // context))
        self.steering = steering._replace(targets=distill.live_targets(self.models, steering))
        if cfg.planted >= 0:
            self._plant(cfg.planted)

    def _plant(self, i):
        """Move the means of a task's targets by noise of up to half of what they may be."""
        w = self.windows
        A = self.tasks[i].act_dim
        start = int(w.offset[i])
        of_training = w.table[start : start + (1 + w.copies) * int(w.size[i]), -2 * w.A :]
        of_others = [(self.held_out_targets, self.held_out), (self.steering.targets, self.steering)]
        generator = torch.Generator().manual_seed(0)
        of_training[:, :A] += torch.rand(len(of_training), A, generator=generator) - 0.5
        for targets, batch in of_others:
            noise = torch.rand(*targets[0, ..., :A].shape, generator=generator) - 0.5
            targets[0, ..., :A] += torch.where((batch.task == i)[:, None, None], noise, 0.0)


def halves(dataset: data.Dataset) -> tuple[data.Dataset, data.Dataset]:
    """The same with every second held-out episode, and with the others.

    Not with training episodes: teachers are surer there than anywhere else.
    """
    n = len(data.first_rows(dataset.held_out))
    return tuple(data.of_episodes(dataset, "held_out", np.arange(start, n, 2)) for start in (0, 1))


class Integral(distill.Learner):
    """Follows variants.integral, by KLs on windows that are neither trained on nor measured."""

    def __init__(self, case: Case, cfg: distill.Config, *args: Any):
        super().__init__(cfg, *args)
        self.probe = functools.partial(self.distance, case.steering, case.steering.targets)
        with torch.no_grad():
            self.kl.copy_(self.probe(None))
        update = 3 * cfg.batch_size * self.windows.K
        self.probe_interval = math.ceil(case.steering.mask.numel() / (STEERING_COST * update))
        self.choose = self.from_mean_shares

    def from_mean_shares(
        self, d: Tensor, step: Tensor | int, shares: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Of the updates so far, and of as many with equal shares as the warm-up has."""
        before = (self.total_shares + self.cfg.warmup / len(d)) / (self.done + self.cfg.warmup)
        return variants.integral(d, step, before, generator)


def student(case: Case, options: dict[str, Any], seed: int) -> tuple[list[list[float]], list[float], float]:
    """Train one. Returns its held-out KLs at tenths of its updates, mean shares, seconds an update."""
    cfg = dataclasses.replace(case.cfg, seed=seed, **options)
    model, generator = distill.make_student(cfg, case.tasks, case.models)
    learner = functools.partial(Integral, case) if cfg.curriculum == "integral" else distill.Learner
    learner = learner(cfg, model, case.models, case.windows, generator)
    kl = distill.Distance(distill.Config(), model)
    kls = []
    start = time.process_time()
    for step in range(cfg.steps):
        learner.step(step)
        if (step + 1) % cfg.log_interval == 0:
            kls.append(kl.held_out(case.held_out, case.held_out_targets))
    seconds = time.process_time() - start
    return kls, learner.mean_shares().tolist(), seconds / cfg.steps


def weights(run: str, key: dict[str, Any], seed: int, n: int) -> list[float]:
    """The fixed shares of a run; those of `law` follow the row with equal shares of TUNING_SEED."""
    if run == "random":
        x = np.exp(SPREAD * np.random.default_rng(seed).normal(size=n))
        return (x / x.sum()).tolist()
    row = study_rows.find(ROWS, {**key, "run": "equal", "seed": TUNING_SEED})
    x = np.array(json.loads(row["kl"])[-1]) ** (1 / curriculum.LAW)
    return (x / x.sum()).tolist()


# ---- tables ------------------------------------------------------------------------------------------------


class Student(NamedTuple):
    """A row's numbers: (N,) each, without a planted task."""

    kl: np.ndarray  # in the end
    shares: np.ndarray  # mean
    early: np.ndarray  # the KLs after a tenth of the updates


def groups(rows: list[dict[str, str]]) -> dict[tuple[str, ...], dict[str, dict[int, Student]]]:
    """By case, tasks, updates, channels and planted task: {run: {seed: Student}}."""
    found = {}
    for row in rows:
        kls = np.array(json.loads(row["kl"]))
        shares = np.array(json.loads(row["shares"]))
        planted = int(row["planted"])
        if planted >= 0:
            kls = np.delete(kls, planted, 1)
            shares = np.delete(shares, planted)
        runs = found.setdefault(tuple(row[k] for k in GROUP), {})
        runs.setdefault(row["run"], {})[int(row["seed"])] = Student(kls[-1], shares, kls[0])
    return found


class Law(NamedTuple):
    """log KL_i = log c_i - a log(N share_i), fitted to students of fixed shares."""

    a: float  # of all tasks
    of_tasks: np.ndarray  # (N,) of each alone
    explained: float  # share of the variance within tasks


def law(runs: dict[str, dict[int, Student]]) -> Law | None:
    """Fitted to a group's students with equal and random shares; None where these are fewer than four."""
    students = [s for run in ("equal", "random") for s in runs.get(run, {}).values()]
    if len(students) < 4 or "random" not in runs:
        return None
    x = np.log([len(s.shares) * s.shares for s in students])
    y = np.log([s.kl for s in students])
    x = x - x.mean(0)
    y = y - y.mean(0)
    slopes = -(x * y).sum(0) / (x * x).sum(0)
    a = float(-(x * y).sum() / (x * x).sum())
    return Law(a, slopes, float(1 - np.square(y + a * x).sum() / np.square(y).sum()))


def best_by(c: np.ndarray, a: np.ndarray | float) -> float:
    """The KL at which all teachers are equal; c (N,): those of equal shares, a: one exponent, or (N,)."""
    low, high = c.min() / 10, 10 * c.max()
    for _ in range(60):  # shares (c / level)^(1 / a) / N sum to 1 at the right level
        level = math.sqrt(low * high)
        low, high = (level, high) if ((c / level) ** (1 / a)).mean() > 1 else (low, level)
    return level


def tables(rows: list[dict[str, str]]) -> str:
    """The share law, and curricula by the worst KL, as Markdown."""
    laws = []
    curricula = []
    for key, runs in groups(rows).items():
        label = of_group(key)
        equal = runs.get("equal", {})
        if not equal:
            continue
        c = np.exp(np.mean([np.log(s.kl) for s in equal.values()], 0))
        early = np.exp(np.mean([np.log(s.early) for s in equal.values()], 0))
        fit = law(runs)
        others = [run for run in runs if run not in ("equal", "random")]
        if fit:
            means = [np.mean([s.kl.max() for s in runs[run].values()]) for run in others]
            worst = np.mean([s.kl.max() for s in equal.values()])
            laws.append([
                label, str(len(runs["random"])), f"{fit.a:.2f}",
                f"{fit.of_tasks.min():.2f} to {fit.of_tasks.max():.2f}", f"{fit.explained:.2f}",
                f"{best_by(c, curriculum.LAW) / c.max():.2f}",
                f"{best_by(early, curriculum.LAW) / early.max():.2f}",
                f"{best_by(c, fit.of_tasks.clip(0.1)) / c.max():.2f}",
                f"{min(means) / worst:.2f}" if means else "",
            ])  # fmt: skip
        for run in others:
            seeds = sorted(set(runs[run]) & set(equal))
            if not seeds:
                continue
            worst = np.array([runs[run][s].kl.max() / equal[s].kl.max() for s in seeds])
            mean = np.array([runs[run][s].kl.mean() / equal[s].kl.mean() for s in seeds])
            ratios = (worst, mean)
            cells = [cell(geometric, [x]) if len(x) > 2 else f"{geometric([x]):.3f}" for x in ratios]
            curricula.append([label, run, str(len(seeds)), *cells, f"{(worst < 1).mean():.2f}"])
    head = ["students", "random shares", "a", "of single tasks", "explained"]
    head += ["best by 0.55", "after a tenth", "best by each task's a", "measured"]
    text = table(head, laws)
    head = [
        "students",
        "shares",
        "seeds",
        "worst KL / equal shares'",
        "mean KL / equal shares'",
        "lower worst",
    ]
    return f"{text}\n\n{table(head, curricula)}"


def geometric(strata: list[np.ndarray]) -> np.ndarray:
    """Mean of ratios (..., n)."""
    return np.exp(np.log(strata[0]).mean(-1))


def of_group(key: tuple[str, ...]) -> str:
    """Its name in tables."""
    case, tasks, steps, n_embd, planted = key
    some = f", {len(tasks.split())} of its tasks" if tasks else ""
    noise = ", a task of noise planted" if planted != "-1" else ""
    return f"{case}{some}, {steps} updates, {n_embd} channels{noise}"


def main(cfg: Config) -> None:
    torch.set_num_threads(1)
    if cfg.table:
        print(tables(study_rows.plain(ROWS)))
        return
    cli.at_least(cfg, steps=10)
    curriculum.METHODS["integral"] = variants.integral
    for power in (1, 2, 4):
        unlimited = functools.partial(curriculum.novelty, power=float(power), most=1.0)
        curriculum.METHODS[f"novelty {power}"] = unlimited
    for eta in (0.003, 0.03):
        curriculum.METHODS[f"dro {eta}"] = functools.partial(curriculum.dro, eta=eta)
    key = {
        "case": cfg.case,
        "tasks": " ".join(map(str, cfg.tasks)),
        "steps": cfg.steps,
        "n_embd": cfg.n_embd or CASES[cfg.case].get("n_embd", distill.Config.n_embd),
        "planted": cfg.planted,
    }
    wanted = [(run, seed) for seed in cfg.seeds for run in cfg.runs]
    if "law" in cfg.runs:
        wanted.insert(0, ("equal", TUNING_SEED))
    there = functools.partial(study_rows.find, ROWS)
    wanted = [(run, seed) for run, seed in wanted if not there({**key, "run": run, "seed": seed})]
    if not wanted:
        return
    case = Case(cfg)
    for run, seed in wanted:
        if RUNS[run]["curriculum"] == "weights":
            shares = weights(run, key, seed, len(case.tasks))
            curriculum.METHODS["weights"] = variants.constant(shares)
        kls, shares, seconds = student(case, RUNS[run], seed)
        row = {**key, "run": run, "seed": seed, "kl": json.dumps(np.round(kls, 5).tolist())}
        row |= {"shares": json.dumps(np.round(shares, 4).tolist()), "ms": round(1000 * seconds, 2)}
        study_rows.add(ROWS, {**row, "commit": machine.commit()})
        worst = max(x for i, x in enumerate(kls[-1]) if i != cfg.planted)
        print(
            f"{cfg.case}, {run}, seed {seed}: worst KL {worst:.4f}, mean {np.mean(kls[-1]):.4f}", flush=True
        )


if __name__ == "__main__":
    cli.run(main, Config, __doc__)

"""The study: students by curriculum, surgery and loss, and their KLs -> research/results/study.csv

    python -m research.study --tune               # first: learning rates, on the built-in tasks
    python -m research.study                      # the built-in tasks; 14 s a student and core
    python -m research.study --case nine --runs equal default dro
    python -m research.study --case mt10 --teachers 1 --seeds 0 1 2
    python -m research.study --report             # docs/study.md and its figure, from all rows

A row for each student; one whose row is there is skipped. Students are not evaluated, as those of
research/little_data.py are: KLs to each teacher on every second held-out episode are measured, at tenths of
the training. Runs and cases are those of research/variants.py. Seed s has the teachers of seed s % teachers:
distill.py's own, of seed 0, and out/teacher-hopper-1, ..., trained where they are missing.

Learning rates are tuned for each run on the built-in tasks, on a seed that no comparison has. One thread: run
several processes at a time. `--planted` adds noise of its own to the targets of one task in every window,
which no student can learn.
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

import curriculum
import data
import distill
import model as dt
import teacher
from research import learners, study_rows, variants
from research.tables import RESULTS
from research.variants import CASES, CORE, EQUAL, FIRST_RUN, NEED_TORCHJD, RUNS, UNTUNED
from support import UserError, cli, files, machine

ROWS = RESULTS / "study.csv"
KEY = ("case", "tasks", "steps", "n_embd", "planted", "teachers", "run", "seed", "lr")
POINTS = 10  # of a curve
TUNING_SEED = 100  # the first of those that no comparison has
RATES = (8e-3, 16e-3, 32e-3)  # that tuning begins with
STEERING_TIMESTEPS = 512  # of each task, on which learners.Steered measures the KLs
MANY = 10  # teachers: with more, KLs are measured on as many windows in all as with so many
SPREAD = 0.7  # of the logarithms of random shares


@dataclasses.dataclass
class Config:
    case: Literal[tuple(CASES)] = "builtin"  # the set of tasks, see variants.py
    runs: tuple[Literal[tuple(RUNS)], ...] = ()  # default: all on the built-in tasks, else variants.CORE
    seeds: tuple[int, ...] = tuple(range(10))  # of students
    teachers: int = 5  # of each task
    tasks: tuple[int, ...] = ()  # of the case's, by number; default: all
    steps: int = 1000  # updates of a student
    n_embd: int = 0  # its channels; 0: the case's
    lr: float = 0.0  # 0: the run's best, or else the default
    planted: int = -1  # number of the task whose targets nobody can learn
    tune: bool = False  # one student for each learning rate instead
    report: bool = False  # make no students


# ---- teachers and data -------------------------------------------------------------------------------------


class Case:
    """Teachers of one seed and windows with their targets: half of the held-out ones are measured on."""

    def __init__(self, cfg: Config, teacher_seed: int = 0):
        names = names_of(cfg)
        options = {k: v for k, v in CASES[cfg.case].items() if k not in ("envs", "datasets")}
        if len(names) == 1:
            options.pop("share", None)
        sizes = {"steps": cfg.steps, "log_interval": max(1, cfg.steps // POINTS), "device": "cpu"}
        sizes["n_embd"] = channels(cfg)
        self.cfg = distill.Config(
            envs=tuple(n for n in names if n in data.ENVS),
            datasets=tuple(n for n in names if n not in data.ENVS),
            **(options | sizes),
        )
        if teacher_seed:
            self.cfg.teachers = tuple(str(teacher_of(self.cfg, name, teacher_seed)) for name in names)
        found = teacher.find(self.cfg)
        self.tasks = [t.task for t in found]
        self.models = [t.model for t in found]
        context = self.models[0].cfg.context
        sets = distill.load_sets(self.cfg, self.tasks)
        measured, steering = zip(*map(halves, sets), strict=True)
        self.windows, self.held_out = distill.make_windows(self.cfg, self.tasks, measured, context)
        if len(names) > MANY:  # as many in all as so many tasks have
            every = math.ceil(len(names) / MANY)
            self.held_out = learners.some(self.held_out, torch.arange(0, len(self.held_out.task), every))
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


def names_of(cfg: Config) -> list[str]:
    """The case's tasks, environments first, or those that --tasks chooses."""
    options = CASES[cfg.case]
    names = [*data.expanded(options.get("envs", ())), *options.get("datasets", ())]
    return [names[i] for i in cfg.tasks] if cfg.tasks else names


def channels(cfg: Config) -> int:
    """n_embd of a case's students."""
    return cfg.n_embd or CASES[cfg.case].get("n_embd", distill.Config.n_embd)


def teacher_of(cfg: distill.Config, name: str, seed: int) -> Path:
    """The directory of a task's teacher of another seed than 0; trains it where it is missing."""
    path = teacher.directory(name)
    path = path.with_name(f"{path.name}-{seed}")
    if files.read_json(path / "metrics.json") is None:
        options = teacher.options_of(cfg, name) | {"seed": seed, "eval_episodes": 0, "resume": True}
        teacher.main(teacher.Config(out_dir=str(path), **options))
    return path


def halves(dataset: data.Dataset) -> tuple[data.Dataset, data.Dataset]:
    """The same with every second held-out episode, and with the others.

    Not with training episodes: teachers are surer there than anywhere else.
    """
    n = len(data.first_rows(dataset.held_out))
    return tuple(data.of_episodes(dataset, "held_out", np.arange(start, n, 2)) for start in (0, 1))


# ---- a student ---------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """What was measured of a student, at tenths of its updates or over all of them."""

    kl: list[list[float]]  # to each teacher; NaN from where one became NaN
    shares: list[float]  # mean
    seconds: float  # of one core
    updates: Tensor  # (steps, 2): each one's cosine with the one before, and whether it was projected


def train(case: Case, learner: distill.Learner, after: Callable[[], None] | None = None) -> Trained:
    """All of its updates. after: called after each."""
    cfg = learner.cfg
    kl = distill.Distance(distill.Config(), learner.student)  # KL(teacher || student), whatever is learned
    kls = []
    updates = []
    lost = False
    start = time.process_time()
    for step in range(cfg.steps):
        try:
            if not lost:
                learner.step(step)
                if after:
                    after()
        except distill.Diverged:
            learner.theta.data.fill_(math.nan)
            lost = True
        if (step + 1) % cfg.log_interval == 0:
            kls.append(kl.held_out(case.held_out, case.held_out_targets))
            updates.append(learner.record[:, 1:3].clone())
    seconds = time.process_time() - start
    learner.student.eval()
    return Trained(kls, learner.mean_shares().tolist(), seconds, torch.cat(updates))


def student(case: Case, **options: Any) -> Trained:
    """Train one, with these options of distill.py besides the case's."""
    cfg = dataclasses.replace(case.cfg, **options)
    case.windows.prefer(cfg.top)
    case.windows.asking = distill.asked_share(cfg)
    model, generator = distill.make_student(cfg, case.tasks, case.models)
    learner = learners.of(cfg, len(case.tasks), case.steering)
    return train(case, learner(cfg, model, case.models, case.windows, generator))


def separately(parts: list[Case], n_embd: int, **options: Any) -> Trained:
    """A student for each task, each with its part of the parameters and of every batch."""
    tasks = [task for part in parts for task in part.tasks]
    cfg = parts[0].cfg
    budget = size(cfg, tasks, parts[0], n_embd) / len(parts)
    trained = []
    for part in parts:
        n = min(range(4, n_embd + 1, 4), key=lambda n: abs(size(cfg, part.tasks, part, n) - budget))
        trained.append(student(part, n_embd=n, batch_size=cfg.batch_size // len(parts), **options))
    kl = np.concatenate([t.kl for t in trained], 1).tolist()
    shares = [1 / len(parts)] * len(parts)
    return Trained(kl, shares, sum(t.seconds for t in trained), torch.cat([t.updates for t in trained]))


def size(cfg: distill.Config, tasks: list[data.Task], case: Case, n_embd: int) -> int:
    """Parameters of a student of these tasks."""
    sizes = {"n_layer": cfg.n_layer, "n_embd": n_embd, "context": case.models[0].cfg.context}
    with torch.device("meta"):
        return dt.DecisionTransformer(dt.ModelConfig.of(tasks, tokens=cfg.tokens, **sizes)).n_params


def weights(run: str, key: dict[str, Any], n: int) -> list[float]:
    """The fixed shares of a run: random, or those that would make all KLs equal, by a first run's.

    The first run has equal shares and the same teachers. A KL falls with its teacher's share to the power of
    curriculum.LAW; for "weights, alone" to that which a student of this task alone says.
    """
    if run == "random":
        x = np.exp(SPREAD * np.random.default_rng(key["seed"]).normal(size=n))
        return (x / x.sum()).tolist()
    seed = first_seed(key["seed"], key["teachers"])
    c = last_kls({**key, "run": EQUAL, "seed": seed})
    a = np.full(n, curriculum.LAW)
    if run == "weights, alone":
        of_task = {**key, "run": EQUAL, "seed": key["seed"] % key["teachers"]}
        alone = np.concatenate([last_kls({**of_task, "tasks": str(i)}) for i in range(n)])
        a = exponents(c, alone)
    x = (c / level_of(c, a)) ** (1 / a)
    return (x / x.sum()).tolist()


def last_kls(key: dict[str, Any]) -> np.ndarray:
    """(N,) of a row that is there."""
    return np.array(json.loads(study_rows.find(ROWS, key)["kl"])[-1])


def exponents(c: np.ndarray, alone: np.ndarray) -> np.ndarray:
    """(N,) of the share law, from KLs (N,) with equal shares and alone: log(c / alone) / log N."""
    return (np.log(c / alone) / math.log(len(c))).clip(0.05)


def level_of(c: np.ndarray, a: np.ndarray | float) -> float:
    """The KL at which all teachers are equal; c (N,): those of equal shares, a: one exponent, or (N,)."""
    low, high = c.min() / 10, 10 * c.max()
    for _ in range(60):  # shares (c / level)^(1 / a) / N sum to 1 at the right level
        level = math.sqrt(low * high)
        low, high = (level, high) if ((c / level) ** (1 / a)).mean() > 1 else (low, level)
    return level


def first_seed(seed: int, teachers: int) -> int:
    """The seed of the first run that fixed shares follow; it has the teachers of this one."""
    return TUNING_SEED + seed % teachers


# ---- learning rates ----------------------------------------------------------------------------------------


def tried(run: str, rows: list[dict[str, str]] | None = None) -> dict[float, float]:
    """{learning rate: the KL to the worst teacher} of a run's tuning rows; rows: all, default: the CSV's."""
    found = {}
    for row in study_rows.read(ROWS) if rows is None else rows:
        tuning = (row["case"], row["run"], row["seed"]) == ("builtin", run, str(TUNING_SEED))
        if tuning and row["planted"] == "-1" and int(row["teachers"]) > 1 and not row["tasks"]:
            found[float(row["lr"])] = float(np.nan_to_num(json.loads(row["kl"])[-1], nan=math.inf).max())
    return dict(sorted(found.items()))


def best_rate(run: str) -> float:
    """The tuned learning rate; that of equal shares after a first run, the default for what is not tuned."""
    found = tried(EQUAL if run in FIRST_RUN else run)
    return min(found, key=found.get) if len(found) >= len(RATES) else distill.Config.lr


def rates(run: str) -> list[float]:
    """Those to try next: RATES, then beyond the end that did best."""
    found = tried(run)
    missing = [lr for lr in RATES if lr not in found]
    if missing or math.inf in found.values():
        return missing
    best = best_rate(run)
    return [best / 2] if best == min(found) else [best * 2] if best == max(found) else []


# ---- all runs ----------------------------------------------------------------------------------------------


def wanted(cfg: Config) -> list[str]:
    """The runs, in order."""
    runs = cfg.runs or (tuple(RUNS) if cfg.case == "builtin" and not cfg.tasks else CORE)
    if not variants.has_torchjd():
        if (needy := sorted(set(runs) & set(NEED_TORCHJD))) and cfg.runs:
            raise UserError(f"{', '.join(needy)}: needs pip install 'torchjd[quadprog-projector,cagrad]'")
        runs = [run for run in runs if run not in NEED_TORCHJD]
    return [run for run in runs if cfg.runs or run not in UNTUNED]


def one(cfg: Config, case_of: Callable[..., Case], run: str, seed: int, lr: float) -> None:
    """Make a student and add its row, unless it is there. case_of: the Case of a teacher seed and tasks."""
    of_case = (cfg.case, " ".join(map(str, cfg.tasks)), cfg.steps, channels(cfg), cfg.planted, cfg.teachers)
    key = dict(zip(KEY, (*of_case, run, seed, lr), strict=True))
    if study_rows.find(ROWS, key):
        return
    if run in FIRST_RUN:
        one(cfg, case_of, EQUAL, first_seed(seed, cfg.teachers), lr)
    if run == "weights, alone":
        for i in range(len(names_of(cfg))):
            one(dataclasses.replace(cfg, tasks=(i,)), case_of, EQUAL, seed % cfg.teachers, lr)
    if RUNS[run].get("curriculum") == "weights":
        variants.register(weights(run, key, len(names_of(cfg))))
    options = {**RUNS[run], "seed": seed, "lr": lr}
    of_teachers = functools.partial(case_of, seed % cfg.teachers)
    if run == "separate":
        parts = [of_teachers((i,)) for i in cfg.tasks or range(len(names_of(cfg)))]
        made = separately(parts, channels(cfg), **options)
    else:
        made = student(of_teachers(cfg.tasks), **options)
    study_rows.add(ROWS, {**key, **measured(made, cfg.steps), "commit": machine.commit()})
    worst = max(x for i, x in enumerate(made.kl[-1]) if i != cfg.planted)
    about = f"{cfg.case}, {run}, seed {seed}, lr {lr:g}"
    print(f"{about}: worst KL {worst:.4f}, mean {np.mean(made.kl[-1]):.4f}", flush=True)


def measured(made: Trained, steps: int) -> dict[str, Any]:
    """A row's columns between KEY and commit."""
    cosines = made.updates[1:, 0].quantile(torch.tensor([0.05, 0.5, 0.95]))
    return {
        "kl": json.dumps(np.round(made.kl, 5).tolist()),
        "shares": json.dumps(np.round(made.shares, 4).tolist()),
        "ms": round(1000 * made.seconds / steps, 2),
        "projected": round(float(made.updates[:, 1].mean()), 4),
        "cosine": json.dumps(np.round(cosines.tolist(), 3).tolist()),
    }


def main(cfg: Config) -> None:
    torch.set_num_threads(1)
    machine.keep_freed_memory()
    if cfg.report:
        from research import study_report

        study_report.report()
        return
    cli.at_least(cfg, steps=POINTS, teachers=1)
    if cfg.tune and cfg.case != "builtin":
        raise UserError(f"--tune --case {cfg.case}: rates are tuned on the built-in tasks alone")
    variants.register()

    @functools.lru_cache(len(names_of(cfg)) + 1)
    def case_of(teacher_seed, tasks):
        return Case(dataclasses.replace(cfg, tasks=tasks), teacher_seed)

    if cfg.tune:
        for run in wanted(cfg):
            while run not in (*UNTUNED, *FIRST_RUN) and (more := rates(run)):
                for lr in more:
                    one(cfg, case_of, run, TUNING_SEED, lr)
        return
    for teacher_seed in range(cfg.teachers):
        for seed in cfg.seeds:
            for run in wanted(cfg) if seed % cfg.teachers == teacher_seed else ():
                one(cfg, case_of, run, seed, cfg.lr or best_rate(run))


if __name__ == "__main__":
    cli.run(main, Config, __doc__)

"""The study: does weighting batches towards the worst-matched teachers, without conflicting updates, help?

    python -m research.study                       # every run that study.csv lacks, then the report
    python -m research.study --jobs 8 --seeds 20   # the same on a bigger machine
    python -m research.study --cases thirdparty many --only "novelty, previous" "all"
    python -m research.study --report              # docs/study.md and its figures from the CSV alone

Stopped and called again, it goes on.

A run is one student: one row. Its seed also draws the teachers, one of three for each task. Learning rates
are tuned for each variant and case on seeds of their own, over a grid that goes on where an end of it does
best. Budgets:

    tune       tuning runs
    updates    as many updates for each variant
    cost       a few updates of each variant in turns, to measure what an update costs
    time       as many seconds as round-robin: what an update costs more is taken off the updates
    half       half the updates
    acting     `acting_steps` updates, then 20 episodes of each task: retention

The case "defaults" is what distill.py did without options when teachers had a context of 20 timesteps
(variants.LONG_TEACHER): only evaluated, with no rates tuned. All others keep the optimiser and the tokens
they were begun with, too (FIRST_TEACHER and FIRST_STUDENT), so that old rows and new ones are of one kind.

Measured are the KL(teacher || student) to each teacher on held-out episodes over training, and retention. The
report is in study_report.py, the variants in variants.py.
"""

import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

import data
import distill
import evaluate
import model as dt
import teacher
from research import study_report, study_rows, variants
from research.study_rows import Row
from research.variants import (
    CASES,
    DEFAULT,
    DEFAULTS,
    EVALUATED,
    FIRST_STUDENT,
    FIRST_TEACHER,
    HALF,
    LONG_STUDENT,
    LONG_TEACHER,
    ROUND_ROBIN,
    SCORE_COLUMNS,
    THIRDPARTY,
    VARIANTS,
)
from support import UserError, cli, files, machine

POINTS = 10  # of a curve, after its first
EPISODES = 20  # of each task, where students are evaluated
COST_SEEDS = 5
FIRST_TUNING_SEED = 100
SEPARATE = "one student per task"  # the variant of more than one student

Spec = dict[str, Any]  # a run to be made: study_rows.KEY, weights, teachers, work_dir


@dataclasses.dataclass
class Config:
    cases: tuple[str, ...] = (DEFAULTS, "builtin", "conflict")  # thirdparty, many need their datasets
    only: tuple[str, ...] = ()  # variants; default: all
    without: tuple[str, ...] = ()  # variants to leave out
    budgets: tuple[str, ...] = ("updates", "half", "time", "acting")  # as listed above
    seeds: int = 10  # of the runs that count: --first-seed and those after it
    first_seed: int = 0  # teachers of another kind of machine differ: there, use seeds that the CSV lacks
    tune_seeds: int = 1  # of the tuning runs: 100, 101, ...
    teachers: int = 3  # trained for each task, on seeds 0, 1, ...
    steps: int = 700  # a student's updates
    acting_steps: int = 4000  # the same where it is evaluated, but for the case "defaults"
    compression: float = 15.0  # the teachers' parameters divided by the student's
    sizes: tuple[float, ...] = (5.0, 15.0, 50.0)  # the same, for evaluated default students of built-in tasks
    jobs: int = 2  # runs at a time, one thread each
    out: str = "research/results/study.csv"  # a row per run; figures go beside it
    work_dir: str = "out/study"  # where teachers are, or are trained
    report: bool = False  # make no runs

    def check(self) -> None:
        """Raise UserError for a value that can't be, before anything is done."""
        cli.at_least(self, seeds=1, first_seed=0, tune_seeds=1, teachers=1, steps=POINTS)
        cli.at_least(self, acting_steps=POINTS, compression=1, sizes=1, jobs=1)
        known = {"cases": CASES, "only": VARIANTS, "without": VARIANTS, "budgets": Config.budgets}
        for option, names in known.items():
            unknown = set(getattr(self, option)) - set(names)
            if unknown:
                raise UserError(f"--{option} {unknown.pop()}: choose from {', '.join(names)}")
        if not self.report and {"upgrad", "cagrad"} & set(self.variants()) and not variants.has_torchjd():
            raise UserError(
                "upgrad and cagrad need torchjd: pip install 'torchjd[quadprog-projector,cagrad]'; "
                "or --without upgrad cagrad"
            )

    def variants(self) -> list[str]:
        """Those to run."""
        return [name for name in self.only or VARIANTS if name not in self.without]


# ---- what a run is made of ---------------------------------------------------------------------------------


class Setup(NamedTuple):
    """A case's teachers as a seed draws them, and their data."""

    models: list[dt.DecisionTransformer]
    tasks: list[data.Task]
    scores: list[float | None]  # the teachers' normalised scores
    windows: data.Windows  # for training, with the teachers' targets
    held_out: data.Batch
    held_out_targets: Tensor  # (2, B, K, A)


def prepare() -> None:
    """Call in each process that makes runs."""
    torch.set_num_threads(1)
    machine.keep_freed_memory()


def teacher_dir(work_dir: str, case: str, task: str, seed: int) -> Path:
    """The run directory of a task's teacher; all cases but "defaults" share theirs."""
    kind = "default-teachers" if case == DEFAULTS else "teachers"
    return Path(work_dir) / kind / f"{task.replace('/', '-')}-{seed}"


@functools.lru_cache(1)
def setup(case: str, seed: int, teachers: int, work_dir: str) -> Setup:
    """Draw one of a task's `teachers` for each task of a case, and load them with their data."""
    rng = np.random.default_rng(seed)
    directories = [teacher_dir(work_dir, case, name, int(rng.integers(teachers))) for name in CASES[case]]
    models, metas = zip(*map(dt.load, directories), strict=True)
    tasks = [data.tasks(meta, path)[0] for meta, path in zip(metas, directories, strict=True)]
    scores = []
    for path, task in zip(directories, tasks, strict=True):
        scores.append(files.read_json(path / "metrics.json")["tasks"][task.name]["normalized_score"])
    sets = [data.load(task.dataset, task.split_seed) for task in tasks]
    context = models[0].cfg.context
    windows = data.Windows([s.train for s in sets], tasks, context, targets=True)
    parts = windows.table.split(windows.size.tolist())
    for path, model, task, dataset, part in zip(directories, models, tasks, sets, parts, strict=True):
        columns = part[:, -2 * windows.A :].unflatten(1, (2, windows.A))
        columns[..., : task.act_dim] = targets(path, model, task, dataset.train)
    held_out = data.Windows([s.held_out for s in sets], tasks, context).spread()
    return Setup(models, tasks, scores, windows, held_out, distill.live_targets(models, held_out))


def targets(directory: Path, model: dt.DecisionTransformer, task: data.Task, table: np.ndarray) -> Tensor:
    """A teacher's outputs for every row of its data, (n, 2, A).

    Computed once and written beside the teacher; computed again where the teacher was trained anew.
    """
    path = directory / "targets.safetensors"
    trained = (directory / "model.safetensors").stat().st_mtime_ns
    if not path.exists() or path.stat().st_mtime_ns < trained:
        windows = data.Windows([table], [task], model.cfg.context, targets=True)
        distill.cache_targets([model], windows)
        outputs = windows.table[:, -2 * task.act_dim :].contiguous()
        files.write(path, safetensors.torch.save({"targets": outputs}))
    return safetensors.torch.load_file(path)["targets"].unflatten(1, (2, task.act_dim))


def of_one_task(s: Setup, i: int) -> Setup:
    """Task i of a setup, as that of a single task."""
    task = s.tasks[i]
    own = s.held_out.task == i
    held_out = data.Batch(*(x[own] for x in s.held_out[:-1]), s.held_out.targets[:, own])
    held_out = held_out._replace(
        task=held_out.task * 0,
        states=held_out.states[..., : task.obs_dim],
        actions=held_out.actions[..., : task.act_dim],
    )
    held_out_targets = s.held_out_targets[:, own, :, : task.act_dim]
    windows = windows_of_one_task(s, i)
    return Setup([s.models[i]], [task], [s.scores[i]], windows, held_out, held_out_targets)


def windows_of_one_task(s: Setup, i: int) -> data.Windows:
    """The training windows of task i, with targets, without the columns that pad it to the widest task."""
    O = s.windows.O
    A = s.windows.A
    task = s.tasks[i]
    rows = s.windows.table[int(s.windows.offset[i]) :][: int(s.windows.size[i])]
    states, actions, rest, mean, log_std = rows.split((O, A, 2, A, A), dim=1)
    table = torch.cat((states[:, : task.obs_dim], actions[:, : task.act_dim], rest), 1)
    windows = data.Windows([table.numpy()], [task], s.windows.K, targets=True)
    outputs = torch.cat((mean[:, : task.act_dim], log_std[:, : task.act_dim]), 1)
    windows.table[:, -2 * task.act_dim :] = outputs
    return windows


def width(tasks: list[data.Task], context: int, budget: float) -> int:
    """n_embd, a multiple of 8, of the student whose number of parameters is closest to `budget`."""

    def distance(n_embd: int) -> float:
        with torch.device("meta"):
            n = dt.DecisionTransformer(model_config(tasks, n_embd, context)).n_params
        return abs(n - budget)

    return min(range(8, 512, 8), key=distance)


def model_config(tasks: list[data.Task], n_embd: int, context: int, tokens: int = 3) -> dt.ModelConfig:
    """A student of these tasks."""
    sizes = {"n_layer": distill.Config.n_layer, "n_embd": n_embd, "context": context, "tokens": tokens}
    return dt.ModelConfig.of(tasks, **sizes)


# ---- one run -----------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """A student, and what was measured while it was trained."""

    student: dt.DecisionTransformer
    steps_at: list[int]  # updates after which the KLs were measured
    kl: list[list[float]]  # to each teacher, at each of them
    seconds: float  # of one core, without those of measuring
    updates: Tensor  # (steps, 2) each update's cosine, and whether it was projected


def distil(cfg: distill.Config, s: Setup) -> Trained:
    """Train one student. Where a KL becomes NaN the run is lost: all that is measured afterwards is NaN."""
    torch.manual_seed(cfg.seed)
    student = dt.DecisionTransformer(model_config(s.tasks, cfg.n_embd, s.windows.K, cfg.tokens))
    student.bfloat16 = machine.bfloat16(cfg)
    s.windows.prefer(cfg.top)
    generator = torch.Generator().manual_seed(cfg.seed)
    learner = distill.Learner(cfg, student, s.models, s.windows, generator)
    kl = distill.Distance(distill.Config(), student)  # KL(teacher || student), whatever it is trained by
    steps_at = []
    kls = []
    updates = []
    seconds = 0.0
    lost = False
    for step in range(cfg.steps + 1):
        if step % cfg.log_interval == 0:
            steps_at.append(step)
            kls.append(kl.held_out(s.held_out, s.held_out_targets))
            if step:
                updates.append(learner.record[:, 1:3].clone())
        if step < cfg.steps and not lost:
            start = time.process_time()  # of this one thread: other runs take turns with it
            try:
                learner.step(step)
            except distill.Diverged:
                learner.theta.data.fill_(math.nan)
                lost = True
            seconds += time.process_time() - start
    student.eval()
    return Trained(student, steps_at, kls, seconds, torch.cat(updates))


def options_of(spec: Spec) -> dict[str, Any]:
    """A run's options of distill.py."""
    options = {
        "steps": spec["steps"],
        "lr": spec["lr"],
        "seed": spec["seed"],
        "log_interval": spec["steps"] // POINTS,
        "device": "cpu",
        "top": 1.0,
        **LONG_STUDENT,
    }
    if spec["case"] != DEFAULTS:
        options |= FIRST_STUDENT
    return options | VARIANTS[spec["variant"]]


def together(spec: Spec, s: Setup) -> list[Trained]:
    """One student of all tasks."""
    budget = sum(m.n_params for m in s.models) / spec["times"]
    cfg = distill.Config(**options_of(spec), n_embd=width(s.tasks, s.windows.K, budget))
    return [distil(cfg, s)]


def separately(spec: Spec, s: Setup) -> list[Trained]:
    """One student of each task, with its part of the parameters and of each update's windows."""
    budget = sum(m.n_params for m in s.models) / spec["times"] / len(s.tasks)
    trained = []
    for i, task in enumerate(s.tasks):
        options = options_of(spec)
        options["batch_size"] //= len(s.tasks)
        cfg = distill.Config(**options, n_embd=width([task], s.windows.K, budget))
        trained.append(distil(cfg, of_one_task(s, i)))
    return trained


def scores(trained: list[Trained], tasks: list[data.Task]) -> list[float]:
    """Each task's normalised score, of one student of all tasks or of one each."""
    found = []
    separate = len(trained) > 1
    for i, task in enumerate(tasks):
        student = trained[i if separate else 0].student
        index = 0 if separate else i
        returns, *_ = evaluate.rollout(student, task, index, task.target, EPISODES, evaluate.SEED)
        found.append(evaluate.scores(returns, task)["normalized_score"])
    return found


def one_run(spec: Spec) -> Row:
    """Make a run. Returns its row of the CSV."""
    s = setup(spec["case"], spec["seed"], spec["teachers"], spec["work_dir"])
    variants.register(spec["weights"])
    trained = separately(spec, s) if spec["variant"] == SEPARATE else together(spec, s)
    retention = []
    if spec["budget"] == "acting":
        for score, teacher_score in zip(scores(trained, s.tasks), s.scores, strict=True):
            retention.append(score / teacher_score)
    seconds = sum(t.seconds for t in trained)
    n_params = sum(t.student.n_params for t in trained)
    kl = trained[0].kl
    if len(trained) > 1:  # each student's only KL, side by side
        kl = np.concatenate([t.kl for t in trained], axis=1).tolist()
    last = trained[-1]
    about = machine.describe(distill.Config(device="cpu"))
    return {
        **{k: spec[k] for k in study_rows.KEY},
        "n_embd": last.student.cfg.n_embd,
        "compression": f"{sum(m.n_params for m in s.models) / n_params:.2f}",
        "seconds": f"{seconds:.1f}",
        "ms": f"{1000 * seconds / spec['steps']:.2f}",
        "projected": f"{last.updates[:, 1].mean():.4f}",
        "cosine": rounded(np.quantile(last.updates[1:, 0], [0.05, 0.25, 0.5, 0.75, 0.95]).tolist()),
        "weights": rounded(spec["weights"]),
        "steps_at": rounded(last.steps_at),
        "kl": rounded(kl),
        "retention": rounded(retention),
        "teacher_scores": rounded(s.scores),
        **{k: about[k] for k in ("device", "dtype", "torch", "commit")},
    }


def rounded(x: list) -> str:
    """A list as JSON, its floats to four significant digits."""
    return json.dumps(json.loads(json.dumps(x), parse_float=lambda text: float(f"{float(text):.4g}")))


# ---- which runs there are to make --------------------------------------------------------------------------

STAGES = ("tune", "tune with weights", "updates and cost", "time")  # each is planned from the rows before it


def plan(cfg: Config, rows: list[Row], stage: str) -> Iterator[Spec]:
    """The runs of a stage, those that were made already among them. rows: the CSV's."""
    if stage == "tune":  # weights and equal time need these two
        yield from tuning_plan(cfg, rows, [ROUND_ROBIN, "all", *cfg.variants()], with_weights=False)
    elif stage == "tune with weights":
        yield from tuning_plan(cfg, rows, cfg.variants(), with_weights=True)
    elif stage == "updates and cost":
        for budget in cfg.budgets:
            yield from budget_plan(cfg, rows, "cost" if budget == "time" else budget)
    elif "time" in cfg.budgets:
        yield from budget_plan(cfg, rows, "time")


def tuning_plan(cfg: Config, rows: list[Row], names: list[str], with_weights: bool) -> Iterator[Spec]:
    """The tuning runs of the variants with, or without, fixed weights from a first run."""
    names = [name for name in dict.fromkeys(names) if study_rows.needs_first_run(name) == with_weights]
    for case in cfg.cases:
        if case == DEFAULTS:
            continue
        for seed in range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + cfg.tune_seeds):
            for name in names:
                for lr in study_rows.rates(rows, case, name):
                    yield spec_of(cfg, rows, case, name, budget="tune", seed=seed, lr=lr)


def budget_plan(cfg: Config, rows: list[Row], budget: str) -> Iterator[Spec]:
    """The runs of a budget, with the best learning rate of each variant."""
    n_seeds = COST_SEEDS if budget == "cost" else cfg.seeds
    names = cfg.variants()
    if budget == "cost":
        names = list(dict.fromkeys((ROUND_ROBIN, *names)))
    for seed in range(cfg.first_seed, cfg.first_seed + n_seeds):
        for case in cfg.cases:
            for name in names:
                lr = distill.Config.lr if case == DEFAULTS else study_rows.best_rate(rows, case, name)
                spec = spec_of(cfg, rows, case, name, budget=budget, seed=seed, lr=lr)
                yield from sized(cfg, rows, spec)


def spec_of(cfg: Config, rows: list[Row], case: str, variant: str, **more: Any) -> Spec:
    """A run of cfg.steps updates; more: its budget, seed and learning rate."""
    return {
        "case": case,
        "variant": variant,
        "weights": study_rows.fixed_weights(rows, case, variant),
        "steps": cfg.steps,
        "times": cfg.compression,
        "teachers": cfg.teachers,
        "work_dir": cfg.work_dir,
        **more,
    }


def sized(cfg: Config, rows: list[Row], spec: Spec) -> Iterator[Spec]:
    """`spec` with its budget's number of updates and sizes of student; none where it has no such run."""
    case = spec["case"]
    variant = spec["variant"]
    budget = spec["budget"]
    if case == DEFAULTS:
        if budget == "acting" and variant in SCORE_COLUMNS.values():
            yield {**spec, "steps": distill.Config.steps}
    elif budget == "updates":
        yield spec
    elif budget == "half" and variant in HALF:
        yield {**spec, "steps": cfg.steps // 2}
    elif budget == "cost":
        yield {**spec, "steps": 4 * POINTS}
    elif budget == "time":
        slowdown = study_rows.slowdown(rows, case, variant)
        if slowdown > 1.1:
            yield {**spec, "steps": max(1, round(cfg.steps / slowdown / POINTS)) * POINTS}
    elif budget == "acting" and variant in EVALUATED:
        in_all_sizes = variant in (DEFAULT, SCORE_COLUMNS["without teachers"])
        all_sizes = in_all_sizes and case == "builtin" and cfg.acting_steps == Config.acting_steps
        for times in cfg.sizes if all_sizes else (cfg.compression,):
            yield {**spec, "steps": cfg.acting_steps, "times": times}


def missing(cfg: Config, rows: list[Row], stage: str) -> list[Spec]:
    """The runs of a stage that `rows` lacks."""
    there = {study_rows.key(row) for row in rows}
    return [spec for spec in plan(cfg, rows, stage) if study_rows.key(spec) not in there]


# ---- all runs ----------------------------------------------------------------------------------------------


def train_teachers(cfg: Config) -> None:
    """Train what teachers are missing."""
    for case in cfg.cases:
        for name in CASES[case]:
            for seed in range(cfg.teachers):
                train_teacher_if_missing(case, name, seed, teacher_dir(cfg.work_dir, case, name, seed))


def train_teacher_if_missing(case: str, name: str, seed: int, directory: Path) -> None:
    """Train the teacher of a task of a case, with fewer updates on third-party data."""
    if files.read_json(directory / "metrics.json") is not None:
        return
    print(f"no teacher in {directory}: training it", flush=True)
    option = "env" if name in data.ENVS else "dataset"
    options = {option: name, "seed": seed, "out_dir": str(directory), "resume": True, **LONG_TEACHER}
    if case != DEFAULTS:
        options |= FIRST_TEACHER
    if name in THIRDPARTY:
        options["steps"] = 1500  # with a quarter of the data
    teacher.main(teacher.Config(**options))


def run_all(cfg: Config, specs: list[Spec], rows: list[Row]) -> None:
    """Make the runs, cfg.jobs at a time, and add their rows to the CSV. rows: those it holds."""
    seconds = np.mean([r["seconds"] / r["steps"] for r in rows] or [0.03])  # an update
    seconds *= np.mean([spec["steps"] for spec in specs])
    print(f"{len(specs)} runs of about {seconds:.0f} s, {cfg.jobs} at a time", flush=True)
    with contextlib.ExitStack() as stack:
        if cfg.jobs == 1:
            prepare()
            made = map(one_run, specs)
        else:
            pool = multiprocessing.get_context("spawn").Pool(cfg.jobs, prepare)
            made = stack.enter_context(pool).imap_unordered(one_run, specs)
        for row in tqdm(made, total=len(specs), unit="run", disable=None):
            study_rows.add(cfg.out, row)
            kl = " ".join(f"{x:.3f}" for x in json.loads(row["kl"])[-1])
            about = f"{row['case']}, {row['variant']}, {row['budget']}, seed {row['seed']}, lr {row['lr']:g}"
            tqdm.write(f"{about}: KL {kl} | {row['seconds']} s")


def main(cfg: Config) -> None:
    """Make the runs that are missing, then the report."""
    cfg.check()
    if not cfg.report:
        train_teachers(cfg)
        for stage in STAGES:
            rows = study_rows.read(cfg.out)
            while specs := missing(cfg, rows, stage):
                run_all(cfg, specs, rows)
                rows = study_rows.read(cfg.out)
    study_report.report(Path(cfg.out), cfg.compression, cfg.acting_steps)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)

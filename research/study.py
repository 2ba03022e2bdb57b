"""The study: does learning from the least familiar teacher, without conflicting updates, make a better student?

    python -m research.study                              # every run that results/study.csv lacks, then the report; stopped and called again, it goes on
    python -m research.study --jobs 8 --seeds 20          # the same on a bigger machine
    python -m research.study --cases thirdparty many --only "novelty, previous" "all"
    python -m research.study --report                     # table and figures from the CSV alone, in seconds

A run is one student: one row, with all that made it. Its seed draws teachers too, one of three for each task, trained on other seeds. Learning rates
are tuned for each variant and case on seeds of their own (rows of budget "tune"), over a grid that goes on where an end of it does best, then fixed. Budgets:

    updates    as many updates for each variant
    time       as many seconds: what scoring and projecting cost (budget "cost": a few updates of each variant in turns) is taken off the updates
    half       half the updates
    acting     `acting_steps` updates, then 20 episodes of each task: retention, on the built-in tasks at three sizes

What is measured: KL(teacher || student) on held-out episodes over training, the worst teacher's and the mean; retention. Interquartile means with 95 %
stratified bootstrap intervals, probability of improvement and performance profiles as rliable defines them (Agarwal et al. 2021, arXiv 2108.13264).
"""

import contextlib
import csv
import dataclasses
import functools
import importlib.util
import io
import json
import math
import multiprocessing
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from tqdm import tqdm

import curriculum
import data
import distill
import evaluate
import model as dt
import surgery
import teacher
from kernels.kl import head_kl
from report import COLOURS, style
from report import figure as report_figure
from support import UserError, cli, files, machine

# ---- what is compared ------------------------------------------------------------------------------------------------

BUILTIN = ("hopper", "halfcheetah", "walker2d", "ant")
THIRDPARTY = tuple(
    f"thirdparty/{t}/trpo-replay-v0" for t in BUILTIN
)  # 26 TRPO policies a task that nobody here trained (README, Results)
CASES = {
    "builtin": BUILTIN,
    "thirdparty": THIRDPARTY,
    "conflict": ("halfcheetah", "halfcheetah-back"),  # one body, opposed goals
    "many": (*BUILTIN, "halfcheetah-back", *THIRDPARTY),  # easy ones and hard ones
    "alone": ("halfcheetah",),  # one teacher: what a surgery does where no two can conflict
}
P2 = {"novelty_power": 2.0}
VARIANTS = {  # options of distill.py
    # orders
    "fixed": {"curriculum": "fixed", "surgery": "none"},
    "all": {"curriculum": "all", "surgery": "none"},
    "uniform": {"curriculum": "uniform", "surgery": "none"},
    "dro": {"curriculum": "dro", "surgery": "none"},
    "least": {**P2, "curriculum": "least", "surgery": "none"},
    "novelty p=1": {"novelty_power": 1.0, "surgery": "none"},
    "novelty p=2": {**P2, "surgery": "none"},
    "novelty p=4": {"novelty_power": 4.0, "surgery": "none"},
    "novelty p=8": {"novelty_power": 8.0, "surgery": "none"},
    "novelty p=inf": {"novelty_power": math.inf, "surgery": "none"},
    # surgery
    "novelty, previous": {**P2, "surgery": "previous"},
    "novelty, switch": {**P2, "surgery": "switch"},
    "novelty, average": {**P2, "surgery": "average"},
    "novelty p=4, previous": {"novelty_power": 4.0, "surgery": "previous"},
    "all, previous": {"curriculum": "all", "surgery": "previous"},
    "novelty, pcgrad": {**P2, "surgery": "pcgrad"},
    "novelty, previous by teacher": {**P2, "surgery": "previous", "surgery_scope": "teacher"},
    "novelty, average by teacher": {**P2, "surgery": "average", "surgery_scope": "teacher"},
    "uniform, previous": {"curriculum": "uniform", "surgery": "previous"},
    "uniform, switch": {"curriculum": "uniform", "surgery": "switch"},
    "uniform, average": {"curriculum": "uniform", "surgery": "average"},
    "fixed, average": {"curriculum": "fixed", "surgery": "average"},
    "novelty p=inf, average": {"novelty_power": math.inf, "surgery": "average"},
    "novelty, reverse": {**P2, "surgery": "none", "kl": "reverse"},  # KL(student || teacher)
    # both aims in one score
    "novelty, alignment 1": {**P2, "surgery": "none", "alignment_weight": 1.0},
    "novelty, alignment 4": {**P2, "surgery": "none", "alignment_weight": 4.0},
    # attempts at mending what does not help
    "relative novelty": {"curriculum": "relative", "surgery": "none"},
    "argmax, stay 20": {"curriculum": "stay", "surgery": "none"},
    "novelty, average 0.99": {**P2, "surgery": "average 0.99"},
    "novelty, Adam's metric": {**P2, "surgery": "metric"},
    # rivals
    "weights w=1": {
        "curriculum": "weights",
        "surgery": "none",
    },  # scalarisation: fixed shares ~ (the task's KL where all shares were equal)^w, on a tuning seed
    "weights w=2": {"curriculum": "weights", "surgery": "none"},
    "upgrad": {"curriculum": "all", "surgery": "upgrad"},  # Quinton and Rey 2024, arXiv 2406.16232
    "cagrad": {"curriculum": "all", "surgery": "cagrad"},  # Liu et al. 2021, arXiv 2110.14048
    "mse": {"curriculum": "all", "surgery": "none", "loss": "mse"},
    "data": {"curriculum": "all", "surgery": "none", "loss": "nll"},  # no teachers
    "one student per task": {"curriculum": "all", "surgery": "none"},  # of the same size together
}
for v in (
    "fixed",
    "all",
    "novelty p=1",
    "novelty p=2",
    "novelty p=4",
    "novelty, previous",
    "novelty p=4, previous",
    "novelty, reverse",
    "mse",
    "data",
):
    VARIANTS[f"{v}, top"] = {
        **VARIANTS[v],
        "top": 0.1,
    }  # for acting: half of each teacher's windows from the tenth of its data that returned most
VARIANTS |= {f"novelty p=4, top {part}": {**VARIANTS["novelty p=4"], "top": part} for part in (0.05, 0.25)}
LRS = (4e-3, 8e-3, 16e-3, 32e-3)  # the grid that rates() begins with
HALF = (
    "fixed",
    "all",
    "novelty p=2",
    "novelty p=4",
    "novelty, previous",
    "novelty p=4, previous",
    "novelty, average",
)
NOVELTY = (
    "novelty p=2"  # what others are set beside where KL is compared, which is measured on all windows alike
)
DEFAULT = f"{NOVELTY}, top"  # what distill.py does unasked
BESIDE = {"with surgery": "novelty, previous, top", "without curriculum": "all, top", "round-robin": "fixed, top", "uniform windows": NOVELTY,
          "without teachers": "data, top"}  # fmt: skip
ACTING = (
    "fixed",
    "all",
    "novelty p=2",
    "novelty p=4",
    "novelty p=4, previous",
    *(v for v in VARIANTS if "top" in VARIANTS[v]),
)
POINTS = 10  # of a curve


def prepare():
    """In each process that makes runs."""
    torch.set_num_threads(1)
    machine.keep_freed_memory()


def extend(weights, N):
    """Puts what is not the project's own into the tables of the method, anew for each run: an extension as README describes it."""
    first, v = torch.zeros(N), torch.zeros(())

    def relative(d, step, shares, generator):
        """Novelty of the KL over its own first value: no teacher is preferred for the scale of its KL."""
        if step == 0:
            first.copy_(d)
        return curriculum.novelty(d / first, step, shares, generator, power=2.0)

    def stay(d, step, shares, generator):
        """The farthest teacher alone, and then for 20 updates."""
        return curriculum.novelty(d, step, shares, generator, power=math.inf) if step % 20 == 0 else shares

    def long_average(g, u, kappa=None, changed=True):
        """Never against the average of the last hundred updates."""
        g = surgery.surgered(g, u, kappa)
        return g, 0.99 * u + 0.01 * g

    def metric(g, u, kappa=None, changed=True):
        """`previous` in Adam's metric: what is never opposed is the last update as AdamW scales it, not its gradient."""
        nonlocal v
        v = 0.999 * v + 0.001 * g * g
        scale = 1 / (v.sqrt() + 1e-8)
        gu, uu = g @ (scale * u), u @ (scale * u)
        g = g - torch.where(uu > 0, gu.clamp_max(0) / uu, 0.0) * u
        return g, g

    curriculum.METHODS |= {
        "relative": relative,
        "stay": stay,
        "weights": lambda d, step, shares, generator: torch.tensor(weights),
    }
    surgery.METHODS |= {"average 0.99": long_average, "metric": metric}
    try:
        from torchjd.aggregation import CAGrad, UPGrad

        for name, aggregate in (("upgrad", UPGrad()), ("cagrad", CAGrad(c=0.5))):
            surgery.METHODS[name] = lambda g, u, kappa=None, changed=True, f=aggregate: (
                2 * (len(g) * f(g),)
            )  # theirs are means
            surgery.EACH = (*surgery.EACH, name) if name not in surgery.EACH else surgery.EACH
    except ImportError:  # main has told
        pass


@dataclasses.dataclass
class Config:
    cases: tuple[str, ...] = (
        "builtin",
        "conflict",
    )  # keys of CASES; thirdparty and many need datasets of those names
    only: tuple[str, ...] = ()  # keys of VARIANTS; none: all
    without: tuple[str, ...] = ()  # keys of VARIANTS to leave out
    budgets: tuple[str, ...] = ("updates", "half", "time", "acting")  # as listed above
    seeds: int = 10  # of the runs that count: --first-seed and those after it
    first_seed: int = 0  # teachers trained on another kind of machine differ: there, go on with seeds that the CSV does not have
    tune_seeds: int = 1  # of those that learning rates are chosen by: 100, 101, ...
    teachers: int = 3  # trained for each task, on seeds 0, 1, ...
    steps: int = 700  # a student's updates
    acting_steps: int = 4000  # the same where it acts
    compression: float = 15.0  # the teachers' parameters over the student's
    sizes: tuple[float, ...] = (
        5.0,
        15.0,
        50.0,
    )  # the same where the default's students, and those without teachers, act on the built-in tasks
    jobs: int = 2  # runs at a time, one thread each
    out: str = "research/results/study.csv"  # a row per run; figures go beside it
    work_dir: str = "out/study"  # where teachers are, or are trained
    report: bool = False  # no runs


# ---- one run ---------------------------------------------------------------------------------------------------------


def teacher_dir(work_dir, name, seed):
    return Path(work_dir) / "teachers" / f"{name.replace('/', '-')}-{seed}"


def targets(path, model, task, table):
    """What a teacher says of every row of its data, (n, 2A); computed once, and again where the teacher beside it was trained anew."""
    if not path.exists() or path.stat().st_mtime_ns < (path.parent / "model.safetensors").stat().st_mtime_ns:
        one = data.Windows([table], [task], model.cfg.context, targets=True)
        distill.cache_targets([model], one)
        files.write(path, safetensors.torch.save({"targets": one.table[:, -2 * task.act_dim :].contiguous()}))
    return safetensors.torch.load_file(path)["targets"]


@functools.lru_cache(1)
def setup(case, seed, teachers, work_dir):
    """A case's teachers as this seed draws them: models, tasks, metrics; their data with targets; the held-out windows, and the targets of those."""
    rng = np.random.default_rng(seed)
    dirs = [teacher_dir(work_dir, name, int(rng.integers(teachers))) for name in CASES[case]]
    models, metas = zip(*map(dt.load, dirs), strict=True)
    tasks = [data.tasks(meta, d)[0] for meta, d in zip(metas, dirs, strict=True)]
    metrics = [files.read_json(d / "metrics.json")["tasks"][t.name] for d, t in zip(dirs, tasks, strict=True)]
    sets = [data.load(t.dataset, t.split_seed) for t in tasks]
    train = data.Windows([s.train for s in sets], tasks, models[0].cfg.context, targets=True)
    held_out = data.Windows([s.held_out for s in sets], tasks, models[0].cfg.context).spread(256)
    for d, model, task, s, table in zip(
        dirs, models, tasks, sets, train.table.split(train.size.tolist()), strict=True
    ):
        said = targets(d / "targets.safetensors", model, task, s.train)
        table[:, -2 * train.A :].unflatten(1, (2, train.A))[..., : task.act_dim] = said.unflatten(
            1, (2, task.act_dim)
        )
    return models, tasks, metrics, train, held_out, distill.live_targets(models, held_out)


def alone(i, windows, tasks):
    """The windows of task i, with targets, as those of a single task."""
    t, O, A = tasks[i], windows.O, windows.A
    x = windows.table[int(windows.offset[i]) :][: int(windows.size[i])]
    states, actions, rest, mean, log_std = x.split((O, A, 2, A, A), dim=1)
    one = data.Windows(
        [torch.cat((states[:, : t.obs_dim], actions[:, : t.act_dim], rest), 1).numpy()],
        [t],
        windows.K,
        targets=True,
    )
    one.table[:, -2 * t.act_dim :] = torch.cat((mean[:, : t.act_dim], log_std[:, : t.act_dim]), 1)
    return one


def width(tasks, context, n_layer, budget):
    """n_embd, a multiple of 8, of the student whose parameters come nearest to `budget`."""

    def parameters(C):
        with torch.device("meta"):
            return dt.DecisionTransformer(
                dt.ModelConfig.of(tasks, n_layer=n_layer, n_embd=C, context=context)
            ).n_params

    return min(range(8, 512, 8), key=lambda C: abs(parameters(C) - budget))


@torch.no_grad()
def held_out_kl(student, windows, targets):
    """KL(teacher || student) on the windows of each teacher, (N,), whatever the student was trained by."""
    head, act_dims = student.head, torch.tensor(student.cfg.act_dims)
    h, categorical = student(*windows[:6], hidden=True), student.cfg.categorical("cpu")
    sums, counts = head_kl(
        h,
        head.weight,
        head.bias,
        *targets,
        windows.mask,
        windows.task,
        act_dims,
        "forward",
        distill.Config.sigma_floor,
        1.0,
        categorical,
    )
    return (sums / counts).tolist()


def distilled(cfg: distill.Config, models, tasks, train, held_out, held_out_targets):
    """Train one student. Returns it; the curve [(update, [KL of each teacher])]; seconds, without those of measuring; and every update's cosine and whether it
    was projected."""
    torch.manual_seed(cfg.seed)
    student = dt.DecisionTransformer(
        dt.ModelConfig.of(tasks, n_layer=cfg.n_layer, n_embd=cfg.n_embd, context=train.K)
    )
    student.bfloat16, train.top = machine.bfloat16(cfg), cfg.top
    update, _, state = distill.learner(
        cfg, student, models, train, train.spread(cfg.probe_windows), torch.Generator().manual_seed(cfg.seed)
    )
    curve, rows, seconds = [], [], 0.0
    for step in range(cfg.steps + 1):
        if step % cfg.log_interval == 0:
            student.eval()
            curve.append((step, held_out_kl(student, held_out, held_out_targets)))
            student.train()
            rows.append(state["record"][:, 1:3].clone()) if step else None
        if step < cfg.steps:
            start = time.process_time()  # of this one thread: other runs take turns with it
            try:
                update(step)
            except (
                ValueError
            ):  # a curriculum was told a distance that is NaN: what is measured from here on is infinite
                with torch.no_grad():
                    state["theta"].fill_(math.nan)
                update = lambda step: None  # noqa: E731
            seconds += time.process_time() - start
    student.eval()
    return student, curve, seconds, torch.cat(rows)


def one_run(spec):
    """A row of the CSV, from what it is to be: {case, variant, budget, seed, lr, steps, times, weights, teachers, work_dir}."""
    models, tasks, metrics, train, held_out, held_out_targets = setup(
        spec["case"], spec["seed"], spec["teachers"], spec["work_dir"]
    )
    extend(spec["weights"], len(tasks))
    total = sum(m.n_params for m in models)
    options = {
        "steps": spec["steps"],
        "lr": spec["lr"],
        "seed": spec["seed"],
        "log_interval": spec["steps"] // POINTS,
        "device": "cpu",
        "top": 1.0,
    }
    if spec["variant"] == "one student per task":  # each with its part of the windows of every update
        curves, seconds, parameters, returns = [], 0.0, 0, []
        for i, t in enumerate(tasks):
            C = width([t], train.K, 2, total / spec["times"] / len(tasks))
            cfg = distill.Config(
                **VARIANTS["all"], **options, n_embd=C, batch_size=distill.Config.batch_size // len(tasks)
            )
            of_it = held_out.task == i
            mine = data.Batch(*(x[of_it] for x in held_out[:-1]), held_out.targets[:, of_it])
            mine = mine._replace(
                task=mine.task * 0,
                states=mine.states[..., : t.obs_dim],
                actions=mine.actions[..., : t.act_dim],
            )
            student, curve, s, log = distilled(
                cfg,
                models[i : i + 1],
                [t],
                alone(i, train, tasks),
                mine,
                held_out_targets[:, of_it, :, : t.act_dim],
            )
            curves.append(curve)
            seconds, parameters = seconds + s, parameters + student.n_params
            returns += (
                [evaluate.scores(evaluate.rollout(student, t, 0, t.targets["p95"], 20, 1000)[0], t)]
                if spec["budget"] == "acting"
                else []
            )
        curve = [(points[0][0], [p[1][0] for p in points]) for points in zip(*curves, strict=True)]
    else:
        C = width(tasks, train.K, 2, total / spec["times"])
        cfg = distill.Config(**{**options, **VARIANTS[spec["variant"]]}, n_embd=C)
        student, curve, seconds, log = distilled(cfg, models, tasks, train, held_out, held_out_targets)
        parameters, returns = student.n_params, []
        if spec["budget"] == "acting":
            returns = [
                evaluate.scores(evaluate.rollout(student, t, i, t.targets["p95"], 20, 1000)[0], t)
                for i, t in enumerate(tasks)
            ]
    retention = [
        r["normalized_score"] / m["normalized_score"] for r, m in zip(returns, metrics, strict=False)
    ]
    at = machine.describe(distill.Config(device="cpu"))
    return {
        **{k: spec[k] for k in KEY}, "n_embd": C, "compression": f"{total / parameters:.2f}", "seconds": f"{seconds:.1f}", "ms": f"{1000 * seconds / spec['steps']:.2f}",
        "projected": f"{log[:, 1].mean():.4f}", "cosine": dumps(np.quantile(log[1:, 0], [0.05, 0.25, 0.5, 0.75, 0.95])), "weights": dumps(spec["weights"]),
        "steps_at": dumps([s for s, _ in curve]), "kl": dumps([kl for _, kl in curve]), "retention": dumps(retention),
        "teacher_scores": dumps([m["normalized_score"] for m in metrics]),
        **{k: at[k] for k in ("device", "dtype", "torch", "commit")}}  # fmt: skip


def dumps(x):
    return json.dumps(
        json.loads(
            json.dumps(x if isinstance(x, list) else list(x)), parse_float=lambda v: float(f"{float(v):.4g}")
        )
    )


KEY = ("case", "variant", "budget", "seed", "lr", "steps", "times")  # what tells two runs apart


# ---- all runs --------------------------------------------------------------------------------------------------------


def read(path):
    """The CSV's rows, numbers and lists as such."""
    if not Path(path).exists():
        return []
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    for r in rows:
        for k in ("seed", "steps", "n_embd"):
            r[k] = int(r[k])
        for k in ("lr", "times", "compression", "seconds", "ms", "projected"):
            r[k] = float(r[k])
        for k in ("cosine", "weights", "steps_at", "kl", "retention", "teacher_scores"):
            r[k] = np.array(json.loads(r[k]))
    return rows


def add(path, row):
    """The CSV with one row more, whole or as it was."""
    text, path = io.StringIO(newline=""), Path(path)
    out = csv.DictWriter(text, row)
    if not path.exists():
        out.writeheader()
    out.writerow(row)
    files.write(path, (path.read_bytes() if path.exists() else b"") + text.getvalue().encode())


def worst(r):
    """A run's last KL to its worst teacher; infinite where it was lost."""
    return float(np.nan_to_num(r["kl"][-1].max(), nan=math.inf))


def by_rate(rows, case, variant):
    """The runs on the tuning seeds, {learning rate: runs}, from the lowest rate to the highest."""
    out = {}
    for r in sorted(rows, key=lambda r: r["lr"]):
        if (r["case"], r["variant"], r["budget"]) == (case, variant, "tune"):
            out.setdefault(r["lr"], []).append(r)
    return out


def tuned(rows, case, variant):
    """The learning rate with which the worst teacher's last KL is lowest on the tuning seeds, geometric mean; and those seeds' KL of each teacher with it."""
    tried = by_rate(rows, case, variant)
    lr = min(tried, key=lambda lr: np.log([worst(r) for r in tried[lr]]).mean(), default=LRS[0])
    return lr, [r["kl"][-1] for r in tried.get(lr, [])]


def rates(rows, case, variant):
    """The learning rates to tune over: LRS and, while the lowest or highest of those tried does best, half or twice that."""
    tried = by_rate(rows, case, variant)
    if not tried.keys() >= set(LRS):
        return LRS
    best, kl = tuned(rows, case, variant)
    ends = {min(tried): best / 2, max(tried): best * 2} if np.isfinite(kl).all() else {}
    return [*tried, *(ends[lr] for lr in ends if lr == best)]


def weights(rows, case, variant):
    """Shares of the fixed weights: from the tuning runs with equal shares."""
    if "w=" not in variant:
        return []
    kl = np.mean(tuned(rows, case, "all")[1], 0) ** float(variant.split("w=")[1])
    return (kl / kl.sum()).tolist()


def cost(rows, case, variant):
    """Milliseconds of one core for an update, median over the runs of budget "cost": what other budgets took, a machine took that was now more, now less busy."""
    return np.median(
        [r["ms"] for r in rows if (r["case"], r["variant"], r["budget"]) == (case, variant, "cost")]
        or [math.nan]
    )


def plan(cfg: Config, rows, stage):
    """The runs of a stage (0: tuning, 1: tuning of what needs the first, 2: those that count, and what they cost, 3: those whose updates are counted from
    that), as one_run takes them."""
    names = [v for v in cfg.only or VARIANTS if v not in cfg.without]
    fixed = {"steps": cfg.steps, "times": cfg.compression, "teachers": cfg.teachers, "work_dir": cfg.work_dir}
    if stage < 2:
        also = (
            {"fixed", "all"} if stage == 0 else set()
        )  # the time budget and the weights are counted from them
        for case in cfg.cases:
            for seed in range(100, 100 + cfg.tune_seeds):
                for v in dict.fromkeys((*also, *names)):
                    if ("w=" in v) == (stage == 1):
                        yield from (
                            {
                                "case": case,
                                "variant": v,
                                "budget": "tune",
                                "seed": seed,
                                "lr": lr,
                                "weights": weights(rows, case, v),
                                **fixed,
                            }
                            for lr in rates(rows, case, v)
                        )
        return
    for budget in (
        ["cost" if b == "time" else b for b in cfg.budgets] if stage == 2 else {"time"} & set(cfg.budgets)
    ):
        for seed in range(cfg.first_seed, cfg.first_seed + (5 if budget == "cost" else cfg.seeds)):
            for case in cfg.cases:
                for v in dict.fromkeys(("fixed", *names)) if budget == "cost" else names:
                    lr, slower = tuned(rows, case, v)[0], cost(rows, case, v) / cost(rows, case, "fixed")
                    spec = {
                        "case": case,
                        "variant": v,
                        "budget": budget,
                        "seed": seed,
                        "lr": lr,
                        "weights": weights(rows, case, v),
                        **fixed,
                    }
                    if budget == "updates" or (budget == "half" and v in HALF):
                        yield {**spec, "steps": cfg.steps // (1 + (budget == "half"))}
                    elif budget == "cost":
                        yield {**spec, "steps": 4 * POINTS}
                    elif budget == "time" and slower > 1.1:
                        yield {**spec, "steps": max(1, round(cfg.steps / slower / POINTS)) * POINTS}
                    elif budget == "acting" and v in ACTING:
                        every_size = (
                            case == "builtin"
                            and v in (DEFAULT, BESIDE["without teachers"])
                            and cfg.acting_steps == Config.acting_steps
                        )
                        sizes = cfg.sizes if every_size else (cfg.compression,)
                        yield from ({**spec, "steps": cfg.acting_steps, "times": c} for c in sizes)


def train_teachers(cfg: Config):
    for case in cfg.cases:
        for name in CASES[case]:
            for seed in range(cfg.teachers):
                out = teacher_dir(cfg.work_dir, name, seed)
                if files.read_json(out / "metrics.json") is None:
                    which = {"env": name} if name in data.ENVS else {"dataset": name}
                    print(f"no teacher in {out}: training it", flush=True)
                    steps = 1500 if name in THIRDPARTY else teacher.Config.steps  # with a quarter of the data
                    teacher.main(
                        teacher.Config(**which, steps=steps, seed=seed, out_dir=str(out), resume=True)
                    )


def main(cfg: Config):
    cli.at_least(
        cfg,
        seeds=1,
        first_seed=0,
        tune_seeds=1,
        teachers=1,
        steps=POINTS,
        acting_steps=POINTS,
        compression=1,
        sizes=1,
        jobs=1,
    )
    for option, known in (
        ("cases", CASES),
        ("only", VARIANTS),
        ("without", VARIANTS),
        ("budgets", Config.budgets),
    ):
        unknown = set(getattr(cfg, option)) - set(known)
        if unknown:
            raise UserError(f"--{option} {unknown.pop()}: choose from {', '.join(known)}")
    if not cfg.report:
        if {"upgrad", "cagrad"} & set(cfg.only or VARIANTS) - set(cfg.without) and importlib.util.find_spec(
            "torchjd"
        ) is None:
            raise UserError(
                "upgrad and cagrad need torchjd: pip install 'torchjd[quadprog-projector,cagrad]'; or --without upgrad cagrad"
            )
        train_teachers(cfg)
        for stage in range(4):
            while specs := missing(cfg, rows := read(cfg.out), stage):
                run_all(cfg, specs, rows)
    report(cfg)


def missing(cfg: Config, rows, stage):
    there = {tuple(r[k] for k in KEY) for r in rows}
    return [s for s in plan(cfg, rows, stage) if tuple(s[k] for k in KEY) not in there]


def run_all(cfg: Config, specs, rows):
    spent = [r["seconds"] / r["steps"] for r in rows] or [0.03]
    print(
        f"{len(specs)} runs of about {np.mean(spent) * np.mean([s['steps'] for s in specs]):.0f} s, {cfg.jobs} at a time",
        flush=True,
    )
    with contextlib.ExitStack() as stack:
        if cfg.jobs == 1:
            prepare()
            made = map(one_run, specs)
        else:
            made = stack.enter_context(
                multiprocessing.get_context("spawn").Pool(cfg.jobs, prepare)
            ).imap_unordered(one_run, specs)
        for row in tqdm(made, total=len(specs), unit="run", disable=None):
            add(cfg.out, row)
            kl = " ".join(f"{x:.3f}" for x in json.loads(row["kl"])[-1])
            tqdm.write(
                f"{row['case']}, {row['variant']}, {row['budget']}, seed {row['seed']}, lr {row['lr']:g}: KL {kl} | {row['seconds']} s"
            )


# ---- statistics: rliable's definitions -------------------------------------------------------------------------------


def iqm(x):
    """Interquartile mean: of the middle half of x."""
    x = np.sort(np.ravel(x))
    cut = len(x) // 4
    return x[cut : len(x) - cut].mean()


def pooled(strata):
    """The interquartile mean of all strata together."""
    return iqm(np.concatenate(strata))


def interval(statistic, strata, n=2000):
    """95 % percentile bootstrap of statistic(strata); strata: arrays whose first axis is seeds, each resampled by itself."""
    rng = np.random.default_rng(0)
    drawn = [statistic([x[rng.integers(len(x), size=len(x))] for x in strata]) for _ in range(n)]
    return np.quantile(drawn, [0.025, 0.975])


def improvement(pairs):
    """Probability that a run of the first is better (lower) than one of the second, ties half; pairs: (first, second) of each case, averaged over cases."""
    return np.mean([(x[:, None] < y).mean() + (x[:, None] == y).mean() / 2 for x, y in pairs])


def cell(statistic, strata, form="{:.3f}"):
    """A value with its interval, as text; strata: a list of arrays."""
    low, high = interval(statistic, strata)
    return f"{form.format(statistic(strata))} ({form.format(low)}{' to ' if low < 0 else '-'}{form.format(high)})"


# ---- the report ------------------------------------------------------------------------------------------------------


def report(cfg: Config):
    """Print the tables, write the figures beside the CSV."""
    rows = read(cfg.out)
    if not rows:
        raise UserError(f"{cfg.out} holds no run; run study.py without --report first")
    # a row of a rate that has since lost to another counts no more, but for what an update costs
    lrs = {
        key: tuned(rows, *key)[0]
        for key in {(r["case"], r["variant"]) for r in rows if r["budget"] == "tune"}
    }
    rows = [
        r
        for r in rows
        if r["budget"] in ("tune", "cost") or r["lr"] == lrs.get((r["case"], r["variant"]), r["lr"])
    ]
    of, acting = {}, {}  # {(budget, times): {case: {variant: runs, by seed}}}, {(times, steps): the same}
    for r in sorted(rows, key=lambda r: (list(CASES).index(r["case"]), r["seed"])):
        group = (
            acting.setdefault((r["times"], r["steps"]), {})
            if r["budget"] == "acting"
            else of.setdefault((r["budget"], r["times"]), {})
        )
        group.setdefault(r["case"], {}).setdefault(r["variant"], []).append(r)
    order = {v: i for i, v in enumerate(VARIANTS)}
    for budget, title in (("updates", "equal updates"), ("time", "equal time"), ("half", "half the updates")):
        by_case = of.get((budget, cfg.compression), {})
        reference = of.get(("updates", cfg.compression), {})  # `fixed` is its own time budget
        if budget == "time":
            by_case = {
                c: {
                    **{
                        v: rs
                        for v, rs in reference.get(c, {}).items()
                        if cost(rows, c, v) > 0 or v == NOVELTY
                    },
                    **vs,
                }
                for c, vs in by_case.items()
            }  # or NaN
        variants = sorted({v for c in by_case.values() for v in c}, key=order.get)
        if compared := {c: runs for c, runs in by_case.items() if "fixed" in reference.get(c, {})}:
            print(f"\n{title}: worst teacher's last KL on held-out episodes\n")
            print(table(compared, reference, variants))
            print("\nof the same runs: learning rate in thousandths; area under the curve, mean KL and time of an update over fixed order's; the share of the updates "
                  "after which its last KL is reached\n")  # fmt: skip
            print(details(compared, reference, variants, rows))
        if by_case:
            print(f"\n{title}, on the same seeds\n\n{same_seeds(by_case, variants)}")
    if any(r["budget"] == "tune" for r in rows):
        print(f"\ntuning: worst teacher's last KL with each learning rate\n\n{tuning_table(rows)}")
    if acting:
        print(f"\nretention\n\n{retention_table(acting)}")
        for case, by_variant in acting.get((cfg.compression, cfg.acting_steps), {}).items():
            if DEFAULT in by_variant:
                print(
                    f"\n{case}: scores of teachers and students, {cfg.compression:g} times smaller\n\n{score_table(case, by_variant)}"
                )
    by_case = of.get(("updates", cfg.compression), {})
    if by_case:
        folder = Path(cfg.out).parent
        if compared := {c: runs for c, runs in by_case.items() if "fixed" in runs}:
            plot_orders(folder / "study_orders.png", compared)
        plot_surgery(folder / "study_surgery.png", by_case)
        plot_retention(
            folder / "study_retention.png",
            {
                times: by_case
                for (times, steps), by_case in sorted(acting.items())
                if steps == cfg.acting_steps
            },
        )


def scores(runs):
    return np.array([worst(r) for r in runs])


def curve(r):
    """Worst teacher's KL at each point measured, (POINTS + 1,)."""
    return r["kl"].max(1)


def reached(r, kl):
    """After which share of its updates a run's worst KL is at most `kl` for the first time, along straight lines in log KL; infinite where never."""
    y, x = np.log(curve(r)), r["steps_at"] / r["steps"]
    below = np.flatnonzero(y <= math.log(kl))
    if not len(below):
        return math.inf
    around = slice(max(below[0] - 1, 0), below[0] + 1)
    return float(np.interp(-math.log(kl), -y[around], x[around]))


def table(by_case, reference, variants):
    """A line for each variant. Columns: each case; then what is pooled over the cases it has runs of: KL over fixed order's, probability that it is better than
    fixed order, and that NOVELTY is better than it."""
    cases = list(by_case)
    out = [
        f"| | seeds | {' | '.join(cases)} | over fixed order's | better than it | {NOVELTY} better |",
        "|---" * (len(cases) + 5) + "|",
    ]
    for v in variants:
        there = [c for c in cases if v in by_case[c]]
        if not there:
            continue
        x = {c: scores(by_case[c][v]) for c in there}
        fixed = [y for c in there for y in (x[c], scores(reference[c]["fixed"]))]
        both = [c for c in there if NOVELTY in by_case[c] and v != NOVELTY]
        novelty = [y for c in both for y in (scores(by_case[c][NOVELTY]), x[c])]
        cells = [cell(pooled, [x[c]]) if c in there else "" for c in cases]
        cells += [cell(pooled, [y / iqm(scores(reference[c]["fixed"])) for c, y in x.items()], "{:.2f}"), cell(in_pairs, fixed, "{:.2f}"),
                  cell(in_pairs, novelty, "{:.2f}") if both else ""]  # fmt: skip
        out.append(f"| {v} | {'/'.join(str(len(x[c])) for c in there)} | {' | '.join(cells)} |")
    return "\n".join(out)


def paired(f, runs, others):
    """f(run, other) where the seeds, and with them the teachers, are the same."""
    return np.array(
        [
            f(a, b)
            for a in runs
            for b in others
            if a["seed"] == b["seed"] and np.array_equal(a["teacher_scores"], b["teacher_scores"])
        ]
    )


def ratios(runs, others):
    """Worst teacher's last KL of runs over others'."""
    return paired(lambda a, b: worst(a) / worst(b), runs, others)


def same_seeds(by_case, variants):
    """A line for each variant: NOVELTY's KL over its on the same seed, for the teachers that a seed draws differ more than most variants do; and the probability
    that it is lower there."""
    cases = [c for c in by_case if NOVELTY in by_case[c]]
    out = [
        f"| {NOVELTY}'s KL over that of | {' | '.join(cases)} | all of these | lower |",
        "|---" * (len(cases) + 3) + "|",
    ]
    for v in variants:
        x = {c: y for c in cases if len(y := ratios(by_case[c][NOVELTY], by_case[c].get(v, [])))}
        if x and v != NOVELTY:
            cells = [cell(pooled, [x[c]], "{:.2f}") if c in x else "" for c in cases]
            lower = cell(lambda s: improvement((y, np.ones(1)) for y in s), list(x.values()), "{:.2f}")
            out.append(
                f"| {v} | {' | '.join(cells)} | {cell(pooled, list(x.values()), '{:.2f}')} | {lower} |"
            )
    return "\n".join(out)


def in_pairs(s):
    """`improvement` of strata that are first, second, first, second, ..."""
    return improvement(zip(s[::2], s[1::2], strict=True))


def details(by_case, reference, variants, rows):
    """A line for each variant: of what its runs are made, and what else was measured; pooled over cases, but for how soon fixed order's last KL is reached."""
    cases = list(by_case)
    out = [
        f"| | lr | area | mean KL | {' | '.join(f'{c}: reached at' for c in cases)} | time | projected | cosine: 5 %, median, 95 % |",
        "|---" * (7 + len(cases)) + "|",
    ]
    for v in variants:
        there = [c for c in cases if v in by_case[c]]
        runs, fixed = {c: by_case[c][v] for c in there}, {c: reference[c]["fixed"] for c in there}
        if not there:
            continue
        area = np.concatenate(
            [
                paired(lambda r, f: np.exp(np.mean(np.log(curve(r) / curve(f))[1:])), runs[c], fixed[c])
                for c in there
            ]
        )
        mean = [
            r["kl"][-1].mean() / iqm([f["kl"][-1].mean() for f in fixed[c]]) for c in there for r in runs[c]
        ]
        every = [r for c in there for r in runs[c]]
        cosine = ", ".join(f"{x:.2f}" for x in np.nanmean([r["cosine"] for r in every], 0)[[0, 2, 4]])
        lrs = "/".join(f"{1000 * runs[c][0]['lr']:g}" for c in there)
        soon = {c: paired(lambda r, f: reached(r, worst(f)), runs[c], fixed[c]) for c in there}
        soon = " | ".join(
            (
                ""
                if c not in soon
                else cell(pooled, [soon[c]], "{:.2f}")
                if np.isfinite(soon[c]).all()
                else "not by all"
            )
            for c in cases
        )
        times = [x for c in there if not math.isnan(x := cost(rows, c, v) / cost(rows, c, "fixed"))]
        out.append(f"| {v} | {lrs} | {iqm(area):.2f} | {iqm(mean):.2f} | {soon} | {f'{np.mean(times):.2f}' if times else ''} | "
                   f"{100 * np.mean([r['projected'] for r in every]):.0f} % | {cosine} |")  # fmt: skip
    return "\n".join(out)


def tuning_table(rows):
    """A line for each variant: in each case, its KL with each learning rate on the tuning seeds (those off the grid in brackets); in bold, the one taken."""
    rows = [r for r in rows if r["budget"] == "tune"]
    cases, names = (
        [k for k in table if any(r[key] == k for r in rows)]
        for table, key in ((CASES, "case"), (VARIANTS, "variant"))
    )
    out = [
        f"| with {', '.join(f'{1000 * lr:g}' for lr in LRS)} thousandths, or as said | {' | '.join(cases)} |",
        "|---" * (len(cases) + 1) + "|",
    ]
    for v in names:
        cells = []
        for c in cases:
            best, kl = (
                tuned(rows, c, v)[0],
                {
                    lr: np.exp(np.log([worst(r) for r in runs]).mean())
                    for lr, runs in by_rate(rows, c, v).items()
                },
            )
            kl = {lr: f"{x:.3f}{'' if lr in LRS else f' ({1000 * lr:g})'}" for lr, x in kl.items()}
            cells.append(", ".join(f"**{x}**" if lr == best else x for lr, x in kl.items()))
        out.append(f"| {v} | {' | '.join(cells)} |")
    return "\n".join(out)


def kept(runs):
    """Of runs that acted, what is reported of their retention, one number a seed: the mean over tasks and the worst task's."""
    x = np.array([r["retention"] for r in runs])  # (seeds, tasks)
    return {"mean": x.mean(1), "worst task": x.min(1)}


def retention_table(acting):
    """A line for each variant: mean and worst task; how much more the default's are on the same seeds, and its worst teacher's KL over the default's there."""
    out = ["| case | compression | updates | | seeds | mean | worst task | the default's mean minus it | worst task minus it | KL over the default's |",
           "|---" * 10 + "|"]  # fmt: skip
    for (times, steps), by_case in sorted(acting.items()):
        for case, by_variant in by_case.items():
            for v, runs in by_variant.items():
                default = by_variant.get(DEFAULT, []) if v != DEFAULT else []
                more = [
                    paired(lambda a, b, what=what: (kept([a])[what] - kept([b])[what])[0], default, runs)
                    for what in kept(runs)
                ]
                more.append(ratios(runs, default))
                cells = [
                    *(cell(pooled, [x]) for x in kept(runs).values()),
                    *(cell(pooled, [x]) if len(x) else "" for x in more),
                ]
                out.append(f"| {case} | {times:g} | {steps} | {v} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(out)


def score_table(case, by_variant):
    """A line for each task: its teachers' score and the students', of the default and, where their teachers are the same, of what stands beside it."""
    columns = {
        name: paired(lambda r, _: r, by_variant.get(v, []), by_variant[DEFAULT])
        for name, v in (("student", DEFAULT), *BESIDE.items())
    }
    columns = {name: runs for name, runs in columns.items() if len(runs)}
    out = [f"| task | teacher | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    teachers = np.array([r["teacher_scores"] for r in by_variant[DEFAULT]])  # (seeds, tasks)
    for i, task in enumerate(CASES[case]):
        students = [
            np.array([r["teacher_scores"][i] * r["retention"][i] for r in runs]) for runs in columns.values()
        ]
        out.append(
            f"| {task} | {' | '.join(cell(pooled, [x], '{:.1f}') for x in (teachers[:, i], *students))} |"
        )
    out.append(f"| seeds | | {' | '.join(str(len(runs)) for runs in columns.values())} |")
    for what in ("mean", "worst task"):
        out.append(
            f"| retention, {what} | | {' | '.join(cell(pooled, [kept(runs)[what]], '{:.2f}') for runs in columns.values())} |"
        )
    return "\n".join(out)


def figure(n, columns, width=4.2, height=3.6):
    rows = -(-n // columns)
    fig, axes = report_figure(rows, columns, (width * columns, height * rows))
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[n:]:
        ax.remove()
    return fig, axes[:n]


def plot_orders(path, by_case):
    """Worst teacher's KL over updates by order; performance profiles of the orders that have runs of every case; and what mixing by distance changes beside
    equal shares, on the same seeds."""
    orders = (
        "fixed",
        "all",
        "uniform",
        "dro",
        "novelty p=1",
        "novelty p=2",
        "least",
        "novelty p=4",
        "novelty p=inf",
    )
    fig, (*axes, profiles, beside) = figure(len(by_case) + 2, 3)
    for ax, (case, runs) in zip(axes, by_case.items(), strict=False):
        for i, v in [(i, o) for i, o in enumerate(orders) if o in runs]:
            curves, at = np.array([curve(r) for r in runs[v]]), runs[v][0]["steps_at"]
            band = np.array([interval(pooled, [curves[:, k]], 300) for k in range(len(at))]).T
            ax.plot(at[1:], [iqm(c) for c in curves.T][1:], **style(i), label=v)
            ax.fill_between(at[1:], *band[:, 1:], color=COLOURS[i % 8], alpha=0.12, linewidth=0)
        seeds = "/".join(str(n) for n in sorted({len(runs[o]) for o in orders if o in runs}))
        ax.set(yscale="log", xlabel="update", title=f"{case} ({seeds} seeds)")
        logarithmic(ax.yaxis)
    for ax in axes[::3]:
        ax.set_ylabel("KL to the worst teacher, held-out (nats)")
    axes[0].legend(frameon=False, fontsize=8)
    tau = np.geomspace(0.3, 3, 200)
    for i, v in enumerate(orders):
        if all(v in runs for runs in by_case.values()):
            x = [scores(runs[v]) / iqm(scores(runs["fixed"])) for runs in by_case.values()]
            profiles.plot(tau, [np.mean([(s <= t).mean() for s in x]) for t in tau], **style(i), label=v)
    profiles.set(
        xscale="log",
        xlabel="last KL over fixed order's (τ)",
        ylabel="share of runs at or below τ",
        title="performance profiles, all cases",
    )
    logarithmic(profiles.xaxis)
    for k, runs in enumerate(by_case.values()):
        for j, v in enumerate(("dro", "novelty p=1", "novelty p=2", "novelty p=4")):
            if len(x := ratios(runs.get(v, []), runs.get("all", []))):
                at, line = k + (j - 1.5) / 6, style(orders.index(v))
                beside.plot([at, at], interval(pooled, [x]), **line)
                beside.plot(at, iqm(x), "o", **line, markersize=4)
    beside.axhline(1, color="grey", linewidth=0.8)
    beside.set_xticks(range(len(by_case)), by_case)
    beside.set(ylabel="last KL over equal shares'", title="on the same seeds")
    fig.savefig(path, dpi=120)


def logarithmic(axis):
    """Numbers as one reads them, at 1, 1.5, 2, 3, 5 and 7 of each decade."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda x, _: f"{x:g}")


def plot_surgery(path, by_case):
    """What each surgery changes: a run's last worst KL over that of the same order without surgery, on the same seeds; and (grey) what share of updates it changed."""
    without = {
        v: {**{k: x for k, x in options.items() if k != "surgery_scope"}, "surgery": "none"}
        for v, options in VARIANTS.items()
    }
    base = {
        v: next(b for b in VARIANTS if VARIANTS[b] == without[v])
        for v in VARIANTS
        if VARIANTS[v]["surgery"] != "none"
    }
    changed = {
        c: {v: x for v in base if len(x := ratios(runs.get(v, []), runs.get(base[v], [])))}
        for c, runs in by_case.items()
    }
    changed = {c: by_variant for c, by_variant in changed.items() if by_variant}
    if not changed:
        return
    rows = [v for v in base if any(v in by_variant for by_variant in changed.values())]
    fig, axes = figure(len(changed), len(changed), 3.2, 1.4 + 0.25 * len(rows))
    for ax, (case, by_variant) in zip(axes, changed.items(), strict=True):
        for v, x in by_variant.items():
            y, colour = -rows.index(v), COLOURS[list(dict.fromkeys(base.values())).index(base[v]) % 8]
            ax.plot(interval(pooled, [x]), [y, y], color=colour, linewidth=2)
            ax.plot(iqm(x), y, "o", color=colour)
            ax.annotate(f"{100 * np.mean([r['projected'] for r in by_case[case][v]]):.0f} %", (1.0, y), (2, 0), xycoords=("axes fraction", "data"),
                        textcoords="offset points", va="center", fontsize=7, color="grey")  # fmt: skip
        ax.axvline(1, color="grey", linewidth=0.8)
        ax.set_yticks([-i for i in range(len(rows))], rows if ax is axes[0] else [], fontsize=8)
        ax.set(xlabel="last KL over that without surgery", title=case, ylim=(-len(rows) + 0.5, 0.5))
    left, right = zip(*(ax.get_xlim() for ax in axes), strict=True)
    for ax in axes:
        ax.set_xlim(min(left), max(right))
    fig.savefig(path, dpi=120)


def plot_retention(path, retention):
    """What is kept by how many times fewer parameters: of the cases and variants that have runs of several sizes."""
    points = {}  # {(case, variant): {times: kept}}
    for times, by_case in retention.items():
        for case, by_variant in by_case.items():
            for v, runs in by_variant.items():
                points.setdefault((case, v), {})[times] = kept(runs)
    points = {k: p for k, p in points.items() if len(p) > 1}
    if not points:
        return
    cases, variants = (
        [k for k in table if any(p[i] == k for p in points)] for i, table in enumerate((CASES, VARIANTS))
    )
    fig, axes = figure(2 * len(cases), 2)
    for row, case in enumerate(cases):
        for ax, what in zip(axes[2 * row :], ("mean", "worst task"), strict=False):
            for i, v in [(i, v) for i, v in enumerate(variants) if (case, v) in points]:
                x, y = np.array(list(points[case, v])), [k[what] for k in points[case, v].values()]
                middle, ends = np.array([iqm(k) for k in y]), np.array([interval(pooled, [k]) for k in y])
                ax.errorbar(x * 1.02 ** (i - len(variants) / 2), middle, [middle - ends[:, 0], ends[:, 1] - middle], **style(i), marker="o", markersize=4, capsize=2,
                            label=f"{v} ({'/'.join(str(len(k)) for k in y)} seeds)")  # fmt: skip
            ax.axhline(1, color="grey", linewidth=0.8)
            ax.set(
                xscale="log",
                xlabel="times fewer parameters than the teachers",
                title=f"{case}: {what}",
                ylabel="retention" if what == "mean" else None,
            )
            ax.set_xticks(x := sorted({t for p in points for t in points[p]}), [f"{t:g}" for t in x])
            ax.minorticks_off()
        axes[2 * row].legend(frameon=False, fontsize=8)
    low, high = zip(*(ax.get_ylim() for ax in axes), strict=True)
    for ax in axes:
        ax.set_ylim(min(low), max(high))
    fig.savefig(path, dpi=120)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)

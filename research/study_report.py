"""The study's report, docs/study.md: findings first, then tables and figures, from the rows of its scripts.

`report` writes and prints it, for research/study.py.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import curriculum
from research import cells, conflict, little_data_report, streaming, study
from research.markdown import table
from research.statistics import (
    equivalence_margin,
    hierarchical_bootstrap,
    holm,
    p_value,
    percentile_interval,
    with_interval,
)
from research.study_figures import figure, save, set_logarithmic_ticks, share_limits
from research.study_rows import read
from research.tables import RESULTS
from research.variants import CASES, DEFAULT, EQUAL, RUNS
from support import UserError, files

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).parent.parent
FINDINGS = ROOT / "research/findings.md"
PAGE = ROOT / "docs/study.md"
GROUP = ("case", "tasks", "steps", "n_embd", "planted", "teachers")  # what students share that are compared
MIN_SEEDS = 5  # fewer have no p
ALPHA = 0.05  # for all comparisons together

# The sentences that introduce the page's sections.
LITTLE_DATA = (
    "Retention of students that see a share of their teachers' data, by what they learn from: its actions, "
    "teachers' labels of it, labels at other returns and states too, or labels and actions together. "
    "Intervals are of a bootstrap over teachers and over the students of each."
)
COMPARISON = (
    "Students against equal shares with the same teachers and seed: ratios of the KL to the worst teacher "
    "and of the mean KL, geometric means; intervals are of a bootstrap over teachers and over the students "
    "of each. Lower: the share of seeds whose worst KL is lower. X: where the interval holds 1, there is no "
    "difference above X (two one-sided tests at 5 %). Reached: after which share of its updates the worst KL "
    "is down to where equal shares end. Projected: share of the updates that surgery changed. Time: of an "
    "update, over equal shares'. In bold, what survives Holm's correction for all comparisons of this "
    "section."
)
TASKS = (
    "KL^2, the default, by task: KL with equal shares; its standard deviation between seeds with the same "
    "teachers, of logarithms; the default's share of the batch, over an equal one, and its KL over equal "
    "shares'. Below: the worst KL without the task whose KL differs most between seeds, and the share of "
    "seeds where it is lower."
)
SHARES = (
    "KLs of students with fixed shares, to which log KL_i = log c_i - a log(N share_i) is fitted: a of all "
    "tasks together, the range over single tasks, and how much of the tasks' variance it explains. Then the "
    "worst KL with the best shares, divided by that of equal ones: predicted from equal shares' KLs with a "
    "= 0.55, at the end and after a tenth of the updates, and with each task's own a; and the lowest that "
    "was measured with shares that a curriculum gave."
)
BOUND = (
    "Students of one task each, of the same size and with as many updates: what a teacher's KL comes to with "
    "all of every batch. Exponents: log(KL with equal shares / KL alone) / log N, means over seeds, the "
    "lowest and the highest of the tasks. Then, over the worst KL with equal shares: the highest KL of the "
    "students alone, below which no shares come (unless teachers help each other); the worst KL with the "
    "best shares by these exponents; and that of KL^2, the default."
)
CONFLICT = (
    "Cosines between the gradients of different teachers' KLs in a layer that they share: the lowest of all "
    "pairs, quantiles, and the share below 0. A teacher's two sets: the cosine between its gradients on "
    "other windows, as many as the other columns are of; below 1 it is noise, which draws all cosines to 0. "
    "KLs raised: the share of teachers whose KL a small step down the mean of all gradients would raise. "
    "Means over seeds."
)
STREAMS = (
    "Teachers that arrive one after the other, against equal shares of those that are there, on the same "
    "seeds: the KL to the worst of them and the mean KL, each averaged over time; the worst at the end; the "
    "newest's at the end of its phase. Last, without comparison, an earlier teacher's KL at the very end "
    "over that at the end of its own phase."
)
CELLS = (
    "Curricula over teachers and over cells, a teacher and a band of its episodes by return: shares of the "
    "batch and held-out KL of each band, the worst cell's KL, retention, and the gap between returns and "
    "targets over the range of returns."
)
TUNING = (
    "KL to the worst teacher for each learning rate, on the built-in tasks and a seed of its own; the chosen "
    "rate is bold, and is each run's in every case."
)


# ---- the page ----------------------------------------------------------------------------------------------


class Section(NamedTuple):
    """A heading, the sentence that introduces what follows, tables and a figure."""

    title: str
    introduction: str
    tables: str
    figure: Path | None = None

    def markdown(self, folder: Path) -> str:
        """The section of a page in `folder`."""
        blocks = [f"### {self.title}", self.introduction, self.tables]
        if self.figure:
            blocks.append(f"![{self.title}]({os.path.relpath(self.figure, folder)})")
        return "\n\n".join(blocks)


def report(folder: Path = RESULTS, page: Path = PAGE) -> None:
    """Write and print the page, of the rows that the CSV files in `folder` hold; figures go there.

    Raises UserError where study.csv holds no row.
    """
    if not read(folder / study.ROWS.name):
        raise UserError(f"{folder / study.ROWS.name} holds no run; run research.study without --report first")
    blocks = [section.markdown(page.resolve().parent) for section in sections(folder)]
    files.write(page, ("\n\n".join([FINDINGS.read_text().rstrip(), "## Tables", *blocks]) + "\n").encode())
    print("\n\n".join(blocks))


def sections(folder: Path) -> Iterator[Section]:
    """The page's, in order; those without rows are left out."""
    rows = read(folder / study.ROWS.name)
    little = read(folder / "little_data.csv")
    if little:
        path = folder / "little_data.png"
        little_data_report.plot(path, little)
        yield Section("When teachers pay", LITTLE_DATA, little_data_report.tables(little), path)
    compared = comparisons(rows)
    if compared:
        path = folder / "study.png"
        plot(path, compared)
        yield Section("Curricula, surgeries and losses", COMPARISON, comparison_tables(compared), path)
    if of_tasks := task_table(rows):
        yield Section("Tasks", TASKS, of_tasks)
    if laws := law_table(rows):
        yield Section("The share law", SHARES, laws)
    if bounds := bound_table(rows):
        yield Section("What shares could do", BOUND, bounds)
    for title, script, introduction in (
        ("Streams", streaming, STREAMS),
        ("Cells", cells, CELLS),
        ("Conflict", conflict, CONFLICT),
    ):
        if found := read(folder / script.ROWS.name):
            yield Section(title, introduction, script.tables(found))
    if tuned := tuning_table(rows):
        yield Section("Learning rates", TUNING, tuned)


# ---- students ----------------------------------------------------------------------------------------------


class Student(NamedTuple):
    """A row's numbers, without a planted task."""

    kl: np.ndarray  # (points, N)
    shares: np.ndarray  # (N,)
    row: dict[str, str]

    @property
    def worst(self) -> float:
        """The KL to the worst teacher in the end; infinite where the run was lost."""
        return float(np.nan_to_num(self.kl[-1], nan=math.inf).max())


Groups = dict[tuple[str, ...], dict[str, dict[int, Student]]]  # {GROUP: {run: {seed: student}}}


def groups(rows: list[dict[str, str]]) -> Groups:
    """Those that count: neither tuning runs, nor a learning rate that fewer seeds have, or that did worse."""
    by_rate = {}
    for row in rows:
        kl = np.array(json.loads(row["kl"]))
        shares = np.array(json.loads(row["shares"]))
        planted = int(row["planted"])
        if planted >= 0:
            kl = np.delete(kl, planted, 1)
            shares = np.delete(shares, planted)
        if int(row["seed"]) < study.TUNING_SEED:
            group = tuple(row[k] for k in GROUP)
            key = (group, row["run"])
            by_rate.setdefault(key, {}).setdefault(row["lr"], {})[int(row["seed"])] = Student(kl, shares, row)
    found = {}
    order = {run: i for i, run in enumerate(RUNS)}
    for group, run in sorted(by_rate, key=lambda key: (list(CASES).index(key[0][0]), key[0], order[key[1]])):
        rates = by_rate[group, run].values()
        best = max(rates, key=lambda seeds: (len(seeds), -np.mean([s.worst for s in seeds.values()])))
        found.setdefault(group, {})[run] = best
    return found


def name_of(group: tuple[str, ...]) -> str:
    """A group's name in tables."""
    case, tasks, steps, n_embd, planted, teachers = group
    some = f", tasks {tasks}" if tasks else ""
    noise = ", a task of noise planted" if planted != "-1" else ""
    sets = f"{teachers} teachers a task" if int(teachers) > 1 else "one teacher a task"
    return f"{case}{some}, {steps} updates, {n_embd} channels, {sets}{noise}"


# ---- comparisons with equal shares -------------------------------------------------------------------------


class Comparison(NamedTuple):
    """A run's students beside those of equal shares, by seed."""

    group: tuple[str, ...]
    run: str
    worst: np.ndarray  # (seeds,) log ratios
    mean: np.ndarray
    teachers: tuple[int, ...]  # the teacher seed of each
    reached: np.ndarray  # (seeds,) infinite where never
    projected: float  # NaN where it was not noted
    time: float

    def resampled(self, values: np.ndarray) -> np.ndarray:  # (seeds,) -> (resamples,)
        """The mean over bootstrapped teachers and seeds."""
        return hierarchical_bootstrap(lambda x: x.mean((-2, -1)), self.teachers, values[:, None])

    def ratio(self, values: np.ndarray, form: str = "{:.3f}") -> str:
        """A geometric mean, with its interval from MIN_SEEDS on."""
        middle = math.exp(values.mean())
        if len(values) < MIN_SEEDS or not np.isfinite(values).all():
            return form.format(middle)
        return with_interval(middle, np.exp(percentile_interval(self.resampled(values))), form)

    def p(self) -> float:
        """Of "the worst KL is equal shares'"; NaN below MIN_SEEDS."""
        if len(self.worst) < MIN_SEEDS or not np.isfinite(self.worst).all():
            return math.nan
        return p_value(float(self.worst.mean()), self.resampled(self.worst), len(self.worst))


def comparisons(rows: list[dict[str, str]]) -> list[Comparison]:
    """Every run that has seeds in common with equal shares."""
    found = []
    for group, runs in groups(rows).items():
        equal = runs.get(EQUAL, {})
        for run, of_seeds in runs.items():
            seeds = sorted(set(of_seeds) & set(equal))
            if run in (EQUAL, "random") or not seeds:
                continue
            pairs = [(of_seeds[s], equal[s]) for s in seeds]
            projected = [s.row["projected"] for s, _ in pairs]
            times = [float(a.row["ms"]) / float(b.row["ms"]) for a, b in pairs]
            found.append(
                Comparison(
                    group=group,
                    run=run,
                    worst=np.array([math.log(a.worst / b.worst) for a, b in pairs]),
                    mean=np.array([math.log(a.kl[-1].mean() / b.kl[-1].mean()) for a, b in pairs]),
                    teachers=tuple(s % int(group[-1]) for s in seeds),
                    reached=np.array([reached(a.kl.max(1), b.worst) for a, b in pairs]),
                    projected=float(np.mean([float(x) for x in projected])) if all(projected) else math.nan,
                    time=float(np.median(times)),
                )
            )
    return found


def reached(curve: np.ndarray, kl: float) -> float:
    """After which share of its updates a curve (points,) is at most `kl`, log-linearly; inf: never."""
    below = np.flatnonzero(curve <= kl)
    if not len(below):
        return math.inf
    i = below[0]
    if i == 0:
        return 1 / len(curve)
    high, low = np.log(curve[i - 1 : i + 1])
    return float((i + (high - math.log(kl)) / (high - low)) / len(curve))


def comparison_tables(compared: list[Comparison]) -> str:
    """A table for each group, below a line that names it."""
    ps = np.array([c.p() for c in compared])
    corrected = np.full(len(ps), math.nan)
    corrected[np.isfinite(ps)] = holm(ps[np.isfinite(ps)])
    by_group = {}
    for c, p in zip(compared, corrected, strict=True):
        by_group.setdefault(c.group, []).append(comparison_line(c, p))
    head = ["", "seeds", "worst KL / equal shares'", "mean KL / equal shares'", "lower", "Holm's p", "X"]
    head += ["reached", "projected", "time"]
    blocks = []
    for group, lines in by_group.items():
        blocks += [f"{name_of(group)}:", table(head, lines)]
    return "\n\n".join(blocks)


def comparison_line(c: Comparison, p: float) -> list[str]:
    """A run's line; p: Holm's."""
    worst = c.ratio(c.worst)
    margin = ""
    if not math.isnan(p):
        resampled = c.resampled(c.worst)
        low, high = percentile_interval(resampled)
        margin = f"{math.expm1(equivalence_margin(resampled)):.3f}" if low < 0 < high else ""
    soon = f"{np.mean(c.reached):.2f}" if np.isfinite(c.reached).all() else ""
    return [
        c.run,
        str(len(c.worst)),
        f"**{worst}**" if p <= ALPHA else worst,
        c.ratio(c.mean),
        f"{(c.worst < 0).mean():.2f}",
        "" if math.isnan(p) else f"{p:.3f}",
        margin,
        soon,
        f"{c.projected:.2f}" if c.projected > 0 else "",
        f"{c.time:.2f}",
    ]


def plot(path: Path, compared: list[Comparison]) -> None:
    """The worst KL over equal shares', by group and run: each student, and the mean with its interval."""
    shown = [c for c in compared if len(c.worst) >= MIN_SEEDS and np.isfinite(c.worst).all()]
    shown = [c for c in shown if int(c.group[-1]) > 1]
    by_group = {}
    for c in shown:
        by_group.setdefault(c.group, []).append(c)
    if not by_group:
        return
    names = [run for run in RUNS if run in {c.run for c in shown}]
    fig, axes = figure(len(by_group), len(by_group), 2.7, 1.2 + 0.24 * len(names))
    for ax, (group, of_group) in zip(axes, by_group.items(), strict=True):
        for c in of_group:
            plot_comparison(ax, -names.index(c.run), c)
        ax.axvline(1, color="grey", linewidth=0.8)
        case, _, _, n_embd, *_ = group
        usual = int(n_embd) == study.channels(study.Config(case=case))
        title = case if usual else f"{case}, {n_embd} channels"
        ax.set(xscale="log", xlabel="worst KL / equal shares'", title=title, ylim=(0.5 - len(names), 0.5))
        ax.set_yticks([-i for i in range(len(names))], names if ax is axes[0] else [], fontsize=8)
        set_logarithmic_ticks(ax.xaxis)
    share_limits(axes, "x")
    save(fig, path)


def plot_comparison(ax: "Axes", y: float, c: Comparison) -> None:
    """One line of the figure."""
    colour = "C1" if c.run == DEFAULT else "C0"
    ax.plot(np.exp(c.worst), [y] * len(c.worst), "o", color="grey", markersize=2.5, alpha=0.5)
    ax.plot(np.exp(percentile_interval(c.resampled(c.worst))), [y, y], color=colour, linewidth=2)
    ax.plot(math.exp(c.worst.mean()), y, "o", color=colour, markersize=5)


# ---- by task -----------------------------------------------------------------------------------------------


def task_table(rows: list[dict[str, str]]) -> str:
    """Lines for the tasks of each case that the default has MIN_SEEDS of, as Markdown; empty without one."""
    lines = []
    for group, runs in groups(rows).items():
        case, tasks, *_, planted, teachers = group
        seeds = sorted(set(runs.get(DEFAULT, {})) & set(runs.get(EQUAL, {})))
        if len(seeds) < MIN_SEEDS or tasks or planted != "-1" or teachers == "1":
            continue
        equal = np.log([runs[EQUAL][s].kl[-1] for s in seeds])  # (seeds, N)
        default = np.log([runs[DEFAULT][s].kl[-1] for s in seeds])
        shares = np.mean([runs[DEFAULT][s].shares for s in seeds], 0)
        spread = within_sets(equal, [s % int(teachers) for s in seeds])
        names = study.names_of(study.Config(case=case))
        for i in range(len(shares)):
            about = [name_of(group), names[i], f"{math.exp(equal[:, i].mean()):.3f}", f"{spread[i]:.2f}"]
            ratio = math.exp((default - equal)[:, i].mean())
            lines.append([*about, f"{len(shares) * shares[i]:.2f}", f"{ratio:.2f}", ""])
        others = [i for i in range(len(shares)) if i != np.nanargmax(spread)]
        worst = default[:, others].max(1) - equal[:, others].max(1)
        ratio = [f"{math.exp(worst.mean()):.3f}", f"{(worst < 0).mean():.2f}"]
        lines.append([name_of(group), "the worst of the others", "", "", "", *ratio])
    head = ["students", "task", "KL, equal shares", "spread of seeds", "share, default"]
    head += ["KL / equal shares'", "lower"]
    return table(head, lines) if lines else ""


def within_sets(values: np.ndarray, teachers: list[int]) -> np.ndarray:  # (seeds, N) -> (N,)
    """The standard deviation between students of the same teachers; NaN where no two are."""
    values = values.copy()
    n = 0
    for k in set(teachers):
        of_set = [t == k for t in teachers]
        values[of_set] -= values[of_set].mean(0)
        n += sum(of_set) - 1
    return np.sqrt((values**2).sum(0) / n) if n else np.full(values.shape[1], math.nan)


# ---- the share law -----------------------------------------------------------------------------------------


class Law(NamedTuple):
    """log KL_i = log c_i - a log(N share_i), fitted to students of fixed shares."""

    a: float  # of all tasks
    of_tasks: np.ndarray  # (N,) of each alone
    explained: float  # share of the variance within tasks


def law(runs: dict[str, dict[int, Student]], teachers: int) -> Law | None:
    """Fitted to a group's students with equal and random shares; None where these are fewer than four.

    Students of the same teachers have c in common: these of seed s are of set s % teachers.
    """
    of_sets = {}
    for run in (EQUAL, "random"):
        for seed, s in runs.get(run, {}).items():
            of_sets.setdefault(seed % teachers, []).append(s)
    if "random" not in runs or sum(map(len, of_sets.values())) < 4:
        return None
    x = [np.log([len(s.shares) * s.shares for s in students]) for students in of_sets.values()]
    y = [np.log([s.kl[-1] for s in students]) for students in of_sets.values()]
    x, y = (np.concatenate([z - z.mean(0) for z in of_all]) for of_all in (x, y))
    slopes = -(x * y).sum(0) / (x * x).sum(0)
    a = float(-(x * y).sum() / (x * x).sum())
    return Law(a, slopes, float(1 - np.square(y + a * x).sum() / np.square(y).sum()))


def best_worst(equal: dict[int, Student], teachers: int, a: float | np.ndarray, point: int = -1) -> str:
    """The worst KL with the best shares by the law, over equal shares', from KLs at this point of curves."""
    ratios = []
    for k in {seed % teachers for seed in equal}:
        c = np.exp(np.mean([np.log(s.kl[point]) for seed, s in equal.items() if seed % teachers == k], 0))
        ratios.append(math.log(study.level_of(c, a) / c.max()))
    return f"{math.exp(np.mean(ratios)):.2f}"


def law_table(rows: list[dict[str, str]]) -> str:
    """A line for each group that has random shares, as Markdown; empty where there is none."""
    lines = []
    for group, runs in groups(rows).items():
        teachers = int(group[-1])
        equal = runs.get(EQUAL, {})
        fit = law(runs, teachers)
        if not fit or not equal:
            continue
        worst = np.mean([s.worst for s in equal.values()])
        others = [run for run in runs if run == DEFAULT or run.startswith(("novelty", "dro", "integral"))]
        measured = [np.mean([s.worst for s in runs[run].values()]) / worst for run in others]
        lines.append([
            name_of(group), str(len(runs["random"])), f"{fit.a:.2f}",
            f"{fit.of_tasks.min():.2f} to {fit.of_tasks.max():.2f}", f"{fit.explained:.2f}",
            best_worst(equal, teachers, curriculum.LAW), best_worst(equal, teachers, curriculum.LAW, 0),
            best_worst(equal, teachers, fit.of_tasks.clip(0.1)),
            f"{min(measured):.2f}" if measured else "",
        ])  # fmt: skip
    head = ["students", "random shares", "a", "of single tasks", "explained"]
    head += ["best by 0.55", "after a tenth", "best by each task's a", "measured"]
    return table(head, lines) if lines else ""


def bound_table(rows: list[dict[str, str]]) -> str:
    """A line for each case whose tasks were also learnt alone, as Markdown; empty where there is none."""
    found = groups(rows)
    lines = []
    for group, runs in found.items():
        alone = {}  # by task: a student by seed
        for (case, task, *others), of_task in found.items():
            if task.isdecimal() and (case, *others) == (group[0], *group[2:]):
                alone[int(task)] = of_task.get(EQUAL, {})
        equal = runs.get(EQUAL, {})
        default = runs.get(DEFAULT, {})
        seeds = sorted(set(equal) & set(default) & set.intersection(*map(set, alone.values() or [()])))
        if group[1] or not seeds or len(alone) < len(equal[seeds[0]].shares):
            continue
        c = np.array([equal[s].kl[-1] for s in seeds])  # (seeds, N)
        lowest = np.array([[alone[i][s].worst for i in range(c.shape[1])] for s in seeds])
        a = np.array([study.exponents(*x) for x in zip(c, lowest, strict=True)])
        best = [study.level_of(*x) for x in zip(c, a, strict=True)]
        default = [default[s].worst for s in seeds]
        teachers = tuple(s % int(group[-1]) for s in seeds)
        cells_ = []
        for worst in (lowest.max(1), best, default):
            ratio = np.log(worst / c.max(1))
            middle = math.exp(ratio.mean())
            resampled = hierarchical_bootstrap(lambda x: x.mean((-2, -1)), teachers, ratio[:, None])
            text = with_interval(middle, np.exp(percentile_interval(resampled)))
            cells_.append(text if len(seeds) >= 3 else f"{middle:.3f}")
        exponents = f"{a.mean(0).min():.2f} to {a.mean(0).max():.2f}"
        lines.append([name_of(group), str(len(seeds)), exponents, *cells_])
    head = ["students", "seeds", "exponents", "highest KL alone", "best by these exponents", "default"]
    return table(head, lines) if lines else ""


# ---- learning rates ----------------------------------------------------------------------------------------


def tuning_table(rows: list[dict[str, str]]) -> str:
    """A line for each run that was tuned; empty where none was."""
    found = {}
    for run in RUNS:
        if kls := study.tried(run, rows):
            found[run] = kls
    if not found:
        return ""
    rates = sorted({lr for kls in found.values() for lr in kls})
    lines = []
    for run, kls in found.items():
        best = min(kls, key=kls.get)
        cells_ = [f"{kls[lr]:.3f}" if lr in kls else "" for lr in rates]
        marked = [f"**{x}**" if lr == best else x for lr, x in zip(rates, cells_, strict=True)]
        lines.append([run, *marked])
    return table(["learning rate", *(f"{lr:g}" for lr in rates)], lines)

"""Students of little data: tables and figure from the rows of research/results/little_data.csv.

A row is one task of one student. Students are the same but for their seeds where tasks, data, compression,
share of the data and mode are the same. Intervals are 95 %, bootstrap over teachers and over the students of
each. Used by research/tables.py and by what makes the runs.
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from report import style
from research.markdown import table
from research.statistics import (
    equivalence_margin,
    failure_rate,
    hierarchical_bootstrap,
    holm,
    iqm,
    mean_retention,
    p_value,
    percentile_interval,
    with_interval,
    worst_task,
)
from research.study_figures import figure, save, share_limits

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MODES = ("data", "data, tuned", "labels", "asked", "both")
BASELINES = ("data, tuned", "data")  # the first that there is
BESIDE_LABELS = ("asked", "both", "ensemble")  # these stand beside "labels" too
OF_THE_METHOD = ("equal shares", "round-robin", "surgery", "uniform windows")  # these beside "asked" alone
TEACHER = "teacher"  # rows that hold the returns retention refers to
CLONE = "clone"  # the teacher itself, evaluated again
ALL = "all"  # of the data; else: worst half
STATISTICS = {"mean": mean_retention, "worst task": worst_task}
MIN_RUNS = 5  # fewer have no interval and no p
ALPHA = 0.05  # for all comparisons together
EPISODES = (0, 10, 30, 100, math.inf)  # of a task in a student's data: the lines of `by_episodes`
COLUMNS = ("retention", "episodes", "heldout_kl", "target_gap", "teacher_gap")


class Group(NamedTuple):
    """What students share that differ in their seeds alone."""

    tasks: str
    data: str
    compression: float
    share: float
    mode: str


class Students(NamedTuple):
    """The students of a group. Arrays are (runs, tasks), NaN where a row has no number."""

    seeds: list[tuple[int, int]]  # of the teachers and of the student, sorted
    retention: np.ndarray
    episodes: np.ndarray
    heldout_kl: np.ndarray
    target_gap: np.ndarray
    teacher_gap: np.ndarray

    @property
    def teachers(self) -> list[int]:
        """The teacher seed of each run."""
        return [teacher for teacher, _ in self.seeds]


Found = dict[Group, Students]


def students(rows: list[dict[str, str]]) -> Found:
    """The CSV's rows by group: clones, then main ones by share. A run counts once all of its tasks are there.

    Clones have no data of their own: they are one group for each set of tasks. Raises ValueError for a run
    without retention.
    """
    names = {}  # {tasks: its tasks}
    runs = {}  # {group: {seeds: {task: row}}}
    for row in rows:
        if row["mode"] == TEACHER:
            continue
        names.setdefault(row["tasks"], {})[row["task"]] = None
        if row["mode"] == CLONE:
            group = Group(row["tasks"], ALL, 1.0, 1.0, CLONE)
        else:
            numbers = float(row["compression"]), float(row["data_share"])
            group = Group(row["tasks"], row["data"], *numbers, row["mode"])
        seeds = int(row["teacher_seed"]), int(row["seed"])
        runs.setdefault(group, {}).setdefault(seeds, {})[row["task"]] = row
    found = {}
    for group in sorted(runs, key=_order):
        complete = {s: run for s, run in sorted(runs[group].items()) if len(run) == len(names[group.tasks])}
        if complete:
            arrays = [_numbers(list(complete.values()), column, names[group.tasks]) for column in COLUMNS]
            found[group] = Students(list(complete), *arrays)
            if np.isnan(found[group].retention).any():
                raise ValueError(f"{group} has a run without retention")
    return found


def _order(group):
    mode = MODES.index(group.mode) if group.mode in MODES else len(MODES)
    return group.tasks, group.mode != CLONE, group.data != ALL, group.compression, group.share, mode


def _numbers(runs, column, tasks):
    """(runs, tasks)"""
    return np.array([[float(run[task][column] or "nan") for task in tasks] for run in runs])


def sets_of_tasks(found: Found) -> list[str]:
    """builtin, thirdparty."""
    return list(dict.fromkeys(group.tasks for group in found))


def main_compression(found: Found, tasks: str) -> float:
    """The lowest compression of students of all data: that of the figure."""
    times = [g.compression for g in found if g.tasks == tasks and g.data == ALL and g.mode != CLONE]
    return min(times, default=1.0)


def modes_of(found: Found, tasks: str) -> list[str]:
    """The modes of a set's students, in their order, without clones."""
    modes = {g.mode for g in found if g.tasks == tasks} - {CLONE}
    return sorted(modes, key=lambda mode: (MODES.index(mode) if mode in MODES else len(MODES), mode))


def label(group: Group, compression: float) -> str:
    """2 %; 2 %, 50 times smaller; 100 %, worst half. compression: what needs no mention."""
    text = f"{100 * group.share:g} %"
    if group.compression != compression:
        text += f", {group.compression:g} times smaller"
    return text if group.data == ALL else f"{text}, {group.data}"


# ---- tables ------------------------------------------------------------------------------------------------


def tables(rows: list[dict[str, str]]) -> str:
    """All tables, each below a line that says what it shows. Empty where no run is complete."""
    found = students(rows)
    compared = compare(found)
    blocks = []
    for tasks in sets_of_tasks(found):
        times = main_compression(found, tasks)
        about = f"{tasks}, {times:g} times smaller students where not stated"
        blocks += [f"Retention: mean (interval), worst task; {about}", phase_diagram(found, tasks)]
        blocks += [f"Details; {about}", details(found, tasks)]
    if compared:
        survive = sum(comparison.holm_p <= ALPHA for comparison in compared)
        blocks.append(
            f"Differences of retention on the same seeds: {survive} of {len(compared)}, in bold, survive "
            f"Holm's correction for all of them at {ALPHA:g}. Where an interval holds zero, there is no "
            "difference above X (two one-sided tests at 5 %)"
        )
        blocks.append(comparison_table(found, compared))
    lines = by_episodes(found)
    if lines:
        blocks.append(
            "Asked minus labels by the training episodes of a task: mean and standard error over tasks and "
            "students that have both"
        )
        blocks.append(table(["episodes", "results", "asked − labels", "standard error"], lines))
    return "\n\n".join(blocks)


def by_episodes(found: Found) -> list[list[str]]:
    """A line for each range of EPISODES that has two results."""
    episodes = []
    differences = []
    for group, asked in found.items():
        labels = found.get(group._replace(mode="labels"))
        main = group.data == ALL and group.compression == main_compression(found, group.tasks)
        if group.mode != "asked" or not main or labels is None:
            continue
        for i, seeds in enumerate(asked.seeds):
            if seeds in labels.seeds:
                episodes.append(asked.episodes[i])
                differences.append(asked.retention[i] - labels.retention[labels.seeds.index(seeds)])
    lines = []
    for low, high in itertools.pairwise(EPISODES):
        inside = (np.array(episodes) >= low) & (np.array(episodes) < high)
        x = np.array(differences)[inside]
        if len(x) > 1:
            error = x.std(ddof=1) / len(x) ** 0.5
            lines.append([_range(low, high), str(len(x)), f"{x.mean():.3f}", f"{error:.3f}"])
    return lines


def _range(low, high):
    if low == 0:
        return f"below {high}"
    return f"{low} and more" if high == math.inf else f"{low} to {high - 1}"


def interval_of(statistic: Callable[..., np.ndarray], runs: Students) -> np.ndarray:  # (2,)
    """Of a statistic of retention; NaN for fewer than MIN_RUNS runs."""
    if len(runs.seeds) < MIN_RUNS:
        return np.full(2, np.nan)
    return percentile_interval(hierarchical_bootstrap(statistic, runs.teachers, runs.retention))


def retention_cell(statistic: Callable[..., np.ndarray], runs: Students) -> str:
    """0.98 (0.96-0.99); without an interval for fewer than MIN_RUNS runs."""
    value = statistic(runs.retention)
    bounds = interval_of(statistic, runs)
    return f"{value:.3f}" if np.isnan(bounds).any() else with_interval(value, bounds)


def phase_diagram(found: Found, tasks: str) -> str:
    """A line for each share of the data, a column for each mode: retention, mean and of the worst task."""
    modes = modes_of(found, tasks)
    lines = {}  # {group without its mode: cells}
    for group in found:
        if group.tasks != tasks or group.mode == CLONE:
            continue
        same = {mode: found.get(group._replace(mode=mode)) for mode in modes}
        episodes = np.mean([runs.episodes.mean() for runs in same.values() if runs])
        cells = [label(group, main_compression(found, tasks)), f"{episodes:.0f}"]
        for runs in same.values():
            cells.append(
                f"{retention_cell(mean_retention, runs)}, {worst_task(runs.retention):.3f}" if runs else ""
            )
        lines[group._replace(mode="")] = cells
    return table(["data", "episodes a task", *modes], list(lines.values()))


def readme_table(rows: list[dict[str, str]]) -> str:
    """README's: mean retention of the built-in tasks' students, and of the worst task in brackets."""
    found = students(rows)
    modes = {"data": "data alone", "labels": "teachers' labels", "asked": "`--ask 0.5`"}
    times = main_compression(found, "builtin")
    lines = {}
    for group in found:
        if group.tasks != "builtin" or group.compression != times or group.mode == CLONE:
            continue
        same = [found.get(group._replace(mode=mode)) for mode in modes]
        if not all(x and len(x.seeds) >= MIN_RUNS for x in same):
            continue
        episodes = f"{np.mean([runs.episodes.mean() for runs in same]):.0f} ({label(group, times)})"
        cells = [f"{mean_retention(x.retention):.2f} ({worst_task(x.retention):.2f})" for x in same]
        n_runs = "/".join(map(str, sorted({len(runs.seeds) for runs in same})))
        lines[group._replace(mode="")] = [episodes, *cells, n_runs]
    return table(["episodes a task", *modes.values(), "students"], list(lines.values()))


def details(found: Found, tasks: str) -> str:
    """A line for each group of students, after the clones of their teachers."""
    lines = []
    for group, runs in found.items():
        if group.tasks != tasks:
            continue
        clone = group.mode == CLONE
        line = ["" if clone else label(group, main_compression(found, tasks))]
        line += ["teachers, evaluated again" if clone else group.mode, str(len(runs.seeds))]
        line += [retention_cell(worst_task, runs), f"{iqm(runs.retention.ravel()):.3f}"]
        line += [f"{runs.retention.min():.3f}", f"{100 * failure_rate(runs.retention):.0f} %"]
        line += [mean_cell(x) for x in (runs.heldout_kl, runs.target_gap, runs.teacher_gap)]
        lines.append(line)
    columns = ["data", "mode", "runs", "worst task", "IQM", "minimum", "below 0.9"]
    return table([*columns, "held-out KL", "target gap", "teachers'"], lines)


def mean_cell(x: np.ndarray) -> str:
    """The mean of what was measured; empty where nothing was."""
    return "" if np.isnan(x).all() else f"{np.nanmean(x):.3f}"


class Comparison(NamedTuple):
    """A mode beside its baseline, on the same seeds."""

    group: Group
    baseline: str
    what: str  # of STATISTICS
    n_pairs: int
    difference: float
    resampled: np.ndarray  # the same of each resample
    p: float
    holm_p: float  # corrected for all comparisons

    def cells(self) -> list[str]:
        """Difference, bold where it survives the correction; p; Holm's p; X where the interval holds zero."""
        low, high = bounds = percentile_interval(self.resampled)
        text = with_interval(self.difference, bounds)
        margin = f"{equivalence_margin(self.resampled):.3f}" if low <= 0 <= high else ""
        bold = f"**{text}**" if self.holm_p <= ALPHA else text
        return [bold, p_cell(self.p), p_cell(self.holm_p), margin]


def p_cell(p: float) -> str:
    """Two digits; <0.0001."""
    return f"{p:.2g}" if p >= 1e-4 else "<0.0001"


def compare(found: Found) -> list[Comparison]:
    """Each group of students beside its baseline, if they have MIN_RUNS seeds in common."""
    compared = []
    for group, runs in found.items():
        baselines = [mode for mode in BASELINES if group._replace(mode=mode) in found][:1]
        if group.mode in (CLONE, *baselines):
            continue
        if group.mode in BESIDE_LABELS and group._replace(mode="labels") in found:
            baselines.append("labels")
        if group.mode in OF_THE_METHOD:
            baselines = [mode for mode in ("asked",) if group._replace(mode=mode) in found]
        for baseline in baselines:
            compared += comparisons(group, baseline, runs, found[group._replace(mode=baseline)])
    corrected = holm([comparison.p for comparison in compared])
    return [c._replace(holm_p=float(p)) for c, p in zip(compared, corrected, strict=True)]


def comparisons(group: Group, baseline: str, runs: Students, others: Students) -> list[Comparison]:
    """Two groups of students on the seeds that they have in common, not yet corrected."""
    common = [seeds for seeds in runs.seeds if seeds in others.seeds]
    if len(common) < MIN_RUNS:
        return []
    first, second = (x.retention[[x.seeds.index(seeds) for seeds in common]] for x in (runs, others))
    compared = []
    for what, statistic in STATISTICS.items():

        def difference(x, y, statistic=statistic):
            return statistic(x) - statistic(y)

        resampled = hierarchical_bootstrap(difference, [teacher for teacher, _ in common], first, second)
        value = float(difference(first, second))
        p = p_value(value, resampled, len(common))
        compared.append(Comparison(group, baseline, what, len(common), value, resampled, p, p))
    return compared


def comparison_table(found: Found, compared: list[Comparison]) -> str:
    """A line for each group of students compared: the mean, then the worst task."""
    lines = {}
    for c in compared:
        where = f"{c.group.tasks}, {label(c.group, main_compression(found, c.group.tasks))}"
        start = [where, f"{c.group.mode} − {c.baseline}", str(c.n_pairs)]
        lines.setdefault((c.group, c.baseline), start).extend(c.cells())
    columns = ["data", "modes", "pairs"]
    for what in STATISTICS:
        columns += [what, "p", "Holm's p", "X"]
    return table(columns, list(lines.values()))


# ---- the figure --------------------------------------------------------------------------------------------


def plot(path: Path, rows: list[dict[str, str]]) -> bool:
    """Retention against the share of the data: mean above, worst task below; a column for each set of tasks.

    Of students of all data at the main compression. Returns False where there is nothing to draw.
    """
    found = students(rows)
    columns = [tasks for tasks in sets_of_tasks(found) if modes_of(found, tasks)]
    if not columns:
        return False
    fig, axes = figure(2 * len(columns), len(columns), 5.2, 3.6)
    for k, tasks in enumerate(columns):
        times = main_compression(found, tasks)
        above, below = axes[k], axes[k + len(columns)]
        for ax, (what, statistic) in zip((above, below), STATISTICS.items(), strict=True):
            plot_shares(ax, found, tasks, statistic)
            ax.set_title(f"{tasks}, {times:g} times smaller: {what}")
        below.set_xlabel("share of the data; training episodes a task")
    for row in (axes[: len(columns)], axes[len(columns) :]):
        row[0].set_ylabel("retention: student's return / teacher's")
        share_limits(row, "y")
    axes[0].legend(frameon=False, fontsize=8)
    save(fig, path)
    return True


def plot_shares(ax: "Axes", found: Found, tasks: str, statistic: Callable[..., np.ndarray]) -> None:
    """A statistic of each mode against the share of the data, with intervals; dotted: of the clones."""
    modes = [mode for mode in modes_of(found, tasks) if mode in MODES]
    episodes = {}  # {share: episodes a task}
    for i, mode in enumerate(modes):
        group = Group(tasks, ALL, main_compression(found, tasks), 1.0, mode)
        of_mode = {g.share: runs for g, runs in found.items() if g == group._replace(share=g.share)}
        if not of_mode:
            continue
        episodes |= {share: runs.episodes.mean() for share, runs in of_mode.items()}
        values = np.array([statistic(runs.retention) for runs in of_mode.values()])
        low, high = np.transpose([interval_of(statistic, runs) for runs in of_mode.values()])
        x = np.array(list(of_mode)) * 1.03 ** (i - (len(modes) - 1) / 2)  # intervals side by side
        n_runs = "/".join(str(n) for n in sorted({len(runs.seeds) for runs in of_mode.values()}))
        bars = [values - low, high - values]
        text = f"{mode} ({n_runs} runs)"
        ax.errorbar(
            x, values, bars, marker="o", markersize=4, capsize=2, label=text, **style(MODES.index(mode))
        )
    clones = found.get(Group(tasks, ALL, 1.0, 1.0, CLONE))
    if clones:
        line = {"color": "grey", "linestyle": ":", "linewidth": 1}
        ax.axhline(statistic(clones.retention), label="teachers, evaluated again", **line)
    ax.axhline(1, color="grey", linewidth=0.8)
    shares = sorted(episodes)
    ax.set_xscale("log")
    ax.set_xticks(shares, [f"{100 * share:g} %\n{episodes[share]:.0f}" for share in shares])
    ax.minorticks_off()

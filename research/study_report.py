"""The study's report, docs/study.md: findings first, then every table and figure, from the rows of study.csv.

`report` writes and prints it, for research/study.py. Figures are drawn by study_figures.py.
"""

import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

import distill
from research import cells, conflict, little_data_report, shares, streaming, study_figures
from research.markdown import table
from research.statistics import cell, improvement, improvement_of_strata, iqm, pooled
from research.study_rows import (
    LRS,
    Row,
    best_rate,
    curve,
    final_kl,
    final_kls,
    iqm_kl,
    kl_ratios,
    mean_retention,
    milliseconds,
    paired,
    reached,
    read,
    slowdown,
    tuning_runs,
    worst_retention,
)
from research.tables import read_rows
from research.variants import CASES, DEFAULT, DEFAULTS, NOVELTY, ROUND_ROBIN, SCORE_COLUMNS, VARIANTS
from support import UserError, files

ROOT = Path(__file__).parent.parent
FINDINGS = ROOT / "research/findings.md"
OWN_CSV = ROOT / "research/results/study.csv"
OWN_PAGE = ROOT / "docs/study.md"

README_COLUMNS = ("student", "equal shares", "uniform windows", "without teachers")

ByVariant = dict[str, list[Row]]
ByCase = dict[str, ByVariant]  # {case: {variant: its rows, by seed}}
Sizes = dict[tuple[float, int], ByCase]  # {(compression, updates): evaluated runs}

# The sentences that introduce the page's sections.
SCORES = {
    DEFAULTS: (
        "Normalised scores of teachers and evaluated students on four tasks, {:g} times smaller, on the same "
        "teachers: the defaults of teacher.py and distill.py."
    ),
    "builtin": (
        "The same tasks with AdamW and three tokens a timestep, 5000 updates of a teacher and 4000 of a "
        "student, as are all tables below."
    ),
    "many": "The same on nine tasks, where the columns have fewer seeds.",
}
SCORES_OF_OTHERS = "Normalised scores of teachers and evaluated students, on the same teachers."
LITTLE_DATA = (
    "Retention of students that see a share of their teachers' data, by what they learn from: its actions, "
    "teachers' labels of it, labels at other returns and states too, or labels and actions together. "
    "Intervals are of a bootstrap over teachers and over the students of each."
)
SHARES = (
    "KLs of students with fixed shares, to which log KL_i = log c_i - a log(N share_i) is fitted: a of all "
    "tasks together, the range over single tasks, and how much of the tasks' variance it explains. Then the "
    "worst KL with the best shares, divided by that of equal ones: predicted from equal shares' KLs with a "
    "= 0.55, at the end and after a tenth of the updates, and with each task's own a; and the lowest that "
    "was measured. Below, curricula against equal shares on the same seeds: means of ratios with 95 % "
    "bootstrap intervals over seeds."
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
CURVES = (
    "KL to the worst teacher over updates by curriculum, performance profiles, and the final KL divided by "
    "that of equal shares on the same seeds."
)
EQUAL_UPDATES = (
    "KL to the worst teacher after the last update, and how it compares with round-robin and with the "
    "default weights."
)
SAME_SEEDS = "KL of the default weights divided by each variant's, for runs with the same teachers."
SURGERY = (
    "What each surgery changes against the same curriculum without it, and the share of updates it projects "
    "(grey)."
)
RETENTION = (
    "Retention of evaluated students by case, compression and number of updates, and the default minus each "
    "variant on the same seeds."
)
RETENTION_BY_SIZE = "Retention against compression, for the variants evaluated at several sizes."
DETAILS = (
    "Of the runs of the first KL table: learning rate in 1e-3; area under the curve, mean KL and time of an "
    "update divided by round-robin's; the share of updates after which its final KL is reached; projections "
    "and gradient cosines."
)
EQUAL_TIME = (
    "As many seconds as round-robin, for variants whose update takes more than 1.1 times as long; the others "
    "are the runs above."
)
HALF_THE_UPDATES = "Half the updates, compared with round-robin after all of them."
OTHER_BUDGETS = "The same measures for these runs."
TUNING = "KL to the worst teacher for each learning rate, on a separate seed; the chosen rate is bold."


# ---- the page ----------------------------------------------------------------------------------------------


class Section(NamedTuple):
    """A heading, the sentence that introduces what follows, and tables or a figure."""

    title: str
    introduction: str
    tables: list[str] = []  # Markdown; where there are several, each begins with a line that names it
    figure: Path | None = None

    def text(self) -> str:
        """What is printed."""
        figure = [str(self.figure)] if self.figure else []
        return "\n\n".join((self.title, self.introduction, *self.tables, *figure))

    def markdown(self, folder: Path) -> str:
        """The section of a page in `folder`."""
        figure = []
        if self.figure:
            figure.append(f"![{self.title}]({os.path.relpath(self.figure, folder)})")
        return "\n\n".join((f"### {self.title}", self.introduction, *self.tables, *figure))


def report(path: Path, compression: float, evaluated_steps: int) -> None:
    """Print a CSV's tables, draw its figures beside it, write the page.

    The page is docs/study.md for the study's own CSV, and lies beside any other.
    compression, evaluated_steps: of the runs that the tables of scores and KLs are of. Raises UserError where
    the CSV holds no run.
    """
    rows = read(path)
    if not rows:
        raise UserError(f"{path} holds no run; run research.study without --report first")
    page = OWN_PAGE if path.resolve() == OWN_CSV else path.with_suffix(".md")
    blocks = [FINDINGS.read_text().rstrip(), "## All tables and figures"]
    results = Results.of(rows, compression, evaluated_steps)
    for section in sections(results, path.parent):
        print(f"\n{section.text()}")
        blocks.append(section.markdown(page.resolve().parent))
    if DEFAULT in results.scored().get(DEFAULTS, {}):
        print(f"\nREADME\n\n{readme_table(results)}")
    files.write(page, ("\n\n".join(blocks) + "\n").encode())


class Results(NamedTuple):
    """The rows that count, grouped."""

    rows: list[Row]
    by_budget: dict[str, ByCase]  # of budgets "updates", "time" and "half", at the compression
    evaluated: Sizes
    compression: float
    evaluated_steps: int

    @staticmethod
    def of(rows: list[Row], compression: float, evaluated_steps: int) -> "Results":
        """Leave out runs of learning rates that have lost to others since, but for their time."""
        tuned = {(r["case"], r["variant"]) for r in rows if r["budget"] == "tune"}
        lrs = {pair: best_rate(rows, *pair) for pair in tuned}
        counted = []
        for r in rows:
            if r["budget"] in ("tune", "cost") or r["lr"] == lrs.get((r["case"], r["variant"]), r["lr"]):
                counted.append(r)
        by_budget = {}
        evaluated = {}
        for r in sorted(counted, key=lambda r: (list(CASES).index(r["case"]), r["seed"])):
            if r["budget"] == "acting":
                by_case = evaluated.setdefault((r["times"], r["steps"]), {})
            elif r["times"] == compression:
                by_case = by_budget.setdefault(r["budget"], {})
            else:
                continue
            by_case.setdefault(r["case"], {}).setdefault(r["variant"], []).append(r)
        return Results(counted, by_budget, evaluated, compression, evaluated_steps)

    def comparison(self, budget: str) -> "Comparison":
        """The runs of a budget. Those of equal time include the runs whose time was measured and is equal."""
        all_updates = self.by_budget.get("updates", {})
        runs = self.by_budget.get(budget, {})
        if budget == "time":
            extended = {}
            for case, by_variant in runs.items():
                same = {}
                for name, found in all_updates.get(case, {}).items():
                    if milliseconds(self.rows, case, name) > 0 or name == NOVELTY:
                        same[name] = found
                extended[case] = {**same, **by_variant}
            runs = extended
        reference = {c: found[ROUND_ROBIN] for c, found in all_updates.items() if ROUND_ROBIN in found}
        return Comparison(runs, reference)

    def scored(self) -> ByCase:
        """The evaluated runs of the compression and number of updates that tables of scores are of."""
        found = {}
        for (times, steps), by_case in self.evaluated.items():
            for case, by_variant in by_case.items():
                wanted = distill.Config.steps if case == DEFAULTS else self.evaluated_steps
                if (times, steps) == (self.compression, wanted):
                    found[case] = by_variant
        return dict(sorted(found.items(), key=lambda item: list(CASES).index(item[0])))

    def by_size(self) -> dict[float, ByCase]:
        """{compression: evaluated runs} of that number of updates."""
        found = {}
        for (times, steps), by_case in sorted(self.evaluated.items()):
            if steps == self.evaluated_steps:
                found[times] = by_case
        return found


class Comparison(NamedTuple):
    """Runs of one budget beside those of round-robin with all updates."""

    runs: ByCase
    reference: dict[str, list[Row]]  # by case

    def compared(self) -> ByCase:
        """The runs of cases that have a reference."""
        return {case: by_variant for case, by_variant in self.runs.items() if case in self.reference}

    def variants(self) -> list[str]:
        """Those that have runs, in the order of VARIANTS."""
        found = set().union(*self.runs.values())
        return [name for name in VARIANTS if name in found]


def sections(results: Results, folder: Path) -> Iterator[Section]:
    """The page's, in order; figures are drawn into `folder`. Those without runs are left out."""
    updates = results.comparison("updates")
    time = results.comparison("time")
    half = results.comparison("half")
    yield from little_data(folder)
    scripts = {"Shares": (shares, SHARES), "Conflict": (conflict, CONFLICT)}
    scripts |= {"Streams": (streaming, STREAMS), "Cells": (cells, CELLS)}
    for title, (script, introduction) in scripts.items():
        if (folder / script.ROWS.name).exists():
            rows = read_rows((folder / script.ROWS.name).resolve())
            yield Section(title, introduction, [script.tables(rows)])
    for case, by_variant in results.scored().items():
        if DEFAULT in by_variant:
            introduction = SCORES.get(case, SCORES_OF_OTHERS).format(results.compression)
            yield Section(f"Scores, {case}", introduction, [score_table(case, by_variant, SCORE_COLUMNS)])
    if updates.compared():
        figure = folder / "study_curricula.png"
        study_figures.plot_curricula(figure, updates.compared())
        yield Section("Figure: curricula", CURVES, figure=figure)
        yield Section("Equal updates", EQUAL_UPDATES, [kl_table(updates)])
    if updates.runs:
        yield Section("Equal updates, on the same seeds", SAME_SEEDS, [same_seeds_table(updates)])
        figure = folder / "study_surgery.png"
        if study_figures.plot_surgery(figure, updates.runs):
            yield Section("Figure: surgeries", SURGERY, figure=figure)
    if results.evaluated:
        yield Section("Retention", RETENTION, [retention_table(results.evaluated)])
        figure = folder / "study_retention.png"
        if study_figures.plot_retention(figure, results.by_size()):
            yield Section("Figure: retention by compression", RETENTION_BY_SIZE, figure=figure)
    if updates.compared():
        yield Section("Equal updates, details", DETAILS, [details_table(updates, results.rows)])
    if time.compared():
        yield Section("Equal time", EQUAL_TIME, [kl_table(time)])
    if half.compared():
        yield Section("Half the updates", HALF_THE_UPDATES, [kl_table(half)])
    tables = budget_tables("Equal time", time, results) + budget_tables("Half the updates", half, results)
    if tables:
        yield Section("Equal time and half the updates, details and same seeds", OTHER_BUDGETS, tables)
    if any(r["budget"] == "tune" for r in results.rows):
        yield Section("Tuning", TUNING, [tuning_table(results.rows)])


def little_data(folder: Path) -> Iterator[Section]:
    """The section of research/little_data.py's students, where the folder holds their rows."""
    path = folder / "little_data.csv"
    if path.exists():
        rows = read_rows(path.resolve())
        figure = folder / "little_data.png"
        little_data_report.plot(figure, rows)
        yield Section("When teachers pay", LITTLE_DATA, [little_data_report.tables(rows)], figure)


def budget_tables(title: str, comparison: Comparison, results: Results) -> list[str]:
    """Details and comparison on the same seeds of a budget's runs, each after its name."""
    tables = []
    if comparison.compared():
        tables += [f"{title}, details:", details_table(comparison, results.rows)]
    if comparison.runs:
        tables += [f"{title}, on the same seeds:", same_seeds_table(comparison)]
    return tables


# ---- tables of KL ------------------------------------------------------------------------------------------


def kl_table(comparison: Comparison) -> str:
    """A line for each variant: final KL to the worst teacher in each case, and what is pooled over its cases.

    That is the KL divided by round-robin's, the probability that it is lower than round-robin's, and the
    probability that NOVELTY's is lower than it.
    """
    by_case = comparison.compared()
    reference = comparison.reference
    columns = [
        "",
        "seeds",
        *by_case,
        "KL / round-robin's",
        "P(lower than round-robin)",
        f"P({NOVELTY} lower)",
    ]
    lines = []
    for name in comparison.variants():
        kls = {
            case: final_kls(by_variant[name]) for case, by_variant in by_case.items() if name in by_variant
        }
        if not kls:
            continue
        divided = [kl / iqm_kl(reference[case]) for case, kl in kls.items()]
        against_round_robin = []
        novelty_against_it = []
        for case, kl in kls.items():
            against_round_robin += [kl, final_kls(reference[case])]
            if NOVELTY in by_case[case] and name != NOVELTY:
                novelty_against_it += [final_kls(by_case[case][NOVELTY]), kl]
        line = [name, "/".join(str(len(kl)) for kl in kls.values())]
        line += [cell(pooled, [kls[case]]) if case in kls else "" for case in by_case]
        line.append(cell(pooled, divided, "{:.2f}"))
        line.append(cell(improvement_of_strata, against_round_robin, "{:.2f}"))
        line.append(cell(improvement_of_strata, novelty_against_it, "{:.2f}") if novelty_against_it else "")
        lines.append(line)
    return table(columns, lines)


def same_seeds_table(comparison: Comparison) -> str:
    """A line for each variant: NOVELTY's KL divided by its, for runs with the same teachers; how often lower.

    The teachers that a seed draws change every KL by more than most variants differ.
    """
    by_case = {case: found for case, found in comparison.runs.items() if NOVELTY in found}
    columns = [f"KL of {NOVELTY} divided by that of", *by_case, "pooled", "P(lower)"]
    lines = []
    for name in comparison.variants():
        ratios = {}
        for case, by_variant in by_case.items():
            found = kl_ratios(by_variant[NOVELTY], by_variant.get(name, []))
            if len(found):
                ratios[case] = found
        if not ratios or name == NOVELTY:
            continue
        line = [name]
        line += [cell(pooled, [ratios[case]], "{:.2f}") if case in ratios else "" for case in by_case]
        line.append(cell(pooled, list(ratios.values()), "{:.2f}"))
        line.append(cell(_below_one, list(ratios.values()), "{:.2f}"))
        lines.append(line)
    return table(columns, lines)


def _below_one(strata):
    """Probability that a ratio is below one, averaged over cases."""
    return improvement((ratios, np.ones(1)) for ratios in strata)


def details_table(comparison: Comparison, rows: list[Row]) -> str:
    """A line for each variant: of what its runs are made, and what else was measured.

    Pooled over cases, but for how soon round-robin's final KL is reached. rows: all that count, for the
    times.
    """
    by_case = comparison.compared()
    columns = ["", "lr", "area", "mean KL"]
    columns += [f"{case}: reaches round-robin's final KL at" for case in by_case]
    columns += ["time", "projected", "cosine: 5 %, median, 95 %"]
    lines = []
    for name in comparison.variants():
        runs = {case: by_variant[name] for case, by_variant in by_case.items() if name in by_variant}
        if not runs:
            continue
        every = list(itertools.chain.from_iterable(runs.values()))
        soon = {case: _soon(of_case, comparison.reference[case]) for case, of_case in runs.items()}
        slowdowns = [slowdown(rows, case, name) for case in runs]
        slowdowns = [x for x in slowdowns if not math.isnan(x)]
        cosines = np.nanmean([row["cosine"] for row in every], 0)[[0, 2, 4]]
        lines.append(
            [
                name,
                "/".join(f"{1000 * of_case[0]['lr']:g}" for of_case in runs.values()),
                f"{_relative_area(runs, comparison.reference):.2f}",
                f"{_relative_mean_kl(runs, comparison.reference):.2f}",
                *(soon.get(case, "") for case in by_case),
                f"{np.mean(slowdowns):.2f}" if slowdowns else "",
                f"{100 * np.mean([row['projected'] for row in every]):.0f} %",
                ", ".join(f"{x:.2f}" for x in cosines),
            ]
        )
    return table(columns, lines)


def _soon(runs, reference):
    """The share of updates after which round-robin's final KL with the same teachers is reached, as text."""
    shares = paired(lambda run, other: reached(run, final_kl(other)), runs, reference)
    return cell(pooled, [shares], "{:.2f}") if np.isfinite(shares).all() else "not by all"


def _relative_area(runs, reference):
    """Geometric mean over training of the KL to the worst teacher divided by round-robin's, iqm over runs."""

    def ratio(run: Row, other: Row) -> float:
        return np.exp(np.mean(np.log(curve(run) / curve(other))[1:]))

    ratios = []
    for case, of_case in runs.items():
        ratios += list(paired(ratio, of_case, reference[case]))
    return iqm(ratios)


def _relative_mean_kl(runs, reference):
    """Final mean KL over teachers divided by the iqm of round-robin's, iqm over runs."""
    ratios = []
    for case, of_case in runs.items():
        of_round_robin = iqm([row["kl"][-1].mean() for row in reference[case]])
        ratios += [row["kl"][-1].mean() / of_round_robin for row in of_case]
    return iqm(ratios)


def tuning_table(rows: list[Row]) -> str:
    """A line for each variant: in each case, its KL with each learning rate on the tuning seeds.

    Rates off the grid are in brackets, the chosen one is bold.
    """
    rows = [r for r in rows if r["budget"] == "tune"]
    tuned_cases = {r["case"] for r in rows}
    tuned_variants = {r["variant"] for r in rows}
    cases = [case for case in CASES if case in tuned_cases]
    grid = ", ".join(f"{1000 * lr:g}" for lr in LRS)
    lines = []
    for name in VARIANTS:
        if name in tuned_variants:
            lines.append([name, *(_tuning_cell(rows, case, name) for case in cases)])
    return table([f"learning rate {grid} (1e-3), others in brackets", *cases], lines)


def _tuning_cell(rows, case, variant):
    """0.244, **0.214**, 0.280, 0.751: the geometric means over seeds."""
    best = best_rate(rows, case, variant)
    kls = []
    for lr, runs in tuning_runs(rows, case, variant).items():
        text = f"{np.exp(np.log(final_kls(runs)).mean()):.3f}"
        if lr not in LRS:
            text += f" ({1000 * lr:g})"
        kls.append(f"**{text}**" if lr == best else text)
    return ", ".join(kls)


# ---- tables of retention and scores ------------------------------------------------------------------------


def retention_table(evaluated: Sizes) -> str:
    """A line for each case, compression, number of updates and variant.

    Retention: mean over tasks, and the worst task's. Then, on the same seeds, how much more DEFAULT's is, and
    the KL to the worst teacher divided by DEFAULT's.
    """
    columns = ["case", "compression", "updates", "", "seeds", "mean", "worst task"]
    columns += ["default minus it, mean", "default minus it, worst task", "KL / default's"]
    lines = []
    for (times, steps), by_case in sorted(evaluated.items()):
        for case, by_variant in by_case.items():
            for name, runs in by_variant.items():
                default = by_variant.get(DEFAULT, []) if name != DEFAULT else []
                compared = [
                    paired(lambda a, b: mean_retention([a])[0] - mean_retention([b])[0], default, runs),
                    paired(lambda a, b: worst_retention([a])[0] - worst_retention([b])[0], default, runs),
                    kl_ratios(runs, default),
                ]
                line = [case, f"{times:g}", str(steps), name, str(len(runs))]
                line += [cell(pooled, [mean_retention(runs)]), cell(pooled, [worst_retention(runs)])]
                line += [cell(pooled, [x]) if len(x) else "" for x in compared]
                lines.append(line)
    return table(columns, lines)


def score_table(case: str, by_variant: ByVariant, columns: dict[str, str]) -> str:
    """A line for each task: its teachers' score and the students', of the variants `columns`, {name:
    variant}.
    """
    runs = of_columns(by_variant, columns)
    teachers = np.array([row["teacher_scores"] for row in by_variant[DEFAULT]])  # (seeds, tasks)
    lines = []
    for i, task in enumerate(CASES[case]):
        line = [task, cell(pooled, [teachers[:, i]], "{:.1f}")]
        for of_column in runs.values():
            students = np.array([row["teacher_scores"][i] * row["retention"][i] for row in of_column])
            line.append(cell(pooled, [students], "{:.1f}"))
        lines.append(line)
    lines.append(["seeds", "", *(str(len(of_column)) for of_column in runs.values())])
    for name, *values in retention_lines(runs):
        lines.append([f"retention, {name}", "", *values])
    return table(["task", "teacher", *runs], lines)


def of_columns(by_variant: ByVariant, columns: dict[str, str]) -> ByVariant:
    """The runs of each column's variant whose teachers are those of DEFAULT's, where there are any."""
    runs = {}
    for column, variant in columns.items():
        of_same_teachers = list(paired(lambda run, _: run, by_variant.get(variant, []), by_variant[DEFAULT]))
        if of_same_teachers:
            runs[column] = of_same_teachers
    return runs


def retention_lines(runs: ByVariant) -> list[list[str]]:
    """Retention, a cell for each of the columns."""
    lines = []
    for name, retention in (("mean", mean_retention), ("worst task", worst_retention)):
        values = [cell(pooled, [retention(of_column)], "{:.2f}") for of_column in runs.values()]
        lines.append([name, *values])
    return lines


def readme_table(results: Results) -> str:
    """The table of README's results: retention alone, in fewer columns."""
    columns = {name: SCORE_COLUMNS[name] for name in README_COLUMNS}
    runs = of_columns(results.scored()[DEFAULTS], columns)
    return table(["retention", *runs], retention_lines(runs))

"""research/study_report.py and study_figures.py, of a few rows and of the study's own."""

import json
import math
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from conftest import ROOT
from research import study_figures, study_report, study_rows
from research.variants import DEFAULT, NOVELTY, SCORE_COLUMNS
from support import UserError

SURGERY = SCORE_COLUMNS["with surgery"]
EQUAL_SHARES = SCORE_COLUMNS["equal shares"]


def csv_row(variant, budget="updates", seed=0, kl=(0.1, 0.2), case="conflict", steps=100, times=15.0, **more):
    """A row of the CSV: a run that ends with these KLs, ten times lower than it began."""
    final = np.array(kl)
    curve = [(final * 10 ** (1 - k / 10)).tolist() for k in range(11)]
    row = {
        "case": case,
        "variant": variant,
        "budget": budget,
        "seed": seed,
        "lr": 8e-3,
        "steps": steps,
        "times": times,
        "n_embd": 64,
        "compression": times,
        "seconds": 1.0,
        "ms": 10.0,
        "projected": 0.25,
        "cosine": [-0.1, 0.0, 0.1, 0.2, 0.3],
        "weights": [],
        "steps_at": [steps // 10 * k for k in range(11)],
        "kl": curve,
        "retention": [],
        "teacher_scores": [100.0, 50.0],
    }
    row |= more
    return {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}


def study_of(path, rows):
    for row in rows:
        study_rows.add(path, row)
    return path


def has_colours(path):
    """Whether a figure shows more than its black and grey axes."""
    pixels = plt.imread(path)[..., :3]
    return (np.ptp(pixels, axis=-1) > 0.2).sum() > 100


def tables_of(text):
    """The Markdown tables of a text, each a list of lines."""
    tables = []
    previous = ""
    for line in text.splitlines():
        if line.startswith("|"):
            if not previous.startswith("|"):
                tables.append([])
            tables[-1].append(line)
        previous = line
    return tables


# ---- the page ----------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """A CSV with a few runs of every kind."""
    rows = []
    for seed in range(3):
        k = 1 + 0.1 * seed
        for budget, steps in (("updates", 100), ("half", 50)):
            rows.append(csv_row("fixed", budget, seed, (0.1, 0.4 * k), steps=steps))
            rows.append(csv_row(NOVELTY, budget, seed, (0.1, 0.2 * k), steps=steps))
        rows.append(csv_row("all", seed=seed, kl=(0.1, 0.3 * k)))
        rows.append(csv_row("novelty, previous", seed=seed, kl=(0.1, 0.21 * k)))
        rows.append(csv_row("novelty, pcgrad", seed=seed, kl=(0.1, 0.2 * k)))
        rows.append(csv_row("novelty, pcgrad", "time", seed, (0.1, 0.8 * k), steps=40))
        rows.append(csv_row("fixed", "cost", seed))
        rows.append(csv_row("novelty, pcgrad", "cost", seed, ms=25.0))
        for times in (5.0, 15.0):
            rows.append(csv_row(DEFAULT, "acting", seed, times=times, retention=[1.0, 0.9]))
            rows.append(csv_row(EQUAL_SHARES, "acting", seed, times=times, retention=[0.9, 0.8]))
    rows.append(csv_row("fixed", "tune", 100, lr=4e-3, kl=(0.1, 0.5)))
    rows.append(csv_row("fixed", "tune", 100, kl=(0.1, 0.4)))
    rows.append(csv_row("fixed", seed=9, lr=4e-3, kl=(0.1, 99.0)))  # of a rate that lost: it does not count
    return study_of(tmp_path / "results/study.csv", rows)


SECTIONS = [
    "Scores, conflict",
    "Figure: curricula",
    "Equal updates",
    "Equal updates, on the same seeds",
    "Figure: surgeries",
    "Retention",
    "Figure: retention by compression",
    "Equal updates, details",
    "Equal time",
    "Half the updates",
    "Equal time and half the updates, details and same seeds",
    "Tuning",
]


def test_report__writes_findings_then_tables_and_figures_each_introduced(small, capsys):
    study_report.report(small, 15.0, 100)
    printed = capsys.readouterr().out
    page = small.with_suffix(".md").read_text()
    findings, rest = page.split("\n## All tables and figures\n")
    assert findings.strip() == (ROOT / "research/findings.md").read_text().strip()
    sections = rest.split("\n### ")[1:]
    assert [section.split("\n")[0] for section in sections] == SECTIONS
    for section in sections:
        introduction = section.split("\n\n")[1]
        assert introduction.endswith(".")
        assert not introduction.startswith("|")
    assert tables_of(rest) == tables_of(printed)
    for name in ("curricula", "surgery", "retention"):
        assert f"](study_{name}.png)" in rest
        assert has_colours(small.parent / f"study_{name}.png")
    assert "| fixed | 3 | 0.440 (0.400-0.480) | 1.00 (" in printed
    assert "99" not in printed


def test_report__puts_other_budgets_beside_round_robin_with_all_updates(small, capsys):
    study_report.report(small, 15.0, 100)
    printed = capsys.readouterr().out
    equal_time = tables_of(printed.split("\nEqual time\n")[1])[0]
    names = [line.split(" | ")[0] for line in equal_time[2:]]
    assert names == [
        "| fixed",
        f"| {NOVELTY}",
        "| novelty, pcgrad",
    ]  # measured as equally fast, and the default
    assert " | 2.00 (" in equal_time[4]
    half = tables_of(printed.split("\nHalf the updates\n")[1])[0]
    assert " | 1.00 (" in half[2]


def test_report__leaves_out_what_has_no_runs(tmp_path, capsys):
    path = study_of(tmp_path / "study.csv", [csv_row("all", "tune", 100)])
    study_report.report(path, 15.0, 100)
    page = path.with_suffix(".md").read_text()
    assert page.count("\n### ") == 1
    assert "\n### Tuning\n" in page
    assert not list(tmp_path.glob("*.png"))


def test_report__needs_a_run(tmp_path):
    with pytest.raises(UserError, match="holds no run; run research.study without --report first"):
        study_report.report(tmp_path / "study.csv", 15.0, 100)


# ---- docs/study.md and README ------------------------------------------------------------------------------


def test_docs__hold_what_the_report_prints(tmp_path, capsys):
    """docs/study.md is the report of research/results/study.csv to the byte; README has its compact table."""
    for name in ("study", "little_data", "shares", "conflict", "streaming"):
        shutil.copy(ROOT / f"research/results/{name}.csv", tmp_path)
    study_report.report(tmp_path / "study.csv", 15.0, 4000)
    page = (tmp_path / "study.md").read_text()
    docs = (ROOT / "docs/study.md").read_text()
    assert docs.replace("](../research/results/", "](") == page
    for figure in tmp_path.glob("*.png"):
        assert f"](../research/results/{figure.name})" in docs
        assert (ROOT / "research/results" / figure.name).exists()
    compact = capsys.readouterr().out.split("\nREADME\n\n")[1].strip()
    assert len(compact.splitlines()) == 4
    assert compact in (ROOT / "README.md").read_text()


# ---- tables ------------------------------------------------------------------------------------------------


def evaluated(*retention, scores=(100.0, 50.0)):
    """Evaluated runs of seeds 0, 1, ...; the KL of each is the sum of its retentions."""
    rows = []
    for seed, of_tasks in enumerate(retention):
        kl = np.array([[1.0, sum(of_tasks)]])
        row = {"seed": seed, "retention": np.array(of_tasks), "kl": kl}
        rows.append({**row, "teacher_scores": np.array(scores)})
    return rows


BY_VARIANT = {
    DEFAULT: evaluated(*[(0.9, 1.1)] * 4),
    SURGERY: evaluated(*[(0.8, 1.0)] * 4),
    EQUAL_SHARES: evaluated((0.0, 1.0), (0.7, 1.0), (0.9, 1.0), (9.0, 1.0)),
}


def test_score_table__has_a_line_for_each_task():
    lines = study_report.score_table("conflict", BY_VARIANT, SCORE_COLUMNS).splitlines()
    assert lines[0] == "| task | teacher | student | with surgery | equal shares |"
    teacher = "100.0 (100.0-100.0)"
    students = "90.0 (90.0-90.0) | 80.0 (80.0-80.0) | 80.0 (0.0-900.0)"
    assert lines[2] == f"| halfcheetah | {teacher} | {students} |"
    assert lines[3].startswith(
        "| halfcheetah-back | 50.0 (50.0-50.0) | 55.0 (55.0-55.0) | 50.0 (50.0-50.0) |"
    )
    assert lines[4] == "| seeds | | 4 | 4 | 4 |"
    assert lines[5].startswith("| retention, mean | | 1.00 (1.00-1.00) | 0.90 (0.90-0.90) |")
    assert lines[6].startswith("| retention, worst task | | 0.90 (0.90-0.90) | 0.80 (0.80-0.80) |")


def test_score_table__leaves_out_students_of_other_teachers():
    others = evaluated(*[(0.0, 0.0)] * 4, scores=(99.0, 50.0))
    mixed = {**BY_VARIANT, SURGERY: BY_VARIANT[SURGERY] + others}
    alone = study_report.score_table("conflict", BY_VARIANT, SCORE_COLUMNS)
    assert study_report.score_table("conflict", mixed, SCORE_COLUMNS) == alone


def test_retention_table__compares_with_the_default_on_the_same_seeds(tmp_path):
    by_size = {5.0: {"conflict": {DEFAULT: evaluated(*[(1.0, 1.0)] * 3)}}, 15.0: {"conflict": BY_VARIANT}}
    sizes = {(times, 4000): by_case for times, by_case in by_size.items()}
    lines = study_report.retention_table(sizes).splitlines()
    one = "1.000 (1.000-1.000)"
    assert lines[2] == f"| conflict | 5 | 4000 | {DEFAULT} | 3 | {one} | {one} | | | |"
    start = f"| conflict | 15 | 4000 | {SURGERY} | 4 | 0.900 (0.900-0.900) | 0.800 (0.800-0.800) |"
    assert lines[4].startswith(start)
    assert lines[4].endswith("| 0.100 (0.100-0.100) | 0.100 (0.100-0.100) | 0.900 (0.900-0.900) |")
    # of 0.5, 0.15, 0.05 and -4; of 0.9, 0.2, 0 and -0.1; of 0.5, 0.85, 0.95 and 5
    end = "| 0.100 (-4.000 to 0.500) | 0.100 (-0.100 to 0.900) | 0.900 (0.500-5.000) |"
    assert lines[5].endswith(end)
    assert study_figures.plot_retention(tmp_path / "retention.png", by_size)
    assert has_colours(tmp_path / "retention.png")
    assert not study_figures.plot_retention(tmp_path / "none.png", {15.0: {"conflict": BY_VARIANT}})


def runs(*kls, seeds=None):
    """Runs with these final KLs, of seeds 0, 1, ... or `seeds`."""
    rows = []
    for kl, seed in zip(kls, seeds or range(len(kls)), strict=True):
        row = {"seed": seed, "teacher_scores": np.array([100.0])}
        rows.append({**row, "kl": np.array([[9.0, 0.0], [kl, kl / 10]])})
    return rows


def test_same_seeds_table__compares_runs_of_the_same_teachers():
    by_case = {
        "builtin": {NOVELTY: runs(1.0, 2.0, 4.0, 9.0), "all": runs(2.0, 2.0, 2.0, 2.0, seeds=(3, 2, 1, 0))},
        "many": {NOVELTY: runs(1.0, 1.0), "all": runs(4.0, 4.0, 4.0, seeds=(1, 2, 0))},
    }
    lines = study_report.same_seeds_table(study_report.Comparison(by_case, {})).splitlines()
    assert lines[0] == f"| KL of {NOVELTY} divided by that of | builtin | many | pooled | P(lower) |"
    assert len(lines) == 3
    assert lines[2].startswith("| all | 1.50 (")  # the middle two of 0.5, 1, 2 and 4.5
    assert "| 0.25 (0.25-0.25) |" in lines[2]
    assert "| 0.69 (" in lines[2]  # lower: 1.5 of 4, and both, on average


def test_kl_table__divides_by_round_robin_and_pools_the_cases():
    by_case = {
        "builtin": {"fixed": runs(2.0, 2.0), "all": runs(1.0, 1.0), NOVELTY: runs(0.5, 1.5)},
        "many": {"fixed": runs(4.0, 4.0), NOVELTY: runs(4.0, 4.0)},
        "alone": {NOVELTY: runs(1.0)},  # no round-robin: left out
    }
    reference = {case: by_case[case]["fixed"] for case in ("builtin", "many")}
    lines = study_report.kl_table(study_report.Comparison(by_case, reference)).splitlines()
    columns = f"KL / round-robin's | P(lower than round-robin) | P({NOVELTY} lower)"
    assert lines[0] == f"| | seeds | builtin | many | {columns} |"
    four = "4.000 (4.000-4.000)"
    assert lines[2].startswith(f"| fixed | 2/2 | 2.000 (2.000-2.000) | {four} | 1.00 (1.00-1.00) | 0.50 (")
    share = "0.50 (0.50-0.50) | 1.00 (1.00-1.00)"
    assert lines[3].startswith(f"| all | 2 | 1.000 (1.000-1.000) | | {share} | 0.50 (")
    assert lines[4].endswith(" | |")
    assert len(lines) == 5


def test_tuning_table__marks_the_chosen_rate_and_those_off_the_grid():
    def row(lr, *kl):
        return {"case": "alone", "variant": "all", "budget": "tune", "lr": lr, "kl": np.array([kl])}

    rows = [row(4e-3, 0.1, 0.5), row(8e-3, 0.3, 0.4), row(16e-3, 0.01, 0.6), row(32e-3, math.nan, 0.1)]
    lines = study_report.tuning_table(rows).splitlines()
    assert lines[0] == "| learning rate 4, 8, 16, 32 (1e-3), others in brackets | alone |"
    assert lines[2] == "| all | 0.500, **0.400**, 0.600, inf |"
    rows.append(row(2e-3, 0.1, 0.3))
    assert (
        study_report.tuning_table(rows).splitlines()[2] == "| all | **0.300 (2)**, 0.500, 0.400, 0.600, inf |"
    )


def test_plot_surgery__needs_runs_with_and_without(tmp_path):
    path = Path(tmp_path / "surgery.png")
    assert not study_figures.plot_surgery(
        path, {"builtin": {NOVELTY: runs(1.0), "uniform, previous": runs(1.0)}}
    )
    with_surgery = [{**row, "projected": 0.1} for row in runs(1.1, 1.3)]
    by_case = {"builtin": {NOVELTY: runs(1.0, 1.0), "novelty, previous": with_surgery}}
    assert study_figures.plot_surgery(path, by_case)
    assert has_colours(path)


@pytest.mark.parametrize(
    ("variant", "base"),
    [
        ("novelty, average by teacher", NOVELTY),
        ("upgrad", "all"),
        ("uniform, switch", "uniform"),
        ("mse", None),
    ],
)
def test_without_surgery__is_the_same_variant_with_none(variant, base):
    assert study_figures.without_surgery(variant) == base

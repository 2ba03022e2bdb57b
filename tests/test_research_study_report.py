"""research/study_report.py: comparisons with equal shares, the share law, the page."""

import json
import math
import shutil

import matplotlib.pyplot as plt
import numpy as np
import pytest

import curriculum
from conftest import ROOT
from research import study, study_report, study_rows
from research.study_report import comparisons, groups
from support import UserError


def row(run="equal", seed=0, kl=(0.1, 0.2), case="builtin", shares=(0.5, 0.5), lr=0.016, teachers=5, **more):
    """A row of the CSV, as text: a run that ends with these KLs, ten times lower than it began."""
    kls = np.geomspace(10, 1, 10)[:, None] * np.array(kl)
    about = {"case": case, "tasks": "", "steps": 1000, "n_embd": 64, "planted": -1, "teachers": teachers}
    about |= {"run": run, "seed": seed, "lr": lr, "kl": json.dumps(kls.tolist())}
    about |= {"shares": json.dumps(list(shares)), "ms": 10.0, "projected": 0.0, "cosine": "[0, 0, 0]"}
    return {k: str(v) for k, v in {**about, "commit": "abc", **more}.items()}


def lines_of(text):
    """The lines of a Markdown table, without its head."""
    return [line for line in text.splitlines() if line.startswith("|")][2:]


# ---- groups ------------------------------------------------------------------------------------------------


def test_groups__hold_neither_tuning_runs_nor_rates_that_lost():
    rows = [row(seed=s, kl=(1.0, 2.0)) for s in range(3)]
    rows += [row(seed=0, lr=0.5), row(seed=100, lr=0.016), row(seed=0, n_embd=8)]
    found = groups(rows)
    assert [g[3] for g in found] == ["64", "8"] or [g[3] for g in found] == ["8", "64"]
    of_main = found["builtin", "", "1000", "64", "-1", "5"]["equal"]
    assert sorted(of_main) == [0, 1, 2]
    assert all(s.worst == pytest.approx(2.0) for s in of_main.values())


def test_groups__hold_the_better_of_two_rates_that_as_many_seeds_have():
    rows = [
        row(seed=s, lr=lr, kl=(0.1, kl)) for s in (0, 1) for lr, kl in ((0.1, 0.4), (0.2, 0.3), (0.3, 0.5))
    ]
    (runs,) = groups([*rows, row(seed=0, lr=0.4, kl=(0.1, 0.2))]).values()
    assert [s.row["lr"] for s in runs["equal"].values()] == ["0.2", "0.2"]


def test_groups__leave_out_the_planted_task():
    found = groups([row(kl=(9.0, 0.3), shares=(0.8, 0.2), planted=0)])
    (student,) = found["builtin", "", "1000", "64", "0", "5"]["equal"].values()
    assert student.worst == pytest.approx(0.3)
    assert student.shares.tolist() == [0.2]


# ---- comparisons -------------------------------------------------------------------------------------------


def test_comparisons__pair_seeds_and_name_their_teachers():
    rows = [row(seed=s, kl=(1.0, 2.0 + s)) for s in range(6)]
    rows += [row("default", seed=s, kl=(1.0, 1.0 + s / 2)) for s in (0, 2, 5, 9)]
    (c,) = comparisons(rows)
    assert c.run == "default"
    assert c.teachers == (0, 2, 0)
    assert np.allclose(np.exp(c.worst), 0.5)
    assert np.allclose(np.exp(c.mean), [2 / 3, 3 / 5, 4.5 / 8])


def test_comparison_tables__mark_what_survives_holms_correction():
    rng = np.random.default_rng(0)
    rows = [row(seed=s) for s in range(10)]
    rows += [row("default", seed=s, kl=(0.1, 0.2 * 0.8 * math.exp(0.01 * rng.normal()))) for s in range(10)]
    rows += [row("dro", seed=s, kl=(0.1, 0.2 * math.exp(0.05 * rng.normal()))) for s in range(10)]
    rows += [row("mse", seed=s, kl=(0.1, 0.4)) for s in range(3)]
    text = study_report.comparison_tables(comparisons(rows))
    assert text.startswith("builtin, 1000 updates, 64 channels, 5 teachers a task:\n")
    default, dro, mse = ([x.strip() for x in line.split("|")[1:-1]] for line in lines_of(text))
    assert default[0] == "default"
    assert default[2].startswith("**0.80")
    assert default[4] == "1.00"
    assert float(default[5]) < 0.05
    assert default[6] == ""
    assert not dro[2].startswith("**")
    assert float(dro[5]) > 0.05
    assert 0 < float(dro[6]) < 0.1
    assert mse[1:4] == ["3", "2.000", "1.667"]
    assert mse[5:8] == ["", "", ""]  # too few seeds for a p; never down to equal shares' end


def test_comparisons__of_a_lost_run_are_infinite_not_left_out():
    rows = [row(seed=s) for s in range(5)] + [row("mse", seed=s) for s in range(4)]
    lost = row("mse", seed=4)
    lost["kl"] = json.dumps([[0.1, 0.1]] * 5 + [[math.nan, math.nan]] * 5)
    (c,) = comparisons([*rows, lost])
    assert c.worst.tolist() == [0, 0, 0, 0, math.inf]
    assert math.isnan(c.p())
    assert "| mse | 5 | inf |" in study_report.comparison_tables([c])


@pytest.mark.parametrize(
    ("kl", "share"), [(8.0, 0.1), (4.0, 0.2), (2.0, 0.3), (math.sqrt(8.0), 0.25), (0.5, math.inf)]
)
def test_reached__is_where_a_curve_comes_down_to_a_kl(kl, share):
    curve = np.array([8.0, 4.0, 2.0, *[1.0] * 7])
    assert study_report.reached(curve, kl) == pytest.approx(share)


# ---- the share law -----------------------------------------------------------------------------------------


def test_law__finds_the_exponent_that_made_the_students():
    """Also where sets of teachers differ in what makes the KLs."""
    rng = np.random.default_rng(0)
    sets = np.array([[0.1, 0.2, 0.05], [1.0, 0.3, 0.4]])
    rows = [row(seed=k, kl=c, shares=[1 / 3] * 3, teachers=2) for k, c in enumerate(sets)]
    for seed in range(6):
        shares = rng.dirichlet([5, 5, 5])
        kl = sets[seed % 2] * (3 * shares) ** -0.6
        rows.append(row("random", seed=seed, kl=kl, shares=shares.tolist(), teachers=2))
    (runs,) = groups(rows).values()
    law = study_report.law(runs, 2)
    assert law.a == pytest.approx(0.6)
    assert np.allclose(law.of_tasks, 0.6)
    assert law.explained == pytest.approx(1)
    assert study_report.law(runs, 1).explained < 0.5
    (line,) = lines_of(study_report.law_table(rows))

    def predicted(a):
        of_sets = (sets ** (1 / a)).mean(1) ** a / sets.max(1)
        return np.sqrt(of_sets.prod())

    assert f"| 0.60 | 0.60 to 0.60 | 1.00 | {predicted(0.55):.2f} |" in line
    assert line.endswith(f"| {predicted(0.6):.2f} | |")
    assert study_report.law({"equal": runs["equal"]}, 2) is None
    assert study_report.law_table(rows[:3]) == ""


def test_level_of__is_the_closed_form_of_the_method():
    c = np.array([0.3, 0.1, 0.2])
    shares = curriculum.torch.full((3,), 1 / 3)
    _, best = curriculum.worst_by_law(curriculum.torch.tensor(c), shares)
    assert study.level_of(c, curriculum.LAW) == pytest.approx(float(best), rel=1e-5)
    assert study.level_of(c, np.full(3, curriculum.LAW)) == pytest.approx(float(best), rel=1e-5)


# ---- by task -----------------------------------------------------------------------------------------------


def test_task_table__says_whose_kl_is_noise_and_what_is_left_without_it():
    noisy = (0.1, 0.1, 0.1, 0.2, 0.4, 0.4)  # of seeds 0 and 3, 1 and 4, 2 and 5, which have the same teachers
    rows = [row(seed=s, kl=(noisy[s], 0.2), teachers=3) for s in range(6)]
    rows += [row("default", seed=s, kl=(0.3, 0.1), shares=(0.2, 0.8), teachers=3) for s in range(6)]
    env, *_ = study.CASES["builtin"]["envs"]
    first, second, rest = lines_of(study_report.task_table(rows))
    spread = math.log(2) * math.sqrt((2 * 0.5**2 + 2 * 1 + 2 * 1) / 3)
    kl = np.exp(np.mean(np.log(noisy)))
    students = "| builtin, 1000 updates, 64 channels, 3 teachers a task"
    assert first == f"{students} | {env} | {kl:.3f} | {spread:.2f} | 0.40 | {0.3 / kl:.2f} | |"
    assert second.endswith("| 0.200 | 0.00 | 1.60 | 0.50 | |")
    assert rest == f"{students} | the worst of the others | | | | 0.500 | 1.00 |"
    assert study_report.task_table(rows[:9]) == ""


# ---- tasks learnt alone ------------------------------------------------------------------------------------


def test_bound_table__says_what_shares_can_do_by_tasks_learnt_alone():
    rows = [row(seed=s, kl=(0.1, 0.2)) for s in range(5)]
    rows += [row("default", seed=s, kl=(0.1, 0.19)) for s in range(5)]
    alone = [row(seed=s, kl=(kl,), tasks=i) for s in range(4) for i, kl in ((0, 0.05), (1, 0.15))]
    others = [row(seed=s, kl=(0.01,), tasks=0, n_embd=8) for s in range(5)]  # of another size
    others += [row(seed=s, kl=(0.01, 0.01), tasks="0 1") for s in range(5)]  # not alone
    (line,) = lines_of(study_report.bound_table([*rows, *alone, *others]))
    a = np.array([math.log(0.1 / 0.05) / math.log(2), math.log(0.2 / 0.15) / math.log(2)])
    best = study.level_of(np.array([0.1, 0.2]), a) / 0.2
    assert 0.75 < best < 1
    about = f"| builtin, 1000 updates, 64 channels, 5 teachers a task | 4 | {a[1]:.2f} to {a[0]:.2f} |"
    assert line.startswith(f"{about} 0.750 (0.750-0.750) | {best:.3f} (")
    assert line.endswith("| 0.950 (0.950-0.950) |")
    assert study_report.bound_table([*rows, *alone[::2], *others]) == ""  # one task's students are missing
    assert study_report.bound_table(rows) == ""


# ---- learning rates ----------------------------------------------------------------------------------------


def test_tuning_table__marks_the_best_rate():
    rows = [row(seed=100, lr=lr, kl=(0.1, kl)) for lr, kl in ((0.008, 0.3), (0.016, 0.2), (0.032, 0.4))]
    rows += [row("mse", seed=100, lr=0.008, kl=(0.1, 0.5)), row(seed=0, lr=0.064, kl=(0.1, 0.01))]
    text = study_report.tuning_table(rows)
    assert text.splitlines()[0] == "| learning rate | 0.008 | 0.016 | 0.032 |"
    assert lines_of(text) == ["| equal | 0.300 | **0.200** | 0.400 |", "| mse | **0.500** | | |"]
    assert study_report.tuning_table([row()]) == ""


# ---- the page ----------------------------------------------------------------------------------------------


def test_report__writes_findings_then_what_there_is(tmp_path, capsys):
    for seed in range(6):
        for run, kl in (("equal", 0.2), ("default", 0.17)):
            study_rows.add(tmp_path / "study.csv", row(run, seed, (0.1, kl * (1 + 0.01 * seed))))
    study_report.report(tmp_path, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    findings, tables = page.split("\n## Tables\n")
    assert findings.strip() == (ROOT / "research/findings.md").read_text().strip()
    titles = [section.splitlines()[0] for section in tables.split("\n### ")[1:]]
    assert titles == ["Curricula, surgeries and losses", "Tasks"]
    assert "| default | 6 | **0.850 (0.850-0.850)** |" in tables
    assert tables.strip() == capsys.readouterr().out.strip()
    pixels = plt.imread(tmp_path / "study.png")[..., :3]
    assert "](study.png)" in tables
    assert (np.ptp(pixels, axis=-1) > 0.1).any()  # coloured


def test_report__needs_a_run(tmp_path):
    with pytest.raises(UserError, match="holds no run; run research.study without --report first"):
        study_report.report(tmp_path, tmp_path / "page.md")


def test_docs__hold_what_the_report_prints(tmp_path):
    """docs/study.md is the report of research/results/ to the byte."""
    for path in (ROOT / "research/results").glob("*.csv"):
        shutil.copy(path, tmp_path)
    study_report.report(tmp_path, tmp_path / "study.md")
    docs = (ROOT / "docs/study.md").read_text()
    assert docs.replace("](../research/results/", "](") == (tmp_path / "study.md").read_text()
    for figure in tmp_path.glob("*.png"):
        assert f"](../research/results/{figure.name})" in docs
        assert (ROOT / "research/results" / figure.name).exists()


def test_archive__holds_the_rows_of_the_first_study_and_their_commits():
    rows = study_rows.read(study.RESULTS / "archive/study.csv")
    assert len(rows) > 1800
    assert all(len(r["commit"]) >= 7 for r in rows)

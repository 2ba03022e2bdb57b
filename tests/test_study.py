"""The study's statistics and bookkeeping; its runs in miniature."""

import csv
import math
import re
import shutil

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import curriculum
import surgery
import teacher
from conftest import ROOT, make_dataset
from research import study
from support import (
    UserError,
)

numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40).map(np.array)


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_the_interquartile_mean_is_that_of_the_middle_half():
    assert study.iqm(np.array([100.0, 2, 3, 4, 5, 6, 7, -50])) == 4.5
    assert study.iqm(np.arange(10.0)) == 4.5  # of ten, the middle six


@given(numbers, st.integers(0, 1000))
def test_the_interquartile_mean_lies_between_the_quartiles_and_does_not_know_order(x, seed):
    x = np.round(x, 3)
    low, high = np.quantile(x, [0.25, 0.75], method="inverted_cdf")
    assert min(x) - 1e-6 <= study.iqm(x) <= max(x) + 1e-6 and low - 1e-6 <= study.iqm(x) + (high - low)
    assert study.iqm(np.random.default_rng(seed).permutation(x)) == pytest.approx(study.iqm(x))


@given(numbers, numbers)
def test_the_probability_of_improvement_and_its_opposite_make_one(x, y):
    assert study.improvement([(x, y)]) + study.improvement([(y, x)]) == pytest.approx(1)
    assert study.improvement([(x, x)]) == pytest.approx(0.5)


def test_the_probability_of_improvement_counts_pairs_and_cases_alike():
    better, worse = np.array([1.0, 2.0]), np.array([3.0, 4.0, 5.0])
    assert study.improvement([(better, worse)]) == 1 and study.improvement([(worse, better)]) == 0
    assert study.improvement([(better, worse), (worse, better)]) == 0.5
    assert study.improvement([(np.array([1.0, 4.0]), np.array([2.0, 4.0]))]) == pytest.approx(
        (1 + 1 + 0 + 0.5) / 4
    )


def test_95_of_100_intervals_hold_the_true_mean():
    rng, held = np.random.default_rng(0), 0
    for _ in range(100):
        low, high = study.interval(
            lambda s: np.mean([x.mean() for x in s]), [rng.normal(1, 1, 20), rng.normal(3, 5, 20)], 300
        )
        held += low < 2 < high
    assert 88 <= held <= 99


def test_an_interval_resamples_each_case_by_itself():
    low, high = study.interval(lambda s: np.concatenate(s).mean(), [np.zeros(5), np.full(5, 10.0)])
    assert low == high == 5


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    home = tmp_path_factory.mktemp("study")
    for i in range(2):
        make_dataset(f"tests/study-{i}-v0", [30, 25, 40, 20, 30], obs_dim=3 + i, act_dim=1 + i, seed=i)
        for seed in range(2):
            teacher.main(teacher.Config(dataset=f"tests/study-{i}-v0", steps=10, n_layer=1, n_embd=16, batch_size=4, eval_episodes=0, device="cpu", seed=seed,
                                        out_dir=str(study.teacher_dir(home, f"tests/study-{i}-v0", seed))))  # fmt: skip
    return home


@pytest.fixture
def tiny(work, tmp_path, monkeypatch):
    """A configuration of the study that takes seconds."""
    monkeypatch.setitem(study.CASES, "tests", ("tests/study-0-v0", "tests/study-1-v0"))
    monkeypatch.setattr(study, "LRS", (1e-3, 8e-3))
    monkeypatch.setattr(curriculum, "METHODS", dict(curriculum.METHODS))
    monkeypatch.setattr(surgery, "METHODS", dict(surgery.METHODS))
    monkeypatch.setattr(surgery, "EACH", surgery.EACH)
    monkeypatch.setattr(
        study, "prepare", lambda real=study.prepare: (real(), torch.set_num_threads(torch.get_num_threads()))
    )
    only = ("fixed", "all", "novelty p=2", "all, previous", "weights w=1", "one student per task")
    return study.Config(cases=("tests",), only=only, without=("upgrad", "cagrad"), budgets=("updates", "half"), seeds=2, teachers=2, steps=20, compression=1.0, jobs=1,
                        out=str(tmp_path / "research/results/study.csv"), work_dir=str(work))  # fmt: skip


def rows_of(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def tried(rows):
    return {
        v: {float(r["lr"]) for r in rows if r["variant"] == v and r["budget"] == "tune"}
        for v in {r["variant"] for r in rows}
    }


def test_a_study_makes_the_runs_that_are_missing_and_no_others(tiny, capsys):
    study.main(tiny)
    rows = rows_of(tiny.out)
    assert sum(r["budget"] != "tune" for r in rows) == 2 * (
        6 + 3
    )  # two seeds of all, and three of them with half the updates
    assert all(
        study.tuned(study.read(tiny.out), "tests", v)[0] < max(rates) for v, rates in tried(rows).items()
    )  # beyond the grid where need be
    assert len({tuple(r[k] for k in study.KEY) for r in rows}) == len(rows)
    said = capsys.readouterr().out
    assert "| novelty p=2 | 2 |" in said and "equal updates" in said
    assert re.search(r"\| fixed \| \d+ \| 1.00 \| 1.00 \|", said)  # it is what the others are counted by
    for picture in ("study_orders.png", "study_surgery.png"):
        pixels = plt.imread(study.Path(tiny.out).parent / picture)[..., :3]
        assert (
            np.ptp(pixels, axis=-1) > 0.2
        ).sum() > 100  # axes are black and grey, what is drawn in them has colours
    study.main(tiny)
    assert rows_of(tiny.out) == rows  # nothing done again
    lost = rows[-1]
    study.Path(tiny.out).unlink()
    for r in rows[:-1]:
        study.add(tiny.out, r)
    study.main(tiny)
    again = rows_of(tiny.out)[-1]
    timing = ("seconds", "ms")
    assert {k: v for k, v in again.items() if k not in timing} == {
        k: v for k, v in lost.items() if k not in timing
    }


def test_the_default_is_what_distill_does_unasked():
    unasked = {f.name: f.default for f in study.dataclasses.fields(study.distill.Config)}
    assert (
        study.VARIANTS[study.DEFAULT] == {k: unasked[k] for k in study.VARIANTS[study.DEFAULT]}
        and unasked["curriculum"] == "novelty"
    )
    assert {**study.VARIANTS[study.NOVELTY], "top": unasked["top"]} == study.VARIANTS[study.DEFAULT]
    assert {**study.VARIANTS[study.BESIDE["with surgery"]], "surgery": "none"} == study.VARIANTS[
        study.DEFAULT
    ]


def test_a_seed_draws_the_teachers_too(tiny):
    drawn = {
        tuple(m.head.weight.sum().item() for m in study.setup("tests", seed, 2, tiny.work_dir)[0])
        for seed in range(12)
    }
    assert len(drawn) == 4
    a, b = (study.setup("tests", 3, 2, tiny.work_dir)[3].table for _ in range(2))
    assert torch.equal(a, b)


def test_a_teacher_trained_anew_is_asked_anew(tiny):
    def said():
        study.setup.cache_clear()
        return study.setup("tests", 0, 2, tiny.work_dir)[3].table

    first = study.teacher_dir(
        tiny.work_dir, study.CASES["tests"][0], int(np.random.default_rng(0).integers(2))
    )
    other = next(d for d in first.parent.iterdir() if d.name[:-1] == first.name[:-1] and d != first)
    before, files = said(), {n: (first / n).read_bytes() for n in ("model.safetensors", "model.json")}
    for name in files:
        files.write(first / name, (other / name).read_bytes())
    after = said()
    for name, content in files.items():
        files.write(first / name, content)
    assert not torch.equal(before, after) and torch.equal(before, said())


def test_students_of_one_task_each_see_their_own_windows(tiny):
    models, tasks, _, train, *_ = study.setup("tests", 0, 2, tiny.work_dir)
    for i, t in enumerate(tasks):
        one, rows = (
            study.alone(i, train, tasks),
            slice(int(train.offset[i]), int(train.offset[i] + train.size[i])),
        )
        a = one.gather(torch.zeros(len(one.table), dtype=torch.long), torch.arange(len(one.table)))
        b = train.gather(torch.full((len(one.table),), i), torch.arange(rows.start, rows.stop))
        m = a.mask[..., None]
        assert (
            torch.equal(a.mask, b.mask)
            and torch.equal(a.states * m, b.states[..., : t.obs_dim] * m)
            and torch.equal(a.rtg * a.mask, b.rtg * b.mask)
        )
        assert torch.equal(a.targets * m, b.targets[..., : t.act_dim] * m) and torch.equal(
            a.actions * m, b.actions[..., : t.act_dim] * m
        )


def test_a_learning_rate_is_chosen_by_the_worst_teachers_last_kl_on_the_tuning_seeds_alone():
    def row(budget, lr, *kl):
        return {
            "case": "alone",
            "variant": "all",
            "budget": budget,
            "lr": lr,
            "kl": np.array([[9.0, 9.0], kl]),
        }

    rows = [
        row("tune", 4e-3, 0.1, 0.5),
        row("tune", 8e-3, 0.3, 0.4),
        row("tune", 16e-3, 0.01, 0.6),
        row("updates", 32e-3, 0.0, 0.0),
        row("tune", 32e-3, math.nan, 0.1),
    ]
    assert study.tuned(rows, "alone", "all")[0] == 8e-3
    assert study.tuning_table(rows).splitlines()[2] == "| all | 0.500, **0.400**, 0.600, inf |"
    assert set(study.rates(rows, "alone", "all")) == set(study.LRS) == set(study.rates([], "alone", "all"))
    rows[0]["kl"][-1] = (
        0.2  # now the lowest rate does best: half of it is tried, and again if that does better, and not if it is worse
    )
    assert set(study.rates(rows, "alone", "all")) == {2e-3, *study.LRS}
    rows.append(row("tune", 2e-3, 0.1, 0.1))
    assert set(study.rates(rows, "alone", "all")) == {1e-3, 2e-3, *study.LRS}
    rows[-1]["kl"][-1] = 0.3
    assert set(study.rates(rows, "alone", "all")) == {2e-3, *study.LRS}
    assert study.tuning_table(rows).splitlines()[2] == "| all | 0.300 (2), **0.200**, 0.400, 0.600, inf |"


def test_how_soon_a_kl_is_reached():
    r = {
        "kl": np.array([[8.0, 1.0], [1.0, 4.0], [1.0, 1.0], [2.0, 0.1]]),
        "steps_at": np.array([0, 10, 20, 30]),
        "steps": 30,
    }
    assert study.reached(r, 2.0) == pytest.approx(0.5) and study.reached(r, 1.0) == pytest.approx(2 / 3)
    assert study.reached(r, 9.0) == 0 and study.reached(r, 0.5) == math.inf


def test_equal_time_takes_what_a_variant_costs_off_its_updates(tiny):
    cfg = study.dataclasses.replace(
        tiny, budgets=("updates", "time"), only=("fixed", "novelty, pcgrad", "all"), seeds=1, steps=100
    )
    rows = [{"case": "tests", "variant": v, "budget": b, "lr": 8e-3, "ms": ms, "kl": np.ones((2, 2))}
            for v, ms in (("fixed", 10.0), ("novelty, pcgrad", 25.0), ("all", 10.5)) for b in ("tune", "cost")]  # fmt: skip
    assert [(s["variant"], s["budget"], s["steps"]) for s in study.plan(cfg, rows, 3)] == [
        ("novelty, pcgrad", "time", 40)
    ]
    assert [s["budget"] for s in study.plan(cfg, rows, 2)] == ["updates"] * 3 + ["cost"] * 15
    assert [s["variant"] for s in study.plan(cfg, rows, 2)][3:9] == [
        "fixed",
        "novelty, pcgrad",
        "all",
    ] * 2  # in turns


def test_a_run_that_is_lost_to_nan_counts_as_the_worst_there_is(tiny):
    spec = {
        "case": "tests",
        "variant": "all",
        "budget": "tune",
        "seed": 0,
        "lr": 1e30,
        "steps": 20,
        "times": 1.0,
        "weights": [],
    }
    spec |= {"teachers": 2, "work_dir": tiny.work_dir}
    study.prepare()
    study.add(tiny.out, study.one_run(spec))
    assert study.worst(study.read(tiny.out)[0]) > 1e3


def test_the_same_is_measured_whatever_a_student_is_trained_by(tiny):
    spec = {
        "case": "tests",
        "budget": "tune",
        "seed": 0,
        "lr": 1e-3,
        "steps": 10,
        "times": 1.0,
        "weights": [],
        "teachers": 2,
        "work_dir": tiny.work_dir,
    }
    study.prepare()
    for v in ("novelty p=2", "novelty, reverse", "mse", "data"):
        study.add(tiny.out, study.one_run({**spec, "variant": v}))
    before, after = zip(*([str(r["kl"][i]) for i in (0, -1)] for r in study.read(tiny.out)), strict=True)
    assert len(set(before)) == 1 and len(set(after)) == 4


def test_what_students_keep_is_counted_by_task_and_by_compression(tmp_path):
    def runs(kept):  # by seed and task
        return [
            {
                "teacher_scores": np.array([100.0, 50.0]),
                "retention": np.array(k),
                "seed": i,
                "kl": np.array([[1, k[0] + k[1]]]),
            }
            for i, k in enumerate(kept)
        ]

    surgery, all_alike = study.BESIDE["with surgery"], study.BESIDE["without curriculum"]
    by_variant = {
        study.DEFAULT: runs([(0.9, 1.1)] * 4),
        surgery: runs([(0.8, 1.0)] * 4),
        all_alike: runs([(0.0, 1.0), (0.7, 1.0), (0.9, 1.0), (9.0, 1.0)]),
    }
    lines = study.score_table("conflict", by_variant).splitlines()
    assert lines[0] == "| task | teacher | student | with surgery | without curriculum |"
    assert (
        lines[2]
        == "| halfcheetah | 100.0 (100.0-100.0) | 90.0 (90.0-90.0) | 80.0 (80.0-80.0) | 80.0 (0.0-900.0) |"
    )
    assert lines[3].startswith(
        "| halfcheetah-back | 50.0 (50.0-50.0) | 55.0 (55.0-55.0) | 50.0 (50.0-50.0) |"
    )
    assert lines[4] == "| seeds | | 4 | 4 | 4 |"
    assert lines[5].startswith("| retention, mean | | 1.00 (1.00-1.00) | 0.90 (0.90-0.90) |")
    assert lines[6].startswith("| retention, worst task | | 0.90 (0.90-0.90) | 0.80 (0.80-0.80) |")
    others = [
        {**r, "teacher_scores": np.array([99.0, 50.0])} for r in runs([(0.0, 0.0)] * 4)
    ]  # of other teachers
    assert (
        study.score_table("conflict", {**by_variant, surgery: by_variant[surgery] + others}).splitlines()
        == lines
    )
    retention = {5.0: {"conflict": {study.DEFAULT: runs([(1.0, 1.0)] * 3)}}, 15.0: {"conflict": by_variant}}
    lines = study.retention_table(
        {(times, 4000): by_case for times, by_case in retention.items()}
    ).splitlines()
    assert (
        lines[2]
        == f"| conflict | 5 | 4000 | {study.DEFAULT} | 3 | 1.000 (1.000-1.000) | 1.000 (1.000-1.000) |  |  |  |"
    )
    assert lines[4].startswith(
        f"| conflict | 15 | 4000 | {surgery} | 4 | 0.900 (0.900-0.900) | 0.800 (0.800-0.800) |"
    )
    assert lines[4].endswith("| 0.100 (0.100-0.100) | 0.100 (0.100-0.100) | 0.900 (0.900-0.900) |")
    assert lines[5].endswith("| 0.100 (-4.000 to 0.500) | 0.100 (-0.100 to 0.900) | 0.900 (0.500-5.000) |")
    # of 0.5, 0.15, 0.05 and -4; of 0.9, 0.2, 0 and -0.1; of 0.5, 0.85, 0.95 and 5
    study.plot_retention(tmp_path / "retention.png", retention)
    assert (tmp_path / "retention.png").stat().st_size > 10_000


def test_variants_are_compared_on_the_seeds_and_teachers_that_both_have():
    def runs(last, seeds):
        return [
            {"teacher_scores": np.array([100.0]), "seed": i, "kl": np.array([[9.0, 0.0], [x, 0.1]])}
            for x, i in zip(last, seeds, strict=True)
        ]

    by_case = {"builtin": {study.NOVELTY: runs([1.0, 2.0, 4.0, 9.0], range(4)), "all": runs([2.0, 2.0, 2.0, 2.0], range(3, -1, -1))},
               "many": {study.NOVELTY: runs([1.0, 1.0], (0, 1)), "all": runs([4.0, 4.0, 4.0], (1, 2, 0))}}  # fmt: skip
    line = study.same_seeds(by_case, ["all", study.NOVELTY]).splitlines()[2:]
    assert len(line) == 1 and line[0].startswith("| all | 1.50 (")  # the middle two of 0.5, 1, 2 and 4.5
    assert (
        "| 0.25 (0.25-0.25) |" in line[0] and "| 0.69 (" in line[0]
    )  # lower: 1.5 of 4, and both, on average


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cases": ("nowhere",)}, "--cases nowhere: choose from builtin"),
        ({"only": ("x",)}, "--only x: choose from fixed"),
        ({"sizes": (15.0, 0.0)}, "--sizes 0.0: must be at least 1"),
        ({"report": True}, "holds no run"),
    ],
)
def test_mistakes_are_told_in_one_line(tiny, change, said):
    with pytest.raises(UserError, match=said):
        study.main(study.dataclasses.replace(tiny, **change))


def test_the_readmes_study_is_what_the_report_prints(tmp_path, capsys):
    shutil.copy(ROOT / "research/results/study.csv", tmp_path)
    study.report(study.Config(out=str(tmp_path / "study.csv")))
    printed = capsys.readouterr().out.splitlines()
    readme = (ROOT / "README.md").read_text()
    said = readme.split("\n## Use\n")[0] + readme.split("\n## The study\n")[1].split("\n## ")[0]
    rows = [line for line in said.splitlines() if line.startswith("| ") and "|---" not in line]
    assert len(rows) > 20 and all(row in printed for row in rows), [
        row for row in rows if row not in printed
    ][:3]

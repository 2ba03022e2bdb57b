"""research/study.py and study_rows.py: what is planned, what a run is made of, the study in miniature."""

import csv
import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import curriculum
import distill
import surgery
import teacher
from conftest import make_dataset
from research import study, study_report, study_rows
from research.variants import CASES, DEFAULTS
from support import UserError, files

TASKS = ("tests/study-0-v0", "tests/study-1-v0")
TIMING = ("seconds", "ms")


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory):
    """Two tasks, with two teachers for each."""
    home = tmp_path_factory.mktemp("study")
    for i, name in enumerate(TASKS):
        make_dataset(name, [30, 25, 40, 20, 30], obs_dim=3 + i, act_dim=1 + i, seed=i)
        for seed in range(2):
            cfg = teacher.Config(
                dataset=name,
                steps=10,
                n_layer=1,
                n_embd=16,
                batch_size=4,
                eval_episodes=0,
                device="cpu",
                seed=seed,
                out_dir=str(study.teacher_dir(home, "tests", name, seed)),
            )
            teacher.main(cfg)
    return str(home)


@pytest.fixture
def tiny(work_dir, tmp_path, monkeypatch):
    """A configuration of the study that takes seconds."""
    monkeypatch.setitem(CASES, "tests", TASKS)
    for module in (study_rows, study_report):
        monkeypatch.setattr(module, "LRS", (1e-3, 8e-3))
    monkeypatch.setattr(curriculum, "METHODS", dict(curriculum.METHODS))
    monkeypatch.setattr(surgery, "METHODS", dict(surgery.METHODS))
    monkeypatch.setattr(surgery, "EACH", surgery.EACH)
    return study.Config(
        cases=("tests",),
        only=("fixed", "all", "novelty p=2", "all, previous", "weights w=1", "one student per task"),
        without=("upgrad", "cagrad"),
        budgets=("updates", "half"),
        seeds=2,
        teachers=2,
        steps=20,
        compression=1.0,
        jobs=1,
        out=str(tmp_path / "research/results/study.csv"),
        work_dir=work_dir,
    )


def spec(cfg, variant, **changes):
    """A run of 20 updates."""
    fixed = {
        "case": "tests",
        "budget": "tune",
        "seed": 0,
        "lr": 1e-3,
        "steps": 20,
        "times": 1.0,
        "weights": [],
    }
    return {**fixed, "variant": variant, "teachers": 2, "work_dir": cfg.work_dir, **changes}


def made(cfg, *specs):
    """The rows of runs, as they are read back."""
    study.prepare()
    for one in specs:
        study_rows.add(cfg.out, study.one_run(one))
    return study_rows.read(cfg.out)


# ---- the whole study ---------------------------------------------------------------------------------------


def raw_rows(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def without_timing(row):
    return {key: value for key, value in row.items() if key not in TIMING}


@pytest.mark.slow
def test_main__makes_the_missing_runs_and_no_others(tiny, capsys):
    study.main(tiny)
    rows = raw_rows(tiny.out)
    assert sum(row["budget"] != "tune" for row in rows) == 2 * (
        6 + 3
    )  # seeds; all, and three of half the updates
    assert len({study_rows.key(row) for row in rows}) == len(rows)
    for name in {row["variant"] for row in rows}:  # rates beyond the grid, while its highest does best
        tried = [float(r["lr"]) for r in rows if r["variant"] == name and r["budget"] == "tune"]
        assert study_rows.best_rate(study_rows.read(tiny.out), "tests", name) < max(tried)
    printed = capsys.readouterr().out
    assert "| novelty p=2 | 2 |" in printed
    assert "Equal updates" in printed
    assert re.search(r"\| fixed \| \d+ \| 1.00 \| 1.00 \|", printed)  # the others are divided by it
    assert (Path(tiny.out).parent / "study_curricula.png").exists()

    study.main(tiny)
    assert raw_rows(tiny.out) == rows

    *others, lost = rows
    Path(tiny.out).unlink()
    for row in others:
        study_rows.add(tiny.out, row)
    study.main(tiny)
    assert without_timing(raw_rows(tiny.out)[-1]) == without_timing(lost)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cases": ("nowhere",)}, "--cases nowhere: choose from defaults"),
        ({"only": ("x",)}, "--only x: choose from fixed"),
        ({"without": ("x",)}, "--without x: choose from fixed"),
        ({"sizes": (15.0, 0.0)}, "--sizes 0.0: must be at least 1"),
        ({"report": True}, "holds no run"),
    ],
)
def test_main__tells_a_mistake_in_one_line(tiny, change, message):
    with pytest.raises(UserError, match=message):
        study.main(dataclasses.replace(tiny, **change))


def test_main__asks_for_torchjd_before_anything_is_done(tiny, monkeypatch):
    monkeypatch.setattr(study.variants, "has_torchjd", lambda: False)
    cfg = dataclasses.replace(tiny, only=("all", "upgrad"), without=())
    with pytest.raises(UserError, match="pip install 'torchjd.*or --without upgrad cagrad"):
        study.main(cfg)
    study.Config(report=True).check()


# ---- one run -----------------------------------------------------------------------------------------------


def test_setup__draws_the_teachers_by_seed(tiny):
    drawn = set()
    for seed in range(12):
        models = study.setup("tests", seed, 2, tiny.work_dir).models
        drawn.add(tuple(model.head.weight.sum().item() for model in models))
    assert len(drawn) == 4
    study.setup.cache_clear()
    first = study.setup("tests", 3, 2, tiny.work_dir).windows.table
    study.setup.cache_clear()
    assert torch.equal(first, study.setup("tests", 3, 2, tiny.work_dir).windows.table)


def test_setup__asks_a_teacher_again_that_was_trained_anew(tiny):
    def table():
        study.setup.cache_clear()
        return study.setup("tests", 0, 2, tiny.work_dir).windows.table.clone()

    drawn = int(np.random.default_rng(0).integers(2))
    directory = study.teacher_dir(tiny.work_dir, "tests", TASKS[0], drawn)
    other = study.teacher_dir(tiny.work_dir, "tests", TASKS[0], 1 - drawn)
    names = ("model.safetensors", "model.json")
    kept = {name: (directory / name).read_bytes() for name in names}
    before = table()
    try:
        for name in names:
            files.write(directory / name, (other / name).read_bytes())
        assert not torch.equal(table(), before)
    finally:
        for name in names:
            files.write(directory / name, kept[name])
    assert torch.equal(table(), before)


def test_of_one_task__has_the_tasks_own_windows(tiny):
    s = study.setup("tests", 0, 2, tiny.work_dir)
    for i, task in enumerate(s.tasks):
        own = study.of_one_task(s, i)
        n = len(own.windows.table)
        a = own.windows.gather(torch.zeros(n, dtype=torch.long), torch.arange(n))
        b = s.windows.gather(torch.full((n,), i), torch.arange(n) + s.windows.offset[i])
        mask = a.mask[..., None]
        assert torch.equal(a.mask, b.mask)
        assert torch.equal(a.rtg * a.mask, b.rtg * b.mask)
        assert torch.equal(a.states * mask, b.states[..., : task.obs_dim] * mask)
        assert torch.equal(a.actions * mask, b.actions[..., : task.act_dim] * mask)
        assert torch.equal(a.targets * mask, b.targets[..., : task.act_dim] * mask)
        assert (own.held_out.task == 0).all()
        assert len(own.held_out.task) == (s.held_out.task == i).sum()


def test_width__is_the_closest_to_the_number_of_parameters(tiny):
    s = study.setup("tests", 0, 2, tiny.work_dir)
    sizes = {}
    for n_embd in (8, 16, 24, 32):
        model = study.dt.DecisionTransformer(study.model_config(s.tasks, n_embd, s.windows.K))
        sizes[n_embd] = model.n_params
    assert study.width(s.tasks, s.windows.K, sizes[16] + 1) == 16
    assert study.width(s.tasks, s.windows.K, 0.9 * sizes[24] + 0.1 * sizes[32]) == 24


def test_one_run__measures_the_same_whatever_a_student_is_trained_by(tiny):
    names = ("novelty p=2", "novelty, reverse", "mse", "data")
    rows = made(tiny, *(spec(tiny, name, steps=10) for name in names))
    first = {str(row["kl"][0]) for row in rows}
    last = {str(row["kl"][-1]) for row in rows}
    assert len(first) == 1
    assert len(last) == 4


def test_one_run__gives_the_same_row_again(tiny):
    """The study's own methods keep state, which a run before must not change."""
    study.prepare()
    for name in ("relative novelty", "novelty, switch", "novelty, Adam's metric"):
        first = study.one_run(spec(tiny, name, steps=10))
        again = study.one_run(spec(tiny, name, steps=10))
        assert without_timing(first) == without_timing(again), name


def test_one_run__of_a_student_per_task_puts_their_kls_side_by_side(tiny):
    (row,) = made(tiny, spec(tiny, "one student per task"))
    assert row["kl"].shape == (study.POINTS + 1, len(TASKS))
    assert (row["kl"][-1] < row["kl"][0]).all()
    assert row["steps_at"].tolist() == list(range(0, 21, 2))


def test_one_run__that_is_lost_to_nan_counts_as_the_worst(tiny):
    (row,) = made(tiny, spec(tiny, "all", lr=1e30))
    assert study_rows.final_kl(row) > 1e3


def test_distil__makes_no_update_after_a_kl_is_nan(tiny, monkeypatch):
    """What is measured afterwards is NaN."""
    calls = []

    def diverge(learner, step):
        calls.append(step)
        if step == 4:
            raise study.distill.Diverged("distance of teacher 0 is NaN")

    monkeypatch.setattr(study.distill.Learner, "step", diverge)
    (row,) = made(tiny, spec(tiny, "all"))
    assert calls == [0, 1, 2, 3, 4]
    assert np.isfinite(row["kl"][:3]).all()
    assert np.isnan(row["kl"][3:]).all()
    assert study_rows.final_kl(row) == math.inf


# ---- the plan ----------------------------------------------------------------------------------------------


def test_plan__takes_what_a_variant_costs_off_its_updates_in_equal_time(tiny):
    names = ("fixed", "novelty, pcgrad", "all")
    cfg = dataclasses.replace(tiny, budgets=("updates", "time"), only=names, seeds=1, steps=100)
    rows = []
    for name, ms in (("fixed", 10.0), ("novelty, pcgrad", 25.0), ("all", 10.5)):
        for budget in ("tune", "cost"):
            row = {"case": "tests", "variant": name, "budget": budget, "lr": 8e-3, "ms": ms}
            rows.append({**row, "kl": np.ones((2, 2))})
    equal_time = list(study.plan(cfg, rows, "time"))
    assert [(s["variant"], s["budget"], s["steps"]) for s in equal_time] == [("novelty, pcgrad", "time", 40)]
    planned = list(study.plan(cfg, rows, "updates and cost"))
    assert [s["budget"] for s in planned] == ["updates"] * 3 + ["cost"] * 15
    assert [s["variant"] for s in planned][3:9] == [*names, *names]  # in turns
    assert list(study.plan(dataclasses.replace(cfg, budgets=("updates",)), rows, "time")) == []


def test_plan__tunes_round_robin_and_equal_shares_first(tiny):
    cfg = dataclasses.replace(tiny, only=("weights w=1", "mse"))
    first = list(study.plan(cfg, [], "tune"))
    assert list(dict.fromkeys(s["variant"] for s in first)) == ["fixed", "all", "mse"]
    assert {s["lr"] for s in first} == set(study_rows.LRS)
    assert {s["seed"] for s in first} == {100}
    rows = [{**s, "kl": np.array([[9.0, 9.0], [1.0, 3.0]])} for s in first]
    second = list(study.plan(cfg, rows, "tune with weights"))
    assert {s["variant"] for s in second} == {"weights w=1"}
    assert all(s["weights"] == [0.25, 0.75] for s in second)


def test_plan__evaluates_the_default_in_every_size_on_the_built_in_tasks():
    names = ("fixed", "novelty p=2, top", "data, top", "dro")
    cfg = study.Config(cases=("builtin", "many"), only=names, budgets=("acting", "half"), seeds=1)
    planned = list(study.plan(cfg, [], "updates and cost"))
    acting = [(s["case"], s["variant"], s["times"]) for s in planned if s["budget"] == "acting"]
    assert acting[:7] == [
        ("builtin", "fixed", 15.0),
        *(("builtin", "novelty p=2, top", times) for times in cfg.sizes),
        *(("builtin", "data, top", times) for times in cfg.sizes),
    ]
    assert {times for case, _, times in acting if case == "many"} == {15.0}
    assert {s["steps"] for s in planned if s["budget"] == "acting"} == {4000}
    assert [(s["variant"], s["steps"]) for s in planned if s["budget"] == "half"] == [("fixed", 350)] * 2


def test_plan__evaluates_todays_defaults_with_no_rate_tuned():
    names = ("fixed", "novelty p=2, top", "data, top")
    cfg = study.Config(cases=(DEFAULTS,), only=names, seeds=2)
    assert not any(list(study.plan(cfg, [], stage)) for stage in ("tune", "tune with weights", "time"))
    planned = list(study.plan(cfg, [], "updates and cost"))
    assert {(s["budget"], s["steps"], s["lr"]) for s in planned} == {
        ("acting", distill.Config.steps, distill.Config.lr)
    }
    assert [s["variant"] for s in planned] == [*names[1:], *names[1:]]
    today = study.options_of(planned[0])
    assert not today.keys() & {"optimizer", "tokens"}
    before = study.options_of({**planned[0], "case": "builtin"})
    assert (before["optimizer"], before["tokens"]) == ("adamw", 3)


# ---- rows --------------------------------------------------------------------------------------------------


def tuning_row(lr, *kl, budget="tune"):
    return {"case": "alone", "variant": "all", "budget": budget, "lr": lr, "kl": np.array([[9.0, 9.0], kl])}


def test_best_rate__is_of_the_lowest_final_worst_kl_on_the_tuning_seeds():
    rows = [
        tuning_row(4e-3, 0.1, 0.5),
        tuning_row(8e-3, 0.3, 0.4),
        tuning_row(16e-3, 0.01, 0.6),
        tuning_row(32e-3, 0.0, 0.0, budget="updates"),
        tuning_row(32e-3, math.nan, 0.1),
    ]
    assert study_rows.best_rate(rows, "alone", "all") == 8e-3
    assert study_rows.best_rate([], "alone", "all") == study_rows.LRS[0]


def test_rates__go_on_where_an_end_does_best():
    rows = [tuning_row(lr, 0.1, kl) for lr, kl in zip(study_rows.LRS, (0.5, 0.4, 0.6, 0.7), strict=True)]
    grid = set(study_rows.LRS)
    assert set(study_rows.rates([], "alone", "all")) == grid
    assert set(study_rows.rates(rows[:3], "alone", "all")) == grid
    assert set(study_rows.rates(rows, "alone", "all")) == grid
    rows[0]["kl"][-1] = (
        0.2  # now the lowest rate does best: half of it is tried, and again if that does better
    )
    assert set(study_rows.rates(rows, "alone", "all")) == {2e-3, *grid}
    rows.append(tuning_row(2e-3, 0.1, 0.1))
    assert set(study_rows.rates(rows, "alone", "all")) == {1e-3, 2e-3, *grid}
    rows[-1]["kl"][-1] = 0.3
    assert set(study_rows.rates(rows, "alone", "all")) == {2e-3, *grid}
    rows[3]["kl"][-1] = 0.01  # and the highest
    assert set(study_rows.rates(rows, "alone", "all")) == {2e-3, 64e-3, *grid}


def test_fixed_weights__are_the_final_kls_of_equal_shares_to_a_power():
    rows = [tuning_row(4e-3, 0.2, 0.6), tuning_row(8e-3, 0.2, 0.9)]
    assert study_rows.fixed_weights(rows, "alone", "weights w=1") == pytest.approx([0.25, 0.75])
    assert study_rows.fixed_weights(rows, "alone", "weights w=2") == pytest.approx([0.1, 0.9])
    assert study_rows.fixed_weights(rows, "alone", "all") == []


def test_reached__is_the_share_of_updates_until_a_kl():
    kl = np.array([[8.0, 1.0], [1.0, 4.0], [1.0, 1.0], [2.0, 0.1]])
    row = {"kl": kl, "steps_at": np.array([0, 10, 20, 30]), "steps": 30}
    assert study_rows.reached(row, 2.0) == pytest.approx(0.5)
    assert study_rows.reached(row, 1.0) == pytest.approx(2 / 3)
    assert study_rows.reached(row, 9.0) == 0
    assert study_rows.reached(row, 0.5) == math.inf


def test_paired__compares_runs_of_the_same_seed_and_teachers():
    def rows(*kls, seeds, scores=(100.0,)):
        found = []
        for kl, seed in zip(kls, seeds, strict=True):
            found.append({"seed": seed, "teacher_scores": np.array(scores), "kl": np.array([[9.0], [kl]])})
        return found

    a = rows(1.0, 2.0, 4.0, seeds=(0, 1, 2))
    b = rows(2.0, 8.0, 8.0, seeds=(1, 0, 7))
    assert study_rows.kl_ratios(a, b).tolist() == [1 / 8, 1.0]
    assert len(study_rows.kl_ratios(a, rows(1.0, seeds=(0,), scores=(99.0,)))) == 0


def test_rounded__keeps_four_digits_of_floats():
    assert study.rounded([0.123456, 1, [12345.6, math.nan]]) == "[0.1235, 1, [12350.0, NaN]]"
    assert json.loads(study.rounded([None])) == [None]

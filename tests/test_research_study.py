"""research/study.py: rows of tiny students, each made once; teachers by seed, rates, fixed shares."""

import csv
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import curriculum
import data
import distill
import surgery
from conftest import make_dataset
from research import learners, study, study_rows, variants
from support import UserError


@pytest.fixture
def rows(tiny_case, tmp_path, monkeypatch):
    """A function that runs the script on two tiny tasks; all rows so far, by run and seed."""
    tiny_case(2)
    monkeypatch.setattr(study, "ROWS", tmp_path / "study.csv")
    monkeypatch.setattr(curriculum, "METHODS", dict(curriculum.METHODS))
    monkeypatch.setattr(surgery, "METHODS", dict(surgery.METHODS))
    monkeypatch.setattr(surgery, "EACH", surgery.EACH)

    def run(**options):
        study.main(study.Config(**{"steps": 60, "seeds": (0,), "teachers": 1, "lr": 1e-2, **options}))
        with open(tmp_path / "study.csv") as f:
            return {(row["run"], int(row["seed"]), row["planted"]): row for row in csv.DictReader(f)}

    return run


# ---- rows --------------------------------------------------------------------------------------------------


def test_main__adds_a_row_a_student_and_makes_none_twice(rows, tmp_path):
    made = rows(runs=("equal", "random", "weights", "dro 0.03", "integral", "round-robin", "previous"))
    kinds = [("equal", 0), ("random", 0), ("equal", 100), ("weights", 0), ("dro 0.03", 0), ("integral", 0)]
    assert [key[:2] for key in made] == [*kinds, ("round-robin", 0), ("previous", 0)]
    for row in made.values():
        kl = np.array(json.loads(row["kl"]))
        assert kl.shape == (10, 2)
        assert (kl[-1] < kl[0]).all()
        assert abs(sum(json.loads(row["shares"])) - 1) < 1e-3
        assert (float(row["projected"]) > 0) == (row["run"] == "previous")
        low, median, high = json.loads(row["cosine"])
        assert low < median < high
    assert json.loads(made["equal", 0, "-1"]["shares"]) == [0.5, 0.5]
    first, second = json.loads(made["random", 0, "-1"]["shares"])
    assert abs(first / second - np.exp(0.7 * np.subtract(*np.random.default_rng(0).normal(size=2)))) < 0.05
    before = (tmp_path / "study.csv").read_bytes()
    rows(runs=("equal", "integral"))
    assert (tmp_path / "study.csv").read_bytes() == before


@pytest.mark.slow
def test_main__makes_every_run(rows):
    made = rows()
    wanted = set(variants.RUNS) - set(variants.UNTUNED)
    if not variants.has_torchjd():
        wanted -= set(variants.NEED_TORCHJD)
    assert {run for run, seed, _ in made if seed == 0} == wanted
    final = {run: json.loads(row["kl"])[-1] for (run, seed, _), row in made.items() if seed == 0}
    assert len(set(map(str, final.values()))) == len(final)  # no two are the same student


def test_main__draws_the_teachers_by_the_seed(rows):
    made = rows(runs=("equal",), teachers=2, seeds=(0, 1, 2))
    weights = {
        path.parent.name: path.read_bytes() for path in Path("out").glob("teacher-*/model.safetensors")
    }
    assert set(weights) == {f"teacher-tests-tiny-{i}-2-v0{k}" for i in range(2) for k in ("", "-1")}
    assert len(set(weights.values())) == 4
    own = rows(runs=("equal",), teachers=1)  # of teacher 0, too
    kls = {seed: json.loads(row["kl"]) for (_, seed, _), row in made.items()}
    assert kls[0] == json.loads(own["equal", 0, "-1"]["kl"])
    by_seed = [
        study.student(study.Case(study.Config(steps=60), k), curriculum="all", seed=1, lr=1e-2).kl
        for k in (0, 1)
    ]
    assert np.allclose(kls[1], by_seed[1], atol=1e-5)
    assert not np.allclose(kls[1], by_seed[0], atol=1e-3)


def test_main__gives_weights_the_first_run_of_the_same_teachers(rows):
    made = rows(runs=("weights",), teachers=2, seeds=(1,))
    assert [key[:2] for key in made] == [("equal", 101), ("weights", 1)]
    c = np.array(json.loads(made["equal", 101, "-1"]["kl"])[-1])
    wanted = c ** (1 / curriculum.LAW)
    assert np.allclose(json.loads(made["weights", 1, "-1"]["shares"]), wanted / wanted.sum(), atol=0.02)


def test_main__gives_weights_by_exponents_the_students_of_each_task_alone(rows):
    rows(runs=("weights, alone",), teachers=2, seeds=(3,))
    keys = [(row["run"], row["seed"], row["tasks"]) for row in study_rows.read(study.ROWS)]
    assert keys == [
        ("equal", "101", ""),
        ("equal", "1", "0"),
        ("equal", "1", "1"),
        ("weights, alone", "3", ""),
    ]


def test_weights__make_all_kls_equal_by_the_law(rows):
    rows(runs=("equal",))
    key = {"case": "builtin", "tasks": "", "teachers": 2, "seed": 3}
    for seed, tasks, kl in ((101, "", [0.1, 0.2]), (1, 0, [0.05]), (1, 1, [0.15])):
        of_row = {
            **key,
            "run": "equal",
            "seed": seed,
            "tasks": tasks,
            "kl": json.dumps([[9.0] * len(kl), kl]),
        }
        row = study_rows.read(study.ROWS)[0]
        study_rows.add(study.ROWS, row | of_row)
    for run, alone in (("weights", None), ("weights, alone", [0.05, 0.15])):
        shares = np.array(study.weights(run, key, 2))
        c = np.array([0.1, 0.2])
        a = np.log(c / alone) / np.log(2) if alone else curriculum.LAW
        predicted = c * (2 * shares) ** -a
        assert shares.sum() == pytest.approx(1)
        assert predicted[0] == pytest.approx(predicted[1], rel=1e-4)


def test_main__makes_students_of_some_tasks(rows):
    made = rows(runs=("equal",), tasks=(1,))
    row = made["equal", 0, "-1"]
    assert row["tasks"] == "1"
    assert np.array(json.loads(row["kl"])).shape == (10, 1)


def test_main__plants_a_task_that_nobody_can_learn(rows):
    made = rows(runs=("equal", "integral"), planted=1)
    made |= rows(runs=("equal",))
    for run in ("equal", "integral"):
        learnt, planted = json.loads(made[run, 0, "1"]["kl"])[-1]
        assert planted > 2 * json.loads(made["equal", 0, "-1"]["kl"])[-1][1]
        assert learnt < planted


def test_main__keeps_the_row_of_a_run_that_was_lost(rows, monkeypatch):
    step = distill.Learner.step

    def diverge(self, i):
        step(self, i)
        if i == 30:
            raise distill.Diverged("lost")

    monkeypatch.setattr(distill.Learner, "step", diverge)
    kl = np.array(json.loads(rows(runs=("equal",))["equal", 0, "-1"]["kl"]))
    assert np.isfinite(kl[:5]).all()
    assert np.isnan(kl[5:]).all()


def test_separate__has_a_student_for_each_task_of_the_same_size_together(rows, monkeypatch):
    sizes = []
    student = study.student

    def spied(case, **options):
        sizes.append((len(case.tasks), options["n_embd"], options["batch_size"]))
        return student(case, **options)

    monkeypatch.setattr(study, "student", spied)
    row = rows(runs=("separate",))["separate", 0, "-1"]
    assert [(n, batch) for n, _, batch in sizes] == [(1, 8), (1, 8)]
    assert all(n_embd < 8 for _, n_embd, _ in sizes)
    assert np.array(json.loads(row["kl"])).shape == (10, 2)


def test_student__learns_from_what_its_options_say(rows):
    """`labels` and `data` draw no window that asks; uniform windows draw none for its return."""
    rows(runs=("equal",))
    case = study.Case(study.Config(steps=60))
    for options, asking, top in (
        ({}, 0.5, True), ({"ask": 0.0}, 0.0, True), ({"loss": "nll"}, 0.0, True), ({"top": 1.0}, 0.5, False)
    ):  # fmt: skip
        study.student(case, **options, steps=6, log_interval=6)
        assert case.windows.asking == asking
        assert (case.windows.top < 1).all() == top


def test_apart__finds_the_gradients_that_the_method_finds(rows, monkeypatch):
    rows(runs=("equal",))
    case = study.Case(study.Config(steps=60))
    cfg = dataclasses.replace(case.cfg, curriculum="all", surgery="pcgrad", seed=0, dtype="float32")
    found = []
    for many in (1, 2):
        monkeypatch.setattr(learners, "MANY", many)
        student, generator = distill.make_student(cfg, case.tasks, case.models)
        learner = learners.of(cfg, 2, case.steering)(cfg, student, case.models, case.windows, generator)
        assert isinstance(learner, learners.Apart) == (many < len(case.tasks))
        batch = case.windows.sample(16, torch.tensor([0.8, 0.2]), torch.Generator().manual_seed(0))
        found.append(learner.gradient(learner.losses(batch, batch.targets)))
    assert found[0].shape == (2, student.n_params)
    assert torch.allclose(*found, rtol=1e-4, atol=1e-6)


def test_case__measures_the_same_number_of_windows_in_all_however_many_tasks(rows, monkeypatch):
    rows(runs=("equal",))
    whole = study.Case(study.Config(steps=60))
    monkeypatch.setattr(study, "MANY", 1)
    thinned = study.Case(study.Config(steps=60))
    assert torch.equal(thinned.held_out.rows, whole.held_out.rows[::2])
    assert torch.equal(thinned.held_out_targets, whole.held_out_targets[:, ::2])
    assert set(thinned.held_out.task.tolist()) == {0, 1}


# ---- the command line --------------------------------------------------------------------------------------


def test_main__refuses_what_cannot_be(rows, monkeypatch):
    with pytest.raises(UserError, match="--tune --case opposed: rates are tuned on the built-in tasks alone"):
        study.main(study.Config(tune=True, case="opposed"))
    with pytest.raises(UserError, match="--teachers 0"):
        study.main(study.Config(teachers=0))
    monkeypatch.setattr(variants, "has_torchjd", lambda: False)
    with pytest.raises(UserError, match="cagrad, upgrad: needs pip install 'torchjd"):
        study.main(study.Config(runs=("upgrad", "equal", "cagrad")))
    assert "upgrad" not in study.wanted(study.Config())


def test_wanted__is_all_on_the_built_in_tasks_and_the_core_elsewhere():
    assert set(study.wanted(study.Config())) >= {"equal", "default", "mse", "data", "separate", "pcgrad"}
    assert "random" not in study.wanted(study.Config())
    assert study.wanted(study.Config(case="nine")) == list(variants.CORE)
    assert study.wanted(study.Config(runs=("random",))) == ["random"]


# ---- learning rates ----------------------------------------------------------------------------------------


def tuned(lr, kl, run="equal", **more):
    row = {"case": "builtin", "tasks": "", "planted": -1, "teachers": 5, "run": run, "seed": 100, "lr": lr}
    study_rows.add(study.ROWS, {**row, "kl": json.dumps([[9.0, 9.0], [kl, 0.1]]), **more})


def test_rates__go_on_beyond_the_end_that_did_best(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "ROWS", tmp_path / "study.csv")
    assert study.rates("equal") == list(study.RATES)
    assert study.best_rate("equal") == distill.Config.lr
    for lr, kl in zip(study.RATES, (0.3, 0.2, 0.4), strict=True):
        assert study.best_rate("equal") == distill.Config.lr  # until all are there
        tuned(lr, kl)
    assert study.rates("equal") == []
    assert study.best_rate("equal") == study.best_rate("weights") == 16e-3
    assert study.best_rate("mse") == distill.Config.lr
    tuned(64e-3, 0.1)
    assert study.rates("equal") == [128e-3]
    tuned(128e-3, math.nan)
    assert study.best_rate("equal") == 64e-3
    assert study.rates("equal") == []
    for lr, kl in zip(study.RATES, (0.3, 0.4, 0.5), strict=True):
        tuned(lr, kl, "mse")
    assert study.rates("mse") == [4e-3]
    tuned(4e-3, 0.9, "mse", planted=0)  # not of the tuning
    assert study.rates("mse") == [4e-3]


def test_tune__makes_students_of_its_own_seed(rows):
    made = []
    one = study.one
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "one", lambda *args: made.append(args[2:]) or one(*args))
        rows(tune=True, runs=("equal", "weights", "random"), teachers=2)
    assert {run for run, *_ in made} == {"equal"}
    assert {seed for _, seed, _ in made} == {study.TUNING_SEED}
    assert {lr for *_, lr in made} >= set(study.RATES)
    assert study.best_rate("equal") not in (max(study.tried("equal")), min(study.tried("equal")))


# ---- windows -----------------------------------------------------------------------------------------------


def test_halves__share_the_held_out_episodes_and_nothing_else():
    make_dataset("tests/halves-v0", list(range(1, 51)))
    dataset = data.load("tests/halves-v0")
    pixels = np.arange(len(dataset.held_out), dtype=np.uint8)[:, None]
    dataset = dataclasses.replace(dataset, held_out_pixels=pixels)
    first, second = study.halves(dataset)
    for half, n in ((first, 3), (second, 2)):
        assert (half.held_out[:, -1] == 0).sum() == n  # whole episodes, of the five
        assert np.array_equal(dataset.held_out[half.held_out_pixels[:, 0]], half.held_out)
        assert np.array_equal(half.train, dataset.train)
    of_both = np.concatenate([first.held_out_pixels, second.held_out_pixels])[:, 0]
    assert sorted(of_both) == list(range(len(dataset.held_out)))


@pytest.mark.parametrize("run", ["validated", "integral"])
def test_steered__follows_kls_on_windows_of_its_own(rows, run):
    """These change once in an interval, and the higher one gets more of the batch."""
    rows(runs=(run,))
    case = study.Case(study.Config(steps=60))
    cfg = dataclasses.replace(case.cfg, curriculum=run, seed=0, log_interval=60)
    student, generator = distill.make_student(cfg, case.tasks, case.models)
    learner = learners.of(cfg, 2, case.steering)(cfg, student, case.models, case.windows, generator)
    for step in range(60):
        learner.step(step)
    share, kl = learner.record[:, 5:9].unflatten(1, (2, 2)).unbind(1)
    interval = learner.probe_interval
    assert interval == math.ceil(case.steering.mask.numel() / (0.05 * 3 * 16 * case.windows.K))
    changes = (kl.diff(dim=0) != 0).any(1).nonzero().flatten() + 1
    assert changes.tolist() == list(range(interval, 60, interval))
    first = kl[0].argmax()
    assert share[:interval, first].mean() > 0.5
    assert torch.isfinite(kl).all()

"""research/shares.py: rows of tiny students, each made once."""

import csv
import dataclasses
import json
import math

import minari
import numpy as np
import pytest

import curriculum
import data
from conftest import make_dataset
from research import shares

NAMES = ("tests/shares-a-v0", "tests/shares-b-v0")


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A function that runs the script on two tiny tasks; all rows so far, by run and seed."""
    if NAMES[0] not in minari.list_local_datasets():
        for i, name in enumerate(NAMES):
            make_dataset(name, [9, 12, 5] * 6, obs_dim=3 + i, act_dim=2, seed=i)
    sizes = {"n_layer": 1, "n_embd": 8, "batch_size": 16, "lr": 1e-2, "warmup": 5, "teacher_steps": 20}
    sizes["eval_episodes"] = 0
    monkeypatch.setitem(shares.CASES, "builtin", {"datasets": NAMES, **sizes})
    monkeypatch.setattr(shares, "ROWS", tmp_path / "shares.csv")
    monkeypatch.setattr(curriculum, "METHODS", dict(curriculum.METHODS))
    monkeypatch.chdir(tmp_path)

    def run(**options):
        shares.main(shares.Config(steps=60, seeds=(0,), **options))
        with open(tmp_path / "shares.csv") as f:
            return {(row["run"], int(row["seed"]), row["planted"]): row for row in csv.DictReader(f)}

    return run


def test_main__adds_a_row_a_student_and_makes_none_twice(rows, tmp_path):
    made = rows(runs=("equal", "random", "law", "dro 0.03", "integral"))
    kinds = [("equal", 100), ("equal", 0), ("random", 0), ("law", 0), ("dro 0.03", 0), ("integral", 0)]
    assert [key[:2] for key in made] == kinds
    for row in made.values():
        kl = np.array(json.loads(row["kl"]))
        assert kl.shape == (10, 2)
        assert (kl[-1] < kl[0]).all()
        assert abs(sum(json.loads(row["shares"])) - 1) < 1e-3
    assert json.loads(made["equal", 0, "-1"]["shares"]) == [0.5, 0.5]
    first, second = json.loads(made["random", 0, "-1"]["shares"])
    assert abs(first / second - np.exp(0.7 * np.subtract(*np.random.default_rng(0).normal(size=2)))) < 0.05
    before = (tmp_path / "shares.csv").read_bytes()
    rows(runs=("equal", "integral"))
    assert (tmp_path / "shares.csv").read_bytes() == before


def test_main__follows_the_law_from_another_seed(rows):
    made = rows(runs=("law",))
    c = np.array(json.loads(made["equal", 100, "-1"]["kl"])[-1])
    wanted = c ** (1 / curriculum.LAW)
    assert np.allclose(json.loads(made["law", 0, "-1"]["shares"]), wanted / wanted.sum(), atol=0.02)


def test_main__plants_a_task_that_nobody_can_learn(rows):
    made = rows(runs=("equal", "integral"), planted=1)
    made |= rows(runs=("equal",))
    for run in ("equal", "integral"):
        learnt, planted = json.loads(made[run, 0, "1"]["kl"])[-1]
        assert planted > 2 * json.loads(made["equal", 0, "-1"]["kl"])[-1][1]
        assert learnt < planted


def test_halves__share_the_held_out_episodes_and_nothing_else():
    make_dataset("tests/halves-v0", list(range(1, 51)))
    dataset = data.load("tests/halves-v0")
    pixels = np.arange(len(dataset.held_out), dtype=np.uint8)[:, None]
    dataset = dataclasses.replace(dataset, held_out_pixels=pixels)
    first, second = shares.halves(dataset)
    for half, n in ((first, 3), (second, 2)):
        assert (half.held_out[:, -1] == 0).sum() == n  # whole episodes, of the five
        assert np.array_equal(dataset.held_out[half.held_out_pixels[:, 0]], half.held_out)
        assert np.array_equal(half.train, dataset.train)
    rows = np.concatenate([first.held_out_pixels, second.held_out_pixels])[:, 0]
    assert sorted(rows) == list(range(len(dataset.held_out)))


def test_integral__is_steered_by_windows_of_its_own(rows):
    """Its KLs change once in an interval, and the higher one gets more of the batch."""
    rows(runs=("equal",))
    case = shares.Case(shares.Config(case="builtin", steps=60))
    curriculum.METHODS["integral"] = shares.variants.integral
    cfg = dataclasses.replace(case.cfg, curriculum="integral", seed=0, log_interval=60)
    student, generator = shares.distill.make_student(cfg, case.tasks, case.models)
    learner = shares.Integral(case, cfg, student, case.models, case.windows, generator)
    for step in range(60):
        learner.step(step)
    share, kl = learner.record[:, 5:9].unflatten(1, (2, 2)).unbind(1)
    interval = learner.probe_interval
    assert interval == math.ceil(case.steering.mask.numel() / (0.05 * 3 * 16 * case.windows.K))
    changes = (kl.diff(dim=0) != 0).any(1).nonzero().flatten() + 1
    assert changes.tolist() == list(range(interval, 60, interval))
    first = kl[0].argmax()
    assert share[:interval, first].mean() > 0.5

"""What students of little data are given, and the rows that they leave."""

import math
import types

import minari
import pytest
import torch

import data
import distill
from conftest import make_dataset
from research import little_data
from research.tables import read_rows


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(little_data, "ROWS", tmp_path / "rows.csv")
    monkeypatch.setattr(little_data, "TUNING", tmp_path / "tuning.csv")
    return tmp_path


@pytest.fixture
def two_tasks(results, monkeypatch):
    """Two tiny datasets in place of the built-in ones; environments are played by counting."""
    names = ("tests/little-a-v0", "tests/little-b-v0")
    for seed, name in enumerate(sorted(set(names) - set(minari.list_local_datasets()))):
        make_dataset(name, [6, 9, 4, 12, 8, 7, 5, 10, 6, 9], seed=seed)
    monkeypatch.setattr(little_data, "TASKS", {"builtin": names})
    monkeypatch.setattr(
        little_data,
        "scores",
        lambda policy, task, episodes, seed: {
            "return_mean": 10.0 + len(task.name) + seed, "return_std": 1.0, "n_episodes": episodes,
            "score": 50.0 if episodes == little_data.TEACHER_EPISODES else 40.0,
        },
    )  # fmt: skip
    monkeypatch.setattr(little_data, "gap", lambda policy, task, seed: 0.125)
    tiny = {"steps": 4, "n_embd": 16}
    monkeypatch.setattr(little_data, "TEACHER_OPTIONS", tiny)
    monkeypatch.setattr(little_data, "STUDENT_OPTIONS", {"steps": 4, "batch_size": 16})
    return names


@pytest.mark.slow
def test_main__adds_a_row_for_each_task_once(two_tasks, results):
    cfg = little_data.Config(
        shares=(0.5,), modes=("data", "labels", "asked", "both", "ensemble"), seeds=(1, 7), n_embd=16,
        work_dir=str(results / "out"),
    )  # fmt: skip
    little_data.main(cfg)
    rows = read_rows(results / "rows.csv")
    little_data.main(cfg)  # nothing is missing
    assert read_rows(results / "rows.csv") == rows
    students = [row for row in rows if row["mode"] not in ("teacher", "clone")]
    assert len(students) == 5 * 2 * 2
    assert {row["task"] for row in students} == set(two_tasks)
    assert {(row["seed"], row["teacher_seed"]) for row in students} == {("1", "1"), ("7", "2")}
    assert {row["retention"] for row in students} == {"0.8"}
    assert {row["episodes"] for row in students} == {"4"}  # half of nine, one being held out
    assert {row["target_gap"] for row in students if row["seed"] == "1"} == {"0.125"}
    assert {row["target_gap"] for row in students if row["seed"] == "7"} == {""}
    assert {row["retention"] for row in rows if row["mode"] == "teacher"} == {"1.0"}
    assert {row["retention"] for row in rows if row["mode"] == "clone"} == {"0.8"}


def test_ensemble__has_the_mean_and_variance_of_its_teachers_mixture():
    """Of two policies that see the same observations in units of their own."""

    def policy(mean, log_std):
        def act(task, states, actions, rtg, timesteps, mask):
            assert torch.allclose(states * 2 + 1, torch.full_like(states, 5.0)) or log_std == -2.0
            assert rtg.mean() in (0.5, 1.0)
            return torch.full_like(actions, mean), torch.full_like(actions, log_std)

        act.cfg = act.n_params = None
        return act

    task = types.SimpleNamespace(obs_mean=[1.0], obs_std=[2.0], rtg_scale=100.0)
    other = types.SimpleNamespace(obs_mean=[0.0], obs_std=[1.0], rtg_scale=50.0)
    both = little_data.Ensemble([policy(0.2, -1.0), policy(-0.4, -2.0)], [task, other])
    x = torch.full((1, 1, 1), 2.0)
    mean, log_std = both(0, x, x, torch.full((1, 1), 0.5), None, None)
    assert mean.item() == pytest.approx(-0.1)
    mixture = (math.exp(-2) + math.exp(-4)) / 2 + 0.3**2  # means lie 0.3 from their mean
    assert log_std.exp().square().item() == pytest.approx(mixture)


@pytest.mark.slow
def test_main__tunes_data_alone_by_held_out_nll(two_tasks, results, monkeypatch):
    monkeypatch.setattr(little_data, "GRID", {"steps": (4, 60), "dropout": (0.0,), "weight_decay": (1e-4,)})
    cfg = little_data.Config(shares=(1.0,), tune=True, work_dir=str(results / "out"))
    little_data.main(cfg)
    rows = read_rows(results / "tuning.csv")
    assert [row["steps"] for row in rows] == ["4", "60"]
    best = min(rows, key=lambda row: float(row["heldout_nll"]))
    expected = {"steps": int(best["steps"]), "dropout": 0.0, "weight_decay": 1e-4}
    assert little_data.tuned("builtin", 1.0) == expected
    assert little_data.tuned("builtin", 0.5) == expected  # the nearest
    little_data.main(cfg)
    assert read_rows(results / "tuning.csv") == rows


def test_worst_half__holds_the_episodes_up_to_the_median_return():
    name = "tests/halved-v0"
    make_dataset(name, [6, 9, 4, 12, 8, 7, 5, 10, 6, 11], seed=3)
    returns = data.load(name).returns
    half = data.load(little_data.worst_half(name)).returns
    assert sorted(half) == pytest.approx(sorted(returns)[:5], rel=1e-5)
    assert little_data.worst_half(name) == little_data.worst_half(name)


@pytest.mark.parametrize("mode", little_data.MODES)
def test_modes__are_possible_settings(mode):
    distill.Config(**little_data.MODES[mode]).check()

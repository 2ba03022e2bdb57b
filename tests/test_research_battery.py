"""research/battery.py, battery_policies.py and battery_runs.py, on a few timesteps."""

import csv
import json
import types

import numpy as np
import pytest
import safetensors.numpy
import torch

import data
from conftest import ROOT
from research import battery, battery_policies, battery_runs, variants
from support import UserError

NAME = "walker2d-medium-expert"


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The dataset NAME of a few hundred steps, an empty file of rows, trainings of three updates."""
    spec = battery.DATASETS[NAME]._replace(steps=200)
    monkeypatch.setitem(battery.DATASETS, NAME, spec)
    monkeypatch.setattr(battery_runs, "RESULTS", tmp_path / "battery.csv")
    monkeypatch.setattr(battery_runs, "EPISODES", 1)
    monkeypatch.setattr(battery_runs, "BC_UPDATES", 3)
    monkeypatch.setattr(battery_runs, "GROUPS", {"A": (NAME,)})
    for name, options in battery_runs.VARIANTS.items():
        if isinstance(options, dict):
            tiny = {**options, "steps": 3, "n_embd": 16, "device": "cpu"}
            monkeypatch.setitem(battery_runs.VARIANTS, name, tiny)
    return battery_runs.Config(datasets=(NAME,), seeds=(0,), work_dir=str(tmp_path / "out"))


def read(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def test_specs__are_twenty_datasets_of_five_bodies_half_of_them_unseen():
    assert len(battery.DATASETS) >= 20
    assert not battery.CHOOSING.keys() & battery.UNSEEN.keys()
    assert len(battery.UNSEEN) >= len(battery.DATASETS) / 2
    assert len({spec.body for spec in battery.DATASETS.values()}) >= 5
    in_groups = [name for names in battery_runs.GROUPS.values() for name in names]
    assert sorted(in_groups) == sorted(battery.UNSEEN)


@pytest.mark.parametrize("name", battery.DATASETS)
def test_specs__name_policies_that_are_there(name):
    spec = battery.DATASETS[name]
    for part in spec.parts:
        if part.algorithm in ("sac", "tqc"):
            stacked = safetensors.numpy.load_file(
                battery_policies.FOLDER / f"{part.algorithm}-{spec.body}.safetensors"
            )
            assert max(part.snapshots) < len(stacked["w0"])
        elif part.algorithm == "ppo":
            assert max(part.snapshots) < len(battery.behaviours("ppo", spec.body, ROOT))
        assert part.noises or part.algorithm == "trpo"


def test_weights__are_an_actor_that_acts_as_the_network_does():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.ReLU()]
    actor = types.SimpleNamespace(latent_pi=torch.nn.Sequential(*layers), mu=torch.nn.Linear(8, 2))
    # through a file, which once mixed up the layouts of transposed arrays
    blob = safetensors.numpy.save(battery_policies.stacked([battery_policies.weights(actor)] * 2))
    loaded = {k: v[1].astype(np.float32) for k, v in safetensors.numpy.load(blob).items()}
    obs = np.random.default_rng(0).standard_normal(5).astype(np.float32)
    expected = actor.mu(actor.latent_pi(torch.from_numpy(obs))).tanh().detach().numpy()
    assert np.allclose(battery_policies.Actor(loaded)(obs), expected, atol=1e-2)


def test_halfcheetahs_best_sac_policy__runs():
    policy = battery.behaviours("sac", "halfcheetah", ROOT)[-1]
    env = battery.make_env("halfcheetah")
    buffer = battery.rollout(env, policy, np.random.default_rng(0), 0)
    assert np.sum(buffer.rewards) > 6000


def test_make_dataset__gives_every_policy_its_steps(small):
    battery.make_dataset(NAME, ROOT)
    d = data.load(battery.dataset_id(NAME))
    assert d.lengths.sum() >= 200
    assert d.task.env_id == "Walker2d-v5"
    battery.make_dataset(NAME, ROOT)  # there already


def test_cloned__imitates_the_best_episodes(small, monkeypatch):
    battery.make_dataset(NAME, ROOT)
    d = data.load(battery.dataset_id(NAME))
    monkeypatch.setattr(battery_runs, "BC_UPDATES", 300)
    policy = battery_runs.Cloned(d, 0.1, seed=0)
    O = d.task.obs_dim
    A = d.task.act_dim
    best = d.train[np.flatnonzero(d.train[:, -1] == 0)[-1] :]
    actions = policy.act(best[:, :O] * d.task.obs_std + d.task.obs_mean, np.zeros(len(best)))
    assert np.square(actions - best[:, O : O + A]).mean() < 0.1 * np.square(best[:, O : O + A]).mean()


def test_main__adds_rows_of_every_variant_once_and_of_students(small):
    battery_runs.main(small)
    rows = read(battery_runs.RESULTS)
    assert {row["variant"] for row in rows} == set(battery_runs.VARIANTS)
    asked = [row["asked"] for row in rows if row["variant"] == "default"]
    assert asked == ["supported", "p95", "median"]
    assert [row["asked"] for row in rows if row["variant"] == "BC"] == ["supported"]
    battery_runs.main(small)
    assert read(battery_runs.RESULTS) == rows
    small.datasets = ()
    small.students = (0,)
    battery_runs.main(small)
    (student,) = read(battery_runs.RESULTS)[len(rows) :]
    assert student["variant"] == "student A"
    (default,) = {row["flags"] for row in rows if row["variant"] == "default"}
    assert "below-target" in default  # after three updates


def test_main__trains_what_was_the_default_before(small, tmp_path):
    small.variants = ("before",)
    battery_runs.main(small)
    config = json.loads((tmp_path / "out" / NAME / "before-0" / "config.json").read_text())
    assert config | variants.LONG_TEACHER == config


@pytest.mark.parametrize("options", [{"datasets": ("hopper-all",)}, {"variants": ("MLP",)}])
def test_main__names_the_choices(options):
    with pytest.raises(UserError, match="choose from hopper-authors"):
        battery_runs.main(battery_runs.Config(**options))


def test_controller__reaches_the_goal():
    pytest.importorskip("gymnasium_robotics", reason="pip install gymnasium-robotics==1.4.2")
    env = battery.make_env("maze-umaze")
    (policy,) = battery.policies(battery.DATASETS["maze-umaze"], ROOT, env)[:1]
    buffer = battery.rollout(env, policy._replace(noise=0.0), np.random.default_rng(0), 0)
    assert buffer.rewards[-1] == 1.0
    assert buffer.terminations[-1]

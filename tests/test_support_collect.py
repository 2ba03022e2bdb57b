"""support/collect.py: the built-in datasets, from the policies in support/behaviours/."""

import shutil

import minari
import numpy as np
import pytest
import safetensors.numpy
from minari.storage.datasets_root_dir import get_dataset_path

import data
from support import collect, environments

BODIES = sorted(name for name in data.ENVS if not name.startswith("mw/"))
SIZES = {  # O, A
    "hopper": (11, 3),
    "halfcheetah": (17, 6),
    "halfcheetah-back": (17, 6),
    "walker2d": (17, 6),
    "ant": (27, 8),
}
LEAST_RETURNS = {"hopper": 3000, "halfcheetah": 5000, "walker2d": 3000, "ant": 3000}  # of the best policies


@pytest.mark.parametrize("env", BODIES)
def test_collect__makes_a_minari_dataset_that_loads_as_the_task(env):
    name = data.dataset_id(env)
    data.collect_if_missing(name, 2000)
    dataset = minari.load_dataset(name)
    assert dataset.total_steps >= 2000
    assert dataset.recover_environment().observation_space.shape == dataset.observation_space.shape
    assert name in minari.list_local_datasets()
    d = data.load(env)
    assert d.task.name == env
    assert d.task.reference == (data.ENVS[env].reference or (d.returns.min(), d.returns.max()))
    assert (d.task.obs_dim, d.task.act_dim) == SIZES[env]
    shutil.rmtree(get_dataset_path(name))


def test_collect__may_find_that_another_process_has_just_made_the_namespace(monkeypatch):
    name = data.dataset_id("hopper")
    data.collect_if_missing(name, 100)
    shutil.rmtree(get_dataset_path(name))
    monkeypatch.setattr(collect, "list_local_namespaces", lambda: [])  # as it was a moment ago
    data.collect_if_missing(name, 100)
    shutil.rmtree(get_dataset_path(name))


@pytest.mark.parametrize("env", BODIES)
def test_behaviours__are_ten_small_policies_in_the_order_of_their_returns(env):
    assert len(collect.load_behaviours(env)) == collect.N_SNAPSHOTS
    returns = safetensors.numpy.load_file(collect.BEHAVIOURS / f"{env}.safetensors")["returns"]
    assert len(returns) == collect.N_SNAPSHOTS
    assert (np.diff(returns) >= 0).all()
    assert sum(f.stat().st_size for f in collect.BEHAVIOURS.iterdir()) < 1_000_000


@pytest.mark.parametrize("env", LEAST_RETURNS)
def test_behaviours__return_what_their_file_says(env):
    stated = safetensors.numpy.load_file(collect.BEHAVIOURS / f"{env}.safetensors")["returns"][-1]
    world = environments.make_env(*data.ENVS[env][:2])
    rng = np.random.default_rng(0)
    worst, *_, best = collect.load_behaviours(env)
    returns = [collect.rollout(world, best, 0.0, rng, seed)["rewards"].sum() for seed in range(3)]
    assert stated >= LEAST_RETURNS[env]
    assert np.mean(returns) > 0.8 * stated
    assert collect.rollout(world, worst, 0.0, rng, 0)["rewards"].sum() < 0.5 * np.mean(returns)

"""support/minari_files.py: what is read is what was written; the cache; what can't be learnt from."""

from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from minari.storage.datasets_root_dir import get_dataset_path

import data
from conftest import make_dataset
from support import UserError, environments, minari_files


def concatenated(episodes, field):
    """A field of all episodes, one after the other."""
    return np.concatenate([episode[field] for episode in episodes])


# ---- reading -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(0, 1000))
def test_returns_to_go__is_the_reversed_cumulative_sum_of_each_episodes_rewards(lengths, seed):
    rewards = np.random.default_rng(seed).normal(size=sum(lengths)).astype(np.float32)
    wanted = []
    for episode in np.split(rewards.astype(np.float64), np.cumsum(lengths)[:-1]):
        wanted.append(np.cumsum(episode[::-1])[::-1])
    got = minari_files.returns_to_go(rewards, np.array(lengths))
    assert np.allclose(got, np.concatenate(wanted), atol=1e-9)


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_read__gives_a_dataset_as_it_was_written(data_format):
    name = f"tests/{data_format}-v0"
    episodes = make_dataset(name, [4, 1, 6], data_format=data_format)
    observations = np.concatenate([e["observations"][:-1] for e in episodes])
    rtg = np.concatenate([np.cumsum(e["rewards"][::-1])[::-1] for e in episodes])
    for _ in range(2):  # the second time from the cache
        arrays, about = minari_files.read(name)
        table = arrays["table"]
        assert arrays["lengths"].tolist() == [4, 1, 6]
        assert np.array_equal(table[:, :3], observations.astype(np.float32))
        assert np.allclose(table[:, 3:5] * 2, concatenated(episodes, "actions"), atol=1e-6)  # of [-2, 2]
        assert np.allclose(table[:, 5], rtg, atol=1e-5)
        assert table[:, 6].tolist() == [0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5]
        assert np.allclose(arrays["returns"], [e["rewards"].sum() for e in episodes], atol=1e-5)
        assert about["env_id"] == "Hopper-v5"
        assert about["max_steps"] == 1000
        assert about["act_high"] == [2.0, 2.0]


def test_read__flattens_boxes_and_bounds_unbounded_actions_by_the_datas_range():
    episodes = make_dataset(
        "tests/shapes-v0",
        [4, 4],
        spec=None,
        observation_space=gym.spaces.Box(-1, 1, (2, 3), np.float32),
        action_space=gym.spaces.Box(-np.inf, np.inf, (2, 2), np.float32),
    )
    d = data.load("tests/shapes-v0")
    assert d.task.obs_dim == 6
    assert d.task.act_dim == 4
    assert d.task.env_id is None
    assert np.allclose(d.task.act_low, concatenated(episodes, "actions").reshape(-1, 4).min(0))
    assert np.abs(d.train[:, 6:10]).max() <= 1 + 1e-5


def test_read__makes_discrete_actions_one_hot_from_the_spaces_first_number_on():
    def edit(i, episode):
        episode["actions"] = episode["actions"] + 5

    space = gym.spaces.Discrete(4, start=5)
    episodes = make_dataset("tests/discrete-v0", [3, 4], spec=None, edit=edit, action_space=space)
    d = data.load("tests/discrete-v0")
    assert d.task.discrete
    assert d.task.act_dim == 4
    assert d.task.first_action == 5
    assert d.saturation == 0.0
    table = minari_files.read("tests/discrete-v0")[0]["table"]
    assert np.array_equal(table[:, 3:7], np.eye(4)[concatenated(episodes, "actions") - 5])


# ---- the cache ---------------------------------------------------------------------------------------------


def test_cache__is_read_until_the_content_changes(monkeypatch):
    make_dataset("tests/cached-v0", [5, 5])
    first, _ = minari_files.read("tests/cached-v0")
    with monkeypatch.context() as patch:
        patch.setattr(
            minari_files, "read_minari", lambda *_: pytest.fail("read again, though nothing changed")
        )
        again, _ = minari_files.read("tests/cached-v0")
    assert all(np.array_equal(again[name], first[name]) for name in first)
    minari.delete_dataset("tests/cached-v0")
    make_dataset("tests/cached-v0", [5, 5], seed=1)
    assert not np.array_equal(minari_files.read("tests/cached-v0")[0]["table"], first["table"])


def test_cache__is_written_anew_where_it_is_damaged():
    make_dataset("tests/damaged-cache-v0", [5, 5])
    first, _ = minari_files.read("tests/damaged-cache-v0")
    (cache,) = minari_files.CACHE.glob("tests--damaged-cache-v0-*")
    cache.write_bytes(cache.read_bytes()[:100])
    assert np.array_equal(minari_files.read("tests/damaged-cache-v0")[0]["table"], first["table"])


def test_cache__costs_time_and_nothing_else_where_it_can_not_be_written(monkeypatch, capsys):
    make_dataset("tests/no-cache-v0", [5, 5])
    monkeypatch.setattr(minari_files, "CACHE", Path("/proc/no/cache"))
    assert minari_files.read("tests/no-cache-v0")[0]["lengths"].tolist() == [5, 5]
    assert "no cache under /proc/no/cache" in capsys.readouterr().out


# ---- what can't be learnt from -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nobody/nothing-v0", "../../etc/passwd-v0", "a b-v0", "x/../y-v0"])
def test_read__gives_one_line_with_the_remedy_for_a_dataset_that_can_not_be_had(name):
    with pytest.raises(UserError, match="dataset .*(can't be downloaded|an id looks like)") as error:
        data.load(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["observations", "actions", "rewards"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_read__names_episode_and_field_of_a_value_that_is_not_finite(field, bad):
    def edit(i, episode):
        if i == 2:
            episode[field][1] = bad

    name = f"tests/bad-{field}-{bad}-v0"
    make_dataset(name, [3, 4, 5, 6], edit=edit)
    with pytest.raises(UserError, match=f"{field} in episode 2"):
        data.load(name)


def test_read__names_an_action_outside_its_space():
    def edit(i, episode):
        episode["actions"][1] += 7 * (i == 2)

    make_dataset("tests/outside-v0", [3, 4, 5], spec=None, edit=edit, action_space=gym.spaces.Discrete(2))
    with pytest.raises(UserError, match=r"past episode 2 \(ValueError: action [78] is not in Discrete\(2\)"):
        data.load("tests/outside-v0")


def test_read__names_an_action_space_that_can_not_be_learnt_from():
    space = gym.spaces.Tuple((gym.spaces.Discrete(2), gym.spaces.Discrete(3)))

    def edit(i, episode):
        L = len(episode["rewards"])
        episode["actions"] = (np.zeros(L, int), np.zeros(L, int))

    make_dataset("tests/tuple-v0", [3, 3], spec=None, edit=edit, action_space=space)
    with pytest.raises(UserError, match="has Tuple actions; only"):
        data.load("tests/tuple-v0")


def test_read__tells_of_a_truncated_file():
    make_dataset("tests/truncated-v0", [30, 30])
    file = get_dataset_path("tests/truncated-v0") / "data" / "main_data.hdf5"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match="tests/truncated-v0 can't be read"):
        data.load("tests/truncated-v0")


def test_make_env__does_not_import_the_code_that_a_dataset_names():
    with pytest.raises(UserError, match="not registered"):
        environments.make_env("os:system-v0", {})

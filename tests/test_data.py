import shutil
import time

import gymnasium as gym
import minari
import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st
from minari.storage.datasets_root_dir import get_dataset_path

import data
from conftest import make_dataset
from research import behaviour
from support import (
    UserError,
    environments,
    minari_files,
)


def windows(lengths=(7, 3, 12, 1, 9), K=5, name="tests/windows-v0"):
    """One small dataset, and windows over all of it."""
    if name not in minari.list_local_datasets():
        make_dataset(name, lengths, spec=None)
    d = data.load(name)
    return d, data.Windows([np.concatenate([d.train, d.held_out])], [d.task], K)


# ---- returns-to-go ---------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(0, 1000))
def test_rtg_is_the_reversed_cumulative_sum_of_its_own_episodes_rewards(lengths, seed):
    r = np.random.default_rng(seed).normal(size=sum(lengths)).astype(np.float32)
    want = np.concatenate(
        [np.cumsum(e[::-1].astype(np.float64))[::-1] for e in np.split(r, np.cumsum(lengths)[:-1])]
    )
    assert np.allclose(minari_files.returns_to_go(r, np.array(lengths)), want, atol=1e-9)


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["hdf5", "arrow"])
def test_a_minari_dataset_comes_out_as_it_went_in(fmt):
    name = f"tests/{fmt}-v0"
    episodes = make_dataset(name, [4, 1, 6], data_format=fmt)
    for _ in range(2):  # the second time from the cache
        arrays, about = minari_files.read(name)
        assert arrays["lengths"].tolist() == [4, 1, 6]
        table = arrays["table"]
        assert np.array_equal(
            table[:, :3], np.concatenate([e["observations"][:-1] for e in episodes]).astype(np.float32)
        )
        assert np.allclose(
            table[:, 3:5] * 2, np.concatenate([e["actions"] for e in episodes]), atol=1e-6
        )  # the space is [-2, 2]
        assert np.allclose(
            table[:, 5], np.concatenate([np.cumsum(e["rewards"][::-1])[::-1] for e in episodes]), atol=1e-5
        )
        assert table[:, 6].tolist() == [0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5]
        assert np.allclose(arrays["returns"], [e["rewards"].sum() for e in episodes], atol=1e-5)
        assert (
            about["env_id"] == "Hopper-v5" and about["max_steps"] == 1000 and about["act_high"] == [2.0, 2.0]
        )


def test_the_cache_is_read_and_follows_the_content(monkeypatch):
    make_dataset("tests/cached-v0", [5, 5])
    first, _ = minari_files.read("tests/cached-v0")
    monkeypatch.setattr(
        minari_files, "read_minari", lambda *a: pytest.fail("read again, though nothing changed")
    )
    assert all(np.array_equal(v, first[k]) for k, v in minari_files.read("tests/cached-v0")[0].items())
    monkeypatch.undo()
    minari.delete_dataset("tests/cached-v0")
    make_dataset("tests/cached-v0", [5, 5], seed=1)
    assert not np.array_equal(minari_files.read("tests/cached-v0")[0]["table"], first["table"])


def test_a_damaged_cache_is_read_anew():
    make_dataset("tests/damaged-cache-v0", [5, 5])
    first, _ = minari_files.read("tests/damaged-cache-v0")
    (cache,) = minari_files.CACHE.glob("tests--damaged-cache-v0-*")
    cache.write_bytes(cache.read_bytes()[:100])
    assert np.array_equal(minari_files.read("tests/damaged-cache-v0")[0]["table"], first["table"])


def test_an_unwritable_cache_costs_time_and_nothing_else(monkeypatch, capsys):
    make_dataset("tests/no-cache-v0", [5, 5])
    monkeypatch.setattr(minari_files, "CACHE", data.Path("/proc/no/cache"))
    assert minari_files.read("tests/no-cache-v0")[0]["lengths"].tolist() == [5, 5]
    assert "no cache under /proc/no/cache" in capsys.readouterr().out


def test_boxes_of_any_shape_are_flattened_and_unbounded_actions_take_the_datas_range():
    name, box = "tests/shapes-v0", gym.spaces.Box
    episodes = make_dataset(
        name,
        [4, 4],
        spec=None,
        observation_space=box(-1, 1, (2, 3), np.float32),
        action_space=box(-np.inf, np.inf, (2, 2), np.float32),
    )
    d = data.load(name)
    lows = np.concatenate([e["actions"].reshape(-1, 4) for e in episodes]).min(0)
    assert (d.task.obs_dim, d.task.act_dim, d.task.env_id) == (6, 4, None) and np.allclose(
        d.task.act_low, lows
    )
    assert np.abs(d.train[:, 6:10]).max() <= 1 + 1e-5


def test_one_step_episodes_work():
    make_dataset("tests/one-step-v0", [1] * 10)
    d = data.load("tests/one-step-v0")
    b = data.Windows([d.train], [d.task], 4).sample(32, torch.ones(1), torch.Generator())
    assert (b.mask.sum(1) == 1).all() and b.mask[:, -1].all()


# ---- the table -------------------------------------------------------------------------------------------------------


def test_a_tenth_of_the_episodes_is_held_out_by_seed_and_statistics_come_from_the_rest():
    make_dataset("tests/split-v0", [5] * 40)
    a, b, c = (data.load("tests/split-v0", seed) for seed in (0, 0, 1))
    assert (
        len(a.held_out) == 20
        and len(a.train) == 180
        and np.array_equal(a.held_out, b.held_out)
        and not np.array_equal(a.held_out, c.held_out)
    )
    O = a.task.obs_dim
    assert np.allclose(a.train[:, :O].mean(0), 0, atol=1e-5) and np.allclose(
        a.train[:, :O].std(0), 1, atol=1e-4
    )
    assert not np.allclose(a.held_out[:, :O].mean(0), 0, atol=1e-3)
    assert np.abs(a.train[:, -2]).max() == pytest.approx(1)
    raw = np.concatenate([a.train, a.held_out])
    raw[:, :O] = raw[:, :O] * a.task.obs_std + a.task.obs_mean
    raw[:, -2] *= a.task.rtg_scale
    everything = minari_files.read("tests/split-v0")[0]["table"]
    assert np.allclose(raw[np.lexsort(raw[:, :2].T)], everything[np.lexsort(everything[:, :2].T)], atol=1e-4)


def test_a_constant_observation_is_not_divided_by_its_zero_deviation():
    def edit(i, e):
        e["observations"][:, 1] = 3.0

    make_dataset("tests/constant-v0", [5] * 10, edit=edit)
    d = data.load("tests/constant-v0")
    assert np.isfinite(d.train).all() and not d.train[:, 1].any()


@given(st.integers(0, 2**31))
def test_a_window_is_a_stretch_of_one_episode_padded_on_the_left(seed):
    d, w = windows()
    b = w.sample(16, torch.ones(1), torch.Generator().manual_seed(seed))
    table = w.table
    for i in range(16):
        n = int(b.mask[i].sum())
        assert b.mask[i].tolist() == [False] * (5 - n) + [True] * n and n == min(
            5, int(b.timesteps[i, -1]) + 1
        )
        rows = b.rows[i, 5 - n :]
        assert (rows.diff() == 1).all() and (b.timesteps[i, 5 - n :].diff() == 1).all()
        assert torch.equal(b.states[i, 5 - n :], table[rows, : w.O]) and torch.equal(
            b.actions[i, 5 - n :], table[rows, w.O : w.O + w.A]
        )
        assert torch.equal(b.rtg[i, 5 - n :], table[rows, -2])


def test_every_timestep_is_as_likely_as_every_other_to_end_a_window():
    d, w = windows()
    n = 40_000
    ends = w.sample(n, torch.ones(1), torch.Generator().manual_seed(0)).rows[:, -1]
    counts = torch.bincount(ends, minlength=len(w.table)) / n * len(w.table)
    assert counts.min() > 0.85 and counts.max() < 1.15


def test_windows_of_episodes_that_returned_more_are_drawn_more_often():
    make_dataset("tests/by-return-v0", [3, 9, 5, 20, 1, 8, 4, 10, 2, 7] * 4)
    d = data.load("tests/by-return-v0")
    starts = np.flatnonzero(d.train[:, -1] == 0)
    returns = d.train[starts, -2]
    assert (np.diff(returns) >= 0).all() and returns[0] < returns[-1]
    w = data.Windows([d.held_out, d.train], [d.task] * 2, 5, top=0.25)
    ends = w.sample(40_000, torch.tensor([0.0, 1.0]), torch.Generator().manual_seed(0)).rows[:, -1] - len(
        d.held_out
    )
    share = np.histogram(ends, np.linspace(0, len(d.train), 5))[0] / len(ends)
    assert np.allclose(share, [0.125, 0.125, 0.125, 0.625], atol=0.02)


@given(st.floats(1e-9, 1), st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(0, 1000))
def test_whatever_is_drawn_is_a_row_of_its_own_task(top, sizes, seed):
    d, _ = windows()
    w = data.Windows([np.tile(d.train, (2, 1))[:n] for n in sizes], [d.task] * len(sizes), 5, top=top)
    task = torch.arange(len(sizes)).repeat_interleave(3)
    u = torch.tensor(
        [0.0, np.nextafter(1.0, 0.0), np.random.default_rng(seed).random()], dtype=torch.float64
    ).repeat(len(sizes))
    end = w.end(task, u)
    assert (end >= w.offset[task]).all() and (end < w.offset[task] + w.size[task]).all()


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=5), st.integers(1, 70), st.integers(0, 1000))
def test_a_batch_follows_the_shares_to_within_one_window(weights, B, seed):
    d, w = windows()
    N = len(weights)
    many = data.Windows([d.train] * N, [d.task] * N, 5)
    shares = torch.tensor(weights) / sum(weights)
    b = many.sample(B, shares, torch.Generator().manual_seed(seed))
    n = torch.bincount(b.task, minlength=N)
    assert ((n - shares * B).abs() < 1 + 1e-4).all()
    assert torch.equal(torch.searchsorted(many.offset, b.rows[:, -1].contiguous(), right=True) - 1, b.task)


def test_a_one_hot_share_takes_that_teachers_windows_alone():
    d, _ = windows()
    many = data.Windows([d.train] * 3, [d.task] * 3, 5)
    for i in range(3):
        assert (many.sample(64, torch.eye(3)[i], torch.Generator().manual_seed(i)).task == i).all()


def test_a_batch_of_64_windows_takes_at_most_a_fifth_of_a_millisecond():
    task = (
        data.load("tests/windows-v0").task
        if "tests/windows-v0" in minari.list_local_datasets()
        else windows()[0].task
    )
    w = data.Windows(
        [np.random.default_rng(0).random((200_000, task.obs_dim + task.act_dim + 2), np.float32)], [task], 20
    )
    gen, share, times, threads = torch.Generator(), torch.ones(1), [], torch.get_num_threads()
    torch.set_num_threads(1)  # more would wait for each other where the machine is shared
    for _ in range(300):
        start = time.perf_counter()
        w.sample(64, share, gen)
        times.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    assert np.quantile(times, 0.1) < 4e-4  # 0.2 ms on an idle machine; this one may be shared


@given(
    st.lists(st.lists(st.floats(0.01, 1), min_size=3, max_size=3), min_size=2, max_size=6),
    st.integers(0, 1000),
)
def test_a_table_on_the_host_gives_the_same_windows_whatever_was_read_ahead(weights, seed):
    d, _ = windows()
    there, here = (
        data.Windows([d.train] * 3, [d.task] * 3, 5, where=where, targets=True)
        for where in ("device", "host")
    )
    here.table[:, -2 * d.task.act_dim :] = there.table[:, -2 * d.task.act_dim :] = torch.rand(
        len(there.table), 2 * d.task.act_dim
    )
    a, b = (torch.Generator().manual_seed(seed) for _ in range(2))
    earlier = []
    for w in weights:
        shares = torch.tensor(w) / sum(w)
        x, y = there.sample(8, shares, a), here.sample(8, shares, b)
        assert here.ahead is not None and torch.equal(a.get_state(), b.get_state())
        earlier.append((x, y))
        assert all(
            torch.equal(p, q) for x, y in earlier for p, q in zip(x, y, strict=True)
        )  # nor is a batch changed by the next


def test_what_was_read_ahead_is_used():
    d, _ = windows()
    w = data.Windows([d.train], [d.task], 5, where="host")
    generator, share = torch.Generator().manual_seed(0), torch.ones(1)
    w.sample(8, share, generator)
    w.ahead.result()
    w.table = torch.zeros_like(w.table)  # from here on only what was read before is anything
    assert w.sample(8, share, generator).states.any() and not w.sample(8, share, generator).states.any()


def test_data_that_would_fill_half_the_devices_memory_stay_on_the_host(monkeypatch):
    d, w = windows()
    size = 4 * w.table.numel()
    for room, host in ((2.1 * size, False), (1.9 * size, True)):
        monkeypatch.setattr(data, "room", lambda device, room=room: room)
        chosen = data.Windows([np.concatenate([d.train, d.held_out])], [d.task], 5)
        assert chosen.host == host and torch.equal(chosen.table, w.table)
    assert not data.Windows([d.train], [d.task], 5, where="device").host
    assert not list(minari_files.CACHE.glob("tmp*"))  # the file has no name


def test_a_disk_without_room_for_the_table_is_told_before_anything_is_done(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.os, "posix_fallocate", full)
    with pytest.raises(UserError, match="no room for 0.0 GB in .* --data-device device"):
        data.mapped((10, 10))


def test_where_all_episodes_return_the_same_they_score_100():
    make_dataset("tests/equal-v0", [10] * 4, spec="CartPole-v1", edit=lambda i, e: e["rewards"].fill(1.0))
    assert data.load("tests/equal-v0").task.reference == (0.0, 10.0)


# ---- the built-in data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", sorted(data.ENVS))
def test_the_bundled_policies_make_a_minari_dataset_and_go_from_poor_to_good(env):
    data.collect(env, 2000)
    name = data.dataset_id(env)
    ds = minari.load_dataset(name)
    assert (
        ds.total_steps >= 2000
        and ds.recover_environment().observation_space.shape == ds.observation_space.shape
    )
    assert name in minari.list_local_datasets()
    d = data.load(env)
    assert d.task.name == env and d.task.reference == (
        data.ENVS[env].reference or (d.returns.min(), d.returns.max())
    )
    assert (d.task.obs_dim, d.task.act_dim) == {
        "hopper": (11, 3),
        "halfcheetah": (17, 6),
        "halfcheetah-back": (17, 6),
        "walker2d": (17, 6),
        "ant": (27, 8),
    }[env]
    assert (
        sum(f.stat().st_size for f in behaviour.HERE.iterdir()) < 1_000_000
        and len(behaviour.load(env)) == behaviour.SNAPSHOTS
    )
    shutil.rmtree(get_dataset_path(name))


def test_a_steady_snapshot_is_kept_for_every_level_of_return():
    returns = np.array([0.0, 1, 2, 50, 51, 98, 99, 100])[:, None] + np.array([-1.0, 1.0])
    assert behaviour.choose(returns, 3) == [0, 3, 7]
    returns[3] = 0, 100  # falls every other time
    returns[7] = 0, 300
    assert behaviour.choose(returns, 3) == [0, 4, 6] and behaviour.choose(returns, 10) == [0, 1, 2, 4, 5, 6]
    with pytest.raises(UserError, match="none of 2 policies is steady"):
        behaviour.choose(np.array([[0.0, 10.0], [0.0, 20.0]]), 1)


@pytest.mark.parametrize(
    ("env", "least"), [("hopper", 3000), ("halfcheetah", 5000), ("walker2d", 3000), ("ant", 3000)]
)
def test_the_bundled_policies_do_what_their_file_says(env, least):
    said = safetensors.numpy.load_file(behaviour.HERE / f"{env}.safetensors")["returns"]
    world, rng, policies = (
        environments.make_env(*data.ENVS[env][:2]),
        np.random.default_rng(0),
        behaviour.load(env),
    )
    best = [behaviour.rollout(world, policies[-1], 0.0, rng, i)["rewards"].sum() for i in range(3)]
    assert (
        said[-1] >= least
        and np.mean(best) > 0.8 * said[-1]
        and (np.diff(said) >= 0).all()
        and len(said) == behaviour.SNAPSHOTS
    )
    assert behaviour.rollout(world, policies[0], 0.0, rng, 0)["rewards"].sum() < 0.5 * np.mean(best)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_unknown_env_names_the_choices():
    with pytest.raises(
        UserError,
        match="unknown env 'hoper'; choose from ant, halfcheetah, halfcheetah-back, hopper, walker2d",
    ):
        data.load("hoper")


@pytest.mark.parametrize("name", ["nobody/nothing-v0", "../../etc/passwd-v0", "a b-v0", "x/../y-v0"])
def test_a_dataset_that_can_not_be_had_is_one_line_with_the_remedy(name):
    with pytest.raises(UserError, match="dataset .*(can't be downloaded|an id looks like)") as e:
        data.load(name)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("field", ["observations", "actions", "rewards"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_or_infinite_values_are_found_with_their_episode_and_field(field, bad):
    name = f"tests/bad-{field}-{'nan' if np.isnan(bad) else 'inf'}-v0"

    def edit(i, e):
        if i == 2:
            e[field][1] = bad

    make_dataset(name, [3, 4, 5, 6], edit=edit)
    with pytest.raises(UserError, match=f"{field} in episode 2"):
        data.load(name)


def test_discrete_actions_are_read_one_hot_from_the_spaces_first_number_on():
    def edit(i, e):
        e["actions"] = e["actions"] + 5

    episodes = make_dataset(
        "tests/discrete-v0", [3, 4], spec=None, edit=edit, action_space=gym.spaces.Discrete(4, start=5)
    )
    d = data.load("tests/discrete-v0")
    assert (d.task.act_dim, d.task.first_action, d.task.discrete, d.saturation) == (4, 5, True, 0.0)
    table = minari_files.read("tests/discrete-v0")[0]["table"]
    assert np.array_equal(table[:, 3:7], np.eye(4)[np.concatenate([e["actions"] for e in episodes]) - 5])


def test_an_action_outside_its_space_is_told():
    def edit(i, e):
        e["actions"][1] += 7 * (i == 2)

    make_dataset("tests/outside-v0", [3, 4, 5], spec=None, edit=edit, action_space=gym.spaces.Discrete(2))
    with pytest.raises(UserError, match=r"past episode 2 \(ValueError: action [78] is not in Discrete\(2\)"):
        data.load("tests/outside-v0")


@pytest.mark.parametrize("what", ["observations", "actions"])
def test_spaces_that_can_not_be_learnt_from_are_told(what):
    kind = {"observations": gym.spaces.Discrete(3), "actions": gym.spaces.MultiDiscrete([2, 3])}[what]
    make_dataset(f"tests/multi-{what}-v0", [3, 3], spec=None, **{f"{what[:-1]}_space": kind},
                 edit=lambda i, e: e.update({what: np.zeros((len(e[what]), *kind.shape), int)}))  # fmt: skip
    with pytest.raises(UserError, match=f"has {type(kind).__name__} {what}; only"):
        data.load(f"tests/multi-{what}-v0")


def test_too_few_episodes_are_told():
    make_dataset("tests/single-v0", [3])
    with pytest.raises(UserError, match="1 episode; at least 2"):
        data.load("tests/single-v0")
    make_dataset("tests/empty-v0", [])
    with pytest.raises(UserError, match="no episode"):
        data.load("tests/empty-v0")


def test_a_truncated_dataset_file_is_told():
    make_dataset("tests/truncated-v0", [30, 30])
    f = get_dataset_path("tests/truncated-v0") / "data" / "main_data.hdf5"
    f.write_bytes(f.read_bytes()[: f.stat().st_size // 2])
    with pytest.raises(UserError, match="tests/truncated-v0 can't be read"):
        data.load("tests/truncated-v0")


def test_a_dataset_can_not_have_code_of_its_own_imported():
    with pytest.raises(UserError, match="not registered"):
        environments.make_env("os:system-v0", {})


def test_a_cached_million_steps_are_ready_in_a_fifth_of_a_second(monkeypatch):
    rng, n = np.random.default_rng(0), 250_000
    make_dataset("tests/big-v0", [3, 4])
    table, lengths = rng.random((n, 17 + 6 + 2), np.float32), np.full(250, 1000)
    about = {
        "env_id": "Walker2d-v5",
        "env_kwargs": {},
        "max_steps": 1000,
        "act_low": [0.0] * 6,
        "act_high": [1.0] * 6,
        "first_action": None,
    }
    monkeypatch.setattr(minari_files, "read_minari", lambda *a: (table, lengths, about))
    data.load("tests/big-v0")
    times = []
    for _ in range(5):
        start = time.perf_counter()
        d = data.load("tests/big-v0")
        times.append(time.perf_counter() - start)
    assert len(d.train) + len(d.held_out) == n
    assert min(times) < 2 * 0.2 / 4  # a quarter of the million; twice the time, for a machine that is shared

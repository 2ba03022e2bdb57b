"""data.py: tasks, the split, windows. Reading Minari's files: test_support_minari_files.py."""

import dataclasses
import math
import time

import minari
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
from conftest import make_dataset
from support import UserError, minari_files, spaces

LENGTHS = (7, 3, 12, 1, 9)
K = 5
one_task = torch.ones(1)  # all of a batch to the only task


def small_dataset() -> data.Dataset:
    """5 episodes of 1 to 12 timesteps."""
    if "tests/windows-v0" not in minari.list_local_datasets():
        make_dataset("tests/windows-v0", LENGTHS, spec=None)
    return data.load("tests/windows-v0")


def windows_of(n_tasks: int = 1, **options) -> data.Windows:
    """Windows over the small dataset's training episodes, which each of n_tasks has for itself."""
    dataset = small_dataset()
    return data.Windows([dataset.train] * n_tasks, [dataset.task] * n_tasks, K, **options)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- a dataset, split --------------------------------------------------------------------------------------


def test_load__holds_a_tenth_of_the_episodes_out_by_seed():
    make_dataset("tests/split-v0", [5] * 40)
    first = data.load("tests/split-v0", 0)
    again = data.load("tests/split-v0", 0)
    other = data.load("tests/split-v0", 1)
    assert len(first.held_out) == 20
    assert len(first.train) == 180
    assert np.array_equal(first.held_out, again.held_out)
    assert not np.array_equal(first.held_out, other.held_out)


def test_load__normalises_by_the_training_episodes_alone_and_loses_nothing():
    make_dataset("tests/normalised-v0", [5] * 40)
    d = data.load("tests/normalised-v0")
    O = d.task.obs_dim
    assert np.allclose(d.train[:, :O].mean(0), 0, atol=1e-5)
    assert np.allclose(d.train[:, :O].std(0), 1, atol=1e-4)
    assert not np.allclose(d.held_out[:, :O].mean(0), 0, atol=1e-3)
    assert np.abs(d.train[:, -2]).max() == pytest.approx(1)
    raw = np.concatenate([d.train, d.held_out])
    raw[:, :O] = raw[:, :O] * d.task.obs_std + d.task.obs_mean
    raw[:, -2] *= d.task.rtg_scale
    table = minari_files.read("tests/normalised-v0")[0]["table"]
    assert np.allclose(raw[np.lexsort(raw[:, :2].T)], table[np.lexsort(table[:, :2].T)], atol=1e-4)


def test_load__does_not_divide_a_constant_observation_by_its_zero_deviation():
    def edit(i, episode):
        episode["observations"][:, 1] = 3.0

    make_dataset("tests/constant-v0", [5] * 10, edit=edit)
    d = data.load("tests/constant-v0")
    assert np.isfinite(d.train).all()
    assert not d.train[:, 1].any()


def test_load__gives_score_100_to_a_dataset_of_equal_returns():
    def edit(i, episode):
        episode["rewards"].fill(1.0)

    make_dataset("tests/equal-v0", [10] * 4, spec="CartPole-v1", edit=edit)
    assert data.load("tests/equal-v0").task.reference == (0.0, 10.0)


def test_load__takes_targets_from_the_training_episodes_returns():
    make_dataset("tests/targets-v0", [5] * 40)
    d = data.load("tests/targets-v0")
    returns = d.train[d.train[:, -1] == 0, -2] * d.task.rtg_scale
    *quantiles, supported = d.task.targets.items()
    assert [name for name, _ in quantiles] == ["p10", "p25", "median", "p75", "p95"]
    assert np.allclose([x for _, x in quantiles], np.quantile(returns, [0.1, 0.25, 0.5, 0.75, 0.95]))
    assert supported == ("supported", d.task.target)
    assert d.task.target == pytest.approx(np.median(np.sort(returns)[-data.BEST_EPISODES :]))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.floats(0.01, 1))
def test_best_rows__are_the_share_or_eight_episodes(lengths, share):
    first_rows = np.cumsum([0, *lengths[:-1]])
    n = data.best_rows(first_rows, sum(lengths), share)
    assert share * sum(lengths) <= n <= sum(lengths)
    assert n >= sum(lengths[-data.BEST_EPISODES :])
    assert n in (math.ceil(share * sum(lengths)), sum(lengths[-data.BEST_EPISODES :]))


def test_load__asks_by_default_for_what_eight_of_few_episodes_returned():
    make_dataset("tests/few-v0", [5] * 12)
    d = data.load("tests/few-v0")
    returns = d.train[d.train[:, -1] == 0, -2] * d.task.rtg_scale
    assert len(returns) == 11
    assert d.task.target == pytest.approx(np.median(returns[3:]))


def test_facts__are_of_the_training_episodes():
    d = small_dataset()
    facts = d.facts()
    assert facts["steps"] == len(d.train)
    assert facts["episodes"] == 4
    arrays = minari_files.read("tests/windows-v0")[0]
    held_out = np.isclose(arrays["returns"], d.held_out[0, -2] * d.task.rtg_scale)
    of_training = arrays["returns"][~held_out]
    assert facts["return_mean"] == pytest.approx(of_training.mean())
    assert facts["return_min"] == pytest.approx(of_training.min())
    assert facts["return_max"] == pytest.approx(of_training.max())


def test_load__names_the_choices_for_an_unknown_env():
    choices = "ant, halfcheetah, halfcheetah-back, hopper, walker2d"
    with pytest.raises(UserError, match=f"unknown env 'hoper'; choose from {choices}"):
        data.load("hoper")


def test_load__needs_two_episodes():
    make_dataset("tests/single-v0", [3])
    with pytest.raises(UserError, match="1 episode; at least 2"):
        data.load("tests/single-v0")
    make_dataset("tests/empty-v0", [])
    with pytest.raises(UserError, match="no episode"):
        data.load("tests/empty-v0")


def test_load__takes_a_fifth_of_a_second_for_a_cached_million_steps(monkeypatch):
    """A quarter of them here, in twice the time: the machine may be shared."""
    n = 250_000
    make_dataset("tests/big-v0", [3, 4])
    table = np.random.default_rng(0).random((n, 17 + 6 + 2), np.float32)
    table[:, -1] = np.tile(np.arange(1000), 250)
    about = {
        "env_id": "Walker2d-v5",
        "env_kwargs": {},
        "max_steps": 1000,
        "act_low": [0.0] * 6,
        "act_high": [1.0] * 6,
        "first_action": None,
        "factors": None,
        "env_wrappers": [],
        "obs_space": None,
    }
    monkeypatch.setattr(minari_files, "read_minari", lambda *_: (table, np.full(250, 1000), about))
    data.load("tests/big-v0")
    times = []
    for _ in range(5):
        start = time.perf_counter()
        d = data.load("tests/big-v0")
        times.append(time.perf_counter() - start)
    assert len(d.train) + len(d.held_out) == n
    assert min(times) < 2 * 0.2 / 4


# ---- windows -----------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31))
def test_sample__gives_stretches_of_one_episode_padded_on_the_left(seed):
    w = windows_of()
    batch = w.sample(16, one_task, generator(seed))
    for i in range(16):
        n = int(batch.mask[i].sum())
        assert n == min(K, int(batch.timesteps[i, -1]) + 1)
        assert batch.mask[i].tolist() == [False] * (K - n) + [True] * n
        rows = batch.rows[i, K - n :]
        assert (rows.diff() == 1).all()
        assert (batch.timesteps[i, K - n :].diff() == 1).all()
        assert torch.equal(batch.states[i, K - n :], w.table[rows, : w.O])
        assert torch.equal(batch.actions[i, K - n :], w.table[rows, w.O : w.O + w.A])
        assert torch.equal(batch.rtg[i, K - n :], w.table[rows, -2])


@pytest.mark.parametrize("options", [{"where": "host"}, {}, {"copies": 3}, {"copies": 1, "targets": True}])
def test_sample__gives_every_timestep_the_pixels_of_its_row(options):
    dataset = small_dataset()
    S = len(dataset.train)
    pixels = [None, np.empty((S, 3), np.uint8), np.empty((S, 2), np.uint8)]
    for i in (1, 2):
        pixels[i][:] = 100 * i + np.arange(S)[:, None]
    w = data.Windows([dataset.train] * 3, [dataset.task] * 3, K, pixels=pixels, **options)
    if w.copies:
        w.ask(0.7, torch.zeros(3), torch.ones(3), 0.5, generator())
    for _ in range(3):
        batch = w.sample(60, torch.full((3,), 1 / 3), generator())
        assert batch.pixels.shape == (60, K, 3)
        for task, size in ((1, 3), (2, 2)):
            valid = batch.mask & (batch.task == task)[:, None]
            row = (batch.rows[valid] - w.offset[task]) % S
            wanted = (100 * task + row).to(torch.uint8)[:, None].expand(-1, size)
            assert torch.equal(batch.pixels[valid][:, :size], wanted)


def test_sample__of_one_task_copies_no_pixels():
    dataset = small_dataset()
    pixels = np.zeros((len(dataset.train), 2), np.uint8)
    w = data.Windows([dataset.train], [dataset.task], K, pixels=[pixels])
    pixels[:] = 7
    assert (w.sample(5, one_task, generator()).pixels == 7).all()


def test_windows__count_pixels_in_what_the_device_must_hold(monkeypatch):
    dataset = small_dataset()
    pixels = np.zeros((len(dataset.train), 10_000), np.uint8)
    for free, on_host in ((2.1 * pixels.size, False), (1.9 * pixels.size, True)):
        monkeypatch.setattr(data, "free_bytes", lambda device, free=free: free)
        w = data.Windows([dataset.train], [dataset.task], K, pixels=[pixels])
        assert (w.host is not None) == (w.pixels_host is not None) == on_host


def test_share_of__takes_the_pixels_of_its_episodes():
    dataset = small_dataset()
    pixels = np.arange(len(dataset.train), dtype=np.uint8)[:, None]
    dataset = dataclasses.replace(dataset, train_pixels=pixels)
    some = data.share_of(dataset, 0.5, seed=1)
    assert len(some.train) < len(dataset.train)
    assert np.array_equal(dataset.train[some.train_pixels[:, 0]], some.train)


def test_sample__works_where_every_episode_has_one_step():
    make_dataset("tests/one-step-v0", [1] * 10)
    d = data.load("tests/one-step-v0")
    batch = data.Windows([d.train], [d.task], 4).sample(32, one_task, torch.Generator())
    assert (batch.mask.sum(1) == 1).all()
    assert batch.mask[:, -1].all()


def test_sample__ends_windows_at_every_timestep_alike():
    w = windows_of()
    n = 40_000
    ends = w.sample(n, one_task, generator()).rows[:, -1]
    relative = torch.bincount(ends, minlength=len(w.table)) / n * len(w.table)
    assert relative.min() > 0.85
    assert relative.max() < 1.15


def test_sample__takes_half_of_the_windows_from_the_top_of_the_returns():
    make_dataset("tests/by-return-v0", [3, 9, 5, 20, 1, 8, 4, 10, 2, 7] * 10)
    d = data.load("tests/by-return-v0")
    returns = d.train[d.train[:, -1] == 0, -2]  # of each episode, where it begins
    assert (np.diff(returns) >= 0).all()
    assert returns[0] < returns[-1]
    w = data.Windows([d.held_out, d.train], [d.task] * 2, K, top=0.25)
    ends = w.sample(40_000, torch.tensor([0.0, 1.0]), generator()).rows[:, -1] - len(d.held_out)
    quarters = np.histogram(ends, np.linspace(0, len(d.train), 5))[0] / len(ends)
    assert np.allclose(quarters, [0.125, 0.125, 0.125, 0.625], atol=0.02)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=5), st.integers(1, 70), st.integers(0, 1000))
def test_sample__follows_the_shares_to_within_one_window(weights, B, seed):
    N = len(weights)
    w = windows_of(N)
    shares = torch.tensor(weights) / sum(weights)
    batch = w.sample(B, shares, generator(seed))
    assert ((torch.bincount(batch.task, minlength=N) - shares * B).abs() < 1 + 1e-4).all()
    last_rows = batch.rows[:, -1].contiguous()
    assert torch.equal(torch.searchsorted(w.offset, last_rows, right=True) - 1, batch.task)


def test_sample__gives_the_shares_on_average():
    shares = torch.tensor([0.09, 0.21, 0.7])
    w = windows_of(3)
    counts = sum(torch.bincount(w.draw(4, shares, generator(i))[0], minlength=3) for i in range(4000))
    assert torch.allclose(counts / counts.sum(), shares, atol=0.01)


def test_sample__draws_from_the_generator_that_it_is_given():
    w = windows_of(3)
    shares = torch.tensor([0.2, 0.3, 0.5])
    first = w.sample(64, shares, generator(1))
    again = w.sample(64, shares, generator(1))
    other = w.sample(64, shares, generator(2))
    assert torch.equal(first.rows, again.rows)
    assert not torch.equal(first.rows, other.rows)


def test_sample__takes_a_one_hot_shares_windows_alone():
    w = windows_of(3)
    for i in range(3):
        assert (w.sample(64, torch.eye(3)[i], generator(i)).task == i).all()


@given(st.floats(1e-9, 1), st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(0, 1000))
def test_end__is_a_row_of_its_own_task(top, sizes, seed):
    d = small_dataset()
    tables = [np.tile(d.train, (2, 1))[:n] for n in sizes]
    w = data.Windows(tables, [d.task] * len(sizes), K, top=top)
    task = torch.arange(len(sizes)).repeat_interleave(3)
    u = [0.0, np.nextafter(1.0, 0.0), np.random.default_rng(seed).random()]
    end = w.end(task, torch.tensor(u, dtype=torch.float64).repeat(len(sizes)))
    assert (end >= w.offset[task]).all()
    assert (end < w.offset[task] + w.size[task]).all()


def test_end__has_half_the_density_below_the_top_and_the_rest_above():
    """top 0.2: density 1/2 up to row 800 of 1000, where u = 0.4, and 1/2 + 1/(2 top) = 3 above."""
    d = small_dataset()
    table = np.tile(d.train, (60, 1))[:1000]
    w = data.Windows([table[:7], table], [d.task] * 2, K, top=0.2)
    u = torch.tensor([0.0, 0.1, 0.4, 0.4 + 0.3, 0.4 + 0.57], dtype=torch.float64) + 1e-9
    end = w.end(torch.ones(5, dtype=torch.long), u) - 7
    assert end.tolist() == [0, 200, 800, 900, 990]


def test_spread__gives_evenly_spaced_windows_of_every_task():
    d = small_dataset()
    tables = [np.tile(d.train, (5, 1))[:n] for n in (100, 40)]
    w = data.Windows(tables, [d.task] * 2, K)
    batch = w.spread(4)
    assert batch.task.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert batch.rows[:, -1].tolist() == [12, 37, 62, 87, 105, 115, 125, 135]


def test_gather__pads_tasks_to_the_widest_and_gives_targets_where_there_are():
    make_dataset("tests/narrow-v0", [6, 6], obs_dim=2, act_dim=1, spec=None)
    make_dataset("tests/wide-v0", [6, 6], obs_dim=4, act_dim=3, spec=None, seed=1)
    sets = [data.load(name) for name in ("tests/narrow-v0", "tests/wide-v0")]
    w = data.Windows([d.train for d in sets], [d.task for d in sets], K, targets=True)
    w.table[:, -6:] = torch.arange(6.0)
    batch = w.gather(torch.tensor([0, 1]), torch.tensor([5, 11]))
    assert torch.equal(batch.rows, torch.tensor([[1, 2, 3, 4, 5], [7, 8, 9, 10, 11]]))
    narrow = torch.from_numpy(sets[0].train)[1:]
    wide = torch.from_numpy(sets[1].train)[1:]
    assert torch.equal(batch.states[0, :, :2], narrow[:, :2])
    assert torch.equal(batch.actions[0, :, :1], narrow[:, 2:3])
    assert torch.equal(batch.states[1], wide[:, :4])
    assert torch.equal(batch.actions[1], wide[:, 4:7])
    assert not batch.states[0, :, 2:].any()
    assert not batch.actions[0, :, 1:].any()
    assert torch.equal(batch.rtg, torch.stack((narrow[:, -2], wide[:, -2])))
    assert batch.timesteps.tolist() == [[1, 2, 3, 4, 5]] * 2
    assert batch.targets.shape == (2, 2, K, 3)
    assert batch.targets[0, 1, 2].tolist() == [0.0, 1.0, 2.0]
    assert batch.targets[1, 1, 2].tolist() == [3.0, 4.0, 5.0]
    without = data.Windows([d.train for d in sets], [d.task for d in sets], K)
    assert without.gather(torch.tensor([0]), torch.tensor([5])).targets.shape == (2, 1, K, 0)


def asking(low: float, high: float, share: float = 1.0, copies: int = 0, noise: float = 0.0) -> data.Windows:
    """Windows of the small dataset, this share of which ask for a return between low and high."""
    w = windows_of(2, copies=copies)
    w.ask(share, torch.tensor([0.0, low]), torch.tensor([0.0, high]), noise, generator(7))
    return w


def original(w: data.Windows, batch: data.Batch) -> data.Batch:
    """The windows of the second task that a batch's were before they asked."""
    row = (batch.rows[:, -1] - w.offset[1]) % w.size[1]
    return w.gather(batch.task, w.offset[1] + row)


ONLY_SECOND = torch.tensor([0.0, 1.0])


@given(st.floats(-2, 2), st.floats(0, 3), st.integers(0, 4), st.integers(0, 1000))
def test_ask__shifts_an_episodes_returns_to_go_by_one_constant(low, width, copies, seed):
    w = asking(low, low + width, copies=copies)
    batch = w.sample(40, ONLY_SECOND, generator(seed))
    own = original(w, batch)
    shift = batch.rtg - own.rtg
    valid = batch.mask
    assert torch.allclose(shift[valid], shift[:, -1:].expand_as(shift)[valid], atol=1e-5)
    first = own.rows[:, -1] - own.timesteps[:, -1]  # rows where the episodes begin
    asked = w.table[first, w.O + w.A] + shift[:, -1]
    assert (asked >= low - 1e-5).all()
    assert (asked <= low + width + 1e-5).all()
    for field in ("states", "actions", "timesteps"):
        assert torch.equal(getattr(batch, field)[valid], getattr(own, field)[valid])
    assert torch.equal(valid, own.mask)


def test_ask__gives_each_copy_of_an_episode_its_own_part_of_the_range():
    w = asking(1.0, 5.0, copies=4)
    size = int(w.size[1])
    tables = w.table[int(w.offset[1]) :].split(size)
    first = data.first_rows(tables[0].numpy())
    for copy in range(4):
        asked = tables[1 + copy][first, w.O + w.A]
        assert ((asked >= 1 + copy - 1e-5) & (asked <= 2 + copy + 1e-5)).all()
        assert asked.unique().numel() == len(first)  # drawn for each episode
    assert torch.equal(tables[0], asking(9.0, 9.0, copies=4).table[int(w.offset[1]) :][:size])


@pytest.mark.parametrize("copies", [0, 3])
def test_ask__leaves_the_other_windows_as_they_are(copies):
    w = asking(3.0, 4.0, share=0.3, copies=copies, noise=0.5)
    batch = w.sample(20_000, ONLY_SECOND, generator())
    own = original(w, batch)
    asks = batch.rtg[:, -1] != own.rtg[:, -1]
    assert asks.float().mean() == pytest.approx(0.3, abs=0.01)
    ends = torch.bincount(own.rows[asks, -1], minlength=int(w.offset[1] + w.size[1]))[int(w.offset[1]) :]
    assert (ends[: int(w.size[1])] / asks.sum() * w.size[1]).min() > 0.7  # of any row alike
    assert torch.equal(batch.states[~asks], own.states[~asks])
    assert not torch.equal(batch.states[asks], own.states[asks])


@pytest.mark.parametrize("copies", [0, 3])
def test_ask__moves_the_states_of_a_tasks_own_dimensions(copies):
    """Half of the states are scaled, by factors up to exp(1.6 noise); the rest of the change is the noise."""
    dataset = small_dataset()
    O = dataset.task.obs_dim
    parts = [*spaces.box(O), {"path": [], "kind": "bits", "size": 2}]
    wide = dataclasses.replace(dataset.task, obs_dim=O + 2, obs_space=parts)
    table = np.insert(dataset.train, [dataset.task.obs_dim], np.ones((len(dataset.train), 2), np.float32), 1)
    w = data.Windows([table, dataset.train], [wide, dataset.task], K, copies=copies)
    w.ask(1.0, torch.zeros(2), torch.ones(2), 0.5, generator(7))
    batch = w.sample(5000, ONLY_SECOND, generator())
    own = original(w, batch)
    assert not batch.states[batch.mask][:, O:].any()  # beyond the task's own dimensions
    of_wide = w.sample(500, torch.tensor([1.0, 0.0]), generator())
    assert (of_wide.states[of_wide.mask][:, O:] == 1).all()  # bits
    assert not (of_wide.states[of_wide.mask][:, :O] == 1).any()
    change = (batch.states - own.states)[batch.mask][:, :O]
    assert 0.05 < change.std() < 0.8
    big = own.states[batch.mask][:, :O].abs() > 1
    factor = (batch.states[batch.mask][:, :O] / own.states[batch.mask][:, :O])[big]
    assert factor.quantile(0.02) > 0.3
    assert factor.quantile(0.98) < 2.8
    assert factor.quantile(0.9) > 1.3
    assert factor.quantile(0.1) < 0.8


def test_share_of__takes_whole_episodes_by_seed():
    make_dataset("tests/shared-v0", [3, 9, 5, 20, 1, 8, 4, 10, 2, 7] * 10)
    d = data.load("tests/shared-v0")
    all_of_it = {episode.tobytes() for episode in np.split(d.train, data.first_rows(d.train)[1:])}
    fifth = data.share_of(d, 0.2, 0)
    first = data.first_rows(fifth.train)
    episodes = np.split(fifth.train, first[1:])
    assert len(episodes) == 18  # of 90
    assert {episode.tobytes() for episode in episodes} <= all_of_it
    assert (np.diff(fifth.train[first, -2]) >= 0).all()
    assert np.array_equal(fifth.train, data.share_of(d, 0.2, 0).train)
    assert not np.array_equal(fifth.train, data.share_of(d, 0.2, 1).train)
    assert np.array_equal(fifth.held_out, d.held_out)
    assert data.share_of(d, 1.0, 0) is d
    with pytest.raises(UserError, match=r"--data-share 0.01: 1 of the 90 training episodes.*0.022 of them"):
        data.share_of(d, 0.01, 0)


def test_load__takes_the_statistics_of_another_task():
    make_dataset("tests/of-v0", [5] * 40)
    make_dataset("tests/like-v0", [5] * 10, seed=3)
    of = data.load("tests/of-v0").task
    own = data.load("tests/like-v0")
    d = data.load("tests/like-v0", like=of)
    assert d.task == of
    O = of.obs_dim
    raw = d.train[:, :O] * np.array(of.obs_std) + np.array(of.obs_mean)
    assert np.allclose(
        raw, own.train[:, :O] * np.array(own.task.obs_std) + np.array(own.task.obs_mean), atol=1e-4
    )
    assert np.allclose(d.train[:, -2] * of.rtg_scale, own.train[:, -2] * own.task.rtg_scale, atol=1e-4)
    make_dataset("tests/like-wide-v0", [5] * 10, obs_dim=7)
    with pytest.raises(
        UserError, match="dataset tests/like-wide-v0 has obs_dim 7, the teacher of tests/of-v0"
    ):
        data.load("tests/like-wide-v0", like=of)


def test_sample__takes_at_most_a_fifth_of_a_millisecond_for_64_windows():
    """0.2 ms on an idle machine; this one may be shared."""
    task = small_dataset().task
    table = np.random.default_rng(0).random((200_000, task.obs_dim + task.act_dim + 2), np.float32)
    w = data.Windows([table], [task], 20)
    times = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would wait for each other where the machine is shared
    for _ in range(300):
        start = time.perf_counter()
        w.sample(64, one_task, torch.Generator())
        times.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    assert np.quantile(times, 0.1) < 4e-4

"""support/host_table.py, through data.Windows: the same windows wherever the table lies."""

import os

import minari
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
from conftest import make_dataset
from support import UserError, host_table, minari_files

K = 5


@pytest.fixture(scope="module")
def dataset() -> data.Dataset:
    if "tests/host-v0" not in minari.list_local_datasets():
        make_dataset("tests/host-v0", (7, 3, 12, 1, 9), spec=None)
    return data.load("tests/host-v0")


@given(
    st.lists(st.lists(st.floats(0.01, 1), min_size=3, max_size=3), min_size=2, max_size=6),
    st.integers(0, 1000),
)
def test_sample__gives_the_same_windows_whatever_was_read_ahead(dataset, weights, seed):
    tables = [dataset.train] * 3
    tasks = [dataset.task] * 3
    on_device = data.Windows(tables, tasks, K, where="device", targets=True)
    on_host = data.Windows(tables, tasks, K, where="host", targets=True)
    targets = torch.rand(len(on_device.table), 2 * dataset.task.act_dim)
    for w in (on_device, on_host):
        w.table[:, -2 * dataset.task.act_dim :] = targets
    device_generator = torch.Generator().manual_seed(seed)
    host_generator = torch.Generator().manual_seed(seed)
    batches = []
    for w in weights:
        shares = torch.tensor(w) / sum(w)
        wanted = on_device.sample(8, shares, device_generator)
        got = on_host.sample(8, shares, host_generator)
        assert on_host.host.pending is not None
        assert torch.equal(device_generator.get_state(), host_generator.get_state())
        batches.append((wanted, got))
        for x, y in batches:  # nor is a batch changed by the next
            assert all(torch.equal(p, q) for p, q in zip(x, y, strict=True))


def test_fetch__uses_what_was_read_ahead(dataset):
    w = data.Windows([dataset.train], [dataset.task], K, where="host")
    generator = torch.Generator().manual_seed(0)
    w.sample(8, torch.ones(1), generator)
    w.host.pending.result()
    w.host.table.zero_()  # from here on only what was read before is anything
    assert w.sample(8, torch.ones(1), generator).states.any()
    w.host.pending.result()
    assert not w.sample(8, torch.ones(1), generator).states.any()


def test_windows__keep_a_table_on_the_host_that_would_fill_half_the_devices_memory(dataset, monkeypatch):
    tables = [dataset.train]
    tasks = [dataset.task]
    on_device = data.Windows(tables, tasks, K, where="device")
    assert on_device.host is None
    n_bytes = 4 * on_device.table.numel()
    for free, on_host in ((2.1 * n_bytes, False), (1.9 * n_bytes, True)):
        monkeypatch.setattr(data, "free_bytes", lambda device, free=free: free)
        chosen = data.Windows(tables, tasks, K)
        assert (chosen.host is not None) == on_host
        assert torch.equal(chosen.table, on_device.table)
    assert not list(minari_files.CACHE.glob("tmp*"))  # the file has no name


def test_mapped__finds_a_full_disk_before_anything_is_done(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="no room for 0.0 GB in .* --data-device device"):
        host_table.mapped((10, 10))


def test_mapped__is_zeros_that_can_be_written():
    table = host_table.mapped((10, 3))
    assert table.shape == (10, 3)
    assert table.dtype == torch.float32
    assert not table.any()
    table[4] = torch.arange(3.0)
    assert np.array_equal(table.sum(0), [0, 1, 2])

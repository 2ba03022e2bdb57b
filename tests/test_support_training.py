"""support/training.py: the schedule, and what a captured function keeps. Real CUDA graphs need a GPU."""

import gc
import unittest.mock
import weakref

import pytest
import torch

from support import training


def test_schedule__warms_up_then_decays_to_zero_with_adamws_corrections():
    rows = training.schedule(10, peak=2.0, warmup=4).double()
    wanted = [0.5, 1.0, 1.5, 2.0, 2.0, 10 / 6, 8 / 6, 1.0, 4 / 6, 2 / 6]
    assert torch.allclose(rows[:, 0], torch.tensor(wanted, dtype=torch.float64))
    t = torch.arange(1, 11, dtype=torch.float64)
    assert torch.allclose(rows[:, 1], 1 - 0.9**t)
    assert torch.allclose(rows[:, 2], 1 - 0.999**t)
    assert torch.equal(rows[:, 3], t)


def test_learning_rate__reaches_its_peak_where_all_steps_are_warm_up():
    rates = [training.learning_rate(step, 4, 1.0, warmup=4) for step in range(4)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_captured__keeps_the_tensors_that_it_reads_and_puts_back_those_that_it_changes(monkeypatch):
    monkeypatch.setattr(torch, "cuda", unittest.mock.MagicMock())
    rows = training.schedule(1, 1.0, 1)
    total = torch.zeros(4)
    assert len(rows) >= training.WARM_UP_CALLS  # it is called so often whatever --steps says
    replay = training.captured(lambda rows=rows: total.add_(rows.sum(0)), [total], torch.Generator())
    alive = weakref.ref(rows)
    del rows
    gc.collect()
    assert alive() is not None
    assert callable(replay)
    assert not total.any()


def test_captured__returns_the_function_itself_where_capturing_fails(monkeypatch, capsys):
    cuda = unittest.mock.MagicMock()
    cuda.graph.side_effect = RuntimeError("operation not permitted when stream is capturing")
    monkeypatch.setattr(torch, "cuda", cuda)
    total = torch.zeros(1)
    generator = torch.Generator().manual_seed(3)

    def add_noise():
        total.add_(torch.rand(1, generator=generator))

    assert training.captured(add_noise, [total], generator) is add_noise
    assert "no CUDA graph here (operation not permitted" in capsys.readouterr().out
    assert not total.any()
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(3).get_state())


# ---- threads -----------------------------------------------------------------------------------------------


def test_threads__takes_the_number_that_is_fastest_now(monkeypatch):
    """Of 8: 4 where all are late, all when the machine is idle, 1 where 4 are late too."""
    n_threads = 8
    now = 0.0

    def set_num_threads(n):
        nonlocal n_threads
        n_threads = n

    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    monkeypatch.setattr(torch, "set_num_threads", set_num_threads)
    monkeypatch.setattr(training.time, "perf_counter", lambda: now)
    taken = []

    def update(seconds):
        nonlocal now
        now += seconds[n_threads]
        taken.append(n_threads)

    with training.Threads("cpu") as threads:
        for seconds, fastest in (
            ({8: 3.0, 4: 1.0, 1: 2.0}, 4),
            ({8: 0.5, 4: 1.0, 1: 2.0}, 8),
            ({8: 9.0, 4: 5.0, 1: 2.0}, 1),
        ):
            taken.clear()
            for _ in range(training.PERIOD):
                threads(update, seconds)
            n = training.TRIALS
            assert taken[: 3 * n] == [8] * n + [4] * n + [1] * n
            assert set(taken[3 * n :]) == {fastest}
    assert n_threads == 8  # what comes after is not left with one


@pytest.mark.parametrize(("device", "most"), [("cuda", 8), ("cpu", 1)])
def test_threads__leaves_one_thread_and_a_gpu_alone(device, most, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: most)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: pytest.fail("set"))
    with training.Threads(device) as threads:
        for _ in range(3 * training.PERIOD):
            threads(lambda: None)

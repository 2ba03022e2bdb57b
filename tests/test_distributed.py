"""Several processes of one job are one training: the same shares and gradients on each, and what one process with as many windows would do."""

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot  # noqa: F401 - once, before the fork
import numpy as np
import pytest
import torch
from test_resume import result

import distill
import model as dt
import teacher
from conftest import ROOT, make_dataset
from support import (
    checkpoint,
    cli,
    files,
    processes,
)

DATASETS = ("tests/job-a-v0", "tests/job-b-v0", "tests/job-c-v0")
TINY = {
    "steps": 20,
    "batch_size": 4,
    "log_interval": 7,
    "n_layer": 1,
    "n_embd": 8,
    "eval_episodes": 0,
    "device": "cpu",
    "dtype": "float32",
    "warmup": 5,
}

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["test_distributed"])


def arguments(options):
    return [
        a
        for k, v in options.items()
        for a in (
            f"--{k.replace('_', '-')}",
            *(v if isinstance(v, tuple) else () if v is True else (str(v),)),
        )
    ]


def member(rank, world, port, script, out, options):
    """One process of a job. What it knows after each update goes to OUT.RANK.npy: the shares, the update's gradient after surgery, the parameters."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"  # each call is compared with the other processes'
    for fd in (1, 2):
        os.dup2(os.open(f"{out}.{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), fd)
    torch.set_num_threads(1)
    rows, real, add_up = [], distill.learner, processes.all_reduce

    def learner(*args):
        update, distances, state = real(*args)

        def watched(step):
            update(step)
            rows.append(torch.cat([state[k].flatten() for k in ("shares", "u", "theta")]).numpy().copy())

        return watched, distances, state

    def counted(x):
        calls.append(x.numel())
        add_up(x)

    calls, distill.learner, processes.all_reduce = [], learner, counted
    distill.plot = lambda *_: None
    sys.argv = [script, *arguments({**options, "out_dir": out})]
    module = {"teacher": teacher, "distill": distill}[script]
    cli.run(module.main, module.Config, "")
    np.save(f"{out}.{rank}.npy", rows)
    np.save(f"{out}.{rank}.calls.npy", calls)
    np.save(f"{out}.{rank}.rng.npy", torch.get_rng_state().numpy())


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def job(world, script, out, **options):
    port = free_port()
    members = [
        server.Process(target=member, args=(r, world, port, script, out, options), daemon=True)
        for r in range(world)
    ]
    for p in members:
        p.start()
    for p in members:
        p.join(120)
        p.kill()  # one that hangs, after the others too had their time
    printed = [Path(f"{out}.{r}.txt").read_text() for r in range(world)]
    assert [p.exitcode for p in members] == [0] * world, printed
    return printed


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    home = tmp_path_factory.mktemp("jobs")
    for i, name in enumerate(DATASETS):
        make_dataset(name, [30, 25, 40, 20], obs_dim=3 + i, act_dim=1 + i, seed=i)
        teacher.main(teacher.Config(dataset=name, out_dir=str(home / str(i)), **{**TINY, "n_embd": 16}))
    return tuple(str(home / str(i)) for i in range(len(DATASETS)))


VARIANTS = {
    "default": {},
    "exact": {"alignment_weight": 1.0, "surgery": "previous", "surgery_scope": "teacher"},
    "argmax": {
        "surgery": "previous",
        "novelty_power": "inf",
        "alignment_weight": 1.0,
        "alignment": "estimate",
    },
    "pcgrad": {"surgery": "pcgrad", "curriculum": "dro"},
    "live": {"targets": "live", "surgery": "average", "curriculum": "uniform"},
    "host": {"data_device": "host"},
}


@pytest.mark.parametrize(("world", "variant"), [*((2, v) for v in VARIANTS), (4, "default")])
def test_processes_agree_to_the_bit_in_every_update_and_do_what_one_does_with_their_windows_together(
    world, variant, teachers, tmp_path
):
    options = {"teachers": teachers, **TINY, **VARIANTS[variant]}
    job(world, "distill", tmp_path / "many", **options)
    job(1, "distill", tmp_path / "one", **{**options, "batch_size": world * TINY["batch_size"]})
    many, one = [np.load(tmp_path / f"many.{r}.npy") for r in range(world)], np.load(tmp_path / "one.0.npy")
    assert len(one) == TINY["steps"] and np.abs(one[0] - one[-1]).max() > 0.01
    for other in many[1:]:
        assert np.array_equal(many[0], other)
    names = [n for n, x in dt.load(tmp_path / "one")[0].named_parameters() for _ in range(x.numel())]
    keys = np.array(
        ["qkv.bias" in n for n in names]
    )  # the keys' bias has no gradient but rounding, which AdamW enlarges
    P, N = len(names), len(teachers)
    for at in (slice(0, N), slice(N, N + P), slice(N + P, None)):
        difference = np.abs(many[0] - one)[:, at]
        assert (difference if at.start == 0 else difference[:, ~keys]).max() < 2e-5 * max(
            1, np.abs(one[:, at]).max()
        ), at
    a, b = (files.read_csv(tmp_path / name / "log.csv") for name in ("many", "one"))
    for k in set(a) - {"seconds", "cosine"}:
        assert np.allclose(a[k], b[k], rtol=1e-2, atol=1e-4, equal_nan=True), k
    calls = np.load(tmp_path / "many.1.calls.npy").tolist()
    if (
        variant == "default"
    ):  # an update sends its scores in one call, its gradient in another; before them, once, the targets
        assert calls[1:] == [4 * N + 1, P] * TINY["steps"]


def test_a_teacher_of_two_processes_is_that_of_one_with_both_their_windows(teachers, tmp_path):
    for dropout in (0.0, 0.1):
        job(2, "teacher", tmp_path / f"two{dropout}", dataset=DATASETS[0], dropout=dropout, **TINY)
    job(1, "teacher", tmp_path / "one", dataset=DATASETS[0], **{**TINY, "batch_size": 8})
    two, one, dropped = (files.read_csv(tmp_path / name / "log.csv") for name in ("two0.0", "one", "two0.1"))
    for k in set(one) - {"seconds"}:
        assert np.allclose(two[k], one[k], rtol=1e-4), k
    assert not np.allclose(two["nll"], dropped["nll"], rtol=1e-4)
    assert not np.array_equal(
        *(np.load(tmp_path / f"two0.1.{r}.rng.npy") for r in range(2))
    )  # each drops others


def test_rank_0_alone_writes_and_prints(teachers, tmp_path):
    printed = job(2, "distill", tmp_path / "run", teachers=teachers, **TINY)
    assert "3 teachers of" in printed[0] and printed[1] == ""
    assert files.read_json(tmp_path / "run/config.json")["processes"] == 2
    written = (tmp_path / "run/metrics.json").stat().st_mtime_ns
    printed = job(2, "distill", tmp_path / "run", teachers=teachers, **TINY)
    assert (
        printed[0].count("student is there") == 1
        and printed[1] == ""
        and (tmp_path / "run/metrics.json").stat().st_mtime_ns == written
    )


def test_a_process_that_waits_for_one_that_is_gone_ends_soon_after_it_is_asked_to(tmp_path):
    p = server.Process(
        target=member,
        args=(0, 2, free_port(), "teacher", tmp_path / "run", {"dataset": DATASETS[0], **TINY}),
        daemon=True,
    )  # rank 1 never comes
    p.start()
    p.join(2)
    began = time.monotonic()
    os.kill(p.pid, signal.SIGTERM)
    p.join(30)
    p.kill()
    assert time.monotonic() - began < 20 and p.exitcode == 143
    assert (
        "waiting for another process of this job; --resume goes on"
        in Path(f"{tmp_path}/run.0.txt").read_text()
    )


# ---- torchrun itself -------------------------------------------------------------------------------------------------


def torchrun(out, *flags, **options):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {
        "OMP_NUM_THREADS": "1"
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        *flags,
        "teacher.py",
        *arguments({**options, "out_dir": out}),
    ]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=open(f"{out}.txt", "w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def ended(p):
    try:
        p.wait(90)
    finally:
        os.killpg(p.pid, signal.SIGKILL) if p.poll() is None else None


def wait_for(there, p, seconds=90):
    began = time.monotonic()
    while not there():
        assert p.poll() is None and time.monotonic() - began < seconds
        time.sleep(0.01)


def process(rank, out):
    """The number of the job's process of this rank."""
    for d in Path("/proc").iterdir():
        try:
            if (
                d.name.isdigit()
                and f"\0RANK={rank}\0".encode() in (d / "environ").read_bytes()
                and str(out).encode() in (d / "cmdline").read_bytes()
            ):
                return int(d.name)
        except OSError:
            pass


@pytest.fixture(scope="module")
def uninterrupted(teachers, tmp_path_factory):
    home = tmp_path_factory.mktemp("torchrun")
    options = {
        **TINY,
        "dataset": DATASETS[0],
        "steps": 600,
        "checkpoint_interval": 100,
        "log_interval": 100,
        "dropout": 0.1,
    }
    job(2, "teacher", home / "run", **options)
    return options, result(home / "run")


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_job_with_a_clear_line_and_max_restarts_continues_from_the_checkpoint(
    rank, uninterrupted, tmp_path
):
    options, expected = uninterrupted
    for restarts in (0, 1):
        out = tmp_path / str(restarts)
        p = torchrun(out, f"--max-restarts={restarts}", **options)
        wait_for((out / checkpoint.Checkpoint.NAME).exists, p)
        began = time.monotonic()
        os.kill(process(rank, out), signal.SIGKILL)
        ended(p)
        printed = Path(f"{out}.txt").read_text()
        if restarts:
            assert p.returncode == 0 and re.search(r"resumed from .* after \d+00 updates", printed), printed[
                -3000:
            ]
            assert result(out) == expected
        else:
            assert p.returncode and time.monotonic() - began < 30
            assert (
                "error: another process of this job ended or can't be reached" in printed
                and "Traceback" not in printed.split("torch/distributed")[0]
            )


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes in /proc")
@pytest.mark.parametrize("who", ["torchrun", "rank 1"])
def test_sigterm_ends_all_processes_after_one_update_and_resume_goes_on_to_the_same_bits(
    who, uninterrupted, tmp_path
):
    options, expected = uninterrupted
    out = tmp_path / "run"
    p = torchrun(out, **options)
    wait_for((out / checkpoint.Checkpoint.NAME).exists, p)
    began = time.monotonic()
    os.kill(p.pid if who == "torchrun" else process(1, out), signal.SIGTERM)
    ended(p)
    assert time.monotonic() - began < 10 and "stopped after" in Path(f"{out}.txt").read_text()
    job(2, "teacher", out, resume=True, **options)
    assert result(out) == expected

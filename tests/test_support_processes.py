"""Several processes of one job are one training: they agree, and do what one process would do."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import distill
import forked
import model as dt
import report
import teacher
from conftest import ROOT, make_dataset, result, slow
from support import cli, files, processes
from support.checkpoint import Checkpoint

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


# ---- jobs of forked processes ------------------------------------------------------------------------------


def member(script, out, options, grace_seconds):
    """One process of a job, whose environment is torchrun's.

    It writes three files:
    OUT.RANK.npy        a row each update: shares, the gradient after surgery, parameters
    OUT.RANK.calls.npy  how many numbers each collective sum took
    OUT.RANK.rng.npy    the state of torch's generator at the end
    """
    processes.GRACE_SECONDS = grace_seconds
    rows = []
    calls = []
    step = distill.Learner.step
    all_reduce = processes.all_reduce

    def recorded_step(self, i):
        step(self, i)
        values = [self.state[name].flatten() for name in ("shares", "u", "theta")]
        rows.append(torch.cat(values).numpy().copy())

    def counted_all_reduce(x):
        calls.append(x.numel())
        all_reduce(x)

    def no_plots(run):
        pass

    report.plots = no_plots  # they take longer than the training
    distill.Learner.step = recorded_step
    processes.all_reduce = counted_all_reduce
    sys.argv = [script, *forked.arguments({**options, "out_dir": out})]
    module = {"teacher": teacher, "distill": distill}[script]
    cli.run(module.main, module.Config, "")
    rank = processes.rank()
    np.save(f"{out}.{rank}.npy", rows)
    np.save(f"{out}.{rank}.calls.npy", calls)
    np.save(f"{out}.{rank}.rng.npy", torch.get_rng_state().numpy())


def start_member(rank, world, port, script, out, options, grace_seconds=processes.GRACE_SECONDS):
    env = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCH_DISTRIBUTED_DEBUG": "DETAIL",  # each call is compared with the other processes'
    }
    output = f"{out}.{rank}.txt"
    return forked.start(member, script, out, options, grace_seconds, output=output, env=env)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def job(world, script, out, **options):
    """What each process of a job printed, once all have ended without an error."""
    port = free_port()
    members = [start_member(rank, world, port, script, out, options) for rank in range(world)]
    for p in members:
        p.join(120)
        p.kill()  # one that hangs, after the others too had their time
    printed = [Path(f"{out}.{rank}.txt").read_text() for rank in range(world)]
    assert [p.exitcode for p in members] == [0] * world, printed
    return printed


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """The directories of three tiny teachers."""
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
    "live": {"targets": "live", "surgery": "previous", "curriculum": "uniform"},
    "host": {"data_device": "host"},
}
OTHERS = [(2, "exact"), (2, "argmax"), (2, "pcgrad"), (2, "live"), (2, "host"), (4, "default")]


@pytest.mark.parametrize("world_and_variant", [(2, "default"), *slow(*OTHERS)], ids=str)
def test_job__agrees_to_the_bit_in_every_update_and_with_one_process(world_and_variant, teachers, tmp_path):
    """One process with as many windows as the job's together gives the same, to rounding."""
    world, variant = world_and_variant
    options = {"teachers": teachers, **TINY, **VARIANTS[variant]}
    job(world, "distill", tmp_path / "many", **options)
    job(1, "distill", tmp_path / "one", **{**options, "batch_size": world * TINY["batch_size"]})
    many = [np.load(tmp_path / f"many.{rank}.npy") for rank in range(world)]
    one = np.load(tmp_path / "one.0.npy")
    assert len(one) == TINY["steps"]
    assert np.abs(one[0] - one[-1]).max() > 0.01
    for other in many[1:]:
        assert np.array_equal(many[0], other)
    N = len(teachers)
    has_gradient = gradient_beyond_rounding(dt.load(tmp_path / "one")[0])  # (P,)
    P = len(has_gradient)
    assert_close(many[0][:, :N], one[:, :N])  # shares
    assert_close(many[0][:, N : N + P], one[:, N : N + P], has_gradient)  # gradients
    bound = 3e-5 if variant == "argmax" else 2e-5  # one teacher's windows at a time: 2.2e-5 seen
    assert_close(many[0][:, N + P :], one[:, N + P :], has_gradient, bound)  # parameters
    log_of_many = files.read_csv(tmp_path / "many/log.csv")
    log_of_one = files.read_csv(tmp_path / "one/log.csv")
    for k in set(log_of_many) - {"seconds", "cosine"}:
        assert np.allclose(log_of_many[k], log_of_one[k], rtol=1e-2, atol=1e-4, equal_nan=True), k
    if variant == "default":
        # once the targets; then an update sums its scores in one call, its gradient in another
        calls = np.load(tmp_path / "many.1.calls.npy").tolist()
        assert calls[1:] == [4 * N + 1, P] * TINY["steps"]


def gradient_beyond_rounding(model):
    """(P,) bool: not the keys' biases, whose gradient is rounding alone, which AdamW enlarges."""
    parts = [np.full(x.numel(), "qkv.bias" not in name) for name, x in dt.flat_order(model).items()]
    return np.concatenate(parts)


def assert_close(a, b, columns=slice(None), bound=2e-5):
    """Equal to rounding in these columns, in proportion to the largest of all."""
    assert np.abs(a - b)[:, columns].max() < bound * max(1, np.abs(b).max())


def test_teachers_job__learns_as_one_process_with_the_windows_of_both(teachers, tmp_path):
    job(2, "teacher", tmp_path / "two", dataset=DATASETS[0], **TINY)
    job(1, "teacher", tmp_path / "one", dataset=DATASETS[0], **{**TINY, "batch_size": 8})
    two = files.read_csv(tmp_path / "two/log.csv")
    one = files.read_csv(tmp_path / "one/log.csv")
    for k in set(one) - {"seconds"}:
        assert np.allclose(two[k], one[k], rtol=1e-4), k


def test_teachers_job__drops_other_activations_in_each_process(teachers, tmp_path):
    job(2, "teacher", tmp_path / "dropped", dataset=DATASETS[0], dropout=0.1, **TINY)
    job(2, "teacher", tmp_path / "whole", dataset=DATASETS[0], **TINY)
    dropped = files.read_csv(tmp_path / "dropped/log.csv")
    whole = files.read_csv(tmp_path / "whole/log.csv")
    assert not np.allclose(whole["nll"], dropped["nll"], rtol=1e-4)
    states = [np.load(tmp_path / f"dropped.{rank}.rng.npy") for rank in range(2)]
    assert not np.array_equal(*states)


def test_rank_0__alone_writes_and_prints(teachers, tmp_path):
    out = tmp_path / "run"
    printed = job(2, "distill", out, teachers=teachers, **TINY)
    assert "3 teachers of" in printed[0]
    assert printed[1] == ""
    assert files.read_json(out / "config.json")["processes"] == 2
    written = (out / "metrics.json").stat().st_mtime_ns
    printed = job(2, "distill", out, teachers=teachers, **TINY)
    assert printed[0].count("student is there") == 1
    assert printed[1] == ""
    assert (out / "metrics.json").stat().st_mtime_ns == written


def test_process_that_waits_for_a_missing_one__ends_soon_after_a_signal(tmp_path):
    options = {"dataset": DATASETS[0], **TINY}
    p = start_member(0, 2, free_port(), "teacher", tmp_path / "run", options, grace_seconds=1)
    p.join(1.5)  # rank 1 never comes
    start = time.monotonic()
    os.kill(p.pid, signal.SIGTERM)
    p.join(30)
    p.kill()
    assert time.monotonic() - start < 10
    assert p.exitcode == 143
    line = "waiting for another process of this job; --resume goes on"
    assert line in Path(f"{tmp_path}/run.0.txt").read_text()
    assert processes.GRACE_SECONDS == 10  # as docs/operations.md says


# ---- torchrun itself ---------------------------------------------------------------------------------------

in_proc = pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes in /proc")


def torchrun(out, *flags, **options):
    """A teacher's job of two processes, started by torchrun; it prints into OUT.txt."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *flags]
    command = [*launcher, "teacher.py", *forked.arguments({**options, "out_dir": out})]
    with open(f"{out}.txt", "w") as output:
        return subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def wait_for_end(p):
    try:
        p.wait(90)
    finally:
        if p.poll() is None:
            os.killpg(p.pid, signal.SIGKILL)


def wait_for_checkpoint(out, p):
    start = time.monotonic()
    while not (out / Checkpoint.NAME).exists():
        assert p.poll() is None
        assert time.monotonic() - start < 90
        time.sleep(0.01)


def pid_of(rank, out):
    """The number of the job's process of this rank."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environ = (folder / "environ").read_bytes()
            cmdline = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if f"\0RANK={rank}\0".encode() in environ and str(out).encode() in cmdline:
            return int(folder.name)
    raise LookupError(f"no process of rank {rank} writes to {out}")


@pytest.fixture(scope="module")
def uninterrupted(teachers, tmp_path_factory):
    """Options of a job, and what it ends with."""
    options = {
        **TINY,
        "dataset": DATASETS[0],
        "steps": 600,
        "checkpoint_interval": 100,
        "log_interval": 100,
        "dropout": 0.1,
    }
    out = tmp_path_factory.mktemp("torchrun") / "run"
    job(2, "teacher", out, **options)
    return options, result(out)


@pytest.mark.slow
@in_proc
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_process__ends_the_job_with_one_line(rank, uninterrupted, tmp_path):
    options, _ = uninterrupted
    out = tmp_path / "run"
    p = torchrun(out, "--max-restarts=0", **options)
    wait_for_checkpoint(out, p)
    start = time.monotonic()
    os.kill(pid_of(rank, out), signal.SIGKILL)
    wait_for_end(p)
    assert p.returncode
    assert time.monotonic() - start < 30
    printed = Path(f"{out}.txt").read_text()
    lines = (  # the second where torchrun asks the other to end before that has noticed
        "error: another process of this job ended or can't be reached",
        "error: asked to end, but waiting for another process of this job",
    )
    assert sum(printed.count(line) for line in lines) == 1
    assert "Traceback" not in printed.split("torch/distributed")[0]


@pytest.mark.slow
@in_proc
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_process__is_restarted_by_max_restarts_to_the_same_bits(rank, uninterrupted, tmp_path):
    options, expected = uninterrupted
    out = tmp_path / "run"
    p = torchrun(out, "--max-restarts=1", **options)
    wait_for_checkpoint(out, p)
    os.kill(pid_of(rank, out), signal.SIGKILL)
    wait_for_end(p)
    printed = Path(f"{out}.txt").read_text()
    assert p.returncode == 0, printed[-3000:]
    assert re.search(r"resumed from .* after \d+00 updates", printed), printed[-3000:]
    assert result(out) == expected


@pytest.mark.slow
@in_proc
@pytest.mark.parametrize("receiver", ["torchrun", "rank 1"])
def test_sigterm__ends_all_processes_after_one_update_and_resume_goes_on(receiver, uninterrupted, tmp_path):
    options, expected = uninterrupted
    out = tmp_path / "run"
    p = torchrun(out, **options)
    wait_for_checkpoint(out, p)
    start = time.monotonic()
    os.kill(p.pid if receiver == "torchrun" else pid_of(1, out), signal.SIGTERM)
    wait_for_end(p)
    assert time.monotonic() - start < 10
    assert "stopped after" in Path(f"{out}.txt").read_text()
    job(2, "teacher", out, resume=True, **options)
    assert result(out) == expected

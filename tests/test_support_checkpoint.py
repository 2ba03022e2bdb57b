"""Runs that are stopped, killed or find the disk full end as if nothing had happened, to the bit."""

import dataclasses
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors
import torch

import data
import distill
import forked
import teacher
from conftest import make_dataset, result, slow
from support import UserError, cli, files, minari_files, run_directory
from support.checkpoint import Checkpoint

DATASETS = ("tests/resume-a-v0", "tests/resume-b-v0")
TINY = {
    "steps": 60,
    "batch_size": 4,
    "log_interval": 7,
    "checkpoint_interval": 9,
    "n_layer": 1,
    "n_embd": 8,
    "eval_episodes": 0,
    "device": "cpu",
}
VARIANTS = {  # options of distill.py
    "student": {"surgery": "previous"},
    "pcgrad": {"surgery": "pcgrad", "curriculum": "uniform"},
    "estimate": {"surgery": "previous", "alignment_weight": 1.0, "alignment": "estimate"},
}


# ---- runs in forked processes ------------------------------------------------------------------------------


def run_cli(module, argv, kill_at):
    """What the script does, in a forked process; kill_at: arguments of die_in_writing, or None."""
    if kill_at:
        die_in_writing(*kill_at)
    sys.argv = [module.__name__, *argv]
    cli.run(module.main, module.Config, "")


def run_teacher(argv, kill_at):
    run_cli(teacher, argv, kill_at)


def run_distill(argv, kill_at):
    run_cli(distill, argv, kill_at)


def die_in_writing(name, at):
    """SIGKILL in the (at // 2)-th call of os.`name`, before it is done (at even) or after (at odd)."""
    real = getattr(os, name)
    n = 0

    def deadly(*args, **kwargs):
        nonlocal n
        n += 1
        if n == at // 2 and at % 2 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if n == at // 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(os, name, deadly)


class Run:
    """A training to start, stop and resume. options: of its script, as the fields of Config."""

    def __init__(self, script, **options):
        self.script = script
        self.options = options

    def start(self, out_dir, kill_at=None, **more):
        """Start it in a forked process that prints into OUT_DIR.txt."""
        argv = forked.arguments({**self.options, **more, "out_dir": out_dir})
        output = Path(f"{out_dir}.txt")
        output.unlink(missing_ok=True)
        return forked.start(self.script, argv, kill_at, output=output)

    def finish(self, out_dir, code=0, **more):
        """What it printed, once it has ended with this exit code."""
        p = self.start(out_dir, **more)
        p.join(60)
        printed = Path(f"{out_dir}.txt").read_text()
        assert p.exitcode == code, printed[-2000:]
        return printed


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs(name): a Run, and its result when nothing interrupts it."""
    home = tmp_path_factory.mktemp("resume")
    for i, name in enumerate(DATASETS):
        make_dataset(name, [30, 25, 40, 20], obs_dim=3 + i, act_dim=1 + i, seed=i)
        Run(run_teacher, dataset=name, **TINY).finish(home / f"teacher{i}")
    teachers = (str(home / "teacher0"), str(home / "teacher1"))
    runs = {"teacher": Run(run_teacher, dataset=DATASETS[0], dropout=0.1, **TINY)}
    for name, options in VARIANTS.items():
        runs[name] = Run(run_distill, teachers=teachers, **options, **TINY)

    @functools.cache
    def run_and_result(name):
        runs[name].finish(home / name)
        return runs[name], result(home / name)

    return run_and_result


# ---- stopped and killed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["teacher", "student", *slow("pcgrad", "estimate")])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_stopped_run__resumes_to_the_same_bits(runs, name, signum, tmp_path):
    run, expected = runs(name)
    out = tmp_path / "run"
    p = run.start(out)
    while not (out / "log.csv").exists():
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.1))
    start = time.monotonic()
    os.kill(p.pid, signum)
    p.join(30)
    printed = Path(f"{out}.txt").read_text()
    assert time.monotonic() - start < 5
    assert p.exitcode in (128 + signum, 0), printed[-2000:]
    if p.exitcode:
        assert f"({signum.name})" in printed
        after_the_last_update = "step 60/60" in printed
        assert "--resume" in printed or after_the_last_update or not (out / Checkpoint.NAME).exists()
    run.finish(out, resume=True)
    assert result(out) == expected
    assert not (out / Checkpoint.NAME).exists()


@pytest.mark.parametrize("name", ["teacher", "student"])
@pytest.mark.parametrize("n_kills", [3, *slow(25)])
def test_killed_run__resumes_to_the_same_bits(runs, name, n_kills, tmp_path):
    """SIGKILL at moments spread over a whole run, from before its first file to after its last."""
    run, expected = runs(name)
    start = time.monotonic()
    run.finish(tmp_path / "whole")
    seconds = time.monotonic() - start
    rng = random.Random(name)
    kills = 0
    while kills < n_kills:
        out = tmp_path / f"run{kills}"
        while kills < n_kills:
            p = run.start(out, resume=True)
            p.join(rng.uniform(0, 1.1 * seconds))
            if p.exitcode is not None:
                break
            p.kill()
            p.join()
            kills += 1
        run.finish(out, resume=True)
        assert result(out) == expected


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("at", [6, 7, *slow(2, 3, 4, 5, 8, 9, 10, 11)])
def test_run_killed_in_writing_a_file__resumes_to_the_same_bits(runs, call, at, tmp_path):
    run, expected = runs("teacher")
    p = run.start(tmp_path / "run", kill_at=(call, at))
    p.join(30)
    assert p.exitcode == -signal.SIGKILL
    run.finish(tmp_path / "run", resume=True)
    assert result(tmp_path / "run") == expected
    assert not list((tmp_path / "run").glob("*.tmp"))


@pytest.fixture
def killed(runs, tmp_path):
    """The teacher's run, and a folder where it was killed after its second checkpoint's flush."""
    run, _ = runs("teacher")
    out = tmp_path / "run"
    run.start(out, kill_at=("replace", 6)).join(30)
    return run, out


def test_resume__says_that_it_resumes(killed):
    run, out = killed
    assert "resumed from" in run.finish(out, resume=True)


def test_resume__begins_anew_where_there_is_nothing_to_resume(runs, tmp_path):
    run, _ = runs("teacher")
    assert "resumed from" not in run.finish(tmp_path / "other", resume=True)


def test_resume__refuses_other_settings(killed):
    run, out = killed
    printed = run.finish(out, code=2, resume=True, lr=0.5)
    assert re.search(r"an unfinished run with other settings \(lr .*\)", printed)


def test_resume__refuses_other_data(killed):
    run, out = killed
    make_dataset("tests/resume-other-v0", [30, 25, 40, 20], obs_dim=3, act_dim=1, seed=5)
    settings = files.read_json(out / "config.json") | {"dataset": "tests/resume-other-v0"}
    files.write_json(out / "config.json", settings)
    printed = run.finish(out, code=2, resume=True, dataset="tests/resume-other-v0")
    assert "was written for other data; --overwrite in place of --resume begins anew" in printed


def test_resume__refuses_damaged_files(killed):
    run, out = killed
    checkpoint = out / Checkpoint.NAME
    blob = checkpoint.read_bytes()
    checkpoint.write_bytes(blob[:-100])
    assert "is damaged" in run.finish(out, code=2, resume=True)
    checkpoint.write_bytes(blob)
    (out / "log.csv").write_text("step\n")
    assert "shorter than its checkpoint says" in run.finish(out, code=2, resume=True)


def test_unfinished_run__is_not_overwritten_unless_asked(killed):
    run, out = killed
    assert "holds an unfinished run" in run.finish(out, code=2)
    assert (out / Checkpoint.NAME).exists()
    run.finish(out, overwrite=True)
    assert not (out / Checkpoint.NAME).exists()
    assert files.read_json(out / "metrics.json")


def test_resume_with_overwrite__goes_on_with_the_same_settings_and_begins_anew_with_others(tmp_path):
    cfg = teacher.Config(out_dir=str(tmp_path), device="cpu", resume=True, overwrite=True)
    checkpoint = tmp_path / Checkpoint.NAME
    run_directory.start(tmp_path, cfg)
    checkpoint.write_bytes(b"")
    assert run_directory.start(tmp_path, cfg)
    assert checkpoint.exists()
    assert run_directory.start(tmp_path, dataclasses.replace(cfg, lr=0.5))
    assert not checkpoint.exists()


# ---- two runs in one directory -----------------------------------------------------------------------------


def test_second_run_in_a_directory__names_the_first_but_not_a_dead_one(runs, tmp_path):
    run, expected = runs("teacher")
    out = tmp_path / "run"
    p = run.start(out, steps=100_000, checkpoint_interval=100_000)  # it leaves no checkpoint to resume
    while not (out / "log.csv").exists():
        time.sleep(0.01)
    os.kill(p.pid, signal.SIGSTOP)
    assert f"another run is at it (process {p.pid} on" in run.finish(out, code=2)
    p.kill()
    p.join()
    run.finish(out)
    assert result(out) == expected


# ---- data --------------------------------------------------------------------------------------------------


def collect_and_read(home):
    """Collect a small built-in dataset if it is missing, read it, and write down how many steps it holds."""
    os.environ["MINARI_DATASETS_PATH"] = str(home / "minari")
    minari_files.CACHE = home / "cache"
    dataset = data.dataset_id("hopper")
    if not (home / "minari" / dataset).exists():
        data.collect_if_missing(dataset, 2000)
    arrays, _ = minari_files.read(dataset)
    (home / "steps").write_text(str(arrays["lengths"].sum()))


@pytest.mark.parametrize("n_kills", [2, *slow(5)])
def test_killed_collector__leaves_nothing_that_is_taken_for_a_whole_dataset(n_kills, tmp_path):
    rng = random.Random(0)
    longest = 0.3  # seconds that a collector needs
    steps = set()
    for i in range(1 + n_kills):
        home = tmp_path / str(i)
        home.mkdir()
        p = forked.start(collect_and_read, home, output=home / "output")
        p.join(rng.uniform(0, longest) if i else None)
        p.kill()
        p.join()
        start = time.monotonic()
        p = forked.start(collect_and_read, home, output=home / "output")
        p.join()
        longest = max(longest, time.monotonic() - start)
        assert p.exitcode == 0, (home / "output").read_text()
        assert not list((home / "minari").glob(".collect-*"))
        steps.add(int((home / "steps").read_text()))
    assert len(steps) == 1
    assert steps.pop() >= 2000


# ---- the disk ----------------------------------------------------------------------------------------------


def train_here(run, out_dir):
    """The teacher's training in this process."""
    torch.set_num_threads(1)
    return teacher.main(teacher.Config(out_dir=str(out_dir), **run.options))


def call_before_checkpoints(monkeypatch, function):
    """Have function(step) called after every update, before a checkpoint is written."""
    real = Checkpoint.after

    def after(self, step):
        function(step)
        return real(self, step)

    monkeypatch.setattr(Checkpoint, "after", after)


def test_full_disk__costs_checkpoints_and_nothing_else(runs, tmp_path, monkeypatch, capsys):
    run, expected = runs("teacher")
    real = os.fsync
    n = 0

    def full_for_a_while(fd):
        nonlocal n
        n += 1
        if 3 <= n < 6:
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", full_for_a_while)
    train_here(run, tmp_path / "run")
    reason = "No space left on device; choose another --out-dir or free the space"
    assert capsys.readouterr().err.count(f"{reason}; the run goes on without this checkpoint") == 3
    assert result(tmp_path / "run") == expected


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 KB."""
    path = tmp_path / "disk"
    path.mkdir()
    sudo = ["sudo", "-n"] if os.environ.get("CI") and os.geteuid() and shutil.which("sudo") else []
    mount = [*sudo, "mount", "-t", "tmpfs", "-o", "size=400k,mode=1777", "tmpfs", path]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield path
    subprocess.run([*sudo, "umount", "-l", path], check=True)


def test_really_full_disk__keeps_the_earlier_checkpoint(runs, small_disk, monkeypatch, capsys):
    run, expected = runs("teacher")
    saved = []

    def fill_and_free(step):
        if step == 10:
            fill(small_disk / "filler")
        if step == 40:
            with safetensors.safe_open(small_disk / "run" / Checkpoint.NAME, "pt") as f:
                saved.append(json.loads(f.metadata()["about"])["step"])
            (small_disk / "filler").unlink()

    call_before_checkpoints(monkeypatch, fill_and_free)
    train_here(run, small_disk / "run")
    assert saved == [9]
    assert capsys.readouterr().err.count("checkpoint.safetensors: No space left on device") == 3
    assert result(small_disk / "run") == expected


def fill(path):
    """Write to path until the disk is full."""
    with pytest.raises(OSError, match="No space left"), open(path, "wb", buffering=0) as f:
        while f.write(bytes(1024)):
            pass


def test_directory_lost_during_a_run__is_made_again_with_the_checkpoint(runs, tmp_path, monkeypatch):
    run, (weights, _) = runs("teacher")

    def lose(step):
        if step == 20:
            os.rename(tmp_path / "run", tmp_path / "lost")

    call_before_checkpoints(monkeypatch, lose)
    train_here(run, tmp_path / "run")
    assert result(tmp_path / "run")[0] == weights


def test_directory_that_becomes_read_only__has_its_model_kept_elsewhere(runs, tmp_path, monkeypatch, capsys):
    """Root can write anywhere: so the refusal is planted."""
    run, _ = runs("teacher")
    out = tmp_path / "run"
    real = open

    def refuse(path, mode="r", *args, **kwargs):
        if str(path).startswith(str(out)) and mode != "r" and (out / Checkpoint.NAME).exists():
            raise OSError(30, "Read-only file system")
        return real(path, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refuse)
        with pytest.raises(UserError, match="Read-only file system.*what could not be written there is in "):
            train_here(run, out)
    assert "the run goes on without this checkpoint" in capsys.readouterr().err
    assert (out / Checkpoint.NAME).exists()

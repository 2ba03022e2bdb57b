"""Nothing lost: what is killed goes on from its last checkpoint and ends as if nothing had been."""

import dataclasses
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot  # noqa: F401 - once, before the fork
import pytest
import safetensors
import torch

import data
import distill
import teacher
from conftest import make_dataset
from support import (
    UserError,
    checkpoint,
    cli,
    files,
    log,
    minari_files,
    run_directory,
)

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

# A clean process that has imported everything, from which every run is forked: a run then begins in milliseconds.
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["test_resume"])


SCRIPTS = {"teacher": teacher, "distill": distill}


def child(printed, script, argv, inject):
    out = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(1)
    if inject:
        die_in_writing(*inject)
    sys.argv = [script, *argv]
    cli.run(SCRIPTS[script].main, SCRIPTS[script].Config, "")


def die_in_writing(call, at):
    """SIGKILL in the at-th call of os.`call` by run.write, before (even) or after (odd) it is done."""
    real, n = getattr(os, call), [0]

    def deadly(*args, **kwargs):
        n[0] += 1
        if n[0] == at // 2 and at % 2 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if n[0] == at // 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(os, call, deadly)


def launch(script, out_dir, inject=None, **options):
    argv = []
    for k, v in {**options, "out_dir": out_dir}.items():
        argv += [f"--{k.replace('_', '-')}", *(v if isinstance(v, tuple) else () if v is True else (str(v),))]
    p = server.Process(target=child, args=(f"{out_dir}.txt", script, argv, inject), daemon=True)
    p.start()
    return p


def ended(script, out_dir, code=0, **options):
    """The run's output, once it has ended with this exit code."""
    p = launch(script, out_dir, **options)
    p.join(60)
    printed = Path(f"{out_dir}.txt").read_text()
    assert p.exitcode == code, printed[-2000:]
    return printed


def result(out_dir):
    """What a run ends with: its weights' bytes, and its log without the column of seconds."""
    rows = [line.split(",") for line in (out_dir / "log.csv").read_text().splitlines()]
    seconds = rows[0].index("seconds")
    return (out_dir / "model.safetensors").read_bytes(), [r[:seconds] + r[seconds + 1 :] for r in rows]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: (script, options)}, each with an uninterrupted run beside it in the folder that is also returned."""
    home = tmp_path_factory.mktemp("resume")
    for i, name in enumerate(DATASETS):
        make_dataset(name, [30, 25, 40, 20], obs_dim=3 + i, act_dim=1 + i, seed=i)
        ended("teacher", home / f"teacher{i}", dataset=name, **TINY)
    teachers = (str(home / "teacher0"), str(home / "teacher1"))
    runs = {
        "teacher": ("teacher", {"dataset": DATASETS[0], "dropout": 0.1, **TINY}),
        "student": ("distill", {"teachers": teachers, "surgery": "previous", **TINY}),
        "pcgrad": ("distill", {"teachers": teachers, "surgery": "pcgrad", "curriculum": "uniform", **TINY}),
        "estimate": (
            "distill",
            {
                "teachers": teachers,
                "alignment_weight": 1.0,
                "alignment": "estimate",
                "surgery": "average",
                **TINY,
            },
        ),
    }
    for name, (script, options) in runs.items():
        ended(script, home / name, **options)
    return home, runs


@pytest.mark.parametrize("name", ["teacher", "student", "pcgrad", "estimate"])
@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_end_and_resumed_equals_one_that_was_not_to_the_bit(
    runs, name, asked, tmp_path
):
    home, (script, options) = runs[0], runs[1][name]
    out = tmp_path / "run"
    p = launch(script, out, **options)
    while not (out / "log.csv").exists():
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.2))
    began = time.monotonic()
    os.kill(p.pid, asked)
    p.join(30)
    printed = Path(f"{out}.txt").read_text()
    assert time.monotonic() - began < 5 and p.exitcode in (128 + asked, 0), printed[-2000:]
    if p.exitcode:
        assert f"({asked.name})" in printed and (
            "--resume" in printed or not (out / checkpoint.Checkpoint.NAME).exists()
        )
    ended(script, out, resume=True, **options)
    assert result(out) == result(home / name) and not (out / checkpoint.Checkpoint.NAME).exists()


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_killed_at_any_moment_a_run_resumes_and_ends_the_same(runs, name, tmp_path):
    """25 SIGKILLs, at moments spread over a whole run, from before its first file to after its last."""
    home, (script, options) = runs[0], runs[1][name]
    began = time.monotonic()
    ended(script, tmp_path / "whole", **options)
    whole, killed, rng, outs = time.monotonic() - began, 0, random.Random(name), []
    while killed < 25:
        out = tmp_path / f"run{killed}"
        outs.append(out)
        while killed < 25:
            p = launch(script, out, resume=True, **options)
            p.join(rng.uniform(0, 1.1 * whole))
            if p.exitcode is not None:
                break
            p.kill()
            p.join()
            killed += 1
        ended(script, out, resume=True, **options)
    assert all(result(out) == result(home / name) for out in outs)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("at", range(2, 12))
def test_killed_at_any_stage_of_writing_a_file_a_run_resumes_and_ends_the_same(runs, call, at, tmp_path):
    home, (script, options) = runs[0], runs[1]["teacher"]
    p = launch(script, tmp_path / "run", inject=(call, at), **options)
    p.join(30)
    assert p.exitcode == -signal.SIGKILL
    ended(script, tmp_path / "run", resume=True, **options)
    assert result(tmp_path / "run") == result(home / "teacher")
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_resumed_run_says_so_and_one_begun_anew_too(runs, tmp_path):
    script, options = runs[1]["teacher"]
    p = launch(
        script, tmp_path / "run", inject=("replace", 6), **options
    )  # after the second checkpoint's flush
    p.join(30)
    assert "resumed from" in ended(script, tmp_path / "run", resume=True, **options)
    assert "resumed from" not in ended(
        script, tmp_path / "other", resume=True, **options
    )  # nothing there to resume: from the beginning


def test_a_checkpoint_of_other_settings_other_data_or_damaged_is_not_resumed(runs, tmp_path):
    script, options = runs[1]["teacher"]
    launch(script, tmp_path / "run", inject=("replace", 6), **options).join(30)
    assert re.search(
        r"an unfinished run with other settings \(lr .*\)",
        ended(script, tmp_path / "run", code=2, resume=True, **{**options, "lr": 0.5}),
    )
    checkpoint = tmp_path / "run" / checkpoint.Checkpoint.NAME
    blob = checkpoint.read_bytes()
    checkpoint.write_bytes(blob[:-100])
    assert "is damaged" in ended(script, tmp_path / "run", code=2, resume=True, **options)
    checkpoint.write_bytes(blob)
    (tmp_path / "run/log.csv").write_text("step\n")
    assert "shorter than its checkpoint says" in ended(
        script, tmp_path / "run", code=2, resume=True, **options
    )
    assert (
        "holds an unfinished run" in ended(script, tmp_path / "run", code=2, **options)
        and checkpoint.exists()
    )
    ended(script, tmp_path / "run", overwrite=True, **options)
    assert not checkpoint.exists() and files.read_json(tmp_path / "run/metrics.json")


def test_resume_with_overwrite_goes_on_with_the_same_settings_and_begins_anew_with_others(tmp_path):
    cfg, checkpoint = (
        teacher.Config(out_dir=str(tmp_path), device="cpu", resume=True, overwrite=True),
        tmp_path / checkpoint.Checkpoint.NAME,
    )
    run_directory.start(tmp_path, cfg)
    checkpoint.write_bytes(b"")
    assert run_directory.start(tmp_path, cfg) and checkpoint.exists()
    assert run_directory.start(tmp_path, dataclasses.replace(cfg, lr=0.5)) and not checkpoint.exists()


# ---- data ------------------------------------------------------------------------------------------------------------


def collector(home):
    """Collects a small built-in dataset if it is not there, reads it, and says how many steps it holds."""
    os.environ["MINARI_DATASETS_PATH"], minari_files.CACHE = str(home / "minari"), home / "cache"
    if not (home / "minari" / data.dataset_id("hopper")).exists():
        data.collect_if_missing("hopper", 2000)
    arrays, _ = minari_files.read(data.dataset_id("hopper"))
    (home / "steps").write_text(str(arrays["lengths"].sum()))


def test_a_killed_collector_leaves_nothing_that_is_taken_for_whole(tmp_path):
    rng, whole, steps = random.Random(0), 1.0, set()
    for i in range(6):
        home = tmp_path / str(i)
        home.mkdir()
        p = server.Process(target=collector, args=(home,), daemon=True)
        p.start()
        p.join(rng.uniform(0, whole) if i else None)
        p.kill()
        p.join()
        began = time.monotonic()
        p = server.Process(target=collector, args=(home,), daemon=True)
        p.start()
        p.join()
        whole = max(whole, time.monotonic() - began)
        assert p.exitcode == 0 and not list((home / "minari").glob(".collect-*"))
        steps.add((home / "steps").read_text())
    assert len(steps) == 1 and int(*steps) >= 2000


# ---- two runs in one directory ---------------------------------------------------------------------------------------


def test_a_second_run_in_one_directory_says_so_and_a_dead_ones_lock_is_taken_over(runs, tmp_path):
    script, options = runs[1]["teacher"]
    p = launch(script, tmp_path / "run", **{**options, "steps": 100_000})
    while not (tmp_path / "run/log.csv").exists():
        time.sleep(0.01)
    os.kill(p.pid, signal.SIGSTOP)
    assert f"another run is at it (process {p.pid} on" in ended(script, tmp_path / "run", code=2, **options)
    p.kill()
    p.join()
    ended(script, tmp_path / "run", **options)
    assert result(tmp_path / "run") == result(runs[0] / "teacher")


# ---- the disk --------------------------------------------------------------------------------------------------------


def full(monkeypatch, after):
    """From the after-th flush on, for three times, the disk is full."""
    real, n = os.fsync, [0]

    def fsync(fd):
        n[0] += 1
        if after <= n[0] < after + 3:
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)


def in_process(out, **options):
    torch.set_num_threads(1)
    return teacher.main(teacher.Config(out_dir=str(out), **options))


def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_nothing_else(
    runs, tmp_path, monkeypatch, capsys
):
    home, (_, options) = runs[0], runs[1]["teacher"]
    full(monkeypatch, 3)
    in_process(tmp_path / "run", **options)
    said = capsys.readouterr().err
    assert (
        said.count(
            "No space left on device; choose another --out-dir or free the space; the run goes on without this checkpoint"
        )
        == 3
    )
    assert result(tmp_path / "run") == result(home / "teacher")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 KB."""
    path = tmp_path / "disk"
    path.mkdir()
    if (
        sys.platform != "linux"
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", path], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a file system is not allowed here")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def test_on_a_disk_that_is_really_full_for_a_while_the_earlier_checkpoint_stays_and_the_run_ends_the_same(
    runs, small_disk, monkeypatch, capsys
):
    home, (_, options) = runs[0], runs[1]["teacher"]
    real, at = checkpoint.Checkpoint.after, []

    def after(self, step):
        if step == 10:
            with (
                pytest.raises(OSError, match="No space left"),
                open(small_disk / "filler", "wb", buffering=0) as f,
            ):
                while f.write(bytes(1024)):
                    pass
        if step == 40:
            with safetensors.safe_open(small_disk / "run" / checkpoint.Checkpoint.NAME, "pt") as f:
                at.append(json.loads(f.metadata()["about"])["step"])
            (small_disk / "filler").unlink()
        return real(self, step)

    monkeypatch.setattr(checkpoint.Checkpoint, "after", after)
    in_process(small_disk / "run", **options)
    said = capsys.readouterr().err
    assert at == [9] and said.count("checkpoint.safetensors: No space left on device") == 3
    assert result(small_disk / "run") == result(home / "teacher")


def test_rows_that_find_no_room_wait_for_it(tmp_path, monkeypatch, capsys):
    log, real = log.Log(tmp_path / "log.csv"), open
    log.row(a=1)
    log.flush()
    monkeypatch.setattr(
        "builtins.open", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    for i in (2, 3):
        log.row(a=i)
        log.flush()
    monkeypatch.setattr("builtins.open", real)
    assert capsys.readouterr().err.count("its rows wait for room") == 1
    log.row(a=4)
    log.flush()
    assert (tmp_path / "log.csv").read_text().split() == ["a", "1", "2", "3", "4"]


def test_a_directory_lost_in_mid_run_is_made_again_with_the_checkpoint(runs, tmp_path, monkeypatch):
    home, (_, options) = runs[0], runs[1]["teacher"]
    real = checkpoint.Checkpoint.after

    def after(self, step):
        if step == 20:
            os.rename(tmp_path / "run", tmp_path / "lost")
        return real(self, step)

    monkeypatch.setattr(checkpoint.Checkpoint, "after", after)
    in_process(tmp_path / "run", **options)
    assert result(tmp_path / "run")[0] == result(home / "teacher")[0]


def test_a_directory_that_becomes_read_only_keeps_the_model_elsewhere(runs, tmp_path, monkeypatch, capsys):
    """root can write anywhere: so the refusal is planted."""
    options, real = runs[1]["teacher"][1], open
    out = tmp_path / "run"

    def refuse(path, mode="r", *args, **kwargs):
        if str(path).startswith(str(out)) and mode != "r" and (out / checkpoint.Checkpoint.NAME).exists():
            raise OSError(30, "Read-only file system")
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match="Read-only file system.*what could not be written there is in "):
        in_process(out, **options)
    monkeypatch.setattr("builtins.open", real)
    assert (
        "the run goes on without this checkpoint" in capsys.readouterr().err
        and (out / checkpoint.Checkpoint.NAME).exists()
    )

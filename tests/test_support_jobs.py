"""Trainings side by side: their lines, their failures, and how they end."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import distill
import forked
import teacher
from conftest import ROOT, make_dataset, result
from support import UserError, cli, files, jobs
from support.checkpoint import Checkpoint

CONFIG = distill.Config(teacher_steps=40, eval_episodes=0, device="cpu", dtype="float32")
DATASETS = ("tests/side-a-v0", "tests/side-b-v0", "tests/side-c-v0")
TINY = "--steps 5 --batch-size 4 --n-embd 8 --eval-episodes 0 --device cpu --dtype float32"


def test_options_of__are_those_that_distill_says_of_teachers_trained_first():
    cfg = dataclasses.replace(CONFIG, teacher_top=0.5, top=0.2, imports=("math",))
    options = teacher.options_of(cfg, DATASETS[0])
    assert teacher.Config(**options) == teacher.Config(
        dataset=DATASETS[0],
        steps=40,
        top=0.5,
        eval_episodes=0,
        device="cpu",
        dtype="float32",
        imports=("math",),
    )


# ---- small scripts -----------------------------------------------------------------------------------------


def script(code):
    """The interpreter's arguments for a script that says step 3/10, then runs this code."""
    return ["-c", f"import os, sys, time; print('step 3/10 | loss'); {code}"]


def test_run__reports_each_failure_and_lets_the_others_go_on(capsys):
    commands = {
        "mistaken": script("print('error: --lr -1: must be at least 0'); print('last'); sys.exit(2)"),
        "broken": script("1 / 0"),
        "killed": script("os.kill(os.getpid(), 9)"),
        "silent": ["-c", "raise SystemExit(7)"],
        "well": script("time.sleep(0.5); print('step 10/10')"),
    }
    assert jobs.run(commands, [{}] * 2, 10) == {
        "mistaken": "--lr -1: must be at least 0",
        "broken": "ZeroDivisionError: division by zero",
        "killed": "killed by SIGKILL",
        "silent": "exit code 7",
    }
    printed = capsys.readouterr().out.splitlines()
    assert "mistaken  error: --lr -1: must be at least 0" in printed
    assert printed[-1] == "well      step 10/10"


def test_run__gives_each_slot_to_one_script_at_a_time(tmp_path):
    code = f"f = '{tmp_path}/' + os.environ['SLOT']; open(f, 'x'); time.sleep(0.2); os.remove(f)"
    names = [str(i) for i in range(5)]
    assert jobs.run(dict.fromkeys(names, script(code)), [{"SLOT": "x"}, {"SLOT": "y"}], 10) == {}


def test_run__starts_processes_that_are_no_part_of_the_job(monkeypatch, capsys):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.setenv(name, "0")
    code = "print([k for k in os.environ if 'RANK' in k or 'WORLD' in k or 'RESTART' in k])"
    jobs.run({"one": script(code)}, [{}], 10)
    assert "one  []" in capsys.readouterr().out


@dataclasses.dataclass
class NoOptions:
    pass


def run_two(folder, code):
    """In its own process, two scripts side by side: `code`, their process number into folder/NAME, sleep."""

    def main(cfg):
        commands = {}
        for name in ("one", "two", "waiting"):
            write = f"open('{folder}/{name}', 'w').write(str(os.getpid()))"
            commands[name] = script(f"{code}; {write}; [time.sleep(1) for _ in range(60)]")
        jobs.run(commands, [{}] * 2, 10)

    sys.argv = ["run_two"]
    cli.run(main, NoOptions, "")


def started(folder, code, output):
    """The process of `run_two`, and those that it has started."""
    p = forked.start(run_two, folder, code, output=output)
    wait_until(lambda: all((folder / n).exists() and (folder / n).read_text() for n in ("one", "two")))
    return p, [int((folder / name).read_text()) for name in ("one", "two")]


def wait_until(condition, seconds=60):
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds
        time.sleep(0.02)


def runs(pid):
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


in_proc = pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes in /proc")
ENDS = "import signal; signal.signal(15, lambda *_: (print('checkpoint'), sys.exit(143)))"
STUBBORN = "import signal; signal.signal(15, lambda *_: print('no'))"


@in_proc
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal__lets_each_script_end_by_itself_and_starts_no_more(tmp_path, signum):
    p, children = started(tmp_path, ENDS, tmp_path / "output")
    os.kill(p.pid, signum)
    p.join(10)
    assert p.exitcode == 128 + signum
    assert not any(map(runs, children))
    assert not (tmp_path / "waiting").exists()
    printed = (tmp_path / "output").read_text()
    assert "one      checkpoint" in printed
    assert "two      checkpoint" in printed


@in_proc
def test_second_signal__kills_scripts_that_do_not_end(tmp_path):
    p, children = started(tmp_path, STUBBORN, tmp_path / "output")
    os.kill(p.pid, signal.SIGTERM)
    wait_until(lambda: (tmp_path / "output").read_text().count("no") == 2)
    assert all(map(runs, children))
    os.kill(p.pid, signal.SIGTERM)
    p.join(10)
    assert p.exitcode == 143
    assert not any(map(runs, children))


@in_proc
def test_killed_parent__leaves_no_script_behind(tmp_path):
    code = f"sys.path.insert(0, '{ROOT}'); from support import jobs; jobs.end_with_parent()"
    p, children = started(tmp_path, code, tmp_path / "output")
    os.kill(p.pid, signal.SIGKILL)
    wait_until(lambda: not any(map(runs, children)))


def test_end_with_parent__does_nothing_in_a_process_that_a_user_starts(monkeypatch):
    monkeypatch.delenv(jobs.IS_JOB, raising=False)
    monkeypatch.setattr(os, "read", None)
    jobs.end_with_parent()


# ---- slots -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "n_jobs", "cores", "expected"),
    [
        (3, 0, 2, ["1", "1", "1"]),  # all at once: two would leave a core idle for half of the time
        (4, 0, 2, ["1", "1"]),
        (2, 0, 8, ["4", "4"]),
        (1, 0, 8, ["8"]),
        (3, 0, 1, ["1"]),
        (3, 2, 8, ["4", "4"]),
        (2, 5, 8, ["4", "4"]),
        (0, 0, 2, []),
    ],
)
def test_job_slots__share_out_the_cores(monkeypatch, n, n_jobs, cores, expected):
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    slots = teacher.job_slots(distill.Config(device="cpu", jobs=n_jobs), n)
    assert slots == [{"OMP_NUM_THREADS": threads} for threads in expected]


@pytest.mark.parametrize(
    ("device", "n_jobs", "variables", "expected"),
    [
        ("cuda", 0, {}, ["0", "1"]),
        ("auto", 3, {}, ["0", "1", "0"]),
        ("cuda", 0, {"CUDA_VISIBLE_DEVICES": "4,6"}, ["4", "6"]),
        ("cuda", 0, {"LOCAL_RANK": "1"}, ["1"]),  # of a torchrun job
        ("cuda:1", 2, {}, [None, None]),  # the one that the user names
    ],
)
def test_job_slots__share_out_the_gpus(monkeypatch, device, n_jobs, variables, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    slots = teacher.job_slots(distill.Config(device=device, jobs=n_jobs), 5)
    assert [slot.get("CUDA_VISIBLE_DEVICES") for slot in slots] == expected


def test_jobs__may_not_be_negative():
    with pytest.raises(UserError, match="--jobs -1: must be at least 0"):
        distill.Config(jobs=-1).check()


# ---- teachers ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_turn(tmp_path_factory):
    """A folder with the teachers of all tasks but the last, trained in turn."""
    home = tmp_path_factory.mktemp("in-turn")
    for i, name in enumerate(DATASETS[:2]):
        make_dataset(name, [9, 1, 23, 4, 12, 7], obs_dim=3 + i, act_dim=1 + i, seed=i)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        teacher.train_missing(dataclasses.replace(CONFIG, jobs=1), list(DATASETS[:2]))
    return home


def teacher_of(name, home):
    return home / teacher.directory(name)


def assert_same_teachers(home, in_turn):
    for name in DATASETS[:2]:
        assert result(teacher_of(name, home)) == result(teacher_of(name, in_turn))


def test_teachers_side_by_side__are_those_of_training_in_turn_and_one_that_fails_loses_none(
    in_turn, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    missing = (
        f"no teacher of {DATASETS[2]} \\(dataset {DATASETS[2]} is not in .*the same command with --resume"
    )
    with pytest.raises(UserError, match=missing):
        teacher.train_missing(dataclasses.replace(CONFIG, jobs=3), list(DATASETS))
    printed = capsys.readouterr().out
    assert f"{DATASETS[1]}  step 40/40 | nll" in printed
    assert "Traceback" not in printed
    assert_same_teachers(tmp_path, in_turn)


@in_proc
@pytest.mark.slow
def test_stopped_training_side_by_side__resumes_to_the_same_bits(in_turn, tmp_path):
    names = " ".join(DATASETS[:2])
    command = f"distill.py --datasets {names} --teacher-steps 40 --jobs 2 --checkpoint-interval 1 {TINY}"
    with open(tmp_path / "output", "w") as output:
        p = subprocess.Popen(
            [sys.executable, ROOT / command.split()[0], *command.split()[1:]],
            cwd=tmp_path,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    checkpoints = [teacher_of(name, tmp_path) / Checkpoint.NAME for name in DATASETS[:2]]
    wait_until(lambda: all(path.exists() for path in checkpoints))
    os.killpg(p.pid, signal.SIGINT)  # as Ctrl-C in a terminal
    assert p.wait(10) == 130
    printed = (tmp_path / "output").read_text()
    assert printed.count("; the same command with --resume goes on from there") == 2
    printed = forked.python(f"{command} --resume", tmp_path)
    assert printed.count("resumed from") == 2
    assert_same_teachers(tmp_path, in_turn)


def torchrun(command, home):
    """Exit code of a job of two processes, and what it printed."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script, *options = command.split()
    p = subprocess.run(
        [*launcher, ROOT / script, *options],
        cwd=home,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return p.returncode, p.stdout


@pytest.mark.slow
def test_torchrun__shares_out_the_missing_teachers(in_turn, tmp_path):
    code, printed = torchrun(
        f"distill.py --datasets {' '.join(DATASETS[:2])} --teacher-steps 40 {TINY}", tmp_path
    )
    assert code == 0, printed
    for name in DATASETS[:2]:
        assert files.read_json(teacher_of(name, tmp_path) / "config.json")["processes"] == 1
    assert files.read_json(tmp_path / "out/student/config.json")["processes"] == 2
    assert_same_teachers(tmp_path, in_turn)


@pytest.mark.slow
@pytest.mark.parametrize("broken", [0, 1])  # rank
def test_torchrun__ends_all_processes_with_the_line_of_a_teacher_that_fails(in_turn, tmp_path, broken):
    names = [DATASETS[1], DATASETS[1]]
    names[broken] = DATASETS[2]
    code, printed = torchrun(f"distill.py --datasets {' '.join(names)} --teacher-steps 40 {TINY}", tmp_path)
    assert code == 1
    assert printed.count(f"error: no teacher of {DATASETS[2]} (dataset ") == 2
    assert "Traceback" not in printed.split("torch/distributed")[0]
    assert (teacher_of(DATASETS[1], tmp_path) / "metrics.json").exists()

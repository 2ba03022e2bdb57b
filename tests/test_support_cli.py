"""The command line: --help, errors in one line, exit codes."""

import dataclasses
import importlib
import re
import subprocess
import sys

import pytest
import torch

import data
import distill
import forked
from conftest import ROOT
from support import UserError, cli, machine, signals

SCRIPTS = [
    "data",
    "teacher",
    "distill",
    "evaluate",
    "export",
    "report",
    "research.study",
    "research.bench",
    "research.behaviour",
]


def help_of(script, cwd):
    """{option or metavar: its text} of `--help`, without the defaults."""
    command = f"-m {script}" if "." in script else f"{script}.py"
    printed = forked.python(f"{command} --help", cwd, COLUMNS="400")
    boxes = re.findall(r"╭─ .*? ─+╮\n(.*?)╰", printed, re.S)
    entries = re.split(r"^│ (?! )", "".join(boxes), flags=re.M)[1:]
    texts = {}
    for entry in entries:
        option, _, text = entry.replace("│\n│", " ").replace("│", " ").strip().partition("  ")
        texts[option] = re.sub(r"\((default: .*|required)\)", "", text).strip()
    return texts


@pytest.mark.parametrize("script", SCRIPTS)
def test_help__has_a_text_for_every_option(tmp_path, script):
    texts = help_of(script, tmp_path)
    assert all(texts.values()), texts
    options = {option.split()[0].strip(",") for option in texts if option.startswith("-")}
    fields = dataclasses.fields(importlib.import_module(script).Config)
    n_positional = len(texts) - len(options)
    names = [f.name.replace("_", "-").replace("imports", "import") for f in fields]
    missing = [name for name in names if f"--{name}" not in options]
    assert len(missing) == n_positional


@pytest.mark.parametrize("script", ["data", "teacher", "distill"])
def test_help__names_the_built_in_tasks(tmp_path, script):
    options = " ".join(help_of(script, tmp_path))
    assert re.search(r"--envs? \[?\{" + re.escape(data.ENV_CHOICES.strip("{}")), options)


# ---- run ---------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch):
    """run(main): cli.run in this process, which keeps its handlers of signals and its malloc."""
    monkeypatch.setattr("sys.argv", ["distill.py"])
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(signals, "install", lambda: None)
    return lambda main: cli.run(main, distill.Config, "-")


def raiser(error):
    """A main that raises `error`."""

    def main(cfg):
        raise error

    return main


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: 1"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_run__reports_too_little_memory_in_one_line(run, capsys, error):
    with pytest.raises(SystemExit, match="2"):
        run(raiser(error))
    line = r"error: out of memory \(.*\); try a smaller --batch-size, or --data-device host\n"
    assert re.fullmatch(line, capsys.readouterr().err)


def test_run__reports_a_users_error_in_one_line(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(raiser(UserError("--lr -1: must be at least 0")))
    assert capsys.readouterr().err == "error: --lr -1: must be at least 0\n"


def test_run__lets_other_errors_through(run):
    with pytest.raises(RuntimeError, match="something else"):
        run(raiser(RuntimeError("something else")))


@pytest.mark.parametrize(("signum", "code"), [(2, 130), (15, 143)])
def test_run__exits_with_the_code_of_its_signal(run, capsys, signum, code):
    with pytest.raises(SystemExit, match=str(code)):
        run(raiser(signals.Stopped(signum)))
    assert capsys.readouterr().err.startswith("stopped (SIG")


def test_run__says_nothing_when_the_reader_has_closed_the_pipe(tmp_path):
    data.collect_if_missing(data.dataset_id("hopper"), 2000)
    command = [sys.executable, str(ROOT / "data.py"), "--env", "hopper", "--out-dir", str(tmp_path)]
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    p.stdout.close()
    assert p.stderr.read() == ""
    assert p.wait() == 141


# ---- at_least ----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Options:
    n_layer: int = 1
    top: float = 0.5
    sizes: tuple[float, ...] = (5.0, 15.0)


def test_at_least__accepts_values_at_their_limits():
    cli.at_least(Options(), n_layer=1, top=0.5, sizes=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(n_layer=0), "--n-layer 0: must be at least 1"),
        (Options(top=float("nan")), "--top nan: must be at least 0"),
        (Options(sizes=(5.0, -1.0)), "--sizes -1.0: must be at least 0"),
    ],
    ids=["below", "NaN", "one of several"],
)
def test_at_least__names_option_value_and_limit(options, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        cli.at_least(options, n_layer=1, top=0, sizes=0)

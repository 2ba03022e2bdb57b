"""Processes forked from a server that has imported everything: they start in milliseconds, not seconds.

    said = forked.python("teacher.py --env hopper", cwd)    # as a user would call it, run to its end
    p = forked.start(function, *args, output=path)          # any function; a multiprocessing.Process

The server is this module, imported by multiprocessing's fork server once for each process of pytest.
"""

import multiprocessing
import os
import runpy
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot  # noqa: F401 - for the forked processes, as all that is not used here
import torch

import distill  # noqa: F401
import evaluate  # noqa: F401
import export  # noqa: F401
import report  # noqa: F401
from conftest import ROOT

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["forked"])


def start(
    function: Callable[..., None],
    *args: Any,
    output: Path | str,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> multiprocessing.Process:
    """Start function(*args) in a forked process; what it prints is appended to the file `output`."""
    p = server.Process(target=_child, args=(function, args, output, cwd, env or {}), daemon=True)
    p.start()
    return p


def _child(function, args, output, cwd, env):
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= env
    if cwd:
        os.chdir(cwd)
    torch.set_num_threads(1)
    function(*args)


def arguments(options: dict[str, Any]) -> list[str]:
    """The command line that says options: {"resume": True, "lr": 0.1} -> ["--resume", "--lr", "0.1"]."""
    words = []
    for name, value in options.items():
        words.append(f"--{name.replace('_', '-')}")
        if isinstance(value, tuple):
            words.extend(map(str, value))
        elif value is not True:
            words.append(str(value))
    return words


def python(command: str, cwd: Path, code: int = 0, root: Path = ROOT, **env: str) -> str:
    """What `python COMMAND` prints in the folder cwd. Asserts its exit code.

    command: "script.py --option ..." or "-m research.module ...", of this project or a copy of it at `root`.
    env: environment variables.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        p = start(run_script, root, shlex.split(command), output=output, cwd=cwd, env=env)
        p.join()
        said = output.read_text()
    assert p.exitcode == code, f"python {command} ended with {p.exitcode}\n{said}"
    return said


def run_script(root: Path, argv: list[str]) -> None:
    """What `python *argv` does, in a process of its own."""
    if root != ROOT:
        forget_modules()
        sys.path = [str(root) if entry == str(ROOT) else entry for entry in sys.path]
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(str(root / argv[0]), run_name="__main__")


def forget_modules() -> None:
    """Unload this project's modules: a changed copy of it can then be imported."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if Path(file).is_relative_to(ROOT) and not Path(file).is_relative_to(sys.prefix):
            del sys.modules[name]

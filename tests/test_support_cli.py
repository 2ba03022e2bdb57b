"""support/cli.py, in this process: errors as one line. Options and help: test_scripts.py."""

import re

import pytest
import torch

import distill
from support import cli, machine, signals

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: 1"),
]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Without what is for a process of its own."""
    monkeypatch.setattr("sys.argv", ["distill.py"])
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(signals, "install", lambda: None)


def raises(error):
    def main(cfg):
        raise error

    return main


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: type(e).__name__)
def test_run__gives_one_line_with_the_remedy_where_memory_is_short(error, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.run(raises(error), distill.Config, "-")
    line = r"error: out of memory \(.*\); try a smaller --batch-size, or --data-device host\n"
    assert re.fullmatch(line, capsys.readouterr().err)


def test_run__lets_an_error_of_its_own_through():
    with pytest.raises(RuntimeError, match="something else"):
        cli.run(raises(RuntimeError("something else")), distill.Config, "-")

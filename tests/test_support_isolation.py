"""support/isolation.py: what ends the child does not end this process."""

import faulthandler
import os
import signal
import sys
import time

import numpy as np
import pytest

from support import UserError, isolation
from support.isolation import isolated


def told(f, n_bytes: int = 0) -> str:
    with pytest.raises(UserError) as e:
        isolated(f, n_bytes, "file x: {}".format)
    return str(e.value)


def raises(e: BaseException):
    raise e


def test_isolated__runs_in_another_process(tmp_path):
    pids = []
    isolated(lambda: (tmp_path / "pid").write_text(f"{os.getpid()} {pids.append(1)}"), 0, str)
    assert not pids
    assert int((tmp_path / "pid").read_text().split()[0]) != os.getpid()


def test_isolated__raises_what_f_does():
    assert told(lambda: raises(UserError("use --x"))) == "use --x"
    assert told(lambda: raises(KeyError("k\nl"))) == "file x: KeyError: 'k\\nl'"
    assert told(lambda: sys.exit(0)).startswith("file x: SystemExit")
    with pytest.raises(OSError, match="disk"):
        isolated(lambda: raises(OSError("disk")), 0, str)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_isolated__tells_of_a_crash(number):
    def crash():
        faulthandler.disable()  # pytest's, which prints
        os.kill(os.getpid(), number)

    assert told(crash) == f"file x: the library that reads it ended with {number.name}"


def test_isolated__bounds_memory_by_the_size_of_the_file():
    def take():
        np.empty(2**27)  # a gibibyte

    assert "MemoryError" in told(take)
    isolated(take, 2**25, str)


def test_isolated__bounds_time_by_the_size_of_the_file(monkeypatch):
    monkeypatch.setattr(isolation, "SECONDS", 1)
    start = time.monotonic()
    assert told(lambda: time.sleep(9)) == "file x: it took more than 1 seconds"
    assert time.monotonic() - start < 5
    isolated(lambda: time.sleep(1.2), 10**6, str)

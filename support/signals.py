"""SIGTERM and SIGINT end a run after the current update. Used by cli.py, checkpoint.py and processes.py."""

import os
import signal


class Stopped(BaseException):
    """A signal ended the run; its exit code is 128 + signum: 143 after SIGTERM, 130 after SIGINT."""

    def __init__(self, signum: int, text: str = "stopped"):
        super().__init__(f"{text} ({signal.Signals(signum).name})")
        self.signum = signum


deferring = False  # whether a signal has to wait for the end of an update
requested: int | None = None  # the signal that is waiting


def install() -> None:
    """Handle SIGINT and SIGTERM in this process: they raise Stopped, or wait for the end of an update."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _handle)


def _handle(signum, _frame):
    global requested
    # alone, a second signal ends the run at once; torchrun sends one of its own after the terminal's
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if not deferring or (requested is not None and alone):
        raise Stopped(signum)
    requested = requested or signum


def begin_deferring() -> None:
    """From now on a signal waits until `end_deferring`, or until processes.end_requested reports it."""
    global deferring
    deferring = True


def end_deferring(failed: bool) -> None:
    """Raise Stopped if a signal came after the last update. failed: another exception is propagating."""
    global deferring, requested
    deferring = False
    if requested is not None and not failed:
        raise Stopped(requested)
    requested = None

"""The command line of every script: options from one flat dataclass, errors in one line, exit codes."""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.distributed as dist
import tyro

from support import UserError, first_line, jobs, machine, processes, signals
from support.signals import Stopped

Imports = Annotated[tuple[str, ...], tyro.conf.arg(name="import")]  # for environments.import_packages

USER_ERROR = 2
BROKEN_PIPE = 141  # what a shell reports after SIGPIPE


def run(main: Callable[[Any], Any], config: type, doc: str) -> None:
    """Run main(config) with options from the command line; tyro takes --help from the fields' comments.

    Exit codes: 2 after a UserError or too little memory, each one line; 130 and 143 after SIGINT and SIGTERM.
    """
    machine.keep_freed_memory()
    signals.install()
    jobs.end_with_parent()
    with _rank_0_alone_prints():
        cfg = _parsed(config, doc)
        code = _exit_code(main, cfg)
        if dist.is_initialized():
            if code:  # with the others gone, the end of a process group would wait for them or abort
                sys.stdout.flush()
                os._exit(code)
            dist.destroy_process_group()
    if code:
        sys.exit(code)


@contextlib.contextmanager
def _rank_0_alone_prints():
    if processes.rank():
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    else:
        yield


def _parsed(config, doc):
    stderr = sys.stdout if processes.rank() else sys.stderr  # rank 0 alone reports a mistyped option
    with contextlib.redirect_stderr(stderr):
        return tyro.cli(config, description=doc)


def _exit_code(main, cfg):
    try:
        main(cfg)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `| head` for one, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return USER_ERROR
    except (RuntimeError, MemoryError) as e:
        if not _out_of_memory(e):
            raise
        reason = first_line(e)[:150]
        remedy = "try a smaller --batch-size, or --data-device host"
        print(f"error: out of memory ({reason}); {remedy}", file=sys.stderr)
        return USER_ERROR
    except Stopped as e:
        print(e, file=sys.stdout if processes.rank() else sys.stderr)
        return 128 + e.signum
    return 0


def _out_of_memory(e):
    return isinstance(e, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(e)


def at_least(cfg: Any, **limits: float) -> None:
    """Raise UserError where a field of cfg, or a number in it, is below its least value in `limits`."""
    for name, least in limits.items():
        value = getattr(cfg, name)
        for x in value if isinstance(value, tuple) else (value,):
            if not x >= least:  # NaN too
                raise UserError(f"--{name.replace('_', '-')} {x}: must be at least {least}")


def check_share(cfg: Any) -> None:
    """Raise UserError where --top is no share of the data."""
    if not 0 < cfg.top <= 1:
        raise UserError(f"--top {cfg.top}: must be above 0 and at most 1")


def check_trackers(cfg: Any) -> None:
    """Raise UserError where --tensorboard or --wandb needs a package that is not installed."""
    for package in ("tensorboard", "wandb"):
        if getattr(cfg, package) and importlib.util.find_spec(package) is None:
            raise UserError(f"--{package} needs a package that is not here: pip install {package}")

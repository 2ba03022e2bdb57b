"""Reading files of others: in a forked process, with bounded memory and time.

Used by support/minari_files.py and support/onnx_teacher.py, whose libraries can crash, hang or ask for any
amount of memory on a damaged or malicious file.
"""

import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

from support import UserError, first_line

# Beside those in proportion to a file's size, which are 50 bytes a byte and a second a megabyte.
BYTES = 2**29
SECONDS = 10

# exit codes of the child
USER_ERROR = 2
OS_ERROR = 3


def isolated(f: Callable[[], None], n_bytes: int, message: Callable[[str], str]) -> None:
    """f() in a forked process, its memory and time limited in proportion to n_bytes. Without fork, here.

    f may start no threads and take no locks that threads of this process may hold; PyTorch's operators do
    both. Raises UserError and OSError as f does; where f ends in any other way, UserError(message(reason)).
    """
    if not hasattr(os, "fork"):  # Windows
        return f()
    receiver, sender = os.pipe()
    with warnings.catch_warnings():
        # Python warns of a fork beside threads: this child starts none and takes none of their locks
        warnings.simplefilter("ignore")
        pid = os.fork()
    if pid == 0:
        _child(f, n_bytes, sender)
    os.close(sender)
    with open(receiver, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == USER_ERROR:
        raise UserError(said)
    if code == OS_ERROR:
        raise OSError(said)
    if code == -signal.SIGALRM:
        said = f"it took more than {_seconds(n_bytes)} seconds"
    if code:
        raise UserError(message(said or f"the library that reads it ended with {signal.Signals(-code).name}"))


def _child(f, n_bytes, sender):
    """Run f in the forked process, send the message of what it raised, and exit with the code for it."""
    code = 1
    message = ""
    try:
        _limit_resources(n_bytes)
        f()
        code = 0
    except UserError as e:
        code = USER_ERROR
        message = str(e)
    except OSError as e:
        code = OS_ERROR
        message = str(e)
    except BaseException as e:  # noqa: BLE001 - whatever it is, the parent reports it
        message = f"{type(e).__name__}: {first_line(e)[:200]}"
    finally:
        os.write(sender, message.encode()[:60_000])
        os._exit(code)


def _limit_resources(n_bytes):
    import resource

    statm = Path("/proc/self/statm")
    in_use = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 2**36
    limit = in_use + BYTES + 50 * n_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_seconds(n_bytes))


def _seconds(n_bytes):
    return SECONDS + n_bytes // 10**6

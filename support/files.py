"""Files that are written whole or not at all. Used by every script."""

import contextlib
import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from support import UserError


def write(path: Path | str, blob: bytes) -> None:
    """Write to a temporary name beside `path`, flush, rename: a reader sees the old file or the new one.

    Raises UserError where that is not possible.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # it may have been removed during the run
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as f:  # x: never through a symbolic link that somebody put there
            f.write(blob)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the new name too, should the power fail
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"can't write {path}: {e.strerror}; choose another --out-dir or free the space"
        ) from None


def read_json(path: Path | str) -> dict[str, Any] | None:
    """The JSON object in `path`, or None where there is no such file or it is damaged."""
    try:
        x = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return x if isinstance(x, dict) else None


def write_json(path: Path | str, x: Any) -> None:
    """Write x as JSON; numbers of numpy and torch become floats. Raises UserError as `write` does."""
    write(path, json.dumps(x, indent=1, default=float).encode())


def read_csv(path: Path | str) -> dict[str, np.ndarray]:
    """A log.csv as {column: floats}, NaN where a cell is empty; raises UserError where it is not there."""
    try:
        with open(path, newline="") as f:
            columns, *rows = csv.reader(f)
    except OSError as e:
        raise UserError(f"can't read {path}: {e.strerror}; train again with --overwrite") from None
    values = {}
    for column, cells in zip(columns, zip(*rows, strict=True), strict=True):
        values[column] = np.array([float(cell or "nan") for cell in cells])
    return values

"""The rows of research/results/*.csv, one for each run: reading, finding, adding."""

import csv
import fcntl
import io
from pathlib import Path
from typing import Any

from support import files

Row = dict[str, Any]


def read(path: Path | str) -> list[dict[str, str]]:
    """The CSV's rows as they stand there; none where there is no file."""
    if not Path(path).exists():
        return []
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def find(path: Path | str, key: Row) -> dict[str, str] | None:
    """The CSV's first row with these values."""
    return next((row for row in read(path) if all(row[k] == str(v) for k, v in key.items())), None)


def add(path: Path | str, row: Row) -> None:
    """Write the CSV with one row more, whole or as it was; row: its columns and their values.

    Several processes take turns.
    """
    path = Path(path)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, row)
    if not path.exists():
        files.write(path, b"")  # makes its folder
    with open(path.with_name(f".{path.stem}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = path.read_bytes()
        if not before:
            writer.writeheader()
        writer.writerow(row)
        files.write(path, before + text.getvalue().encode())

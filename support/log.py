"""What a run prints and logs: log.csv and its trackers, tables, progress lines, seconds by phase.

Used by teacher.py, distill.py, evaluate.py, export.py, support/checkpoint.py and research/.
"""

import atexit
import csv
import io
import os
import sys
import time
from pathlib import Path
from typing import Any

from support import UserError, files


class Log:
    """log.csv, written a row at a time. Its columns are those of the first row.

    size: bytes of an existing file to continue after; 0 begins a new one.
    trackers: where else rows go, objects with track(step, values) and close().
    Raises UserError where the existing file is shorter than `size`.
    """

    def __init__(self, path: Path | str, size: int = 0, trackers: tuple = ()):
        self.path = Path(path)
        self.size = size
        self.trackers = trackers
        self.buffer = io.StringIO(newline="")  # rows that are not yet in the file
        self.warned = False
        self.writer = None
        if not size:
            self.path.unlink(missing_ok=True)
            return
        if self.path.is_symlink() or not self.path.exists() or self.path.stat().st_size < size:
            raise UserError(
                f"{path} is not there, or shorter than its checkpoint says; "
                f"--overwrite in place of --resume begins anew"
            )
        with open(path, newline="") as f:
            self.writer = csv.DictWriter(self.buffer, next(csv.reader(f)))
        os.truncate(path, size)

    def row(self, **values: Any) -> None:
        """Add a row, {column: value}, and send it to the trackers; None is an empty cell."""
        if self.writer is None:
            self.writer = csv.DictWriter(self.buffer, values)
            self.writer.writeheader()
        self.writer.writerow({k: f"{v:.7g}" if isinstance(v, float) else v for k, v in values.items()})
        self.track(**values)

    def track(self, **values: Any) -> None:
        """Send {column: value}, one of them `step`, to the trackers alone."""
        measured = {k: v for k, v in values.items() if k != "step" and v is not None}
        for tracker in self.trackers:
            tracker.track(values["step"], measured)

    def flush(self) -> None:
        """Write the buffered rows to the file: all, or none where that fails. Those stay buffered."""
        text = self.buffer.getvalue().encode()
        try:
            with open(self.path, "ab") as f:
                if f.tell() < self.size:  # the file was removed during the run, with the rows before
                    self.size = 0
                    text = f"{','.join(self.writer.fieldnames)}\r\n".encode() + text
                f.truncate(self.size)
                f.write(text)
        except OSError as e:
            if not self.warned:
                message = f"can't write {self.path}: {e.strerror}; the run goes on, its rows wait for room"
                print(message, file=sys.stderr, flush=True)
            self.warned = True
            return
        self.size += len(text)
        self.warned = False
        self.buffer.seek(0)
        self.buffer.truncate()


class TensorBoard:
    """--tensorboard: the log's columns as scalars, in the run's directory."""

    def __init__(self, out_dir: Path, settings: dict[str, Any], step: int):
        from torch.utils.tensorboard import SummaryWriter

        if not step:
            for old in out_dir.glob("events.out.tfevents.*"):  # of a run that this one replaces
                old.unlink()
        self.writer = SummaryWriter(str(out_dir), purge_step=step)
        atexit.register(self.close)

    def track(self, step: int, values: dict[str, Any]) -> None:
        for k, v in values.items():
            self.writer.add_scalar(k, v, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """--wandb: the log's columns in a run of the project manyteachers.

    RUN/wandb.json holds the run's id, for --resume. WANDB_MODE=offline needs no network.
    """

    def __init__(self, out_dir: Path, settings: dict[str, Any], step: int):
        import wandb

        known = files.read_json(out_dir / "wandb.json") if step else None
        self.run = wandb.init(
            project="manyteachers",
            name=str(out_dir),
            dir=str(out_dir),
            config=settings,
            id=known and known["id"],
            resume="allow",
        )
        files.write_json(out_dir / "wandb.json", {"id": self.run.id})

    def track(self, step: int, values: dict[str, Any]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class Clock:
    """Seconds by phase of a run: `with clock("train"): ...`, then clock.seconds."""

    def __init__(self):
        self.seconds = {}

    def __call__(self, phase: str) -> "Clock":
        self.phase = phase
        self.start = time.perf_counter()
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.seconds[self.phase] = round(time.perf_counter() - self.start, 2)


def cell(value: str | float | None) -> str:
    """A number, text or None as a table shows it: three digits, "-" for None."""
    if isinstance(value, str):
        return value
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(rows: list[dict[str, Any]]) -> str:
    """Rows {column: value} as aligned text, numbers to the right; a row may lack a column."""
    columns = {}  # in the order of their first appearance
    for row in rows:
        columns |= dict.fromkeys(row)
    lines = [list(columns)]
    for row in rows:
        lines.append([cell(row.get(column)) for column in columns])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for name, *values in lines:
        numbers = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
        text.append("  ".join([name.ljust(widths[0]), *numbers]))
    return "\n".join(text)


def progress(step: int, steps: int, seconds: float, text: str) -> str:
    """The line printed once an interval: step, text, updates per second and remaining time."""
    remaining = round(seconds / step * (steps - step))
    minutes = f"{remaining // 60}:{remaining % 60:02}"
    return f"step {step:>{len(str(steps))}}/{steps} | {text} | {step / seconds:5.1f} it/s | {minutes} left"

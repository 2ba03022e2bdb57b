"""50,000 updates of the smallest student: memory, time and log size -> research/results/long_run.csv.

python tests/long_run.py

Prints the numbers that docs/operations.md quotes. Takes minutes; pytest does not collect it.
"""

import csv
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import conftest  # first: it moves data and cache to a temporary folder
import distill
import teacher
from support import checkpoint, machine

STEPS = 50_000
INTERVAL = 1000  # updates between rows
WARM_UP = 5000  # updates, not counted in the memory's slope
SMALLEST = {
    "n_layer": 1,
    "n_embd": 8,
    "batch_size": 4,
    "eval_episodes": 0,
    "device": "cpu",
    "log_interval": 100,
    "checkpoint_interval": INTERVAL,
}


def record_rows(rows: list[dict[str, float]]) -> None:
    """From now on append a row after every INTERVAL updates of a training, and after their checkpoint."""
    start = time.perf_counter()
    after_update = checkpoint.Checkpoint.after

    def after(self: checkpoint.Checkpoint, step: int) -> None:
        after_update(self, step)
        if step % INTERVAL == 0:
            row = {
                "step": step,
                "seconds": round(time.perf_counter() - start, 3),
                "rss_mb": round(resident_memory(), 2),
                "log_bytes": (self.path.parent / "log.csv").stat().st_size,
            }
            rows.append(row)

    checkpoint.Checkpoint.after = after


def resident_memory() -> float:
    """This process's, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def train(home: str) -> list[dict[str, float]]:
    """Two teachers, then their student: its rows."""
    for i in range(2):
        dataset = f"tests/long-{i}-v0"
        conftest.make_dataset(dataset, [30, 25, 40, 20], obs_dim=3 + i, act_dim=1 + i, seed=i)
        teacher.main(teacher.Config(dataset=dataset, steps=50, out_dir=f"{home}/{i}", **SMALLEST))
    rows = []
    record_rows(rows)
    teachers = (f"{home}/0", f"{home}/1")
    distill.main(distill.Config(teachers=teachers, steps=STEPS, out_dir=f"{home}/student", **SMALLEST))
    return rows


def summary(rows: list[dict[str, float]]) -> str:
    warm = [row for row in rows if row["step"] > WARM_UP]
    rss = [row["rss_mb"] for row in warm]
    slope = np.polyfit([row["step"] for row in warm], rss, 1)[0] * 10_000
    ms = np.diff([row["seconds"] for row in rows]) / INTERVAL * 1000
    return (
        f"memory: {slope:.2f} MB per 10,000 updates, from {rss[0]:.0f} MB; "
        f"an update: {np.median(ms[5:15]):.2f} ms in updates 6,000 to 15,000, "
        f"{np.median(ms[-10:]):.2f} in the last 10,000; log {rows[-1]['log_bytes'] / 1e6:.1f} MB"
    )


def main() -> None:
    torch.set_num_threads(1)
    machine.keep_freed_memory()
    with tempfile.TemporaryDirectory() as home:
        rows = train(home)
    with open(conftest.ROOT / "research/results/long_run.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(summary(rows))


if __name__ == "__main__":
    main()
    os._exit(0)

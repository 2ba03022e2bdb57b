"""50,000 updates of the smallest student -> results/long_run.csv: memory, time and log, a row every 1000 updates. It ends with what README says of it.

python tests/long_run.py
"""

import csv
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import conftest  # data and cache in a temporary folder
import distill
import teacher
from support import (
    checkpoint,
    machine,
)

SMALLEST = {
    "n_layer": 1,
    "n_embd": 8,
    "batch_size": 4,
    "eval_episodes": 0,
    "device": "cpu",
    "log_interval": 100,
    "checkpoint_interval": 1000,
}
STEPS, EVERY = 50_000, 1000


def resident() -> float:
    """This process's memory, MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def main():
    torch.set_num_threads(1)
    machine.keep_freed_memory()
    rows, after = [], checkpoint.Checkpoint.after

    def watched(self, step):
        after(self, step)
        if step % EVERY == 0 and self.cfg.steps == STEPS:
            rows.append({"step": step, "seconds": round(time.perf_counter() - start, 3), "rss_mb": round(resident(), 2),
                         "log_bytes": (self.path.parent / "log.csv").stat().st_size})  # fmt: skip

    checkpoint.Checkpoint.after = watched
    with tempfile.TemporaryDirectory() as tmp:
        for i in range(2):
            conftest.make_dataset(
                f"tests/long-{i}-v0", [30, 25, 40, 20], obs_dim=3 + i, act_dim=1 + i, seed=i
            )
            teacher.main(
                teacher.Config(dataset=f"tests/long-{i}-v0", steps=50, out_dir=f"{tmp}/{i}", **SMALLEST)
            )
        start = time.perf_counter()
        distill.main(
            distill.Config(
                teachers=(f"{tmp}/0", f"{tmp}/1"), steps=STEPS, out_dir=f"{tmp}/student", **SMALLEST
            )
        )
    path = conftest.ROOT / "results/long_run.csv"
    with open(path, "w", newline="") as f:
        out = csv.DictWriter(f, rows[0])
        out.writeheader()
        out.writerows(rows)
    step, seconds, rss, log = (np.array([float(r[k]) for r in rows]) for k in rows[0])
    warm = step > 5000
    ms = np.diff(seconds) / EVERY * 1000
    print(f"memory: {np.polyfit(step[warm], rss[warm], 1)[0] * 10_000:.2f} MB per 10,000 updates, from {rss[warm][0]:.0f} MB; an update: {np.median(ms[5:15]):.2f} ms "
          f"in updates 6,000 to 15,000, {np.median(ms[-10:]):.2f} in the last 10,000; log {log[-1] / 1e6:.1f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
    os._exit(0)

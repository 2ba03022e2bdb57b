"""The rows of study.csv, a row for each run: reading, adding, and what is decided from them.

A row, as `read` gives it: case, variant, budget, seed, lr, steps, times and what was measured, see
study.one_run. Used by research/study.py, study_report.py and study_figures.py.
"""

import csv
import fcntl
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from research.statistics import iqm
from research.variants import ROUND_ROBIN
from support import files

Row = dict[str, Any]

KEY = ("case", "variant", "budget", "seed", "lr", "steps", "times")  # what distinguishes two runs
INTEGERS = ("seed", "steps", "n_embd")
NUMBERS = ("lr", "times", "compression", "seconds", "ms", "projected")
ARRAYS = ("cosine", "weights", "steps_at", "kl", "retention", "teacher_scores")
LRS = (4e-3, 8e-3, 16e-3, 32e-3)  # the grid of learning rates that tuning begins with


def read(path: Path | str) -> list[Row]:
    """The CSV's rows, with numbers and arrays as such; none where there is no file."""
    rows = plain(path)
    for row in rows:
        row |= {key: int(row[key]) for key in INTEGERS}
        row |= {key: float(row[key]) for key in NUMBERS}
        row |= {key: np.array(json.loads(row[key])) for key in ARRAYS}
    return rows


def plain(path: Path | str) -> list[dict[str, str]]:
    """The CSV's rows as they stand there; none where there is no file."""
    if not Path(path).exists():
        return []
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def find(path: Path | str, key: Row) -> dict[str, str] | None:
    """The CSV's first row with these values, as `plain` gives it."""
    return next((row for row in plain(path) if all(row[k] == str(v) for k, v in key.items())), None)


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


def key(row: Row) -> tuple:
    """What distinguishes a run from all others."""
    return tuple(row[k] for k in KEY)


# ---- what was measured -------------------------------------------------------------------------------------


def curve(row: Row) -> np.ndarray:
    """KL to the worst teacher at each point measured, (points,)."""
    return row["kl"].max(1)


def final_kl(row: Row) -> float:
    """KL to the worst teacher after the last update; infinite where the run was lost."""
    return float(np.nan_to_num(row["kl"][-1].max(), nan=math.inf))


def final_kls(rows: list[Row]) -> np.ndarray:
    """final_kl of each row, (n,)."""
    return np.array([final_kl(row) for row in rows])


def iqm_kl(rows: list[Row]) -> float:
    """Interquartile mean of final_kl."""
    return float(iqm(final_kls(rows)))


def reached(row: Row, kl: float) -> float:
    """The share of a run's updates after which its worst KL is at most `kl` for the first time.

    Along straight lines in log KL between the points measured; infinite where never.
    """
    log_kl = np.log(curve(row))
    share = row["steps_at"] / row["steps"]
    below = np.flatnonzero(log_kl <= math.log(kl))
    if not len(below):
        return math.inf
    around = slice(max(below[0] - 1, 0), below[0] + 1)
    return float(np.interp(-math.log(kl), -log_kl[around], share[around]))


def mean_retention(rows: list[Row]) -> np.ndarray:
    """Retention of evaluated students, mean over tasks: (n,)."""
    return np.array([row["retention"] for row in rows]).mean(1)


def worst_retention(rows: list[Row]) -> np.ndarray:
    """Retention of evaluated students on the worst task: (n,)."""
    return np.array([row["retention"] for row in rows]).min(1)


def paired(f: Callable[[Row, Row], Any], rows: list[Row], others: list[Row]) -> np.ndarray:
    """f(row, other) of rows with the same seed and the same teachers, (pairs,)."""
    found = []
    for a in rows:
        for b in others:
            if a["seed"] == b["seed"] and np.array_equal(a["teacher_scores"], b["teacher_scores"]):
                found.append(f(a, b))
    return np.array(found)


def kl_ratios(rows: list[Row], others: list[Row]) -> np.ndarray:
    """Final KL to the worst teacher divided by the other's, of rows with the same teachers: (pairs,)."""
    return paired(lambda a, b: final_kl(a) / final_kl(b), rows, others)


def milliseconds(rows: list[Row], case: str, variant: str) -> float:
    """Time of an update on one core: the median of the runs of budget "cost"; NaN where there is none.

    In other budgets the machine was sometimes more, sometimes less busy.
    """
    found = [r["ms"] for r in rows if (r["case"], r["variant"], r["budget"]) == (case, variant, "cost")]
    return float(np.median(found or [math.nan]))


def slowdown(rows: list[Row], case: str, variant: str) -> float:
    """Time of an update divided by round-robin's; NaN where one was not measured."""
    return milliseconds(rows, case, variant) / milliseconds(rows, case, ROUND_ROBIN)


# ---- learning rates and fixed weights, from the runs on tuning seeds --------------------------------------


def tuning_runs(rows: list[Row], case: str, variant: str) -> dict[float, list[Row]]:
    """{learning rate: rows of budget "tune"}, from the lowest rate to the highest."""
    by_rate = {}
    for row in sorted(rows, key=lambda r: r["lr"]):
        if (row["case"], row["variant"], row["budget"]) == (case, variant, "tune"):
            by_rate.setdefault(row["lr"], []).append(row)
    return by_rate


def best_rate(rows: list[Row], case: str, variant: str) -> float:
    """The learning rate of the lowest final KL to the worst teacher on the tuning seeds (geometric mean)."""
    tried = tuning_runs(rows, case, variant)
    return min(tried, key=lambda lr: np.log(final_kls(tried[lr])).mean(), default=LRS[0])


def kls_at_best_rate(rows: list[Row], case: str, variant: str) -> np.ndarray:
    """Final KL to each teacher on the tuning seeds, (seeds, N), with the best learning rate."""
    lr = best_rate(rows, case, variant)
    return np.array([row["kl"][-1] for row in tuning_runs(rows, case, variant).get(lr, [])])


def rates(rows: list[Row], case: str, variant: str) -> list[float]:
    """The learning rates to tune over: LRS and, while an end of those tried does best, half or twice that."""
    tried = tuning_runs(rows, case, variant)
    if not tried.keys() >= set(LRS):
        return list(LRS)
    best = best_rate(rows, case, variant)
    more = []
    if np.isfinite(kls_at_best_rate(rows, case, variant)).all():
        if best == min(tried):
            more.append(best / 2)
        if best == max(tried):
            more.append(best * 2)
    return [*tried, *more]


def needs_first_run(variant: str) -> bool:
    """Whether a variant's fixed weights come from tuning runs of `all`."""
    return "w=" in variant


def fixed_weights(rows: list[Row], case: str, variant: str) -> list[float]:
    """Shares ~ KL^w of the tuning runs with equal shares, for variants `weights w=...`; empty for others."""
    if not needs_first_run(variant):
        return []
    exponent = float(variant.split("w=")[1])
    weights = np.mean(kls_at_best_rate(rows, case, "all"), 0) ** exponent
    return (weights / weights.sum()).tolist()

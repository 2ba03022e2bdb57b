"""Statistics of runs over seeds.

A statistic takes strata, a list of arrays (..., n_i) of one number a seed, one array for each case; it
reduces their last axis. Leading axes are resamples of the bootstrap. Below: runs of several teachers, whose
statistics take arrays (..., runs, tasks) and reduce the last two. Used by the scripts that print tables.
"""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np

Statistic = Callable[[list[np.ndarray]], np.ndarray]


def iqm(x: np.ndarray | Sequence[float]) -> np.ndarray:  # (..., n) -> (...)
    """Interquartile mean, of the middle half (Agarwal et al. 2021, arXiv 2108.13264)."""
    x = np.sort(x, axis=-1)
    n = x.shape[-1]
    cut = n // 4
    return x[..., cut : n - cut].mean(-1)


def mean(strata: list[np.ndarray]) -> np.ndarray:
    """Mean of all strata together."""
    return np.concatenate(strata, axis=-1).mean(-1)


def geometric(strata: list[np.ndarray]) -> np.ndarray:
    """Geometric mean of all strata together."""
    return np.exp(np.log(np.concatenate(strata, axis=-1)).mean(-1))


def interval(statistic: Statistic, strata: list[np.ndarray], n: int = 2000) -> np.ndarray:
    """95 % percentile bootstrap (2,) of statistic(strata); each stratum is resampled by itself, n times."""
    indices = _resamples(tuple(len(x) for x in strata), n)
    drawn = statistic([x[i] for x, i in zip(strata, indices, strict=True)])
    return np.quantile(drawn, [0.025, 0.975])


@functools.lru_cache(64)
def _resamples(lengths, n):
    """Indices (n, length) into each stratum, the same in every call."""
    rng = np.random.default_rng(0)
    indices = [np.empty((n, length), np.int32) for length in lengths]
    for k in range(n):
        for i, length in zip(indices, lengths, strict=True):
            i[k] = rng.integers(length, size=length)
    return indices


def cell(statistic: Statistic, strata: list[np.ndarray], form: str = "{:.3f}") -> str:
    """A statistic and, from three seeds on, its interval as text: 0.155 (0.149-0.158)."""
    if max(map(len, strata)) < 3:
        return form.format(statistic(strata))
    return with_interval(statistic(strata), interval(statistic, strata), form)


def with_interval(value: float, bounds: np.ndarray, form: str = "{:.3f}") -> str:
    """A value and its interval (2,) as text: 0.155 (0.149-0.158)."""
    low, high = bounds
    dash = " to " if low < 0 else "-"
    return f"{form.format(value)} ({form.format(low)}{dash}{form.format(high)})"


# ---- runs of several teachers ------------------------------------------------------------------------------


def mean_retention(x: np.ndarray) -> np.ndarray:  # (..., runs, tasks) -> (...)
    """Mean over runs and tasks."""
    return x.mean((-2, -1))


def worst_task(x: np.ndarray) -> np.ndarray:  # (..., runs, tasks) -> (...)
    """Mean over runs of each run's lowest task."""
    return x.min(-1).mean(-1)


def failure_rate(x: np.ndarray, limit: float = 0.9) -> np.ndarray:  # (..., runs, tasks) -> (...)
    """Share of all tasks of all runs below the limit."""
    return (x < limit).mean((-2, -1))


def hierarchical_bootstrap(
    statistic: Callable[..., np.ndarray], teachers: Sequence[int], *runs: np.ndarray, n: int = 5000
) -> np.ndarray:  # (n,)
    """The statistic of n resamples: teachers are drawn with replacement, then as many of each one's runs.

    teachers: the teacher seed of each run (R,). runs: arrays (R, tasks), all resampled alike, so a statistic
    of two is one of pairs. Tasks are not resampled. With few teachers the intervals are too narrow: of normal
    numbers, ten runs of three teachers, the 95 % interval of the mean holds it in 94 % of trials where
    teachers don't differ, 91 % where they vary half as much as a teacher's runs, 85 % where as much (of five
    teachers: 95, 93 and 90 %; of ten, one run each: 90 %). Two levels: Davison & Hinkley 1997, section 3.8.
    """
    of_lengths = _hierarchical_resamples(tuple(teachers), n)
    return np.concatenate([statistic(*(x[i] for x in runs)) for i in of_lengths])


@functools.lru_cache(64)
def _hierarchical_resamples(teachers, n):
    """Indices of runs, the same in every call: an array (resamples, length) for each length that occurs."""
    rng = np.random.default_rng(0)
    runs_of = [np.flatnonzero(np.array(teachers) == teacher) for teacher in dict.fromkeys(teachers)]
    by_length = {}
    for _ in range(n):
        drawn = [runs_of[k] for k in rng.integers(len(runs_of), size=len(runs_of))]
        indices = np.concatenate([x[rng.integers(len(x), size=len(x))] for x in drawn])
        by_length.setdefault(len(indices), []).append(indices)
    return [np.array(x) for x in by_length.values()]


def percentile_interval(resampled: np.ndarray, level: float = 0.95) -> np.ndarray:  # (n,) -> (2,)
    """The middle of a bootstrap's values."""
    return np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])


def p_value(difference: float, resampled: np.ndarray, n_runs: int) -> float:
    """Two-sided p of "the difference is zero": Student's t of the difference over its bootstrap's deviation.

    resampled: the differences of a hierarchical bootstrap (n,). n_runs: pairs, one more than the degrees of
    freedom. Shares of resamples beyond zero are no use for Holm's correction: of ten normal numbers without
    difference they are below 0.0005 in 0.6 % of trials, this p in 0.03 % (where three teachers vary half as
    much as a teacher's runs in 1.7 and 0.15 %, five in 0.6 and 0.03 %).
    """
    deviation = resampled.std()
    if deviation == 0:
        return float(difference == 0)
    return t_test(difference / deviation, n_runs - 1)


def t_test(t: float, freedom: int) -> float:
    """Two-sided p of Student's t: the share of ∫ cos^(freedom - 1) beyond atan(|t| / √freedom)."""
    angles = np.linspace([math.atan(abs(t) / math.sqrt(freedom)), 0.0], math.pi / 2, 2001)
    beyond, whole = np.trapezoid(np.cos(angles) ** (freedom - 1), angles, axis=0)
    return float(beyond / whole)


def equivalence_margin(resampled: np.ndarray) -> float:  # of (n,)
    """The smallest X for which "no difference above X" holds at the 5 % level, of resampled differences.

    Two one-sided tests (Schuirmann 1987): the 90 % interval lies within -X and X.
    """
    return float(np.abs(percentile_interval(resampled, 0.9)).max())


def holm(p: Sequence[float]) -> np.ndarray:  # (m,) -> (m,)
    """p values corrected for being m tests: a claim survives at 0.05 where its corrected p is at most 0.05.

    Holm (1979): the lowest times m, the next times m - 1, ..., none lower than one before it.
    """
    p = np.asarray(p, float)
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(corrected, 1)

"""Statistics of runs over seeds, as rliable defines them (Agarwal et al. 2021, arXiv 2108.13264).

A statistic takes strata, a list of arrays (..., n_i) of one number a seed, one array for each case; it
reduces their last axis. Leading axes are resamples of the bootstrap. Used by research/study_report.py and
study_figures.py.
"""

import functools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

Statistic = Callable[[list[np.ndarray]], np.ndarray]


def iqm(x: np.ndarray | Sequence[float]) -> np.ndarray:  # (...)
    """Interquartile mean of x (..., n): the mean of the middle half."""
    x = np.sort(x, axis=-1)
    n = x.shape[-1]
    cut = n // 4
    return x[..., cut : n - cut].mean(-1)


def pooled(strata: list[np.ndarray]) -> np.ndarray:
    """Interquartile mean of all strata together."""
    return iqm(np.concatenate(strata, axis=-1))


def improvement(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Probability that a run of the first is lower than one of the second, averaged over cases.

    Ties count half. pairs: the runs (..., n) and (..., m) of each case.
    """
    of_cases = []
    for x, y in pairs:
        x = x[..., :, None]
        y = y[..., None, :]
        of_cases.append((x < y).mean((-2, -1)) + (x == y).mean((-2, -1)) / 2)
    return np.mean(of_cases, axis=0)


def improvement_of_strata(strata: list[np.ndarray]) -> np.ndarray:
    """`improvement`, of strata that are first, second, first, second, ..."""
    return improvement(zip(strata[::2], strata[1::2], strict=True))


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
    """A statistic and its interval as text: 0.155 (0.149-0.158)."""
    low, high = interval(statistic, strata)
    dash = " to " if low < 0 else "-"
    return f"{form.format(statistic(strata))} ({form.format(low)}{dash}{form.format(high)})"

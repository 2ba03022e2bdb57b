"""research/statistics.py: rliable's definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from research.statistics import cell, improvement, improvement_of_strata, interval, iqm, pooled

numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40).map(np.array)


def test_iqm__is_the_mean_of_the_middle_half():
    assert iqm(np.array([100.0, 2, 3, 4, 5, 6, 7, -50])) == 4.5
    assert iqm(np.arange(10.0)) == 4.5  # of ten, the middle six


@given(numbers, st.integers(0, 1000))
def test_iqm__lies_among_the_middle_and_does_not_depend_on_order(x, seed):
    x = np.round(x, 3)
    low, high = np.quantile(x, [0.25, 0.75], method="inverted_cdf")
    assert min(x) - 1e-6 <= iqm(x) <= max(x) + 1e-6
    assert low - 1e-6 <= iqm(x) + (high - low)
    assert iqm(np.random.default_rng(seed).permutation(x)) == pytest.approx(iqm(x))


def test_pooled__is_the_iqm_of_all_strata_together():
    assert pooled([np.array([100.0, 2, 3, 4]), np.array([5.0, 6, 7, -50])]) == 4.5


@given(numbers, numbers)
def test_improvement__and_its_opposite_make_one(x, y):
    assert improvement([(x, y)]) + improvement([(y, x)]) == pytest.approx(1)
    assert improvement([(x, x)]) == pytest.approx(0.5)


def test_improvement__counts_pairs_and_cases_alike():
    lower = np.array([1.0, 2.0])
    higher = np.array([3.0, 4.0, 5.0])
    assert improvement([(lower, higher)]) == 1
    assert improvement([(higher, lower)]) == 0
    assert improvement([(lower, higher), (higher, lower)]) == 0.5
    tie = [(np.array([1.0, 4.0]), np.array([2.0, 4.0]))]
    assert improvement(tie) == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert improvement_of_strata([lower, higher, higher, lower]) == 0.5


@pytest.mark.parametrize("statistic", [pooled, improvement_of_strata])
def test_statistics__treat_leading_axes_as_resamples(statistic):
    rng = np.random.default_rng(0)
    strata = [rng.normal(size=(7, 9)), rng.normal(size=(7, 5))]
    for i, resample in enumerate(zip(*strata, strict=True)):
        assert statistic(strata)[i] == statistic(list(resample))


def test_interval__holds_the_true_mean_95_times_of_100():
    def mean(strata):
        return np.mean([x.mean(-1) for x in strata], axis=0)

    rng = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        low, high = interval(mean, [rng.normal(1, 1, 20), rng.normal(3, 5, 20)], 300)
        held += low < 2 < high
    assert 88 <= held <= 99


def test_interval__resamples_each_stratum_by_itself():
    def mean_of_all(strata):
        return np.concatenate(strata, axis=-1).mean(-1)

    low, high = interval(mean_of_all, [np.zeros(5), np.full(5, 10.0)])
    assert low == high == 5


def test_cell__shows_value_and_interval():
    assert cell(pooled, [np.full(4, 0.1234)]) == "0.123 (0.123-0.123)"
    assert cell(pooled, [np.full(4, -2.0)], "{:.1f}") == "-2.0 (-2.0 to -2.0)"

"""research/statistics.py: what the tables say of runs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from research.statistics import (
    cell,
    equivalence_margin,
    failure_rate,
    geometric,
    hierarchical_bootstrap,
    holm,
    interval,
    iqm,
    mean,
    mean_retention,
    p_value,
    percentile_interval,
    t_test,
    worst_task,
)

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


@pytest.mark.parametrize("statistic", [mean, geometric])
def test_statistics__treat_leading_axes_as_resamples(statistic):
    rng = np.random.default_rng(0)
    strata = [rng.uniform(1, 2, size=(7, 9)), rng.uniform(1, 2, size=(7, 5))]
    for i, resample in enumerate(zip(*strata, strict=True)):
        assert statistic(strata)[i] == pytest.approx(statistic(list(resample)))


def test_statistics__are_of_all_strata_together():
    strata = [np.array([0.5, 2.0]), np.array([8.0])]
    assert mean(strata) == 3.5
    assert geometric(strata) == pytest.approx(2)


def test_interval__holds_the_true_mean_95_times_of_100():
    def of_strata(strata):
        return np.mean([x.mean(-1) for x in strata], axis=0)

    rng = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        low, high = interval(of_strata, [rng.normal(1, 1, 20), rng.normal(3, 5, 20)], 300)
        held += low < 2 < high
    assert 88 <= held <= 99


def test_interval__resamples_each_stratum_by_itself():
    low, high = interval(mean, [np.zeros(5), np.full(5, 10.0)])
    assert low == high == 5


def test_cell__shows_value_and_interval():
    assert cell(mean, [np.full(4, 0.25)]) == "0.250 (0.250-0.250)"
    assert cell(mean, [np.full(4, -2.0)], "{:.1f}") == "-2.0 (-2.0 to -2.0)"
    assert cell(mean, [np.array([1.0, 2.0])]) == "1.500"  # too few for an interval


# ---- runs of several teachers ------------------------------------------------------------------------------

p_values = st.lists(st.floats(0, 1), min_size=1, max_size=30)


def test_statistics_of_runs__reduce_runs_and_tasks():
    x = np.array([[1.0, 0.8], [0.5, 0.9], [1.2, 1.0]])
    assert mean_retention(x) == pytest.approx(0.9)
    assert worst_task(x) == pytest.approx((0.8 + 0.5 + 1.0) / 3)
    assert failure_rate(x) == pytest.approx(2 / 6)  # 0.9 itself is none
    for statistic in (mean_retention, worst_task, failure_rate):
        assert statistic(np.stack([x, 2 * x])) == pytest.approx([statistic(x), statistic(2 * x)])


def test_hierarchical_bootstrap__draws_teachers_then_runs_of_each():
    one_a_teacher = np.array([[0.0], [0.0], [8.0], [8.0], [8.0]])
    teachers = [3, 3, 5, 5, 5]
    means = hierarchical_bootstrap(mean_retention, teachers, one_a_teacher, n=4000)
    # of the teachers drawn: 3 twice, 5 twice, or both, which have two and three runs
    values, counts = np.unique(np.round(means, 6), return_counts=True)
    assert values.tolist() == [0, 4.8, 8]
    assert counts / 4000 == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    within = hierarchical_bootstrap(mean_retention, [7, 7], np.array([[0.0], [8.0]]), n=4000)
    values, counts = np.unique(within, return_counts=True)
    assert values.tolist() == [0, 4, 8]
    assert counts / 4000 == pytest.approx([0.25, 0.5, 0.25], abs=0.03)


def test_hierarchical_bootstrap__keeps_pairs_and_tasks_together():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(9, 4))
    teachers = [0, 0, 0, 0, 1, 1, 1, 2, 2]
    shifted = hierarchical_bootstrap(lambda a, b: worst_task(a) - worst_task(b), teachers, x + 0.25, x)
    assert shifted.shape == (5000,)
    assert shifted == pytest.approx(0.25)
    spread = np.stack([x[:, 0], x[:, 0] + 1], 1)  # the second task is one above the first in every run
    gaps = hierarchical_bootstrap(lambda a: a[..., 1].mean(-1) - a[..., 0].mean(-1), teachers, spread)
    assert gaps == pytest.approx(1)


def test_hierarchical_bootstrap__is_the_same_in_every_call():
    x = np.arange(6.0)[:, None]
    first, second = (hierarchical_bootstrap(mean_retention, [0, 0, 0, 1, 1, 2], x) for _ in range(2))
    assert first.tolist() == second.tolist()


@pytest.mark.parametrize("between, least", [(0.0, 88), (0.5, 84)])
def test_hierarchical_bootstrap__has_intervals_that_mostly_hold_the_mean(between, least):
    """Of five teachers with two runs each; a bootstrap of runs alone holds it in 80 of 100 at 0.5."""
    rng = np.random.default_rng(0)
    teachers = np.repeat(np.arange(5), 2)
    held = 0
    for _ in range(100):
        x = rng.normal(1, 1, 10) + rng.normal(0, between, 5)[teachers]
        low, high = percentile_interval(hierarchical_bootstrap(mean_retention, teachers, x[:, None], n=500))
        held += low < 1 < high
    assert least <= held <= 99


def test_percentile_interval__holds_the_level():
    resampled = np.arange(1001.0)
    assert percentile_interval(resampled).tolist() == pytest.approx([25, 975])
    assert percentile_interval(resampled, 0.9).tolist() == pytest.approx([50, 950])


def test_equivalence_margin__is_the_far_end_of_the_90_percent_interval():
    assert equivalence_margin(np.arange(-200.0, 801.0)) == pytest.approx(750)
    assert equivalence_margin(np.arange(-800.0, 201.0)) == pytest.approx(750)


@given(numbers)
def test_equivalence_margin__does_not_depend_on_which_comes_first(x):
    assert equivalence_margin(x) == pytest.approx(equivalence_margin(-x))
    low, high = percentile_interval(x)
    assert equivalence_margin(x) <= max(-low, high) + 1e-6


@pytest.mark.parametrize(
    "t, freedom, p",  # from a table of Student's t
    [
        (12.706, 1, 0.05),
        (4.303, 2, 0.05),
        (2.262, 9, 0.05),
        (4.781, 9, 0.001),
        (1.984, 100, 0.05),
        (0, 5, 1),
    ],
)
def test_t_test__agrees_with_a_table(t, freedom, p):
    assert t_test(t, freedom) == pytest.approx(p, rel=0.002)
    assert t_test(-t, freedom) == t_test(t, freedom)


def test_p_value__is_of_the_difference_in_deviations_of_its_bootstrap():
    resampled = np.array([0.0, 2.0, 0.0, 2.0])  # they deviate by 1
    assert p_value(2.262, resampled, 10) == pytest.approx(0.05, rel=0.002)
    assert p_value(-2.262, resampled, 10) == pytest.approx(0.05, rel=0.002)
    assert p_value(0.0, np.zeros(4), 10) == 1
    assert p_value(0.1, np.full(4, 0.1), 10) == 0


def test_p_value__is_rarely_low_without_a_difference():
    rng = np.random.default_rng(0)
    teachers = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    ps = []
    for _ in range(300):
        x = rng.normal(size=(10, 1))
        resampled = hierarchical_bootstrap(mean_retention, teachers, x, n=300)
        ps.append(p_value(x.mean(), resampled, 10))
    ps = np.array(ps)
    assert 0.005 <= (ps <= 0.05).mean() <= 0.07
    assert (ps <= 0.0005).sum() <= 1


def test_holm__multiplies_the_lowest_by_all_and_the_next_by_what_is_left():
    # 4 * 0.005, 3 * 0.01, 2 * 0.03 and, as none is lower than one before it, 0.06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]).tolist() == [1, 1]
    assert holm([]).tolist() == []


@given(p_values, st.integers(0, 1000))
def test_holm__lies_between_p_and_bonferroni_and_keeps_the_order(p, seed):
    p = np.array(p)
    corrected = holm(p)
    assert (p <= corrected).all()
    assert (corrected <= np.minimum(len(p) * p, 1)).all()
    assert (np.diff(corrected[np.argsort(p)]) >= 0).all()
    order = np.random.default_rng(seed).permutation(len(p))
    assert holm(p[order]) == pytest.approx(corrected[order])


@given(p_values, st.floats(0.001, 0.2))
def test_holm__rejects_what_the_step_down_procedure_rejects(p, alpha):
    rejected = []
    for k, value in enumerate(sorted(p)):
        if value * (len(p) - k) > alpha:
            break
        rejected.append(value)
    assert sorted(np.array(p)[holm(p) <= alpha]) == rejected

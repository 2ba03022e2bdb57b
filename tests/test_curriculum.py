"""curriculum.py: what its functions share, and each one's own rule."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import curriculum

names = st.sampled_from(sorted(curriculum.METHODS))
mixed_names = st.sampled_from(["novelty", "dro"])  # many teachers in a batch, by their KLs
scales = st.integers(-6, 6)


@st.composite
def kls(draw) -> Tensor:
    """d (N,) in float64: the KL to each of 1 to 20 teachers, from 1e-8 to 1e8."""
    exponents = draw(st.lists(st.floats(-8, 8), min_size=1, max_size=20))
    return 10.0 ** torch.tensor(exponents, dtype=torch.float64)


def shares_of(name: str, d: Tensor, step: int = 0, seed: int = 0, **options) -> Tensor:
    """The shares after equal ones."""
    before = torch.full_like(d, 1 / len(d))
    return curriculum.METHODS[name](d, step, before, torch.Generator().manual_seed(seed), **options)


# ---- all methods -------------------------------------------------------------------------------------------


@given(names, kls(), st.integers(0, 1000), st.integers(0, 1000))
def test_methods__give_a_distribution(name, d, step, seed):
    shares = shares_of(name, d, step, seed)
    assert shares.shape == d.shape
    assert (shares >= 0).all()
    assert abs(shares.sum() - 1) < 1e-9


@given(names, st.integers(1, 5), st.sampled_from([0.0, 1.0, 2.0, float("inf")]))
def test_methods__give_a_distribution_where_all_kls_are_zero(name, n, power):
    options = {"power": power} if name == "novelty" else {}
    shares = shares_of(name, torch.zeros(n), **options)
    assert shares.isfinite().all()
    assert abs(shares.sum() - 1) < 1e-6


@given(names, st.integers(1, 5), st.data())
def test_methods__name_the_teacher_whose_kl_is_nan(name, n, draws):
    d = torch.ones(n)
    i = draws.draw(st.integers(0, n - 1))
    d[i:] = float("nan")
    with pytest.raises(curriculum.NotANumber, match=f"^distance of teacher {i} is NaN$"):
        shares_of(name, d)


@given(names, st.floats(0, 1e6))
def test_methods__give_a_single_teacher_everything(name, kl):
    assert torch.allclose(shares_of(name, torch.tensor([kl])), torch.ones(1))


@given(st.sampled_from(["novelty", "dro", "all"]), kls(), st.randoms(use_true_random=False))
def test_methods__do_not_depend_on_the_order_of_the_teachers(name, d, random):
    order = list(range(len(d)))
    random.shuffle(order)
    assert torch.allclose(shares_of(name, d[order]), shares_of(name, d)[order])


@given(mixed_names, kls(), scales)
def test_mixed_methods__do_not_depend_on_the_scale_of_the_kls(name, d, k):
    assert torch.allclose(shares_of(name, d * 10.0**k), shares_of(name, d), rtol=1e-6)


@given(mixed_names, kls())
def test_mixed_methods__leave_no_teacher_without_windows(name, d):
    assert (shares_of(name, d) >= curriculum.FLOOR / len(d) - 1e-12).all()


@given(mixed_names, kls())
def test_mixed_methods__give_more_where_the_kl_is_higher(name, d):
    assert (shares_of(name, d)[d.argsort()].diff() >= -1e-12).all()


# ---- novelty -----------------------------------------------------------------------------------------------


@given(kls(), st.sampled_from([0.5, 1.0, 2.0, 4.0]))
def test_novelty__gives_more_where_the_kl_is_higher_at_every_power(d, power):
    assert (shares_of("novelty", d, power=power)[d.argsort()].diff() >= -1e-12).all()


@pytest.mark.parametrize("scale", [1e-30, 0.1, 1.0, 1e30])
def test_novelty__gives_four_times_the_share_to_twice_the_kl(scale):
    """At power 2, the default, over the floor; KLs whose squares leave float32's range are no harm."""
    shares = shares_of("novelty", scale * torch.tensor([1.0, 2.0]))
    over_floor = (shares - curriculum.FLOOR / 2) / (1 - curriculum.FLOOR)
    assert torch.allclose(over_floor, torch.tensor([0.2, 0.8]))


@given(kls(), st.floats(0, 8))
def test_novelty__gives_nobody_more_than_half_or_twice_the_equal_share(d, power):
    shares = shares_of("novelty", d, power=power)
    most = max(curriculum.MOST, 2 / len(d))
    assert shares.max() <= most + 1e-9
    free = shares_of("novelty", d, power=power, most=1.0)
    assert torch.equal(shares, free) == bool(free.max() <= most)  # else nothing is changed
    assert (shares[free.argsort()].diff() >= -1e-12).all()
    assert torch.isclose(shares.sum(), torch.ones((), dtype=d.dtype))


def test_novelty__leaves_the_others_half_of_their_equal_shares_beside_one_of_any_kl():
    d = torch.ones(5)
    d[0] = 1e6
    assert torch.allclose(shares_of("novelty", d), torch.tensor([0.5, 0.125, 0.125, 0.125, 0.125]))
    assert torch.allclose(shares_of("novelty", d[:3]), torch.tensor([2 / 3, 1 / 6, 1 / 6]))
    assert shares_of("novelty", d[:2])[0] > 0.94  # of two, one may take all but the floor


@given(kls())
def test_novelty__is_all_at_once_at_power_zero(d):
    assert torch.allclose(shares_of("novelty", d, power=0.0), shares_of("all", d))


@given(kls())
def test_novelty__is_the_argmax_at_infinite_power(d):
    shares = shares_of("novelty", d, power=float("inf"))
    assert shares.argmax() == d.argmax()
    assert shares.max() == 1


@given(st.integers(1, 8))
def test_novelty__breaks_ties_by_the_lowest_index(n):
    assert shares_of("novelty", torch.ones(n), power=float("inf")).tolist() == [1.0] + [0.0] * (n - 1)
    assert shares_of("novelty", torch.tensor([1.0, 5.0, 5.0]), power=float("inf")).tolist() == [0.0, 1.0, 0.0]


# ---- one teacher at a time ---------------------------------------------------------------------------------


@given(st.integers(1, 10), st.integers(0, 100))
def test_fixed__takes_every_teacher_in_turn(n, start):
    taken = [int(shares_of("fixed", torch.ones(n), start + k).argmax()) for k in range(n)]
    assert taken == [(start + k) % n for k in range(n)]


@given(st.integers(1, 6))
def test_uniform__takes_one_teacher_and_over_time_every_teacher(n):
    generator = torch.Generator().manual_seed(0)
    taken = torch.stack([curriculum.uniform(torch.ones(n), 0, None, generator) for _ in range(50 * n)])
    assert (taken.max(1).values == 1).all()
    assert taken.mean(0).min() > 0.5 / n


def test_uniform__draws_from_the_generator_that_it_is_given():
    d = torch.ones(100)
    assert torch.equal(shares_of("uniform", d, seed=1), shares_of("uniform", d, seed=1))
    assert not torch.equal(shares_of("uniform", d, seed=1), shares_of("uniform", d, seed=2))


# ---- dro ---------------------------------------------------------------------------------------------------


def test_dro__is_exponentiated_gradient_on_what_the_shares_have_over_the_floor():
    d = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    before = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    weights = (before - curriculum.FLOOR / 3) * (0.01 * d / 3.0).exp()
    wanted = 0.9 * weights / weights.sum() + 0.1 / 3
    assert curriculum.FLOOR == 0.1
    assert torch.allclose(curriculum.dro(d, 0, before, torch.Generator()), wanted, rtol=1e-12)


def test_dro__accumulates_and_novelty_does_not():
    d = torch.tensor([1.0, 3.0])
    for name, grows in (("dro", True), ("novelty", False)):
        first = curriculum.METHODS[name](d, 0, torch.tensor([0.5, 0.5]), torch.Generator())
        second = curriculum.METHODS[name](d, 1, first, torch.Generator())
        assert (second[1] > first[1] + 1e-4) == grows


def test_dro__goes_on_to_the_teacher_whose_kl_stays_high():
    d = torch.tensor([1.0, 0.1, 0.1])
    shares = torch.full((3,), 1 / 3)
    for step in range(1000):
        shares = curriculum.dro(d, step, shares, torch.Generator())
    assert shares[0] > 0.9
    assert (shares >= curriculum.FLOOR / 3 - 1e-6).all()


def test_dro__lets_a_teacher_at_the_floor_come_back():
    """Its weight is 1e-6, not 0, which no factor would ever raise."""
    shares = torch.tensor([0.95, 0.05])
    after = curriculum.dro(torch.tensor([0.0, 1.0]), 0, shares, torch.Generator())
    assert 0.5e-6 < after[1] - 0.05 < 2e-6


# ---- the share law -----------------------------------------------------------------------------------------


def by_law(c: Tensor, shares: Tensor) -> Tensor:
    """KLs (N,) of mean shares (N,), c (N,) being those of equal shares."""
    return c * (len(c) * shares) ** -curriculum.LAW


def test_novelty__takes_a_part_of_the_headroom():
    """Of 1 + p LAW: what the controller without memory leaves."""
    c = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    d = c
    for _ in range(100):
        shares = curriculum.novelty(d, 0, None, None)
        d = (d * by_law(c, shares)).sqrt()
    gap = (d[2] / d[0]).log() / (c[2] / c[0]).log()
    assert abs(gap - 1 / (1 + 2 * curriculum.LAW)) < 0.08  # with a floor


@given(kls())
def test_worst_by_law__says_the_same_from_whatever_shares(c):
    x = torch.linspace(0.5, 1.5, len(c), dtype=c.dtype)
    equal, best = curriculum.worst_by_law(by_law(c, x / x.sum()), x / x.sum())
    assert torch.isclose(equal, c.max())
    assert torch.isclose(best, curriculum.worst_by_law(c, torch.full_like(c, 1 / len(c)))[1])
    assert best <= equal * (1 + 1e-9)


def test_worst_by_law__of_two_teachers_by_hand():
    """With nothing to learn of the second, the first gets twice its share."""
    shares = torch.tensor([0.5, 0.5], dtype=torch.float64)
    equal, best = curriculum.worst_by_law(torch.tensor([1.0, 0.0], dtype=torch.float64), shares)
    assert equal == 1
    assert abs(best - 0.5**curriculum.LAW) < 1e-12

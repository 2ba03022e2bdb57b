"""research/variants.py: the study's own curricula and surgeries, and their place in the method's tables."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import curriculum
import distill
import surgery
from kernels.project import project
from research import variants
from research.variants import CASES, CORE, DEFAULT, OF_TORCHJD, RUNS, UNTUNED

OWN_CURRICULA = {
    "least",
    "validated",
    "integral",
    "weights",
    "novelty 1",
    "novelty 2",
    "novelty 4",
    "dro 0.003",
    "dro 0.03",
}
POWERS = [0.5, 1.0, 2.0, 4.0]
G = torch.tensor([1.0, 0.0])
U = torch.tensor([-1.0, 1.0])  # in conflict with G, which projected is (0.5, 0.5)
PROJECTED = torch.tensor([0.5, 0.5])


@pytest.fixture
def tables(monkeypatch):
    """The method's tables, which `register` may change."""
    monkeypatch.setattr(curriculum, "METHODS", dict(curriculum.METHODS))
    monkeypatch.setattr(surgery, "METHODS", dict(surgery.METHODS))
    monkeypatch.setattr(surgery, "EACH", surgery.EACH)


@st.composite
def kls(draw) -> Tensor:
    """d (N,) in float64: the KL to each of 1 to 20 teachers."""
    return torch.tensor(draw(st.lists(st.floats(1e-8, 1e8), min_size=1, max_size=20)), dtype=torch.float64)


def least(d, power=2.0):
    return variants.least(d, 0, torch.full_like(d, 1 / len(d)), torch.Generator(), power)


def choose(name, d, step=0, shares=None):
    """The shares that a registered curriculum gives."""
    d = torch.tensor(d)
    shares = torch.full_like(d, 1 / len(d)) if shares is None else shares
    return curriculum.METHODS[name](d, step, shares, torch.Generator().manual_seed(0))


# ---- least -------------------------------------------------------------------------------------------------


@given(kls(), st.sampled_from(POWERS))
def test_least__gives_a_distribution(d, power):
    shares = least(d, power)
    assert shares.shape == d.shape
    assert (shares >= 0).all()
    assert abs(shares.sum() - 1) < 1e-9


@given(kls(), st.sampled_from(POWERS))
def test_least__gives_less_where_the_kl_is_higher(d, power):
    assert (least(d, power)[d.argsort()].diff() <= 1e-12).all()


def test_least__gives_a_quarter_of_the_share_to_twice_the_kl():
    over_floor = (least(torch.tensor([1.0, 2.0])) - curriculum.FLOOR / 2) / (1 - curriculum.FLOOR)
    assert torch.allclose(over_floor, torch.tensor([0.8, 0.2]))


@given(kls(), st.randoms(use_true_random=False))
def test_least__does_not_depend_on_the_order_of_the_teachers(d, random):
    order = list(range(len(d)))
    random.shuffle(order)
    assert torch.allclose(least(d[order]), least(d)[order])


@given(kls(), st.integers(-6, 6))
def test_least__does_not_depend_on_the_scale_of_the_kls(d, k):
    assert torch.allclose(least(d * 10.0**k), least(d), rtol=1e-6)


@given(kls())
def test_least__leaves_no_teacher_without_windows(d):
    assert (least(d) >= curriculum.FLOOR / len(d) - 1e-12).all()


@given(st.integers(1, 5), st.sampled_from([1.0, 2.0]))
def test_least__gives_a_distribution_where_kls_are_zero(n, power):
    shares = least(torch.zeros(n), power)
    assert shares.isfinite().all()
    assert abs(shares.sum() - 1) < 1e-6
    one_zero = torch.tensor([0.0] + [1.0] * (n - 1))
    assert least(one_zero, power).argmax() == 0


@given(st.integers(1, 5), st.data())
def test_least__names_the_teacher_whose_kl_is_nan(n, draws):
    i = draws.draw(st.integers(0, n - 1))
    d = torch.ones(n)
    d[i] = math.nan
    with pytest.raises(curriculum.NotANumber, match=f"teacher {i} "):
        least(d)


@given(st.floats(0, 1e6))
def test_least__gives_a_single_teacher_everything(kl):
    assert torch.allclose(least(torch.tensor([kl])), torch.ones(1))


# ---- the other curricula -----------------------------------------------------------------------------------


def test_weights__are_the_same_in_every_update(tables):
    variants.register([0.2, 0.3, 0.5])
    for step in range(3):
        assert torch.equal(choose("weights", [1.0, 9.0, 0.1], step), torch.tensor([0.2, 0.3, 0.5]))


# ---- surgeries ---------------------------------------------------------------------------------------------


def test_average__remembers_many_updates():
    g, u = variants.average(G, U)
    assert torch.allclose(g, PROJECTED)
    assert torch.allclose(u, 0.9 * U + 0.1 * PROJECTED)


@given(st.integers(0, 1000))
def test_average__per_teacher_is_the_sum_of_each_teachers_projected_gradient(seed):
    generator = torch.Generator().manual_seed(seed)
    gs = torch.randn(4, 30, generator=generator, dtype=torch.float64)
    u = torch.randn(30, generator=generator, dtype=torch.float64)
    shares = torch.rand(4, generator=generator, dtype=torch.float64)
    shares = shares / shares.sum()
    wanted = sum(s * project(g, u) for s, g in zip(shares, gs, strict=True))
    kappa = surgery.per_teacher(gs @ u, shares, u @ u)
    assert torch.allclose(variants.average(shares @ gs, u, kappa)[0], wanted, atol=1e-12)


def test_aggregated__multiplies_a_mean_by_the_number_of_teachers():
    gs = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    g, u = variants.aggregated(lambda rows: rows.mean(0))(gs, torch.zeros(2))
    assert torch.equal(g, gs.sum(0))
    assert torch.equal(u, g)


# ---- the method's tables -----------------------------------------------------------------------------------


def test_register__adds_to_the_tables_and_leaves_the_methods_own_there(tables):
    own = dict(curriculum.METHODS), dict(surgery.METHODS)
    variants.register([1.0])
    assert set(own[0]) | OWN_CURRICULA == set(curriculum.METHODS)
    assert set(own[1]) | {"average"} <= set(surgery.METHODS)
    for mine, after in zip(own, (curriculum.METHODS, surgery.METHODS), strict=True):
        assert all(after[name] is mine[name] for name in mine)


def test_register__novelty_of_a_power_has_no_limit(tables):
    variants.register()
    d = [1.0, 1.0, 1.0, 100.0]
    assert choose("novelty", d).max() <= curriculum.MOST + 1e-6
    assert choose("novelty 2", d).max() > 0.9
    unlimited = [choose(f"novelty {p}", [1.0, 2.0])[1] for p in (1, 2, 4)]
    assert unlimited == sorted(unlimited)


@pytest.mark.skipif(not variants.has_torchjd(), reason="needs torchjd")
@pytest.mark.parametrize("name", ["upgrad", "cagrad"])
def test_register__adds_torchjds_aggregators(tables, name):
    variants.register([])
    variants.register([])
    assert surgery.EACH.count(name) == 1
    one = torch.tensor([[1.0, 2.0, 3.0]])
    assert torch.allclose(
        surgery.METHODS[name](one, torch.zeros(3))[0], (1.5 if name == "cagrad" else 1) * one[0]
    )
    conflicting = torch.tensor([[1.0, 0.0, 0.0], [-0.5, 1.0, 0.0]])
    g, u = surgery.METHODS[name](conflicting, torch.zeros(3))
    assert (conflicting @ g > 0).all()
    assert torch.equal(g, u)


@pytest.mark.skipif(not variants.has_torchjd(), reason="needs torchjd")
def test_torchjds_pcgrad__is_the_methods_own(tables):
    variants.register()
    gs = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for name in ("pcgrad", "torchjd pcgrad"):
        torch.manual_seed(3)  # the orders in which gradients are compared
        found.append(surgery.METHODS[name](gs, torch.zeros(4))[0])
    assert not torch.allclose(found[0], gs.sum(0))
    assert torch.allclose(*found)


@pytest.mark.parametrize("run", RUNS)
def test_runs__are_options_of_distill_with_registered_methods(tables, run):
    variants.register([1.0])
    cfg = distill.Config(**RUNS[run])
    assert cfg.curriculum in curriculum.METHODS
    assert cfg.surgery in {*surgery.METHODS, *OF_TORCHJD}


@pytest.mark.parametrize("case", CASES)
def test_cases__are_options_of_distill(case):
    assert distill.Config(**CASES[case])


def test_default__is_what_distill_does_without_options():
    assert dataclasses.replace(distill.Config(), **RUNS[DEFAULT]) == distill.Config()
    assert set(CORE) <= set(RUNS)
    assert set(UNTUNED) <= set(RUNS)


# ---- integral ----------------------------------------------------------------------------------------------


def by_law(c: Tensor, shares: Tensor) -> Tensor:
    """KLs (N,) of mean shares (N,), c (N,) being those of equal shares."""
    return c * (len(c) * shares) ** -curriculum.LAW


def followed(c: Tensor, steps: int = 3000) -> Tensor:
    """The mean shares (N,) that integral comes to where the share law holds."""
    mean = torch.full_like(c, 1 / len(c))
    for step in range(steps):
        shares = variants.integral(by_law(c, mean), step, mean, torch.Generator())
        mean = mean + (shares - mean) / (step + 100)
    return mean


moderate = st.lists(st.floats(-0.25, 0.25), min_size=2, max_size=8).map(
    lambda x: 10 ** torch.tensor(x, dtype=torch.float64)
)


@settings(max_examples=20, deadline=None)
@given(moderate)
def test_integral__makes_all_kls_equal_and_takes_the_headroom(c):
    """No teacher here should have less than the floor. The mean of shares forgets slowly: as 1 / step."""
    d = by_law(c, followed(c))
    assert (d.max() / d.min()).log() < 0.25 * (c.max() / c.min()).log() + 1e-9
    best = curriculum.worst_by_law(c, torch.full_like(c, 1 / len(c)))[1]
    assert 1 - 1e-9 < d.max() / best < 1.05


@given(kls())
def test_integral__gives_shares(d):
    shares = variants.integral(d, 0, torch.full_like(d, 1 / len(d)), torch.Generator())
    assert torch.isclose(shares.sum(), torch.ones((), dtype=d.dtype))
    assert (shares >= curriculum.FLOOR / len(d) - 1e-12).all()
    assert shares.argmax() == d.argmax() or torch.isclose(shares.max(), shares[d.argmax()])

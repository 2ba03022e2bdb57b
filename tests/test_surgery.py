"""surgery.py and the projection it is made of."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kernels
import surgery
from conftest import triton_needed
from kernels.project import project, project_ref

KINDS = ("any", "conflict", "agree", "opposite", "zero u", "zero g")


@st.composite
def gradients(draw, exponents=(-10, 10)) -> tuple[Tensor, Tensor]:
    """g and u (P,) of one dtype, each with a scale 10^exponent of its own; u may be zero, or opposed to g."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    P = draw(st.integers(1, 200))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    kind = draw(st.sampled_from(KINDS))
    g, u = rng.normal(size=(2, P))
    along_g = 2 * abs(u @ g) / (g @ g) * g
    of_kind = {"conflict": u - along_g, "agree": u + along_g, "opposite": -g, "zero u": 0 * u}
    u = of_kind.get(kind, u)
    if kind == "zero g":
        g = 0 * g
    scale_g = 10.0 ** draw(st.integers(*exponents))
    scale_u = 10.0 ** draw(st.integers(*exponents))
    return torch.tensor(g * scale_g, dtype=dtype), torch.tensor(u * scale_u, dtype=dtype)


def rounding(g: Tensor) -> float:
    """What rounding may add to a vector of g's size."""
    return float(200 * torch.finfo(g.dtype).eps * g.double().norm())


# ---- projection --------------------------------------------------------------------------------------------


def test_project__is_the_reference_on_a_cpu():
    g, u = torch.randn(2, 50)
    assert torch.equal(project(g, u), project_ref(g, u))


@given(gradients())
def test_project__is_the_formula_in_float64(pair):
    g, u = pair
    unit = u.double()
    if u.any():
        unit = unit / unit.norm()
    wanted = g.double() - min(0.0, float(g.double() @ unit)) * unit
    assert torch.allclose(project(g, u).double(), wanted, rtol=0, atol=rounding(g) / 2 + 1e-45)


@given(gradients())
def test_project__never_opposes_the_previous_gradient(pair):
    g, u = pair
    assert project(g, u).double() @ u.double() >= -rounding(g) * u.double().norm()


@given(gradients())
def test_project__leaves_a_gradient_without_conflict_alone_to_the_bit(pair):
    g, u = pair
    agrees = g.double() @ u.double() > rounding(g) * u.double().norm()
    if agrees or not u.any() or not g.any():
        assert torch.equal(project(g, u), g)


@given(gradients())
def test_project__changes_nothing_the_second_time(pair):
    g, u = pair
    once = project(g, u)
    assert (project(once, u) - once).double().norm() <= rounding(g)


@given(gradients(exponents=(-5, 5)), st.integers(-5, 5))
def test_project__does_not_depend_on_the_scale_of_the_previous_gradient(pair, k):
    g, u = pair
    assert (project(g, u * 10.0**k) - project(g, u)).double().norm() <= rounding(g)


@given(gradients(exponents=(-5, 5)), st.integers(-5, 5))
def test_project__is_linear_in_the_scale_of_the_gradient(pair, k):
    g, u = pair
    scaled_before = project(g * 10.0**k, u).double()
    scaled_after = project(g, u).double() * 10.0**k
    assert (scaled_before - scaled_after).norm() <= rounding(g) * 10.0**k


@given(gradients(exponents=(-37, -30)))
def test_project__gives_finite_numbers_where_the_previous_gradient_is_tiny(pair):
    g, u = pair
    g = torch.sign(g)
    got = project(g, u)
    assert got.isfinite().all()
    assert got.double() @ u.double() >= -rounding(g) * u.double().norm()


def test_project__takes_a_coefficient_beyond_float32():
    """<g, u> / <u, u> may leave float32's range where its product with u does not."""
    torch.manual_seed(0)
    u = torch.randn(50)
    g = torch.randn(50) - u
    wanted = project(g, u)
    assert wanted.abs().max() > 0.1
    assert torch.allclose(project(g * 1e10, u * 1e-30) / 1e10, wanted, atol=1e-5)


# ---- methods -----------------------------------------------------------------------------------------------

G = torch.tensor([1.0, 0.0])
U = torch.tensor([-1.0, 1.0])  # in conflict with G, which projected is (0.5, 0.5)


def test_none__leaves_the_gradient_and_keeps_it_as_the_next_u():
    g, u = surgery.METHODS["none"](G, U)
    assert torch.equal(g, G)
    assert torch.equal(u, G)


def test_previous__keeps_the_gradient_after_surgery_as_the_next_u():
    g, u = surgery.METHODS["previous"](G, U)
    assert torch.allclose(g, torch.tensor([0.5, 0.5]))
    assert torch.equal(u, g)


def test_previous__takes_kappa_of_u_away():
    g, u = surgery.METHODS["previous"](G, U, torch.tensor(-0.25))
    assert torch.equal(g, torch.tensor([0.75, 0.25]))
    assert torch.equal(u, g)


@given(st.integers(0, 1000), st.integers(-5, 5))
def test_per_teacher__is_the_sum_of_every_teachers_own_projected_gradient(seed, exponent):
    """Whatever the scale of u."""
    generator = torch.Generator().manual_seed(seed)
    gs = torch.randn(4, 30, generator=generator, dtype=torch.float64)
    u = torch.randn(30, generator=generator, dtype=torch.float64) * 10.0**exponent
    shares = torch.rand(4, generator=generator, dtype=torch.float64)
    shares = shares / shares.sum()
    wanted = sum(share * project(g, u) for share, g in zip(shares, gs, strict=True))
    kappa = surgery.per_teacher(gs @ u, shares, u @ u)
    assert torch.allclose(surgery.METHODS["previous"](shares @ gs, u, kappa)[0], wanted, atol=1e-12)


def test_per_teacher__does_nothing_without_a_previous_gradient():
    assert surgery.per_teacher(torch.zeros(3), torch.ones(3) / 3, torch.tensor(0.0)) == 0


@given(st.integers(0, 1000), st.integers(1, 5))
def test_pcgrad__opposes_neither_of_two_teachers_and_is_the_sum_without_conflict(seed, n):
    generator = torch.Generator().manual_seed(seed)
    gs = torch.randn(2, 20, generator=generator, dtype=torch.float64)
    g, u = surgery.METHODS["pcgrad"](gs, generator=generator)
    assert torch.equal(g, u)
    assert (gs @ g >= -1e-9).all()
    agreeing = torch.rand(n, 20, generator=generator, dtype=torch.float64)
    assert torch.allclose(surgery.METHODS["pcgrad"](agreeing, generator=generator)[0], agreeing.sum(0))


def test_pcgrad__is_algorithm_1_of_its_paper():
    """In the generator's order, each gradient against the others as they were, not as projected."""
    gs = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gs[1] -= gs[0]
    gs[2] -= gs[3]
    generator = torch.Generator().manual_seed(7)
    wanted = torch.zeros(6, dtype=torch.float64)
    for i in range(4):
        g = gs[i].clone()
        for j in torch.randperm(4, generator=generator).tolist():
            inner = g @ gs[j]
            if i != j and inner < 0:
                g -= inner / (gs[j] @ gs[j]) * gs[j]
        wanted += g
    got, _ = surgery.pcgrad(gs, generator=torch.Generator().manual_seed(7))
    assert not torch.allclose(got, gs.sum(0))
    assert torch.allclose(got, wanted, rtol=1e-12)


# ---- a whole update ----------------------------------------------------------------------------------------

SCHEDULE = torch.tensor([0.01, 1 - 0.9**3, 1 - 0.999**3, 3.0])  # the third update's
DESCENT = {
    "schedule": torch.ones(3 + 1),
    "clip": 1e9,
    "betas": (0.0, 0.0),
    "eps": 1e9,
}  # AdamW is then g / eps
ways = pytest.mark.parametrize("way", ["plain", "fused", pytest.param("kernel", marks=triton_needed)])


def vectors(P: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """theta, u, m and v (P,), as some updates may have left them."""
    torch.manual_seed(0)
    made = {name: torch.randn(P, dtype=dtype) for name in ("theta", "u", "m", "v")}
    made["v"] = made["v"].square()
    return made


def run(
    way: str, name: str, state: dict[str, Tensor], g: Tensor, monkeypatch, kappa=None, alive=True, **adamw
):
    """surgery.step in place of `state`: its Step, and what became of `alive`."""
    monkeypatch.setattr(kernels, "on_cpu", way == "kernel")
    flag = torch.tensor(alive)
    step = surgery.step(name, g=g, kappa=kappa, fused=way != "plain", alive=flag, **state, **adamw)
    return step, bool(flag)


@ways
@pytest.mark.parametrize("name", surgery.FUSED)
@pytest.mark.parametrize("kappa", [None, -0.3])
@pytest.mark.parametrize("conflict", [True, False])
def test_step__does_what_the_method_does(way, name, kappa, conflict, monkeypatch):
    state = vectors(40)
    u = state["u"].clone()
    g = torch.randn(40) - (2 * u if conflict else -2 * u)
    kappa = None if kappa is None or name == "none" else torch.tensor(kappa)
    wanted_g, wanted_u = surgery.METHODS[name](g, u, kappa)
    state |= {name: torch.zeros(40) for name in ("theta", "m", "v")}
    step, alive = run(way, name, state, g, monkeypatch, kappa, **DESCENT)
    assert alive
    assert torch.allclose(state["u"], wanted_u, atol=1e-6)
    assert torch.allclose(-state["theta"] * 1e9, wanted_g, rtol=1e-4, atol=1e-4)
    assert torch.allclose(step.cosine, torch.cosine_similarity(g, u, dim=0), rtol=1e-5)
    assert torch.allclose(step.norm, g.norm(), rtol=1e-5)
    assert torch.allclose(step.norm_after, wanted_g.norm(), rtol=1e-5)
    assert bool(step.projected) == (not torch.equal(wanted_g, g))


@ways
@pytest.mark.parametrize("name", surgery.FUSED)
def test_step__clips_and_descends_as_pytorchs_adamw(way, name, monkeypatch):
    state = vectors(40)
    g = torch.randn(40) - 2 * state["u"]
    after, _ = surgery.METHODS[name](g, state["u"])
    theta = torch.nn.Parameter(state["theta"].clone())
    theta.grad = after.clone()
    optimizer = torch.optim.AdamW([theta], lr=0.01, weight_decay=0.1)
    moments = {"exp_avg": state["m"].clone(), "exp_avg_sq": state["v"].clone(), "step": torch.tensor(2.0)}
    optimizer.state[theta] = moments
    torch.nn.utils.clip_grad_norm_([theta], 0.25)
    optimizer.step()
    run(way, name, state, g, monkeypatch, schedule=SCHEDULE, clip=0.25, weight_decay=0.1)
    assert torch.allclose(state["theta"], theta.data, rtol=1e-5, atol=1e-6)
    assert torch.allclose(state["m"], moments["exp_avg"], rtol=1e-5, atol=1e-7)
    assert torch.allclose(state["v"], moments["exp_avg_sq"], rtol=1e-5, atol=1e-7)


@ways
@pytest.mark.parametrize("alive", [True, False])
def test_step__changes_nothing_from_the_first_gradient_that_is_not_finite(way, alive, monkeypatch):
    """alive False: such a gradient came before, and this one is finite."""
    state = vectors(40)
    before = {name: x.clone() for name, x in state.items()}
    g = torch.randn(40)
    if alive:
        g[7] = float("nan")
    _, flag = run(way, "previous", state, g, monkeypatch, alive=alive, schedule=SCHEDULE)
    assert not flag
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_step__reports_the_sum_where_the_method_takes_every_teachers_gradient(monkeypatch):
    state = vectors(40)
    u = state["u"].clone()
    gs = torch.randn(2, 40)
    gs[1] -= gs[0]  # in conflict: for two teachers the order does not matter
    wanted, _ = surgery.METHODS["pcgrad"](gs)
    step, _ = run("plain", "pcgrad", state, gs, monkeypatch, schedule=SCHEDULE)
    assert torch.allclose(step.cosine, torch.cosine_similarity(gs.sum(0), u, dim=0), rtol=1e-5)
    assert torch.allclose(step.norm, gs.sum(0).norm())
    assert torch.allclose(step.norm_after, wanted.norm())
    assert step.projected
    assert torch.allclose(state["u"], wanted, rtol=1e-6)


@ways
def test_step__reports_cosine_and_norms_of_tiny_gradients_too(way, monkeypatch):
    state = vectors(40)
    g = torch.randn(40)
    wanted = torch.cosine_similarity(g, state["u"], dim=0)
    state["u"] *= 1e-6
    step, _ = run(way, "none", state, 1e-6 * g, monkeypatch, schedule=SCHEDULE)
    assert torch.allclose(step.cosine, wanted, rtol=1e-4)
    assert torch.allclose(step.norm, 1e-6 * g.norm())
    assert torch.allclose(step.norm_after, 1e-6 * g.norm())


@ways
def test_step__has_a_cosine_of_zero_before_the_first_update(way, monkeypatch):
    state = vectors(40) | {"u": torch.zeros(40)}
    step, _ = run(way, "previous", state, torch.randn(40), monkeypatch, schedule=SCHEDULE)
    assert step.cosine == 0
    assert not step.projected

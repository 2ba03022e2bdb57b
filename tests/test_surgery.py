import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import surgery
from kernels.project import project, project_adamw, project_ref


@st.composite
def two_gradients(draw, scales=(-10, 10)):
    """g, u of one length and dtype, each with a scale of its own; u sometimes zero, sometimes opposed to g."""
    rng, P = np.random.default_rng(draw(st.integers(0, 2**32 - 1))), draw(st.integers(1, 200))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    g, u = rng.normal(size=(2, P))
    kind = draw(st.sampled_from(["any", "conflict", "agree", "opposite", "zero u", "zero g"]))
    u = {
        "conflict": u - 2 * abs(u @ g) / (g @ g) * g,
        "agree": u + 2 * abs(u @ g) / (g @ g) * g,
        "opposite": -g,
        "zero u": 0 * u,
    }.get(kind, u)
    g = 0 * g if kind == "zero g" else g
    s, t = (10.0 ** draw(st.integers(*scales)) for _ in range(2))
    return torch.tensor(g * s, dtype=dtype), torch.tensor(u * t, dtype=dtype)


def tolerance(g, u):
    return 200 * torch.finfo(g.dtype).eps * g.double().norm() * u.double().norm()


def test_a_coefficient_that_leaves_float32s_range_is_no_harm():
    torch.manual_seed(0)
    u = torch.randn(50)
    g = torch.randn(50) - u
    want = project(g, u)
    assert torch.allclose(project(g * 1e10, u * 1e-30) / 1e10, want, atol=1e-5) and want.abs().max() > 0.1


@given(two_gradients())
def test_projected_gradient_never_opposes_the_previous_one(pair):
    g, u = pair
    assert surgery.project(g, u).double() @ u.double() >= -tolerance(g, u)


@given(two_gradients())
def test_a_gradient_that_does_not_conflict_is_left_alone_to_the_bit(pair):
    g, u = pair
    out = surgery.project(g, u)
    if g.double() @ u.double() > tolerance(g, u) or not u.any() or not g.any():
        assert torch.equal(out, g)


@given(two_gradients())
def test_projection_is_the_formula_in_float64(pair):
    g, u = pair
    G, U = g.double(), u.double()
    U = U / U.norm() if U.any() else U
    want = G - min(0.0, float(G @ U)) * U
    assert torch.allclose(
        surgery.project(g, u).double(),
        want,
        rtol=0,
        atol=float(100 * torch.finfo(g.dtype).eps * G.norm()) + 1e-45,
    )


@given(two_gradients())
def test_projecting_twice_is_projecting_once(pair):
    g, u = pair
    once = surgery.project(g, u)
    assert (surgery.project(once, u) - once).double().norm() <= 200 * torch.finfo(
        g.dtype
    ).eps * g.double().norm()


@given(two_gradients(scales=(-5, 5)), st.integers(-5, 5))
def test_the_scale_of_the_previous_gradient_does_not_matter(pair, k):
    g, u = pair
    assert (surgery.project(g, u * 10.0**k) - surgery.project(g, u)).double().norm() <= 200 * torch.finfo(
        g.dtype
    ).eps * g.double().norm()


@given(two_gradients(scales=(-5, 5)), st.integers(-5, 5))
def test_projection_is_linear_in_the_scale_of_the_gradient(pair, k):
    g, u = pair
    a, b = surgery.project(g * 10.0**k, u).double(), surgery.project(g, u).double() * 10.0**k
    assert (a - b).norm() <= 200 * torch.finfo(g.dtype).eps * g.double().norm() * 10.0**k


@given(two_gradients(scales=(-37, -30)))
def test_a_tiny_previous_gradient_gives_finite_numbers(pair):
    g, u = pair
    out = surgery.project(torch.sign(g), u)
    assert out.isfinite().all() and out.double() @ u.double() >= -tolerance(torch.sign(g), u)


def test_the_public_function_is_the_reference_on_a_cpu():
    g, u = torch.randn(2, 50)
    assert torch.equal(project(g, u), project_ref(g, u)) and surgery.project is project


@given(st.integers(0, 1000))
def test_per_teacher_projection_is_the_sum_of_each_teachers_own_projected_gradient(seed):
    gen = torch.Generator().manual_seed(seed)
    gs, u = (
        torch.randn(4, 30, generator=gen, dtype=torch.float64),
        torch.randn(30, generator=gen, dtype=torch.float64),
    )
    s = torch.rand(4, generator=gen, dtype=torch.float64)
    s = s / s.sum()
    want = sum(si * project(gi, u) for si, gi in zip(s, gs, strict=True))
    kappa = surgery.per_teacher(gs @ u, s, u @ u)
    for method in ("previous", "average"):
        assert torch.allclose(surgery.METHODS[method](s @ gs, u, kappa)[0], want, atol=1e-12)


def test_per_teacher_projection_against_no_previous_gradient_does_nothing():
    assert surgery.per_teacher(torch.zeros(3), torch.ones(3) / 3, torch.tensor(0.0)) == 0


G, U = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])  # in conflict; the projection is (0.5, 0.5)


def test_none_leaves_the_gradient_and_remembers_it():
    g, u = surgery.METHODS["none"](G, U)
    assert torch.equal(g, G) and torch.equal(u, G)


def test_previous_remembers_the_gradient_after_its_surgery():
    g, u = surgery.METHODS["previous"](G, U)
    assert torch.allclose(g, torch.tensor([0.5, 0.5])) and torch.equal(u, g)


def test_switch_operates_only_when_the_teacher_changed():
    assert torch.allclose(surgery.METHODS["switch"](G, U, changed=True)[0], torch.tensor([0.5, 0.5]))
    assert torch.equal(surgery.METHODS["switch"](G, U, changed=False)[0], G)


def test_average_remembers_many_updates():
    g, u = surgery.METHODS["average"](G, U)
    assert torch.allclose(g, torch.tensor([0.5, 0.5])) and torch.allclose(
        u, surgery.BETA * U + (1 - surgery.BETA) * g
    )


@pytest.mark.parametrize("name", sorted(surgery.FUSED))
@pytest.mark.parametrize("changed", [True, False])
@pytest.mark.parametrize("kappa", [None, -0.3])
def test_the_fused_update_does_what_the_method_does(name, changed, kappa):
    gen = torch.Generator().manual_seed(0)
    u = torch.randn(40, generator=gen)
    for g in (torch.randn(40, generator=gen) - u, torch.randn(40, generator=gen) + u):
        kappa = None if kappa is None or name == "none" else torch.as_tensor(kappa)
        want_g, want_u = surgery.METHODS[name](g, u, kappa, changed)
        got_u, theta, zero = u.clone(), torch.zeros(40), torch.zeros(40)
        stats = project_adamw(theta, g, got_u, zero.clone(), zero.clone(), torch.ones(3), torch.tensor(True), kappa, clip=1e9, betas=(0.0, 0.0), eps=1e9,
                              **surgery.FUSED[name](torch.tensor(changed)))  # fmt: skip
        assert torch.allclose(got_u, want_u, atol=1e-6) and torch.allclose(
            -theta * 1e9, want_g, rtol=1e-4, atol=1e-4
        )  # AdamW of so large an eps is plain descent
        assert torch.allclose(stats[3], want_g.norm(), rtol=1e-5) and (stats[4] != 0) == (
            not torch.equal(want_g, g)
        )


@given(st.integers(0, 1000), st.integers(1, 5))
def test_pcgrad_with_two_teachers_opposes_neither_and_without_conflict_is_the_sum(seed, n):
    gen = torch.Generator().manual_seed(seed)
    gs = torch.randn(2, 20, generator=gen, dtype=torch.float64)
    g, u = surgery.METHODS["pcgrad"](gs, generator=gen)
    assert torch.equal(g, u) and (gs @ g >= -1e-9).all()
    agree = torch.rand(n, 20, generator=gen, dtype=torch.float64)
    assert torch.allclose(surgery.METHODS["pcgrad"](agree, generator=gen)[0], agree.sum(0))

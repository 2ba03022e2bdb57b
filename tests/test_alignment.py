"""alignment.py: each teacher's <grad L_i, u> against reverse mode, on a small student of three tasks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import alignment
import model as dt
import surgery
from kernels.kl import policy_kl
from kernels.project import project

few = settings(max_examples=20)
seeds = st.integers(0, 1000)


def problem(seed=0, B=12, images=()):
    """A student's theta (P,) in float64, and losses(theta) -> L (3,) on windows of all three tasks."""
    torch.manual_seed(seed)
    dtype = torch.float64
    act_dims = (2, 3, 1)
    cfg = dt.ModelConfig((3, 5, 2), act_dims, n_layer=2, n_head=2, n_embd=8, context=4, images=images)
    student = dt.DecisionTransformer(cfg).to(dtype)
    theta = dt.flatten(student)
    task = torch.arange(B) % 3
    mask = torch.arange(4) >= torch.randint(0, 4, (B, 1))
    states = torch.randn(B, 4, 5, dtype=dtype)
    actions = torch.randn(B, 4, 3, dtype=dtype)
    rtg = torch.randn(B, 4, dtype=dtype)
    inputs = (task, states, actions, rtg, torch.randint(0, 20, (B, 4)), mask)
    targets = torch.randn(2, B, 4, 3, dtype=dtype).tanh()
    if images:
        inputs += (torch.randint(0, 256, (B, 4, 36 * 36), dtype=torch.uint8),)

    def losses(vector):
        mean, log_std = torch.func.functional_call(student, dt.unflatten(student, vector), inputs)
        sums, counts = policy_kl(
            mean, log_std, *targets, mask, task, torch.tensor(act_dims), "forward", sigma_floor=0.05
        )
        return sums / counts

    return theta, losses


def reverse_mode(losses, theta):
    """(3, P): every teacher's gradient, one backward pass each."""
    return torch.autograd.functional.jacobian(losses, theta.detach())


@few
@given(seeds, st.sampled_from([(), ((), (1, 36, 36), (1, 36, 36))]))
def test_exact__equals_reverse_mode_in_float64(seed, images):
    theta, losses = problem(seed, images=images)
    u = torch.randn_like(theta.data)
    wanted = reverse_mode(losses, theta) @ u
    assert torch.allclose(alignment.exact(losses, theta, u), wanted, rtol=1e-10, atol=1e-12)


@few
@given(seeds)
def test_estimate__approaches_the_exact_one_for_small_steps(seed):
    theta, losses = problem(seed)
    u = torch.autograd.grad(losses(theta).sum(), theta)[0]
    delta = -1e-7 * u
    with torch.no_grad():
        got = alignment.estimate(losses(theta), losses(theta + delta), u, delta)
    exact = alignment.exact(losses, theta, u)
    assert torch.allclose(got, exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))


def test_estimate__is_zero_before_the_first_update():
    zero = torch.zeros(5)
    assert alignment.estimate(torch.ones(2), torch.ones(2), zero, zero).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("uu", [4.0, 2.0**-40])
def test_clipped__is_the_share_of_u_between_minus_one_and_one(uu):
    c = uu * torch.tensor([-3.0, -0.5, 0.0, 0.25, 1.5])
    assert alignment.clipped(c, torch.tensor(uu)).tolist() == [-1.0, -0.5, 0.0, 0.25, 1.0]


def test_estimate__is_zero_where_the_update_moved_nothing_along_u():
    u = torch.tensor([1.0, 0.0])
    for delta in (torch.zeros(2), torch.tensor([0.0, 1.0])):
        assert alignment.estimate(torch.ones(2), torch.tensor([1.0, 2.0]), u, delta).tolist() == [0.0, 0.0]


def test_clipped__is_zero_before_the_first_update():
    assert alignment.clipped(torch.tensor([0.0, 1.0]), torch.tensor(0.0)).tolist() == [0.0, 0.0]


def test_exact__lets_surgery_project_every_teachers_own_gradient():
    theta, losses = problem()
    gs = reverse_mode(losses, theta)
    shares = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    u = gs[1] / gs[1].norm() - gs[0] / gs[0].norm()  # in conflict with the first teacher, for sure
    kappa = surgery.per_teacher(alignment.exact(losses, theta, u), shares, u @ u)
    wanted = sum(share * project(g, u) for share, g in zip(shares, gs, strict=True))
    assert kappa < 0
    assert torch.allclose(surgery.previous(shares @ gs, u, kappa)[0], wanted, atol=1e-10)


# ---- what an update keeps ----------------------------------------------------------------------------------


def quadratic():
    """probe(theta) -> KL (2,), <grad, u> (2,) at theta, and theta and u (3,)."""
    theta = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    u = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    scale = torch.tensor([0.1, 0.02], dtype=torch.float64)

    def probe(vector):
        return scale * (theta if vector is None else vector).square().sum()

    return probe, 2 * scale * (theta @ u), theta, u


def test_alignments__are_zero_where_no_option_asks_for_them():
    probe, _, theta, u = quadratic()
    a = alignment.Alignments(probe, theta, u, probe(None))
    assert a.before_update().tolist() == [0.0, 0.0]
    theta -= 0.01 * u
    a.after_update()
    assert a.before_update().tolist() == [0.0, 0.0]


def test_exact_alignments__are_those_before_the_update():
    probe, c, theta, u = quadratic()
    a = alignment.Exact(probe, theta, u, probe(None))
    assert torch.allclose(a.before_update(), c / (u @ u))
    assert torch.allclose(a.c, c)
    theta -= 0.01 * u
    a.after_update()
    assert torch.allclose(a.c, c)
    assert torch.allclose(a.before_update(), c / (u @ u) * (theta @ u) / (theta @ u + 0.01 * (u @ u)))


def test_estimated_alignments__are_the_change_of_the_kls_over_the_last_update():
    probe, c, theta, u = quadratic()
    a = alignment.Estimated(probe, theta, u, probe(None))
    assert a.before_update().tolist() == [0.0, 0.0]
    for _ in range(2):
        c = 2 * torch.tensor([0.1, 0.02], dtype=torch.float64) * (theta @ u)
        theta -= 1e-6 * u
        a.after_update()
        assert torch.allclose(a.c, c, rtol=1e-4)
        assert torch.allclose(a.before_update(), c / (u @ u), rtol=1e-4)
        assert torch.equal(a.last_kl, probe(None))

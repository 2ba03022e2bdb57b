"""kernels/project.py: the kernels, in Triton's interpreter or on a GPU. test_surgery.py has the formula."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kernels
from conftest import DEVICE, assert_as_exact_as_pytorch, lengths, many_sizes, normal, seeds, triton_needed
from kernels.project import project, project_adamw, project_adamw_ref, project_ref

sizes = lengths(16, 1024, 2048)  # about a block's
scales = st.sampled_from([0.0, 1e-30, 1e-10, 1.0, 1e10])


def schedule_at(t):
    """Learning rate, bias corrections and number of update t, as project_adamw reads them."""
    return torch.tensor([1e-2, 1 - 0.9**t, 1 - 0.999**t, t], device=DEVICE)


@triton_needed
@many_sizes
@given(seeds, sizes, scales, scales, st.booleans())
def test_project__kernels_are_as_exact_as_plain_pytorch(seed, P, scale_g, scale_u, conflict):
    gen = torch.Generator().manual_seed(seed)
    u = normal(gen, P, scale=scale_u)
    g = normal(gen, P, scale=scale_g)
    if scale_u:
        g += (-1.0 if conflict else 1.0) * (u / scale_u * scale_g)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "on_cpu", True)
        got = project(g, u)
    reference = project_ref(g, u)
    exact = project_ref(g.double(), u.double())
    size = g.abs().max().item()
    assert_as_exact_as_pytorch([got], [reference], [exact], ["g'"], torch.float32, least=size)
    if g.double() @ u.double() >= 0:
        assert torch.equal(got, g)


@triton_needed
@many_sizes
@given(
    seed=seeds,
    P=sizes,
    scale=st.sampled_from([1e-10, 1.0, 1e10]),
    t=st.integers(1, 1000),
    kappa=st.sampled_from([None, -0.4, 0.0]),
    on=st.sampled_from([None, True, False]),
    beta=st.sampled_from([0.0, 0.9]),
    operated=st.booleans(),
    share_adamw=st.sampled_from([None, 0.0, 0.7]),  # the rest is Muon's
)
def test_project_adamw__kernels_are_as_exact_as_plain_pytorch(
    seed, P, scale, t, kappa, on, beta, operated, share_adamw
):
    gen = torch.Generator().manual_seed(seed)
    theta = normal(gen, P)
    u = normal(gen, P, scale=scale)
    m = normal(gen, P, scale=1e-3)
    v = normal(gen, P, scale=1e-3).square()
    g = normal(gen, P, scale=scale) - 0.5 * u
    options = {"beta": beta, "weight_decay": 0.1}
    options["n_adamw"] = None if share_adamw is None else int(share_adamw * P)
    if kappa is not None:
        options["kappa"] = torch.tensor(kappa, device=DEVICE)
    if on is not None:
        options["on"] = torch.tensor(on, device=DEVICE)

    def run(f, dtype):
        """Three groups of results: of AdamW, of g's size, and the numbers of the projection."""
        state = {"theta": theta, "u": u, "m": m, "v": v}
        state = {name: x.to(dtype, copy=True) for name, x in state.items()}
        adamw = [state["theta"], state["m"], state["v"]]
        alive = torch.tensor(True, device=DEVICE)
        args = {"schedule": schedule_at(t), "alive": alive, **options}
        stats = f(g=g.to(dtype), **(state if operated else state | {"u": None}), **args)
        assert alive
        gu, uu, norm, norm_after, removed = stats
        return adamw, [state["u"], norm_after], [gu, uu, norm, removed]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "on_cpu", True)
        got = run(project_adamw, torch.float32)
    reference = run(project_adamw_ref, torch.float32)
    exact = run(project_adamw_ref, torch.float64)
    names = (("theta", "m", "v"), ("u", "|g'|"), ("<g, u>", "<u, u>", "|g|", "kappa"))
    least = (0.0, g.norm().item(), 0.0)
    for i in range(3):
        assert_as_exact_as_pytorch(got[i], reference[i], exact[i], names[i], torch.float32, least[i])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("f", [pytest.param(project_adamw, marks=triton_needed), project_adamw_ref])
def test_project_adamw__changes_nothing_from_a_gradient_that_is_not_finite_on(bad, f, monkeypatch):
    monkeypatch.setattr(kernels, "on_cpu", True)
    state = [torch.randn(1500, device=DEVICE).abs() for _ in range(4)]
    before = [x.clone() for x in state]
    theta, u, m, v = state
    alive = torch.tensor(True, device=DEVICE)
    schedule = torch.tensor([1e-2, 0.1, 0.001, 1], device=DEVICE)
    for g in (torch.full_like(u, bad), torch.ones_like(u)):
        f(theta, g, u, m, v, schedule, alive)
        assert not alive
        assert all(torch.equal(x, y) for x, y in zip(state, before, strict=True))


def test_project_adamw__is_projection_then_clipping_then_pytorchs_adamw():
    """Over five updates in turn, on this machine's own path."""
    torch.manual_seed(0)
    theta = torch.randn(50)
    u = torch.zeros(50)
    m = torch.zeros(50)
    v = torch.zeros(50)
    last = torch.zeros(50)
    wanted = torch.nn.Parameter(theta.clone())
    optimizer = torch.optim.AdamW([wanted], lr=1e-2, weight_decay=0.1)
    for t in range(1, 6):
        g = torch.randn(50) - 0.3 * last
        schedule = schedule_at(t).cpu()
        project_adamw(theta, g, u, m, v, schedule, torch.tensor(True), clip=2.0, weight_decay=0.1)
        last = project_ref(g, last)
        wanted.grad = last.clone()
        torch.nn.utils.clip_grad_norm_([wanted], 2.0)
        optimizer.step()
        assert torch.allclose(u, last, atol=1e-6)
        assert torch.allclose(theta, wanted, atol=1e-5)


def updated(**options):
    """theta, u and the five numbers after project_adamw_ref's update; then g, in conflict with u, and u."""
    torch.manual_seed(0)
    theta = torch.randn(50)
    u = torch.randn(50)
    g = torch.randn(50) - 2 * u
    state = {"theta": theta, "m": torch.zeros(50), "v": torch.zeros(50)}
    state["u"] = u.clone() if options.pop("surgery", True) else None
    schedule = schedule_at(1).cpu()
    stats = project_adamw_ref(g=g, schedule=schedule, alive=torch.tensor(True), **state, **options)
    return theta, state["u"], stats, g, u


def test_project_adamw_ref__defaults_are_no_average_and_no_weight_decay():
    theta, u, stats, *_ = updated()
    options = {"clip": 0.25, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "beta": 0.0}
    for x, y in zip(updated(**options), (theta, u, stats), strict=False):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "options",
    [{}, {"kappa": torch.tensor(-0.5)}, {"on": torch.tensor(True)}, {"on": torch.tensor(False)}],
    ids=["conflict", "kappa", "on", "off"],
)
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_project_adamw_ref__averages_what_is_left_and_reports_five_numbers(options, beta):
    _, next_u, stats, g, u = updated(beta=beta, **options)
    k = float(options.get("kappa", g @ u / (u @ u))) * float(options.get("on", 1.0))
    left = g - k * u
    assert torch.allclose(next_u, beta * u + (1 - beta) * left, atol=1e-5)
    wanted = torch.stack((g @ u, u @ u, g.norm(), left.norm(), torch.tensor(k)))
    assert torch.allclose(stats, wanted, rtol=1e-5)
    assert stats.dtype == torch.float32


def test_project_adamw_ref__without_surgery_reports_no_overlap():
    _, next_u, stats, g, _ = updated(surgery=False)
    assert next_u is None
    assert torch.allclose(stats, torch.stack((g[0] * 0, g[0] * 0, g.norm(), g.norm(), g[0] * 0)))


def test_project_adamw_ref__clips_tiny_gradients_as_pytorch_does():
    """1e-6 beside the norm, torch.nn.utils.clip_grad_norm_'s, counts here; in float64, numbers included."""
    g = torch.full((4,), 1e-5, dtype=torch.float64)
    theta = torch.nn.Parameter(torch.zeros_like(g))
    theta.grad = g.clone()
    torch.nn.utils.clip_grad_norm_([theta], 1e-6)
    m = torch.zeros_like(g)
    schedule = schedule_at(1).cpu().double()
    v = torch.zeros_like(g)
    stats = project_adamw_ref(theta.data, g, None, m, v, schedule, torch.tensor(True), clip=1e-6)
    assert torch.allclose(m, 0.1 * theta.grad, rtol=1e-9, atol=0)
    assert stats.dtype == torch.float64
    assert torch.allclose(stats[2:4], g.norm().expand(2), rtol=1e-12, atol=0)

"""muon.py: against plain Newton-Schulz in float64, and against PyTorch's Muon and AdamW in float32."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from test_model import make

import model as dt
import muon

seeds = st.integers(0, 1000)
sizes = st.integers(1, 40)
scales = st.sampled_from([1e-4, 1.0, 1e10])


def plain(x):
    """Jordan et al.'s iteration on one matrix (r, c), as they write it."""
    x = x / x.norm().clamp_min(1e-7)
    if len(x) > x.shape[1]:
        return plain(x.T).T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@given(seeds, st.integers(1, 4), sizes, sizes, scales)
def test_orthogonal__is_newton_schulz_of_each_matrix(seed, n, rows, columns, scale):
    torch.manual_seed(seed)
    x = scale * torch.randn(n, rows, columns)
    wanted = torch.stack([plain(matrix.double()) for matrix in x])
    got = muon.orthogonal(x)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), wanted, atol=2e-4)  # iterations enlarge what is small 500 times


REACH = 1.31e-3  # of a matrix's norm: the smallest singular value that five iterations bring above 0.6


@given(seeds, st.integers(1, 40), st.integers(41, 80), st.booleans())
@example(seed=573, small=40, large=41, tall=False)  # its smallest lies below
def test_orthogonal__brings_singular_values_near_1(seed, small, large, tall):
    torch.manual_seed(seed)
    x = torch.randn(1, small, large)
    n_within_reach = int((torch.linalg.svdvals(x) >= REACH * x.norm()).sum())
    assert n_within_reach >= small - 1  # a random matrix has at most one below
    values = torch.linalg.svdvals(muon.orthogonal(x.mT if tall else x))[0]  # largest first
    assert values[:n_within_reach].min() > 0.6
    assert values.max() < 1.25


def test_reach__is_where_the_iterations_cross_the_bound():
    s = torch.logspace(-5, 0, 100_001, dtype=torch.float64)
    x = s
    for a, b, c in muon.COEFFICIENTS:
        x = a * x + b * x**3 + c * x**5
    assert x[s >= REACH].min() > 0.6
    assert x[s < 0.99 * REACH].max() < 0.6


def test_orthogonal__of_zeros_is_zeros():
    assert not muon.orthogonal(torch.zeros(2, 3, 5)).any()


def test_shapes__are_those_of_the_blocks_matrices_at_the_end_of_the_flat_vectors():
    m = make()
    theta = dt.flatten(m)
    C = m.cfg.n_embd
    start = len(theta)
    by_shape = []
    for n, r, c in reversed(muon.shapes(m)):
        start -= n * r * c
        by_shape.insert(0, theta.data[start : start + n * r * c].view(n, r, c))
    squares, fc, out = by_shape
    for i, block in enumerate(m.blocks):
        q, k, v = block.qkv.weight.split(C)
        for j, matrix in enumerate((q, k, v, block.proj.weight)):
            assert torch.equal(squares[4 * i + j], matrix)
        assert torch.equal(fc[i], block.fc.weight)
        assert torch.equal(out[i], block.out.weight)
    others = [p for name, p in m.named_parameters() if "blocks" not in name or p.dim() == 1]
    assert start == sum(p.numel() for p in others)


def flat_update(theta, state, g, t, lr, **options):
    """One muon.step; state: u, m and v."""
    schedule = torch.tensor([lr, 1 - 0.9**t, 1 - 0.999**t, t])
    alive = torch.ones((), dtype=torch.bool)
    with torch.no_grad():
        muon.step(theta, g, None, *state, schedule=schedule, alive=alive, weight_decay=0.1, **options)


def test_step__is_pytorchs_muon_and_adamw_in_float32(monkeypatch):
    """Clipping included. PyTorch's Muon takes q, k and v as matrices of their own."""
    torch.manual_seed(0)
    m = make()
    theta = dt.flatten(m)
    state = torch.zeros(2, len(theta)).unbind(0)
    start = len(theta) - sum(n * r * c for n, r, c in muon.shapes(m))
    others = theta.data[:start].clone().requires_grad_()
    matrices = []
    position = start
    for n, r, c in muon.shapes(m):
        for _ in range(n):
            matrices.append(theta.data[position : position + r * c].view(r, c).clone().requires_grad_())
            position += r * c
    lr = 0.02
    options = {"lr": lr, "weight_decay": 0.1}
    theirs = [torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options)]
    theirs.append(torch.optim.AdamW([others], **options))
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())
    for t in range(1, 6):
        g = torch.randn_like(theta.data)
        flat_update(theta, state, g, t, lr, shapes=muon.shapes(m), clip=0.25)
        g *= 0.25 / g.norm()
        others.grad = g[:start].clone()
        position = start
        for matrix in matrices:
            matrix.grad = g[position : position + matrix.numel()].view(matrix.shape).clone()
            position += matrix.numel()
        for optimizer in theirs:
            optimizer.step()
    wanted = torch.cat([x.detach().flatten() for x in (others, *matrices)])
    assert torch.allclose(theta.data, wanted, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_step__changes_nothing_from_a_gradient_that_is_not_finite_on(bad):
    torch.manual_seed(0)
    m = make()
    theta = dt.flatten(m)
    state = torch.zeros(2, len(theta)).unbind(0)
    alive = torch.ones((), dtype=torch.bool)
    schedule = torch.tensor([0.1, 0.1, 0.001, 1])
    g = torch.randn_like(theta.data)
    options = {"schedule": schedule, "alive": alive, "shapes": muon.shapes(m), "weight_decay": 0.1}
    with torch.no_grad():
        muon.step(theta, g, None, *state, **options)
        before = [x.detach().clone() for x in (theta, *state)]
        g[-1] = bad
        for _ in range(2):
            muon.step(theta, g, None, *state, **options)
            g = torch.randn_like(theta.data)
    assert not alive
    assert all(map(torch.equal, before, (theta.data, *state)))

"""kernels/attention.py: plain PyTorch and, in Triton's interpreter or on a GPU, the kernels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kernels
from conftest import (
    DEVICE,
    assert_as_exact_as_pytorch,
    derivatives,
    lengths,
    many_sizes,
    normal,
    seeds,
    triton_needed,
)
from kernels.attention import EVERY, attention, attention_ref, dropout_factors

STATES = slice(1, None, 3)  # of tokens (R, s, a)
eager_needed = pytest.mark.skipif(DEVICE != "cpu", reason="a GPU runs the kernels")
paths = pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(True, marks=triton_needed, id="kernels"),
        pytest.param(False, marks=eager_needed, id="eager"),
    ],
)


# ---- what it computes --------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 3), st.integers(1, 19), st.sampled_from([1, 2, 4]))
def test_attention__is_a_loop_over_rows(seed, B, T, n_head):
    gen = torch.Generator().manual_seed(seed)
    C = 8
    hs = C // n_head
    qkv = torch.randn(B, T, 3 * C, generator=gen, dtype=torch.float64)
    mask = torch.rand(B, T, generator=gen) < 0.7
    got = attention(qkv, mask, n_head)
    for b in range(B):
        for i in range(T):
            keys = [j for j in range(i + 1) if mask[b, j]]
            for h in range(n_head):
                q, k, v = qkv[b].view(T, 3, n_head, hs)[:, :, h].unbind(1)
                wanted = torch.zeros(hs, dtype=torch.float64)
                if mask[b, i]:
                    wanted = torch.softmax(q[i] @ k[keys].T / hs**0.5, 0) @ v[keys]
                assert torch.allclose(got[b, i, h * hs : (h + 1) * hs], wanted, atol=1e-12)


def test_attention_ref__without_padding_is_pytorchs_own():
    qkv = torch.randn(2, 60, 3 * 32)
    q, k, v = [x.view(2, 60, 2, 16).transpose(1, 2) for x in qkv.chunk(3, -1)]
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    wanted = wanted.transpose(1, 2).reshape(2, 60, 32)
    assert torch.allclose(attention_ref(qkv, torch.ones(2, 60, dtype=torch.bool), 2), wanted, atol=1e-5)


@pytest.mark.parametrize("T", [1, 5, 60])
def test_attention__of_a_window_without_valid_tokens_is_zero_and_so_are_its_gradients(T):
    qkv = torch.randn(2, T, 24, requires_grad=True)
    out = attention(qkv, torch.zeros(2, T, dtype=torch.bool), 2)
    out.sum().backward()
    assert not out.any()
    assert not qkv.grad.any()


@pytest.mark.parametrize("keep", [EVERY, STATES], ids=["every token", "states"])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_attention_ref__drops_weights_after_the_softmax_and_gives_zeros_where_masked(keep, p):
    B = 2
    T = 6
    n_head = 2
    hs = 3
    torch.manual_seed(0)
    qkv = torch.randn(B, T, 3 * n_head * hs, dtype=torch.float64)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    torch.manual_seed(1)
    got = attention_ref(qkv, mask, n_head, p, keep)
    torch.manual_seed(1)
    queries = torch.arange(T)[keep]
    factors = torch.nn.functional.dropout(torch.ones(B, n_head, len(queries), T, dtype=torch.float64), p)
    wanted = torch.zeros(B, len(queries), n_head * hs, dtype=torch.float64)
    q, k, v = qkv.unflatten(-1, (3, n_head, hs)).permute(2, 0, 3, 1, 4)
    for b, i in mask[:, keep].nonzero().tolist():
        seen = mask[b] & (torch.arange(T) <= queries[i])
        for n in range(n_head):
            weights = (k[b, n, seen] @ q[b, n, queries[i]] / hs**0.5).softmax(0)
            y = (weights * factors[b, n, i, seen]) @ v[b, n, seen]
            wanted[b, i, n * hs : (n + 1) * hs] = y
    assert torch.allclose(got, wanted, rtol=1e-9)
    assert torch.equal(attention_ref(qkv, mask, n_head), attention_ref(qkv, mask, n_head, 0.0, EVERY))


# ---- as exact as plain PyTorch: output, forward mode and gradient ------------------------------------------


def random_inputs(seed, B, T, n_head, hs, dtype, scale=1.0, packed=True, left_padded=True):
    """qkv (B, T, 3C), mask (B, T), n_head; an upstream gradient (B, T, C) and a tangent (B, T, 3C).

    packed: qkv is contiguous, else a slice of something wider. left_padded: else the mask is random.
    """
    gen = torch.Generator().manual_seed(seed)
    C = n_head * hs
    wide = normal(gen, B, T, 3 * C + 5, dtype=dtype, scale=scale)
    qkv = wide[..., : 3 * C].contiguous() if packed else wide[..., 2 : 3 * C + 2]
    start = torch.randint(0, T + 1, (B, 1), generator=gen)  # T: a row without a valid token
    mask = torch.arange(T) >= start if left_padded else torch.rand(B, T, generator=gen) < 0.7
    upstream = normal(gen, B, T, C, dtype=dtype, scale=7.0)
    tangent = normal(gen, B, T, 3 * C, dtype=dtype, scale=scale)
    return qkv, mask.to(DEVICE), n_head, upstream, tangent


@st.composite
def inputs_of_many_sizes(draw):
    B = draw(st.integers(1, 3))
    T = draw(lengths(16, 32, 60, 64, 128))
    n_head = draw(st.integers(1, 3))
    hs = draw(st.sampled_from([16, 17, 24, 31, 32, 64, 65, 128]))
    if DEVICE == "cpu" and T > 64:
        B = 1
        n_head = min(n_head, 2)
    return random_inputs(
        draw(seeds),
        B,
        T,
        n_head,
        hs,
        dtype=draw(st.sampled_from(kernels.DTYPES)),
        scale=draw(st.sampled_from([1e-3, 1.0, 1.0, 4.0])),  # 4: scores of about 100
        packed=draw(st.booleans()),
        left_padded=draw(st.booleans()),
    )


def assert_as_exact(kernel, keep, inputs):
    """attention's output, forward mode and gradient, with the kernels or without, against attention_ref's."""
    qkv, mask, n_head, upstream, tangent = inputs

    def run(f, dtype):
        return derivatives(
            lambda x: f(x, mask, n_head, 0.0, keep), [qkv], upstream[:, keep], [tangent], dtype
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "on_cpu", kernel)
        got = run(attention, qkv.dtype)
    reference = run(attention_ref, qkv.dtype)
    exact = run(attention_ref, torch.float64)
    if not exact[0].numel():
        return
    q, k = qkv.double().unflatten(2, (3, n_head, -1)).permute(2, 0, 3, 1, 4)[:2]
    scores = (q @ k.transpose(-2, -1)).abs().max().item() * q.shape[-1] ** -0.5
    for i, name in enumerate(("output", "forward mode", "gradient")):
        # rounding a score by eps changes its weight by as many eps
        least = exact[i].abs().max().item() * max(1.0, scores / 8)
        assert_as_exact_as_pytorch([got[i]], [reference[i]], [exact[i]], [name], qkv.dtype, least)


@triton_needed
@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "T", "n_head", "hs", "scale"),
    [(2, 20, 2, 17, 1.0), (3, 60, 1, 64, 4.0), (1, 65, 2, 16, 4.0), (1, 100, 1, 65, 1.0)],
    ids=["tile", "T and hs of a student", "blocks", "blocks, hs beyond 64"],
)
@pytest.mark.parametrize("padding", ["left", "random, in a wider tensor"])
def test_attention__kernels_are_as_exact_as_plain_pytorch(B, T, n_head, hs, scale, dtype, padding):
    left = padding == "left"
    inputs = random_inputs(T, B, T, n_head, hs, dtype, scale, packed=left, left_padded=left)
    assert_as_exact(True, EVERY if left else STATES, inputs)


@pytest.mark.slow
@triton_needed
@pytest.mark.parametrize("keep", [EVERY, STATES], ids=["every token", "states"])
@many_sizes
@given(inputs_of_many_sizes())
def test_attention__kernels_are_as_exact_as_plain_pytorch_at_many_sizes(keep, inputs):
    assert_as_exact(True, keep, inputs)


@eager_needed
@pytest.mark.parametrize("keep", [EVERY, STATES], ids=["every token", "states"])
@many_sizes
@given(inputs_of_many_sizes())
def test_attention__on_a_cpu_is_as_exact_as_plain_pytorch(keep, inputs):
    assert_as_exact(False, keep, inputs)


# ---- dropout -----------------------------------------------------------------------------------------------


def test_attention__dropout_drops_and_keeps_the_mean_output():
    torch.manual_seed(0)
    qkv = torch.randn(1, 12, 24)
    mask = torch.ones(1, 12, dtype=torch.bool)
    many = torch.stack([attention(qkv, mask, 1, 0.3) for _ in range(4000)])
    assert not torch.equal(many[0], many[1])
    assert (many.mean(0) - attention(qkv, mask, 1)).abs().max() < 0.1


@paths
@pytest.mark.parametrize("T", [7, 60, 100])
def test_attention__drops_the_same_weights_in_every_pass(kernel, T, monkeypatch):
    monkeypatch.setattr(kernels, "on_cpu", kernel)
    gen = torch.Generator().manual_seed(T)
    qkv = normal(gen, 2, T, 3 * 32)
    mask = torch.ones(2, T, dtype=torch.bool, device=DEVICE)
    tangent = normal(gen, 2, T, 3 * 32)
    upstream = normal(gen, 2, T, 32)

    def f(x):
        torch.manual_seed(5)
        return attention(x, mask, 2, 0.3)

    y, got, grad = derivatives(f, [qkv], upstream, [tangent], torch.float32)
    assert not torch.allclose(y, attention(qkv, mask, 2))
    assert torch.equal(y, f(qkv))
    h = 1e-2
    slope = (f(qkv + h * tangent) - f(qkv - h * tangent)) / (2 * h)
    assert torch.allclose(got, slope, atol=2e-3 * slope.abs().max().item())
    assert torch.allclose((grad * tangent).sum(), (upstream * got).sum(), rtol=1e-3)


def assert_rate_of_dropout(kernel, T, B):
    """In B windows with equal scores and values 1, whose last output is the sum of the remaining weights."""
    p = 0.25
    torch.manual_seed(0)
    qkv = torch.zeros(1, T, 48, device=DEVICE).expand(B, T, 48).clone()
    qkv[..., 32:] = 1.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "on_cpu", kernel)
        y = attention(qkv, torch.ones(B, T, dtype=torch.bool, device=DEVICE), 1, p)[:, -1, 0]  # (B,)
    variance = p / (1 - p) / T
    assert abs(y.mean() - 1) < 5 * (variance / B) ** 0.5
    assert y.std() == pytest.approx(variance**0.5, rel=0.25)


@paths
@pytest.mark.parametrize("T", [20, 70])
def test_attention__dropout_has_its_rate(kernel, T):
    assert_rate_of_dropout(kernel, T, B=50 if kernel and DEVICE == "cpu" else 300)


@pytest.mark.slow
@paths
@pytest.mark.parametrize("T", [20, 70])
def test_attention__dropout_has_its_rate_in_many_windows(kernel, T):
    assert_rate_of_dropout(kernel, T, B=300 if DEVICE == "cpu" else 3000)


@given(st.integers(0, 1000), st.sampled_from([0.1, 0.25, 0.9]))
def test_dropout_factors__are_drawn_at_the_rate(seed, p):
    torch.manual_seed(seed)
    x = dropout_factors((7, 4001), p, torch.zeros((), dtype=torch.float64))
    assert x.shape == (7, 4001)
    assert set(x.unique().tolist()) == {0.0, 1 / (1 - p)}
    assert (x == 0).double().mean().item() == pytest.approx(p, abs=6 * (p * (1 - p) / x.numel()) ** 0.5)


def test_dropout_factors__at_a_tiny_rate_drop_hardly_anything():
    assert dropout_factors((1000,), 1e-6, torch.zeros(())).mean() == pytest.approx(1, abs=0.01)

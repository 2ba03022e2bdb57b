import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

import kernels
from conftest import ROOT
from kernels.attention import EVERY, attention, attention_ref, kept
from kernels.kl import (
    DIRECTIONS,
    bounded,
    categorical_divergence,
    divergence,
    head_kl,
    head_kl_ref,
    per_teacher,
    policies,
    policy_kl,
)
from kernels.project import project, project_adamw, project_adamw_ref, project_ref

seeds = st.integers(0, 2**32 - 1)


def gaussians(seed, shape, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    mean, t_mean = (torch.rand(shape, generator=gen, dtype=dtype) * 2 - 1 for _ in range(2))
    log_std, t_log_std = (torch.rand(shape, generator=gen, dtype=dtype) * 6 - 5 for _ in range(2))
    return mean, log_std, t_mean, t_log_std


# ---- kl --------------------------------------------------------------------------------------------------------------


@given(seeds, st.sampled_from(DIRECTIONS), st.floats(0.25, 4), st.sampled_from([0.0, 0.05, 0.5]))
def test_kl_is_that_of_torch_distributions_in_both_directions(seed, direction, temperature, floor):
    m, s, n, t = gaussians(seed, (5, 3))
    student = Normal(m, ((2 * s).exp() + floor**2).sqrt())
    teacher = Normal(n, ((2 * t).exp() * temperature**2 + floor**2).sqrt())
    want = kl_divergence(student, teacher) if direction == "reverse" else kl_divergence(teacher, student)
    assert torch.allclose(divergence(m, s, n, t, direction, floor, temperature), want, rtol=1e-9, atol=1e-12)


@given(seeds, st.sampled_from(DIRECTIONS), st.sampled_from([torch.float32, torch.float64]))
def test_kl_is_never_negative_and_zero_exactly_where_the_two_are_equal(seed, direction, dtype):
    m, s, n, t = gaussians(seed, (50,), dtype)
    assert (divergence(m, s, n, t, direction) > 0).all()
    assert (divergence(m, s, m, s, direction, 0.05) == 0).all()
    near = divergence(m, s, m, s + 1e-5 * torch.sign(t), direction)
    assert (near >= -torch.finfo(dtype).eps).all()


def test_temperature_widens_the_teacher():
    one = torch.zeros(1)
    assert (
        divergence(one, one, one, one, temperature=2.0) > 0
        and divergence(one, one + np.log(2), one, one, temperature=2.0) < 1e-6
    )


@given(seeds, st.sampled_from(DIRECTIONS))
def test_kl_per_teacher_is_a_loop_over_windows_and_padding_changes_nothing(seed, direction):
    B, K, dims = 6, 4, torch.tensor([2, 3, 1])
    m, s, n, t = gaussians(seed, (B, K, 3))
    gen = torch.Generator().manual_seed(seed)
    task, mask = torch.randint(3, (B,), generator=gen), torch.rand(B, K, generator=gen) < 0.7
    sums, counts = policy_kl(m, s, n, t, mask, task, dims, direction, 0.05, 1.5)
    want, n_tokens = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for b in range(B):
        for k in range(K):
            if mask[b, k]:
                A = int(dims[task[b]])
                want[task[b]] += divergence(
                    m[b, k, :A], s[b, k, :A], n[b, k, :A], t[b, k, :A], direction, 0.05, 1.5
                ).mean()
                n_tokens[task[b]] += 1
    assert torch.allclose(sums, want) and torch.equal(counts, n_tokens)
    wild = ~(mask[..., None] & (torch.arange(3) < dims[task][:, None])[:, None])
    m2, s2, n2, t2 = (
        x.masked_fill(wild, bad)
        for x, bad in zip((m, s, n, t), (float("nan"), 9e9, float("inf"), -7.0), strict=True)
    )
    assert torch.equal(policy_kl(m2, s2, n2, t2, mask, task, dims, direction, 0.05, 1.5)[0], sums)


def test_a_teacher_without_windows_has_no_sum_and_no_count():
    m, s, n, t = gaussians(0, (2, 3, 2))
    sums, counts = policy_kl(
        m, s, n, t, torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, dtype=torch.long), torch.tensor([2, 2])
    )
    assert counts.tolist() == [6, 0] and sums[0] > 0 and sums[1] == 0


def test_per_teacher_divides_by_the_action_dimension():
    x, mask = torch.ones(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)
    sums, counts = per_teacher(x, mask, torch.tensor([0, 1]), torch.tensor([4, 2]))
    assert sums.tolist() == [5, 5] and counts.tolist() == [5, 5]


def categoricals(seed, B=6, K=4):
    """Student and teacher of three tasks, the first and last of them categorical: two arrays (B, K, 3) each; mask, task, action counts, which are discrete."""
    gen = torch.Generator().manual_seed(seed)
    m, s, n, t = gaussians(seed, (B, K, 3))
    dims, discrete = torch.tensor([2, 3, 1]), torch.tensor([True, False, True])
    task, mask = torch.arange(B) % 3, torch.rand(B, K, generator=gen) < 0.7
    x = (
        policies(torch.cat((3 * m, s), -1), task, dims, discrete),
        policies(torch.cat((3 * n, t), -1), task, dims, discrete),
    )
    return *x[0], *x[1], mask, task, dims, discrete


@given(seeds, st.sampled_from(DIRECTIONS))
def test_a_categoricals_kl_is_that_of_torch_distributions(seed, direction):
    logp, _, t_logp, _, mask, task, dims, discrete = everything = categoricals(seed)
    sums, counts = policy_kl(*everything[:7], direction, 0.05, 1.0, discrete)
    for i in (0, 2):
        windows, A = task == i, int(dims[i])
        student, teacher = (
            torch.distributions.Categorical(logits=x[windows][..., :A]) for x in (logp, t_logp)
        )
        pair = (teacher, student) if direction == "forward" else (student, teacher)
        assert (
            torch.allclose(sums[i], torch.distributions.kl_divergence(*pair)[mask[windows]].sum())
            and counts[i] == mask[windows].sum()
        )
    gaussian = policy_kl(*everything[:7], direction, 0.05, 1.0)
    assert torch.allclose(sums[1], gaussian[0][1])  # beside them a Gaussian's is what it was


@given(seeds, st.sampled_from(DIRECTIONS))
def test_what_is_masked_or_not_an_action_of_a_categorical_changes_nothing_nor_its_gradient(seed, direction):
    gen = torch.Generator().manual_seed(seed)
    *_, mask, task, dims, discrete = categoricals(seed)
    h, weight, bias = (
        torch.randn(*shape, generator=gen, dtype=torch.float64, requires_grad=True)
        for shape in ((6, 4, 8), (3, 8, 6), (3, 6))
    )
    target = categoricals(seed + 1)[2:4]
    real = torch.arange(3) < dims[task][:, None, None]
    got = []
    for wild in (0.0, -7.0):
        t = [x.masked_fill(~(real & mask[..., None]), wild) for x in target]
        sums, _ = head_kl(h, weight, bias, *t, mask, task, dims, direction, 0.05, 1.5, discrete)
        got.append((sums, *torch.autograd.grad(sums.sum(), (h, weight, bias))))
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*got, strict=True))
    assert (
        not got[0][2][0, :, 2].any() and not got[0][2][0, :, 3:].any() and got[0][2][0, :, :2].any()
    )  # of the head: two logits, no third, no log-std


def test_a_wider_temperature_flattens_a_categorical_teacher():
    logp = torch.tensor([0.9, 0.1]).log()
    flat = (logp / 2).log_softmax(-1)
    assert (
        categorical_divergence(flat, logp, "forward", 2.0).sum()
        < 1e-6
        < categorical_divergence(flat, logp, "forward").sum()
    )


# ---- attention -------------------------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 3), st.integers(1, 19), st.sampled_from([1, 2, 4]))
def test_attention_is_a_loop_over_rows(seed, B, T, n_head):
    gen = torch.Generator().manual_seed(seed)
    C = 8
    qkv, mask = (
        torch.randn(B, T, 3 * C, generator=gen, dtype=torch.float64),
        torch.rand(B, T, generator=gen) < 0.7,
    )
    got, hs = attention(qkv, mask, n_head), C // n_head
    for b in range(B):
        for i in range(T):
            keys = [j for j in range(i + 1) if mask[b, j]]
            for h in range(n_head):
                q, k, v = (qkv[b, :, c * C + h * hs : c * C + (h + 1) * hs] for c in range(3))
                want = torch.zeros(hs, dtype=torch.float64)
                if mask[b, i]:
                    want = torch.softmax(q[i] @ k[keys].T / hs**0.5, 0) @ v[keys]
                assert torch.allclose(got[b, i, h * hs : (h + 1) * hs], want, atol=1e-12)


def test_attention_agrees_with_pytorchs_own_without_padding():
    qkv = torch.randn(2, 60, 3 * 32)
    q, k, v = (x.view(2, 60, 2, 16).transpose(1, 2) for x in qkv.chunk(3, -1))
    want = (
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        .transpose(1, 2)
        .reshape(2, 60, 32)
    )
    assert torch.allclose(attention_ref(qkv, torch.ones(2, 60, dtype=torch.bool), 2), want, atol=1e-5)


@pytest.mark.parametrize("T", [1, 5, 60])
def test_a_window_without_any_valid_token_gives_zeros_and_zero_gradients(T):
    qkv = torch.randn(2, T, 24, requires_grad=True)
    out = attention(qkv, torch.zeros(2, T, dtype=torch.bool), 2)
    out.sum().backward()
    assert not out.any() and not qkv.grad.any()


def test_attention_dropout_drops_and_keeps_the_mean():
    torch.manual_seed(0)
    qkv, mask = torch.randn(1, 12, 24), torch.ones(1, 12, dtype=torch.bool)
    many = torch.stack([attention(qkv, mask, 1, 0.3) for _ in range(4000)])
    assert not torch.equal(many[0], many[1]) and (many.mean(0) - attention(qkv, mask, 1)).abs().max() < 0.1


# ---- the Triton kernels: compiled where there is a GPU, else in Triton's interpreter ------------------------------------

DEVICE = "cuda" if torch.cuda.is_available() and not kernels.INTERPRET else "cpu"
DTYPES = (torch.float32, torch.bfloat16)
few = settings(
    max_examples=int(os.environ.get("KERNEL_EXAMPLES", "25" if DEVICE == "cpu" else "200")),
    derandomize="KERNEL_EXAMPLES" not in os.environ,
)
triton_needed = pytest.mark.skipif(kernels.triton.__version__ is None, reason="no Triton here")


def lengths(*blocks):
    """1, primes, and sizes about a block's."""
    return st.sampled_from(sorted({1, 2, 3, 5, 7, 11, 13, *(b + d for b in blocks for d in (-1, 0, 1))}))


def normal(gen, *shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape, generator=gen) * scale).to(dtype).to(DEVICE)


def assert_as_exact_as_pytorch(got, reference, exact, what, dtype, least=0.0):
    """The kernel's error against float64 is at most twice that of plain PyTorch in the same precision, plus a tiny floor, relative to the
    largest number of the result or to `least`, the size of what it is a difference of (the largest of two roundings' errors is luck)."""
    for name, k, r, d in zip(what, got, reference, exact, strict=True):
        size = max(d.abs().max().item(), least)
        error, theirs = ((x.double() - d.double()).abs().max().item() for x in (k, r))
        theirs = float("inf") if theirs != theirs else theirs  # bfloat16's plain KL can be NaN
        assert error <= 2 * theirs + 8 * torch.finfo(dtype).eps * size + 1e-30, (
            f"{name}: error {error:.3g}, plain PyTorch's {theirs:.3g}, size {size:.3g}"
        )


def derivatives(f, inputs, upstream, tangents, dtype):
    """f's output, its gradients under `upstream`, and its forward-mode derivative along `tangents`, in dtype."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    y = f(*leaves)
    y.backward(upstream.to(y.dtype))
    along = torch.func.jvp(f, tuple(x.detach() for x in leaves), tuple(t.to(dtype) for t in tangents))[1]
    return y.detach(), along, *(x.grad for x in leaves)


@st.composite
def attention_inputs(draw):
    B, T, n_head, hs = (
        draw(st.integers(1, 3)),
        draw(lengths(16, 60, 64, 128)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([16, 17, 24, 31, 32, 64, 65, 128])),
    )
    if DEVICE == "cpu" and T > 64:
        B, n_head = 1, min(n_head, 2)
    gen = torch.Generator().manual_seed(draw(seeds))
    dtype, scale = (
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from([1e-3, 1.0, 1.0, 4.0])),
    )  # 4: scores of about 100
    C = n_head * hs
    wide = normal(gen, B, T, 3 * C + 5, dtype=dtype, scale=scale)
    qkv = (
        wide[..., 2 : 3 * C + 2] if draw(st.booleans()) else wide[..., : 3 * C].contiguous()
    )  # a slice of something wider, or packed
    start = torch.randint(0, T + 1, (B, 1), generator=gen)  # T: a row without a valid token
    mask = torch.arange(T) >= start if draw(st.booleans()) else torch.rand(B, T, generator=gen) < 0.7
    return (
        qkv,
        mask.to(DEVICE),
        n_head,
        normal(gen, B, T, C, dtype=dtype, scale=7.0),
        normal(gen, B, T, 3 * C, dtype=dtype, scale=scale),
    )


EAGER = [False] if DEVICE == "cpu" else []  # what a CPU runs, besides the kernels


@triton_needed
@pytest.mark.parametrize("keep", [EVERY, slice(1, None, 3)], ids=["every token", "states"])
@pytest.mark.parametrize("kernel", [True, *EAGER], ids=["kernels", "eager"][: 1 + len(EAGER)])
@few
@given(attention_inputs())
def test_attention_is_as_exact_as_plain_pytorch(kernel, keep, inputs):
    qkv, mask, n_head, upstream, tangent = inputs
    upstream = upstream[:, keep]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(kernels, "on_cpu", kernel)
        got = derivatives(
            lambda x: attention(x, mask, n_head, 0.0, keep), [qkv], upstream, [tangent], qkv.dtype
        )
    reference = derivatives(
        lambda x: attention_ref(x, mask, n_head, 0.0, keep), [qkv], upstream, [tangent], qkv.dtype
    )
    exact = derivatives(
        lambda x: attention_ref(x, mask, n_head, 0.0, keep), [qkv], upstream, [tangent], torch.float64
    )
    if not exact[0].numel():
        return
    q, k = qkv.double().unflatten(2, (3, n_head, -1)).permute(2, 0, 3, 1, 4)[:2]
    scores = (q @ k.transpose(-2, -1)).abs().max().item() * q.shape[
        -1
    ] ** -0.5  # rounding one by eps changes its weight by as many eps
    for name, *results in zip(("output", "forward mode", "gradient"), got, reference, exact, strict=True):
        assert_as_exact_as_pytorch(
            *([x] for x in results),
            [name],
            qkv.dtype,
            least=results[-1].abs().max().item() * max(1.0, scores / 8),
        )


@triton_needed
@pytest.mark.parametrize("kernel", [True, *EAGER], ids=["kernels", "eager"][: 1 + len(EAGER)])
@pytest.mark.parametrize("T", [7, 60, 100])
def test_attention_drops_the_same_weights_in_every_pass(kernel, T, monkeypatch):
    monkeypatch.setattr(kernels, "on_cpu", kernel)
    gen = torch.Generator().manual_seed(T)
    qkv, mask, t = (
        normal(gen, 2, T, 3 * 32),
        torch.ones(2, T, dtype=torch.bool, device=DEVICE),
        normal(gen, 2, T, 3 * 32),
    )
    up = normal(gen, 2, T, 32)

    def f(x):
        torch.manual_seed(5)
        return attention(x, mask, 2, 0.3)

    y, along, grad = derivatives(f, [qkv], up, [t], torch.float32)
    assert not torch.allclose(y, attention(qkv, mask, 2)) and torch.equal(y, f(qkv))
    h = 1e-2
    slope = (f(qkv + h * t) - f(qkv - h * t)) / (2 * h)
    assert torch.allclose(
        along, slope, atol=2e-3 * slope.abs().max().item()
    )  # of the very same dropped weights
    assert torch.allclose((grad * t).sum(), (up * along).sum(), rtol=1e-3)


@triton_needed
@pytest.mark.parametrize("kernel", [True, *EAGER], ids=["kernels", "eager"][: 1 + len(EAGER)])
@pytest.mark.parametrize("T", [20, 70])
def test_attention_dropout_keeps_the_mean_and_its_rate(kernel, T, monkeypatch):
    monkeypatch.setattr(kernels, "on_cpu", kernel)
    B = 300 if DEVICE == "cpu" else 3000
    qkv = torch.zeros(1, T, 48, device=DEVICE).expand(B, T, 48).clone()  # equal scores
    qkv[..., 32:] = 1.0  # and values: an output is the sum of the weights kept
    y = attention(qkv, torch.ones(B, T, dtype=torch.bool, device=DEVICE), 1, 0.25)[:, -1, 0]  # (B,)
    assert abs(y.mean() - 1) < 5 * (0.25 / 0.75 / T / B) ** 0.5 and y.std() == pytest.approx(
        (0.25 / 0.75 / T) ** 0.5, rel=0.25
    )


@given(st.integers(0, 1000), st.sampled_from([0.1, 0.25, 0.9]))
def test_dropout_factors_are_drawn_at_the_rate(seed, p):
    torch.manual_seed(seed)
    x = kept((7, 4001), p, torch.zeros((), dtype=torch.float64))
    assert x.shape == (7, 4001) and set(x.unique().tolist()) == {0.0, 1 / (1 - p)}
    assert (x == 0).double().mean().item() == pytest.approx(p, abs=6 * (p * (1 - p) / x.numel()) ** 0.5)


@triton_needed
@pytest.mark.parametrize("fits", [True, False])
def test_tiles_that_leave_shared_memory_are_not_launched(fits, monkeypatch):
    launched = []
    for module in (kernels.attention, kernels.kl):
        monkeypatch.setattr(
            module,
            "_launch",
            lambda *args, real=module._launch, **options: launched.append(1) or real(*args, **options),
        )
    monkeypatch.setattr(kernels, "on_cpu", True)
    monkeypatch.setattr(kernels, "fits", lambda tensor, numbers: fits)
    gen = torch.Generator().manual_seed(0)
    y = attention(normal(gen, 2, 5, 48), torch.ones(2, 5, dtype=torch.bool, device=DEVICE), 1)
    tokens, task = (
        torch.ones(2, 5, dtype=torch.bool, device=DEVICE),
        torch.zeros(2, dtype=torch.long, device=DEVICE),
    )
    sums, _ = head_kl(
        y,
        normal(gen, 1, 16, 4),
        normal(gen, 1, 4),
        normal(gen, 2, 5, 2),
        normal(gen, 2, 5, 2),
        tokens,
        task,
        torch.tensor([2], device=DEVICE),
    )
    assert y.isfinite().all() and sums.isfinite().all() and len(launched) == 2 * fits


def test_the_default_sizes_fit_the_shared_memory_of_common_gpus():
    T4, RTX, A100 = 65_536, 101_376, 166_912  # bytes that a block may have: sm_75, sm_89, sm_80
    student, teacher = kernels.attention.tiles(60, 64), kernels.attention.tiles(60, 128)
    assert (
        2 * teacher <= RTX
        and 4 * student <= RTX
        and 4 * teacher > A100
        and 4 * kernels.kl.tiles(20, 64, 8) <= T4
    )


def test_hardly_any_dropout_drops_hardly_anything():
    assert kept((1000,), 1e-6, torch.zeros(())).mean() == pytest.approx(1, abs=0.01)


@st.composite
def head_inputs(draw):
    B, K, C = draw(lengths(16)), draw(lengths(16)), draw(st.sampled_from([1, 16, 17, 48, 64, 128]))
    A, N = draw(st.sampled_from([1, 3, 6, 8, 17])), draw(st.integers(1, 4))
    gen = torch.Generator().manual_seed(draw(seeds))
    dtype, scale = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([1e-2, 1.0, 4.0]))
    h, weight, bias = (
        normal(gen, B, K, C, dtype=dtype),
        normal(gen, N, C, 2 * A, dtype=dtype, scale=scale * C**-0.5),
        normal(gen, N, 2 * A, dtype=dtype),
    )
    tangents = [normal(gen, *x.shape, dtype=dtype) for x in (h, weight, bias)]
    t_mean, t_log_std = (
        (torch.rand(B, K, A, generator=gen) * 2 - 1).to(DEVICE),
        (torch.rand(B, K, A, generator=gen) * -4).to(DEVICE),
    )
    mask, task = (
        torch.rand(B, K, generator=gen) < draw(st.sampled_from([0.0, 0.7, 1.0])),
        torch.randint(N, (B,), generator=gen),
    )
    rest = (mask.to(DEVICE), task.to(DEVICE), torch.randint(1, A + 1, (N,), generator=gen).to(DEVICE))
    options = (
        draw(st.sampled_from(DIRECTIONS)),
        draw(st.sampled_from([0.05, 0.5])),
        draw(st.sampled_from([0.5, 1.0, 2.0])),
    )
    return (
        (h, weight, bias),
        tangents,
        (t_mean, t_log_std),
        rest,
        options,
        torch.where(normal(gen, N) > 0, 5.0, -3.0),
    )


@triton_needed
@few
@given(head_inputs())
def test_the_kl_kernel_is_as_exact_as_plain_pytorch(inputs):
    leaves, tangents, targets, rest, options, upstream = inputs
    dtype = leaves[0].dtype

    def run(f, dtype):
        return derivatives(
            lambda h, w, b: f(h, w, b, *(t.to(dtype) for t in targets), *rest, *options)[0],
            leaves,
            upstream,
            tangents,
            dtype,
        )

    with pytest.MonkeyPatch.context() as m:
        m.setattr(kernels, "on_cpu", True)
        got = run(head_kl, dtype)
        counts = head_kl(*leaves, *targets, *rest, *options)[1]
    assert torch.equal(counts.long(), torch.zeros_like(counts).long().index_add(0, rest[1], rest[0].sum(1)))
    exact = run(head_kl_ref, torch.float64)
    terms = (
        sum((g * t).abs().sum().item() for g, t in zip(exact[2:], tangents, strict=True)) / 3
    )  # which the forward mode is a sum of, signs and all
    for name, k, r, d, least in zip(
        ("KL", "forward mode", "dh", "dW", "db"),
        got,
        run(head_kl_ref, dtype),
        exact,
        (0, terms, 0, 0, 0),
        strict=True,
    ):
        assert_as_exact_as_pytorch([k], [r], [d], [name], dtype, least)


def test_the_heads_kl_is_the_kl_of_its_outputs():
    gen = torch.Generator().manual_seed(0)
    h, weight, bias = (
        torch.randn(4, 5, 8, generator=gen),
        torch.randn(2, 8, 6, generator=gen),
        torch.randn(2, 6, generator=gen),
    )
    t_mean, t_log_std, mask, task = (
        torch.rand(4, 5, 3),
        -torch.rand(4, 5, 3),
        torch.ones(4, 5, dtype=torch.bool),
        torch.tensor([0, 1, 1, 0]),
    )
    mean, log_std = torch.stack([h[b] @ weight[task[b]] + bias[task[b]] for b in range(4)]).chunk(2, -1)
    want = policy_kl(mean.tanh(), bounded(log_std), t_mean, t_log_std, mask, task, torch.tensor([3, 2]))
    got = head_kl(h, weight, bias, t_mean, t_log_std, mask, task, torch.tensor([3, 2]))
    assert torch.allclose(got[0], want[0], rtol=1e-5) and torch.equal(got[1], want[1])


SCALES = st.sampled_from([0.0, 1e-30, 1e-10, 1.0, 1e10])


@triton_needed
@few
@given(seeds, lengths(16, 1024, 2048), SCALES, SCALES, st.booleans())
def test_the_projection_kernels_are_as_exact_as_plain_pytorch(seed, P, scale_g, scale_u, conflict):
    gen = torch.Generator().manual_seed(seed)
    u = normal(gen, P, scale=scale_u)
    g = normal(gen, P, scale=scale_g) + (-1.0 if conflict else 1.0) * (
        u / scale_u * scale_g if scale_u else 0.0
    )
    with pytest.MonkeyPatch.context() as m:
        m.setattr(kernels, "on_cpu", True)
        got = project(g, u)
    assert_as_exact_as_pytorch(
        [got],
        [project_ref(g, u)],
        [project_ref(g.double(), u.double())],
        ["g'"],
        torch.float32,
        least=g.abs().max().item(),
    )
    if (g.double() @ u.double()) >= 0:
        assert torch.equal(got, g)


@triton_needed
@few
@given(seeds, lengths(16, 1024, 2048), st.sampled_from([1e-10, 1.0, 1e10]), st.integers(1, 1000), st.sampled_from([None, -0.4, 0.0]),
       st.sampled_from([None, True, False]), st.sampled_from([0.0, 0.9]), st.booleans())  # fmt: skip
def test_the_update_kernels_are_as_exact_as_plain_pytorch(seed, P, scale, t, kappa, on, beta, operated):
    gen = torch.Generator().manual_seed(seed)
    start = [
        normal(gen, P),
        normal(gen, P, scale=scale),
        normal(gen, P, scale=1e-3),
        normal(gen, P, scale=1e-3).square(),
    ]
    g, schedule = (
        normal(gen, P, scale=scale) - 0.5 * start[1],
        torch.tensor([1e-2, 1 - 0.9**t, 1 - 0.999**t, t], device=DEVICE),
    )
    options = dict(
        kappa=None if kappa is None else torch.tensor(kappa, device=DEVICE),
        on=None if on is None else torch.tensor(on, device=DEVICE),
    )

    def run(f, dtype):
        theta, u, m, v = (x.to(dtype, copy=True) for x in start)
        alive = torch.tensor(True, device=DEVICE)
        stats = f(
            theta,
            g.to(dtype),
            u if operated else None,
            m,
            v,
            schedule,
            alive,
            beta=beta,
            weight_decay=0.1,
            **options,
        )
        assert alive
        return [theta, m, v], [u, stats[3]], [*stats[:3], stats[4]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "on_cpu", True)
        got = run(project_adamw, torch.float32)
    names, size = (("theta", "m", "v"), ("u", "|g'|"), ("<g, u>", "<u, u>", "|g|", "kappa")), g.norm().item()
    for k, r, d, what, least in zip(
        got,
        run(project_adamw_ref, torch.float32),
        run(project_adamw_ref, torch.float64),
        names,
        (0.0, size, 0.0),
        strict=True,
    ):
        assert_as_exact_as_pytorch(k, r, d, what, torch.float32, least)


@triton_needed
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("interpreted", [True, False], ids=["kernel", "reference"])
def test_a_gradient_that_is_not_finite_changes_nothing_and_nothing_does_after_it(
    bad, interpreted, monkeypatch
):
    monkeypatch.setattr(kernels, "on_cpu", interpreted)
    f = project_adamw if interpreted else project_adamw_ref
    state, alive = (
        [torch.randn(1500, device=DEVICE).abs() for _ in range(4)],
        torch.tensor(True, device=DEVICE),
    )
    schedule = torch.tensor([1e-2, 0.1, 0.001, 1], device=DEVICE)
    before = [x.clone() for x in state]
    theta, u, m, v = state
    for g in (torch.full_like(u, bad), torch.ones_like(u)):
        f(theta, g, u, m, v, schedule, alive)
        assert not alive and all(torch.equal(x, y) for x, y in zip(state, before, strict=True))


def test_the_update_is_projection_then_clipping_then_pytorchs_adamw():
    torch.manual_seed(0)
    theta, u = torch.randn(50), torch.zeros(50)
    want = torch.nn.Parameter(theta.clone())
    opt = torch.optim.AdamW([want], lr=1e-2, weight_decay=0.1)
    m, v, last = torch.zeros(50), torch.zeros(50), torch.zeros(50)
    for t in range(1, 6):
        g = torch.randn(50) - 0.3 * last
        project_adamw(
            theta,
            g,
            u,
            m,
            v,
            torch.tensor([1e-2, 1 - 0.9**t, 1 - 0.999**t, t]),
            torch.tensor(True),
            clip=2.0,
            weight_decay=0.1,
        )
        last = project_ref(g, last)
        want.grad = last.clone()
        torch.nn.utils.clip_grad_norm_([want], 2.0)
        opt.step()
        assert torch.allclose(u, last, atol=1e-6) and torch.allclose(theta, want, atol=1e-5)


def test_without_triton_the_references_run():
    code = """
import sys; sys.modules["triton"] = None
import torch, kernels
from kernels.attention import attention; from kernels.kl import head_kl; from kernels.project import project
assert kernels.path("cuda") == "plain PyTorch, no Triton" and kernels.path("cpu") == "plain PyTorch, no GPU"
assert attention(torch.randn(1, 3, 12), torch.ones(1, 3, dtype=torch.bool), 1).shape == (1, 3, 4) and project(torch.ones(3), -torch.ones(3)).abs().max() == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@triton_needed
def test_without_a_c_compiler_the_references_run():
    code = "import kernels; assert kernels.path('cuda') == 'plain PyTorch, no C compiler' and not kernels.compiled('cuda')"
    env = {k: v for k, v in os.environ.items() if k not in ("CC", "TRITON_INTERPRET")} | {"PATH": "/nowhere"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=env)

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from kernels.attention import attention, attention_ref
from kernels.kl import DIRECTIONS, divergence, gaussian_kl, gaussian_kl_ref, per_teacher

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
    assert divergence(one, one, one, one, temperature=2.0) > 0 and divergence(one, one + np.log(2), one, one, temperature=2.0) < 1e-6


@given(seeds, st.sampled_from(DIRECTIONS))
def test_kl_per_teacher_is_a_loop_over_windows_and_padding_changes_nothing(seed, direction):
    B, K, dims = 6, 4, torch.tensor([2, 3, 1])
    m, s, n, t = gaussians(seed, (B, K, 3))
    gen = torch.Generator().manual_seed(seed)
    task, mask = torch.randint(3, (B,), generator=gen), torch.rand(B, K, generator=gen) < 0.7
    sums, counts = gaussian_kl(m, s, n, t, mask, task, dims, direction, 0.05, 1.5)
    want, n_tokens = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for b in range(B):
        for k in range(K):
            if mask[b, k]:
                A = int(dims[task[b]])
                want[task[b]] += divergence(m[b, k, :A], s[b, k, :A], n[b, k, :A], t[b, k, :A], direction, 0.05, 1.5).mean()
                n_tokens[task[b]] += 1
    assert torch.allclose(sums, want) and torch.equal(counts, n_tokens)
    wild = ~(mask[..., None] & (torch.arange(3) < dims[task][:, None])[:, None])
    m2, s2, n2, t2 = (x.masked_fill(wild, bad) for x, bad in zip((m, s, n, t), (float("nan"), 9e9, float("inf"), -7.0), strict=True))
    assert torch.equal(gaussian_kl(m2, s2, n2, t2, mask, task, dims, direction, 0.05, 1.5)[0], sums)


def test_a_teacher_without_windows_has_no_sum_and_no_count():
    m, s, n, t = gaussians(0, (2, 3, 2))
    sums, counts = gaussian_kl_ref(m, s, n, t, torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, dtype=torch.long), torch.tensor([2, 2]))
    assert counts.tolist() == [6, 0] and sums[0] > 0 and sums[1] == 0


def test_per_teacher_divides_by_the_action_dimension():
    x, mask = torch.ones(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)
    sums, counts = per_teacher(x, mask, torch.tensor([0, 1]), torch.tensor([4, 2]))
    assert sums.tolist() == [5, 5] and counts.tolist() == [5, 5]


# ---- attention -------------------------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 3), st.integers(1, 19), st.sampled_from([1, 2, 4]))
def test_attention_is_a_loop_over_rows(seed, B, T, n_head):
    gen = torch.Generator().manual_seed(seed)
    C = 8
    qkv, mask = torch.randn(B, T, 3 * C, generator=gen, dtype=torch.float64), torch.rand(B, T, generator=gen) < 0.7
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
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 60, 32)
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

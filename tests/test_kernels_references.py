"""The kernels' references: their defaults, tasks of both kinds in a batch, dropout on attention's weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, Normal, kl_divergence

from kernels.attention import attention_ref
from kernels.kl import DIRECTIONS, LOG_STD, categorical_divergence, divergence, head_kl_ref, policy_kl

ACT_DIMS = torch.tensor([2, 3, 4])
DISCRETE = torch.tensor([False, True, False])


def head(B=9, K=4, C=5, A=4):
    """A head of three tasks, teachers' outputs, mask and task, as head_kl_ref takes them."""
    torch.manual_seed(0)
    h = torch.randn(B, K, C, dtype=torch.float64)
    weight = torch.randn(3, C, 2 * A, dtype=torch.float64)
    bias = torch.randn(3, 2 * A, dtype=torch.float64)
    t_mean = torch.randn(B, K, A, dtype=torch.float64)
    t_log_std = torch.rand(B, K, A, dtype=torch.float64) - 2
    mask = torch.rand(B, K) < 0.7
    return h, weight, bias, t_mean, t_log_std, mask, torch.arange(B) % 3


def ordered(direction, student, teacher):
    return kl_divergence(student, teacher) if direction == "reverse" else kl_divergence(teacher, student)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("discrete", [None, DISCRETE], ids=["Gaussian", "mixed"])
def test_head_kl_ref__is_a_loop_over_tokens_of_torch_distributions(direction, discrete):
    floor = 0.1
    temperature = 1.5
    h, weight, bias, t_mean, t_log_std, mask, task = head()
    sums = torch.zeros(3, dtype=torch.float64)
    counts = torch.zeros(3, dtype=torch.float64)
    for b, k in mask.nonzero().tolist():
        i = int(task[b])
        A = int(ACT_DIMS[i])
        x = h[b, k] @ weight[i] + bias[i]
        if discrete is not None and discrete[i]:
            student = Categorical(logits=x[:A])
            teacher = Categorical(logits=t_mean[b, k, :A] / temperature)
            sums[i] += ordered(direction, student, teacher)
        else:
            log_std = LOG_STD[0] + (LOG_STD[1] - LOG_STD[0]) * torch.sigmoid(x[4 : 4 + A])
            student = Normal(x[:A].tanh(), ((2 * log_std).exp() + floor**2).sqrt())
            sigma = t_log_std[b, k, :A].exp() * temperature
            teacher = Normal(t_mean[b, k, :A], (sigma**2 + floor**2).sqrt())
            sums[i] += ordered(direction, student, teacher).mean()
        counts[i] += 1
    options = (direction, floor, temperature, discrete)
    got = head_kl_ref(h, weight, bias, t_mean, t_log_std, mask, task, ACT_DIMS, *options)
    assert torch.allclose(got[0], sums, rtol=1e-9)
    assert torch.equal(got[1], counts)


def test_references__default_to_the_reverse_kl_without_floor_or_temperature():
    h, weight, bias, t_mean, t_log_std, mask, task = head()
    mean = h[..., :4]
    log_std = t_log_std.flip(0)
    gaussian = (mean, log_std, t_mean, t_log_std)
    logp = mean.log_softmax(-1)
    t_logp = t_mean.log_softmax(-1)
    plain = ("reverse", 0.0, 1.0)
    assert torch.equal(divergence(*gaussian), divergence(*gaussian, *plain))
    assert torch.equal(
        categorical_divergence(logp, t_logp), categorical_divergence(logp, t_logp, "reverse", 1.0)
    )
    for f, args in ((policy_kl, gaussian), (head_kl_ref, (h, weight, bias, t_mean, t_log_std))):
        args = (*args, mask, task, ACT_DIMS)
        assert torch.equal(f(*args)[0], f(*args, *plain, None)[0])


@pytest.mark.parametrize("keep", [slice(None), slice(1, None, 3)], ids=["every token", "states"])
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
    factors = F.dropout(torch.ones(B, n_head, len(queries), T, dtype=torch.float64), p)
    wanted = torch.zeros(B, len(queries), n_head * hs, dtype=torch.float64)
    q, k, v = qkv.unflatten(-1, (3, n_head, hs)).permute(2, 0, 3, 1, 4)
    for b, i in mask[:, keep].nonzero().tolist():
        seen = mask[b] & (torch.arange(T) <= queries[i])
        for n in range(n_head):
            weights = (k[b, n, seen] @ q[b, n, queries[i]] / math.sqrt(hs)).softmax(0)
            y = (weights * factors[b, n, i, seen]) @ v[b, n, seen]
            wanted[b, i, n * hs : (n + 1) * hs] = y
    assert torch.allclose(got, wanted, rtol=1e-9)
    assert torch.equal(attention_ref(qkv, mask, n_head), attention_ref(qkv, mask, n_head, 0.0, slice(None)))

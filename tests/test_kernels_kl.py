"""kernels/kl.py: plain PyTorch and, in Triton's interpreter or on a GPU, the kernel."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, Normal, kl_divergence

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
from kernels.kl import (
    DIRECTIONS,
    FEW_TASKS,
    LOG_STD,
    bounded,
    categorical_divergence,
    divergence,
    head_kl,
    head_kl_ref,
    log_softmax,
    own_map,
    per_teacher,
    policies,
    policy_kl,
)


def gaussians(seed, shape, dtype=torch.float64):
    """Student and teacher: mean, log_std, t_mean, t_log_std."""
    gen = torch.Generator().manual_seed(seed)
    means = torch.rand((2, *shape), generator=gen, dtype=dtype) * 2 - 1
    log_stds = torch.rand((2, *shape), generator=gen, dtype=dtype) * 6 - 5
    return means[0], log_stds[0], means[1], log_stds[1]


# ---- Gaussians ---------------------------------------------------------------------------------------------


@given(seeds, st.sampled_from(DIRECTIONS), st.floats(0.25, 4), st.sampled_from([0.0, 0.05, 0.5]))
def test_divergence__is_that_of_torch_distributions(seed, direction, temperature, floor):
    mean, log_std, t_mean, t_log_std = gaussians(seed, (5, 3))
    student = Normal(mean, ((2 * log_std).exp() + floor**2).sqrt())
    teacher = Normal(t_mean, ((2 * t_log_std).exp() * temperature**2 + floor**2).sqrt())
    pair = (student, teacher) if direction == "reverse" else (teacher, student)
    got = divergence(mean, log_std, t_mean, t_log_std, direction, floor, temperature)
    assert torch.allclose(got, kl_divergence(*pair), rtol=1e-9, atol=1e-12)


@given(seeds, st.sampled_from(DIRECTIONS), st.sampled_from([torch.float32, torch.float64]))
def test_divergence__is_never_negative_and_exactly_zero_between_equals(seed, direction, dtype):
    mean, log_std, t_mean, t_log_std = gaussians(seed, (50,), dtype)
    assert (divergence(mean, log_std, t_mean, t_log_std, direction) > 0).all()
    assert (divergence(mean, log_std, mean, log_std, direction, 0.05) == 0).all()
    close = log_std + 1e-5 * torch.sign(t_log_std)
    assert (divergence(mean, log_std, mean, close, direction) >= -torch.finfo(dtype).eps).all()


def test_divergence__temperature_widens_the_teacher():
    one = torch.zeros(1)
    assert divergence(one, one, one, one, temperature=2.0) > 0
    assert divergence(one, one + np.log(2), one, one, temperature=2.0) < 1e-6


@given(seeds, st.sampled_from(DIRECTIONS))
def test_policy_kl__is_a_loop_over_tokens_and_padding_changes_nothing(seed, direction):
    act_dims = torch.tensor([2, 3, 1])
    policy = gaussians(seed, (6, 4, 3))
    gen = torch.Generator().manual_seed(seed)
    task = torch.randint(3, (6,), generator=gen)
    mask = torch.rand(6, 4, generator=gen) < 0.7
    options = (direction, 0.05, 1.5)
    sums, counts = policy_kl(*policy, mask, task, act_dims, *options)
    wanted = torch.zeros(3, dtype=torch.float64)
    n_tokens = torch.zeros(3, dtype=torch.float64)
    for b, k in mask.nonzero().tolist():
        n = task[b]
        real = slice(int(act_dims[n]))
        wanted[n] += divergence(*(x[b, k, real] for x in policy), *options).mean()
        n_tokens[n] += 1
    assert torch.allclose(sums, wanted)
    assert torch.equal(counts, n_tokens)
    unused = ~(mask[..., None] & (torch.arange(3) < act_dims[task][:, None])[:, None])
    wild = []
    for x, value in zip(policy, (float("nan"), 9e9, float("inf"), -7.0), strict=True):
        wild.append(x.masked_fill(unused, value))
    assert torch.equal(policy_kl(*wild, mask, task, act_dims, *options)[0], sums)


def test_policy_kl__of_a_teacher_without_windows_has_no_sum_and_no_count():
    mask = torch.ones(2, 3, dtype=torch.bool)
    task = torch.zeros(2, dtype=torch.long)
    sums, counts = policy_kl(*gaussians(0, (2, 3, 2)), mask, task, torch.tensor([2, 2]))
    assert counts.tolist() == [6, 0]
    assert sums[0] > 0
    assert sums[1] == 0


def test_per_teacher__divides_by_the_action_dimension():
    mask = torch.ones(2, 5, dtype=torch.bool)
    sums, counts = per_teacher(torch.ones(2, 5, 4), mask, torch.tensor([0, 1]), torch.tensor([4, 2]))
    assert sums.tolist() == [5, 5]
    assert counts.tolist() == [5, 5]


# ---- categoricals ------------------------------------------------------------------------------------------


FACTORS = [(2,), (), (1,), (3, 2)]


def columns(factors, A):
    """As kernels/kl.py takes the factors of tasks, (F, N, A) bool."""
    found = torch.zeros(max(map(len, factors)), len(factors), A, dtype=torch.bool)
    for n, sizes in enumerate(factors):
        for f, columns_of_f in enumerate(torch.arange(sum(sizes)).split(sizes)):
            found[f, n, columns_of_f] = True
    return found


def categoricals(seed, B=8, K=4):
    """Student and teacher of four tasks, all but the second categorical, the last of two factors.

    Returns their policies, four arrays (B, K, 5); mask (B, K), task (B,), act_dims (4,), factors (2, 4, 5).
    """
    gen = torch.Generator().manual_seed(seed)
    mean, log_std, t_mean, t_log_std = gaussians(seed, (B, K, 5))
    task = torch.arange(B) % 4
    mask = torch.rand(B, K, generator=gen) < 0.7
    factors = columns(FACTORS, 5)
    student = policies(torch.cat((3 * mean, log_std), -1), task, factors)
    teacher = policies(torch.cat((3 * t_mean, t_log_std), -1), task, factors)
    return *student, *teacher, mask, task, torch.tensor([2, 3, 1, 5]), factors


@given(seeds, st.sampled_from(DIRECTIONS))
def test_policy_kl__of_categoricals_is_that_of_torch_distributions(seed, direction):
    logp, log_std, t_logp, t_log_std, mask, task, act_dims, factors = categoricals(seed)
    args = (logp, log_std, t_logp, t_log_std, mask, task, act_dims, direction, 0.05, 1.0)
    sums, counts = policy_kl(*args, factors)
    for n, sizes in enumerate(FACTORS):
        valid = mask[task == n]
        assert counts[n] == valid.sum()
        if not sizes:
            gaussian_sums, _ = policy_kl(*args)
            assert torch.allclose(sums[n], gaussian_sums[n])
            continue
        wanted = 0
        parts = [x[task == n][..., : sum(sizes)].split(sizes, -1) for x in (logp, t_logp)]
        for student, teacher in zip(*parts, strict=True):
            of_factor = ordered(direction, Categorical(logits=student), Categorical(logits=teacher))
            wanted += of_factor[valid].sum() / len(sizes)  # each factor is an action dimension
        assert torch.allclose(sums[n], wanted)


@given(seeds, st.sampled_from(DIRECTIONS), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_policy_kl__of_a_product_is_the_sum_of_its_factors(seed, direction, sizes):
    """That of the joint distribution, over all combinations of choices."""
    gen = torch.Generator().manual_seed(seed)
    scale = 10 ** torch.rand(1, generator=gen, dtype=torch.float64)
    logits = scale * torch.randn(2, sum(sizes), generator=gen, dtype=torch.float64)
    joint = []
    for x in logits:
        total = torch.zeros(1, dtype=torch.float64)
        for of_factor in x.split(sizes):
            total = (total[:, None] + of_factor).flatten()
        joint.append(Categorical(logits=total))
    factors = columns([sizes], sum(sizes))
    task = torch.zeros(1, dtype=torch.long)
    mask = torch.ones(1, 1, dtype=torch.bool)
    logp, t_logp = log_softmax(logits, factors)[:, None, None]
    zeros = torch.zeros_like(logp)
    args = (logp, zeros, t_logp, zeros, mask, task, torch.tensor([sum(sizes)]), direction, 0.0, 1.0, factors)
    sums, _ = policy_kl(*args)
    expected = ordered(direction, *joint)
    assert torch.allclose(sums * len(sizes), expected, rtol=1e-9, atol=1e-12)


@given(
    seeds,
    st.sampled_from(DIRECTIONS),
    st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    st.lists(st.lists(st.integers(1, 17), min_size=1, max_size=4), min_size=1, max_size=4),
    st.sampled_from([1, 7, 17]),
)
def test_head_kl__of_factors_is_exact_at_odd_sizes_and_extreme_scales(seed, direction, scale, sizes, K):
    """In float32, values and gradients, against a loop over windows and factors in float32 and float64.

    torch.distributions calls the KL infinite where a probability underflows.
    """
    gen = torch.Generator().manual_seed(seed)
    act_dims = torch.tensor([sum(s) for s in sizes])
    N, A, B, C = len(sizes), int(act_dims.max()), 5, 3
    factors = columns(sizes, A)
    task = torch.randint(N, (B,), generator=gen)
    mask = torch.rand(B, K, generator=gen) < 0.7
    leaves = [torch.randn(*shape, generator=gen) for shape in ((B, K, C), (N, C, 2 * A), (N, 2 * A))]
    leaves[1] *= scale
    target, zeros = policies(scale * torch.randn(B, K, 2 * A, generator=gen), task, factors)

    def ours(h, weight, bias):
        teacher = (target.to(h), zeros.to(h))
        return head_kl(h, weight, bias, *teacher, mask, task, act_dims, direction, 0.0, 1.5, factors)[0]

    def loop(h, weight, bias):
        sums = [h.new_zeros(()) for _ in sizes]
        for i, n in enumerate(task.tolist()):
            own = (h[i] @ weight[n] + bias[n])[:, : act_dims[n]].split(sizes[n], -1)
            for x, y in zip(own, target[i, :, : act_dims[n]].to(h).split(sizes[n], -1), strict=True):
                logp, logq = x.log_softmax(-1), (y / 1.5).log_softmax(-1)
                if direction == "forward":
                    logp, logq = logq, logp
                kl = (logp.exp() * (logp - logq)).sum(-1)
                sums[n] = sums[n] + kl[mask[i]].sum() / len(sizes[n])
        return torch.stack(sums)

    found = []
    for f, dtype in ((ours, torch.float32), (loop, torch.float32), (loop, torch.float64)):
        own = [x.to(dtype, copy=True).requires_grad_() for x in leaves]
        sums = f(*own)
        found.append((sums.detach(), *torch.autograd.grad(sums.sum(), own)))
    assert all(x.isfinite().all() for x in found[0])
    for name, *results in zip(("KL", "dh", "dweight", "dbias"), *found, strict=True):
        assert_as_exact_as_pytorch(*[[x] for x in results], [name], torch.float32, least=max(1.0, scale**2))


@given(seeds, st.sampled_from(DIRECTIONS))
def test_head_kl__of_categoricals_ignores_what_is_masked_or_no_action(seed, direction):
    gen = torch.Generator().manual_seed(seed)
    *_, mask, task, act_dims, factors = categoricals(seed)
    leaves = []
    for shape in ((8, 4, 8), (4, 8, 10), (4, 10)):  # h, weight, bias
        leaves.append(torch.randn(*shape, generator=gen, dtype=torch.float64, requires_grad=True))
    target = categoricals(seed + 1)[2:4]
    real = torch.arange(5) < act_dims[task][:, None, None]
    got = []
    for wild in (0.0, -7.0):
        filled = [x.masked_fill(~(real & mask[..., None]), wild) for x in target]
        sums, _ = head_kl(*leaves, *filled, mask, task, act_dims, direction, 0.05, 1.5, factors)
        got.append((sums, *torch.autograd.grad(sums.sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*got, strict=True))
    assert all(x.isfinite().all() for x in got[0])
    _, _, gweight, _ = got[0]
    assert gweight[0, :, :2].any()  # the first task has two logits,
    assert not gweight[0, :, 2].any()  # no third,
    assert not gweight[0, :, 5:].any()  # and no log-std


def test_categorical_divergence__temperature_flattens_the_teacher():
    logp = torch.tensor([0.9, 0.1, 0.3, 0.7]).log()
    factors = columns([(2, 2)], 4)[:, 0]
    flat = log_softmax(logp / 2, factors)
    assert categorical_divergence(flat, logp, factors, "forward", 2.0).sum() < 1e-6
    assert categorical_divergence(flat, logp, factors, "forward").sum() > 1e-6


# ---- from the hidden states: sums, forward mode and gradients ----------------------------------------------


def test_head_kl__is_the_kl_of_the_heads_outputs():
    gen = torch.Generator().manual_seed(0)
    h = torch.randn(4, 5, 8, generator=gen)
    weight = torch.randn(2, 8, 6, generator=gen)
    bias = torch.randn(2, 6, generator=gen)
    target = (torch.rand(4, 5, 3, generator=gen), -torch.rand(4, 5, 3, generator=gen))
    task = torch.tensor([0, 1, 1, 0])
    rest = (torch.ones(4, 5, dtype=torch.bool), task, torch.tensor([3, 2]))
    outputs = torch.stack([h[b] @ weight[n] + bias[n] for b, n in enumerate(task)])
    mean, log_std = outputs.chunk(2, -1)
    wanted_sums, wanted_counts = policy_kl(mean.tanh(), bounded(log_std), *target, *rest)
    sums, counts = head_kl(h, weight, bias, *target, *rest)
    assert torch.allclose(sums, wanted_sums, rtol=1e-5)
    assert torch.equal(counts, wanted_counts)


ACT_DIMS = torch.tensor([2, 3, 4])
OF_THREE = columns([(), (3,), (1, 3)], 4)  # factors


def head_of_three_tasks(B=9, K=4, C=5, A=4):
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
@pytest.mark.parametrize("factors", [None, OF_THREE], ids=["Gaussian", "mixed"])
def test_head_kl_ref__is_a_loop_over_tokens_of_torch_distributions(direction, factors):
    floor = 0.1
    temperature = 1.5
    h, weight, bias, t_mean, t_log_std, mask, task = head_of_three_tasks()
    sums = torch.zeros(3, dtype=torch.float64)
    counts = torch.zeros(3, dtype=torch.float64)
    for b, k in mask.nonzero().tolist():
        i = int(task[b])
        A = int(ACT_DIMS[i])
        x = h[b, k] @ weight[i] + bias[i]
        if factors is not None and i > 0:
            own = factors[factors[:, i].any(-1), i]
            for choices in own:
                student = Categorical(logits=x[:4][choices])
                teacher = Categorical(logits=t_mean[b, k, choices] / temperature)
                sums[i] += ordered(direction, student, teacher) / len(own)
        else:
            log_std = LOG_STD[0] + (LOG_STD[1] - LOG_STD[0]) * torch.sigmoid(x[4 : 4 + A])
            student = Normal(x[:A].tanh(), ((2 * log_std).exp() + floor**2).sqrt())
            sigma = t_log_std[b, k, :A].exp() * temperature
            teacher = Normal(t_mean[b, k, :A], (sigma**2 + floor**2).sqrt())
            sums[i] += ordered(direction, student, teacher).mean()
        counts[i] += 1
    options = (direction, floor, temperature, factors)
    got = head_kl_ref(h, weight, bias, t_mean, t_log_std, mask, task, ACT_DIMS, *options)
    assert torch.allclose(got[0], sums, rtol=1e-9)
    assert torch.equal(got[1], counts)


def test_policies__of_categoricals_are_log_probabilities_of_their_own_actions_and_zeros():
    x = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    task = torch.tensor([1, 0, 1])  # teacher 1 has three discrete actions
    first, second = policies(x, task, OF_THREE)
    assert torch.allclose(first[::2, :, :3], x[::2, :, :3].log_softmax(-1))
    assert (first[::2, :, 3].exp() == 0).all()
    assert not second[::2].any()
    assert torch.equal(first[1], x[1, :, :4].tanh())
    assert torch.equal(second[1], bounded(x[1, :, 4:]))


@pytest.mark.parametrize("n_tasks", [1, 3, FEW_TASKS, FEW_TASKS + 1])
def test_own_map__takes_each_window_through_its_own_tasks_map(n_tasks):
    generator = torch.Generator().manual_seed(n_tasks)
    x, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((40, 3, 5), (n_tasks, 5, 4), (n_tasks, 4))
    )
    task = torch.randint(n_tasks, (40,), generator=generator)
    expected = torch.stack([x[i] @ weight[t] + bias[t] for i, t in enumerate(task.tolist())])
    torch.testing.assert_close(own_map(x, weight, bias, task), expected)
    gradients = torch.autograd.grad(own_map(x, weight, bias, task).square().sum(), (x, weight, bias))
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), (x, weight, bias)))


def test_references__default_to_the_reverse_kl_without_floor_or_temperature():
    h, weight, bias, t_mean, t_log_std, mask, task = head_of_three_tasks()
    mean = h[..., :4]
    log_std = t_log_std.flip(0)
    gaussian = (mean, log_std, t_mean, t_log_std)
    logp = mean.log_softmax(-1)
    t_logp = t_mean.log_softmax(-1)
    one_factor = torch.ones(1, 4, dtype=torch.bool)
    plain = ("reverse", 0.0, 1.0)
    assert torch.equal(divergence(*gaussian), divergence(*gaussian, *plain))
    categorical = (logp, t_logp, one_factor)
    assert torch.equal(
        categorical_divergence(*categorical), categorical_divergence(*categorical, "reverse", 1.0)
    )
    for f, args in ((policy_kl, gaussian), (head_kl_ref, (h, weight, bias, t_mean, t_log_std))):
        args = (*args, mask, task, ACT_DIMS)
        assert torch.equal(f(*args)[0], f(*args, *plain, None)[0])


def random_inputs(seed, B, K, C, A, N, dtype, scale=1.0, valid=0.7):
    """(h, weight, bias), their tangents, (t_mean, t_log_std), (mask, task, act_dims), upstream gradient (N,).

    scale: of the weights. valid: probability that a token is valid.
    """
    gen = torch.Generator().manual_seed(seed)
    h = normal(gen, B, K, C, dtype=dtype)
    weight = normal(gen, N, C, 2 * A, dtype=dtype, scale=scale * C**-0.5)
    bias = normal(gen, N, 2 * A, dtype=dtype)
    leaves = (h, weight, bias)
    tangents = [normal(gen, *x.shape, dtype=dtype) for x in leaves]
    t_mean = (torch.rand(B, K, A, generator=gen) * 2 - 1).to(DEVICE)
    t_log_std = (torch.rand(B, K, A, generator=gen) * -4).to(DEVICE)
    mask = (torch.rand(B, K, generator=gen) < valid).to(DEVICE)
    task = torch.randint(N, (B,), generator=gen).to(DEVICE)
    act_dims = torch.randint(1, A + 1, (N,), generator=gen).to(DEVICE)
    upstream = torch.where(normal(gen, N) > 0, 5.0, -3.0)
    return leaves, tangents, (t_mean, t_log_std), (mask, task, act_dims), upstream


@st.composite
def inputs_of_many_sizes(draw):
    return random_inputs(
        draw(seeds),
        B=draw(lengths(16)),
        K=draw(lengths(16)),
        C=draw(st.sampled_from([1, 16, 17, 48, 64, 128])),
        A=draw(st.sampled_from([1, 3, 6, 8, 17])),
        N=draw(st.integers(1, 4)),
        dtype=draw(st.sampled_from(kernels.DTYPES)),
        scale=draw(st.sampled_from([1e-2, 1.0, 4.0])),
        valid=draw(st.sampled_from([0.0, 0.7, 1.0])),
    )


def assert_as_exact(inputs, options):
    """sums, their forward mode and gradients with the kernel, against head_kl_ref's."""
    leaves, tangents, target, (mask, task, act_dims), upstream = inputs
    dtype = leaves[0].dtype
    rest = (mask, task, act_dims, *options)

    def run(f, dtype):
        converted = [x.to(dtype) for x in target]
        return derivatives(lambda *x: f(*x, *converted, *rest)[0], leaves, upstream, tangents, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "on_cpu", True)
        got = run(head_kl, dtype)
        _, counts = head_kl(*leaves, *target, *rest)
    n_tokens = torch.zeros_like(counts).long().index_add(0, task, mask.sum(1))
    assert torch.equal(counts.long(), n_tokens)
    reference = run(head_kl_ref, dtype)
    exact = run(head_kl_ref, torch.float64)
    terms = [(g * t).abs().sum().item() for g, t in zip(exact[2:], tangents, strict=True)]
    least = (0, sum(terms) / 3, 0, 0, 0)  # forward mode is a sum of such terms, signs and all
    for i, name in enumerate(("KL", "forward mode", "dh", "dweight", "dbias")):
        assert_as_exact_as_pytorch([got[i]], [reference[i]], [exact[i]], [name], dtype, least[i])


@triton_needed
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-2, 4.0])
def test_head_kl__kernel_is_as_exact_as_plain_pytorch(dtype, direction, scale):
    inputs = random_inputs(0, B=11, K=3, C=17, A=3, N=3, dtype=dtype, scale=scale)
    assert_as_exact(inputs, (direction, 0.05, 2.0))


def sharing(inputs, groups):
    """The same inputs where tasks share heads: the first ones of them."""
    leaves, tangents, *rest = inputs
    G = max(groups) + 1
    leaves, tangents = ([x[0], *(y[:G] for y in x[1:])] for x in (leaves, tangents))
    return tuple(leaves), tangents, *rest


@triton_needed
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
def test_head_kl__kernel_of_shared_heads_is_as_exact_as_plain_pytorch(dtype, direction):
    groups = [0, 1, 0, 0]
    inputs = random_inputs(0, B=11, K=3, C=17, A=3, N=4, dtype=dtype)
    upstream = torch.tensor([5.0, -3.0, -2.0, 1.0], device=DEVICE)  # a gradient of each task's own
    inputs = (*sharing(inputs, groups)[:-1], upstream)
    assert_as_exact(inputs, (direction, 0.05, 2.0, None, torch.tensor(groups, device=DEVICE)))


@pytest.mark.parametrize("factors", [None, OF_THREE], ids=["Gaussian", "mixed"])
def test_head_kl__of_shared_heads_is_that_of_as_many_equal_heads(factors):
    h, weight, bias, *rest = head_of_three_tasks()
    groups = torch.tensor([0, 1, 0])
    got = []
    for shared in (True, False):
        leaves = [x.clone().requires_grad_() for x in (h, weight[:2], bias[:2])]
        own = leaves if shared else [leaves[0], *(x[groups] for x in leaves[1:])]
        options = (factors, groups) if shared else (factors,)
        sums, counts = head_kl(*own, *rest, ACT_DIMS, "forward", 0.1, 1.5, *options)
        gradients = torch.autograd.grad(sums @ torch.tensor([5.0, -3.0, -2.0]).double(), leaves)
        got.append((sums, counts, *gradients))
    for a, b in zip(*got, strict=True):
        torch.testing.assert_close(a, b)


@triton_needed
def test_head_kl__kernel_is_as_exact_as_plain_pytorch_at_close_policies(monkeypatch):
    """Student: mean 0, variance 1. Teacher: mean 0 and variances where the kernel's series is least exact."""
    monkeypatch.setattr(kernels, "on_cpu", True)
    h = torch.zeros(8, 16, 1, device=DEVICE)
    weight = torch.zeros(1, 1, 2, device=DEVICE)
    bias = torch.tensor([[0.0, 100.0]], device=DEVICE)  # log_std is at its upper bound, 0
    t_mean = torch.zeros(8, 16, 1, device=DEVICE)
    ratio = torch.linspace(0.5001, 0.51, 8 * 16, device=DEVICE)  # of the variances; the series begins at 0.5
    t_log_std = -ratio.log().view(8, 16, 1) / 2
    mask = torch.ones(8, 16, dtype=torch.bool, device=DEVICE)
    task = torch.zeros(8, dtype=torch.long, device=DEVICE)
    rest = (mask, task, torch.ones(1, dtype=torch.long, device=DEVICE))
    inputs = (h, weight, bias, t_mean, t_log_std)
    got, _ = head_kl(*inputs, *rest)
    reference, _ = head_kl_ref(*inputs, *rest)
    exact, _ = head_kl_ref(*(x.double() for x in inputs), *rest)
    assert_as_exact_as_pytorch([got], [reference], [exact], ["KL"], torch.float32)


@pytest.mark.slow
@triton_needed
@many_sizes
@given(
    inputs_of_many_sizes(),
    st.sampled_from(DIRECTIONS),
    st.sampled_from([0.05, 0.5]),
    st.sampled_from([0.5, 1.0, 2.0]),
)
def test_head_kl__kernel_is_as_exact_as_plain_pytorch_at_many_sizes(inputs, direction, floor, temperature):
    assert_as_exact(inputs, (direction, floor, temperature))

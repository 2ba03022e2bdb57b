"""KL divergence between policies, diagonal Gaussians or categoricals, summed per teacher.

    KL(N(m, s) || N(n, t)) = log(t / s) + (s^2 + (m - n)^2) / (2 t^2) - 1/2        per action dimension
    KL(p || q) = sum_a p_a log(p_a / q_a)                                          of discrete actions

Called by distill.py, where student and teacher are the two policies and a batch mixes windows of any of N teachers.
A policy is two arrays (B, K, A): mean and log_std of a Gaussian, or a categorical's log-probabilities and nothing (zeros).
"""

import torch

import kernels
from kernels import tl, triton

LOG_STD = (-4.0, 0.0)  # bounds of the head's log-std, in units of half the action range
NEVER = -1e9  # logit of an action that a task does not have; not -inf, whose gradient would be NaN
DIRECTIONS = (
    "reverse",
    "forward",
)  # reverse: KL(student || teacher), the proposal's; forward: KL(teacher || student), Rusu et al.'s


def divergence(mean, log_std, t_mean, t_log_std, direction="reverse", sigma_floor=0.0, temperature=1.0):
    """Elementwise KL between student (mean, log_std) and teacher (t_mean, t_log_std), any common shape.

    sigma_floor: added to both variances as sigma_floor^2, so that no teacher is infinitely sharp (an action on its bounds has
    a collapsing sigma, and the KL grows as 1 / sigma^2). temperature multiplies the teacher's sigma (Hinton et al. 2015, arXiv 1503.02531).
    """
    var = (2 * log_std).exp() + sigma_floor**2
    t_var = (2 * t_log_std).exp() * temperature**2 + sigma_floor**2
    if direction == "forward":
        var, t_var = t_var, var
    # not 0.5 * (ratio - 1 - log(ratio)) with ratio = var / t_var: near 1 that cancels in float32, log1p does not
    x = (var - t_var) / t_var
    return 0.5 * (x - torch.log1p(x) + (mean - t_mean).square() / t_var)


def categorical_divergence(logp, t_logp, direction="reverse", temperature=1.0):
    """Terms, one for each action, of the KL between student and teacher, log-probabilities (..., A). temperature divides the teacher's logits."""
    t_logp = (t_logp / temperature).log_softmax(-1)
    return t_logp.exp() * (t_logp - logp) if direction == "forward" else logp.exp() * (logp - t_logp)


def real(A, task, act_dims):
    """(B, 1, A) bool: which of the A columns are actions of each window's task."""
    return torch.arange(A, device=task.device) < act_dims[task][:, None, None]


def policies(x, task, act_dims, discrete=None):
    """The head's affine map x (B, K, 2A), padded to the widest task's actions -> policies, two arrays (B, K, A).
    task (B,), act_dims (N,); discrete (N,) bool: which tasks' are categorical, None: no task's."""
    mean, log_std = x.chunk(2, dim=-1)
    if discrete is None:
        return mean.tanh(), bounded(log_std)
    categorical = discrete[task][:, None, None]  # (B, 1, 1)
    logp = mean.masked_fill(~real(mean.shape[-1], task, act_dims), NEVER).log_softmax(-1)
    return torch.where(categorical, logp, mean.tanh()), torch.where(categorical, 0.0, bounded(log_std))


def per_teacher(x, mask, task, act_dims, discrete=None):
    """x (B, K, A) elementwise, mask (B, K) bool, task (B,), act_dims (N,) -> sums (N,) of x over a token's real action dimensions
    divided by their number (a discrete action is one dimension), and counts (N,) of valid tokens."""
    A, N = act_dims[task], len(act_dims)  # (B,)
    x = x.masked_fill(~(mask[..., None] & real(x.shape[-1], task, act_dims)), 0.0).sum((1, 2))  # (B,)
    x = x / (A if discrete is None else A.masked_fill(discrete[task], 1))
    sums = torch.zeros(N, dtype=x.dtype, device=x.device).index_add(0, task, x)
    counts = torch.zeros(N, dtype=x.dtype, device=x.device).index_add(0, task, mask.sum(1).to(x.dtype))
    return sums, counts


def policy_kl(
    mean,
    log_std,
    t_mean,
    t_log_std,
    mask,
    task,
    act_dims,
    direction="reverse",
    sigma_floor=0.0,
    temperature=1.0,
    discrete=None,
):
    """Student and teacher, each (B, K, A), padded to the widest action; mask (B, K); task (B,): whose window; act_dims (N,); discrete as in `policies`.

    Returns sums (N,) of the KL per action dimension over each teacher's valid tokens, and counts (N,) of those tokens:
    L_i = sums[i] / counts[i]. What is masked or beyond a teacher's action size changes nothing.
    """
    x = divergence(mean, log_std, t_mean, t_log_std, direction, sigma_floor, temperature)
    if discrete is not None:
        other = ~real(mean.shape[-1], task, act_dims)
        terms = categorical_divergence(
            mean.masked_fill(other, NEVER), t_mean.masked_fill(other, NEVER), direction, temperature
        )
        x = torch.where(discrete[task][:, None, None], terms, x)
    return per_teacher(x, mask, task, act_dims, discrete)


def bounded(x):
    """The head's log-std, from its linear layer: between LOG_STD's bounds."""
    lo, hi = LOG_STD
    return lo + (hi - lo) * torch.sigmoid(x)


def head_kl_ref(
    h,
    weight,
    bias,
    t_mean,
    t_log_std,
    mask,
    task,
    act_dims,
    direction="reverse",
    sigma_floor=0.0,
    temperature=1.0,
    discrete=None,
):
    """policy_kl of the student's head on hidden states: h (B, K, C), weight (N, C, 2A), bias (N, 2A); the rest as there."""
    mean, log_std = policies(torch.baddbmm(bias[task][:, None], h, weight[task]), task, act_dims, discrete)
    return policy_kl(
        mean, log_std, t_mean, t_log_std, mask, task, act_dims, direction, sigma_floor, temperature, discrete
    )


# ---- the kernel ------------------------------------------------------------------------------------------------------


@triton.jit
def _tile(x, i, j, rows, columns, stride, DOT: tl.constexpr):
    """Rows i and columns j of the matrix at x, zero beyond `rows` and `columns`."""
    return tl.load(
        x + i[:, None] * stride + j[None, :], mask=(i < rows)[:, None] & (j < columns)[None, :], other=0.0
    ).to(DOT)


@triton.jit
def _head_kl(
    h,  # (B, K, C)
    weight, bias,  # (N, C, 2A), (N, 2A)
    t_mean, t_log_std,  # (B, K, A)
    mask, task, act_dims,  # (B, K) bytes, (B,) and (N,) int64
    sums, counts,  # (N,) float32, zeroed
    gh, gweight, gbias,  # gradients of sums[task] with respect to h, weight, bias: (B, K, C) as h, the others float32, zeroed
    th, tweight, tbias, along,  # tangents as h, weight, bias, and of sums (N,) zeroed; used where TANGENT
    B, C, A, floor2, temperature2, each,
    K: tl.constexpr, BK: tl.constexpr, D: tl.constexpr, BA: tl.constexpr, FORWARD: tl.constexpr, GRADIENT: tl.constexpr, TANGENT: tl.constexpr,
    LO: tl.constexpr, HI: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`each` windows in turn. The head's gradients over consecutive windows of one task are summed here and added to memory when the task changes."""
    k, c, a = tl.arange(0, BK), tl.arange(0, D), tl.arange(0, BA)
    first = tl.program_id(0).to(tl.int64) * each
    now = tl.load(task + first)
    gw_mean, gw_std = tl.zeros((D, BA), tl.float32), tl.zeros((D, BA), tl.float32)
    gb_mean, gb_std = tl.zeros((BA,), tl.float32), tl.zeros((BA,), tl.float32)
    at = c[:, None] * 2 * A + a[None, :]
    there = (c < C)[:, None] & (a < A)[None, :]
    for step in range(tl.minimum(each, B - first)):
        i = first + step
        n = tl.load(task + i)
        if GRADIENT and n != now:
            tl.atomic_add(gweight + now * C * 2 * A + at, gw_mean, mask=there)
            tl.atomic_add(gweight + now * C * 2 * A + A + at, gw_std, mask=there)
            tl.atomic_add(gbias + now * 2 * A + a, gb_mean, mask=a < A)
            tl.atomic_add(gbias + now * 2 * A + A + a, gb_std, mask=a < A)
            gw_mean, gw_std = tl.zeros((D, BA), tl.float32), tl.zeros((D, BA), tl.float32)
            gb_mean, gb_std = tl.zeros((BA,), tl.float32), tl.zeros((BA,), tl.float32)
            now = n
        w, b, size = weight + n * C * 2 * A, bias + n * 2 * A, tl.load(act_dims + n)
        x = _tile(h + i * K * C, k, c, K, C, C, DOT)
        w_mean, w_std = _tile(w, c, a, C, A, 2 * A, DOT), _tile(w + A, c, a, C, A, 2 * A, DOT)
        mean = (
            tl.dot(x, w_mean, input_precision=PRECISION)
            + tl.load(b + a, mask=a < A, other=0.0).to(tl.float32)[None, :]
        )
        std = (
            tl.dot(x, w_std, input_precision=PRECISION)
            + tl.load(b + A + a, mask=a < A, other=0.0).to(tl.float32)[None, :]
        )

        # the student's mean and variance; e = exp(-2 |x|), so that neither tanh nor its slope cancels
        e = tl.exp(-2 * tl.abs(mean))
        slope_mean = 4 * e / ((1 + e) * (1 + e))  # tanh'
        mean = tl.where(mean < 0, -1.0, 1.0) * (1 - e) / (1 + e)
        s = 1 / (1 + tl.exp(-std))
        var = tl.exp(2 * (LO + (HI - LO) * s))
        slope_std = (HI - LO) * s * (1 - s) * 2 * var  # of the variance
        inside = (k < K)[:, None] & (a < A)[None, :]
        m = tl.load(t_mean + i * K * A + k[:, None] * A + a[None, :], mask=inside, other=0.0).to(tl.float32)
        l = tl.load(t_log_std + i * K * A + k[:, None] * A + a[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        student, teacher = var + floor2, tl.exp(2 * l) * temperature2 + floor2
        valid = tl.load(mask + i * K + k, mask=k < K, other=0) != 0
        counted = valid[:, None] & (a < size)[None, :]
        if FORWARD:
            over, under = teacher, student
        else:
            over, under = student, teacher

        # 0.5 (r - log(1 + r) + (difference of means)^2 / under), r = over / under - 1; near r = 0 by a series, for r - log(1 + r) cancels
        gap, r = mean - m, (over - under) / under
        q = r / (2 + r)  # log(1 + r) = 2 atanh(q)
        q2 = q * q
        series = r * q - 2 * q * q2 * (
            1 / 3 + q2 * (1 / 5 + q2 * (1 / 7 + q2 * (1 / 9 + q2 * (1 / 11 + q2 * (1 / 13 + q2 / 15)))))
        )
        kl = 0.5 * (tl.where(tl.abs(r) < 0.5, series, r - tl.log(1 + r)) + gap * gap / under)
        tl.atomic_add(sums + n, tl.sum(tl.where(counted, kl, 0.0)) / size)
        tl.atomic_add(counts + n, tl.sum(valid.to(tl.float32)))

        # its gradient with respect to what the head's affine map returned
        g_mean = tl.where(counted, gap / under * slope_mean / size, 0.0)
        g_var = student - teacher - gap * gap if FORWARD else student - teacher
        g_std = tl.where(counted, 0.5 * g_var / (student * under) * slope_std / size, 0.0)
        if TANGENT:
            tw, tb, tx = tweight + n * C * 2 * A, tbias + n * 2 * A, _tile(th + i * K * C, k, c, K, C, C, DOT)
            t_m = tl.dot(tx, w_mean, input_precision=PRECISION) + tl.dot(
                x, _tile(tw, c, a, C, A, 2 * A, DOT), input_precision=PRECISION
            )
            t_s = tl.dot(tx, w_std, input_precision=PRECISION) + tl.dot(
                x, _tile(tw + A, c, a, C, A, 2 * A, DOT), input_precision=PRECISION
            )
            t_m += tl.load(tb + a, mask=a < A, other=0.0).to(tl.float32)[None, :]
            t_s += tl.load(tb + A + a, mask=a < A, other=0.0).to(tl.float32)[None, :]
            tl.atomic_add(along + n, tl.sum(g_mean * t_m + g_std * t_s))
        if GRADIENT:
            gb_mean += tl.sum(g_mean, 0)
            gb_std += tl.sum(g_std, 0)
            g_mean, g_std = g_mean.to(DOT), g_std.to(DOT)
            gx = tl.dot(g_mean, tl.trans(w_mean), input_precision=PRECISION) + tl.dot(
                g_std, tl.trans(w_std), input_precision=PRECISION
            )
            tl.store(
                gh + i * K * C + k[:, None] * C + c[None, :],
                gx.to(gh.dtype.element_ty),
                mask=(k < K)[:, None] & (c < C)[None, :],
            )
            gw_mean += tl.dot(tl.trans(x), g_mean, input_precision=PRECISION)
            gw_std += tl.dot(tl.trans(x), g_std, input_precision=PRECISION)
    if GRADIENT:
        tl.atomic_add(gweight + now * C * 2 * A + at, gw_mean, mask=there)
        tl.atomic_add(gweight + now * C * 2 * A + A + at, gw_std, mask=there)
        tl.atomic_add(gbias + now * 2 * A + a, gb_mean, mask=a < A)
        tl.atomic_add(gbias + now * 2 * A + A + a, gb_std, mask=a < A)


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


def _launch(h, weight, bias, targets, options, gradient=False, tangents=None):
    """Returns sums, counts, along (N,), and the gradients of sums (gh, gweight, gbias), empty where not asked for."""
    (t_mean, t_log_std, mask, task, act_dims), (direction, floor, temperature) = targets, options
    (B, K, C), (N, _, A2) = h.shape, weight.shape
    A, dev = A2 // 2, h.device
    sums, counts, along = (
        torch.zeros(N, device=dev) for _ in range(3)
    )  # not views of one: forward mode takes none that share memory
    gh = torch.empty_like(h) if gradient else h.new_empty(0)
    gweight, gbias = (torch.zeros(x.shape if gradient else 0, device=dev) for x in (weight, bias))
    programs = 4 * torch.cuda.get_device_properties(dev).multi_processor_count if dev.type == "cuda" else 4
    each = triton.cdiv(B, min(B, programs))
    dot = tl.bfloat16 if h.dtype == torch.bfloat16 and not kernels.INTERPRET else tl.float32
    _head_kl[(triton.cdiv(B, each),)](
        h, weight, bias, t_mean, t_log_std, mask, task, act_dims, sums, counts, gh, gweight, gbias, *(tangents or (h, weight, bias)), along,
        B, C, A, floor**2, temperature**2, each,
        K=K, BK=max(16, triton.next_power_of_2(K)), D=max(16, triton.next_power_of_2(C)), BA=max(16, triton.next_power_of_2(A)),
        FORWARD=direction == "forward", GRADIENT=gradient, TANGENT=tangents is not None, LO=LOG_STD[0], HI=LOG_STD[1],
        DOT=dot, PRECISION=kernels.precision(), num_warps=4)  # fmt: skip
    return sums, counts, along, gh, gweight, gbias


class _HeadKL(torch.autograd.Function):
    @staticmethod
    def forward(h, weight, bias, targets, options, gradient):
        sums, counts, _, *grads = _launch(h, weight, bias, targets, options, gradient)
        return sums, counts, *grads

    @staticmethod
    def setup_context(ctx, inputs, output):
        h, weight, bias, ctx.targets, ctx.options, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[2:], ctx.targets[3])
        ctx.save_for_forward(h, weight, bias)
        ctx.dtypes = weight.dtype, bias.dtype

    @staticmethod
    def backward(ctx, dsums, *_):  # each window's part of sums has one upstream, its teacher's
        gh, gweight, gbias, task = ctx.saved_tensors
        dh = gh * dsums[task].to(gh.dtype)[:, None, None]
        return (
            dh,
            (gweight * dsums[:, None, None]).to(ctx.dtypes[0]),
            (gbias * dsums[:, None]).to(ctx.dtypes[1]),
            None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx, th, tweight, tbias, *_):
        tangents = [
            torch.zeros_like(x) if t is None else t
            for x, t in zip(ctx.saved_tensors, (th, tweight, tbias), strict=True)
        ]
        return _Tangent.apply(*tangents, *ctx.saved_tensors, ctx.targets, ctx.options), None, None, None, None


class _Tangent(torch.autograd.Function):
    """The forward-mode rule; a Function of its own because torch.func calls jvp with wrapped tensors, which a kernel can't take."""

    @staticmethod
    def forward(th, tweight, tbias, h, weight, bias, targets, options):
        return _launch(
            h, weight, bias, targets, options, tangents=tuple(t.contiguous() for t in (th, tweight, tbias))
        )[2]

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass  # there is no derivative of the derivative


def tiles(K, C, A):
    """How many numbers lie in shared memory at most: a bound of what Triton 3.6 allocates for sm_90."""
    BK, D, BA = (max(16, triton.next_power_of_2(n)) for n in (K, C, A))
    return 2 * BK * D + 4 * D * BA + 4 * BK * BA


def head_kl(
    h,
    weight,
    bias,
    t_mean,
    t_log_std,
    mask,
    task,
    act_dims,
    direction="reverse",
    sigma_floor=0.0,
    temperature=1.0,
    discrete=None,
):
    """KL per teacher from the student's hidden states; arguments and results as in head_kl_ref. The kernel takes Gaussians in float32 and bfloat16, up to 128
    channels, 64 actions and 128 timesteps on a GPU; anything else goes to the reference, a student with a categorical task too. Its sums are added
    atomically: they differ by rounding from run to run."""
    args, options = (t_mean, t_log_std, mask, task, act_dims), (direction, sigma_floor, temperature)
    large = h.shape[1] > 128 or h.shape[2] > 128 or weight.shape[2] > 128
    here = kernels.available(h, weight, bias, t_mean, t_log_std) and not large and len(h) and discrete is None
    if not here or not kernels.fits(h, tiles(h.shape[1], h.shape[2], weight.shape[2] // 2)):
        return head_kl_ref(h, weight, bias, *args, *options, discrete)
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (h, weight, bias))
    args = (t_mean.contiguous(), t_log_std.contiguous(), mask.contiguous().view(torch.uint8), task, act_dims)
    return _HeadKL.apply(h.contiguous(), weight.contiguous(), bias.contiguous(), args, options, gradient)[:2]

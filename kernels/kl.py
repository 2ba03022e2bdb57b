"""KL divergence between policies, diagonal Gaussians or categoricals, summed per teacher.

    KL(N(m, s) || N(n, t)) = log(t / s) + (s^2 + (m - n)^2) / (2 t^2) - 1/2        per action dimension
    KL(p || q) = sum_f KL(p_f || q_f),   KL(p_f || q_f) = sum_a p_fa log(p_fa / q_fa)    of discrete actions

A discrete action has one factor f, or several independent ones (MultiDiscrete). Each is an action dimension:
the loss is the KL divided by the number of action dimensions, of either kind.

distill.py calls `head_kl` with student and teacher as the two policies; a batch mixes windows of any of N
teachers. model.py makes its outputs with `policies` and `bounded`. A policy is two
arrays (B, K, A): mean and log_std of a Gaussian, or log-probabilities of all factors' choices and zeros.

`factors` (F, N, A) bool: which of the A columns are the choices of the f-th factor of each task's actions; F
is that of the task of most factors. Continuous actions have none. None: no task has any.

Bytes moved by `head_kl`, e bytes a number: BKCe of hidden states and 2BKAe of targets in, BKCe of gradients
out; 8BCA of heads from the cache. Forward computes the gradients too: policies never reach memory.
"""

import torch
from torch import Tensor

import kernels
from kernels import tl, triton

LOG_STD = (-4.0, 0.0)  # bounds of the head's log-std, in units of half the action range
FEW_TASKS = 16  # up to so many, one product serves all windows of a batch
NEVER = -1e9  # logit of an action that a task does not have; not -inf, whose gradient would be NaN
DIRECTIONS = (
    "reverse",
    "forward",
)  # KL(student || teacher), the proposal's; KL(teacher || student), Rusu et al.'s


def divergence(
    mean: Tensor,
    log_std: Tensor,
    t_mean: Tensor,
    t_log_std: Tensor,
    direction: str = "reverse",
    sigma_floor: float = 0.0,
    temperature: float = 1.0,
) -> Tensor:
    """Elementwise KL between Gaussians, student (mean, log_std) and teacher (t_mean, t_log_std), one shape.

    sigma_floor: its square is added to both variances, so that no teacher is infinitely sharp. Where actions
    lie on their bounds a teacher's sigma collapses, and the KL grows as 1 / sigma^2.
    temperature: multiplies the teacher's sigma (Hinton et al. 2015, arXiv 1503.02531).
    """
    var = (2 * log_std).exp() + sigma_floor**2
    t_var = (2 * t_log_std).exp() * temperature**2 + sigma_floor**2
    var_p, var_q = (t_var, var) if direction == "forward" else (var, t_var)  # KL(p || q)
    # not 0.5 * (ratio - 1 - log(ratio)) of ratio = var_p / var_q: that cancels near 1, log1p does not
    x = (var_p - var_q) / var_q
    return 0.5 * (x - torch.log1p(x) + (mean - t_mean).square() / var_q)


def log_softmax(logits: Tensor, factors: Tensor) -> Tensor:
    """Log-probabilities (..., A) of logits (..., A), each factor's on their own; NEVER of columns of none.

    factors: as above, (F, ..., A), of the logits' own tasks.
    """
    logp = torch.full_like(logits, NEVER)
    for own in factors:
        logp = torch.where(own, logits.masked_fill(~own, NEVER).log_softmax(-1), logp)
    return logp


def categorical_divergence(
    logp: Tensor, t_logp: Tensor, factors: Tensor, direction: str = "reverse", temperature: float = 1.0
) -> Tensor:
    """Terms (..., A) of the KL between categoricals, one per choice, from their log-probabilities (..., A).

    factors: see log_softmax; terms of columns of none are 0. temperature: divides the teacher's logits.
    """
    t_logp = log_softmax(t_logp / temperature, factors)
    logp = logp.masked_fill(~factors.any(0), NEVER)
    if direction == "forward":
        return t_logp.exp() * (t_logp - logp)
    return logp.exp() * (logp - t_logp)


def real(A: int, task: Tensor, act_dims: Tensor) -> Tensor:
    """Which of the A columns are actions of each window's task: (B, 1, A) bool. task (B,), act_dims (N,)."""
    return torch.arange(A, device=task.device) < act_dims[task][:, None, None]


def bounded(x: Tensor) -> Tensor:
    """The head's log-std, between the bounds LOG_STD, from its linear layer. Any shape."""
    lo, hi = LOG_STD
    return lo + (hi - lo) * torch.sigmoid(x)


def own_map(x: Tensor, weight: Tensor, bias: Tensor, task: Tensor) -> Tensor:
    """Each window through its own task's affine map: (B, K, D) -> (B, K, E).

    weight (N, D, E), bias (N, E), task (B,); where tasks share maps, the same of groups. Of few tasks one
    product with the weights of all, in which other tasks meet zeros, takes a fraction of the time of a
    product for each window and of gathering its weights.
    """
    N, D, E = weight.shape
    if N > FEW_TASKS:
        return torch.baddbmm(bias[task][:, None], x, weight[task])
    own = (task[:, None] == torch.arange(N, device=task.device)).to(x.dtype)  # (B, N)
    spread = own[:, None, :, None] * x[:, :, None]  # (B, K, N, D), zero but for the window's own task
    return spread.flatten(2) @ weight.view(N * D, E) + (own @ bias)[:, None]


def policies(
    x: Tensor,  # (B, K, 2A), what the head's affine map returns
    task: Tensor,  # (B,)
    factors: Tensor | None = None,  # (F, N, A) bool
) -> tuple[Tensor, Tensor]:
    """The policies from the head's outputs: two arrays (B, K, A) padded to the widest task's A."""
    mean, log_std = x.chunk(2, dim=-1)
    if factors is None:
        return mean.tanh(), bounded(log_std)
    own = factors[:, task, None]  # (F, B, 1, A)
    categorical = own.any(0).any(-1, keepdim=True)  # (B, 1, 1)
    logp = log_softmax(mean, own)
    return torch.where(categorical, logp, mean.tanh()), torch.where(categorical, 0.0, bounded(log_std))


def per_teacher(
    x: Tensor,  # (B, K, A)
    mask: Tensor,  # (B, K) bool
    task: Tensor,  # (B,)
    act_dims: Tensor,  # (N,)
    factors: Tensor | None = None,  # (F, N, A) bool
) -> tuple[Tensor, Tensor]:
    """Sums (N,) of x over each teacher's valid tokens, and the counts (N,) of those tokens.

    A token's x is summed over the real columns and divided by the number of action dimensions. A factor of a
    discrete action is one dimension, however many columns its terms take.
    """
    n_teachers = len(act_dims)
    n_dims = act_dims[task]  # (B,)
    if factors is not None:
        n_factors = factors.any(2).sum(0)[task]
        n_dims = torch.where(n_factors > 0, n_factors, n_dims)
    x = x.masked_fill(~(mask[..., None] & real(x.shape[-1], task, act_dims)), 0.0).sum((1, 2))  # (B,)
    x = x / n_dims
    sums = torch.zeros(n_teachers, dtype=x.dtype, device=x.device).index_add(0, task, x)
    n_tokens = mask.sum(1).to(x.dtype)
    counts = torch.zeros(n_teachers, dtype=x.dtype, device=x.device).index_add(0, task, n_tokens)
    return sums, counts


def policy_kl(
    mean: Tensor,  # (B, K, A), of the student
    log_std: Tensor,
    t_mean: Tensor,  # (B, K, A), of the teacher
    t_log_std: Tensor,
    mask: Tensor,  # (B, K) bool
    task: Tensor,  # (B,), whose window
    act_dims: Tensor,  # (N,)
    direction: str = "reverse",
    sigma_floor: float = 0.0,
    temperature: float = 1.0,
    factors: Tensor | None = None,  # (F, N, A) bool
) -> tuple[Tensor, Tensor]:
    """Sums (N,) of the KL per action dimension over each teacher's valid tokens, and counts (N,) of those.

    The loss of teacher i is L_i = sums[i] / counts[i]. Policies are padded to the widest task's actions; what
    is masked or beyond a task's actions changes nothing. Options as in `divergence` and `policies`.
    """
    terms = divergence(mean, log_std, t_mean, t_log_std, direction, sigma_floor, temperature)
    if factors is not None:
        own = factors[:, task, None]  # (F, B, 1, A)
        categorical_terms = categorical_divergence(mean, t_mean, own, direction, temperature)
        terms = torch.where(own.any(0).any(-1, keepdim=True), categorical_terms, terms)
    return per_teacher(terms, mask, task, act_dims, factors)


def head_kl_ref(
    h: Tensor,  # (B, K, C), hidden states
    weight: Tensor,  # (G, C, 2A), of the student's heads
    bias: Tensor,  # (G, 2A)
    t_mean: Tensor,  # (B, K, A)
    t_log_std: Tensor,
    mask: Tensor,  # (B, K) bool
    task: Tensor,  # (B,)
    act_dims: Tensor,  # (N,)
    direction: str = "reverse",
    sigma_floor: float = 0.0,
    temperature: float = 1.0,
    factors: Tensor | None = None,  # (F, N, A) bool
    groups: Tensor | None = None,  # (N,), which head is each task's; None: its own, and G is N
) -> tuple[Tensor, Tensor]:
    """policy_kl of the student's policies, which its heads make of hidden states; the rest as there."""
    head = task if groups is None else groups[task]
    mean, log_std = policies(own_map(h, weight, bias, head), task, factors)
    options = (direction, sigma_floor, temperature, factors)
    return policy_kl(mean, log_std, t_mean, t_log_std, mask, task, act_dims, *options)


# ---- the kernel --------------------------------------------------------------------------------------------
# i, n: a window and its task; k, c, a: timesteps (BK,), channels (D,), action dimensions (BA,) of a tile
# mean and std: the two halves of the head's outputs, A columns each


@triton.jit
def _load_tile(x, i, j, rows, columns, stride, DOT: tl.constexpr):
    """Rows i and columns j of the matrix at x, zero beyond `rows` and `columns`."""
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    return tl.load(x + i[:, None] * stride + j[None, :], mask=inside, other=0.0).to(DOT)


@triton.jit
def _load_bias(b, a, A):
    """One half of a head's bias: (1, BA) float32."""
    return tl.load(b + a, mask=a < A, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _product_tangent(x, tx, w, tw, c, a, C, A, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Tangent of x w, (BK, BA). w is one half of the head's weight (D, BA); tw: where its tangent lies."""
    from_x = tl.dot(tx, w, input_precision=PRECISION)
    tw_tile = _load_tile(tw, c, a, C, A, 2 * A, DOT)
    return from_x + tl.dot(x, tw_tile, input_precision=PRECISION)


@triton.jit
def _add_head_gradient(gweight, gbias, n, at, inside, a, C, A, gw_mean, gw_std, gb_mean, gb_std):
    """Add task n's gradients, (D, BA) and (BA,) for each half, to memory. at: offsets (D, BA) in weight."""
    tl.atomic_add(gweight + n * C * 2 * A + at, gw_mean, mask=inside)
    tl.atomic_add(gweight + n * C * 2 * A + A + at, gw_std, mask=inside)
    tl.atomic_add(gbias + n * 2 * A + a, gb_mean, mask=a < A)
    tl.atomic_add(gbias + n * 2 * A + A + a, gb_std, mask=a < A)


@triton.jit
def _policy(mean, std, LO: tl.constexpr, HI: tl.constexpr):
    """The student's mean and variance from the head's outputs, and their slopes with respect to those."""
    e = tl.exp(-2 * tl.abs(mean))  # of -2 |x|, so that neither tanh nor its slope cancels
    slope_mean = 4 * e / ((1 + e) * (1 + e))  # tanh'
    mean = tl.where(mean < 0, -1.0, 1.0) * (1 - e) / (1 + e)
    s = 1 / (1 + tl.exp(-std))
    var = tl.exp(2 * (LO + (HI - LO) * s))
    slope_var = (HI - LO) * s * (1 - s) * 2 * var
    return mean, slope_mean, var, slope_var


@triton.jit
def _minus_log1p(r):
    """r - log(1 + r), near r = 0 by a series, because there it cancels."""
    q = r / (2 + r)  # log(1 + r) = 2 atanh(q) = 2 q + 2 q^3 (1/3 + q^2 / 5 + ...), and r - 2 q = r q
    q2 = q * q
    rq = r * q
    twice_q3 = 2 * q * q2
    s = 1 / 13 + q2 / 15
    s = 1 / 11 + q2 * s
    s = 1 / 9 + q2 * s
    s = 1 / 7 + q2 * s
    s = 1 / 5 + q2 * s
    s = 1 / 3 + q2 * s
    series = rq - twice_q3 * s
    return tl.where(tl.abs(r) < 0.5, series, r - tl.log(1 + r))


@triton.jit
def _head_kl(
    h,  # (B, K, C)
    weight,  # (G, C, 2A)
    bias,  # (G, 2A)
    t_mean,  # (B, K, A)
    t_log_std,  # (B, K, A)
    mask,  # (B, K) bytes
    task,  # (B,) int64
    act_dims,  # (N,) int64
    groups,  # (N,) int64; where SHARED, else each task has a head of its own
    sums,  # (N,) float32, zeros
    counts,  # (N,) float32, zeros
    gh,  # (B, K, C): gradient of the window's term in sums; this and the next two where GRADIENT
    gweight,  # (N, C, 2A) float32, zeros: by task, whose sums have gradients of their own
    gbias,  # (N, 2A) float32, zeros
    th,  # (B, K, C), tangent of h; this and the next three where TANGENT
    tweight,  # (G, C, 2A)
    tbias,  # (G, 2A)
    tsums,  # (N,) float32, zeros: tangent of sums
    B,
    C,
    A,
    floor2,  # sigma_floor^2
    temperature2,
    n_windows,  # of a program, one after the other
    K: tl.constexpr,
    BK: tl.constexpr,  # K, C, A padded to a tile's size
    D: tl.constexpr,
    BA: tl.constexpr,
    FORWARD: tl.constexpr,  # direction
    GRADIENT: tl.constexpr,
    TANGENT: tl.constexpr,
    SHARED: tl.constexpr,
    LO: tl.constexpr,  # LOG_STD
    HI: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums, counts and, where asked for, the gradients or the tangent of sums.

    Gradients of weight and bias over consecutive windows of one task are summed in registers, and added to
    memory when the task changes. Over 60 lines: its steps share a dozen tiles, and more functions would mean
    long lists of arguments.
    """
    k = tl.arange(0, BK)
    c = tl.arange(0, D)
    a = tl.arange(0, BA)
    first = tl.program_id(0).to(tl.int64) * n_windows
    summed_task = tl.load(task + first)
    gw_mean = tl.zeros((D, BA), tl.float32)
    gw_std = tl.zeros((D, BA), tl.float32)
    gb_mean = tl.zeros((BA,), tl.float32)
    gb_std = tl.zeros((BA,), tl.float32)
    at = c[:, None] * 2 * A + a[None, :]
    in_weight = (c < C)[:, None] & (a < A)[None, :]
    for step in range(tl.minimum(n_windows, B - first)):
        i = first + step
        n = tl.load(task + i)
        if GRADIENT and n != summed_task:
            _add_head_gradient(
                gweight, gbias, summed_task, at, in_weight, a, C, A, gw_mean, gw_std, gb_mean, gb_std
            )
            gw_mean = tl.zeros((D, BA), tl.float32)
            gw_std = tl.zeros((D, BA), tl.float32)
            gb_mean = tl.zeros((BA,), tl.float32)
            gb_std = tl.zeros((BA,), tl.float32)
            summed_task = n

        # the head's affine map, then the policy
        head = n
        if SHARED:
            head = tl.load(groups + n)
        w = weight + head * C * 2 * A
        b = bias + head * 2 * A
        n_dims = tl.load(act_dims + n)
        x = _load_tile(h + i * K * C, k, c, K, C, C, DOT)
        w_mean = _load_tile(w, c, a, C, A, 2 * A, DOT)
        w_std = _load_tile(w + A, c, a, C, A, 2 * A, DOT)
        mean = tl.dot(x, w_mean, input_precision=PRECISION) + _load_bias(b, a, A)
        std = tl.dot(x, w_std, input_precision=PRECISION) + _load_bias(b + A, a, A)
        mean, slope_mean, var, slope_var = _policy(mean, std, LO, HI)

        # 0.5 (r - log(1 + r) + (difference of means)^2 / var_q), r = var_p / var_q - 1, of KL(p || q)
        m = _load_tile(t_mean + i * K * A, k, a, K, A, A, tl.float32)
        l = _load_tile(t_log_std + i * K * A, k, a, K, A, A, tl.float32)
        student_var = var + floor2
        teacher_var = tl.exp(2 * l) * temperature2 + floor2
        valid = tl.load(mask + i * K + k, mask=k < K, other=0) != 0
        counted = valid[:, None] & (a < n_dims)[None, :]
        var_p = teacher_var if FORWARD else student_var
        var_q = student_var if FORWARD else teacher_var
        diff = mean - m
        kl = 0.5 * (_minus_log1p((var_p - var_q) / var_q) + diff * diff / var_q)
        tl.atomic_add(sums + n, tl.sum(tl.where(counted, kl, 0.0)) / n_dims)
        tl.atomic_add(counts + n, tl.sum(valid.to(tl.float32)))

        # its gradient with respect to what the affine map returned
        g_mean = tl.where(counted, diff / var_q * slope_mean / n_dims, 0.0)
        g_var = student_var - teacher_var - diff * diff if FORWARD else student_var - teacher_var
        g_std = tl.where(counted, 0.5 * g_var / (student_var * var_q) * slope_var / n_dims, 0.0)
        if TANGENT:
            tw = tweight + head * C * 2 * A
            tb = tbias + head * 2 * A
            tx = _load_tile(th + i * K * C, k, c, K, C, C, DOT)
            tmean = _product_tangent(x, tx, w_mean, tw, c, a, C, A, DOT, PRECISION)
            tstd = _product_tangent(x, tx, w_std, tw + A, c, a, C, A, DOT, PRECISION)
            tmean += _load_bias(tb, a, A)
            tstd += _load_bias(tb + A, a, A)
            tl.atomic_add(tsums + n, tl.sum(g_mean * tmean + g_std * tstd))
        if GRADIENT:
            gb_mean += tl.sum(g_mean, 0)
            gb_std += tl.sum(g_std, 0)
            g_mean = g_mean.to(DOT)
            g_std = g_std.to(DOT)
            from_mean = tl.dot(g_mean, tl.trans(w_mean), input_precision=PRECISION)
            gx = from_mean + tl.dot(g_std, tl.trans(w_std), input_precision=PRECISION)
            in_window = (k < K)[:, None] & (c < C)[None, :]
            gx = gx.to(gh.dtype.element_ty)
            tl.store(gh + i * K * C + k[:, None] * C + c[None, :], gx, mask=in_window)
            gw_mean += tl.dot(tl.trans(x), g_mean, input_precision=PRECISION)
            gw_std += tl.dot(tl.trans(x), g_std, input_precision=PRECISION)
    if GRADIENT:
        _add_head_gradient(
            gweight, gbias, summed_task, at, in_weight, a, C, A, gw_mean, gw_std, gb_mean, gb_std
        )


# ---- PyTorch -----------------------------------------------------------------------------------------------


def tiles(K: int, C: int, A: int) -> int:
    """How many numbers lie in shared memory: an upper bound of what Triton 3.6 allocates for sm_90."""
    BK = kernels.padded(K)
    D = kernels.padded(C)
    BA = kernels.padded(A)
    return 2 * BK * D + 4 * D * BA + 4 * BK * BA


def _launch(
    h: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: tuple[Tensor | None, ...],  # t_mean, t_log_std, mask, task, act_dims, groups
    options: tuple[str, float, float],  # direction, sigma_floor, temperature
    gradient: bool = False,
    tangents: tuple[Tensor, ...] = (),  # of h, weight, bias
) -> tuple[Tensor, ...]:
    """sums, counts, tangent of sums (N,), and its gradients (gh, gweight, gbias), empty unless asked for.

    Those of weight and bias by task, (N, C, 2A) and (N, 2A), also where tasks share them.
    """
    direction, sigma_floor, temperature = options
    *_, act_dims, groups = targets
    B, K, C = h.shape
    N = len(act_dims)
    A2 = weight.shape[2]
    A = A2 // 2
    device = h.device
    # not views of one tensor: forward mode takes none that share memory
    sums = torch.zeros(N, device=device)
    counts = torch.zeros(N, device=device)
    tsums = torch.zeros(N, device=device)
    gh = torch.empty_like(h) if gradient else h.new_empty(0)
    gweight = torch.zeros((N, C, A2) if gradient else 0, device=device)
    gbias = torch.zeros((N, A2) if gradient else 0, device=device)
    n_programs = 4
    if device.type == "cuda":
        n_programs *= torch.cuda.get_device_properties(device).multi_processor_count
    n_windows = triton.cdiv(B, min(B, n_programs))
    shared = groups is not None
    targets = (*targets[:-1], groups if shared else act_dims)
    tensors = (h, weight, bias, *targets, sums, counts, gh, gweight, gbias)
    tangents_or_unused = tangents or (h, weight, bias)  # the kernel reads them only if there are tangents
    sizes = (B, C, A, sigma_floor**2, temperature**2, n_windows)
    constants = {
        "K": K,
        "BK": kernels.padded(K),
        "D": kernels.padded(C),
        "BA": kernels.padded(A),
        "FORWARD": direction == "forward",
        "GRADIENT": gradient,
        "TANGENT": len(tangents) > 0,
        "SHARED": shared,
        "LO": LOG_STD[0],
        "HI": LOG_STD[1],
        "DOT": kernels.dot_type(h.dtype),
        "PRECISION": kernels.precision(),
        "num_warps": 4 if kernels.multiplies(h.dtype) else 8,  # IEEE products take more registers
        "num_stages": 1,  # a program mostly has one window: to load the next in advance only costs
    }
    launch = _head_kl[(triton.cdiv(B, n_windows),)]
    launch(*tensors, *tangents_or_unused, tsums, *sizes, **constants)
    return sums, counts, tsums, gh, gweight, gbias


class _HeadKL(torch.autograd.Function):
    """head_kl with the kernel. Forward computes the gradients if `gradient` says that backward will come."""

    @staticmethod
    def forward(
        h: Tensor, weight: Tensor, bias: Tensor, targets: tuple, options: tuple, gradient: bool
    ) -> tuple[Tensor, ...]:
        sums, counts, _, *grads = _launch(h, weight, bias, targets, options, gradient)
        return sums, counts, *grads

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        h, weight, bias, ctx.targets, ctx.options, _ = inputs
        task = ctx.targets[3]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[2:], task)
        ctx.save_for_forward(h, weight, bias)
        ctx.dtypes = (weight.dtype, bias.dtype)
        ctx.shape = weight.shape

    @staticmethod
    def backward(ctx, dsums: Tensor, *_) -> tuple:
        """A window adds to one sum only, its teacher's: its gradient is scaled by that sum's."""
        gh, gweight, gbias, task = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        dh = gh * dsums[task].to(gh.dtype)[:, None, None]
        dweight = gweight * dsums[:, None, None]
        dbias = gbias * dsums[:, None]
        groups = ctx.targets[5]
        if groups is not None:
            dweight = dweight.new_zeros(ctx.shape).index_add(0, groups, dweight)
            dbias = dbias.new_zeros(ctx.shape[0], ctx.shape[2]).index_add(0, groups, dbias)
        return dh, dweight.to(weight_dtype), dbias.to(bias_dtype), None, None, None

    @staticmethod
    def jvp(ctx, th: Tensor | None, tweight: Tensor | None, tbias: Tensor | None, *_) -> tuple:
        tangents = []
        for x, t in zip(ctx.saved_tensors, (th, tweight, tbias), strict=True):
            tangents.append(torch.zeros_like(x) if t is None else t)
        return _Tangent.apply(*tangents, *ctx.saved_tensors, ctx.targets, ctx.options), None, None, None, None


class _Tangent(torch.autograd.Function):
    """The forward-mode rule.

    A Function of its own: torch.func calls jvp with wrapped tensors, which no kernel can take, and
    Function.apply unwraps them.
    """

    @staticmethod
    def forward(
        th: Tensor,
        tweight: Tensor,
        tbias: Tensor,
        h: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: tuple,
        options: tuple,
    ) -> Tensor:
        tangents = (th.contiguous(), tweight.contiguous(), tbias.contiguous())
        if not kernels.multiplies(h.dtype):  # the kernel would spill 300 bytes a thread
            mean, log_std, mask, task, act_dims, groups = targets

            def sums(*head: Tensor) -> Tensor:
                rest = (mask.bool(), task, act_dims, *options)
                return head_kl_ref(*head, mean, log_std, *rest, groups=groups)[0]

            return torch.func.jvp(sums, (h, weight, bias), tangents)[1]
        _, _, tsums, *_ = _launch(h, weight, bias, targets, options, tangents=tangents)
        return tsums

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        pass  # there is no derivative of the derivative


def head_kl(
    h: Tensor,  # (B, K, C), hidden states
    weight: Tensor,  # (G, C, 2A), of the student's heads
    bias: Tensor,  # (G, 2A)
    t_mean: Tensor,  # (B, K, A)
    t_log_std: Tensor,
    mask: Tensor,  # (B, K) bool
    task: Tensor,  # (B,)
    act_dims: Tensor,  # (N,)
    direction: str = "reverse",
    sigma_floor: float = 0.0,
    temperature: float = 1.0,
    factors: Tensor | None = None,  # (F, N, A) bool
    groups: Tensor | None = None,  # (N,)
) -> tuple[Tensor, Tensor]:
    """KL per teacher from the student's hidden states: sums and counts (N,), as head_kl_ref.

    The kernel takes Gaussians in float32 and bfloat16, up to 128 channels, 64 actions and 128 timesteps, on a
    GPU. Anything else goes to the reference; so does a student with a categorical task, and the forward mode
    of float32 in IEEE precision on NVIDIA's GPUs. The kernel adds its sums atomically: they differ by
    rounding from run to run.
    """
    B, K, C = h.shape
    A2 = weight.shape[2]
    options = (direction, sigma_floor, temperature)
    supported = kernels.available(h, weight, bias, t_mean, t_log_std) and factors is None
    supported = supported and B > 0 and max(K, C, A2) <= 128
    if not supported or not kernels.fits(h, tiles(K, C, A2 // 2)):
        rest = (mask, task, act_dims, *options, factors, groups)
        return head_kl_ref(h, weight, bias, t_mean, t_log_std, *rest)
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (h, weight, bias))
    targets = (
        t_mean.contiguous(),
        t_log_std.contiguous(),
        mask.contiguous().view(torch.uint8),
        task,
        act_dims,
        groups,
    )
    sums, counts, *_ = _HeadKL.apply(
        h.contiguous(), weight.contiguous(), bias.contiguous(), targets, options, gradient
    )
    return sums, counts

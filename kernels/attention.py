"""Causal self-attention over Decision Transformer sequences with a padding mask.

    softmax(q k^T / sqrt(hs) + causal and padding mask) v        per (batch, head)

Called by model.py, whose dropout uses `dropout_factors` too. A padded token attends to nothing, no token
attends to it, and its output is 0, so a window without any valid token is all zeros. There is a forward-mode
derivative, because the alignments in distill.py need one and PyTorch's fused attentions have none.

Bytes moved, e bytes a number: forward 3BTCe in and BTCe out, backward 4BTCe in and 3BTCe out; each once.
Up to T = 64 (a context of 20 timesteps is 60 tokens; in float32 up to 32), a program holds a whole
(batch, head) pair and takes several in turn. Beyond, it takes 32 queries against blocks of 32 keys with a
running softmax. Larger blocks, float32 tiles of 64, or half as many threads spill registers on some GPU
(research/inspect.py). Scores never reach memory; backward computes them again. Nothing is added atomically.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels import tl, triton

EVERY = slice(None)  # all timesteps
MAX_TILE = 128  # bytes of a column of the longest tile
BLOCK = 32  # timesteps of a block, where there is more than one tile
THREADS = 256  # of a program


def attention_ref(
    qkv: Tensor,  # (B, T, 3C): q, k and v, each of n_head heads
    mask: Tensor,  # (B, T) bool, True where the token is valid
    n_head: int,
    dropout: float = 0.0,
    keep: slice = EVERY,
) -> Tensor:
    """Outputs (B, T', C) of the T' timesteps in `keep`, the only ones that the caller reads.

    dropout: probability, on the attention weights.
    """
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, C3 // 3 // n_head).permute(2, 0, 3, 1, 4)  # (B, nh, T, hs) each
    scores = q[:, :, keep] @ k.transpose(-2, -1) * k.shape[-1] ** -0.5  # (B, nh, T', T)
    causal = torch.ones(T, T, dtype=torch.bool, device=qkv.device).tril()[keep]
    scores = scores.masked_fill(~(causal & mask[:, None, None, :]), torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    if dropout > 0:
        weights = F.dropout(weights, dropout)
    y = (weights @ v).transpose(1, 2).flatten(2)
    return y.masked_fill(~mask[:, keep, None], 0.0)


# ---- on a CPU ----------------------------------------------------------------------------------------------


def dropout_factors(shape: tuple[int, ...], p: float, like: Tensor) -> Tensor:
    """Factors of dropout, 0 with probability p and else 1 / (1 - p), in `like`'s dtype and device.

    16 random bits decide on each. On a CPU that takes a quarter of the time of bernoulli_.
    """
    n = math.prod(shape)
    words = torch.empty(-(-n // 4), dtype=torch.int64, device=like.device).random_(-(2**63), None)
    bits = words.view(torch.int16)[:n]
    bound = min(round((1 - p) * 2**16), 2**16 - 1) - 2**15
    return (bits < bound).view(shape).to(like.dtype).mul_(1 / (1 - p))


def _split_heads(x: Tensor, n_head: int) -> Tensor:
    """(B, T, nh hs) -> (B nh, T, hs), a view if there is one head."""
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2).flatten(0, 1)


def _merge_heads(x: Tensor, n_head: int) -> Tensor:
    """(B nh, T, hs) -> (B, T, nh hs)."""
    return x.unflatten(0, (-1, n_head)).transpose(1, 2).flatten(2)


def _split_qkv(qkv: Tensor, n_head: int) -> list[Tensor]:
    """(B, T, 3C) -> q, k, v, each (B nh, T, hs)."""
    return [_split_heads(x, n_head) for x in qkv.chunk(3, -1)]


class _Eager(torch.autograd.Function):
    """The reference with hand-written derivatives: q, k, v are not copied, and gradients written in place."""

    @staticmethod
    def forward(
        qkv: Tensor, mask: Tensor, n_head: int, dropout: float, keep: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = _split_qkv(qkv, n_head)
        T = qkv.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool, device=qkv.device).tril()[keep]
        unseen = ~(causal & mask[:, None])  # (B, T', T)
        bias = torch.zeros(unseen.shape, dtype=qkv.dtype, device=qkv.device)
        bias.masked_fill_(unseen, torch.finfo(qkv.dtype).min)
        scale = q.shape[-1] ** -0.5
        p = torch.baddbmm(bias.repeat_interleave(n_head, 0), q[:, keep], k.transpose(1, 2), alpha=scale)
        p = p.softmax(-1)
        valid = mask[:, keep, None].repeat_interleave(n_head, 0)
        p.masked_fill_(~valid, 0.0)
        if dropout > 0:
            factors = dropout_factors(p.shape, dropout, p)
            y = torch.bmm(p * factors, v)
        else:
            factors = torch.ones((), dtype=p.dtype)
            y = torch.bmm(p, v)
        return _merge_heads(y, n_head), p, factors

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        qkv, _, ctx.n_head, ctx.dropout, ctx.keep = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(qkv, *output[1:])
        ctx.save_for_forward(qkv, *output[1:])

    @staticmethod
    def backward(ctx, dy: Tensor, *_) -> tuple:
        qkv, p, factors = ctx.saved_tensors
        q, k, v = _split_qkv(qkv, ctx.n_head)
        dy = _split_heads(dy, ctx.n_head)
        dp = torch.bmm(dy, v.transpose(1, 2))
        dropped = p
        if ctx.dropout > 0:
            dp = dp * factors
            dropped = p * factors
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(q.shape[-1] ** -0.5)
        # queries that are not kept have no gradient
        dqkv = torch.zeros_like(qkv) if ctx.keep != EVERY else torch.empty_like(qkv)
        dq, dk, dv = dqkv.unflatten(-1, (3, ctx.n_head, -1)).permute(2, 0, 3, 1, 4)  # views (B, nh, T, hs)
        dq[:, :, ctx.keep] = torch.bmm(ds, k).unflatten(0, (-1, ctx.n_head))
        dk.copy_(torch.bmm(ds.transpose(1, 2), q[:, ctx.keep]).unflatten(0, (-1, ctx.n_head)))
        dv.copy_(torch.bmm(dropped.transpose(1, 2), dy).unflatten(0, (-1, ctx.n_head)))
        return dqkv, None, None, None, None

    @staticmethod
    def jvp(ctx, tqkv: Tensor, *_) -> tuple:
        qkv, p, factors = ctx.saved_tensors
        q, k, v = _split_qkv(qkv, ctx.n_head)
        tq, tk, tv = _split_qkv(tqkv, ctx.n_head)
        ts = (tq[:, ctx.keep] @ k.transpose(1, 2) + q[:, ctx.keep] @ tk.transpose(1, 2)) * q.shape[-1] ** -0.5
        tp = p * (ts - (p * ts).sum(-1, keepdim=True))
        dropped = p
        if ctx.dropout > 0:
            tp = tp * factors
            dropped = p * factors
        return _merge_heads(tp @ v + dropped @ tv, ctx.n_head), None, None


# ---- parts of the kernels ----------------------------------------------------------------------------------
# i, j: query and key timesteps of a block, (BM,) and (BN,)
# s, w: scores and attention weights (BM, BN); ds, dw: their gradients; ts, tw: their tangents
# D: hs padded to a tile's size; DOT: type of the products' inputs; PRECISION: of float32 products


@triton.jit
def _load_rows(base, i, stride, T, hs, D: tl.constexpr, DOT: tl.constexpr):
    """Rows i of the (T, hs) matrix at `base`, zero beyond it: (BM, D)."""
    d = tl.arange(0, D)
    inside = (i < T)[:, None] & (d < hs)[None, :]
    return tl.load(base + i[:, None] * stride + d[None, :], mask=inside, other=0.0).to(DOT)


@triton.jit
def _load_qkv(base, i, stride, T, hs, C, D: tl.constexpr, DOT: tl.constexpr):
    """Rows i of q, k and v, which lie C numbers apart in a packed row."""
    q = _load_rows(base, i, stride, T, hs, D, DOT)
    k = _load_rows(base + C, i, stride, T, hs, D, DOT)
    v = _load_rows(base + 2 * C, i, stride, T, hs, D, DOT)
    return q, k, v


@triton.jit
def _store_rows(base, i, stride, T, hs, x, D: tl.constexpr):
    """Rows i of the (T, hs) matrix at `base`, from x (BM, D)."""
    d = tl.arange(0, D)
    inside = (i < T)[:, None] & (d < hs)[None, :]
    tl.store(base + i[:, None] * stride + d[None, :], x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _load_valid(mask, b, i, T):
    """Whether tokens i of window b are valid: (BM,) bool."""
    return tl.load(mask + b * T + i, mask=i < T, other=0) != 0


@triton.jit
def _scores(q, k, i, j, valid_j, scale, PRECISION: tl.constexpr):
    """q k^T / sqrt(hs), -inf where i may not attend to j: (BM, BN)."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    return tl.where((i[:, None] >= j[None, :]) & valid_j[None, :], s, float("-inf"))


@triton.jit
def _scores_tangent(q, k, tq, tk, scale, PRECISION: tl.constexpr):
    """Tangent of the scores (BM, BN). Where i may not attend to j it has no meaning: the weight is zero."""
    from_q = tl.dot(tq, tl.trans(k), input_precision=PRECISION)
    from_k = tl.dot(q, tl.trans(tk), input_precision=PRECISION)
    return (from_q + from_k) * scale


@triton.jit
def _output_tangent(w, tw, v, tv, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """What a block of keys adds to the output's tangent: (BM, D)."""
    from_w = tl.dot(tw.to(DOT), v, input_precision=PRECISION)
    from_v = tl.dot(w.to(DOT), tv, input_precision=PRECISION)
    return from_w + from_v


@triton.jit
def _dropout_factors(seed, pair, i, j, T, p):
    """Dropout's factors on a pair's weights, 0 or 1 / (1 - p): the same in forward, backward and tangent."""
    r = tl.rand(tl.load(seed) + pair, i[:, None] * T + j[None, :])
    return tl.where(r < p, 0.0, 1.0 / (1.0 - p))


# ---- short sequences: a (batch, head) pair is one tile -----------------------------------------------------


@triton.jit
def _softmax(q, k, i, valid, scale, PRECISION: tl.constexpr):
    """Attention weights of a pair (BT, BT); zero for a query that may attend to nothing."""
    s = _scores(q, k, i, i, valid, scale, PRECISION)
    row_max = tl.max(s, 1)
    e = tl.exp(s - tl.where(row_max == float("-inf"), 0.0, row_max)[:, None])
    row_sum = tl.sum(e, 1)
    return e / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]


@triton.jit
def _tile_forward(
    qkv,  # (B, T, 3C), strides of windows and rows below
    mask,  # (B, T) bytes
    seed,  # () int64
    out,  # (B, T, C)
    T,
    nh,
    hs,
    n_pairs,  # B nh
    window_stride,
    row_stride,
    scale,  # 1 / sqrt(hs)
    p,  # probability of dropout
    BT: tl.constexpr,  # T padded to a tile's size
    D: tl.constexpr,
    PAIRS: tl.constexpr,  # of a program, one after the other
    DROPOUT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i = tl.arange(0, BT)
    for n in range(PAIRS):
        pair = tl.program_id(0) * PAIRS + n
        if pair < n_pairs:
            b = (pair // nh).to(tl.int64)
            h = pair % nh
            C = nh * hs
            q, k, v = _load_qkv(qkv + b * window_stride + h * hs, i, row_stride, T, hs, C, D, DOT)
            valid = _load_valid(mask, b, i, T)
            w = _softmax(q, k, i, valid, scale, PRECISION)
            if DROPOUT:
                w *= _dropout_factors(seed, pair, i, i, T, p)
            y = tl.dot(w.to(DOT), v, input_precision=PRECISION)
            _store_rows(out + b * T * C + h * hs, i, C, T, hs, tl.where(valid[:, None], y, 0.0), D)


@triton.jit
def _tile_backward(
    qkv,
    mask,
    seed,
    dout,  # (B, T, C)
    dqkv,  # (B, T, 3C)
    T,
    nh,
    hs,
    n_pairs,
    window_stride,
    row_stride,
    scale,
    p,
    BT: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    DROPOUT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Other arguments as in _tile_forward."""
    i = tl.arange(0, BT)
    for n in range(PAIRS):
        pair = tl.program_id(0) * PAIRS + n
        if pair < n_pairs:
            b = (pair // nh).to(tl.int64)
            h = pair % nh
            C = nh * hs
            q, k, v = _load_qkv(qkv + b * window_stride + h * hs, i, row_stride, T, hs, C, D, DOT)
            valid = _load_valid(mask, b, i, T)
            dy = _load_rows(dout + b * T * C + h * hs, i, C, T, hs, D, DOT)
            dy = tl.where(valid[:, None], dy, 0.0).to(DOT)
            w = _softmax(q, k, i, valid, scale, PRECISION)
            dw = tl.dot(dy, tl.trans(v), input_precision=PRECISION)
            dropped = w
            if DROPOUT:
                factors = _dropout_factors(seed, pair, i, i, T, p)
                dw = dw * factors
                dropped = w * factors
            ds = (w * (dw - tl.sum(w * dw, 1)[:, None]) * scale).to(DOT)
            grad_base = dqkv + b * T * 3 * C + h * hs
            dq = tl.dot(ds, k, input_precision=PRECISION)
            _store_rows(grad_base, i, 3 * C, T, hs, dq, D)
            dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
            _store_rows(grad_base + C, i, 3 * C, T, hs, dk, D)
            dv = tl.dot(tl.trans(dropped.to(DOT)), dy, input_precision=PRECISION)
            _store_rows(grad_base + 2 * C, i, 3 * C, T, hs, dv, D)


@triton.jit
def _tile_tangent(
    qkv,
    mask,
    seed,
    tqkv,  # (B, T, 3C), tangent of qkv
    tout,  # (B, T, C), tangent of the output
    T,
    nh,
    hs,
    n_pairs,
    window_stride,
    row_stride,
    scale,
    p,
    BT: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    DROPOUT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Other arguments as in _tile_forward."""
    i = tl.arange(0, BT)
    for n in range(PAIRS):
        pair = tl.program_id(0) * PAIRS + n
        if pair < n_pairs:
            b = (pair // nh).to(tl.int64)
            h = pair % nh
            C = nh * hs
            base = qkv + b * window_stride + h * hs
            tangent_base = tqkv + b * T * 3 * C + h * hs
            q, k, v = _load_qkv(base, i, row_stride, T, hs, C, D, DOT)
            tq, tk, tv = _load_qkv(tangent_base, i, 3 * C, T, hs, C, D, DOT)
            valid = _load_valid(mask, b, i, T)
            w = _softmax(q, k, i, valid, scale, PRECISION)
            ts = _scores_tangent(q, k, tq, tk, scale, PRECISION)
            tw = w * (ts - tl.sum(w * ts, 1)[:, None])
            if DROPOUT:
                factors = _dropout_factors(seed, pair, i, i, T, p)
                w = w * factors
                tw = tw * factors
            ty = _output_tangent(w, tw, v, tv, DOT, PRECISION)
            _store_rows(tout + b * T * C + h * hs, i, C, T, hs, tl.where(valid[:, None], ty, 0.0), D)


# ---- longer ones: blocks of BM timesteps -------------------------------------------------------------------


@triton.jit
def _block_forward(
    qkv,  # (B, T, 3C), strides of windows and rows below
    mask,  # (B, T) bytes
    seed,  # () int64
    out,  # (B, T, C)
    lse,  # (B nh, T): log of the sum of exp of a query's scores, +inf where it may attend to nothing
    T,
    nh,
    hs,
    window_stride,
    row_stride,
    scale,  # 1 / sqrt(hs)
    p,  # probability of dropout
    BM: tl.constexpr,
    D: tl.constexpr,
    DROPOUT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program: one block of queries of a pair, against the blocks of keys up to its own."""
    pair = tl.program_id(0)
    m = tl.program_id(1)
    b = (pair // nh).to(tl.int64)
    h = pair % nh
    C = nh * hs
    base = qkv + b * window_stride + h * hs
    i = m * BM + tl.arange(0, BM)
    q = _load_rows(base, i, row_stride, T, hs, D, DOT)
    y = tl.zeros((BM, D), tl.float32)
    row_max = tl.full((BM,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BM,), tl.float32)
    for n in range(m + 1):
        j = n * BM + tl.arange(0, BM)
        k = _load_rows(base + C, j, row_stride, T, hs, D, DOT)
        v = _load_rows(base + 2 * C, j, row_stride, T, hs, D, DOT)
        s = _scores(q, k, i, j, _load_valid(mask, b, j, T), scale, PRECISION)
        new_max = tl.maximum(row_max, tl.max(s, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        e = tl.exp(s - shift[:, None])
        rescale = tl.exp(row_max - shift)
        row_sum = row_sum * rescale + tl.sum(e, 1)
        if DROPOUT:
            e *= _dropout_factors(seed, pair, i, j, T, p)
        y = y * rescale[:, None] + tl.dot(e.to(DOT), v, input_precision=PRECISION)
        row_max = new_max
    valid = _load_valid(mask, b, i, T) & (row_sum > 0)
    divisor = tl.where(row_sum == 0, 1.0, row_sum)
    y = tl.where(valid[:, None], y / divisor[:, None], 0.0)
    _store_rows(out + b * T * C + h * hs, i, C, T, hs, y, D)
    row_lse = tl.where(valid, row_max + tl.log(divisor), float("inf"))
    tl.store(lse + pair.to(tl.int64) * T + i, row_lse, mask=i < T)


@triton.jit
def _block_backward(
    qkv,
    mask,
    seed,
    out,
    lse,
    dout,  # (B, T, C)
    dqkv,  # (B, T, 3C)
    T,
    nh,
    hs,
    window_stride,
    row_stride,
    scale,
    p,
    BM: tl.constexpr,
    D: tl.constexpr,
    DROPOUT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program: the gradients of one block of timesteps t of a pair, as queries and as keys.

    Other arguments as in _block_forward. Over 60 lines, because both loops use what is loaded before them.
    """
    pair = tl.program_id(0)
    m = tl.program_id(1)
    b = (pair // nh).to(tl.int64)
    h = pair % nh
    C = nh * hs
    base = qkv + b * window_stride + h * hs
    out_offset = b * T * C + h * hs
    lse += pair.to(tl.int64) * T
    t = m * BM + tl.arange(0, BM)
    q, k, v = _load_qkv(base, t, row_stride, T, hs, C, D, DOT)
    dy = _load_rows(dout + out_offset, t, C, T, hs, D, DOT)
    y = _load_rows(out + out_offset, t, C, T, hs, D, tl.float32)
    lse_t = tl.load(lse + t, mask=t < T, other=float("inf"))
    delta = tl.sum(dy.to(tl.float32) * y, 1)  # sum of w dw over a query's keys
    valid_t = _load_valid(mask, b, t, T)
    dq = tl.zeros((BM, D), tl.float32)
    dk = tl.zeros((BM, D), tl.float32)
    dv = tl.zeros((BM, D), tl.float32)
    for n in range(m + 1):  # queries t against the keys up to them
        j = n * BM + tl.arange(0, BM)
        kj = _load_rows(base + C, j, row_stride, T, hs, D, DOT)
        vj = _load_rows(base + 2 * C, j, row_stride, T, hs, D, DOT)
        s = _scores(q, kj, t, j, _load_valid(mask, b, j, T), scale, PRECISION)
        w = tl.exp(s - lse_t[:, None])
        dw = tl.dot(dy, tl.trans(vj), input_precision=PRECISION)
        if DROPOUT:
            dw *= _dropout_factors(seed, pair, t, j, T, p)
        dq += tl.dot((w * (dw - delta[:, None])).to(DOT), kj, input_precision=PRECISION)
    for n in range(m, tl.cdiv(T, BM)):  # keys t under the queries from them on
        i = n * BM + tl.arange(0, BM)
        qi = _load_rows(base, i, row_stride, T, hs, D, DOT)
        dyi = _load_rows(dout + out_offset, i, C, T, hs, D, DOT)
        lse_i = tl.load(lse + i, mask=i < T, other=float("inf"))
        yi = _load_rows(out + out_offset, i, C, T, hs, D, tl.float32)
        w = tl.exp(_scores(qi, k, i, t, valid_t, scale, PRECISION) - lse_i[:, None])
        dw = tl.dot(dyi, tl.trans(v), input_precision=PRECISION)
        dropped = w
        if DROPOUT:
            factors = _dropout_factors(seed, pair, i, t, T, p)
            dw = dw * factors
            dropped = w * factors
        ds = w * (dw - tl.sum(dyi.to(tl.float32) * yi, 1)[:, None])
        dk += tl.dot(tl.trans(ds.to(DOT)), qi, input_precision=PRECISION)
        dv += tl.dot(tl.trans(dropped.to(DOT)), dyi, input_precision=PRECISION)
    grad_base = dqkv + b * T * 3 * C + h * hs
    _store_rows(grad_base, t, 3 * C, T, hs, dq * scale, D)
    _store_rows(grad_base + C, t, 3 * C, T, hs, dk * scale, D)
    _store_rows(grad_base + 2 * C, t, 3 * C, T, hs, dv, D)


@triton.jit
def _block_tangent(
    qkv,
    mask,
    seed,
    out,
    lse,
    tqkv,  # (B, T, 3C), tangent of qkv
    tout,  # (B, T, C), tangent of the output
    T,
    nh,
    hs,
    window_stride,
    row_stride,
    scale,
    p,
    BM: tl.constexpr,
    D: tl.constexpr,
    DROPOUT: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program: one block of queries of a pair. Other arguments as in _block_forward.

    It reads the keys twice: for each query's mean of ts, weighted by w, then for the output's tangent.
    Subtracting that mean at the end instead would cancel.
    """
    pair = tl.program_id(0)
    m = tl.program_id(1)
    b = (pair // nh).to(tl.int64)
    h = pair % nh
    C = nh * hs
    base = qkv + b * window_stride + h * hs
    tangent_base = tqkv + b * T * 3 * C + h * hs
    i = m * BM + tl.arange(0, BM)
    q = _load_rows(base, i, row_stride, T, hs, D, DOT)
    tq = _load_rows(tangent_base, i, 3 * C, T, hs, D, DOT)
    lse_i = tl.load(lse + pair.to(tl.int64) * T + i, mask=i < T, other=float("inf"))
    ty = tl.zeros((BM, D), tl.float32)
    mean_ts = tl.zeros((BM,), tl.float32)
    total_w = tl.zeros((BM,), tl.float32)  # 1 but for rounding, which grows with the scores
    for reading in tl.static_range(2):
        if reading == 1:
            mean_ts = mean_ts / tl.where(total_w == 0.0, 1.0, total_w)
        for n in range(m + 1):
            j = n * BM + tl.arange(0, BM)
            k = _load_rows(base + C, j, row_stride, T, hs, D, DOT)
            tk = _load_rows(tangent_base + C, j, 3 * C, T, hs, D, DOT)
            s = _scores(q, k, i, j, _load_valid(mask, b, j, T), scale, PRECISION)
            w = tl.exp(s - lse_i[:, None])
            ts = _scores_tangent(q, k, tq, tk, scale, PRECISION)
            if reading == 0:
                mean_ts += tl.sum(w * ts, 1)
                total_w += tl.sum(w, 1)
            else:
                v = _load_rows(base + 2 * C, j, row_stride, T, hs, D, DOT)
                tv = _load_rows(tangent_base + 2 * C, j, 3 * C, T, hs, D, DOT)
                tw = w * (ts - mean_ts[:, None])
                if DROPOUT:
                    factors = _dropout_factors(seed, pair, i, j, T, p)
                    w = w * factors
                    tw = tw * factors
                ty += _output_tangent(w, tw, v, tv, DOT, PRECISION)
    valid = _load_valid(mask, b, i, T)
    _store_rows(tout + b * T * C + h * hs, i, C, T, hs, tl.where(valid[:, None], ty, 0.0), D)


# ---- PyTorch -----------------------------------------------------------------------------------------------


def one_tile(T: int, dtype: torch.dtype) -> bool:
    """Whether one tile holds the sequence."""
    return T * dtype.itemsize <= MAX_TILE


def tiles(T: int, hs: int, dtype: torch.dtype) -> int:
    """How many numbers lie in shared memory in the largest kernel, the tangent's.

    An upper bound of what Triton allocates, 3.6 for sm_80 to sm_90 and 3.9 for sm_80 to sm_100 and gfx942,
    where registers hold more of it.
    """
    D = kernels.padded(hs)
    if torch.version.hip:
        return D * 4 * BLOCK
    return D * 6 * kernels.padded(T) if one_tile(T, dtype) else D * 12 * BLOCK


def _launch(
    tile_kernel,
    block_kernel,
    qkv: Tensor,
    mask: Tensor,
    seed: Tensor,
    n_head: int,
    p: float,
    tile_tensors: tuple[Tensor, ...],  # what the kernel takes after the seed
    block_tensors: tuple[Tensor, ...],
) -> None:
    """Run the tile kernel or the block kernel, whichever T asks for."""
    B, T, C3 = qkv.shape
    hs = C3 // 3 // n_head
    D = kernels.padded(hs)
    strides = qkv.stride()[:2]
    scale = hs**-0.5
    constants = {
        "D": D,
        "DROPOUT": p > 0,
        "DOT": kernels.dot_type(qkv.dtype),
        "PRECISION": kernels.precision(),
        "num_warps": THREADS // (64 if torch.version.hip else 32),
    }
    if one_tile(T, qkv.dtype):
        n_pairs = B * n_head
        pairs_each = max(1, min(4, n_pairs // 1024))
        launch = tile_kernel[(triton.cdiv(n_pairs, pairs_each),)]
        sizes = (T, n_head, hs, n_pairs, *strides, scale, p)
        launch(qkv, mask, seed, *tile_tensors, *sizes, BT=kernels.padded(T), PAIRS=pairs_each, **constants)
    else:
        launch = block_kernel[(B * n_head, triton.cdiv(T, BLOCK))]
        launch(qkv, mask, seed, *block_tensors, T, n_head, hs, *strides, scale, p, BM=BLOCK, **constants)


class _Attention(torch.autograd.Function):
    """The kernels' attention, with every timestep's output."""

    @staticmethod
    def forward(qkv: Tensor, mask: Tensor, seed: Tensor, n_head: int, p: float) -> tuple[Tensor, Tensor]:
        B, T, C3 = qkv.shape
        out = torch.empty(B, T, C3 // 3, dtype=qkv.dtype, device=qkv.device)
        n_lse = 0 if one_tile(T, qkv.dtype) else B * n_head  # tiles need none
        lse = torch.empty(n_lse, T, dtype=torch.float32, device=qkv.device)
        _launch(_tile_forward, _block_forward, qkv, mask, seed, n_head, p, (out,), (out, lse))
        return out, lse

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        qkv, mask, seed, ctx.n_head, ctx.p = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(qkv, mask, seed, *output)
        ctx.save_for_forward(qkv, mask, seed, *output)

    @staticmethod
    def backward(ctx, dout: Tensor, *_) -> tuple:
        qkv, mask, seed, out, lse = ctx.saved_tensors
        dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        grads = (dout.contiguous(), dqkv)
        _launch(
            _tile_backward, _block_backward, qkv, mask, seed, ctx.n_head, ctx.p, grads, (out, lse, *grads)
        )
        return dqkv, None, None, None, None

    @staticmethod
    def jvp(ctx, tqkv: Tensor, *_) -> tuple:
        return _Tangent.apply(tqkv, *ctx.saved_tensors, ctx.n_head, ctx.p), None


class _Tangent(torch.autograd.Function):
    """The forward-mode rule.

    A Function of its own: torch.func calls jvp with wrapped tensors, which no kernel can take, and
    Function.apply unwraps them.
    """

    @staticmethod
    def forward(
        tqkv: Tensor, qkv: Tensor, mask: Tensor, seed: Tensor, out: Tensor, lse: Tensor, n_head: int, p: float
    ) -> Tensor:
        tout = torch.empty_like(out)
        tangents = (tqkv.contiguous(), tout)
        _launch(_tile_tangent, _block_tangent, qkv, mask, seed, n_head, p, tangents, (out, lse, *tangents))
        return tout

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        pass  # there is no derivative of the derivative


def attention(qkv: Tensor, mask: Tensor, n_head: int, dropout: float = 0.0, keep: slice = EVERY) -> Tensor:
    """Causal attention; arguments and result as in attention_ref.

    The kernels take bfloat16, T <= 1024 and head sizes up to 128, on a GPU, and float32 where TF32 is allowed
    or the GPU is AMD's. Anything else goes to plain PyTorch. qkv may have any strides between windows and
    timesteps; within a row they take contiguous numbers, and other rows are copied.
    """
    B, T, C3 = qkv.shape
    hs = C3 // 3 // n_head
    if T == 1 and dropout == 0:  # a lone timestep attends to itself
        return qkv[:, keep, 2 * hs * n_head :].masked_fill(~mask[:, keep, None], 0.0)
    supported = kernels.available(qkv) and kernels.multiplies(qkv.dtype) and B > 0 and T <= 1024 and hs <= 128
    if not supported or not kernels.fits(qkv, tiles(T, hs, qkv.dtype)):
        return _Eager.apply(qkv, mask, n_head, dropout, keep)[0]
    if qkv.stride(-1) != 1:
        qkv = qkv.contiguous()
    seed = torch.empty((), dtype=torch.int64, device=qkv.device)
    if dropout > 0:
        seed.random_()
    return _Attention.apply(qkv, mask.contiguous().view(torch.uint8), seed, n_head, dropout)[0][:, keep]

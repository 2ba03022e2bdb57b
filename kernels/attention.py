"""Causal self-attention over Decision Transformer sequences with a padding mask.

    softmax(q k^T / sqrt(hs) + causal and padding mask) v        per (batch, head)

Called by model.Block. A padded token attends to nothing, is attended to by nothing, and its output is 0, so a row without
any valid token is all zeros. Forward mode is there because surgery's alignments need it, and PyTorch's fused attentions lack it.

Bytes moved, e bytes a number: forward 3BTCe in and BTCe out, backward 4BTCe in and 3BTCe out: each number once. Up to T = 64, a
window of 20 timesteps and its kin, a program holds a whole (batch, head) pair, several in turn; beyond, blocks of 64 queries against blocks of 64 keys
with a running softmax. Scores never reach memory; backward computes them again. Nothing is added atomically.
"""

import math

import torch
import torch.nn.functional as F

import kernels
from kernels import tl, triton

EVERY = slice(None)


def attention_ref(qkv, mask, n_head: int, dropout: float = 0.0, keep: slice = EVERY):
    """qkv (B, T, 3C) packed, mask (B, T) bool, True where valid -> (B, T, C). dropout: probability on the attention weights;
    keep: the timesteps whose output somebody reads, all that come out."""
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, C3 // 3 // n_head).permute(2, 0, 3, 1, 4)  # (B, nh, T, hs) each
    s = q[:, :, keep] @ k.transpose(-2, -1) * k.shape[-1] ** -0.5  # (B, nh, T, T)
    causal = torch.ones(T, T, dtype=torch.bool, device=qkv.device).tril()[keep]
    s = s.masked_fill(~(causal & mask[:, None, None, :]), torch.finfo(s.dtype).min)
    p = F.dropout(s.softmax(-1), dropout) if dropout > 0 else s.softmax(-1)
    y = (p @ v).transpose(1, 2).flatten(2)
    return y.masked_fill(~mask[:, keep, None], 0.0)


# ---- on a CPU --------------------------------------------------------------------------------------------------------


def kept(shape, p, like):
    """Dropout's factors, 0 or 1 / (1 - p), of like's dtype and device: from 16 random bits each, a quarter of what bernoulli_ takes on a CPU."""
    n = math.prod(shape)
    bits = (
        torch.empty(-(-n // 4), dtype=torch.int64, device=like.device)
        .random_(-(2**63), None)
        .view(torch.int16)[:n]
    )
    return (
        (bits < min(round((1 - p) * 2**16), 2**16 - 1) - 2**15).view(shape).to(like.dtype).mul_(1 / (1 - p))
    )


class _Eager(torch.autograd.Function):
    """The reference with its derivatives by hand: q, k and v are not copied, and their gradients written where they belong."""

    @staticmethod
    def heads(x, n_head):  # (B, T, nh hs) -> (B nh, T, hs), a view where there is one head
        return x.unflatten(-1, (n_head, -1)).transpose(1, 2).flatten(0, 1)

    @staticmethod
    def forward(qkv, mask, n_head, dropout, keep):
        q, k, v = (_Eager.heads(x, n_head) for x in qkv.chunk(3, -1))
        T, valid = qkv.shape[1], mask[:, keep, None]
        unseen = ~(torch.ones(T, T, dtype=torch.bool, device=qkv.device).tril()[keep] & mask[:, None])
        bias = torch.zeros(unseen.shape, dtype=qkv.dtype, device=qkv.device).masked_fill_(
            unseen, torch.finfo(qkv.dtype).min
        )
        p = torch.baddbmm(
            bias.repeat_interleave(n_head, 0), q[:, keep], k.transpose(1, 2), alpha=q.shape[-1] ** -0.5
        ).softmax(-1)
        p.masked_fill_(~valid.repeat_interleave(n_head, 0), 0.0)
        factors = kept(p.shape, dropout, p) if dropout > 0 else torch.ones((), dtype=p.dtype)
        y = torch.bmm(p * factors if dropout > 0 else p, v)
        return y.unflatten(0, (-1, n_head)).transpose(1, 2).flatten(2), p, factors

    @staticmethod
    def setup_context(ctx, inputs, output):
        qkv, _, ctx.n_head, ctx.dropout, ctx.keep = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(qkv, *output[1:])
        ctx.save_for_forward(qkv, *output[1:])

    @staticmethod
    def backward(ctx, dy, *_):
        qkv, p, factors = ctx.saved_tensors
        (q, k, v), dy = (_Eager.heads(x, ctx.n_head) for x in qkv.chunk(3, -1)), _Eager.heads(dy, ctx.n_head)
        dp, used = torch.bmm(dy, v.transpose(1, 2)), p
        if ctx.dropout > 0:
            dp, used = dp * factors, p * factors
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(q.shape[-1] ** -0.5)
        dqkv = torch.zeros_like(qkv) if ctx.keep != EVERY else torch.empty_like(qkv)
        dq, dk, dv = (
            x.unflatten(-1, (ctx.n_head, -1)).transpose(1, 2) for x in dqkv.chunk(3, -1)
        )  # (B, nh, T, hs)
        dq[:, :, ctx.keep] = torch.bmm(ds, k).unflatten(0, (-1, ctx.n_head))
        dk.copy_(torch.bmm(ds.transpose(1, 2), q[:, ctx.keep]).unflatten(0, (-1, ctx.n_head)))
        dv.copy_(torch.bmm(used.transpose(1, 2), dy).unflatten(0, (-1, ctx.n_head)))
        return dqkv, None, None, None, None

    @staticmethod
    def jvp(ctx, tqkv, *_):
        qkv, p, factors = ctx.saved_tensors
        (q, k, v), (tq, tk, tv) = ([_Eager.heads(y, ctx.n_head) for y in x.chunk(3, -1)] for x in (qkv, tqkv))
        ts = (tq[:, ctx.keep] @ k.transpose(1, 2) + q[:, ctx.keep] @ tk.transpose(1, 2)) * q.shape[-1] ** -0.5
        tp, used = p * (ts - (p * ts).sum(-1, keepdim=True)), p
        if ctx.dropout > 0:
            tp, used = tp * factors, p * factors
        return (tp @ v + used @ tv).unflatten(0, (-1, ctx.n_head)).transpose(1, 2).flatten(2), None, None


# ---- parts -----------------------------------------------------------------------------------------------------------
# i, j: query and key timesteps of a block (BM,), (BN,); scale = 1 / sqrt(hs)


@triton.jit
def _rows(base, i, stride, T, hs, D: tl.constexpr, DOT: tl.constexpr):
    """Rows i of a (T, hs) matrix at `base`, zero beyond it: (BM, D)."""
    d = tl.arange(0, D)
    return tl.load(
        base + i[:, None] * stride + d[None, :], mask=(i < T)[:, None] & (d < hs)[None, :], other=0.0
    ).to(DOT)


@triton.jit
def _heads(base, i, stride, T, hs, C, D: tl.constexpr, DOT: tl.constexpr):
    """Rows i of q, k and v, which lie C apart in a packed row."""
    return (
        _rows(base, i, stride, T, hs, D, DOT),
        _rows(base + C, i, stride, T, hs, D, DOT),
        _rows(base + 2 * C, i, stride, T, hs, D, DOT),
    )


@triton.jit
def _store(base, i, stride, T, hs, x, D: tl.constexpr):
    d = tl.arange(0, D)
    tl.store(
        base + i[:, None] * stride + d[None, :],
        x.to(base.dtype.element_ty),
        mask=(i < T)[:, None] & (d < hs)[None, :],
    )


@triton.jit
def _scores(q, k, i, j, valid_j, scale, PRECISION: tl.constexpr):
    """q k^T / sqrt(hs), -inf where i may not look at j: (BM, BN)."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    return tl.where((i[:, None] >= j[None, :]) & valid_j[None, :], s, float("-inf"))


@triton.jit
def _kept(seed, pair, i, j, T, p):
    """Dropout's factor on the weights of a pair, the same in forward and backward: 0, or 1 / (1 - p)."""
    r = tl.rand(tl.load(seed) + pair, i[:, None] * T + j[None, :])
    return tl.where(r < p, 0.0, 1.0 / (1.0 - p))


# ---- T <= 64: a pair is one tile -------------------------------------------------------------------------------------


@triton.jit
def _softmax(q, k, i, valid, scale, PRECISION: tl.constexpr):
    s = _scores(q, k, i, i, valid, scale, PRECISION)
    top = tl.max(s, 1)
    e = tl.exp(s - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(e, 1)
    return e / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def _tile_forward(
    qkv,  # (B, T, 3C), row stride `row`, window stride `window`
    mask,  # (B, T) bytes
    seed,  # () int64
    out,  # (B, T, C)
    T, nh, hs, pairs, window, row, scale, p,
    BT: tl.constexpr, D: tl.constexpr, EACH: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BT)
    for n in range(EACH):
        pair = tl.program_id(0) * EACH + n
        if pair < pairs:
            b, h, C = (pair // nh).to(tl.int64), pair % nh, nh * hs
            q, k, v = _heads(qkv + b * window + h * hs, i, row, T, hs, C, D, DOT)
            valid = tl.load(mask + b * T + i, mask=i < T, other=0) != 0
            w = _softmax(q, k, i, valid, scale, PRECISION)
            if DROPOUT:
                w *= _kept(seed, pair, i, i, T, p)
            y = tl.dot(w.to(DOT), v, input_precision=PRECISION)
            _store(out + b * T * C + h * hs, i, C, T, hs, tl.where(valid[:, None], y, 0.0), D)


@triton.jit
def _tile_backward(
    qkv, mask, seed,  # as above
    dout,  # (B, T, C)
    dqkv,  # (B, T, 3C)
    T, nh, hs, pairs, window, row, scale, p,
    BT: tl.constexpr, D: tl.constexpr, EACH: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BT)
    for n in range(EACH):
        pair = tl.program_id(0) * EACH + n
        if pair < pairs:
            b, h, C = (pair // nh).to(tl.int64), pair % nh, nh * hs
            q, k, v = _heads(qkv + b * window + h * hs, i, row, T, hs, C, D, DOT)
            valid = tl.load(mask + b * T + i, mask=i < T, other=0) != 0
            dy = tl.where(valid[:, None], _rows(dout + b * T * C + h * hs, i, C, T, hs, D, DOT), 0.0).to(DOT)
            w = _softmax(q, k, i, valid, scale, PRECISION)
            dw, used = tl.dot(dy, tl.trans(v), input_precision=PRECISION), w
            if DROPOUT:
                kept = _kept(seed, pair, i, i, T, p)
                dw, used = dw * kept, w * kept
            ds = (w * (dw - tl.sum(w * dw, 1)[:, None]) * scale).to(DOT)
            to = dqkv + b * T * 3 * C + h * hs
            _store(to, i, 3 * C, T, hs, tl.dot(ds, k, input_precision=PRECISION), D)
            _store(to + C, i, 3 * C, T, hs, tl.dot(tl.trans(ds), q, input_precision=PRECISION), D)
            _store(
                to + 2 * C, i, 3 * C, T, hs, tl.dot(tl.trans(used.to(DOT)), dy, input_precision=PRECISION), D
            )


@triton.jit
def _tile_tangent(
    qkv, mask, seed,  # as above
    tqkv,  # (B, T, 3C) tangent of qkv
    tout,  # (B, T, C) tangent of the output
    T, nh, hs, pairs, window, row, scale, p,
    BT: tl.constexpr, D: tl.constexpr, EACH: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BT)
    for n in range(EACH):
        pair = tl.program_id(0) * EACH + n
        if pair < pairs:
            b, h, C = (pair // nh).to(tl.int64), pair % nh, nh * hs
            base, tbase = qkv + b * window + h * hs, tqkv + b * T * 3 * C + h * hs
            q, k, v = _heads(base, i, row, T, hs, C, D, DOT)
            tq, tk, tv = _heads(tbase, i, 3 * C, T, hs, C, D, DOT)
            valid = tl.load(mask + b * T + i, mask=i < T, other=0) != 0
            w = _softmax(q, k, i, valid, scale, PRECISION)
            ts = (
                tl.dot(tq, tl.trans(k), input_precision=PRECISION)
                + tl.dot(q, tl.trans(tk), input_precision=PRECISION)
            ) * scale
            tw = w * (ts - tl.sum(w * ts, 1)[:, None])
            if DROPOUT:
                kept = _kept(seed, pair, i, i, T, p)
                w, tw = w * kept, tw * kept
            y = tl.dot(tw.to(DOT), v, input_precision=PRECISION) + tl.dot(
                w.to(DOT), tv, input_precision=PRECISION
            )
            _store(tout + b * T * C + h * hs, i, C, T, hs, tl.where(valid[:, None], y, 0.0), D)


# ---- T > 64: blocks --------------------------------------------------------------------------------------------------


@triton.jit
def _block_forward(
    qkv, mask, seed, out,  # as above
    lse,  # (pairs, T) log of the sum of exp of a query's scores, +inf where it sees nothing
    T, nh, hs, window, row, scale, p,
    BM: tl.constexpr, D: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pair, m = tl.program_id(0), tl.program_id(1)
    b, h, C = (pair // nh).to(tl.int64), pair % nh, nh * hs
    base = qkv + b * window + h * hs
    i = m * BM + tl.arange(0, BM)
    q = _rows(base, i, row, T, hs, D, DOT)
    y, top, total = (
        tl.zeros((BM, D), tl.float32),
        tl.full((BM,), float("-inf"), tl.float32),
        tl.zeros((BM,), tl.float32),
    )
    for n in range(m + 1):
        j = n * BM + tl.arange(0, BM)
        k, v = _rows(base + C, j, row, T, hs, D, DOT), _rows(base + 2 * C, j, row, T, hs, D, DOT)
        s = _scores(q, k, i, j, tl.load(mask + b * T + j, mask=j < T, other=0) != 0, scale, PRECISION)
        new = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        e, shrink = tl.exp(s - safe[:, None]), tl.exp(top - safe)
        total = total * shrink + tl.sum(e, 1)
        if DROPOUT:
            e *= _kept(seed, pair, i, j, T, p)
        y = y * shrink[:, None] + tl.dot(e.to(DOT), v, input_precision=PRECISION)
        top = new
    valid = (tl.load(mask + b * T + i, mask=i < T, other=0) != 0) & (total > 0)
    _store(
        out + b * T * C + h * hs,
        i,
        C,
        T,
        hs,
        tl.where(valid[:, None], y / tl.where(total == 0, 1.0, total)[:, None], 0.0),
        D,
    )
    tl.store(
        lse + pair.to(tl.int64) * T + i,
        tl.where(valid, top + tl.log(tl.where(total == 0, 1.0, total)), float("inf")),
        mask=i < T,
    )


@triton.jit
def _block_backward(
    qkv, mask, seed, out, lse, dout, dqkv,  # as above
    T, nh, hs, window, row, scale, p,
    BM: tl.constexpr, D: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pair, m = tl.program_id(0), tl.program_id(1)
    b, h, C = (pair // nh).to(tl.int64), pair % nh, nh * hs
    base, ybase, to = qkv + b * window + h * hs, b * T * C + h * hs, dqkv + b * T * 3 * C + h * hs
    lse += pair.to(tl.int64) * T
    here = m * BM + tl.arange(0, BM)
    q, k, v = _heads(base, here, row, T, hs, C, D, DOT)
    dy, y = _rows(dout + ybase, here, C, T, hs, D, DOT), _rows(out + ybase, here, C, T, hs, D, tl.float32)
    l, delta = tl.load(lse + here, mask=here < T, other=float("inf")), tl.sum(dy.to(tl.float32) * y, 1)
    valid = tl.load(mask + b * T + here, mask=here < T, other=0) != 0
    dq, dk, dv = tl.zeros((BM, D), tl.float32), tl.zeros((BM, D), tl.float32), tl.zeros((BM, D), tl.float32)
    for n in range(m + 1):  # this block's queries against the keys before them
        j = n * BM + tl.arange(0, BM)
        kj, vj = _rows(base + C, j, row, T, hs, D, DOT), _rows(base + 2 * C, j, row, T, hs, D, DOT)
        w = tl.exp(
            _scores(q, kj, here, j, tl.load(mask + b * T + j, mask=j < T, other=0) != 0, scale, PRECISION)
            - l[:, None]
        )
        dw = tl.dot(dy, tl.trans(vj), input_precision=PRECISION)
        if DROPOUT:
            dw *= _kept(seed, pair, here, j, T, p)
        dq += tl.dot((w * (dw - delta[:, None])).to(DOT), kj, input_precision=PRECISION)
    for n in range(m, tl.cdiv(T, BM)):  # this block's keys under the queries after them
        i = n * BM + tl.arange(0, BM)
        qi, dyi = _rows(base, i, row, T, hs, D, DOT), _rows(dout + ybase, i, C, T, hs, D, DOT)
        li, yi = (
            tl.load(lse + i, mask=i < T, other=float("inf")),
            _rows(out + ybase, i, C, T, hs, D, tl.float32),
        )
        w = tl.exp(_scores(qi, k, i, here, valid, scale, PRECISION) - li[:, None])
        dw, used = tl.dot(dyi, tl.trans(v), input_precision=PRECISION), w
        if DROPOUT:
            kept = _kept(seed, pair, i, here, T, p)
            dw, used = dw * kept, w * kept
        ds = w * (dw - tl.sum(dyi.to(tl.float32) * yi, 1)[:, None])
        dk += tl.dot(tl.trans(ds.to(DOT)), qi, input_precision=PRECISION)
        dv += tl.dot(tl.trans(used.to(DOT)), dyi, input_precision=PRECISION)
    _store(to, here, 3 * C, T, hs, dq * scale, D)
    _store(to + C, here, 3 * C, T, hs, dk * scale, D)
    _store(to + 2 * C, here, 3 * C, T, hs, dv, D)


@triton.jit
def _block_tangent(
    qkv, mask, seed, out, lse, tqkv, tout,  # as above
    T, nh, hs, window, row, scale, p,
    BM: tl.constexpr, D: tl.constexpr, DROPOUT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pair, m = tl.program_id(0), tl.program_id(1)
    b, h, C = (pair // nh).to(tl.int64), pair % nh, nh * hs
    base, tbase, ybase = qkv + b * window + h * hs, tqkv + b * T * 3 * C + h * hs, b * T * C + h * hs
    i = m * BM + tl.arange(0, BM)
    q, tq = _rows(base, i, row, T, hs, D, DOT), _rows(tbase, i, 3 * C, T, hs, D, DOT)
    l = tl.load(lse + pair.to(tl.int64) * T + i, mask=i < T, other=float("inf"))
    ty, along = (
        tl.zeros((BM, D), tl.float32),
        tl.zeros((BM,), tl.float32),
    )  # along: the weights' mean of the scores' tangent
    for twice in tl.static_range(2):  # first that mean, for taking it off at the end instead cancels
        for n in range(m + 1):
            j = n * BM + tl.arange(0, BM)
            k, tk = _rows(base + C, j, row, T, hs, D, DOT), _rows(tbase + C, j, 3 * C, T, hs, D, DOT)
            w = tl.exp(
                _scores(q, k, i, j, tl.load(mask + b * T + j, mask=j < T, other=0) != 0, scale, PRECISION)
                - l[:, None]
            )
            ts = (
                tl.dot(tq, tl.trans(k), input_precision=PRECISION)
                + tl.dot(q, tl.trans(tk), input_precision=PRECISION)
            ) * scale
            if twice == 0:
                along += tl.sum(w * ts, 1)
            else:
                v, tv = (
                    _rows(base + 2 * C, j, row, T, hs, D, DOT),
                    _rows(tbase + 2 * C, j, 3 * C, T, hs, D, DOT),
                )
                tw = w * (ts - along[:, None])
                if DROPOUT:
                    kept = _kept(seed, pair, i, j, T, p)
                    w, tw = w * kept, tw * kept
                ty += tl.dot(tw.to(DOT), v, input_precision=PRECISION) + tl.dot(
                    w.to(DOT), tv, input_precision=PRECISION
                )
    valid = tl.load(mask + b * T + i, mask=i < T, other=0) != 0
    _store(tout + ybase, i, C, T, hs, tl.where(valid[:, None], ty, 0.0), D)


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


def _launch(tile, block, qkv, mask, seed, n_head, p, lse, *args):
    """Run the kernel that T asks for. args: what stands between seed and the sizes; for blocks, lse lies after the first of them."""
    B, T, C3 = qkv.shape
    hs = C3 // 3 // n_head
    scale, D = hs**-0.5, max(16, triton.next_power_of_2(hs))
    dot = tl.bfloat16 if qkv.dtype == torch.bfloat16 and not kernels.INTERPRET else tl.float32
    const = dict(D=D, DROPOUT=p > 0, DOT=dot, PRECISION=kernels.precision())
    if T <= 64:
        pairs, BT = B * n_head, max(16, triton.next_power_of_2(T))
        each = max(1, min(4, pairs // 1024))
        tile[(triton.cdiv(pairs, each),)](qkv, mask, seed, *args, T, n_head, hs, pairs, qkv.stride(0), qkv.stride(1), scale, p, BT=BT, EACH=each,
                                          num_warps=4, **const)  # fmt: skip
    else:
        BM = 64 if D <= 64 else 32
        block[(B * n_head, triton.cdiv(T, BM))](
            qkv,
            mask,
            seed,
            *lse,
            *args,
            T,
            n_head,
            hs,
            qkv.stride(0),
            qkv.stride(1),
            scale,
            p,
            BM=BM,
            num_warps=4,
            **const,
        )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(qkv, mask, seed, n_head, p):
        B, T, C3 = qkv.shape
        out = torch.empty(B, T, C3 // 3, dtype=qkv.dtype, device=qkv.device)
        lse = torch.empty(B * n_head if T > 64 else 0, T, dtype=torch.float32, device=qkv.device)
        _launch(
            _tile_forward, _block_forward, qkv, mask, seed, n_head, p, (), *((out, lse) if T > 64 else (out,))
        )
        return out, lse

    @staticmethod
    def setup_context(ctx, inputs, output):
        qkv, mask, seed, ctx.n_head, ctx.p = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(qkv, mask, seed, *output)
        ctx.save_for_forward(qkv, mask, seed, *output)

    @staticmethod
    def backward(ctx, dout, _):
        qkv, mask, seed, out, lse = ctx.saved_tensors
        dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        _launch(
            _tile_backward,
            _block_backward,
            qkv,
            mask,
            seed,
            ctx.n_head,
            ctx.p,
            (out, lse),
            dout.contiguous(),
            dqkv,
        )
        return dqkv, None, None, None, None

    @staticmethod
    def jvp(ctx, tqkv, *_):
        return _Tangent.apply(tqkv, *ctx.saved_tensors, ctx.n_head, ctx.p), None


class _Tangent(torch.autograd.Function):
    """Attention's forward-mode rule; a Function of its own because torch.func calls jvp with wrapped tensors, which a kernel can't take."""

    @staticmethod
    def forward(tqkv, qkv, mask, seed, out, lse, n_head, p):
        tout = torch.empty_like(out)
        _launch(
            _tile_tangent, _block_tangent, qkv, mask, seed, n_head, p, (out, lse), tqkv.contiguous(), tout
        )
        return tout

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass  # there is no derivative of the derivative


def tiles(T, hs):
    """How many numbers lie in shared memory in the largest of the kernels, the tangent's: bounds of what Triton 3.6 allocates for sm_80 to sm_90."""
    D = max(16, triton.next_power_of_2(hs))
    return D * (6 * max(16, triton.next_power_of_2(T)) if T <= 64 else 12 * (64 if D <= 64 else 32))


def attention(qkv, mask, n_head: int, dropout: float = 0.0, keep: slice = EVERY):
    """Causal attention; arguments and result as in attention_ref. The kernels take float32 and bfloat16, T <= 1024 and head sizes up to 128
    on a GPU; anything else goes to plain PyTorch. qkv may have any strides between windows and timesteps, not within a row."""
    B, T, C3 = qkv.shape
    if (
        not kernels.available(qkv)
        or T > 1024
        or (hs := C3 // 3 // n_head) > 128
        or B == 0
        or not kernels.fits(qkv, tiles(T, hs))
    ):
        return _Eager.apply(qkv, mask, n_head, dropout, keep)[0]
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    seed = torch.empty((), dtype=torch.int64, device=qkv.device)
    seed = seed.random_() if dropout > 0 else seed
    return _Attention.apply(qkv, mask.contiguous().view(torch.uint8), seed, n_head, dropout)[0][:, keep]

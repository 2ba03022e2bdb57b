"""Projection of a gradient onto the normal plane of the previous one, where the two conflict; and the whole update around it.

    g' = g - min(0, <g, u>) / <u, u> u          u = 0: g        (PCGrad, arXiv 2001.06782; against one reference, A-GEM, arXiv 1812.00420)
    u <- beta u + (1 - beta) g',   g'' = g' min(1, clip / |g'|),   theta <- AdamW(theta, g'')        (arXiv 1711.05101)

`project` is called by surgery.py, `project_adamw` by distill.py on a GPU: two launches for an update, whatever the number of parameter tensors,
and nothing read back: the first takes <g, u>, <u, u> and <g, g> in one pass (8P bytes), the second does all the rest (20P bytes in, 16P out).
Sums are taken in float64, so that scales whose squares leave float32's range need no care.
"""

import math

import torch
from torch.optim.adamw import adamw

import kernels
from kernels import tl, triton


def dot(x, y) -> float:
    """<x, y>; again in float64 where it is so small or large that its terms may have left float32's range."""
    d = torch.dot(x, y).item()
    return d if 1e-20 < abs(d) < 1e30 else torch.dot(x.double(), y.double()).item()


def without(g, u, k: float):
    """g - k u, k in float64: with a tiny u it may leave float32's range where k u does not."""
    return (
        g
        if k == 0
        else torch.sub(g, u, alpha=k)
        if abs(k) < 1e30
        else (g.double() - k * u.double()).to(g.dtype)
    )


def project_ref(g, u):
    """g, u (P,) of one dtype -> (P,). g itself, to the bit, where <g, u> >= 0 or u = 0."""
    gu, uu = dot(g, u), dot(u, u)
    return without(g, u, gu / uu if gu < 0 < uu else 0.0)


def project_adamw_ref(
    theta,
    g,
    u,
    m,
    v,
    schedule,
    alive,
    kappa=None,
    on=None,
    beta=0.0,
    clip=0.25,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
):
    """One update in place of theta, u, m, v (P,) from the gradient g (P,); returns (5,): <g, u>, <u, u>, |g|, |g'|, how much of u was taken away.

    u: None for no surgery. schedule (4,): learning rate, 1 - betas[0]^t, 1 - betas[1]^t and t, from 1; a tensor, so that a captured graph reads the step's own.
    alive: () bool; made False by a gradient that is not finite, and from then on nothing is changed: theta stays the last good one.
    kappa: () how much of u to take away, for surgery per teacher; None: the gradient's own min(0, <g, u>) / <u, u>.
    on: () bool, False to leave g as it is. m, v: AdamW's moments, zeros at first.
    """
    gg, gu, uu, k = dot(g, g), 0.0, 0.0, 0.0
    if u is not None:
        gu, uu = dot(g, u), dot(u, u)
        k = (gu / uu if gu < 0 < uu else 0.0) if kappa is None else kappa.item()
        k = k if on is None or on else 0.0
    after = math.sqrt(max(gg - 2 * k * gu + k * k * uu, 0.0)) if math.isfinite(gg) else gg
    alive &= math.isfinite(gg)
    if alive:
        new = without(g, u, k)
        if u is not None:
            u.lerp_(new, 1 - beta) if beta else u.copy_(new)
        lr, *_, t = schedule.tolist()
        new = new * min(clip / (after + 1e-6), 1.0)
        adamw([theta], [new], [m], [v], [], [schedule.new_tensor(t - 1)], fused=True, amsgrad=False, beta1=betas[0], beta2=betas[1], lr=lr,
              weight_decay=weight_decay, eps=eps, maximize=False)  # fmt: skip
    return torch.tensor((gu, uu, math.sqrt(gg), after, k), dtype=g.dtype, device=g.device)


# ---- the kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _dots(g, u, partial, P, programs, BLOCK: tl.constexpr):
    """partial (3, programs) float64: <g, u>, <u, u>, <g, g> over every programs-th block of g, u (P,)."""
    pid = tl.program_id(0)
    gu, uu, gg = (
        tl.zeros((BLOCK,), tl.float64),
        tl.zeros((BLOCK,), tl.float64),
        tl.zeros((BLOCK,), tl.float64),
    )
    for block in range(pid, tl.cdiv(P, BLOCK), programs):
        i = tl.full((), block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x, y = (
            tl.load(g + i, mask=i < P, other=0.0).to(tl.float64),
            tl.load(u + i, mask=i < P, other=0.0).to(tl.float64),
        )
        gu += x * y
        uu += y * y
        gg += x * x
    tl.store(partial + pid, tl.sum(gu))
    tl.store(partial + programs + pid, tl.sum(uu))
    tl.store(partial + 2 * programs + pid, tl.sum(gg))


@triton.jit
def _update(
    partial,  # (3, programs)
    g, u,  # (P,); u where SURGERY
    out,  # (P,) the projected gradient, where not ADAMW
    theta, m, v,  # (P,) where ADAMW, as all below
    schedule, alive, kappa, on, stats,  # (4,), () bytes, () float32, () bytes, (5,) float32
    P, programs, beta, one_beta, clip, one_b1, b2, one_b2, eps, weight_decay,  # one_x: 1 - x, which float32 would round to five digits
    BLOCK: tl.constexpr, N: tl.constexpr, SURGERY: tl.constexpr, KAPPA: tl.constexpr, SWITCH: tl.constexpr, ADAMW: tl.constexpr,
):  # fmt: skip
    pid, n = tl.program_id(0), tl.arange(0, N)
    gu = tl.sum(
        tl.load(partial + n, mask=n < programs, other=0.0)
    )  # every program adds them up again, in one order
    uu = tl.sum(tl.load(partial + programs + n, mask=n < programs, other=0.0))
    gg = tl.sum(tl.load(partial + 2 * programs + n, mask=n < programs, other=0.0))
    if not SURGERY:
        gu, uu, k = gg * 0, gg * 0, gg * 0
    elif KAPPA:
        k = tl.load(kappa).to(tl.float64)
    else:
        k = tl.where((gu < 0) & (uu > 0), gu / tl.where(uu > 0, uu, 1.0), 0.0)
    if SWITCH:
        k = tl.where(tl.load(on) != 0, k, 0.0)
    end = P
    if ADAMW:
        fine = (gg < float("inf")) & (tl.load(alive) != 0)  # NaN is not below infinity either
        end = tl.where(fine, P, 0)
        after = tl.sqrt(tl.maximum(gg - 2 * k * gu + k * k * uu, 0.0))
        shrink = tl.minimum(clip / (after + 1e-6), 1.0).to(tl.float32)
        lr, c1, c2 = tl.load(schedule), tl.load(schedule + 1), tl.load(schedule + 2)
        if pid == 0:
            tl.store(stats, gu.to(tl.float32))
            tl.store(stats + 1, uu.to(tl.float32))
            tl.store(stats + 2, tl.sqrt(gg).to(tl.float32))
            tl.store(stats + 3, after.to(tl.float32))
            tl.store(stats + 4, k.to(tl.float32))
            tl.store(
                alive, fine.to(tl.uint8)
            )  # the others, whether they read it before or after, find gg the same
    for block in range(pid, tl.cdiv(P, BLOCK), programs):
        i = tl.full((), block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        here = i < end
        x = tl.load(g + i, mask=here, other=0.0)
        if SURGERY:
            y = tl.load(u + i, mask=here, other=0.0)
            x = tl.where(
                k != 0, (x.to(tl.float64) - k * y.to(tl.float64)).to(tl.float32), x
            )  # k alone may leave float32's range
            if ADAMW:
                tl.store(u + i, beta * y + one_beta * x, mask=here)
        if ADAMW:
            x *= shrink
            a, b, w = (
                tl.load(m + i, mask=here, other=0.0),
                tl.load(v + i, mask=here, other=0.0),
                tl.load(theta + i, mask=here, other=0.0),
            )
            a += one_b1 * (x - a)
            b = b2 * b + one_b2 * x * x
            w = w * (1 - lr * weight_decay) - lr * (a / c1) / (tl.sqrt(b / c2) + eps)
            tl.store(m + i, a, mask=here)
            tl.store(v + i, b, mask=here)
            tl.store(theta + i, w, mask=here)
        else:
            tl.store(out + i, x, mask=here)


# ---- PyTorch ---------------------------------------------------------------------------------------------------------

BLOCK = 1024


def _launch(g, u, out, theta=None, m=None, v=None, schedule=None, alive=None, kappa=None, on=None, stats=None,
            beta=0.0, clip=0.0, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0):  # fmt: skip
    sms = torch.cuda.get_device_properties(g.device).multi_processor_count if g.is_cuda else 1
    programs = max(1, min(triton.cdiv(len(g), BLOCK), 4 * sms, 1024))
    partial = torch.empty(3, programs, dtype=torch.float64, device=g.device)
    _dots[(programs,)](g, g if u is None else u, partial, len(g), programs, BLOCK=BLOCK)
    unused = [g if x is None else x for x in (u, out, theta, m, v, schedule)]
    flags = [
        g if x is None else x.view(torch.uint8) if x.dtype == torch.bool else x
        for x in (alive, kappa, on, stats)
    ]
    _update[(programs,)](partial, g, *unused, *flags, len(g), programs, beta, 1 - beta, clip, 1 - betas[0], betas[1], 1 - betas[1], eps, weight_decay,
                         BLOCK=BLOCK, N=triton.next_power_of_2(programs),
                         SURGERY=u is not None, KAPPA=kappa is not None, SWITCH=on is not None, ADAMW=theta is not None)  # fmt: skip


def project(g, u):
    """Projected gradient; arguments as in project_ref. The kernel takes float32 on a GPU; anything else goes to the reference."""
    if g.dtype != torch.float32 or not kernels.available(g, u):
        return project_ref(g, u)
    out = torch.empty_like(g)
    _launch(g.contiguous(), u.contiguous(), out)
    return out


def project_adamw(
    theta,
    g,
    u,
    m,
    v,
    schedule,
    alive,
    kappa=None,
    on=None,
    beta=0.0,
    clip=0.25,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
):
    """One update in place; arguments and result as in project_adamw_ref, which takes what is not float32 on a GPU."""
    if g.dtype != torch.float32 or not kernels.available(theta, g, m, v):
        return project_adamw_ref(
            theta, g, u, m, v, schedule, alive, kappa, on, beta, clip, betas, eps, weight_decay
        )
    stats = torch.empty(5, device=g.device)
    _launch(g, u, None, theta, m, v, schedule, alive, kappa, on, stats, beta, clip, betas, eps, weight_decay)
    return stats

"""Projection of a gradient that conflicts with the previous one, and the whole parameter update around it.

    g' = g - min(0, <g, u>) / <u, u> u          u = 0: g
    u <- beta u + (1 - beta) g'
    theta <- AdamW(theta, g' min(1, clip / |g'|))    the first n_adamw numbers; the rest: see muon.py

The projection is PCGrad's (arXiv 2001.06782), against one reference as in A-GEM (arXiv 1812.00420). AdamW is
arXiv 1711.05101.

surgery.py calls `project`, muon.py `project_adamw`. The kernels update in two launches,
whatever the number of parameter tensors, and read nothing back to the CPU. The first takes <g, u>, <u, u> and
<g, g> in one pass (8P bytes); the second does the rest (20P bytes in, 16P out). Sums are taken in float64, so
that scales whose squares leave float32's range need no care.
"""

import math

import torch
from torch import Tensor
from torch.optim.adamw import adamw

import kernels
from kernels import tl, triton

BLOCK = 1024  # numbers that a program takes at a time
MOMENTUM = 0.95  # Muon's


def dot(x: Tensor, y: Tensor) -> float:
    """<x, y> of (P,); again in float64 where it is so small or large that terms may leave float32's range."""
    d = torch.dot(x, y).item()
    if 1e-20 < abs(d) < 1e30:
        return d
    return torch.dot(x.double(), y.double()).item()


def without(g: Tensor, u: Tensor, k: float) -> Tensor:
    """g - k u of (P,), g itself if k = 0. With a tiny u, k may leave float32's range where k u does not."""
    if k == 0:
        return g
    if abs(k) < 1e30:
        return torch.sub(g, u, alpha=k)
    return (g.double() - k * u.double()).to(g.dtype)


def conflict(gu: float, uu: float) -> float:
    """min(0, <g, u>) / <u, u>: how much of u to remove from g. 0 if u = 0."""
    return gu / uu if gu < 0 < uu else 0.0


def project_ref(g: Tensor, u: Tensor) -> Tensor:
    """g, u (P,) of one dtype -> g' (P,). It is g itself, to the bit, where <g, u> >= 0 or u = 0."""
    return without(g, u, conflict(dot(g, u), dot(u, u)))


def _overlap(
    g: Tensor, u: Tensor | None, kappa: Tensor | None, on: Tensor | None
) -> tuple[float, float, float]:
    """<g, u>, <u, u> and how much of u to remove from g; zeros without u."""
    if u is None:
        return 0.0, 0.0, 0.0
    gu = dot(g, u)
    uu = dot(u, u)
    if on is not None and not on:
        return gu, uu, 0.0
    return gu, uu, conflict(gu, uu) if kappa is None else kappa.item()


def project_adamw_ref(
    theta: Tensor,  # (P,), and so the next four
    g: Tensor,
    u: Tensor | None,  # the previous gradient; None: no surgery
    m: Tensor,  # AdamW's moments, zeros at first
    v: Tensor,
    schedule: Tensor,  # (4,): learning rate, 1 - betas[0]^t, 1 - betas[1]^t, and the step t from 1
    alive: Tensor,  # () bool
    kappa: Tensor | None = None,  # () how much of u to remove; None: g's own min(0, <g, u>) / <u, u>
    on: Tensor | None = None,  # () bool, False to leave g as it is
    beta: float = 0.0,
    clip: float = 0.25,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    n_adamw: int | None = None,  # how many numbers AdamW updates, from the first; None: all
) -> Tensor:
    """One update of theta, u, m and v in place. Returns (5,): <g, u>, <u, u>, |g|, |g'|, and k.

    k u is what was removed from g, with k = kappa or g's own; surgery per teacher gives kappa. A gradient
    that is not finite makes `alive` False, and from then on nothing changes: theta stays the last good one.
    `schedule` is a tensor, so that a captured CUDA graph reads each step's own.

    Beyond n_adamw, theta stays, m becomes Muon's momentum and v Nesterov's sum, which muon.step takes up.
    """
    gg = dot(g, g)
    gu, uu, k = _overlap(g, u, kappa, on)
    norm_after = math.sqrt(max(gg - 2 * k * gu + k * k * uu, 0.0)) if math.isfinite(gg) else gg
    alive &= math.isfinite(gg)
    if alive:
        new = without(g, u, k)
        if u is not None and beta:
            u.lerp_(new, 1 - beta)
        elif u is not None:
            u.copy_(new)
        lr, _, _, t = schedule.tolist()
        new = new * min(clip / (norm_after + 1e-6), 1.0)
        n_steps = [schedule.new_tensor(t - 1)]
        options = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay}
        n = len(g) if n_adamw is None else n_adamw
        first = [[x[:n]] for x in (theta, new, m, v)]
        adamw(*first, [], n_steps, fused=True, amsgrad=False, maximize=False, **options)
        m[n:].lerp_(new[n:], 1 - MOMENTUM)
        v[n:] = new[n:].lerp(m[n:], MOMENTUM)
    return torch.tensor((gu, uu, math.sqrt(gg), norm_after, k), dtype=g.dtype, device=g.device)


# ---- the kernels -------------------------------------------------------------------------------------------


@triton.jit
def _dots(g, u, partial, P, programs, BLOCK: tl.constexpr):
    """partial (3, programs) float64: <g, u>, <u, u>, <g, g> over every programs-th block of g, u (P,)."""
    pid = tl.program_id(0)
    gu = tl.zeros((BLOCK,), tl.float64)
    uu = tl.zeros((BLOCK,), tl.float64)
    gg = tl.zeros((BLOCK,), tl.float64)
    for block in range(pid, tl.cdiv(P, BLOCK), programs):
        i = tl.full((), block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(g + i, mask=i < P, other=0.0).to(tl.float64)
        y = tl.load(u + i, mask=i < P, other=0.0).to(tl.float64)
        gu += x * y
        uu += y * y
        gg += x * x
    tl.store(partial + pid, tl.sum(gu))
    tl.store(partial + programs + pid, tl.sum(uu))
    tl.store(partial + 2 * programs + pid, tl.sum(gg))


@triton.jit
def _update(
    partial,  # (3, programs) float64, from _dots
    g,  # (P,)
    u,  # (P,), where SURGERY
    out,  # (P,), g' where not ADAMW
    theta,  # (P,), where ADAMW, and so all below
    m,
    v,
    schedule,  # (4,)
    alive,  # () bytes
    kappa,  # () float32, where KAPPA
    on,  # () bytes, where SWITCH
    stats,  # (5,) float32: what project_adamw_ref returns
    P,
    n_adamw,
    programs,
    beta,
    one_beta,  # 1 - beta; as one_b1 and one_b2 from the CPU: float32 would leave five digits of it
    clip,
    one_b1,
    b2,
    one_b2,
    eps,
    weight_decay,
    momentum,
    one_momentum,
    BLOCK: tl.constexpr,
    N: tl.constexpr,  # programs, up to a power of two
    SURGERY: tl.constexpr,
    KAPPA: tl.constexpr,
    SWITCH: tl.constexpr,
    ADAMW: tl.constexpr,
):
    """g' to `out`, or the whole update in place. Every program adds up the partial sums again, in one order.

    Over 60 lines: half are the signature, and the rest is one pass from top to bottom.
    """
    pid = tl.program_id(0)
    n = tl.arange(0, N)
    gu = tl.sum(tl.load(partial + n, mask=n < programs, other=0.0))
    uu = tl.sum(tl.load(partial + programs + n, mask=n < programs, other=0.0))
    gg = tl.sum(tl.load(partial + 2 * programs + n, mask=n < programs, other=0.0))
    if not SURGERY:
        gu = gg * 0
        uu = gg * 0
        k = gg * 0
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
        norm_after = tl.sqrt(tl.maximum(gg - 2 * k * gu + k * k * uu, 0.0))
        shrink = tl.minimum(clip / (norm_after + 1e-6), 1.0).to(tl.float32)
        lr = tl.load(schedule)
        c1 = tl.load(schedule + 1)
        c2 = tl.load(schedule + 2)
        if pid == 0:
            tl.store(stats, gu.to(tl.float32))
            tl.store(stats + 1, uu.to(tl.float32))
            tl.store(stats + 2, tl.sqrt(gg).to(tl.float32))
            tl.store(stats + 3, norm_after.to(tl.float32))
            tl.store(stats + 4, k.to(tl.float32))
            # other programs may read it before or after this: gg is theirs too, so `fine` comes out the same
            tl.store(alive, fine.to(tl.uint8))
    for block in range(pid, tl.cdiv(P, BLOCK), programs):
        i = tl.full((), block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < end
        x = tl.load(g + i, mask=inside, other=0.0)
        if SURGERY:
            y = tl.load(u + i, mask=inside, other=0.0)
            projected = x.to(tl.float64) - k * y.to(tl.float64)  # k alone may leave float32's range
            x = tl.where(k != 0, projected.to(tl.float32), x)
            if ADAMW:
                tl.store(u + i, beta * y + one_beta * x, mask=inside)
        if ADAMW:
            x *= shrink
            a = tl.load(m + i, mask=inside, other=0.0)
            b = tl.load(v + i, mask=inside, other=0.0)
            w = tl.load(theta + i, mask=inside, other=0.0)
            by_adamw = i < n_adamw
            a += tl.where(by_adamw, one_b1, one_momentum) * (x - a)
            b = tl.where(by_adamw, b2 * b + one_b2 * x * x, x + momentum * (a - x))
            w = w * (1 - lr * weight_decay) - lr * (a / c1) / (tl.sqrt(tl.maximum(b, 0.0) / c2) + eps)
            tl.store(m + i, a, mask=inside)
            tl.store(v + i, b, mask=inside)
            tl.store(theta + i, w, mask=inside & by_adamw)
        else:
            tl.store(out + i, x, mask=inside)


# ---- PyTorch -----------------------------------------------------------------------------------------------


def _launch(
    g: Tensor,
    u: Tensor | None,
    out: Tensor | None = None,
    theta: Tensor | None = None,
    m: Tensor | None = None,
    v: Tensor | None = None,
    schedule: Tensor | None = None,
    alive: Tensor | None = None,
    kappa: Tensor | None = None,
    on: Tensor | None = None,
    stats: Tensor | None = None,
    beta: float = 0.0,
    clip: float = 0.0,
    betas: tuple[float, float] = (0.0, 0.0),
    eps: float = 0.0,
    weight_decay: float = 0.0,
    n_adamw: int | None = None,
) -> None:
    """Both launches, with arguments of project_adamw_ref: without theta the projection into `out` alone."""
    P = len(g)
    n_sms = torch.cuda.get_device_properties(g.device).multi_processor_count if g.is_cuda else 1
    programs = max(1, min(triton.cdiv(P, BLOCK), 4 * n_sms, 1024))
    partial = torch.empty(3, programs, dtype=torch.float64, device=g.device)
    _dots[(programs,)](g, g if u is None else u, partial, P, programs, BLOCK=BLOCK)
    tensors = []
    for x in (u, out, theta, m, v, schedule, alive, kappa, on, stats):
        if x is None:
            tensors.append(g)  # not read
        else:
            tensors.append(x.view(torch.uint8) if x.dtype == torch.bool else x)
    b1, b2 = betas
    constants = {
        "BLOCK": BLOCK,
        "N": triton.next_power_of_2(programs),
        "SURGERY": u is not None,
        "KAPPA": kappa is not None,
        "SWITCH": on is not None,
        "ADAMW": theta is not None,
    }
    n_adamw = P if n_adamw is None else n_adamw
    numbers = (beta, 1 - beta, clip, 1 - b1, b2, 1 - b2, eps, weight_decay, MOMENTUM, 1 - MOMENTUM)
    _update[(programs,)](partial, g, *tensors, P, n_adamw, programs, *numbers, **constants)


def project(g: Tensor, u: Tensor) -> Tensor:
    """Projected gradient (P,), as project_ref. The kernel takes float32 on a GPU; else the reference runs."""
    if g.dtype != torch.float32 or not kernels.available(g, u):
        return project_ref(g, u)
    out = torch.empty_like(g)
    _launch(g.contiguous(), u.contiguous(), out)
    return out


def project_adamw(
    theta: Tensor,  # (P,), and so the next four
    g: Tensor,
    u: Tensor | None,
    m: Tensor,
    v: Tensor,
    schedule: Tensor,  # (4,)
    alive: Tensor,  # () bool
    kappa: Tensor | None = None,  # ()
    on: Tensor | None = None,  # () bool
    beta: float = 0.0,
    clip: float = 0.25,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    n_adamw: int | None = None,
) -> Tensor:
    """One update in place; arguments and result (5,) as in project_adamw_ref.

    The kernels take float32 on a GPU; else the reference runs.
    """
    options = (beta, clip, betas, eps, weight_decay, n_adamw)
    if g.dtype != torch.float32 or not kernels.available(theta, g, m, v):
        return project_adamw_ref(theta, g, u, m, v, schedule, alive, kappa, on, *options)
    stats = torch.empty(5, device=g.device)
    _launch(g, u, None, theta, m, v, schedule, alive, kappa, on, stats, *options)
    return stats

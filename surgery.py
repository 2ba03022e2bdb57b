"""What to do with a gradient that conflicts with the previous update: project it onto its normal plane.

    g, u = METHODS[name](g, u, kappa)

    g (P,)    this batch's gradient; (n, P), a row for each teacher in the batch, for names in EACH
    u (P,)    the previous update's gradient: what the last call returned beside it, zeros before the first
    kappa ()  how much of u to take away; None: the batch's own min(0, <g, u>) / <u, u>

Returns the gradient to descend and the next u, each (P,).

Per teacher: with g = sum_i s_i g_i and every g_i projected on its own, the sum is g - kappa u, where
kappa = sum_i s_i min(0, c_i) / <u, u> and c_i = <g_i, u>: `per_teacher`. The c_i come from one forward-mode
pass (alignment.py), so no teacher's own gradient is ever formed.

Used by distill.py, whose --surgery offers the names in METHODS. To add one, see docs/extending.md.
"""

from typing import NamedTuple

import torch
from torch import Tensor

import muon
from kernels.project import project  # g - min(0, <g, u>) / <u, u> u


def none(g: Tensor, u: Tensor, kappa: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """No surgery; u is still kept, for its cosine in the log and for alignments."""
    return g, g


def previous(g: Tensor, u: Tensor, kappa: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Never against the last update: A-GEM's projection (arXiv 1812.00420) with that as its reference."""
    g = projected(g, u, kappa)
    return g, g


def pcgrad(
    g: Tensor, u: Tensor | None = None, kappa: None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Every teacher's gradient against every other's, in random order.

    Yu et al. 2020, arXiv 2001.06782, algorithm 1. g (n, P): each teacher's gradient, times its share.
    """
    total = torch.zeros_like(g[0])
    for i in range(len(g)):
        g_i = g[i]
        for j in torch.randperm(len(g), generator=generator).tolist():
            if j != i:
                g_i = project(g_i, g[j])
        total += g_i
    return total, total


def projected(g: Tensor, u: Tensor, kappa: Tensor | None) -> Tensor:
    """g without its conflict with u, or without kappa of u."""
    return project(g, u) if kappa is None else g - kappa * u


def per_teacher(c: Tensor, shares: Tensor, uu: Tensor) -> Tensor:
    """kappa () from c (N,) = <g_i, u>, the shares (N,) of the batch and uu = <u, u>."""
    return torch.where(uu > 0, (shares * c.clamp_max(0)).sum() / uu, 0.0)


METHODS = {"none": none, "previous": previous, "pcgrad": pcgrad}
EACH = ("pcgrad",)  # those that take every teacher's gradient
FUSED = ("none", "previous")  # those that one call of muon.step does, the update included


class Step(NamedTuple):
    """What an update's surgery did: all ()."""

    projected: Tensor  # whether the gradient was changed
    cosine: Tensor  # between gradient and u
    norm: Tensor  # of the gradient
    norm_after: Tensor  # of the gradient after surgery, before clipping


def step(
    name: str,
    theta: Tensor,
    g: Tensor,
    u: Tensor,
    m: Tensor,
    v: Tensor,
    kappa: Tensor | None = None,
    *,
    fused: bool,
    alive: Tensor,
    **options,
) -> Step:
    """Surgery by METHODS[name], clipping, Muon and AdamW, in place of theta, u, m and v (P,).

    g (P,), or (n, P) for names in EACH. fused: on a GPU two launches do it all, for names in FUSED.
    alive and options: see muon.step.
    """
    if fused:
        on = torch.zeros_like(alive) if name == "none" else None
        stats = muon.step(theta, g, u, m, v, alive=alive, kappa=kappa, on=on, **options)
        gu, uu, norm, norm_after, removed = stats
        changed = removed != 0
    else:
        total = g.sum(0) if name in EACH else g
        gu = total @ u
        uu = u @ u
        norm = total.norm()
        g, next_u = METHODS[name](g, u, kappa)
        norm_after = g.norm()
        changed = (g != total).any()
        muon.step(theta, g, None, m, v, alive=alive, **options)
        u.copy_(torch.where(alive, next_u, u))
    return Step(changed, gu / (norm * uu.sqrt()).clamp_min(1e-30), norm, norm_after)

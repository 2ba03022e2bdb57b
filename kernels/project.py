"""Projection of a gradient onto the normal plane of the previous one, where the two conflict.

    g - min(0, <g, u>) / <u, u> u          u = 0: g        (PCGrad, arXiv 2001.06782; against one reference, A-GEM, arXiv 1812.00420)

Called by surgery.py over the flat gradient.
"""

import torch


def project_ref(g, u):
    """g, u (P,) of one dtype -> (P,). g itself, to the bit, where <g, u> >= 0 or u = 0. No host synchronisation."""
    u = u / u.abs().max().clamp_min(torch.finfo(u.dtype).tiny)  # its length does not matter; this one can't under- or overflow when squared
    dot, uu = g @ u, u @ u
    return torch.where((dot < 0) & (uu > 0), g - dot / uu * u, g)


def project(g, u):
    """Projected gradient; arguments as in project_ref, which it takes everywhere: there is no fused kernel yet."""
    return project_ref(g, u)

"""What to do with a gradient that conflicts with the previous update: project it onto that one's normal plane.

    g, u = METHODS[name](g, u, kappa, changed)

g (P,): this batch's gradient; u (P,): what the last call returned beside it (zeros before the first). kappa: how much of u to take
away; None: the batch's own min(0, <g, u>) / <u, u>. changed: whether the teacher in the lead is another than last time.
Returns the gradient to descend and the next u, each (P,).

Per teacher: with g = sum_i s_i g_i and every g_i projected on its own, the sum is g - kappa u, kappa = sum_i s_i min(0, c_i) / <u, u>,
c_i = <g_i, u>: `per_teacher`. The c_i come from one forward-mode pass (distill.py), so no teacher's own gradient is ever formed.
"""

import torch

from kernels.project import project  # g - min(0, <g, u>) / <u, u> u

BETA = 0.9  # how much of u `average` keeps


def per_teacher(c, shares, uu):
    """kappa from the alignments c (N,) of the teachers' own gradients with u, their shares (N,) of the batch, and uu = <u, u>."""
    return torch.where(uu > 0, (shares * c.clamp_max(0)).sum() / uu, 0.0)


def surgered(g, u, kappa):
    return project(g, u) if kappa is None else g - kappa * u


def none(g, u, kappa=None, changed=True):
    """No surgery; u is still kept, for its cosine in the log and for alignments."""
    return g, g


def previous(g, u, kappa=None, changed=True):
    """Never against the last update (A-GEM's projection, arXiv 1812.00420, with the last update for its reference)."""
    g = surgered(g, u, kappa)
    return g, g


def switch(g, u, kappa=None, changed=True):
    """`previous`, only when the teacher changed: a repeat of the same teacher that conflicts corrects its own overshoot."""
    g = torch.where(torch.as_tensor(changed, device=g.device), surgered(g, u, kappa), g)
    return g, g


def average(g, u, kappa=None, changed=True):
    """Never against the exponential average of the past updates."""
    g = surgered(g, u, kappa)
    return g, BETA * u + (1 - BETA) * g


def pcgrad(g, u=None, kappa=None, changed=True, generator=None):
    """Every teacher's gradient against every other's, in random order (Yu et al. 2020, arXiv 2001.06782, algorithm 1).

    It takes g (n, P), one row per teacher in the batch, already times its share (EACH).
    """
    out = torch.zeros_like(g[0])
    for i in range(len(g)):
        gi = g[i]
        for j in torch.randperm(len(g), generator=generator).tolist():
            gi = project(gi, g[j]) if j != i else gi
        out += gi
    return out, out


EACH = ("pcgrad",)  # those that take every teacher's gradient
METHODS = {"none": none, "previous": previous, "switch": switch, "average": average, "pcgrad": pcgrad}

# The same in arguments of kernels.project.project_adamw, which does them on a GPU with clipping and AdamW; a test holds one to the other.
FUSED = {
    "none": lambda changed: {"on": torch.zeros_like(changed)},
    "previous": lambda changed: {},
    "switch": lambda changed: {"on": changed},
    "average": lambda changed: {"beta": BETA},
}

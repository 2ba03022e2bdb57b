"""How much of the last update each teacher would take part in: c_i = <grad L_i, u>, and a_i = c_i / <u, u>.

a_i, clipped to [-1, 1], is the share of the previous update u that teacher i's own update would contain. It
weighs the teachers' scores (--alignment-weight), and says how much of each teacher's gradient to project
(--surgery-scope teacher).

Used by distill.py. `exact` takes one forward-mode pass for all teachers; `estimate` takes the change of each
teacher's KL, on fixed windows (the probe), over the last update.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from support import processes


def exact(losses: Callable[[Tensor], Tensor], theta: Tensor, u: Tensor) -> Tensor:
    """losses(theta) -> L (N,): c (N,) in one forward-mode pass; no teacher's gradient is ever formed."""
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(theta.detach(), u)
        return forward_ad.unpack_dual(losses(dual)).tangent


def estimate(before: Tensor, after: Tensor, u: Tensor, delta: Tensor) -> Tensor:
    """c (N,) from the KLs (N,) of the same windows before and after an update that moved theta by delta (P,).

    First order: after - before = <grad L_i, delta>, so a_i is that over <u, delta>. Exact for small steps
    along -u, an estimate where AdamW bends them (FAMO's trick, Liu et al. 2023, arXiv 2306.03792, section
    3.2).
    """
    u_delta = u @ delta
    return torch.where(u_delta != 0, (after - before) / u_delta, 0.0) * (u @ u)


def clipped(c: Tensor, uu: Tensor) -> Tensor:
    """a (N,) in [-1, 1] from c (N,) and uu = <u, u>; 0 where u is."""
    return torch.where(uu > 0, c / uu, 0.0).clamp(-1, 1)


class Alignments:
    """What an update knows of alignments, c (N,): zeros here, where no option asks for them.

    probe(theta): KL (N,) on the probe windows; None: at the student's own parameters. theta, u (P,): the
    student's parameters and the previous update's gradient, which change in place. kl (N,): the probe's now.
    """

    def __init__(self, probe: Callable[[Tensor | None], Tensor], theta: Tensor, u: Tensor, kl: Tensor):
        self.probe = probe
        self.theta = theta
        self.u = u
        self.c = torch.zeros_like(kl)  # (N,)
        self.last_kl = kl.clone()  # (N,) the probe's

    def before_update(self) -> Tensor:
        """a (N,), which weighs the teachers' scores."""
        return clipped(self.c, self.u @ self.u)

    def after_update(self) -> None:
        pass


class Exact(Alignments):
    def before_update(self) -> Tensor:
        self.c.copy_(processes.averaged(exact(self.probe, self.theta, self.u)))
        return super().before_update()


class Estimated(Alignments):
    def before_update(self) -> Tensor:
        self.theta_before = self.theta.detach().clone()
        return super().before_update()

    def after_update(self) -> None:
        kl = processes.averaged(self.probe(None))
        delta = self.theta.detach() - self.theta_before
        self.c.copy_(estimate(self.last_kl, kl, self.u, delta))
        self.last_kl.copy_(kl)

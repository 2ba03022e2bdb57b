"""Learners of the study: for curricula and surgeries that are more than a function of KLs or gradients.

`of` chooses one. Used by research/study.py and research/streaming.py.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import data
import distill
import surgery
from research import variants

STEERING_COST = 0.05  # of an update, which takes three times a forward: what measuring KLs may cost
MANY = 10  # teachers: with more, gradients of each are taken from its own windows


def of(cfg: distill.Config, n: int, steering: data.Batch) -> Callable[..., distill.Learner]:
    """What trains a student of n teachers with these options; steering: windows for Steered."""
    if cfg.curriculum in ("validated", "integral"):
        return functools.partial(Steered if cfg.curriculum == "validated" else Integral, steering)
    if cfg.surgery == "a-gem":
        return functools.partial(AGem, list(range(n)))
    return Apart if n > MANY and cfg.surgery in surgery.EACH else distill.Learner


class Steered(distill.Learner):
    """Its curriculum follows KLs on windows of their own, with targets."""

    def __init__(self, steering: data.Batch, cfg: distill.Config, *args: Any):
        super().__init__(cfg, *args)
        self.probe = functools.partial(self.distance, steering, steering.targets)
        with torch.no_grad():
            self.kl.copy_(self.probe(None))
        update = 3 * cfg.batch_size * self.windows.K
        self.probe_interval = math.ceil(steering.mask.numel() / (STEERING_COST * update))


class Integral(Steered):
    """Follows variants.integral."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.choose = self.from_mean_shares

    def from_mean_shares(
        self, d: Tensor, step: Tensor | int, shares: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Of the updates so far, and of as many with equal shares as the warm-up has."""
        before = (self.total_shares + self.cfg.warmup / len(d)) / (self.done + self.cfg.warmup)
        return variants.integral(d, step, before, generator)


class AGem(distill.Learner):
    """Projects against the gradient of other windows, where --surgery previous has that of the last update.

    protected: the teachers of these windows, in equal shares (Chaudhry et al. 2019, arXiv 1812.00420).
    """

    def __init__(self, protected: list[int], *args: Any):
        super().__init__(*args)
        self.protected = protected

    def operate_and_descend(self, g: Tensor, kappa: Tensor | None) -> Any:
        if self.protected:
            share = torch.zeros_like(self.kl)
            share[self.protected] = 1 / len(self.protected)
            batch = self.windows.sample(self.cfg.batch_size, share, self.generator)
            g = g.clone()  # the next gradient takes its place
            with torch.enable_grad():
                self.u.copy_(self.gradient(self.losses(batch, self.targets(batch))))
        else:
            self.u.zero_()
        return super().operate_and_descend(g, kappa)


class Apart(distill.Learner):
    """Takes each teacher's gradient from its own windows, where the method takes it from the whole batch's.

    The same gradients, with fifty teachers in a fraction of the time.
    """

    def losses(self, batch: data.Batch, targets: Tensor) -> distill.Losses:
        self.batch = batch
        return super().losses(batch, targets)

    def gradient(self, losses: distill.Losses) -> Tensor:
        rows = []
        for i in losses.share.nonzero().flatten():
            (own,) = torch.where(self.batch.task == i)
            own_batch = some(self.batch, own)
            self.theta.grad.zero_()
            (losses.share[i] * self.distance(own_batch, own_batch.targets)[i]).backward()
            rows.append(self.theta.grad.clone())
        return torch.stack(rows)


def some(batch: data.Batch, chosen: Tensor) -> data.Batch:
    """These (n,) of its windows."""
    return data.Batch(*(x[chosen] for x in batch[:-1]), batch.targets[:, chosen])

"""Which teacher next: a curriculum turns the KL to each teacher into shares of the next batch.

    shares = METHODS[name](d, step, shares, generator)

    d (N,)       estimates of the KL between the student and each teacher
    step         number of the update, from 0: an integer, or a tensor of one
    shares (N,)  what the last call returned, 1/N each before the first. There is no other state
    generator    torch.Generator, for curricula that draw at random

Returns (N,), non-negative, summing to 1; one-hot for curricula of one teacher at a time (ONE_AT_A_TIME, and
novelty with power inf). Ties go to the lowest index. Raises NotANumber where a KL is NaN.

Used by distill.py, whose --curriculum offers the names in METHODS. To add one, see README, "Changing it".
"""

import torch
from torch import Generator, Tensor

# Spread evenly under mixed curricula: no teacher is ever without windows, so its KL is never out of date.
FLOOR = 0.1
# The most of a batch that novelty gives one teacher, or twice its equal share if that is more: one that
# nobody can learn keeps the highest KL, and would take it all.
MOST = 0.5
ONE_AT_A_TIME = ("fixed", "uniform")
LAW = 0.55  # the share law: with fixed shares KL_i ~ share_i^-LAW (docs/study.md)


class NotANumber(ValueError):
    """The KL to a teacher is NaN."""


def novelty(
    d: Tensor,
    step: Tensor | int,
    shares: Tensor,
    generator: Generator,
    power: float = 2.0,
    most: float = MOST,
) -> Tensor:
    """s_i ~ d_i^power: learn next from the teachers that the student is most different from.

    inf: all to argmax_i d_i, the proposal to the letter; 0: equal shares. most: see `limited`.
    """
    largest = checked(d).max()
    if power == float("inf"):
        return one_hot((d == largest).int().argmax(), d)
    # d / largest: the scale of d does not matter, nor does overflow
    return limited(proportional(torch.where(largest > 0, (d / largest) ** power, 1.0)), most)


def worst_by_law(d: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """The KL to the worst teacher, () each, that equal shares would have come to, and the best shares.

    By the share law. d (N,): the KLs of a student whose mean shares are these (N,).
    """
    c = d * (len(d) * shares).pow(LAW)  # of equal shares
    return c.max(), c.pow(1 / LAW).mean().pow(LAW)


def fixed(d: Tensor, step: Tensor | int, shares: Tensor, generator: Generator) -> Tensor:
    """One teacher at a time in turn (Rusu et al. 2016, arXiv 1511.06295)."""
    return one_hot(step % len(checked(d)), d)


def uniform(d: Tensor, step: Tensor | int, shares: Tensor, generator: Generator) -> Tensor:
    """One teacher at random."""
    return one_hot(torch.randint(len(checked(d)), (), generator=generator, device=d.device), d)


def all_at_once(d: Tensor, step: Tensor | int, shares: Tensor, generator: Generator) -> Tensor:
    """Equal shares of every batch (Tseng)."""
    return torch.full_like(checked(d), 1 / len(d))


def dro(d: Tensor, step: Tensor | int, shares: Tensor, generator: Generator, eta: float = 0.01) -> Tensor:
    """Exponentiated gradient on the shares: s_i <- s_i exp(eta d_i / mean(d)).

    Group DRO (Sagawa et al. 2020, arXiv 1911.08731, algorithm 1), there with d_i itself: its mean takes the
    scale of the KL out of eta.
    """
    weights = shares - FLOOR / len(d)  # the floor would pull them back to each other in every update
    mean = d.mean().clamp_min(torch.finfo(d.dtype).tiny)
    weights = weights.clamp_min(1e-6) * (eta * checked(d) / mean).exp()
    return proportional(weights)


def checked(d: Tensor) -> Tensor:
    """d itself; raises NotANumber where it is NaN. Not on a GPU, which would wait: there the loss is NaN."""
    if d.is_cuda:
        return d
    bad = d.isnan().nonzero().flatten().tolist()
    if bad:
        raise NotANumber(f"distance of teacher {bad[0]} is NaN")
    return d


def one_hot(i: Tensor | int, d: Tensor) -> Tensor:
    """All of the batch to teacher i."""
    return (torch.arange(len(d), device=d.device) == i).to(d.dtype)


def proportional(weights: Tensor) -> Tensor:
    """weights (N,) >= 0, not all zero -> shares proportional to them, over a floor."""
    return (1 - FLOOR) * weights / weights.sum() + FLOOR / len(weights)


def limited(shares: Tensor, most: float) -> Tensor:
    """These (N,), moved towards equal ones until none is above `most`, or above twice its equal share.

    From three teachers on the others then keep half, together, of what equal shares give them, or more: by
    the share law KLs of at most 2^LAW = 1.5 times those.
    """
    equal = 1 / len(shares)
    most = max(most, 2 * equal)
    largest = shares.max()
    return torch.where(largest > most, equal + (shares - equal) * (most - equal) / (largest - equal), shares)


METHODS = {
    "novelty": novelty,
    "fixed": fixed,
    "uniform": uniform,
    "all": all_at_once,
    "dro": dro,
}

"""Which teacher next. A curriculum turns distances into shares: how much of the next batch each teacher gets.

    shares = METHODS[name](d, step, shares, generator)

d (N,): how far the student is from each teacher (KL); step: an integer, or a tensor of one; shares (N,): what the last call returned (1/N each before
the first), the only state there is; generator: torch.Generator. Returns (N,), non-negative, summing to 1; one-hot for the orders
that take one teacher at a time (ONE_AT_A_TIME, and novelty with power inf). Ties go to the lowest index. Raises ValueError where a distance is NaN.
"""

import torch

FLOOR = 0.1  # spread evenly under the mixed orders: no teacher is ever without windows, so its distance is never out of date
ONE_AT_A_TIME = ("fixed", "uniform")


def checked(d):
    if d.is_cuda:  # reading it would make the GPU wait; there the loop sees the loss that became NaN
        return d
    bad = d.isnan().nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"distance of teacher {bad[0]} is NaN")
    return d


def one_hot(i, d):
    return (torch.arange(len(d), device=d.device) == i).to(d.dtype)


def proportional(w):
    """w (N,) >= 0, not all zero: normalised, over a floor."""
    return (1 - FLOOR) * w / w.sum() + FLOOR / len(w)


def novelty(d, step, shares, generator, power: float = 2.0):
    """s_i ~ d_i^power: learn next from the teachers the student is most different from. inf: all to argmax_i d_i, the proposal
    to the letter; 0: all teachers at once."""
    top = checked(d).max()
    if power == float("inf"):
        return one_hot((d == top).int().argmax(), d)
    return proportional(torch.where(top > 0, (d / top) ** power, 1.0))  # d / top: the scale of d does not matter, nor overflow


def least(d, step, shares, generator, power: float = 2.0):
    """s_i ~ d_i^-power: the control, learn from the most familiar."""
    low = checked(d).min()
    if power == float("inf"):
        return one_hot((d == low).int().argmax(), d)
    return proportional(torch.where(low > 0, (low / d) ** power, 1.0 if power == 0 else (d == 0).to(d.dtype)))


def fixed(d, step, shares, generator):
    """One teacher at a time in turn (Rusu et al. 2016, arXiv 1511.06295)."""
    return one_hot(step % len(checked(d)), d)


def uniform(d, step, shares, generator):
    """One teacher at random."""
    return one_hot(torch.randint(len(checked(d)), (), generator=generator, device=d.device), d)


def all_at_once(d, step, shares, generator):
    """Equal shares of every batch (Tseng)."""
    return torch.full_like(checked(d), 1 / len(d))


def dro(d, step, shares, generator, eta: float = 0.01):
    """Exponentiated gradient on the shares: s_i <- s_i exp(eta d_i / mean(d)) (group DRO, Sagawa et al. 2020, arXiv 1911.08731, algorithm 1;
    there d_i itself: its mean takes the scale of the KL out of eta)."""
    w = shares - FLOOR / len(d)  # without the floor, which would else pull them back towards each other in every update
    w = w.clamp_min(1e-6) * (eta * checked(d) / d.mean().clamp_min(torch.finfo(d.dtype).tiny)).exp()
    return proportional(w)


METHODS = {"novelty": novelty, "fixed": fixed, "uniform": uniform, "all": all_at_once, "dro": dro, "least": least}

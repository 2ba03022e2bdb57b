"""What the study compares: sets of tasks, runs of the method, and curricula and surgeries of its own.

CASES and RUNS name what is compared, each by its options of distill.py. `register` adds this file's curricula
and surgeries to curriculum.METHODS and surgery.METHODS, as README's "Changing it" does. Used by research/.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

import curriculum
import surgery

Curriculum = Callable[..., Tensor]  # (d, step, shares, generator) -> shares, see curriculum.py
Surgery = Callable[..., tuple[Tensor, Tensor]]  # (g, u, kappa) -> (g, next u), see surgery.py

# ---- what is compared --------------------------------------------------------------------------------------

BUILTIN = ("hopper", "halfcheetah", "walker2d", "ant")
THIRDPARTY = tuple(f"thirdparty/{task}/trpo-replay-v0" for task in BUILTIN)  # docs/results.md: nothing tuned
LONG_TEACHER = {"context": 20, "batch_size": 32, "top": 1.0}  # before a context of 5 was the default
LONG_STUDENT = {"batch_size": 64, "probe_windows": 8}

CASES: dict[str, dict[str, Any]] = {
    "builtin": {"envs": BUILTIN},
    "thirdparty": {"datasets": THIRDPARTY},
    "nine": {"envs": (*BUILTIN, "halfcheetah-back"), "datasets": THIRDPARTY},  # of unequal difficulty
    "opposed": {"envs": ("halfcheetah", "halfcheetah-back"), "share": True},  # one body, opposed goals
    "alone": {"envs": ("halfcheetah",)},  # what a surgery does where no two teachers can conflict
    "mt10": {"envs": ("mt10",), "teacher_top": 1.0, "top": 1.0, "n_embd": 116},
    "mt10 shared": {"envs": ("mt10",), "teacher_top": 1.0, "top": 1.0, "n_embd": 124, "share": True},
    "mt50": {"envs": ("mt50",), "teacher_top": 1.0, "top": 1.0, "n_embd": 280, "share": True},
}
EQUAL = "equal"  # what all others are compared with
DEFAULT = "default"  # distill.py without options
RUNS: dict[str, dict[str, Any]] = {
    # curricula
    EQUAL: {"curriculum": "all"},
    DEFAULT: {"curriculum": "novelty"},
    "novelty 1": {"curriculum": "novelty 1"},  # KL^1, and so on, without a limit to one teacher's share
    "novelty 2": {"curriculum": "novelty 2"},
    "novelty 4": {"curriculum": "novelty 4"},
    "novelty inf": {"novelty_power": math.inf},  # the worst-matched teacher alone
    "least": {"curriculum": "least"},  # the control: KL^-2
    "dro": {"curriculum": "dro"},  # group DRO, eta 0.01
    "dro 0.003": {"curriculum": "dro 0.003"},
    "dro 0.03": {"curriculum": "dro 0.03"},
    "validated": {"curriculum": "validated"},  # KL^2, of KLs on windows that are not trained on
    "integral": {"curriculum": "integral"},  # novelty that remembers, steered by the same windows
    "weights": {"curriculum": "weights"},  # fixed shares ~ c^(1 / LAW), c the KLs of a first run, as equal
    "weights, alone": {"curriculum": "weights"},  # by each task's own exponent, see study.weights
    "random": {"curriculum": "weights"},  # fixed shares drawn by the seed: what the share law is fitted to
    "round-robin": {"curriculum": "fixed"},  # one teacher at a time, in turn
    "one at random": {"curriculum": "uniform"},
    "alignment": {"alignment_weight": 1.0},  # KL times 1 plus the alignment with the last update
    # surgeries
    "previous": {"surgery": "previous"},
    "equal, previous": {"curriculum": "all", "surgery": "previous"},
    "average": {"surgery": "average"},  # against an average of about ten updates
    "pcgrad": {"surgery": "pcgrad"},
    "upgrad": {"curriculum": "all", "surgery": "upgrad"},
    "cagrad": {"curriculum": "all", "surgery": "cagrad"},
    # surgeries of equal shares, with either optimiser; a-gem: see learners.AGem
    "equal, a-gem": {"curriculum": "all", "surgery": "a-gem"},
    "equal, pcgrad": {"curriculum": "all", "surgery": "torchjd pcgrad"},
    "adamw": {"curriculum": "all", "optimizer": "adamw"},
    "adamw, previous": {"curriculum": "all", "optimizer": "adamw", "surgery": "previous"},
    "adamw, a-gem": {"curriculum": "all", "optimizer": "adamw", "surgery": "a-gem"},
    "adamw, pcgrad": {"curriculum": "all", "optimizer": "adamw", "surgery": "torchjd pcgrad"},
    "adamw, cagrad": {"curriculum": "all", "optimizer": "adamw", "surgery": "cagrad"},
    # what is learned
    "labels": {"ask": 0.0},  # no window asks for other returns
    "uniform windows": {"top": 1.0},
    "reverse": {"kl": "reverse"},  # KL(student || teacher)
    "mse": {"curriculum": "all", "loss": "mse"},  # of the means
    "data": {"curriculum": "all", "loss": "nll"},  # no teacher
    "separate": {"curriculum": "all"},  # a student for each task, of the same size together
}
CORE = (EQUAL, DEFAULT, "novelty 4", "dro", "weights", "round-robin", "previous", "equal, previous")
FIRST_RUN = ("weights", "weights, alone")  # have the learning rate of their first runs
# only where they are asked for, with the default's learning rate
UNTUNED = (
    "random",
    "weights, alone",
    "novelty 1",
    "novelty 2",
    "validated",
    "integral",
    "dro 0.003",
    "dro 0.03",
)
OF_TORCHJD = ("upgrad", "cagrad", "torchjd pcgrad")  # surgeries that need it
NEED_TORCHJD = tuple(run for run, options in RUNS.items() if options.get("surgery") in OF_TORCHJD)


# ---- curricula ---------------------------------------------------------------------------------------------


def least(
    d: Tensor, step: Tensor | int, shares: Tensor, generator: Generator, power: float = 2.0
) -> Tensor:  # (N,)
    """s_i ~ d_i^-power: the control, learn from the teachers that the student matches best."""
    smallest = curriculum.checked(d).min()
    matched = (d == 0).to(d.dtype)  # teachers matched perfectly share the batch
    return curriculum.proportional(torch.where(smallest > 0, (smallest / d) ** power, matched))


def integral(d: Tensor, step: Tensor | int, shares: Tensor, generator: Generator) -> Tensor:  # (N,)
    """s_i ~ r_i d_i^(1 / LAW), shares r (N,) being the mean of all shares so far; see learners.Integral.

    By the share law these make all KLs equal, the lowest that the worst can be (curriculum.worst_by_law).
    Novelty goes a part of that way, for equal KLs would end its weights; r keeps them.
    """
    # the floor would pull them back, as in dro
    weights = (shares - curriculum.FLOOR / len(d)).clamp_min(1e-6)
    largest = curriculum.checked(d).max()
    novel = torch.where(largest > 0, (d / largest) ** (1 / curriculum.LAW), 1.0).clamp_min(1e-6)
    return curriculum.proportional(weights * novel)


def constant(weights: list[float]) -> Curriculum:
    """The same shares in every update (scalarisation): weights (N,), summing to 1."""

    def choose(d: Tensor, step: Tensor | int, shares: Tensor, generator: Generator) -> Tensor:
        return torch.tensor(weights)

    return choose


# ---- surgeries ---------------------------------------------------------------------------------------------


def average(g: Tensor, u: Tensor, kappa: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Never against an exponential average of about ten past updates: u <- 0.9 u + 0.1 g."""
    g = surgery.projected(g, u, kappa)
    return g, 0.9 * u + 0.1 * g


def aggregated(aggregate: Callable[[Tensor], Tensor]) -> Surgery:
    """An aggregator of torchjd, (n, P) -> (P,), as a surgery of every teacher's gradient (surgery.EACH)."""

    def operate(g: Tensor, u: Tensor, kappa: None = None) -> tuple[Tensor, Tensor]:
        total = len(g) * aggregate(g)  # torchjd's are means
        return total, total

    return operate


# ---- the method's tables -----------------------------------------------------------------------------------


def register(weights: list[float] | None = None) -> None:
    """Add what is above to the method's tables. weights (N,): the shares of runs with fixed ones.

    upgrad (Quinton and Rey 2024, arXiv 2406.16232), cagrad (Liu et al. 2021, arXiv 2110.14048) and torchjd's
    pcgrad, the method's own in terms of cosines, are left out where torchjd is not installed.
    """
    curriculum.METHODS |= {"least": least, "integral": integral, "weights": constant(weights or [])}
    curriculum.METHODS["validated"] = curriculum.novelty  # see learners.Steered
    for power in (1.0, 2.0, 4.0):
        unlimited = functools.partial(curriculum.novelty, power=power, most=1.0)
        curriculum.METHODS[f"novelty {power:g}"] = unlimited
    for eta in (0.003, 0.03):
        curriculum.METHODS[f"dro {eta}"] = functools.partial(curriculum.dro, eta=eta)
    surgery.METHODS |= {"average": average, "a-gem": surgery.previous}  # against what learners.AGem says
    if has_torchjd():
        from torchjd.aggregation import CAGrad, PCGrad, UPGrad

        pcgrad = PCGrad()  # a sum, not a mean
        aggregators = {"upgrad": UPGrad(), "cagrad": CAGrad(c=0.5)}
        aggregators["torchjd pcgrad"] = lambda g: pcgrad(g) / len(g)
        surgery.METHODS |= {name: aggregated(aggregate) for name, aggregate in aggregators.items()}
        surgery.EACH = tuple(dict.fromkeys((*surgery.EACH, *OF_TORCHJD)))


def has_torchjd() -> bool:
    """Whether torchjd, which upgrad and cagrad need, is installed."""
    return importlib.util.find_spec("torchjd") is not None

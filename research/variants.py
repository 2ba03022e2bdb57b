"""What the study compares: sets of tasks, variants of the method, and the curricula and surgeries of its own.

CASES and VARIANTS name what is compared. `register` adds this file's curricula and surgeries to
curriculum.METHODS and surgery.METHODS, as README's "Changing it" does. Used by research/study*.py.
"""

import functools
import importlib.util
import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

import curriculum
import surgery

Curriculum = Callable[..., Tensor]  # (d, step, shares, generator) -> shares, see curriculum.py
Surgery = Callable[..., tuple[Tensor, Tensor]]  # (g, u, kappa) -> (g, next u), see surgery.py

# ---- what is compared --------------------------------------------------------------------------------------

BUILTIN = ("hopper", "halfcheetah", "walker2d", "ant")
THIRDPARTY = tuple(f"thirdparty/{task}/trpo-replay-v0" for task in BUILTIN)  # docs/results.md: nothing tuned
DEFAULTS = "defaults"  # the case of teachers and students as by default, but for what follows
LONG_TEACHER = {"context": 20, "batch_size": 32, "top": 1.0}  # of all cases: these were the defaults
LONG_STUDENT = {"batch_size": 64, "probe_windows": 8}
FIRST_TEACHER = {"optimizer": "adamw", "tokens": 3, "lr": 3e-3, "steps": 5000}  # of all cases but DEFAULTS
FIRST_STUDENT = {"optimizer": "adamw", "tokens": 3}
CASES = {
    DEFAULTS: BUILTIN,
    "builtin": BUILTIN,
    "thirdparty": THIRDPARTY,
    "conflict": ("halfcheetah", "halfcheetah-back"),  # one body, opposed goals
    "many": (*BUILTIN, "halfcheetah-back", *THIRDPARTY),  # of unequal difficulty
    "alone": ("halfcheetah",),  # one teacher: what a surgery does where no two can conflict
}

P2 = {"novelty_power": 2.0}
VARIANTS = {  # options of distill.py
    # curricula
    "fixed": {"curriculum": "fixed", "surgery": "none"},
    "all": {"curriculum": "all", "surgery": "none"},
    "uniform": {"curriculum": "uniform", "surgery": "none"},
    "dro": {"curriculum": "dro", "surgery": "none"},
    "least": {**P2, "curriculum": "least", "surgery": "none"},
    "novelty p=1": {"novelty_power": 1.0, "surgery": "none"},
    "novelty p=2": {**P2, "surgery": "none"},
    "novelty p=4": {"novelty_power": 4.0, "surgery": "none"},
    "novelty p=8": {"novelty_power": 8.0, "surgery": "none"},
    "novelty p=inf": {"novelty_power": math.inf, "surgery": "none"},
    # surgeries
    "novelty, previous": {**P2, "surgery": "previous"},
    "novelty, switch": {**P2, "surgery": "switch"},
    "novelty, average": {**P2, "surgery": "average"},
    "novelty p=4, previous": {"novelty_power": 4.0, "surgery": "previous"},
    "all, previous": {"curriculum": "all", "surgery": "previous"},
    "novelty, pcgrad": {**P2, "surgery": "pcgrad"},
    "novelty, previous by teacher": {**P2, "surgery": "previous", "surgery_scope": "teacher"},
    "novelty, average by teacher": {**P2, "surgery": "average", "surgery_scope": "teacher"},
    "uniform, previous": {"curriculum": "uniform", "surgery": "previous"},
    "uniform, switch": {"curriculum": "uniform", "surgery": "switch"},
    "uniform, average": {"curriculum": "uniform", "surgery": "average"},
    "fixed, average": {"curriculum": "fixed", "surgery": "average"},
    "novelty p=inf, average": {"novelty_power": math.inf, "surgery": "average"},
    "novelty, reverse": {**P2, "surgery": "none", "kl": "reverse"},  # KL(student || teacher)
    # KL and alignment in one score
    "novelty, alignment 1": {**P2, "surgery": "none", "alignment_weight": 1.0},
    "novelty, alignment 4": {**P2, "surgery": "none", "alignment_weight": 4.0},
    # attempts to repair what does not help
    "relative novelty": {"curriculum": "relative", "surgery": "none"},
    "argmax, stay 20": {"curriculum": "stay", "surgery": "none"},
    "novelty, average 0.99": {**P2, "surgery": "average 0.99"},
    "novelty, Adam's metric": {**P2, "surgery": "metric"},
    # baselines; w: fixed shares ~ (the KL of a first run with equal shares)^w, on a tuning seed
    "weights w=1": {"curriculum": "weights", "surgery": "none"},
    "weights w=2": {"curriculum": "weights", "surgery": "none"},
    "upgrad": {"curriculum": "all", "surgery": "upgrad"},
    "cagrad": {"curriculum": "all", "surgery": "cagrad"},
    "mse": {"curriculum": "all", "surgery": "none", "loss": "mse"},
    "data": {"curriculum": "all", "surgery": "none", "loss": "nll"},  # without teachers
    "one student per task": {"curriculum": "all", "surgery": "none"},  # of the same size together
}
TOP = (  # those evaluated with half of the windows from the data's tenth of highest returns, too
    "fixed",
    "all",
    "novelty p=1",
    "novelty p=2",
    "novelty p=4",
    "novelty, previous",
    "novelty p=4, previous",
    "novelty, reverse",
    "mse",
    "data",
)
for _name in TOP:
    VARIANTS[f"{_name}, top"] = {**VARIANTS[_name], "top": 0.1}
for _share in (0.05, 0.25):
    VARIANTS[f"novelty p=4, top {_share}"] = {**VARIANTS["novelty p=4"], "top": _share}

ROUND_ROBIN = "fixed"  # which KLs are divided by
NOVELTY = "novelty p=2"  # the default's curriculum; KLs are compared with windows sampled uniformly
DEFAULT = f"{NOVELTY}, top"  # what distill.py does without options
SCORE_COLUMNS = {  # of the table of scores
    "student": DEFAULT,
    "with surgery": "novelty, previous, top",
    "equal shares": "all, top",
    "round-robin": "fixed, top",
    "uniform windows": NOVELTY,
    "without teachers": "data, top",
}
HALF = (  # variants run with half the updates
    "fixed",
    "all",
    "novelty p=2",
    "novelty p=4",
    "novelty, previous",
    "novelty p=4, previous",
    "novelty, average",
)
EVALUATED = (  # variants whose students are evaluated
    "fixed",
    "all",
    "novelty p=2",
    "novelty p=4",
    "novelty p=4, previous",
    *(name for name, options in VARIANTS.items() if "top" in options),
)

# ---- curricula ---------------------------------------------------------------------------------------------

STAY = 20  # updates


def least(
    d: Tensor, step: Tensor | int, shares: Tensor, generator: Generator, power: float = 2.0
) -> Tensor:  # (N,)
    """s_i ~ d_i^-power: the control, learn from the teachers that the student matches best.

    inf: all to argmin_i d_i; 0: equal shares.
    """
    smallest = curriculum.checked(d).min()
    if power == math.inf:
        return curriculum.one_hot((d == smallest).int().argmax(), d)
    where_zero = 1.0 if power == 0 else (d == 0).to(d.dtype)  # teachers matched perfectly share the batch
    return curriculum.proportional(torch.where(smallest > 0, (smallest / d) ** power, where_zero))


def relative() -> Curriculum:
    """Novelty of each KL divided by its first value, so that no teacher leads for the scale of its KL."""
    first = torch.empty(0)

    def choose(d: Tensor, step: Tensor | int, shares: Tensor, generator: Generator) -> Tensor:
        nonlocal first
        if step == 0:
            first = d.clone()
        return curriculum.novelty(d / first, step, shares, generator, power=2.0)

    return choose


def stay(d: Tensor, step: Tensor | int, shares: Tensor, generator: Generator) -> Tensor:
    """The teacher of the highest KL alone, for STAY updates.

    It is not in curriculum.ONE_AT_A_TIME: no windows are probed, so the KLs of the other teachers grow old.
    """
    return curriculum.novelty(d, step, shares, generator, power=math.inf) if step % STAY == 0 else shares


def integral(d: Tensor, step: Tensor | int, shares: Tensor, generator: Generator) -> Tensor:  # (N,)
    """s_i ~ r_i d_i^(1 / LAW), shares r (N,) being the mean of all shares so far; see shares.Integral.

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


class LeadingTeacher:
    """Surgery `switch`, and what it has to know: whether the teacher with the largest share has changed."""

    def __init__(self):
        self.lead = -1
        self.changed = True  # in the first update, too

    def followed(self, choose: Curriculum) -> Curriculum:
        """The curriculum `choose`, whose leading teacher is noted in each update."""

        def choose_and_note(
            d: Tensor, step: Tensor | int, shares: Tensor, generator: Generator, **options: float
        ) -> Tensor:
            shares = choose(d, step, shares, generator, **options)
            lead = int(shares.argmax())
            self.changed = lead != self.lead
            self.lead = lead
            return shares

        return choose_and_note

    def switch(self, g: Tensor, u: Tensor, kappa: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """surgery.previous, but only when the leading teacher changed.

        A gradient of the same teacher that conflicts with its last one corrects a step that was too long.
        """
        if self.changed:
            g = surgery.projected(g, u, kappa)
        return g, g


def average(beta: float) -> Surgery:
    """Never against an exponential average of the past updates: u <- beta u + (1 - beta) g."""

    def operate(g: Tensor, u: Tensor, kappa: Tensor | None = None) -> tuple[Tensor, Tensor]:
        g = surgery.projected(g, u, kappa)
        return g, beta * u + (1 - beta) * g

    return operate


def metric() -> Surgery:
    """surgery.previous in the metric of Adam's second moment v.

    g is never opposed to the last update as AdamW scales it, u / sqrt(v), instead of to its gradient u.
    """
    v = torch.zeros(())

    def operate(g: Tensor, u: Tensor, kappa: Tensor | None = None) -> tuple[Tensor, Tensor]:
        nonlocal v
        v = 0.999 * v + 0.001 * g * g
        scaled = 1 / (v.sqrt() + 1e-8) * u
        gu = g @ scaled
        uu = u @ scaled
        g = g - torch.where(uu > 0, gu.clamp_max(0) / uu, 0.0) * u
        return g, g

    return operate


def aggregated(aggregate: Callable[[Tensor], Tensor]) -> Surgery:
    """An aggregator of torchjd, (n, P) -> (P,), as a surgery of every teacher's gradient (surgery.EACH)."""

    def operate(g: Tensor, u: Tensor, kappa: None = None) -> tuple[Tensor, Tensor]:
        total = len(g) * aggregate(g)  # torchjd's are means
        return total, total

    return operate


# ---- the method's tables -----------------------------------------------------------------------------------

OF_THE_METHOD = dict(curriculum.METHODS)


def register(weights: list[float], power: float = 2.0) -> None:
    """Add this file's curricula and surgeries to the method's tables, each in its initial state.

    Call it before each run. weights (N,): shares of the curriculum `weights`; power: of `least`. On a CPU
    only: they keep state that no CUDA graph would replay. upgrad (Quinton and Rey 2024, arXiv 2406.16232) and
    cagrad (Liu et al. 2021, arXiv 2110.14048) are left out where torchjd is not installed.
    """
    lead = LeadingTeacher()
    curricula = {
        **OF_THE_METHOD,
        "least": functools.partial(least, power=power),
        "relative": relative(),
        "stay": stay,
        "weights": constant(weights),
    }
    for name, choose in curricula.items():
        curriculum.METHODS[name] = lead.followed(choose)
    surgery.METHODS |= {
        "switch": lead.switch,
        "average": average(0.9),
        "average 0.99": average(0.99),
        "metric": metric(),
    }
    if has_torchjd():
        from torchjd.aggregation import CAGrad, UPGrad

        surgery.METHODS |= {"upgrad": aggregated(UPGrad()), "cagrad": aggregated(CAGrad(c=0.5))}
        surgery.EACH = tuple(dict.fromkeys((*surgery.EACH, "upgrad", "cagrad")))


def has_torchjd() -> bool:
    """Whether torchjd, which upgrad and cagrad need, is installed."""
    return importlib.util.find_spec("torchjd") is not None

"""Offline datasets: tasks, the split into training and held-out episodes, batches of windows.

    python data.py --env hopper                        # a built-in dataset: statistics, histogram of returns
    python data.py --dataset mujoco/hopper/medium-v0   # any Minari dataset: local if present, else downloaded

Used by teacher.py and distill.py. Notation: model.py. A dataset's timesteps lie in one table (S, O + A + 2),
a row each: state, action, return-to-go, timestep; the pixels of images lie in a second one, (S, P) uint8. A
window is named by its last row, so sampling rows uniformly samples timesteps uniformly. A window that would
begin before its episode does is padded on the left, as it is at evaluation.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor

from support import UserError, cli, collect, environments, metaworld, minari_files, processes, spaces
from support.host_table import HostTable, free_bytes


class Env(NamedTuple):
    id: str  # Gymnasium's
    options: dict[str, Any]  # of gymnasium.make
    reference: tuple[float, float] | None = (
        None  # returns of score 0 and 100; None: the data's lowest and highest
    )
    dataset: str | None = None  # Minari id; None: collected, see collect_if_missing


# Tasks by name: a new one is one line. Reference returns are those of a random and an expert policy that D4RL
# normalises scores with (github.com/Farama-Foundation/D4RL/blob/71a9549/d4rl/infos.py).
# Scores on v5 data are not comparable with D4RL's v2 tables.
ENVS = {
    "hopper": Env("Hopper-v5", {}, (-20.272305, 3234.3)),
    "halfcheetah": Env("HalfCheetah-v5", {}, (-280.178953, 12135.0)),
    "walker2d": Env("Walker2d-v5", {}, (1.629008, 4592.3)),
    "ant": Env("Ant-v5", {"include_cfrc_ext_in_observation": False}, (-325.6, 3879.7)),  # 27 observations
    "halfcheetah-back": Env("HalfCheetah-v5", {"forward_reward_weight": -1.0}),  # paid for running backwards
}
ENV_CHOICES = "{" + ",".join([*ENVS, "mw/TASK"]) + "}"  # as --help shows them
ENVS |= {f"mw/{task}": Env(f"mw/{task}-v3", {}) for task in metaworld.TASKS}  # their data need a package
GROUPS = {"mt10": metaworld.MT10, "mt50": metaworld.TASKS}  # names that stand for several mw/ tasks
EnvName = Annotated[Literal[tuple(ENVS)], tyro.conf.arg(metavar=ENV_CHOICES)]
DEFAULT_ENVS = ("hopper", "halfcheetah", "walker2d")  # of distill.py
HELD_OUT = 0.1  # share of the episodes
HELD_OUT_TIMESTEPS = 5120  # of each task's held-out ones, on which losses are measured
BEST_STEPS = 0.1  # share of the timesteps, of highest return: what these episodes returned is asked for
BEST_EPISODES = 8  # but at least so many episodes
QUANTILES = {"p10": 0.1, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95}  # target returns


# ---- tasks -------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Task:
    """All that acting in a task needs besides weights; its statistics come from the training episodes only.

    Saved with every model, in model.json.
    """

    name: str  # a key of ENVS, or the dataset's id
    dataset: str  # Minari id
    env_id: str | None  # None where the dataset names no environment: train only
    env_kwargs: dict[str, Any]
    max_steps: int  # an episode's limit at evaluation
    obs_dim: int
    act_dim: int  # discrete: how many choices there are in all
    obs_mean: list[float]
    obs_std: list[float]
    act_low: list[float]
    act_high: list[float]
    rtg_scale: float
    targets: dict[str, float]  # returns to ask for by name: "supported", and QUANTILES
    reference: tuple[float, float]  # returns of score 0 and 100
    reference_source: str
    split_seed: int  # chose the held-out episodes, for teacher and student alike
    # the number of the first choice, or of each factor's first; None: actions are continuous
    first_action: int | list[int] | None = None
    obs_space: spaces.Description | None = None  # what observations are made of; None: of one Box
    factors: list[int] | None = None  # choices of each (MultiDiscrete); None: Discrete, or continuous
    # what the environment is wrapped in, the innermost first: {"entry_point": "module:class", "kwargs": {}}
    env_wrappers: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def discrete(self) -> bool:
        return self.first_action is not None

    @property
    def choices(self) -> list[int]:
        """How many each factor of its discrete actions has; [] of continuous ones."""
        return self.factors or [self.act_dim] * self.discrete

    @property
    def action_shape(self) -> tuple[int, ...]:
        """Of an action in the environment's units: (A,); of a discrete one (), of F factors (F,)."""
        if self.discrete:
            return (len(self.factors),) if self.factors else ()
        return (self.act_dim,)

    @property
    def observed(self) -> spaces.Description:
        """What its observations are made of."""
        return self.obs_space or spaces.box(self.obs_dim)

    @property
    def signature(self) -> tuple[spaces.Description, int, list[int]]:
        """Of its spaces: what tasks that share an embedding and a head have in common."""
        return self.observed, self.act_dim, self.choices

    @property
    def image(self) -> tuple[int, ...]:
        """(channels, height, width) of its observations' pixels; (): they have none."""
        return spaces.image(self.observed)

    @property
    def target_name(self) -> str:
        """Of the default target return, in `targets`; older models have no "supported" one."""
        return "supported" if "supported" in self.targets else "p95"

    @property
    def target(self) -> float:
        """The return that is asked for by default."""
        return self.targets[self.target_name]


def tasks(meta: dict[str, Any], path: Path | str) -> list[Task]:
    """The tasks of a saved model; path: its directory, for the error.

    Raises UserError where a field can't be what `load` wrote.
    """
    try:
        tasks = [Task(**fields) for fields in meta["tasks"]]
        config = meta["config"]
        discrete = config.get("discrete") or [False] * len(tasks)
        of_one = [[A] * D for A, D in zip(config["act_dims"], discrete, strict=True)]
        factors = config.get("factors") or of_one
        images = config.get("images") or [()] * len(tasks)
        sizes = (config["obs_dims"], config["act_dims"], factors, images)
        for task, O, A, F, image in zip(tasks, *sizes, strict=True):
            invalid = _invalid_field(task, O, A, F, image)
            if invalid:
                raise ValueError(f"{invalid} of {str(task.name)[:50]!r}")
        return tasks
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"the model in {path} is damaged (tasks: {e}); train it again") from None


def _invalid_field(t, O, A, factors, image):
    """The first field that does not fit a model of these sizes, or None."""

    def numbers(x, n):
        if not isinstance(x, (list, tuple)) or len(x) != n:
            return False
        return all(isinstance(v, (int, float)) and math.isfinite(v) for v in x)

    targets = isinstance(t.targets, dict) and "p95" in t.targets
    valid = {
        "obs_dim": t.obs_dim == O,
        "act_dim": t.act_dim == A,
        "name": isinstance(t.name, str) and isinstance(t.dataset, str),
        "env_id": t.env_id is None or isinstance(t.env_id, str),
        "env_kwargs": isinstance(t.env_kwargs, dict),
        "env_wrappers": environments.are_wrappers(t.env_wrappers),
        "max_steps": type(t.max_steps) is int and 0 < t.max_steps <= minari_files.MAX_STEPS,
        "obs_mean": numbers(t.obs_mean, O),
        "obs_std": numbers(t.obs_std, O),
        "act_low": numbers(t.act_low, A),
        "act_high": numbers(t.act_high, A),
        "rtg_scale": numbers([t.rtg_scale], 1) and t.rtg_scale > 0,
        "targets": targets and numbers([*t.targets.values()], len(t.targets)),
        "first_action": environments.is_valid_action(t.first_action, t.factors, A),
        "factors": t.choices == list(factors),
        "obs_space": spaces.is_valid(t.observed, O) and t.image == tuple(image),
        "reference": numbers(t.reference, 2),
        "split_seed": type(t.split_seed) is int and t.split_seed >= 0,
    }
    return next((field for field, fits in valid.items() if not fits), None)


def groups_of(tasks: list[Task]) -> tuple[int, ...]:
    """Of each task the number of its group, from 0: tasks of the same spaces are of one.

    Raises UserError where no two tasks have the same.
    """
    found = []
    groups = []
    for task in tasks:
        if task.signature not in found:
            found.append(task.signature)
        groups.append(found.index(task.signature))
    if len(found) == len(tasks):
        summaries = [_summary(task) for task in tasks]
        some = "; ".join(f"{t.name} has {x}" for t, x in zip(tasks[:4], summaries[:4], strict=True))
        more = f"; and {len(tasks) - 4} more" if len(tasks) > 4 else ""
        words = ", of other words" if len(set(summaries)) < len(tasks) else ""
        raise UserError(f"--share: no two tasks have the same spaces{words} ({some}{more}); leave it out")
    return tuple(groups)


def _summary(task):
    """Of a task's spaces, for messages."""
    kind = "discrete" if task.discrete else "continuous"
    factors = f" in factors of {task.factors}" if task.factors else ""
    return f"observations {spaces.summary(task.observed)}, {task.act_dim} {kind} actions{factors}"


def dataset_id(env: str) -> str:
    """The Minari id of a built-in task's dataset. Raises UserError for a name that ENVS does not hold."""
    if env not in ENVS:
        of_package = env.startswith("mw/")
        choices = ", ".join(sorted(name for name in ENVS if name.startswith("mw/") == of_package))
        raise UserError(
            f"unknown env {env!r}; choose from {choices}, or name a Minari dataset with --dataset(s)"
        )
    return ENVS[env].dataset or f"manyteachers/{env}/replay-v0"


def check_env(env: str) -> None:
    """Raise UserError for a name not in ENVS, or where its data need a package that is missing."""
    missing = not minari_files.local(dataset_id(env)).exists()
    if missing and env.startswith("mw/"):
        metaworld.check_installed()


def expanded(envs: tuple[str, ...]) -> tuple[str, ...]:
    """The names of tasks, a group's in its place."""
    names = []
    for env in envs:
        names += [f"mw/{task}" for task in GROUPS[env]] if env in GROUPS else [env]
    return tuple(names)


def task_name(id_: str) -> str:
    """A dataset's task: the key of ENVS where it is a built-in one, else its id."""
    return next((k for k in ENVS if dataset_id(k) == id_), id_)


# ---- a dataset, split --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Dataset:
    task: Task
    train: np.ndarray  # (S, O + A + 2) float32, rows as above; episodes by return, lowest first
    held_out: np.ndarray  # the same of the episodes never trained on
    returns: np.ndarray  # (E,) of every episode
    lengths: np.ndarray  # (E,)
    saturation: float  # share of action components within 0.1 % of a bound
    train_pixels: np.ndarray | None = None  # (S, P) uint8, of observations with images: as in `train`
    held_out_pixels: np.ndarray | None = None

    def facts(self) -> dict[str, float]:
        """What a verdict needs (support/verdict.py), of the training episodes; `data` in metrics.json."""
        returns = self.train[first_rows(self.train), -2] * self.task.rtg_scale
        return {
            "episodes": len(returns),
            "steps": len(self.train),
            "return_mean": float(returns.mean()),
            "return_min": float(returns.min()),
            "return_max": float(returns.max()),
            "saturation": self.saturation,
        }


def load(name: str, seed: int = 0, like: Task | None = None) -> Dataset:
    """The dataset of a built-in task (a key of ENVS) or a Minari id; `seed` chooses the held-out tenth of its
    episodes.

    like: take this task's statistics, of another dataset, in place of its own. A built-in dataset that is
    missing is collected, another downloaded. Raises UserError where that fails, where the data can't be
    learnt from, or where they are not of `like`'s spaces.
    """
    id_ = dataset_id(name) if name in ENVS else name
    if "/" not in id_ and "-v" not in id_:
        dataset_id(name)  # a mistyped env: raises, naming the choices
    collect_if_missing(id_)
    arrays, about = minari_files.read(id_)
    lengths = arrays["lengths"]
    returns = arrays["returns"]
    held_out = _held_out_episodes(id_, len(lengths), seed)
    mean, std = _obs_statistics(arrays, ~held_out, about["obs_space"])
    train, held = _split(arrays["table"], lengths, returns, held_out)
    pixels = (None, None)
    if "pixels" in arrays:
        pixels = _split(arrays["pixels"], lengths, returns, held_out)
    rtg_scale = float(np.abs(train[:, -2]).max()) or 1.0
    if like:
        _check_spaces(id_, about, len(mean), like)
        mean = np.array(like.obs_mean)
        std = np.array(like.obs_std)
        rtg_scale = like.rtg_scale
    for rows in (train, held):  # in place: there may be a gigabyte of it
        rows[:, : len(mean)] -= mean.astype(np.float32)
        rows[:, : len(mean)] /= std.astype(np.float32)
        rows[:, -2] /= rtg_scale
    reference, source = _reference_returns(about, returns)
    saturation = about.pop("saturation")
    task = Task(
        name=task_name(id_),
        dataset=id_,
        obs_dim=len(mean),
        act_dim=len(about["act_low"]),
        obs_mean=mean.tolist(),
        obs_std=std.tolist(),
        rtg_scale=rtg_scale,
        targets={**_targets(returns[~held_out]), "supported": _supported_return(train, rtg_scale)},
        reference=reference,
        reference_source=source,
        split_seed=seed,
        **about,
    )
    return Dataset(like or task, train, held, returns, lengths, saturation, *pixels)


def _check_spaces(id_, about, O, task):
    """Raise UserError where a dataset's observations or actions are not those of a task."""
    keys = ("act_low", "act_high", "first_action", "factors")
    theirs = [O, *(about[key] for key in keys)]
    ours = [task.obs_dim, *(getattr(task, key) for key in keys)]
    for name, a, b in zip(("obs_dim", *keys), theirs, ours, strict=True):
        if a != b:
            raise UserError(
                f"dataset {id_} has {name} {a}, the teacher of {task.name} {b}: name another dataset"
            )
    if about["obs_space"] != task.obs_space:
        raise UserError(
            f"dataset {id_} has other observations, or other words, than the teacher of {task.name} was "
            f"trained on: name another dataset"
        )


def share_of(dataset: Dataset, share: float, seed: int) -> Dataset:
    """The same with this share of the training episodes, chosen by seed; raises UserError below two."""
    if share == 1:
        return dataset
    first = first_rows(dataset.train)
    n = round(share * len(first))
    if n < 2:
        raise UserError(
            f"--data-share {share}: {n} of the {len(first)} training episodes of {dataset.task.dataset}; "
            f"at least 2 are needed, {2 / len(first):.2g} of them"
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(len(first))[:n])  # still by return
    return of_episodes(dataset, "train", chosen)


def of_episodes(dataset: Dataset, part: str, chosen: np.ndarray) -> Dataset:
    """The same with these of the `train` or `held_out` episodes alone."""
    first = first_rows(getattr(dataset, part))
    selected = {}
    for name in (part, f"{part}_pixels"):
        rows = getattr(dataset, name)
        if rows is not None:
            episodes = np.split(rows, first[1:])
            selected[name] = np.concatenate([episodes[i] for i in chosen])
    return dataclasses.replace(dataset, **selected)


def collect_if_missing(id_: str, steps: int = 0) -> None:
    """Collect a built-in dataset that is not there; does nothing for others. Raises UserError if it fails.

    By the policies in support/behaviours/ (support/collect.py), or by Meta-World's experts
    (support/metaworld.py). steps: timesteps; 0: the collector's own number.
    """
    task = task_name(id_)
    if minari_files.local(id_).exists() or task not in ENVS or ENVS[task].dataset:
        return
    collector = metaworld if task.startswith("mw/") else collect
    steps = steps or collector.STEPS
    print(f"{id_} is not there: collecting {steps:,} steps", flush=True)
    env = environments.make_env(ENVS[task].id, ENVS[task].options)
    episodes = collector.episodes(env, task, steps)
    collect.collect(id_, env, episodes, collector.ALGORITHM, collector.DESCRIPTION)


def _held_out_episodes(id_, n, seed):
    """(E,) bool: a tenth of the episodes, at least one."""
    if n < 2:
        raise UserError(f"dataset {id_} has 1 episode; at least 2 are needed, one of them held out")
    held_out = np.zeros(n, bool)
    order = np.random.default_rng(seed).permutation(n)
    held_out[order[: max(1, round(HELD_OUT * n))]] = True
    return held_out


def _obs_statistics(arrays, episodes, obs_space):
    """Mean and standard deviation (O,) of the observations of these episodes (E,) bool.

    Of what is no measurement 0 and 1: the deviation of a rare category or word is almost 0.
    """
    steps = arrays["lengths"][episodes].sum()
    mean = arrays["obs_sum"][episodes].sum(0) / steps
    variance = arrays["obs_square"][episodes].sum(0) / steps - mean**2
    std = np.sqrt(np.maximum(variance, 0))
    constant = std <= 1e-6 * (1 + np.abs(mean))  # would be divided by its rounding error
    measured = spaces.measured(obs_space or spaces.box(len(mean)))
    return np.where(measured, mean, 0.0), np.where(constant | ~measured, 1.0, std)


def _split(table, lengths, returns, held_out):
    """The rows of the training episodes, in the order of their returns, and those of the held-out ones."""
    episodes = np.split(table, np.cumsum(lengths)[:-1])
    train = [episodes[i] for i in np.argsort(returns, kind="stable") if not held_out[i]]
    held = [episode for episode, is_held_out in zip(episodes, held_out, strict=True) if is_held_out]
    return np.concatenate(train), np.concatenate(held)


def best_rows(first: np.ndarray, n_rows: int, share: float = BEST_STEPS) -> int:
    """How many of a training table's last rows are its best; first: what first_rows returns of it.

    This share of them, or the BEST_EPISODES episodes of highest return if these are more.
    """
    of_episodes = n_rows - first[-min(BEST_EPISODES, len(first))]
    return max(math.ceil(share * n_rows), int(of_episodes))


def first_rows(table: np.ndarray) -> np.ndarray:
    """Where the episodes of a table begin, (E,)."""
    return np.flatnonzero(np.append(True, table[1:, -1] == 0))


def _supported_return(table, rtg_scale):
    """The median return of the best episodes: about half of them reached more."""
    first = first_rows(table)
    best = first >= len(table) - best_rows(first, len(table))
    return rtg_scale * float(np.median(table[first[best], -2]))


def _targets(returns):
    """Named quantiles of the training episodes' returns (E,), lowest first."""
    targets = {name: float(np.quantile(returns, q)) for name, q in QUANTILES.items()}
    targets["median"] = float(np.median(returns))  # rounded as in older teachers
    return targets


def _reference_returns(about, returns):
    """Returns of score 0 and 100, and where they come from."""
    family = about["env_id"] and about["env_id"].split("-")[0]
    related = [e for e in ENVS.values() if e.id.split("-")[0] == family]
    known = next((e for e in related if e.options == about["env_kwargs"]), related[0] if related else None)
    if known and known.reference:
        return known.reference, "D4RL constants" if known.dataset is None else "data.ENVS"
    low = float(returns.min())
    high = float(returns.max())
    if low >= high:
        low = min(0.0, high - 1)
    return (low, high), "the dataset's lowest and highest return"


# ---- windows -----------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Windows, padded to the widest task. The first seven are what the model takes."""

    task: Tensor  # (B,)
    states: Tensor  # (B, K, O)
    actions: Tensor  # (B, K, A)
    rtg: Tensor  # (B, K)
    timesteps: Tensor  # (B, K)
    mask: Tensor  # (B, K)
    pixels: Tensor  # (B, K, P) uint8; P is 0 where no task has images
    rows: Tensor  # (B, K) of Windows.table
    targets: Tensor  # (2, B, K, A) a teacher's mean and log_std; (2, B, K, 0) where the table has none


class Windows:
    """The tables of N tasks as one; sampling is one gather.

    tables: of each task (S_i, O_i + A_i + 2), padded here to the widest task's O and A. context: K. where:
    "device": the table lies on the training device; "host": see support/host_table.py; "auto": on the host if
    it would fill more than half of the device's memory. targets: a row has 2A columns more, a teacher's
    outputs (distill.cache_targets). top: half of a task's windows come from this share of its rows, the last
    ones, or from more (best_rows): the episodes that returned most. The other half comes from all rows; 1:
    all windows do. The simplest trajectory weighting of Hong et al. 2023, arXiv 2306.13085. copies: a task's
    rows are followed by so many copies of them, which `ask` changes. pixels: of each task (S_i, P_i) uint8,
    or None; copies of rows share them.
    """

    def __init__(
        self,
        tables: list[np.ndarray],
        tasks: list[Task],
        context: int,
        device: torch.device | str = "cpu",
        where: str = "auto",
        targets: bool = False,
        top: float = 1.0,
        copies: int = 0,
        pixels: Sequence[np.ndarray | None] = (),
    ):
        self.K = context
        self.O = max(t.obs_dim for t in tasks)
        self.A = max(t.act_dim for t in tasks)
        self.has_targets = targets
        self.copies = copies
        self.asking = 0.0  # share of the windows that ask for other returns
        self.size = torch.tensor([len(t) for t in tables], device=device)  # (N,)
        self.first_rows = [first_rows(t) for t in tables]  # of each task's episodes
        self.prefer(top)
        self.offset = (1 + copies) * (self.size.cumsum(0) - self.size)  # (N,) of each task's first row
        measured = np.zeros((len(tasks), self.O), bool)  # not padding, categories or words
        for i, task in enumerate(tasks):
            measured[i, : task.obs_dim] = spaces.measured(task.observed)
        self.measured = torch.from_numpy(measured).to(device)  # (N, O)
        self.steps_back = torch.arange(context - 1, -1, -1, device=device)  # (K,) from a window's last row
        n_columns = self.O + self.A + 2 + 2 * self.A * targets
        shape = ((1 + copies) * int(self.size.sum()), n_columns)
        pixels = {i: x for i, x in enumerate(pixels) if x is not None}
        pixels_shape = (sum(map(len, pixels.values())), max((x.shape[1] for x in pixels.values()), default=0))
        n_bytes = 4 * math.prod(shape) + math.prod(pixels_shape)
        # all processes of a job act on rank 0's answer
        too_large = processes.broadcast_int(n_bytes > free_bytes(device) / 2)
        on_host = where == "host" or (where == "auto" and too_large)
        self._take_pixels(pixels, pixels_shape, on_host)
        self.host = None
        if on_host:
            self.host = HostTable(shape, self.size.device)
            self.table = self.host.table
        elif len(tables) == 1 and not targets and not copies:
            self.table = torch.from_numpy(tables[0]).to(device)  # as it lies
            return
        else:
            self.table = torch.zeros(shape, device=device)
        for table, task, offset in zip(tables, tasks, self.offset.tolist(), strict=True):
            for start in range(offset, offset + (1 + copies) * len(table), len(table)):
                self._fill(self.table[start : start + len(table)], torch.from_numpy(table), task)

    def _take_pixels(self, pixels, shape, on_host):
        """`pixels` of those tasks that have any, one after the other, padded to the largest image."""
        device = self.size.device
        self.pixels = self.pixels_host = None
        self.pixels_offset = torch.full_like(self.size, -1)  # (N,) of each task's first row; -1: it has none
        if not pixels:
            return
        if on_host:
            self.pixels_host = HostTable(shape, device, torch.uint8)
            self.pixels = self.pixels_host.table
        elif len(pixels) > 1:
            self.pixels = torch.zeros(shape, dtype=torch.uint8, device=device)
        start = 0
        for i, x in pixels.items():
            x = torch.from_numpy(x)
            if self.pixels is None:
                self.pixels = x.to(device)  # as it lies
            else:
                self.pixels[start : start + len(x), : x.shape[1]] = x
            self.pixels_offset[i] = start
            start += len(x)

    def pixel_rows(self, task: Tensor, rows: Tensor) -> Tensor:
        """(B, K): where the pixels of the rows (B, K) of tasks (B,) lie; 0 where a task has none."""
        task = task[:, None]
        row = (rows - self.offset[task]).clamp_min(0) % self.size[task]  # of the task, no copy's
        offset = self.pixels_offset[task]
        return torch.where(offset < 0, 0, offset + row)

    def prefer(self, top: float) -> None:
        """Draw half of the windows from this share of the data, as `top` above says."""
        sizes = self.size.tolist()
        best = [best_rows(first, n, top) / n for first, n in zip(self.first_rows, sizes, strict=True)]
        self.top = torch.tensor(best, dtype=torch.float64, device=self.size.device)  # (N,)

    def ask(self, share: float, low: Tensor, high: Tensor, noise: float, generator: torch.Generator) -> None:
        """Let this share of the windows that `sample` draws ask for other returns, in other states.

        low, high: of the returns asked for, (N,) over each task's rtg_scale. One constant is added to all of
        a window's returns-to-go: rewards stay as they are. noise: see `moved`. Both are drawn anew for every
        window, or, where the table has copies, once for each: its constant for every episode, from a part of
        the range that is the copy's own.
        """
        device = self.size.device
        self.asking = share
        self.noise = noise
        self.low = low.to(device)
        self.high = high.to(device)
        offset = self.offset.tolist()
        first = torch.cat([torch.from_numpy(f) + o for f, o in zip(self.first_rows, offset, strict=True)])
        self.first = first.to(device)  # (E,) first row of every episode
        self.returns = self.table[first.to(self.table.device), self.O + self.A].to(device)
        for i, size in enumerate(self.size.tolist()):
            rows = torch.arange(offset[i], offset[i] + size, device=device)
            task = torch.full_like(rows, i)
            episode = self.episode(rows)
            for copy in range(self.copies):
                u = torch.rand(len(first), generator=generator, device=device)[episode]
                table = self.table[offset[i] + (1 + copy) * size :][:size]
                table[:, self.O + self.A] += self.shift(task, episode, (copy + u) / self.copies).to(table)
                if noise:
                    states = table[:, : self.O].to(device)
                    draws = self.draws(states.shape, generator)
                    table[:, : self.O] = self.moved(states, task, draws).to(table)

    def shift(self, task: Tensor, episode: Tensor, u: Tensor) -> Tensor:
        """(B,): what to add to an episode's returns-to-go to ask for a return drawn by u (B,) in [0, 1)."""
        return self.low[task] + u * (self.high - self.low)[task] - self.returns[episode]

    def moved(self, states: Tensor, task: Tensor, draws: tuple[Tensor, Tensor]) -> Tensor:
        """States (B, ..., O) like those that other returns lead to; draws: of `draws`, for them.

        Half of them are multiplied by a factor of up to exp(1.6 noise) or its inverse: what is faster or
        slower moves farther or less far from the mean state. All get Gaussian noise of at most `noise`
        standard deviations, mostly much less. One-hot categories, bits and words stay as they are.
        """
        scaled, factor, size = draws[0]
        factor = torch.where(scaled < 0.5, (1.6 * self.noise * (2 * factor - 1)).exp(), 1.0)
        measured = self.measured[task].view(len(task), *[1] * (states.dim() - 2), self.O)
        return torch.where(measured, states * factor + self.noise * size.square() * draws[1], states)

    def draws(self, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What moves states of this shape (B, ..., O): (3, B, ..., 1) in [0, 1), and (B, ..., O) normal."""
        device = self.size.device
        uniform = torch.rand((3, *shape[:-1], 1), generator=generator, device=device)
        return uniform, torch.empty(shape, device=device).normal_(generator=generator)

    def episode(self, row: Tensor) -> Tensor:
        """The episodes of rows (B,) that are no copies, counted over all tasks, where `ask` was called."""
        return torch.searchsorted(self.first, row, right=True) - 1

    def _fill(self, rows, table, task):
        """Copy a task's table into its rows of the common one."""
        O = self.O
        A = self.A
        table = table.to(rows.device)
        rows[:, : task.obs_dim] = table[:, : task.obs_dim]
        rows[:, O : O + task.act_dim] = table[:, task.obs_dim : -2]
        rows[:, O + A : O + A + 2] = table[:, -2:]

    def rows(self, end: Tensor) -> Tensor:
        """(B, K): those of the windows whose last rows are `end` (B,)."""
        return (end[:, None] - self.steps_back).clamp_min(0)

    def gather(self, task: Tensor, end: Tensor) -> Batch:
        """The windows of tasks (B,) whose last rows are `end` (B,)."""
        O = self.O
        A = self.A
        rows = self.rows(end)
        x = self.host.fetch(rows) if self.host else self.table[rows]  # (B, K, columns)
        timesteps = x[..., O + A + 1].long()
        mask = self.steps_back <= timesteps[:, -1:]
        targets = x[..., O + A + 2 :]
        targets = torch.stack(targets.chunk(2, -1)) if self.has_targets else x.new_empty(2, *x.shape[:2], 0)
        pixels = x.new_empty(*x.shape[:2], 0, dtype=torch.uint8)
        if self.pixels is not None:
            of = self.pixel_rows(task, rows)
            pixels = self.pixels_host.fetch(of) if self.pixels_host else self.pixels[of]
        return Batch(
            task, x[..., :O], x[..., O : O + A], x[..., O + A], timesteps, mask, pixels, rows, targets
        )

    def draw(self, B: int, shares: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Task and last row, (B,) each, of B windows; of a job's processes each takes its part of one common
        draw.

        Systematic sampling: task i gets shares[i] of the windows, rounded up or down at random with the right
        mean.
        """
        device = self.size.device
        n = B * processes.world()
        mine = torch.arange(B, device=device) + B * processes.rank()
        u = torch.rand(n + 1, generator=generator, device=device, dtype=torch.float64)
        points = (mine + u[n]) / n
        task = torch.searchsorted(shares.double().cumsum(0), points, right=True).clamp_max(len(shares) - 1)
        return task, self.end(task, u[mine])

    def end(self, task: Tensor, u: Tensor) -> Tensor:
        """Last rows (B,) of the windows of tasks (B,) drawn by u (B,), uniform in [0, 1)."""
        # x in [0, 1) has density 1/2, and 1/(2 top) more above 1 - top
        top = self.top[task]
        x = torch.minimum(2 * u, 1 - (1 - u) * 2 * top / (1 + top))
        return self.offset[task] + torch.minimum((x * self.size[task]).long(), self.size[task] - 1)

    def sample(self, B: int, shares: Tensor, generator: torch.Generator) -> Batch:
        """B windows, shares (N,) of them of each task; some ask for other returns (see `ask`)."""
        task, end = self.draw(B, shares, generator)
        u = torch.ones_like(end)
        if self.asking:
            u = torch.rand(B * processes.world(), generator=generator, device=end.device, dtype=torch.float64)
            u = u[B * processes.rank() :][:B]
        asks = u < self.asking  # (B,)
        u = u / max(self.asking, 1e-9)  # of those that ask: uniform in [0, 1)
        if self.copies:
            copy = 1 + (u * self.copies).long().clamp_max(self.copies - 1)
            end = end + torch.where(asks, copy * self.size[task], 0)
        batch = self.gather(task, end)
        if self.asking and not self.copies:
            rtg = batch.rtg + torch.where(asks, self.shift(task, self.episode(end), u.float()), 0.0)[:, None]
            states = batch.states
            if self.noise:  # drawn for the whole job, as `u` was
                own = slice(B * processes.rank(), B * (processes.rank() + 1))
                uniform, normal = self.draws((B * processes.world(), *states.shape[1:]), generator)
                moved = self.moved(states, task, (uniform[:, own], normal[own]))
                states = torch.where(asks[:, None, None], moved, states)
            batch = batch._replace(rtg=rtg, states=states)
        if self.host:  # the next windows are probably those that these shares would give
            state = generator.get_state()
            task, end = self.draw(B, shares, generator)
            self.host.read_ahead(self.rows(end))
            if self.pixels_host:
                self.pixels_host.read_ahead(self.pixel_rows(task, self.rows(end)))
            generator.set_state(state)
        return batch

    def spread(self, n: int | None = None) -> Batch:
        """n windows of each task, evenly spaced over its rows: the same ones every time.

        None: so many that they hold HELD_OUT_TIMESTEPS.
        """
        n = n or max(1, HELD_OUT_TIMESTEPS // self.K)
        N = len(self.size)
        task = torch.arange(N, device=self.size.device).repeat_interleave(n)
        i = torch.arange(n, device=self.size.device).repeat(N)
        return self.gather(task, self.end(task, (i + 0.5) / n))


# ---- python data.py ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    env: EnvName = "hopper"  # built-in task; mw/TASK: one of Meta-World's (docs/metaworld.md)
    dataset: str = ""  # Minari id, in place of --env
    seed: int = 0  # chooses the held-out episodes
    out_dir: str = "out"  # folder of the histogram
    imports: cli.Imports = ()  # packages to import, which register environments


def main(cfg: Config) -> None:
    cli.at_least(cfg, seed=0)
    environments.import_packages(cfg.imports)
    d = load(cfg.dataset or cfg.env, cfg.seed)
    actions = f"saturated {100 * d.saturation:.1f} % of action components"
    if d.task.discrete:
        actions = "discrete" if len(d.task.choices) == 1 else f"discrete, factors of {d.task.choices}"
    names = ("min", "5 %", "25 %", "median", "75 %", "95 %", "max")
    quantiles = np.quantile(d.returns, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])
    returns = ", ".join(f"{name} {value:.0f}" for name, value in zip(names, quantiles, strict=True))
    lengths = d.lengths
    print(f"{d.task.dataset}: {d.task.env_id} {d.task.env_kwargs or ''}")
    images = f" and images {d.task.image}" if d.task.image else ""
    print(f"  observations {d.task.obs_dim}{images}, actions {d.task.act_dim}, {actions}")
    print(f"  episodes {len(lengths)}, steps {lengths.sum()}, held out {len(d.held_out)} steps")
    print(f"  length   min {lengths.min()}, median {np.median(lengths):.0f}, max {lengths.max()}")
    print(f"  return   {returns}")
    path = Path(cfg.out_dir) / f"data-{d.task.name.replace('/', '-')}.png"
    plot_returns(d, path)
    print(f"  histogram in {path}")


def plot_returns(d: Dataset, path: Path) -> None:
    """The returns of a dataset's episodes as a histogram, with the target returns."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
    ax.hist(d.returns, bins=50, color="#0072B2")
    for i, (name, value) in enumerate(d.task.targets.items()):
        line = "-" if name == d.task.target_name else "--"
        ax.axvline(value, color=f"C{i + 1}", linestyle=line, label=f"{name} {value:.0f}")
    ax.set(xlabel="return (sum of rewards of an episode)", ylabel="episodes", title=d.task.dataset)
    ax.legend(title="targets")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)

"""A Minari dataset as flat arrays: found or downloaded, read in a process of its own, cached.

Used by data.py and support/host_table.py.

The arrays of a dataset with S timesteps, E episodes, O observation and A action dimensions:
    table                (S, O + A + 2) float32, a row for each timestep: observation; action, scaled to
                         [-1, 1] or one-hot; return-to-go; timestep
    pixels               (S, P) uint8, of observations with images (support/spaces.py); else there are none
    lengths              (E,) int64
    returns              (E,) float64
    obs_sum, obs_square  (E, O) float64, sums over an episode's timesteps
Its description: env_id, env_kwargs, env_wrappers, max_steps, act_low, act_high, first_action, factors,
obs_space, saturation; see data.Task.
"""

import functools
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import safetensors
import safetensors.numpy
from minari.dataset.minari_dataset import parse_dataset_id
from minari.storage.datasets_root_dir import get_dataset_path

from support import UserError, environments, files, first_line, isolation, spaces

MAX_STEPS = 100_000  # of an episode at evaluation
CACHE = Path(os.environ.get("MANYTEACHERS_CACHE", Path.home() / ".cache" / "manyteachers"))
FORMAT = f"manyteachers cache 7, images of at most {spaces.MAX_SIDE} pixels".encode()
DESCRIPTION = {"env_id", "env_kwargs", "act_low", "act_high", "first_action", "max_steps", "obs_space"}
DESCRIPTION |= {"saturation", "factors", "env_wrappers"}

Arrays = dict[str, np.ndarray]
Description = dict[str, Any]


# ---- where a dataset lies ----------------------------------------------------------------------------------


def local(dataset_id: str) -> Path:
    """Where the files of a Minari dataset are, or would be. Raises UserError for what can't be an id."""
    try:
        parse_dataset_id(dataset_id)
        return get_dataset_path(dataset_id) / "data"
    except (ValueError, OSError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(
            f"dataset {dataset_id!r}: {reason}; an id looks like mujoco/hopper/medium-v0"
        ) from None


def find(dataset_id: str) -> Path:
    """The folder of a Minari dataset's files; Minari downloads them if they are not local.

    Raises UserError where that fails.
    """
    path = local(dataset_id)
    if path.exists():
        return path
    root = get_dataset_path()
    print(f"{dataset_id} is not in {root}: downloading", flush=True)
    try:
        minari.download_dataset(dataset_id)
    except Exception as e:  # noqa: BLE001 - whatever the hub's client raises
        reason = first_line(e)[:150]
        raise UserError(
            f"dataset {dataset_id} is not in {root} and can't be downloaded ({type(e).__name__}: {reason}); "
            f"check the id with `minari list remote` and the network, or copy the dataset there"
        ) from None
    return path


# ---- the cache ---------------------------------------------------------------------------------------------


def read(dataset_id: str) -> tuple[Arrays, Description]:
    """A dataset's arrays and description; from the cache if that was written for these very files.

    Raises UserError where the dataset can't be had, read, or learnt from.
    """
    path = find(dataset_id)
    prefix = dataset_id.replace("/", "--")
    try:
        cached = CACHE / f"{prefix}-{fingerprint(path)}.safetensors"
    except OSError as e:
        raise UserError(
            f"dataset {dataset_id} can't be read ({e.strerror}: {e.filename}); "
            f"delete {path.parent} to fetch it again"
        ) from None
    found = load_arrays(cached)
    if found is not None:
        return found
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        for outdated in CACHE.glob(f"{prefix}-{'?' * 24}.safetensors"):
            outdated.unlink()
        _build_isolated(dataset_id, path, cached)
        return load_arrays(cached)
    except OSError as e:
        print(f"no cache under {CACHE} ({e}): the dataset will be read from Minari's files each time")
        with tempfile.TemporaryDirectory() as folder:
            _build_isolated(dataset_id, path, Path(folder) / "table")
            return load_arrays(Path(folder) / "table")


def fingerprint(path: Path) -> str:
    """Changes whenever the dataset's files do: their names, sizes and times, and the metadata itself."""
    digest = hashlib.blake2b(FORMAT, digest_size=12)
    for f in sorted(path.rglob("*")):
        status = f.stat()
        digest.update(f"{f.relative_to(path)} {status.st_size} {status.st_mtime_ns}\n".encode())
    digest.update((path / "metadata.json").read_bytes())
    return digest.hexdigest()


def _build_isolated(dataset_id, path, file):
    """`build` in a process of its own: HDF5's library can crash or hang on a damaged file."""
    n_bytes = sum(x.stat().st_size for x in path.rglob("*"))

    def message(reason: str) -> str:
        return f"dataset {dataset_id} can't be read ({reason}); delete {path.parent} to fetch it again"

    isolation.isolated(functools.partial(build, dataset_id, path, file), n_bytes, message)


def build(dataset_id: str, path: Path, file: Path) -> None:
    """Write a dataset's arrays into `file`. Raises OSError where that can't be written."""
    arrays, about = tabulate(*read_minari(dataset_id, path))
    blob = safetensors.numpy.save(arrays, {"about": json.dumps(about)})
    try:
        files.write(file, blob)
    except UserError as e:
        raise OSError(e) from None


def load_arrays(file: Path) -> tuple[Arrays, Description] | None:
    """What `build` wrote into `file`; None where there is no such file, or it holds anything else."""
    try:
        with safetensors.safe_open(file, "numpy") as f:
            about = json.loads(f.metadata()["about"])
            arrays = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - it is no dict
        A = len(about["act_low"])
        O = arrays["obs_sum"].shape[1]
        valid = _valid_arrays(arrays, A) and _valid_description(about, O)
        P = spaces.n_pixels(about["obs_space"] or [])
        valid = valid and O + P > 0 and _valid_pixels(arrays.get("pixels"), len(arrays["table"]), P)
    except Exception:  # noqa: BLE001 - a damaged file fails in any of these steps, each in its own way
        return None
    return (arrays, about) if valid else None


def _valid_arrays(arrays, A):
    table = arrays["table"]
    lengths = arrays["lengths"]
    returns = arrays["returns"]
    sums = [arrays["obs_sum"], arrays["obs_square"]]
    E = len(lengths)
    O = table.shape[1] - A - 2
    types = table.dtype == np.float32 and lengths.dtype == np.int64
    types = types and all(x.dtype == np.float64 for x in (returns, *sums))
    shapes = min(A, E) > 0 and O >= 0 and table.ndim == 2 and lengths.shape == returns.shape == (E,)
    shapes = shapes and all(x.shape == (E, O) for x in sums)
    if not (types and shapes):
        return False
    finite = all(np.isfinite(x).all() for x in (table, returns, *sums))
    return bool((lengths > 0).all() and lengths.sum() == len(table) and finite)


def _valid_pixels(pixels, S, P):
    if pixels is None:
        return P == 0
    return pixels.dtype == np.uint8 and pixels.shape == (S, P)


def _valid_description(about, O):
    bounds = np.array([about["act_low"], about["act_high"]], float)
    return (
        set(about) == DESCRIPTION
        and bool(np.isfinite(bounds).all())
        and environments.is_valid_action(about["first_action"], about["factors"], len(about["act_low"]))
        and type(about["max_steps"]) is int
        and 0 < about["max_steps"] <= MAX_STEPS
        and isinstance(about["env_id"], (str, type(None)))
        and isinstance(about["env_kwargs"], dict)
        and environments.are_wrappers(about["env_wrappers"])
        and (about["obs_space"] is None or spaces.is_valid(about["obs_space"], O))
    )


# ---- from Minari's files to arrays -------------------------------------------------------------------------


def read_minari(dataset_id: str, path: Path) -> tuple[np.ndarray, np.ndarray, Description, np.ndarray | None]:
    """The dataset, unscaled: table (S, O + A + 2) with rewards for returns-to-go; lengths (E,); description;
    pixels (S, P), or None.

    Raises UserError where it can't be read, or its spaces, numbers or sizes can't be learnt from.
    """
    remedy = f"delete {path.parent} to fetch it again"
    try:
        dataset = minari.load_dataset(dataset_id)
        act_space = dataset.action_space
        n_episodes = dataset.total_episodes
        n_steps = dataset.total_steps
    except Exception as e:  # noqa: BLE001 - h5py, pyarrow and JSON fail in their own ways on a damaged file
        raise UserError(f"dataset {dataset_id} can't be read ({_reason(e)}); {remedy}") from None
    _check_actions(dataset_id, act_space)
    owner = f"dataset {dataset_id}"
    obs_space = spaces.describe(dataset.observation_space, owner)
    if n_episodes == 0:
        raise UserError(f"dataset {dataset_id} has no episode; collect or download it again")
    A = environments.size(act_space)
    filled = 0
    i = 0
    try:
        obs_space = spaces.with_words(obs_space, (e.observations for e in dataset.iterate_episodes()), owner)
        O = spaces.size(obs_space)
        P = spaces.n_pixels(obs_space)
        table = np.empty((n_steps, O + A + 2), np.float32)
        pixels = np.empty((n_steps, P), np.uint8) if P else None
        lengths = np.zeros(n_episodes, np.int64)
        for i, episode in enumerate(dataset.iterate_episodes()):
            lengths[i] = len(episode.rewards)
            rows = slice(filled, filled + lengths[i])
            _fill_rows(table[rows], episode, obs_space, act_space)
            if P:
                pixels[rows] = spaces.pixels(obs_space, episode.observations)[: lengths[i]]
            filled += lengths[i]
    except UserError:
        raise
    except Exception as e:  # noqa: BLE001 - as above
        last = i if filled else 0
        raise UserError(
            f"dataset {dataset_id} can't be read past episode {last} ({_reason(e)}); {remedy}"
        ) from None
    if filled != n_steps or not (lengths > 0).all():
        raise UserError(
            f"dataset {dataset_id} announces {n_steps} steps and holds {filled}, "
            f"in {(lengths > 0).sum()} of {n_episodes} episodes; {remedy}"
        )
    _check_finite(dataset_id, table, lengths, O, A)
    return table, lengths, _description(dataset, obs_space, table, lengths), pixels


def _fill_rows(rows, episode, obs_space, act_space):
    """Copy an episode of L timesteps into its rows (L, O + A + 2) of the table."""
    L = len(episode.rewards)
    O = spaces.size(obs_space)
    rows[:, :O] = spaces.vectors(obs_space, episode.observations)[:L]  # without the one after the last action
    if environments.choices(act_space):
        rows[:, O:-2] = environments.one_hot(episode.actions, act_space)
    else:
        rows[:, O:-2] = np.reshape(episode.actions, (L, -1))
    rows[:, -2] = episode.rewards
    rows[:, -1] = np.arange(L)


def _reason(e):
    return f"{type(e).__name__}: {first_line(e)}"


def _check_actions(dataset_id, act_space):
    choices = environments.choices(act_space)
    if not choices and not isinstance(act_space, gym.spaces.Box):
        raise UserError(
            f"dataset {dataset_id} has {type(act_space).__name__} actions; only Box, Discrete, "
            f"MultiDiscrete and MultiBinary ones can be learnt from"
        )
    if sum(choices) > spaces.MAX_CATEGORIES:
        raise UserError(
            f"dataset {dataset_id} has actions of {sum(choices)} choices; "
            f"at most {spaces.MAX_CATEGORIES} can be learnt from"
        )


def _check_finite(dataset_id, table, lengths, O, A):
    if np.isfinite(table).all():
        return
    row, column = np.argwhere(~np.isfinite(table))[0]
    episode = np.searchsorted(np.cumsum(lengths), row, side="right")
    field = "rewards"
    if column < O + A:
        field = "observations" if column < O else "actions"
    raise UserError(
        f"dataset {dataset_id}: NaN or infinite {field} in episode {episode}; remove that episode"
    )


def _description(dataset, obs_space, table, lengths):
    O = spaces.size(obs_space)
    spec = dataset._eval_env_spec or dataset.env_spec
    act_space = dataset.action_space
    first_action = environments.first_action(act_space)
    low, high = _action_bounds(act_space, table[:, O:-2])
    max_steps = (spec.max_episode_steps if spec else None) or lengths.max()
    wrappers = []
    for wrapper in spec.additional_wrappers if spec else ():
        wrappers.append({"entry_point": wrapper.entry_point, "kwargs": wrapper.kwargs or {}})
    return {
        "env_id": spec.id if spec else None,
        "env_kwargs": spec.kwargs if spec else {},
        "env_wrappers": wrappers,
        "act_low": low.tolist(),
        "act_high": high.tolist(),
        "first_action": first_action,
        "factors": environments.choices(act_space) if isinstance(first_action, list) else None,
        "max_steps": min(MAX_STEPS, int(max_steps)),
        "obs_space": None if obs_space == spaces.box(O) else obs_space,
    }


def _action_bounds(act_space, actions):
    """low, high (A,) of the action space; of an unbounded dimension, those of the data."""
    if environments.choices(act_space):
        A = environments.size(act_space)
        return np.zeros(A), np.ones(A)
    low = np.broadcast_to(act_space.low, act_space.shape).reshape(-1).astype(np.float32)
    high = np.broadcast_to(act_space.high, act_space.shape).reshape(-1).astype(np.float32)
    bounded = np.isfinite(low) & np.isfinite(high)
    low = np.where(bounded, low, actions.min(0))
    high = np.where(bounded, high, actions.max(0))
    return low, np.where(high > low, high, low + 1)


def tabulate(
    table: np.ndarray, lengths: np.ndarray, about: Description, pixels: np.ndarray | None = None
) -> tuple[Arrays, Description]:
    """What `read` returns, from what `read_minari` does; `table` is changed in place.

    Continuous actions are scaled to [-1, 1], rewards become returns-to-go, and observations are summed.
    """
    low = np.array(about["act_low"], np.float32)
    high = np.array(about["act_high"], np.float32)
    O = table.shape[1] - len(low) - 2
    actions = table[:, O:-2]
    saturation = 0.0
    if about["first_action"] is None:
        actions -= low
        actions *= 2 / (high - low)
        actions -= 1
        saturation = float((np.abs(actions) > 0.999).mean())
    rtg = returns_to_go(table[:, -2], lengths)
    table[:, -2] = rtg
    ends = np.cumsum(lengths)
    sums = []
    squares = []
    for length, end in zip(lengths, ends, strict=True):
        obs = table[end - length : end, :O].astype(np.float64)
        sums.append(obs.sum(0))
        squares.append(np.einsum("to,to->o", obs, obs))
    arrays = {
        "table": table,
        "lengths": lengths,
        "returns": rtg[ends - lengths],
        "obs_sum": np.stack(sums),
        "obs_square": np.stack(squares),
    }
    if pixels is not None:
        arrays["pixels"] = pixels
    return arrays, {**about, "saturation": saturation}


def returns_to_go(rewards: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Undiscounted sum of rewards from each timestep to its episode's end, (S,) float64."""
    total = np.concatenate([[0.0], np.cumsum(rewards, dtype=np.float64)])
    ends = np.repeat(np.cumsum(lengths), lengths)
    return total[ends] - total[:-1]

"""Offline datasets: Minari in, flat float32 arrays on the training device, batches of windows out.

    python data.py --env hopper                          # what a built-in dataset holds, and its returns as a histogram
    python data.py --dataset mujoco/hopper/medium-v0     # any Minari dataset: local if present, else downloaded by Minari

Notation: model.py. A dataset's timesteps lie in one table (S, O + A + 2), a row each: state, action, rtg, timestep. A window is
named by its last row, so sampling rows uniformly is sampling timesteps uniformly, and a window that begins before its
episode does is padded on the left, as it is at evaluation.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import minari
import numpy as np
import safetensors
import safetensors.numpy
import torch
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import parse_dataset_id
from minari.namespace import create_namespace, list_local_namespaces
from minari.storage.datasets_root_dir import get_dataset_path

import behaviour
import run


class Env(NamedTuple):
    id: str  # Gymnasium's
    options: dict
    reference: tuple[float, float] | None = None  # returns of score 0 and 100; None: the data's own lowest and highest
    dataset: str | None = None  # Minari id; None: collected with the policies in behaviours/


# Tasks by name. Reference returns are those of a random and an expert policy that D4RL normalises scores with
# (github.com/Farama-Foundation/D4RL/blob/71a9549/d4rl/infos.py). Scores on v5 data are not comparable with D4RL's v2 tables.
ENVS = {
    "hopper": Env("Hopper-v5", {}, (-20.272305, 3234.3)),
    "halfcheetah": Env("HalfCheetah-v5", {}, (-280.178953, 12135.0)),
    "walker2d": Env("Walker2d-v5", {}, (1.629008, 4592.3)),
    "ant": Env("Ant-v5", {"include_cfrc_ext_in_observation": False}, (-325.6, 3879.7)),  # 27-dimensional observations
    "halfcheetah-back": Env("HalfCheetah-v5", {"forward_reward_weight": -1.0}),  # halfcheetah's opposite: the same body, paid for running backwards
}
COLLECT_STEPS = 200_000  # timesteps of a built-in dataset
HELD_OUT = 0.1  # share of the episodes
MAX_STEPS = 100_000  # of an episode at evaluation
CACHE = Path(os.environ.get("MANYTEACHERS_CACHE", Path.home() / ".cache" / "manyteachers"))


@dataclasses.dataclass
class Task:
    """All that acting in a task needs besides weights. Saved with every model (model.json), statistics from the training part only."""

    name: str  # a key of ENVS, or the dataset's id
    dataset: str  # Minari id
    env_id: str | None  # None where the dataset names no environment: train only
    env_kwargs: dict
    max_steps: int  # an episode's limit at evaluation
    obs_dim: int
    act_dim: int  # discrete: how many actions there are
    obs_mean: list[float]
    obs_std: list[float]
    act_low: list[float]
    act_high: list[float]
    rtg_scale: float
    targets: dict[str, float]  # returns to ask for: {"p95": ..., "median": ...}, quantiles of the dataset's own
    reference: tuple[float, float]  # returns of score 0 and 100
    reference_source: str
    split_seed: int  # chose the held-out episodes, for teacher and student alike
    first_action: int | None = None  # number of the first of discrete actions; None: actions are continuous

    @property
    def discrete(self):
        return self.first_action is not None


def tasks(meta: dict, path) -> list[Task]:
    """The tasks of a saved model; path: its directory, for the error. Raises run.UserError where a field can't be what `load` wrote."""

    def numbers(x, n):
        return isinstance(x, (list, tuple)) and len(x) == n and all(isinstance(v, (int, float)) and math.isfinite(v) for v in x)

    try:
        tasks = [Task(**t) for t in meta["tasks"]]
        config = meta["config"]
        for t, O, A, D in zip(tasks, config["obs_dims"], config["act_dims"], config.get("discrete") or [False] * len(tasks), strict=True):
            fine = {"obs_dim": t.obs_dim == O, "act_dim": t.act_dim == A, "name": isinstance(t.name, str) and isinstance(t.dataset, str),
                    "env_id": t.env_id is None or isinstance(t.env_id, str), "env_kwargs": isinstance(t.env_kwargs, dict),
                    "max_steps": type(t.max_steps) is int and 0 < t.max_steps <= MAX_STEPS, "obs_mean": numbers(t.obs_mean, O), "obs_std": numbers(t.obs_std, O),
                    "act_low": numbers(t.act_low, A), "act_high": numbers(t.act_high, A), "rtg_scale": numbers([t.rtg_scale], 1) and t.rtg_scale > 0,
                    "targets": isinstance(t.targets, dict) and "p95" in t.targets and numbers([*t.targets.values()], len(t.targets)),
                    "first_action": type(t.first_action) is int if D else t.first_action is None,
                    "reference": numbers(t.reference, 2), "split_seed": type(t.split_seed) is int and t.split_seed >= 0}  # fmt: skip
            if not all(fine.values()):
                raise ValueError(f"{next(k for k, v in fine.items() if not v)} of {str(t.name)[:50]!r}")
        return tasks
    except (KeyError, TypeError, ValueError) as e:
        raise run.UserError(f"the model in {path} is damaged (tasks: {e}); train it again") from None


def size(space) -> int:
    """How many numbers a Box's element holds, or how many actions a Discrete space has."""
    return int(space.n if isinstance(space, gym.spaces.Discrete) else np.prod(space.shape))


def make_env(env_id, env_kwargs, **kwargs):
    if env_id not in gym.registry:  # also keeps a dataset from naming an entry point of its own to import
        raise run.UserError(f"environment {env_id!r} is not registered with Gymnasium; install and import its package, or use --eval-episodes 0")
    try:
        import mujoco  # says on every gym.make of HalfCheetah that its model file is written in an old way

        mujoco.set_mju_user_warning(lambda text: None if "is deprecated" in text else print(f"MuJoCo: {text}"))
    except ImportError:
        pass
    try:
        return gym.make(env_id, **{"disable_env_checker": True, **env_kwargs, **kwargs})
    except Exception as e:  # a package that it needs, an option that it does not know
        why = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise run.UserError(f"environment {env_id!r} can't be made ({why}); install what it needs, or use --eval-episodes 0") from None


# ---- Minari ----------------------------------------------------------------------------------------------------------


def dataset_id(env: str) -> str:
    if env not in ENVS:
        raise run.UserError(f"unknown env {env!r}; choose from {', '.join(sorted(ENVS))}, or name a Minari dataset with --dataset(s)")
    return ENVS[env].dataset or f"manyteachers/{env}/replay-v0"


def task_name(id_: str) -> str:
    """A dataset's task: the key of ENVS where it is a built-in one, else its id."""
    return next((k for k in ENVS if dataset_id(k) == id_), id_)


def collect(env: str, steps: int = COLLECT_STEPS):
    """Roll the bundled behaviour policies out and write manyteachers/<env>/replay-v0, a Minari dataset like any other."""
    name, final = dataset_id(env), get_dataset_path(dataset_id(env))
    world = make_env(ENVS[env].id, ENVS[env].options)
    buffers = [EpisodeBuffer(id=i, **ep) for i, ep in enumerate(behaviour.collect(world, env, steps))]
    root = get_dataset_path()
    for old in root.glob(".collect-*"):  # of a killed process, unless it is alive
        with contextlib.suppress(PermissionError):
            try:
                os.kill(int(old.name.removeprefix(".collect-")), 0)
            except ProcessLookupError:
                shutil.rmtree(old, ignore_errors=True)
    tmp = root / f".collect-{os.getpid()}"  # a dataset killed half-way must not be taken for a whole one: written here, then renamed
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(tmp)
    try:
        minari.create_dataset_from_buffers(name, buffers, env=world, eval_env=world, algorithm_name="PPO snapshots with action noise", author="manyteachers",
            author_email="-@-.org", code_permalink="behaviour.py",
            description=f"{len(behaviour.NOISE)} levels of action noise times {behaviour.SNAPSHOTS} snapshots of one PPO run, from untrained to best")  # fmt: skip
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(tmp / name, final)
    except OSError as e:
        raise run.UserError(f"can't write dataset {name} under {root}: {e}; set MINARI_DATASETS_PATH to a folder that can be written") from None
    finally:
        os.environ.pop("MINARI_DATASETS_PATH")
        if before is not None:
            os.environ["MINARI_DATASETS_PATH"] = before
        shutil.rmtree(tmp, ignore_errors=True)
        world.close()
    for namespace in ("manyteachers", f"manyteachers/{env}"):
        if namespace not in list_local_namespaces():
            create_namespace(namespace, "built-in datasets of the project manyteachers")


def find(name: str) -> Path:
    """The folder of a Minari dataset's files: local, else collected (built-in ones), else downloaded by Minari."""
    try:
        parse_dataset_id(name)
        path = get_dataset_path(name) / "data"
    except (ValueError, OSError) as e:
        raise run.UserError(f"dataset {name!r}: {str(e).splitlines()[0]}; an id looks like mujoco/hopper/medium-v0") from None
    if not path.exists():
        if task_name(name) in ENVS and ENVS[task_name(name)].dataset is None:
            print(f"{name} is not there: collecting {COLLECT_STEPS:,} steps", flush=True)
            collect(task_name(name))
            return path
        print(f"{name} is not in {get_dataset_path()}: downloading", flush=True)
        try:
            minari.download_dataset(name)
        except Exception as e:  # whatever the hub's client raises
            why = str(e).strip().splitlines() or [""]
            raise run.UserError(f"dataset {name} is not in {get_dataset_path()} and can't be downloaded ({type(e).__name__}: {why[0][:150]}); "
                                f"check the id with `minari list remote` and the network, or copy the dataset there") from None  # fmt: skip
    return path


def fingerprint(path: Path) -> str:
    """Changes whenever the dataset's files do: their names, sizes and times, and the metadata itself."""
    h = hashlib.blake2b(b"manyteachers cache 3", digest_size=12)
    for f in sorted(path.rglob("*")):
        st = f.stat()
        h.update(f"{f.relative_to(path)} {st.st_size} {st.st_mtime_ns}\n".encode())
    h.update((path / "metadata.json").read_bytes())
    return h.hexdigest()


def read(name: str) -> tuple[dict[str, np.ndarray], dict]:
    """A dataset as arrays: table (S, O + A + 2) float32, rows as said above but states and rtg as they are, not yet normalised; and of each
    episode: lengths (E,), returns (E,), obs_sum and obs_square (E, O), sums over its timesteps. And its description
    {env_id, env_kwargs, max_steps, act_low, act_high, first_action, saturation}. From the cache where that was written for these very files."""
    path = find(name)
    try:
        cached = CACHE / f"{name.replace('/', '--')}-{fingerprint(path)}.safetensors"
    except OSError as e:
        raise run.UserError(f"dataset {name} can't be read ({e.strerror}: {e.filename}); delete {path.parent} to fetch it again") from None
    arrays = load_arrays(cached)
    if arrays is None:
        try:
            CACHE.mkdir(parents=True, exist_ok=True)
            for old in CACHE.glob(f"{name.replace('/', '--')}-{'?' * 24}.safetensors"):
                old.unlink()
            isolated(build, name, path, cached)
            arrays = load_arrays(cached)
        except OSError as e:
            print(f"no cache under {CACHE} ({e}): the dataset will be read from Minari's files each time")
            with tempfile.TemporaryDirectory() as tmp:
                isolated(build, name, path, Path(tmp) / "table")
                arrays = load_arrays(Path(tmp) / "table")
    return arrays


def build(name, path, file):
    """A dataset's arrays into `file`. Raises OSError where that can't be written."""
    arrays, about = tabulate(*read_minari(name, path))
    blob = safetensors.numpy.save(arrays, {"about": json.dumps(about)})
    try:
        run.write(file, blob)
    except run.UserError as e:
        raise OSError(e) from None


def load_arrays(file):
    """What `build` wrote; None where it is not there, or not that."""
    try:
        with safetensors.safe_open(file, "numpy") as f:
            arrays, about = {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["about"])  # noqa: SIM118
        table, lengths, returns, sums = arrays["table"], arrays["lengths"], arrays["returns"], (arrays["obs_sum"], arrays["obs_square"])
        E, A = len(lengths), len(about["act_low"])
        O = table.shape[1] - A - 2
        fine = (
            (table.dtype, lengths.dtype, returns.dtype, *(x.dtype for x in sums)) == (np.float32, np.int64, np.float64, np.float64, np.float64)
            and min(O, A, E) > 0 and table.ndim == 2 and lengths.shape == returns.shape == (E,) and all(x.shape == (E, O) for x in sums)
            and (lengths > 0).all() and lengths.sum() == len(table) and all(np.isfinite(x).all() for x in (table, returns, *sums))
            and np.isfinite(np.array([about["act_low"], about["act_high"]], float)).all() and set(about) == ABOUT
            and isinstance(about["first_action"], (int, type(None))) and type(about["max_steps"]) is int and 0 < about["max_steps"] <= MAX_STEPS
            and isinstance(about["env_id"], (str, type(None))) and isinstance(about["env_kwargs"], dict)
        )  # fmt: skip
        return (arrays, about) if fine else None
    except Exception:  # a damaged file can fail in any of these steps, each with its own exception
        return None


ABOUT = {"env_id", "env_kwargs", "act_low", "act_high", "first_action", "max_steps", "saturation"}


def isolated(f, name, path, *args):
    """f(name, path, *args) in a process forked for it, with memory and time in proportion to the files': HDF5's library can crash, hang or ask for any
    memory on a damaged file, and then this process has an error to tell. Without fork (Windows) it is called here."""
    if not hasattr(os, "fork"):
        return f(name, path, *args)
    size, (told, tell) = sum(x.stat().st_size for x in path.rglob("*")), os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python's, on forking where there are threads: this child starts none and takes no lock of theirs
        pid = os.fork()
    if pid == 0:
        code, text = 1, ""
        try:
            import resource

            held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if Path("/proc/self/statm").exists() else 2**36
            resource.setrlimit(resource.RLIMIT_AS, (held + 2**29 + 50 * size,) * 2)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(10 + size // 10**6)
            f(name, path, *args)
            code = 0
        except run.UserError as e:
            code, text = 2, str(e)
        except OSError as e:
            code, text = 3, str(e)
        except BaseException as e:
            text = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"
        finally:
            os.write(tell, text.encode()[:60_000])
            os._exit(code)
    os.close(tell)
    with open(told, "rb") as pipe:
        text = pipe.read().decode(errors="replace")
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == 2:
        raise run.UserError(text)
    if code == 3:
        raise OSError(text)
    if code:
        why = text or f"the library that reads it ended with {signal.Signals(-code).name}"
        raise run.UserError(f"dataset {name} can't be read ({why}); delete {path.parent} to fetch it again")


def read_minari(name, path):
    """The dataset as it is: table (S, O + A + 2) float32, a row each: observation, action (a discrete one one-hot), reward, timestep; lengths (E,); and its
    description."""
    try:
        ds = minari.load_dataset(name)
        obs_space, act_space, n, total = ds.observation_space, ds.action_space, ds.total_episodes, ds.total_steps
    except Exception as e:  # h5py, pyarrow and JSON each fail in their own way on a damaged file
        raise run.UserError(f"dataset {name} can't be read ({type(e).__name__}: {(str(e).splitlines() or [''])[0]}); delete {path.parent} to fetch it again") from None
    discrete = isinstance(act_space, gym.spaces.Discrete)
    if not isinstance(obs_space, gym.spaces.Box):
        raise run.UserError(f"dataset {name} has {type(obs_space).__name__} observations; only continuous (Box) ones can be learnt from")
    if not (discrete or isinstance(act_space, gym.spaces.Box)):
        raise run.UserError(f"dataset {name} has {type(act_space).__name__} actions; only continuous (Box) and Discrete ones can be learnt from")
    if n == 0:
        raise run.UserError(f"dataset {name} has no episode; collect or download it again")
    O, A, at = size(obs_space), size(act_space), 0
    try:
        table, lengths = np.empty((total, O + A + 2), np.float32), np.zeros(n, np.int64)
        for i, ep in enumerate(ds.iterate_episodes()):
            L = lengths[i] = len(ep.rewards)
            rows = table[at : at + L]
            rows[:, :O] = np.reshape(ep.observations, (-1, O))[:L]  # the last one, after the last action, is of no use
            rows[:, O:-2] = one_hot(ep.actions, act_space) if discrete else np.reshape(ep.actions, (-1, A))
            rows[:, -2], rows[:, -1] = ep.rewards, np.arange(L)
            at += L
    except Exception as e:
        raise run.UserError(f"dataset {name} can't be read past episode {i if at else 0} ({type(e).__name__}: {(str(e).splitlines() or [''])[0]}); "
                            f"delete {path.parent} to fetch it again") from None  # fmt: skip
    if at != total or not (lengths > 0).all():
        raise run.UserError(f"dataset {name} announces {total} steps and holds {at}, in {(lengths > 0).sum()} of {n} episodes; delete {path.parent} to fetch it again")
    if not np.isfinite(table).all():
        row, column = np.argwhere(~np.isfinite(table))[0]
        field, ep = "observations" if column < O else "actions" if column < O + A else "rewards", np.searchsorted(np.cumsum(lengths), row, side="right")
        raise run.UserError(f"dataset {name}: NaN or infinite {field} in episode {ep}; remove that episode")
    spec = ds._eval_env_spec or ds.env_spec
    if discrete:
        low, high = np.zeros(A), np.ones(A)
    else:
        low, high = (np.broadcast_to(b, act_space.shape).reshape(-1).astype(np.float32) for b in (act_space.low, act_space.high))
        bounded = np.isfinite(low) & np.isfinite(high)  # an unbounded dimension takes the data's own range
        low, high = np.where(bounded, low, table[:, O:-2].min(0)), np.where(bounded, high, table[:, O:-2].max(0))
        high = np.where(high > low, high, low + 1)
    about = dict(env_id=spec.id if spec else None, env_kwargs=spec.kwargs if spec else {}, act_low=low.tolist(), act_high=high.tolist(),
                 first_action=int(act_space.start) if discrete else None,
                 max_steps=min(MAX_STEPS, int((spec.max_episode_steps if spec else None) or lengths.max())))  # fmt: skip
    return table, lengths, about


def one_hot(actions, space):
    """actions (L,) of a Discrete space -> (L, n). Raises ValueError where one is not in the space."""
    i = np.reshape(actions, -1).astype(np.int64) - space.start
    if not ((i >= 0) & (i < space.n)).all():
        raise ValueError(f"action {actions[(i < 0) | (i >= space.n)][0]} is not in {space}")
    return np.eye(int(space.n), dtype=np.float32)[i]


# ---- from arrays to a table ------------------------------------------------------------------------------------------


def returns_to_go(rewards, lengths):
    """Undiscounted sum of rewards from each timestep to its episode's end, (S,) float64."""
    total = np.concatenate([[0.0], np.cumsum(rewards, dtype=np.float64)])
    ends = np.repeat(np.cumsum(lengths), lengths)
    return total[ends] - total[:-1]


def tabulate(table, lengths, about):
    """What `read` returns, from what `read_minari` does, in place: continuous actions scaled to [-1, 1], returns-to-go, sums per episode."""
    low, high = (np.array(about[k], np.float32) for k in ("act_low", "act_high"))
    ends, O = np.cumsum(lengths), table.shape[1] - len(low) - 2
    actions = table[:, O:-2]
    if about["first_action"] is None:
        actions -= low
        actions *= 2 / (high - low)
        actions -= 1
    rtg = returns_to_go(table[:, -2], lengths)
    table[:, -2] = rtg
    episodes = [table[end - L : end, :O].astype(np.float64) for L, end in zip(lengths, ends, strict=True)]
    sums = {"obs_sum": np.stack([x.sum(0) for x in episodes]), "obs_square": np.stack([np.einsum("to,to->o", x, x) for x in episodes])}
    saturation = float((np.abs(actions) > 0.999).mean()) if about["first_action"] is None else 0.0
    return {"table": table, "lengths": lengths, "returns": rtg[ends - lengths], **sums}, {**about, "saturation": saturation}


@dataclasses.dataclass
class Dataset:
    task: Task
    train: np.ndarray  # (S, O + A + 2) float32, rows as said above; episodes in the order of their returns, lowest first
    held_out: np.ndarray  # the same of the episodes never trained on
    returns: np.ndarray  # (E,) of every episode
    lengths: np.ndarray  # (E,)
    saturation: float  # share of action components within 0.1 % of a bound


def load(name: str, seed: int = 0) -> Dataset:
    """Dataset by built-in task (a key of ENVS) or Minari id; `seed` chooses the held-out tenth of its episodes."""
    id_ = name if "/" in name or name not in ENVS else dataset_id(name)
    if "/" not in id_ and "-v" not in id_:
        dataset_id(name)  # a mistyped env: raises, naming the choices
    arrays, about = read(id_)
    lengths, returns, table = arrays["lengths"], arrays["returns"], arrays["table"]
    n = len(lengths)
    if n < 2:
        raise run.UserError(f"dataset {id_} has 1 episode; at least 2 are needed, one of them held out")
    held = np.zeros(n, bool)
    held[np.random.default_rng(seed).permutation(n)[: max(1, round(HELD_OUT * n))]] = True
    steps = lengths[~held].sum()
    mean = arrays["obs_sum"][~held].sum(0) / steps
    std = np.sqrt(np.maximum(arrays["obs_square"][~held].sum(0) / steps - mean**2, 0))
    std = np.where(std > 1e-6 * (1 + np.abs(mean)), std, 1.0)  # a constant observation is not divided by its rounding error
    episodes = np.split(table, np.cumsum(lengths)[:-1])
    train = np.concatenate([episodes[i] for i in np.argsort(returns, kind="stable") if not held[i]])
    held_out = np.concatenate([e for e, h in zip(episodes, held, strict=True) if h])
    rtg_scale = float(np.abs(train[:, -2]).max()) or 1.0
    for x in (train, held_out):  # in place: there may be a gigabyte of it
        x[:, : len(mean)] -= mean.astype(np.float32)
        x[:, : len(mean)] /= std.astype(np.float32)
        x[:, -2] /= rtg_scale
    alike = [e for e in ENVS.values() if about["env_id"] and e.id.split("-")[0] == about["env_id"].split("-")[0]]
    known = next((e for e in alike if e.options == about["env_kwargs"]), alike[0] if alike else None)
    if known and known.reference:
        reference, source = known.reference, "D4RL constants" if known.dataset is None else "data.ENVS"
    else:
        low, high = float(returns.min()), float(returns.max())
        reference, source = (low if low < high else min(0.0, high - 1), high), "the dataset's lowest and highest return"
    saturation = about.pop("saturation")
    task = Task(
        name=task_name(id_), dataset=id_, obs_dim=len(mean), act_dim=len(about["act_low"]),
        obs_mean=mean.tolist(), obs_std=std.tolist(), rtg_scale=rtg_scale,
        targets={"p95": float(np.quantile(returns[~held], 0.95)), "median": float(np.median(returns[~held]))},
        reference=reference, reference_source=source, split_seed=seed, **about)  # fmt: skip
    return Dataset(task, train, held_out, returns, lengths, saturation)


class Batch(NamedTuple):
    """Windows, padded to the widest task. The first six are what the model takes."""

    task: torch.Tensor  # (B,)
    states: torch.Tensor  # (B, K, O)
    actions: torch.Tensor  # (B, K, A)
    rtg: torch.Tensor  # (B, K)
    timesteps: torch.Tensor  # (B, K)
    mask: torch.Tensor  # (B, K)
    rows: torch.Tensor  # (B, K) of Windows.table
    targets: torch.Tensor  # (2, B, K, A) a teacher's mean and log_std; (2, B, K, 0) where the table has none


class Windows:
    """The tables of N tasks as one; sampling is one gather.

    where: "device": the table lies on the training device; "host": in a file mapped into memory, whose windows are read by a thread while the device is at the
    update before, and copied from pinned memory; "auto": on the host if it would fill more than half of the device's memory.
    targets: whether a row has 2A columns more, for a teacher's outputs (`distill.cache_targets`).
    top: half of what is drawn of a task comes from this part of its rows, the last ones (of Dataset.train: the episodes that returned most), half from all of them;
    1: all alike. The simplest of trajectory weightings, Hong et al. 2023, arXiv 2306.13085.
    """

    def __init__(self, tables, tasks, context, device="cpu", where="auto", targets=False, top=1.0):
        self.top = top
        self.K, self.O, self.A = context, max(t.obs_dim for t in tasks), max(t.act_dim for t in tasks)
        self.size = torch.tensor([len(t) for t in tables], device=device)  # (N,)
        self.offset = self.size.cumsum(0) - self.size
        shape = int(self.size.sum()), self.O + self.A + 2 + 2 * self.A * targets
        self.host = where == "host" or (where == "auto" and bool(run.told(4 * math.prod(shape) > room(device) / 2)))  # all processes alike
        if len(tables) == 1 and not (self.host or targets):  # as it lies
            self.table = torch.from_numpy(tables[0]).to(device)
        else:
            self.table = mapped(shape) if self.host else torch.zeros(shape, device=device)
            for table, task, at in zip(tables, tasks, self.offset.tolist(), strict=True):
                x, rows = torch.from_numpy(table), slice(at, at + len(table))
                self.table[rows, : task.obs_dim] = x[:, : task.obs_dim].to(self.table.device)
                self.table[rows, self.O : self.O + task.act_dim] = x[:, task.obs_dim : -2].to(self.table.device)
                self.table[rows, self.O + self.A : self.O + self.A + 2] = x[:, -2:].to(self.table.device)
        self.back = torch.arange(context - 1, -1, -1, device=device)  # (K,) how far before the window's last row
        self.reader, self.ahead = concurrent.futures.ThreadPoolExecutor(1) if self.host else None, None

    def rows(self, end):
        """(B, K): those of the windows whose last rows are `end` (B,)."""
        return (end[:, None] - self.back).clamp_min(0)

    def gather(self, task, end):
        """The windows of tasks (B,) whose last rows are `end` (B,)."""
        rows = self.rows(end)
        x = self.fetch(rows) if self.host else self.table[rows]  # (B, K, O + A + 2, or 2A more)
        O, A, t = self.O, self.A, x[..., self.O + self.A + 1].long()
        targets = torch.stack(x[..., O + A + 2 :].chunk(2, dim=-1)) if x.shape[-1] > O + A + 2 else x.new_empty(2, *x.shape[:2], 0)
        return Batch(task, x[..., :O], x[..., O : O + A], x[..., O + A], t, self.back <= t[:, -1:], rows, targets)

    def draw(self, B, shares, generator):
        """Task and last row, (B,) each, of this process's B windows: its part of those that all of a job's processes draw alike."""
        dev, n = self.size.device, B * run.world()
        mine = torch.arange(B, device=dev) + B * run.rank()
        u = torch.rand(n + 1, generator=generator, device=dev, dtype=torch.float64)
        task = torch.searchsorted(shares.double().cumsum(0), (mine + u[n]) / n, right=True).clamp_max(len(shares) - 1)
        return task, self.end(task, u[mine])

    def end(self, task, u):
        """Last rows (B,) of the windows of tasks (B,) that are drawn by u (B,), uniform in [0, 1)."""
        x = torch.minimum(2 * u, 1 - (1 - u) * 2 * self.top / (1 + self.top))  # in [0, 1): its density is 1/2, and 1/(2 top) more above 1 - top
        return self.offset[task] + torch.minimum((x * self.size[task]).long(), self.size[task] - 1)

    def sample(self, B, shares, generator):
        """B windows; teacher i's part of them is shares[i] of B, rounded up or down at random with the right mean (systematic sampling)."""
        batch = self.gather(*self.draw(B, shares, generator))
        if self.host:  # the next are probably those that these shares would give: only where they are not has anybody to wait
            now = generator.get_state()
            end = self.draw(B, shares, generator)[1]
            generator.set_state(now)
            self.ahead = self.reader.submit(self.read, self.rows(end).cpu())
        return batch

    def read(self, rows):
        x = self.table[rows]
        return rows, x.pin_memory() if self.size.is_cuda else x

    def fetch(self, rows):
        """Rows (B, K) of a table on the host, to the device."""
        rows, ahead, self.ahead = rows.cpu(), self.ahead, None
        guess, x = ahead.result() if ahead else (None, None)
        if guess is None or guess.shape != rows.shape:
            guess, x = self.read(rows)
        wrong = (guess != rows).any(1)
        if wrong.any():
            x[wrong] = self.table[rows[wrong]]
        return x.to(self.size.device, non_blocking=True)

    def spread(self, n):
        """n windows of each task, those of n evenly spaced u: the same ones every time."""
        task = torch.arange(len(self.size), device=self.size.device).repeat_interleave(n)
        i = torch.arange(n, device=self.size.device).repeat(len(self.size))
        return self.gather(task, self.end(task, (i + 0.5) / n))


def room(device) -> float:
    """Bytes of memory: a GPU's that are free, or this machine's, divided among the processes of a job."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    except (AttributeError, ValueError, OSError):  # Windows
        return math.inf


def mapped(shape):
    """Zeros (float32) in a file that has no name and is gone with the process."""
    size = 4 * math.prod(shape)
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=CACHE) as f:
            if hasattr(os, "posix_fallocate"):  # a full disk is told now: in mid-run it would be a SIGBUS
                os.posix_fallocate(f.fileno(), 0, size)
            return torch.from_numpy(np.memmap(f, np.float32, "r+" if hasattr(os, "posix_fallocate") else "w+", shape=shape))
    except OSError as e:
        raise run.UserError(f"no room for {size / 1e9:.1f} GB in {CACHE} ({e.strerror}); set MANYTEACHERS_CACHE to a folder on a larger disk, "
                            f"or use --data-device device") from None  # fmt: skip


# ---- python data.py --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    env: str = "hopper"  # a key of ENVS
    dataset: str = ""  # a Minari id, in place of --env
    seed: int = 0  # chooses the held-out episodes
    out_dir: str = "out"  # where the histogram goes


def main(cfg: Config):
    run.check(cfg, seed=0)
    d = load(cfg.dataset or cfg.env, cfg.seed)
    q = np.quantile(d.returns, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])
    print(f"{d.task.dataset}: {d.task.env_id} {d.task.env_kwargs or ''}")
    how = "discrete" if d.task.discrete else f"saturated {100 * d.saturation:.1f} % of action components"
    print(f"  observations {d.task.obs_dim}, actions {d.task.act_dim}, {how}")
    print(f"  episodes {len(d.lengths)}, steps {d.lengths.sum()}, held out {len(d.held_out)} steps")
    print(f"  length   min {d.lengths.min()}, median {np.median(d.lengths):.0f}, max {d.lengths.max()}")
    print("  return   " + ", ".join(f"{k} {v:.0f}" for k, v in zip(("min", "5 %", "25 %", "median", "75 %", "95 %", "max"), q, strict=True)))
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
    ax.hist(d.returns, bins=50, color="#0072B2")
    for name, v in d.task.targets.items():
        ax.axvline(v, color="#D55E00", linestyle="--" if name == "median" else "-", label=f"{name} {v:.0f}")
    ax.set(xlabel="return (sum of rewards of an episode)", ylabel="episodes", title=d.task.dataset)
    ax.legend(title="targets")
    path = Path(cfg.out_dir) / f"data-{d.task.name.replace('/', '-')}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
    print(f"  histogram in {path}")


if __name__ == "__main__":
    run.cli(main, Config, __doc__)

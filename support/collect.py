"""The built-in datasets: the policies in behaviours/ rolled out into Minari datasets, in place of a download.

Used by data.py where a built-in dataset is missing. The policies are bundled; research/behaviour.py
trains them.
"""

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import safetensors.numpy
from minari.data_collector import EpisodeBuffer
from minari.namespace import create_namespace, list_local_namespaces
from minari.storage.datasets_root_dir import get_dataset_path
from tqdm import tqdm

from support import UserError

BEHAVIOURS = Path(__file__).parent / "behaviours"
N_SNAPSHOTS = 10  # policies of a task
STEPS = 200_000  # timesteps of a built-in dataset
NOISE = (0.05, 0.1, 0.2)  # standard deviations of the action noise, in units of half the action range
ALGORITHM = "PPO snapshots with action noise"
DESCRIPTION = (
    f"{len(NOISE)} levels of action noise times {N_SNAPSHOTS} snapshots of one PPO run, "
    f"from untrained to best"
)


class Behaviour:
    """A 64-64 tanh network with a frozen observation normaliser.

    Maps an observation (O,) to an action (A,), the mean of PPO's Gaussian.
    weights: mean, std (O,), w0 (O, 64), b0 (64,), w1 (64, 64), b1 (64,), w2 (64, A), b2 (A,).
    """

    def __init__(self, weights: dict[str, np.ndarray]):
        self.weights = {k: v.astype(np.float32) for k, v in weights.items()}

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        w = self.weights
        x = np.clip((obs - w["mean"]) / w["std"], -10, 10)
        x = np.tanh(x @ w["w0"] + w["b0"])
        x = np.tanh(x @ w["w1"] + w["b1"])
        return x @ w["w2"] + w["b2"]


def load_behaviours(task: str) -> list[Behaviour]:
    """The bundled snapshots of a built-in task, worst first."""
    stacked = safetensors.numpy.load_file(BEHAVIOURS / f"{task}.safetensors")
    policies = []
    for i in range(len(stacked["returns"])):
        policies.append(Behaviour({k: v[i] for k, v in stacked.items() if k != "returns"}))
    return policies


def rollout(
    env: gym.Env,
    policy: Callable[[np.ndarray], np.ndarray],
    noise: float,
    rng: np.random.Generator,
    seed: int,
) -> dict[str, np.ndarray]:
    """One episode under Gaussian action noise, clipped to the action space.

    policy: from observations (O,) to actions (A,). noise: in units of half the action range. Returns the
    fields of Minari's EpisodeBuffer.
    """
    low = env.action_space.low
    high = env.action_space.high
    obs, _ = env.reset(seed=seed)
    episode = {"observations": [obs], "actions": [], "rewards": [], "terminations": [], "truncations": []}
    done = False
    while not done:
        action = policy(obs) + noise * (high - low) / 2 * rng.standard_normal(len(low))
        action = np.clip(action, low, high).astype(np.float32)
        obs, reward, terminated, truncated, _ = env.step(action)
        done = terminated or truncated
        for field, value in zip(episode, (obs, action, reward, terminated, truncated), strict=True):
            episode[field].append(value)
    return {k: np.asarray(v) for k, v in episode.items()}


def episodes(env: gym.Env, task: str, steps: int, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Episodes until there are `steps` timesteps. Every pair of snapshot and noise level takes its turn."""
    rng = np.random.default_rng(seed)
    pairs = list(itertools.product(NOISE, load_behaviours(task)))
    n = 0
    with tqdm(total=steps, unit="step", desc=f"collect {task}", disable=None, unit_scale=True) as bar:
        for i in range(steps):  # an episode has at least one step
            noise, policy = pairs[i % len(pairs)]
            episode = rollout(env, policy, noise, rng, seed + i)
            n += len(episode["rewards"])
            bar.update(min(len(episode["rewards"]), steps - bar.n))
            yield episode
            if n >= steps:
                break


def collect(
    dataset_id: str,
    env: gym.Env,
    episodes: Iterable[dict[str, np.ndarray]],
    algorithm: str = ALGORITHM,
    description: str = DESCRIPTION,
) -> None:
    """Write the Minari dataset `dataset_id` of these episodes in env (see `rollout`).

    Closes env. Raises UserError where the dataset can't be written.
    """
    buffers = [EpisodeBuffer(id=i, **episode) for i, episode in enumerate(episodes)]
    root = get_dataset_path()
    _remove_remains(root)
    # under another name first: a dataset killed half-way must not be taken for a whole one
    temporary = root / f".collect-{os.getpid()}"
    final = get_dataset_path(dataset_id)
    try:
        with _datasets_path(temporary):
            minari.create_dataset_from_buffers(
                dataset_id,
                buffers,
                env=env,
                eval_env=env,
                algorithm_name=algorithm,
                author="manyteachers",
                author_email="-@-.org",
                code_permalink="behaviour.py",
                description=description,
            )
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary / dataset_id, final)
    except OSError as e:
        raise UserError(
            f"can't write dataset {dataset_id} under {root}: {e}; "
            f"set MINARI_DATASETS_PATH to a folder that can be written"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        env.close()
    parts = dataset_id.split("/")[:-1]
    for depth in range(1, len(parts) + 1):
        namespace = "/".join(parts[:depth])
        if namespace not in list_local_namespaces():
            with contextlib.suppress(ValueError):  # another process has just made it
                create_namespace(namespace, "built-in datasets of the project manyteachers")


def _remove_remains(root):
    """Remove what killed processes had collected, and nothing of those that still run."""
    for old in root.glob(".collect-*"):
        with contextlib.suppress(PermissionError):
            try:
                os.kill(int(old.name.removeprefix(".collect-")), 0)
            except ProcessLookupError:
                shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _datasets_path(path):
    """Minari's root folder is `path` inside the `with` block."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(path)
    try:
        yield
    finally:
        os.environ.pop("MINARI_DATASETS_PATH")
        if before is not None:
            os.environ["MINARI_DATASETS_PATH"] = before

"""A battery of small, narrow and mixed datasets, for defaults that hold on data that nobody tuned for.

The behaviour policies: the built-in PPO snapshots, the SAC and TQC ones of research/battery_policies.py, 26
snapshots of a TRPO run for each body, and a scripted controller in a maze. Ten datasets were used to choose
the defaults (CHOOSING); the others (UNSEEN) for nothing but the table. research/battery_runs.py makes the
datasets and trains on them.
"""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import minari
import numpy as np
import safetensors.numpy
from minari.data_collector import EpisodeBuffer

from examples import collect_trpo
from research import battery_policies
from support import collect, environments

NOISES = (0.0, 0.1, 0.3)  # standard deviations of action noise; every action lies in [-1, 1]
MAZES = {"maze-umaze": "PointMaze_UMaze-v3", "maze-medium": "PointMaze_Medium-v3"}
TRPO = {
    "hopper": "log_Hopper-v1_4.h5",
    "halfcheetah": "log_HalfCheetah-v1_2.h5",
    "walker2d": "log_Walker2d-v1_1.h5",
    "ant": "log_Ant-v1_0.h5",
}


# ---- behaviour policies ------------------------------------------------------------------------------------


class Behaviour(NamedTuple):
    act: Callable[[np.ndarray], np.ndarray]  # observation (O,) -> action (A,)
    noise: np.ndarray | float  # standard deviation


def behaviours(algorithm: str, body: str, logs: Path, env: gym.Env | None = None) -> list[Behaviour]:
    """All snapshots of a training, worst first; with the noise that they had themselves (TRPO), or none.

    logs: folder of TRPO's files. env: the maze that the controller knows.
    """
    if algorithm == "ppo":
        return [Behaviour(policy, 0.0) for policy in collect.load_behaviours(body)]
    if algorithm == "trpo":
        return [Behaviour(p.mean, p.std) for p in collect_trpo.snapshots(str(logs / TRPO[body]))]
    if algorithm == "controller":
        return [Behaviour(functools.partial(steer, env), 0.0)]
    stacked = safetensors.numpy.load_file(battery_policies.FOLDER / f"{algorithm}-{body}.safetensors")
    policies = []
    for i in range(len(stacked["w0"])):
        weights = {k: v[i].astype(np.float32) for k, v in stacked.items()}
        policies.append(Behaviour(battery_policies.Actor(weights), 0.0))
    return policies


def register_robotics() -> None:
    """The environments of gymnasium-robotics. Raises ImportError where it is not installed."""
    import gymnasium_robotics

    gym.register_envs(gymnasium_robotics)


def point_maze(**options) -> gym.Env:
    """A maze of gymnasium-robotics, its observations (6,) goal, position and velocity; reward 1 ends it."""
    register_robotics()
    env = gym.make(MAZES[options.pop("maze")], continuing_task=False, **options)
    return gym.wrappers.FlattenObservation(
        gym.wrappers.FilterObservation(env, ["desired_goal", "observation"])
    )


for _name, _steps in (("maze-umaze", 300), ("maze-medium", 600)):
    gym.register(
        f"battery/{_name}-v0",
        entry_point="research.battery:point_maze",
        kwargs={"maze": _name},
        max_episode_steps=_steps,
    )


def neighbours(cell: tuple[int, int]) -> list[tuple[int, int]]:
    row, column = cell
    return [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]


def steer(env: gym.Env, obs: np.ndarray) -> np.ndarray:
    """Towards the next cell of the shortest way to the goal, with a damping of the velocity."""
    maze = env.unwrapped.maze
    goal = tuple(maze.cell_xy_to_rowcol(obs[:2]))
    here = tuple(maze.cell_xy_to_rowcol(obs[2:4]))
    distance = {goal: 0}  # by breadth-first search
    queue = [goal]
    for cell in queue:
        for row, column in neighbours(cell):
            if (row, column) not in distance and maze.maze_map[row][column] != 1:
                distance[row, column] = distance[cell] + 1
                queue.append((row, column))
    target = obs[:2]
    if here != goal:
        nearest = min((cell for cell in neighbours(here) if cell in distance), key=distance.get)
        target = maze.cell_rowcol_to_xy(np.array(nearest))
    return np.clip(5 * (target - obs[2:4]) - obs[4:], -1, 1)


# ---- datasets ----------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Episodes of some snapshots of one training."""

    algorithm: str
    snapshots: tuple[int, ...]  # indices, worst first
    noises: tuple[float, ...] = ()  # each snapshot's in turn; empty: their own


class Spec(NamedTuple):
    body: str
    parts: tuple[Part, ...]
    steps: int = 0  # of all policies together; or
    episodes: int = 0  # of each policy


def authors(body: str, **algorithms: tuple[int, ...]) -> Spec:
    """Policies of several algorithms, 8,000 steps each, every one with one of three noises."""
    parts = []
    for i, (algorithm, snapshots) in enumerate(algorithms.items()):
        parts.append(Part(algorithm, snapshots, NOISES[i % 3 :] + NOISES[: i % 3]))
    return Spec(body, tuple(parts), steps=8000 * sum(map(len, algorithms.values())))


EVERY_TRPO = tuple(range(26))
EVERY_PPO = tuple(range(10))
BEST_5 = (21, 22, 23, 24, 25)
CHOOSING = {
    "hopper-authors": authors("hopper", ppo=(3, 6, 9), trpo=(8, 16, 25), sac=(2, 4)),
    "halfcheetah-authors": authors("halfcheetah", ppo=(2, 5, 9), trpo=(13, 25), sac=(2, 4)),
    "walker2d-best5": Spec("walker2d", (Part("trpo", BEST_5),), steps=60_000),
    "ant-trpo": Spec("ant", (Part("trpo", EVERY_TRPO),), steps=60_000),
    "halfcheetah-quiet": Spec("halfcheetah", (Part("ppo", EVERY_PPO, (0.0,)),), episodes=8),
    "walker2d-replay": Spec("walker2d", (Part("ppo", (0, 1, 2, 3, 4, 5), (0.1, 0.3)),), steps=60_000),
    "hopper-expert": Spec("hopper", (Part("ppo", (9,), (0.0,)),), steps=10_000),
    "ant-medium-expert": Spec("ant", (Part("ppo", (5, 9), (0.0,)),), steps=200_000),
    "hopper-one": Spec("hopper", (Part("trpo", (25,)),), steps=10_000),
    "maze-umaze": Spec("maze-umaze", (Part("controller", (0, 0, 0), (0.3, 0.8, 2.0)),), steps=60_000),
}
UNSEEN = {
    "walker2d-authors": authors("walker2d", ppo=(3, 6, 9), trpo=(8, 13, 19, 25)),
    "ant-authors": authors("ant", ppo=(3, 6, 9), trpo=(8, 13, 19, 25)),
    "hopper-best5": Spec("hopper", (Part("trpo", BEST_5),), steps=60_000),
    "halfcheetah-trpo": Spec("halfcheetah", (Part("trpo", EVERY_TRPO),), steps=200_000),
    "walker2d-quiet": Spec("walker2d", (Part("ppo", EVERY_PPO, (0.0,)),), episodes=8),
    "hopper-quiet": Spec("hopper", (Part("ppo", EVERY_PPO, (0.0,)),), episodes=30),
    "halfcheetah-replay": Spec("halfcheetah", (Part("tqc", (0, 1, 2, 3), (0.1, 0.3)),), steps=60_000),
    "halfcheetah-expert": Spec("halfcheetah", (Part("sac", (4,), (0.0,)),), steps=10_000),
    "walker2d-medium-expert": Spec("walker2d", (Part("ppo", (4, 9), (0.0,)),), steps=200_000),
    "walker2d-one": Spec("walker2d", (Part("trpo", (25,)),), steps=10_000),
    "pen": Spec("pen", (Part("sac", (2, 3, 4), (0.0, 0.1, 0.3)),), steps=60_000),
    "maze-medium": Spec("maze-medium", (Part("controller", (0, 0, 0), (0.3, 0.8, 2.0)),), steps=60_000),
}
DATASETS = CHOOSING | UNSEEN


def dataset_id(name: str) -> str:
    return f"battery/{name}-v0"


def make_env(body: str) -> gym.Env:
    if body in MAZES:
        return gym.make(f"battery/{body}-v0")
    if body == "pen":
        register_robotics()
    return environments.make_env(*battery_policies.ENVS[body])


def policies(spec: Spec, logs: Path, env: gym.Env) -> list[Behaviour]:
    """Those of a dataset, each with its noise."""
    found = []
    for part in spec.parts:
        available = behaviours(part.algorithm, spec.body, logs, env)
        for i, noise in zip(part.snapshots, itertools.cycle(part.noises or (None,)), strict=False):
            policy = available[i]
            found.append(policy if noise is None else policy._replace(noise=noise))
    return found


def rollout(env: gym.Env, policy: Behaviour, rng: np.random.Generator, i: int) -> EpisodeBuffer:
    """The i-th episode, whose seed is i."""
    # float64: noise as given, not rounded to the action space's float32
    episode = collect.rollout(env, policy.act, np.float64(policy.noise), rng, i)
    return EpisodeBuffer(id=i, **episode)


def make_dataset(name: str, logs: Path) -> None:
    """Write the Minari dataset of a name in DATASETS, if it is missing."""
    if dataset_id(name) in minari.list_local_datasets():
        return
    spec = DATASETS[name]
    env = make_env(spec.body)
    rng = np.random.default_rng(0)
    acting = policies(spec, logs, env)
    buffers = []
    for policy in acting:
        n_episodes = 0
        n_steps = 0
        while n_episodes < spec.episodes or n_steps < spec.steps / len(acting):
            buffers.append(rollout(env, policy, rng, len(buffers)))
            n_episodes += 1
            n_steps += len(buffers[-1].rewards)
    minari.create_dataset_from_buffers(
        dataset_id(name),
        buffers,
        env=env,
        eval_env=env,
        algorithm_name=", ".join(part.algorithm for part in spec.parts),
        description=str(spec),
        author="manyteachers",
        author_email="-@-.org",
        code_permalink="research/battery.py",
    )
    returns = [np.sum(buffer.rewards) for buffer in buffers]
    print(
        f"{name}: {len(buffers)} episodes, {sum(len(b.rewards) for b in buffers)} steps, "
        f"return mean {np.mean(returns):.0f}, p95 {np.quantile(returns, 0.95):.0f}",
        flush=True,
    )

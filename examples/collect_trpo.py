"""Make a dataset of policies trained elsewhere: 26 snapshots of one TRPO run, acting with their own noise.

REPOSITORY=https://raw.githubusercontent.com/openai/imitation/8a2ed905e2ac54bda0f71e5ee364e90568e6d031
curl -LO $REPOSITORY/expert_policies/modern/log_Hopper-v1_4.h5
python examples/collect_trpo.py hopper log_Hopper-v1_4.h5    # Minari dataset thirdparty/hopper/trpo-replay-v0

The other tasks' logs: log_HalfCheetah-v1_2.h5, log_Walker2d-v1_1.h5, log_Ant-v1_0.h5.
Source: Ho and Ermon 2016, arXiv 1606.03476 (MIT licence).
"""

import argparse
from collections.abc import Iterator

import gymnasium as gym
import h5py
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer

ENVS = {
    "hopper": ("Hopper-v5", {}),
    "halfcheetah": ("HalfCheetah-v5", {}),
    "walker2d": ("Walker2d-v5", {}),
    "ant": ("Ant-v5", {"include_cfrc_ext_in_observation": False}),
}


class Snapshot:
    """A policy of the run: tanh layers between an observation normaliser and a diagonal Gaussian."""

    def __init__(self, group: h5py.Group):
        policy = group["GaussianPolicy"]
        hidden = policy["hidden/FeedforwardNet"]
        names = sorted(hidden, key=lambda name: int(name.split("_")[1]))
        self.hidden = [_layer(hidden[name]) for name in names]
        self.out = _layer(policy["out"])
        self.std = np.exp(policy["logstdevs_1_Da"][0])
        self.obs_mean = np.zeros(len(self.hidden[0][0]))
        self.obs_std = 1.0
        normaliser = policy["obsnorm/Standardizer"]
        if normaliser["count"][()] > 0:  # of the observations that it has seen
            self.obs_mean = normaliser["mean_1_D"][0].astype(float)
            variance = normaliser["meansq_1_D"][0] - self.obs_mean**2
            self.obs_std = np.sqrt(np.maximum(0, variance)) + 1e-6

    def mean(self, observation: np.ndarray) -> np.ndarray:
        x = np.zeros(len(self.obs_mean))
        x[: len(observation)] = observation  # Ant-v1 also saw contact forces, nearly always zero
        x = (x - self.obs_mean) / self.obs_std
        for weight, bias in self.hidden:
            x = np.tanh(x @ weight + bias)
        weight, bias = self.out
        return x @ weight + bias

    def act(self, observation: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return self.mean(observation) + self.std * rng.standard_normal(len(self.std))


def _layer(group):
    """An affine layer: (weight (in, out), bias (out,))."""
    layer = group["AffineLayer"]
    return layer["W"][:], layer["b"][:].ravel()


def snapshots(path: str) -> Iterator[Snapshot]:
    with h5py.File(path) as file:
        for _, group in sorted(file["snapshots"].items()):
            yield Snapshot(group)


def collect(env: gym.Env, policy: Snapshot, rng: np.random.Generator, i: int) -> EpisodeBuffer:
    """The i-th episode, whose seed is i."""
    low = env.action_space.low
    high = env.action_space.high
    observations = [env.reset(seed=i)[0]]
    actions = []
    rewards = []
    terminations = []
    truncations = []
    done = False
    while not done:
        action = np.clip(policy.act(observations[-1], rng), low, high).astype(np.float32)
        observation, reward, terminated, truncated, _ = env.step(action)
        done = terminated or truncated
        observations.append(observation)
        actions.append(action)
        rewards.append(reward)
        terminations.append(terminated)
        truncations.append(truncated)
    return EpisodeBuffer(
        i,
        observations=observations,
        actions=actions,
        rewards=rewards,
        terminations=terminations,
        truncations=truncations,
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("env", choices=ENVS)
    parser.add_argument("log", help="the run's file")
    parser.add_argument("--steps", type=int, default=52_000, help="of all snapshots together")
    args = parser.parse_args()
    args.id = f"thirdparty/{args.env}/trpo-replay-v0"
    if args.id in minari.list_local_datasets():
        parser.error(f"there is a dataset {args.id} already; delete it first (minari delete {args.id})")
    return args


if __name__ == "__main__":
    args = parse_args()
    env_id, env_options = ENVS[args.env]
    env = gym.make(env_id, **env_options)
    rng = np.random.default_rng(0)
    policies = list(snapshots(args.log))
    buffers = []
    for policy in policies:
        steps = 0
        while steps < args.steps // len(policies):
            buffers.append(collect(env, policy, rng, len(buffers)))
            steps += len(buffers[-1].rewards)
    minari.create_dataset_from_buffers(
        args.id,
        buffers,
        env=env,
        eval_env=env,
        algorithm_name="TRPO",
        description="26 snapshots of one run, under their own action noise",
        author="manyteachers",
        author_email="-@-.org",
        code_permalink="examples/collect_trpo.py",
    )
    total = sum(len(buffer.rewards) for buffer in buffers)
    print(f"{args.id}: {len(buffers)} episodes, {total} steps")

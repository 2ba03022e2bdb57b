"""The built-in data's behaviour policies: train them again from nothing.

    python -m research.behaviour --env hopper

One PPO run for each task (Schulman et al. 2017, arXiv 1707.06347). Of the policies it passes through, ten
steady ones are retained, evenly spread in return from untrained to best, in
support/behaviours/<env>.safetensors (float16). support/collect.py makes datasets with them. The logs of the
bundled ones are in research/results/behaviour.

Needs Stable-Baselines3: pip install stable-baselines3==2.9.2
"""

import dataclasses
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import gymnasium as gym
import numpy as np
import safetensors.numpy
from tqdm import tqdm

import data
from support import UserError, cli, collect, environments, files

if TYPE_CHECKING:
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import VecNormalize
    from torch import nn

CANDIDATES = 40  # policies of which they are chosen, evenly spaced over training
STEADY = 0.1  # largest standard deviation of a chosen policy's return over episodes, of the best mean return
TRAIN_NOISE = 0.1  # standard deviation of the action noise in training, in units of half the action range
FIRST_EVALUATION_SEED = 10_000
PPO_STEPS = {
    "hopper": 3_000_000,
    "halfcheetah": 2_000_000,
    "halfcheetah-back": 2_000_000,
    "walker2d": 2_000_000,
    "ant": 3_000_000,
}
PPO_OPTIONS = {
    "learning_rate": lambda remaining: 3e-4 * remaining,
    "n_steps": 256,
    "batch_size": 256,
    "n_epochs": 10,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "policy_kwargs": {"net_arch": [64, 64], "log_std_init": -1.0},
}
N_ENVS = 16

Weights = dict[str, np.ndarray]  # of a policy, as collect.Behaviour takes them


@dataclasses.dataclass
class Config:
    env: Literal[tuple(PPO_STEPS)] = "hopper"  # a built-in task
    steps: int = 0  # environment steps of PPO; 0: the task's default
    seed: int = 0  # of PPO and its environments
    eval_episodes: int = 20  # episodes per candidate, without noise


# ---- training ----------------------------------------------------------------------------------------------


class NoisyActions(gym.ActionWrapper):
    """Adds Gaussian noise to the actions.

    PPO's own noise dies out, and what it then learns falls at the first push.
    """

    def action(self, action: np.ndarray) -> np.ndarray:
        low = self.action_space.low
        high = self.action_space.high
        noise = TRAIN_NOISE * (high - low) / 2 * self.np_random.standard_normal(len(low))
        return np.clip(action + noise, low, high).astype(np.float32)


def make_env(name: str) -> gym.Env:
    """The environment of a built-in task."""
    task = data.ENVS[name]
    return environments.make_env(task.id, task.options)


def affine(layers: Iterable["nn.Linear"]) -> Weights:
    """Layers as w0, b0, w1, b1, ...: w (in, out), b (out,), float16."""
    w = {}
    for i, layer in enumerate(layers):
        w[f"w{i}"] = layer.weight.detach().numpy().T.astype(np.float16)
        w[f"b{i}"] = layer.bias.detach().numpy().astype(np.float16)
    return w


def stacked(snapshots: list[Weights]) -> Weights:
    """Each weight of all snapshots as one array, contiguous: safetensors writes others as they lie."""
    return {k: np.ascontiguousarray(np.stack([w[k] for w in snapshots])) for k in snapshots[0]}


def weights(model: "PPO", vec: "VecNormalize") -> Weights:
    """A PPO policy's mean network (float16) and observation normaliser (float32)."""
    hidden0, _, hidden1, _ = model.policy.mlp_extractor.policy_net
    w = affine((hidden0, hidden1, model.policy.action_net))
    w["mean"] = vec.obs_rms.mean.astype(np.float32)
    w["std"] = np.sqrt(vec.obs_rms.var + vec.epsilon).astype(np.float32)
    return w


def train(cfg: Config) -> list[Weights]:
    """PPO on one task: the candidates, in order of training. Raises UserError without Stable-Baselines3."""
    import torch

    try:
        from stable_baselines3 import PPO
    except ImportError:
        raise UserError(
            "training behaviour policies needs Stable-Baselines3: pip install stable-baselines3==2.9.2"
        ) from None
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    torch.set_num_threads(1)  # networks this small lose by more
    total = cfg.steps or PPO_STEPS[cfg.env]
    envs = make_vec_env(lambda: NoisyActions(make_env(cfg.env)), n_envs=N_ENVS, seed=cfg.seed)
    vec = VecNormalize(envs, gamma=PPO_OPTIONS["gamma"])
    model = PPO("MlpPolicy", vec, **PPO_OPTIONS, seed=cfg.seed, device="cpu")
    candidates = []
    start = time.time()

    class Snapshots(BaseCallback):
        """Appends the policy to `candidates`, CANDIDATES times over training."""

        def _on_step(self) -> bool:
            if self.num_timesteps >= total * len(candidates) / CANDIDATES:
                candidates.append(weights(model, vec))
                mean_return = np.mean([episode["r"] for episode in model.ep_info_buffer] or [0.0])
                progress = f"step {self.num_timesteps:>8d} | return {mean_return:8.1f}"
                print(f"{cfg.env} {progress} | {time.time() - start:6.0f} s", flush=True)
            return True

    model.learn(total, callback=Snapshots())
    return [*candidates, weights(model, vec)]


# ---- choosing ----------------------------------------------------------------------------------------------


def evaluate(cfg: Config, candidates: list[Weights]) -> np.ndarray:
    """Returns (candidates, episodes) without noise."""
    env = make_env(cfg.env)
    rng = np.random.default_rng(cfg.seed)
    returns = np.empty((len(candidates), cfg.eval_episodes))
    for i, w in enumerate(tqdm(candidates, desc=f"evaluate {cfg.env}")):
        policy = collect.Behaviour(w)
        for j in range(cfg.eval_episodes):
            episode = collect.rollout(env, policy, 0.0, rng, FIRST_EVALUATION_SEED + j)
            returns[i, j] = episode["rewards"].sum()
    return returns


def choose(returns: np.ndarray, k: int) -> list[int]:
    """The k candidates whose mean returns are closest to an even grid from the lowest to the highest, lowest
    first.

    returns (candidates, episodes). Only steady ones: a policy that runs fast and falls every other time has a
    middling mean but some of the highest returns, and a teacher asked for those would imitate its falls.
    Raises UserError where none is steady.
    """
    mean = np.mean(returns, 1)
    std = np.std(returns, 1)
    best = max(mean)
    remaining = [i for i in range(len(mean)) if std[i] <= STEADY * best]
    if not remaining:
        raise UserError(
            f"none of {len(mean)} policies is steady (best mean return {best:.0f}): "
            f"train longer, or with another --seed"
        )
    highest = max(mean[remaining])
    lowest = min(mean[remaining])
    chosen = []
    for target in np.linspace(
        highest, lowest, min(k, len(remaining))
    ):  # from the best, which is always chosen
        distances = np.abs(mean[remaining] - target)
        chosen.append(remaining.pop(int(distances.argmin())))
    return sorted(chosen, key=lambda i: mean[i])


def main(cfg: Config) -> None:
    """Train, evaluate, choose and write the policies of a task."""
    if cfg.env not in PPO_STEPS:
        raise UserError(f"unknown env {cfg.env!r}; choose from {', '.join(sorted(PPO_STEPS))}")
    cli.at_least(cfg, steps=0, eval_episodes=1, seed=0)
    candidates = train(cfg)
    returns = evaluate(cfg, candidates)
    chosen = choose(returns, collect.N_SNAPSHOTS)
    policies = stacked([candidates[i] for i in chosen])
    policies["returns"] = returns[chosen].mean(1).astype(np.float32)
    collect.BEHAVIOURS.mkdir(exist_ok=True)
    files.write(collect.BEHAVIOURS / f"{cfg.env}.safetensors", safetensors.numpy.save(policies))
    text = " ".join(f"{x:.0f}" for x in policies["returns"])
    print(f"{cfg.env}: kept {len(chosen)} of {len(candidates)}, returns {text}")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)

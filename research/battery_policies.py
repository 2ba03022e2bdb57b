"""The battery's own behaviour policies: train them again from nothing, in ten minutes each.

    python -m research.battery_policies --algorithm sac --env hopper

SAC (Haarnoja et al. 2018, arXiv 1801.01290) of Stable-Baselines3 and TQC (Kuznetsov et al. 2020, arXiv
2005.04269) of sb3-contrib, with networks of 128-128. Their deterministic policies after a fifth, two, three,
four and five fifths of the training are kept, in float16, in research/battery/<algorithm>-<env>.safetensors;
research/battery.py makes datasets with them.

Needs: pip install stable-baselines3==2.9.2 sb3-contrib==2.9.2 gymnasium-robotics==1.4.2
"""

import dataclasses
import time
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import safetensors.numpy

import data
from research.behaviour import affine, stacked
from support import UserError, cli, environments, files

FOLDER = Path(__file__).parent / "battery"
BODIES = ("hopper", "halfcheetah", "walker2d", "ant")
# Gymnasium's id and options
ENVS = {name: data.ENVS[name][:2] for name in BODIES} | {"pen": ("AdroitHandPen-v1", {})}
SNAPSHOTS = 5  # policies retained of a training, evenly spaced
OPTIONS = {
    "learning_rate": 1e-3,
    "batch_size": 256,
    "learning_starts": 2000,
    "policy_kwargs": {"net_arch": [128, 128]},
}


@dataclasses.dataclass
class Config:
    algorithm: Literal["sac", "tqc"] = "sac"
    env: Literal[tuple(ENVS)] = "hopper"  # body
    steps: int = 100_000  # of the environment, one update each
    seed: int = 0


def main(cfg: Config) -> None:
    """Train and write the file. Raises UserError without the packages."""
    import torch

    try:
        import gymnasium_robotics
        from sb3_contrib import TQC
        from stable_baselines3 import SAC
    except ImportError as e:
        raise UserError(
            f"{e.name} is missing: pip install stable-baselines3==2.9.2 sb3-contrib==2.9.2 "
            f"gymnasium-robotics==1.4.2"
        ) from None
    torch.set_num_threads(1)
    gym.register_envs(gymnasium_robotics)
    env_id, options = ENVS[cfg.env]
    env = environments.make_env(env_id, options)
    model = {"sac": SAC, "tqc": TQC}[cfg.algorithm]("MlpPolicy", env, seed=cfg.seed, device="cpu", **OPTIONS)
    snapshots = []
    start = time.time()
    for i in range(SNAPSHOTS):
        model.learn(cfg.steps // SNAPSHOTS, reset_num_timesteps=i == 0)
        recent = np.mean([episode["r"] for episode in model.ep_info_buffer])
        progress = f"step {model.num_timesteps} | return {recent:.0f} | {time.time() - start:.0f} s"
        print(f"{cfg.algorithm} {cfg.env} | {progress}", flush=True)
        snapshots.append(weights(model.actor))
    blob = safetensors.numpy.save(stacked(snapshots))
    files.write(FOLDER / f"{cfg.algorithm}-{cfg.env}.safetensors", blob)


class Actor:
    """The deterministic policy of one snapshot: observation (O,) -> action (A,) in [-1, 1]."""

    def __init__(self, weights: dict[str, np.ndarray]):
        self.weights = weights

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        w = self.weights
        x = np.maximum(obs @ w["w0"] + w["b0"], 0)
        x = np.maximum(x @ w["w1"] + w["b1"], 0)
        return np.tanh(x @ w["w2"] + w["b2"])


def weights(actor) -> dict[str, np.ndarray]:
    """An actor's layers: w0, w1, w2 (in, out) and b0, b1, b2 (out,), float16."""
    return affine((actor.latent_pi[0], actor.latent_pi[2], actor.mu))


if __name__ == "__main__":
    cli.run(main, Config, __doc__)

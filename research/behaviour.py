"""The built-in collector's behaviour policies: what stands in for a download when there is no network.

    python -m research.behaviour --env hopper     # trains hopper's policies again from nothing (README: how long that takes)

One PPO run per task (Schulman et al. 2017, arXiv 1707.06347; Stable-Baselines3's implementation, which is needed by this
one command only: pip install stable-baselines3==2.9.2). Of the policies it passed through, ten steady ones are kept, evenly
spread in return from untrained to best, in behaviours/<env>.safetensors (float16). Collecting needs none of that: data.py rolls the
snapshots out with numpy alone, through `collect`, and writes a Minari dataset.
"""

import dataclasses
import time

import gymnasium as gym
import numpy as np
import safetensors.numpy
from tqdm import tqdm

import data
from support import UserError, cli, collect, environments, files

CANDIDATES = 40  # of which they are chosen, evenly spaced over training
STEADY = 0.1  # largest standard deviation of a kept policy's return over episodes, of the best policy's mean
TRAIN_NOISE = 0.1  # the same while PPO trains
PPO_STEPS = {
    "hopper": 3_000_000,
    "halfcheetah": 2_000_000,
    "halfcheetah-back": 2_000_000,
    "walker2d": 2_000_000,
    "ant": 3_000_000,
}


@dataclasses.dataclass
class Config:
    env: str = "hopper"  # a key of data.ENVS
    steps: int = 0  # environment steps of PPO; 0: the task's own number in PPO_STEPS
    seed: int = 0  # of PPO and its environments
    eval_episodes: int = 20  # per candidate, without noise


# ---- training: Stable-Baselines3's PPO -------------------------------------------------------------------------------


def weights(model, vec) -> dict:
    """A PPO policy's mean network and its normaliser, as the arrays Policy reads."""
    h0, _, h1, _ = model.policy.mlp_extractor.policy_net
    w = {"mean": vec.obs_rms.mean, "std": np.sqrt(vec.obs_rms.var + vec.epsilon)}
    for i, layer in enumerate((h0, h1, model.policy.action_net)):
        w[f"w{i}"], w[f"b{i}"] = layer.weight.detach().numpy().T, layer.bias.detach().numpy()
    half = {k: v.astype(np.float16) for k, v in w.items() if k not in ("mean", "std")}
    return half | {k: w[k].astype(np.float32) for k in ("mean", "std")}


def train(cfg: Config) -> list[dict]:
    """PPO on one task; returns the candidates' weights, in the order of training."""
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

    class Shaken(
        gym.ActionWrapper
    ):  # PPO's own noise dies out, and what it learns then falls at the first push
        def action(self, a):
            low, high = self.action_space.low, self.action_space.high
            return np.clip(
                a + TRAIN_NOISE * (high - low) / 2 * self.np_random.standard_normal(len(low)), low, high
            ).astype(np.float32)

    torch.set_num_threads(1)  # networks this small lose by more
    total = cfg.steps or PPO_STEPS[cfg.env]
    vec = VecNormalize(
        make_vec_env(
            lambda: Shaken(environments.make_env(*data.ENVS[cfg.env][:2])), n_envs=16, seed=cfg.seed
        ),
        gamma=0.99,
    )
    model = PPO("MlpPolicy", vec, learning_rate=lambda left: 3e-4 * left, n_steps=256, batch_size=256, n_epochs=10, gamma=0.99, gae_lambda=0.95,
                policy_kwargs=dict(net_arch=[64, 64], log_std_init=-1.0), seed=cfg.seed, device="cpu")  # fmt: skip
    kept, start = [], time.time()

    class Keep(BaseCallback):
        def _on_step(self):
            if self.num_timesteps >= total * len(kept) / CANDIDATES:
                kept.append(weights(model, vec))
                r = np.mean([e["r"] for e in model.ep_info_buffer] or [0.0])
                print(
                    f"{cfg.env} step {self.num_timesteps:>8d} | return {r:8.1f} | {time.time() - start:6.0f} s",
                    flush=True,
                )
            return True

    model.learn(total, callback=Keep())
    return [*kept, weights(model, vec)]


def choose(returns, k: int) -> list[int]:
    """returns (candidates, episodes) -> k candidates whose mean returns lie nearest to an even grid from the lowest to the highest, lowest first.

    Only steady ones: a policy that runs fast and falls every other time has a middling mean but some of the highest returns,
    and a teacher asked for those would imitate its falls.
    """
    mean, std = np.mean(returns, 1), np.std(returns, 1)
    left, out = [i for i in range(len(mean)) if std[i] <= STEADY * max(mean)], []
    if not left:
        raise UserError(
            f"none of {len(mean)} policies is steady (best mean return {max(mean):.0f}): train longer, or with another --seed"
        )
    for target in np.linspace(
        max(mean[left]), min(mean[left]), min(k, len(left))
    ):  # the best is chosen first, so it is always kept
        out.append(min(left, key=lambda i: abs(mean[i] - target)))
        left.remove(out[-1])
    return sorted(out, key=lambda i: mean[i])


def main(cfg: Config):
    if cfg.env not in PPO_STEPS:
        raise UserError(f"unknown env {cfg.env!r}; choose from {', '.join(sorted(PPO_STEPS))}")
    cli.at_least(cfg, steps=0, eval_episodes=1, seed=0)
    candidates = train(cfg)
    env, rng = environments.make_env(*data.ENVS[cfg.env][:2]), np.random.default_rng(cfg.seed)
    returns = np.array([[collect.rollout(env, collect.Behaviour(w), 0.0, rng, 10_000 + i)["rewards"].sum() for i in range(cfg.eval_episodes)]
                        for w in tqdm(candidates, desc=f"evaluate {cfg.env}")])  # fmt: skip
    keep = choose(returns, collect.N_SNAPSHOTS)
    stacked = {
        k: np.ascontiguousarray(np.stack([candidates[i][k] for i in keep])) for k in candidates[0]
    }  # safetensors writes memory as it lies
    stacked["returns"] = returns[keep].mean(1).astype(np.float32)
    collect.BEHAVIOURS.mkdir(exist_ok=True)
    files.write(collect.BEHAVIOURS / f"{cfg.env}.safetensors", safetensors.numpy.save(stacked))
    print(
        f"{cfg.env}: kept {len(keep)} of {len(candidates)}, returns "
        + " ".join(f"{r:.0f}" for r in stacked["returns"])
    )


if __name__ == "__main__":
    cli.run(main, Config, __doc__)

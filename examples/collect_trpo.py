"""Make a dataset of policies that nobody here trained: 26 snapshots of one TRPO run, rolled out under their own action noise.

    curl -LO https://raw.githubusercontent.com/openai/imitation/8a2ed905e2ac54bda0f71e5ee364e90568e6d031/expert_policies/modern/log_Hopper-v1_4.h5
    python examples/collect_trpo.py hopper log_Hopper-v1_4.h5      # Minari dataset thirdparty/hopper/trpo-replay-v0

The others: log_HalfCheetah-v1_2.h5, log_Walker2d-v1_1.h5, log_Ant-v1_0.h5 (Ho and Ermon 2016, arXiv 1606.03476; MIT licence).
"""

import argparse

import gymnasium as gym
import h5py
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer

ENVS = {"hopper": ("Hopper-v5", {}), "halfcheetah": ("HalfCheetah-v5", {}), "walker2d": ("Walker2d-v5", {}),
        "ant": ("Ant-v5", {"include_cfrc_ext_in_observation": False})}  # fmt: skip
parser = argparse.ArgumentParser()
parser.add_argument("env", choices=ENVS)
parser.add_argument("log", help="the run's file")
parser.add_argument("--steps", type=int, default=52_000, help="of all snapshots together")
args = parser.parse_args()
id_ = f"thirdparty/{args.env}/trpo-replay-v0"
if id_ in minari.list_local_datasets():
    parser.error(f"there is a dataset {id_} already; delete it first (minari delete {id_})")


def snapshots(path):
    """Yield each snapshot's policy, (observation, rng) -> action: two tanh layers between an observation normaliser and a Gaussian."""
    with h5py.File(path) as file:
        for _, snapshot in sorted(file["snapshots"].items()):
            policy = snapshot["GaussianPolicy"]
            norm, hidden = policy["obsnorm/Standardizer"], policy["hidden/FeedforwardNet"]
            layers = [
                hidden[k]["AffineLayer"] for k in sorted(hidden, key=lambda k: int(k.split("_")[1]))
            ] + [policy["out/AffineLayer"]]
            layers = [(x["W"][:], x["b"][:].ravel()) for x in layers]
            mean, std = np.zeros(layers[0][0].shape[0]), 1.0
            if norm["count"][()] > 0:  # it has seen something
                mean = norm["mean_1_D"][0].astype(float)
                std = np.sqrt(np.maximum(0, norm["meansq_1_D"][0] - mean**2)) + 1e-6
            sigma = np.exp(policy["logstdevs_1_Da"][0])

            def act(observation, rng, layers=layers, mean=mean, std=std, sigma=sigma):
                x = np.zeros(len(mean))
                x[: len(observation)] = observation  # Ant-v1 also saw contact forces, nearly always zero
                x = (x - mean) / std
                for W, b in layers[:-1]:
                    x = np.tanh(x @ W + b)
                return x @ layers[-1][0] + layers[-1][1] + sigma * rng.standard_normal(len(sigma))

            yield act


env, rng, policies, buffers = (
    gym.make(ENVS[args.env][0], **ENVS[args.env][1]),
    np.random.default_rng(0),
    list(snapshots(args.log)),
    [],
)
for act in policies:
    steps = 0
    while steps < args.steps // len(policies):
        observations, actions, rewards, terminations, truncations, done = (
            [env.reset(seed=len(buffers))[0]],
            [],
            [],
            [],
            [],
            False,
        )
        while not done:
            actions.append(
                np.clip(act(observations[-1], rng), env.action_space.low, env.action_space.high).astype(
                    np.float32
                )
            )
            observation, reward, terminated, truncated, _ = env.step(actions[-1])
            done = terminated or truncated
            observations.append(observation)
            rewards.append(reward)
            terminations.append(terminated)
            truncations.append(truncated)
        steps += len(rewards)
        buffers.append(
            EpisodeBuffer(
                len(buffers),
                observations=observations,
                actions=actions,
                rewards=rewards,
                terminations=terminations,
                truncations=truncations,
            )
        )
minari.create_dataset_from_buffers(
    id_, buffers, env=env, eval_env=env, algorithm_name="TRPO", description="26 snapshots of one run, under their own action noise",
    author="manyteachers", author_email="-@-.org", code_permalink="examples/collect_trpo.py")  # fmt: skip
print(f"{id_}: {len(buffers)} episodes, {sum(len(b.rewards) for b in buffers)} steps")

"""Make a dataset of one's own, here of discrete actions: episodes of CartPole under a hand-written policy, some of its actions random.

python examples/collect_cartpole.py          # Minari dataset cartpole/mixed-v0
python teacher.py --dataset cartpole/mixed-v0
"""

import argparse

import gymnasium as gym
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer

parser = argparse.ArgumentParser()
parser.add_argument("--id", default="cartpole/mixed-v0")
parser.add_argument("--episodes", type=int, default=300)
args = parser.parse_args()
if args.id in minari.list_local_datasets():
    parser.error(
        f"there is a dataset {args.id} already; give another --id, or delete it (minari delete {args.id})"
    )

env, rng, buffers = gym.make("CartPole-v1"), np.random.default_rng(0), []
for i in range(args.episodes):
    random, done = (0.1, 0.3, 0.5, 0.7, 1.0)[i % 5], False  # how many of the actions
    observations, actions, rewards, terminations, truncations = [env.reset(seed=i)[0]], [], [], [], []
    while not done:
        place, speed, angle, spin = observations[-1]
        towards = int(angle + 0.3 * spin + 0.05 * place + 0.1 * speed > 0)
        actions.append(int(rng.integers(2)) if rng.random() < random else towards)
        observation, reward, terminated, truncated, _ = env.step(actions[-1])
        done = terminated or truncated
        observations.append(observation)
        rewards.append(reward)
        terminations.append(terminated)
        truncations.append(truncated)
    buffers.append(
        EpisodeBuffer(
            i,
            observations=observations,
            actions=actions,
            rewards=rewards,
            terminations=terminations,
            truncations=truncations,
        )
    )
minari.create_dataset_from_buffers(
    args.id, buffers, env=env, eval_env=env, algorithm_name="hand-written", description="10, 30, 50, 70 or 100 % of an episode's actions random",
    author="manyteachers", author_email="-@-.org", code_permalink="examples/collect_cartpole.py")  # fmt: skip
print(f"{args.id}: {args.episodes} episodes, {sum(len(b.rewards) for b in buffers)} steps")

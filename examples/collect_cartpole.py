"""Make a dataset of your own, here with discrete actions: CartPole, by a hand-written policy and at random.

python examples/collect_cartpole.py          # Minari dataset cartpole/mixed-v0
python teacher.py --dataset cartpole/mixed-v0
"""

import argparse

import gymnasium as gym
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer

RANDOM_SHARES = (0.1, 0.3, 0.5, 0.7, 1.0)  # of an episode's actions; episodes take turns


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--id", default="cartpole/mixed-v0")
    parser.add_argument("--episodes", type=int, default=300)
    args = parser.parse_args()
    if args.id in minari.list_local_datasets():
        parser.error(
            f"there is a dataset {args.id} already; give another --id, or delete it (minari delete {args.id})"
        )
    return args


def balance(observation: np.ndarray) -> int:
    """A linear controller: 1 pushes the cart to the right, 0 to the left."""
    position, velocity, angle, angular_velocity = observation
    return int(angle + 0.3 * angular_velocity + 0.05 * position + 0.1 * velocity > 0)


def collect(env: gym.Env, rng: np.random.Generator, i: int) -> EpisodeBuffer:
    """The i-th episode, whose seed is i."""
    random_share = RANDOM_SHARES[i % len(RANDOM_SHARES)]
    observations = [env.reset(seed=i)[0]]
    actions = []
    rewards = []
    terminations = []
    truncations = []
    done = False
    while not done:
        at_random = rng.random() < random_share
        action = int(rng.integers(2)) if at_random else balance(observations[-1])
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


if __name__ == "__main__":
    args = parse_args()
    env = gym.make("CartPole-v1")
    rng = np.random.default_rng(0)
    buffers = [collect(env, rng, i) for i in range(args.episodes)]
    minari.create_dataset_from_buffers(
        args.id,
        buffers,
        env=env,
        eval_env=env,
        algorithm_name="hand-written",
        description="10, 30, 50, 70 or 100 % of an episode's actions random",
        author="manyteachers",
        author_email="-@-.org",
        code_permalink="examples/collect_cartpole.py",
    )
    steps = sum(len(buffer.rewards) for buffer in buffers)
    print(f"{args.id}: {args.episodes} episodes, {steps} steps")

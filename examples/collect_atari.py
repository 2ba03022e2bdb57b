"""Make a dataset of an Atari game, by a policy that follows the ball, with noise and at random.

pip install ale-py
python examples/collect_atari.py --game pong          # Minari dataset atari/pong/scripted-v0
python teacher.py --dataset atari/pong/scripted-v0 --import ale_py --context 2 --batch-size 64
"""

import argparse
from typing import NamedTuple

import ale_py
import gymnasium as gym
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer

MAX_STEPS = 400  # of an episode, four frames each
RANDOM_SHARES = (0.0, 0.05, 0.1, 0.2, 1.0)  # of an episode's actions; episodes take turns


class Game(NamedTuple):
    env_id: str
    ball: int  # where the game's memory holds the ball's coordinate along which the paddle moves
    paddle: int  # and the paddle's
    offset: int  # from the paddle's coordinate to its middle
    less: int  # the action that makes it smaller
    more: int
    height: int  # where the memory holds what is 0 without a ball


GAMES = {
    "pong": Game("ALE/Pong-v5", ball=54, paddle=51, offset=6, less=2, more=3, height=54),
    "breakout": Game("ALE/Breakout-v5", ball=99, paddle=72, offset=6, less=3, more=2, height=101),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--game", choices=GAMES, default="pong")
    parser.add_argument("--id", help="of the dataset; default: atari/<game>/scripted-v0")
    parser.add_argument("--episodes", type=int, default=50)
    args = parser.parse_args()
    args.id = args.id or f"atari/{args.game}/scripted-v0"
    if args.id in minari.list_local_datasets():
        parser.error(
            f"there is a dataset {args.id} already; give another --id, or delete it (minari delete {args.id})"
        )
    return args


def follow(game: Game, memory: np.ndarray) -> int:
    """The action that moves the paddle towards the ball; without a ball: FIRE, which serves it."""
    if memory[game.height] == 0:
        return 1
    distance = int(memory[game.ball]) - int(memory[game.paddle]) - game.offset
    if abs(distance) <= 4:
        return 0
    return game.more if distance > 0 else game.less


def collect(env: gym.Env, game: Game, rng: np.random.Generator, i: int) -> EpisodeBuffer:
    """The i-th episode, whose seed is i."""
    random_share = RANDOM_SHARES[i % len(RANDOM_SHARES)]
    observations = [env.reset(seed=i)[0]]
    actions = []
    rewards = []
    terminations = []
    truncations = []
    done = False
    while not done:
        if rng.random() < random_share:
            action = int(rng.integers(env.action_space.n))
        else:
            action = follow(game, env.unwrapped.ale.getRAM())
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
    game = GAMES[args.game]
    gym.register_envs(ale_py)
    env = gym.make(game.env_id, obs_type="grayscale", max_episode_steps=MAX_STEPS)
    rng = np.random.default_rng(0)
    minari.create_dataset_from_buffers(
        args.id,
        [collect(env, game, rng, i) for i in range(args.episodes)],
        env=env,
        eval_env=env,
        algorithm_name="hand-written",
        description="follows the ball; 0, 5, 10, 20 or 100 % of an episode's actions random",
        author="manyteachers",
        author_email="-@-.org",
        code_permalink="examples/collect_atari.py",
    )
    episodes = minari.load_dataset(args.id).iterate_episodes()
    returns = np.array([episode.rewards.sum() for episode in episodes])
    for i, share in enumerate(RANDOM_SHARES):
        of_share = returns[i :: len(RANDOM_SHARES)]
        print(f"{share:.0%} random: return {of_share.mean():.1f} +- {of_share.std():.1f}")

"""Act with an exported policy; needs numpy, onnxruntime and gymnasium alone.

python examples/act_onnx.py out/student/hopper.onnx --episodes 20
"""

import argparse
import importlib
import json
import re
from pathlib import Path

import gymnasium as gym
import numpy as np
import onnxruntime


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", help="written by export.py, its card beside it")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--target", type=float, help="return to ask for; default: the card's target")
    parser.add_argument("--seed", type=int, default=1000, help="of the first episode; episode i has seed + i")
    parser.add_argument("--import", dest="imports", nargs="*", default=[], help="packages of environments")
    return parser.parse_args()


def vector(observation, parts: list[dict] | None) -> np.ndarray:
    """(1, O) of an observation; parts: the card's observation_space, None: a Box. See support/spaces.py."""
    if parts is None:
        return np.float32(observation).reshape(1, -1)
    numbers = []
    for part in parts:
        x = observation
        for key in part["path"]:
            x = x[key]
        if part["kind"] == "one-hot":
            for value, size, first in zip(np.ravel(x), part["sizes"], part["first"], strict=True):
                numbers.append(np.eye(size)[value - first])
        elif part["kind"] == "text":
            words = re.findall(r"\w+", x.lower())
            at = [
                [1 + position / 10 for position, w in enumerate(words) if w == word] for word in part["words"]
            ]
            numbers.append([sum(positions) for positions in at])
        else:
            numbers.append(np.ravel(x))
    return np.concatenate(numbers, dtype=np.float32)[None]


def play(session: onnxruntime.InferenceSession, env: gym.Env, card: dict, target: float, seed: int) -> float:
    """One episode; returns its return."""
    observation, _ = env.reset(seed=seed)
    action = np.zeros((1, *card["action_shape"]), card["action_type"])
    memory = np.zeros((1, card["memory"]), np.float32)
    episode_return = 0.0
    return_to_go = target
    for t in range(card["max_steps"]):
        inputs = {
            "observation": vector(observation, card.get("observation_space")),
            "return_to_go": np.float32([return_to_go]),
            "last_action": action,
            "timestep": np.array([t]),
            "memory": memory,
        }
        action, memory = session.run(None, inputs)
        observation, reward, terminated, truncated, _ = env.step(action[0].reshape(env.action_space.shape))
        episode_return += reward
        return_to_go -= reward
        if terminated or truncated:
            break
    return episode_return


if __name__ == "__main__":
    args = parse_args()
    for name in args.imports:
        importlib.import_module(name)
    card_path = Path(args.file.replace(".int8", "")).with_suffix(".json")
    card = json.loads(card_path.read_text())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(args.file, options, providers=["CPUExecutionProvider"])
    env = gym.make(card["environment"], max_episode_steps=card["max_steps"], **card["environment_options"])
    target = card["target"] if args.target is None else args.target
    returns = []
    for i in range(args.episodes):
        returns.append(play(session, env, card, target, args.seed + i))
    mean = np.mean(returns)
    std = np.std(returns)
    print(f"{card['task']}: return {mean:.1f} +- {std:.1f} over {args.episodes} episodes")

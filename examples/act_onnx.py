"""Act with an exported policy; needs numpy, onnxruntime and gymnasium alone.

python examples/act_onnx.py out/student/hopper.onnx --episodes 20
python examples/act_onnx.py out/student/all-tasks.onnx --task hopper
"""

import argparse
import importlib
import json
import math
import re
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import onnxruntime


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", help="written by export.py, its card beside it")
    parser.add_argument("--task", help="of a file of all tasks: its name in the card")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--target", type=float, help="return to ask for; default: the card's target")
    parser.add_argument("--seed", type=int, default=1000, help="of the first episode; episode i has seed + i")
    parser.add_argument("--import", dest="imports", nargs="*", default=[], help="packages of environments")
    return parser.parse_args()


def vector(observation, parts: list[dict] | None) -> np.ndarray:
    """(1, O + P) of an observation, its pixels last; parts: the card's observation_space, None: a Box.

    See support/spaces.py.
    """
    if parts is None:
        return np.float32(observation).reshape(1, -1)
    numbers = []
    pixels = []
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
        elif part["kind"] == "symbols":
            for plane, values in zip(channels(x), part["values"], strict=True):
                numbers.append(np.ravel(plane[..., None] == np.array(values, int)))
        elif part["kind"] == "image":
            pixels.append(np.ravel(resized(x, *part["pixels"])))
        else:
            numbers.append(np.ravel(x))
    return np.concatenate([*numbers, *pixels], dtype=np.float32)[None]


def channels(image: np.ndarray) -> np.ndarray:
    """(c, H, W): of three axes the shorter of the first and the last one holds channels."""
    if image.ndim == 2:
        return image[None]
    return image if image.shape[0] < image.shape[2] else np.moveaxis(image, 2, 0)


def resized(image: np.ndarray, c: int, height: int, width: int) -> np.ndarray:
    """(c, height, width) of an image, averaged over areas; of one in colour, grey."""
    planes = np.float32(channels(image))
    if len(planes) == 3 and c == 1:
        planes = (0.299 * planes[0] + 0.587 * planes[1] + 0.114 * planes[2])[None]
    means = []
    for n, m in zip(planes.shape[1:], (height, width), strict=True):
        ends = np.arange(m + 1)[:, None] * (n / m)
        overlap = np.minimum(ends[1:], np.arange(n) + 1) - np.maximum(ends[:-1], np.arange(n))
        means.append(np.float32(overlap.clip(0) * (m / n)))
    return np.rint(means[0] @ planes @ means[1].T)


def card_of(path: Path, task: str | None) -> dict:
    """The card of a file; of a file of all tasks the one of this task, with the file's widths."""
    card = json.loads(path.read_text())
    if "tasks" not in card:
        return card
    names = [of_task["task"] for of_task in card["tasks"]]
    if task not in names:
        sys.exit(f"--task {task}: the file has {', '.join(names)}")
    return card | card["tasks"][names.index(task)]


def make_env(card: dict) -> gym.Env:
    """A task's environment, in wrappers of packages that are imported."""
    env = gym.make(card["environment"], max_episode_steps=card["max_steps"], **card["environment_options"])
    for wrapper in card.get("environment_wrappers", []):
        module, name = wrapper["entry_point"].split(":")
        wrapper_class = getattr(sys.modules[module], name)
        assert issubclass(wrapper_class, gym.Wrapper), wrapper
        env = wrapper_class(env, **wrapper["kwargs"])
    return env


def play(session: onnxruntime.InferenceSession, env: gym.Env, card: dict, target: float, seed: int) -> float:
    """One episode; returns its return."""
    observation, _ = env.reset(seed=seed)
    several = "index" in card  # a file of all tasks
    if several:
        action = np.zeros((1, card["action_width"]), np.float32)
    else:
        action = np.zeros((1, *card["action_shape"]), card["action_type"])
    memory = np.zeros((1, card["memory"]), np.float32)
    episode_return = 0.0
    return_to_go = target
    for t in range(card["max_steps"]):
        x = vector(observation, card.get("observation_space"))
        inputs = {
            "return_to_go": np.float32([return_to_go]),
            "last_action": action,
            "timestep": np.array([t]),
            "memory": memory,
        }
        if card["observation"]:
            inputs["observation"] = x[:, : card["observation"]]
        if card.get("pixels"):
            inputs["pixels"] = x[:, card["observation"] :].reshape(1, *card["pixels"]).astype(np.uint8)
        if several:
            padding = card["observation_width"] - card["observation"]
            inputs["observation"] = np.pad(inputs["observation"], ((0, 0), (0, padding)))
            inputs["task"] = np.array([card["index"]])
        action, memory = session.run(None, inputs)
        taken = action[0]
        if several:  # the first of the numbers
            taken = taken[: math.prod(card["action_shape"])].astype(card["action_type"])
        observation, reward, terminated, truncated, _ = env.step(taken.reshape(env.action_space.shape))
        episode_return += reward
        return_to_go -= reward
        if terminated or truncated:
            break
    return episode_return


if __name__ == "__main__":
    args = parse_args()
    for name in args.imports:
        importlib.import_module(name)
    card = card_of(Path(args.file.replace(".int8", "")).with_suffix(".json"), args.task)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(args.file, options, providers=["CPUExecutionProvider"])
    env = make_env(card)
    target = card["target"] if args.target is None else args.target
    returns = []
    for i in range(args.episodes):
        returns.append(play(session, env, card, target, args.seed + i))
    mean = np.mean(returns)
    std = np.std(returns)
    print(f"{card['task']}: return {mean:.1f} +- {std:.1f} over {args.episodes} episodes")

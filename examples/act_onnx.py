"""Act with an exported policy: numpy, onnxruntime and gymnasium alone.

python examples/act_onnx.py out/student/hopper.onnx --episodes 20
"""

import argparse
import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import onnxruntime

parser = argparse.ArgumentParser()
parser.add_argument("file")
parser.add_argument("--episodes", type=int, default=20)
parser.add_argument("--target", type=float, help="return to ask for; default: the data's 95th percentile")
parser.add_argument("--seed", type=int, default=1000, help="of the first episode; episode i has seed + i")
args = parser.parse_args()

card = json.loads(Path(args.file.replace(".int8", "")).with_suffix(".json").read_text())
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(args.file, options, providers=["CPUExecutionProvider"])
env = gym.make(card["environment"], max_episode_steps=card["max_steps"], **card["environment_options"])

returns = []
for i in range(args.episodes):
    observation, _ = env.reset(seed=args.seed + i)
    left = card["targets"]["p95"] if args.target is None else args.target
    action, memory = (
        np.zeros((1, *card["action_shape"]), card["action_type"]),
        np.zeros((1, card["memory"]), np.float32),
    )
    returns.append(0.0)
    for t in range(card["max_steps"]):
        action, memory = session.run(None, {
            "observation": np.float32(observation).reshape(1, -1), "return_to_go": np.float32([left]), "last_action": action,
            "timestep": np.array([t]), "memory": memory})  # fmt: skip
        observation, reward, terminated, truncated, _ = env.step(action[0].reshape(env.action_space.shape))
        left, returns[-1] = left - reward, returns[-1] + reward
        if terminated or truncated:
            break
print(f"{card['task']}: return {np.mean(returns):.1f} +- {np.std(returns):.1f} over {args.episodes} episodes")

"""support/onnx_teacher.py: an ONNX file's policy against the same function in float64, and a student of it.

Hostile files: test_hostile.py.
"""

import argparse
import math
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import onnx
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import data
import distill
import evaluate
import forked
import model as dt
import report
import teacher
from conftest import make_dataset, seeds
from examples import collect_cartpole
from examples import onnx_teacher as example
from kernels.kl import LOG_STD
from support import UserError, files, onnx_teacher, spaces
from support.onnx_teacher import SIGMA, OnnxTeacher


def a_task(O: int = 3, A: int = 2, seed: int = 0, **fields) -> data.Task:
    """A task of random statistics and bounds."""
    rng = np.random.default_rng(seed)
    low = rng.normal(size=A)
    given = {
        "name": "tests/walk-v0",
        "dataset": "tests/walk-v0",
        "env_id": None,
        "env_kwargs": {},
        "max_steps": 10,
        "obs_dim": O,
        "act_dim": A,
        "obs_mean": rng.normal(size=O).tolist(),
        "obs_std": rng.uniform(0.1, 9, O).tolist(),
        "act_low": low.tolist(),
        "act_high": (low + rng.uniform(0.1, 5, A)).tolist(),
        "rtg_scale": rng.uniform(0.5, 2000),
        "targets": {"p95": 8.0, "median": 2.0},
        "reference": (1.0, 5.0),
        "reference_source": "-",
        "split_seed": 0,
    }
    return data.Task(**{**given, **fields})


def write(
    path: Path,
    nodes: list,
    inputs: dict,
    outputs: dict,
    weights: dict | None = None,
    types: dict | None = None,
) -> Path:
    """An ONNX file. inputs, outputs: their shapes; weights: arrays, by name; types: of what is no float."""
    types = types or {}
    infos = []
    for shapes in (inputs, outputs):
        of_shapes = []
        for name, shape in shapes.items():
            of_shapes.append(helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), shape))
        infos.append(of_shapes)
    initializers = []
    for name, w in (weights or {}).items():
        w = np.asarray(w)
        initializers.append(numpy_helper.from_array(w if w.dtype == np.int64 else np.float32(w), name))
    graph = helper.make_graph(nodes, "policy", *infos, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


class Function:
    """y = observation W + b + return_to_go c, as a file and as a function."""

    def __init__(self, O: int, A: int, seed: int):
        rng = np.random.default_rng(seed)
        self.W = np.float32(rng.normal(size=(O, A)))
        self.b = np.float32(rng.normal(size=A))
        self.c = np.float32(rng.normal(size=(1, A)) / 1000)
        self.log_std = np.float32(rng.normal(size=A) * 4 - 2)  # beyond LOG_STD too

    def __call__(self, observation: np.ndarray, return_to_go: np.ndarray | float = 0.0) -> np.ndarray:
        return observation @ self.W.astype(float) + self.b + np.reshape(return_to_go, (-1, 1)) * self.c

    def write(self, path: Path, name: str = "action", log_std: str = "", rtg: str = "") -> Path:
        """name: of the output. log_std: "(A,)", "(B, A)" or none; rtg: likewise, "(B,)" or "(B, 1)"."""
        O, A = self.W.shape
        node = helper.make_node
        nodes = [node("Gemm", ["observation", "W", "b"], ["x"])]
        inputs = {"observation": ["B", O]}
        outputs = {name: ["B", A]}
        weights = {"W": self.W, "b": self.b}
        column = np.array([-1, 1])
        if rtg:
            inputs["return_to_go"] = ["B", 1] if rtg == "(B, 1)" else ["B"]
            nodes.append(node("Constant", [], ["column"], value=numpy_helper.from_array(column)))
            nodes.append(node("Reshape", ["return_to_go", "column"], ["R"]))
            nodes.append(node("Gemm", ["R", "c", "x"], [name]))
            weights["c"] = self.c
        else:
            nodes.append(node("Identity", ["x"], [name]))
        if log_std:
            outputs["log_std"] = ["B", A] if log_std == "(B, A)" else [A]
            weights["s"] = self.log_std
            nodes.append(node("Mul", [name, "zero"], ["zeros"]))
            weights["zero"] = np.zeros(1)
            of_rows = node("Add", ["zeros", "s"], ["log_std"])
            nodes.append(of_rows if log_std == "(B, A)" else node("Identity", ["s"], ["log_std"]))
        return write(path, nodes, inputs, outputs, weights)


class Average:
    """The mean over a history of observations W, returns v, timesteps u and, where they are taken, actions X.

    As a file and as a function. The present action and what is padded are zeros, by agreement.
    """

    WEIGHTS = {"observations": "W", "actions": "X", "returns_to_go": "v", "timesteps": "u"}

    def __init__(self, O: int, A: int, seed: int):
        rng = np.random.default_rng(seed)
        self.weights = {"W": rng.normal(size=(O, A)), "X": rng.normal(size=(A, A))}
        self.weights |= {"v": rng.normal(size=(1, A)) / 1000, "u": rng.normal(size=(1, A))}
        self.weights = {name: np.float32(w) for name, w in self.weights.items()}

    def __call__(self, *timesteps: tuple) -> np.ndarray:
        """timesteps: (observation, action, return_to_go, timestep), arrays (N, .), the last action zeros."""
        total = 0.0
        for parts in timesteps:
            for x, w in zip(parts, self.weights_of(self.WEIGHTS), strict=True):
                total = total + np.asarray(x, float) @ w
        return total / len(timesteps)

    def weights_of(self, names) -> list[np.ndarray]:
        return [self.weights[self.WEIGHTS[name]].astype(float) for name in names]

    def write(self, path: Path, K: int, names=tuple(WEIGHTS), output: str = "action", rank: int = 2) -> Path:
        """names: of the inputs besides mask. rank: of returns_to_go."""
        node = helper.make_node
        O, A = self.weights["W"].shape
        shapes = {"observations": ["B", K, O], "actions": ["B", K, A]}
        shapes |= {"returns_to_go": ["B", K, 1][:rank], "timesteps": ["B", K], "mask": ["B", K]}
        types = {"timesteps": TensorProto.INT64, "mask": TensorProto.BOOL}
        inputs = {name: shapes[name] for name in (*names, "mask")}
        nodes = [node("Cast", ["mask"], ["m"], to=TensorProto.FLOAT)]
        nodes.append(node("ReduceSum", ["m", "one"], ["n"], keepdims=1))  # (B, 1) valid timesteps
        for name in names:
            x = name
            if name == "timesteps":
                nodes.append(node("Cast", [name], [x := "t"], to=TensorProto.FLOAT))
            if len(inputs[name]) == 2:
                nodes.append(node("Unsqueeze", [x, "two"], [x := f"{name} 3"]))
            nodes.append(node("ReduceSum", [x, "one"], [f"{name} sum"], keepdims=0))
            nodes.append(node("MatMul", [f"{name} sum", self.WEIGHTS[name]], [f"{name} y"]))
        nodes.append(node("Sum", [f"{name} y" for name in names], ["y"]))
        nodes.append(node("Div", ["y", "n"], [output]))
        used = {self.WEIGHTS[name]: self.weights[self.WEIGHTS[name]] for name in names}
        axes = {"one": np.array([1]), "two": np.array([2])}
        return write(path, nodes, inputs, {output: ["B", A]}, {**used, **axes}, types)


def a_batch(task: data.Task, B: int, K: int, seed: int) -> tuple[torch.Tensor, ...]:
    """What a model is called with, besides the task's index: the last timesteps of each row are valid."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(B, K, task.obs_dim, generator=generator)
    rtg = torch.rand(B, K, generator=generator)
    mask = torch.arange(K) >= torch.randint(K, (B, 1), generator=generator)
    states[~mask] = float("nan")  # what is masked must not matter
    return states, torch.zeros(B, K, task.act_dim), rtg, torch.zeros(B, K, dtype=torch.long), mask


# ---- the policy --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rtg", ["", "(B,)", "(B, 1)"])
@pytest.mark.parametrize("log_std", ["", "(A,)", "(B, A)"])
@settings(max_examples=10)
@given(O=st.integers(1, 5), A=st.integers(1, 4), B=st.integers(1, 6), K=st.integers(1, 4), seed=seeds)
def test_onnx_teacher__is_its_function_in_the_students_units(
    tmp_path_factory, rtg, log_std, O, A, B, K, seed
):
    task = a_task(O, A, seed)
    f = Function(O, A, seed)
    path = f.write(tmp_path_factory.mktemp("onnx") / "a.onnx", "mean" if seed % 2 else "action", log_std, rtg)
    batch = a_batch(task, B, K, seed)
    mean, got_log_std = OnnxTeacher(path, task)(0, *batch)
    states, _, returns, _, mask = batch
    observation = states[mask].double().numpy() * task.obs_std + task.obs_mean
    return_to_go = returns[mask].double().numpy() * task.rtg_scale
    low, high = np.array([task.act_low, task.act_high])
    y = f(observation, return_to_go if rtg else 0.0)
    expected = 2 * (y - low) / (high - low) - 1
    error = np.abs(mean[mask].numpy() - expected.clip(-1, 1)).max()
    assert error < 1e-5 * (1 + np.abs(expected).max()) / (high - low).min()
    expected = np.log(SIGMA) if not log_std else f.log_std - np.log((high - low) / 2)
    expected = np.broadcast_to(np.clip(expected, *LOG_STD), (int(mask.sum()), A))
    assert np.abs(got_log_std[mask].numpy() - expected).max() < 1e-6
    assert not mean[~mask].any() and not got_log_std[~mask].any()
    assert mean.dtype == torch.float32 and mean.shape == (B, K, A)


def test_onnx_teacher__gives_log_probabilities_of_discrete_actions(tmp_path):
    task = a_task(A=3, first_action=4)
    f = Function(3, 3, seed=1)
    model = OnnxTeacher(f.write(tmp_path / "a.onnx", "logits"), task)
    batch = a_batch(task, 5, 2, seed=0)
    logp, zeros = model(0, *batch)
    mask = batch[-1]
    logits = f(batch[0][mask].double().numpy() * task.obs_std + task.obs_mean)
    assert torch.allclose(logp[mask], torch.from_numpy(logits).log_softmax(-1).float(), atol=1e-4)
    assert not zeros.any()
    model.reset(0.0, 6)
    observation = np.random.default_rng(0).normal(size=(6, 3)) * 5
    assert model.act(observation, np.zeros(6)).tolist() == (f(observation).argmax(1) + 4).tolist()


def test_onnx_teacher__gives_log_probabilities_of_each_factor(tmp_path):
    task = a_task(A=5, first_action=[4, -1], factors=[2, 3])
    f = Average(3, 5, seed=1)
    model = OnnxTeacher(f.write(tmp_path / "a.onnx", 2, ("observations", "actions"), "logits"), task)
    batch = a_batch(task, 5, 2, seed=0)
    logp, zeros = model(0, *batch)
    for part in logp[batch[-1]].split([2, 3], -1):
        assert torch.allclose(part.exp().sum(-1), torch.ones(len(part)))
    assert not zeros.any()
    observation = np.random.default_rng(0).normal(size=(2, 6, 3)) * 5
    model.reset(0.0, 6)
    first = model.act(observation[0], np.zeros(6))
    second = model.act(observation[1], np.zeros(6))
    W, X = f.weights_of(("observations", "actions"))
    one_hot = np.concatenate((np.eye(2)[first[:, 0] - 4], np.eye(3)[first[:, 1] + 1]), 1)
    logits = observation.sum(0) @ W + one_hot @ X
    assert second.tolist() == np.stack((logits[:, :2].argmax(1) + 4, logits[:, 2:].argmax(1) - 1), 1).tolist()


def test_onnx_teacher__takes_masked_logits(tmp_path):
    f = Function(3, 2, seed=0)
    f.b[1] = -np.inf
    task = a_task(first_action=0)
    logp, _ = OnnxTeacher(f.write(tmp_path / "a.onnx", "logits"), task)(0, *a_batch(task, 2, 1, seed=0))
    assert logp.isfinite().all()
    assert (logp.argmax(-1) == 0).all()


def test_onnx_teacher__acts_on_its_mean_and_asks_for_what_is_left(tmp_path):
    task = a_task()
    f = Function(3, 2, seed=0)
    model = OnnxTeacher(f.write(tmp_path / "a.onnx", "mean", "(A,)", "(B,)"), task)
    observation = np.random.default_rng(0).normal(size=(4, 3)) / 5
    model.reset(np.array([100.0, 0.0, 0.0, 200.0]), 4)
    first = model.act(observation, np.zeros(4))
    expected = f(observation, np.array([100.0, 0.0, 0.0, 200.0])).clip(task.act_low, task.act_high)
    assert np.allclose(first, expected, atol=1e-4)
    model.keep(np.array([True, False, False, True]))
    second = model.act(observation[[0, 3]], np.array([70.0, -500.0]))
    returns = np.array([30.0, 700.0])
    expected = f(observation[[0, 3]], returns).clip(task.act_low, task.act_high)
    assert np.allclose(second, expected, atol=1e-4)


class CleanRLAgent(torch.nn.Module):
    """The actor of CleanRL's ppo_continuous_action.py: mean by an MLP, one log-std for all observations."""

    def __init__(self, O: int, A: int):
        super().__init__()
        widths = (O, 64, 64, A)
        layers = []
        for i in range(3):
            layers += [torch.nn.Linear(widths[i], widths[i + 1]), torch.nn.Tanh()]
        self.actor_mean = torch.nn.Sequential(*layers[:-1])
        self.actor_logstd = torch.nn.Parameter(torch.full((1, A), -0.5))


def cleanrl_env() -> gym.Env:
    """Its make_env's observations: those of Pendulum, normalised and clipped."""
    env = gym.wrappers.NormalizeObservation(gym.make("Pendulum-v1"))
    space = Box(-10, 10, (3,))
    return gym.wrappers.TransformObservation(env, lambda x: np.clip(x, -10, 10), space)


def test_example__exports_a_cleanrl_agent(tmp_path):
    torch.manual_seed(0)
    agent = CleanRLAgent(3, 1)
    env = cleanrl_env()
    env.reset(seed=0)
    for _ in range(100):
        seen = env.step(np.zeros(1, np.float32))[0]  # normalised by the statistics as of now
    rms = env.get_wrapper_attr("obs_rms")
    example.export(example.Actor(agent.actor_mean, agent.actor_logstd, rms), tmp_path / "a.onnx", 3)
    task = a_task(3, 1, act_low=[-2.0], act_high=[2.0])
    model = OnnxTeacher(tmp_path / "a.onnx", task)
    assert model.n_params >= sum(p.numel() for p in agent.parameters())
    observation = env.unwrapped._get_obs().astype(float)
    mean, log_std = model.policy({"observations": observation[None, None]})
    with torch.no_grad():
        expected = agent.actor_mean(torch.from_numpy(seen).float())
    assert np.allclose(mean[0], expected / 2, atol=1e-5)
    assert np.allclose(log_std, -0.5 - math.log(2), atol=1e-6)
    # far from what it has seen, the clipping counts
    mean, _ = model.policy({"observations": np.full((1, 1, 3), 1e4)})
    with torch.no_grad():
        expected = agent.actor_mean(torch.full((3,), 10.0))
    assert np.allclose(mean[0], expected / 2, atol=1e-5)


class PPOPolicy(torch.nn.Module):
    """What examples/onnx_teacher.py reads of Stable-Baselines3's ActorCriticPolicy."""

    def __init__(self, O: int, A: int, discrete: bool):
        super().__init__()
        self.mlp_extractor = torch.nn.Module()
        self.mlp_extractor.policy_net = torch.nn.Sequential(torch.nn.Linear(O, 64), torch.nn.Tanh())
        self.action_net = torch.nn.Linear(64, A)
        if not discrete:
            self.log_std = torch.nn.Parameter(torch.full((A,), -1.0))


@pytest.mark.parametrize("discrete", [False, True])
def test_example__exports_a_stable_baselines_ppo(tmp_path, discrete):
    torch.manual_seed(0)
    task = a_task(first_action=0) if discrete else a_task(act_low=[-1.0, -1.0], act_high=[1.0, 1.0])
    ppo = PPOPolicy(3, 2, discrete)
    mean, std = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, 1.0])
    path = tmp_path / "policy.onnx"
    rms = argparse.Namespace(mean=mean.double().numpy(), var=std.double().numpy() ** 2)
    example.export(example.actor_of_ppo(ppo, rms), path, observations=3)
    observation = torch.randn(50, 3) * 9
    got, log_std = OnnxTeacher(path, task).policy({"observations": observation.double().numpy()[:, None]})
    with torch.no_grad():
        y = ppo.action_net(ppo.mlp_extractor.policy_net(((observation - mean) / std).clamp(-10, 10)))
    expected = y.log_softmax(-1) if discrete else y.clamp(-1, 1)
    assert np.allclose(got, expected, atol=1e-5)
    assert np.allclose(log_std, 0.0 if discrete else -1.0)


# ---- policies with a history -------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 4096])
@settings(max_examples=20)
@given(A=st.integers(1, 3), context=st.integers(1, 5), K=st.integers(1, 5), seed=seeds)
def test_onnx_teacher__sees_the_timesteps_of_a_window_up_to_each(
    tmp_path_factory, at_once, A, context, K, seed
):
    task = a_task(3, A, seed)
    f = Average(3, A, seed)
    path = f.write(tmp_path_factory.mktemp("onnx") / "a.onnx", K, rank=2 + seed % 2)
    states, _, rtg, timesteps, mask = a_batch(task, 6, context, seed)
    generator = torch.Generator().manual_seed(seed)
    actions = torch.rand(6, context, A, generator=generator) * 2 - 1
    timesteps = timesteps + torch.arange(context)
    rtg[~mask] = actions[~mask] = float("nan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_teacher, "AT_ONCE", at_once)
        mean, _ = OnnxTeacher(path, task)(0, states, actions, rtg, timesteps, mask)
    low, high = np.array([task.act_low, task.act_high])
    for b, i in mask.nonzero().tolist():
        history = []
        for j in range(max(0, i - K + 1), i + 1):
            if mask[b, j]:
                observation = states[b, j].double().numpy() * task.obs_std + task.obs_mean
                action = low + (actions[b, j].double().numpy() + 1) / 2 * (high - low)
                return_to_go = rtg[b, j].item() * task.rtg_scale
                history.append((observation, action * (j < i), [return_to_go], [timesteps[b, j].item()]))
        y = f(*history)
        expected = (2 * (y - low) / (high - low) - 1).clip(-1, 1)
        error = np.abs(mean[b, i].numpy() - expected).max()
        assert error < 1e-4 * (1 + np.abs(y).max()) / (high - low).min()


def test_onnx_teacher__acts_on_the_history_of_its_own_episode(tmp_path):
    task = a_task(act_low=[-90.0, -90.0], act_high=[90.0, 90.0])
    f = Average(3, 2, seed=0)
    model = OnnxTeacher(f.write(tmp_path / "a.onnx", 3), task)
    rng = np.random.default_rng(0)
    model.reset(np.array([100.0, 50.0]), 2)
    past = []
    return_to_go = np.array([100.0, 50.0])
    for t in range(6):
        if t == 4:  # the first episode ends
            model.keep(np.array([False, True]))
            return_to_go = return_to_go[1:]
            past = [tuple(x[1:] for x in timestep) for timestep in past]
        E = len(return_to_go)
        observation = rng.normal(size=(E, 3))
        reward = rng.normal(size=E) * 9 * (t > 0)
        return_to_go = return_to_go - reward
        present = (observation, np.zeros((E, 2)), return_to_go[:, None], np.full((E, 1), t))
        action = model.act(observation, reward)
        assert np.allclose(action, f(*past[-2:], present), atol=1e-3)
        past.append((observation, action, *present[2:]))


def test_onnx_teacher__remembers_discrete_actions_as_one_hot(tmp_path):
    task = a_task(3, 3, first_action=4)
    f = Average(3, 3, seed=0)
    model = OnnxTeacher(f.write(tmp_path / "a.onnx", 2, ("observations", "actions"), "logits"), task)
    observation = np.random.default_rng(0).normal(size=(2, 5, 3))
    model.reset(0.0, 5)
    first = model.act(observation[0], np.zeros(5))
    assert len(set(first)) > 1
    second = model.act(observation[1], np.zeros(5))
    W, X = f.weights_of(("observations", "actions"))
    logits = observation.sum(0) @ W + np.eye(3)[first - 4] @ X
    assert second.tolist() == (logits.argmax(1) + 4).tolist()


# ---- what is refused ---------------------------------------------------------------------------------------


def write_of_images(path: Path, shape: list, dtype: int = TensorProto.UINT8) -> Path:
    """logits = the channels' mean pixels M, of images of this shape."""
    nodes = [
        helper.make_node("Cast", ["pixels"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["x"], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["means", "M"], ["logits"]),
    ]
    M = np.random.default_rng(0).normal(size=(shape[1], 3)) / 30
    return write(path, nodes, {"pixels": shape}, {"logits": ["B", 3]}, {"M": M}, {"pixels": dtype})


def task_of_images(shape=(2, 40, 36), n: int = 3) -> data.Task:
    """Of images of two channels and of n numbers."""
    space = spaces.describe(gym.spaces.Dict({"a": Box(-1, 1, (n,)), "b": Box(0, 255, shape, np.uint8)}), "it")
    bounds = {"act_low": [0.0] * 3, "act_high": [1.0] * 3}
    return a_task(O=n, A=3, first_action=0, obs_space=space, **bounds)


@pytest.mark.parametrize("dtype", [TensorProto.UINT8, TensorProto.FLOAT])
@pytest.mark.parametrize("frames", [1, 3])
def test_onnx_teacher__sees_the_last_frames(tmp_path, frames, dtype):
    task = task_of_images()
    policy = OnnxTeacher(write_of_images(tmp_path / "x.onnx", ["B", 2 * frames, 40, 36], dtype), task)
    assert policy.cfg.context == frames
    assert policy.takes_history == (frames > 1)
    M = numpy_helper.to_array(onnx.load(tmp_path / "x.onnx").graph.initializer[0]).astype(float)
    rng = np.random.default_rng(1)
    B, K = 5, 4
    pixels = rng.integers(0, 256, (B, K, 2 * 40 * 36), dtype=np.uint8)
    mask = torch.arange(K) >= torch.arange(B)[:, None] % K
    states, actions, rtg, timesteps, _ = a_batch(task, B, K, 0)
    logp, zeros = policy(0, states, actions, rtg, timesteps, mask, torch.from_numpy(pixels))
    assert not zeros.any()
    policy.reset(0.0, B)
    means = pixels.reshape(B, K, 2, -1).mean(-1) * mask.numpy()[..., None]  # before an episode: zeros
    for k in range(K):
        stack = np.zeros((B, frames, 2))
        for back in range(min(frames, k + 1)):
            stack[:, -1 - back] = means[:, k - back]
        wanted = torch.from_numpy(stack.reshape(B, -1) @ M).log_softmax(-1)
        valid = mask[:, k]
        assert torch.allclose(logp[valid, k].double(), wanted[valid], atol=1e-4)
        vectors = np.concatenate((np.zeros((B, 3)), pixels[:, k] * mask.numpy()[:, k, None]), 1)
        assert np.array_equal(policy.act(vectors, np.zeros(B))[valid], wanted.argmax(-1)[valid])


def test_onnx_teacher__sees_the_present_frame_beside_a_longer_history(tmp_path):
    nodes = [
        helper.make_node("Cast", ["pixels"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["x"], ["most"], axes=[2, 3], keepdims=0),
        helper.make_node("ReduceMax", ["observations"], ["unused"]),
        helper.make_node("MatMul", ["most", "M"], ["logits"]),
    ]
    shapes = {"pixels": ["B", 2, 40, 36], "observations": ["B", 3, 3]}
    file = write(tmp_path / "x.onnx", nodes, shapes, {"logits": ["B", 3]}, {"M": np.ones((2, 3)) * [0, 1, 2]})
    policy = OnnxTeacher(file, task_of_images())
    assert policy.cfg.context == 3
    policy.reset(0.0, 1)
    for brightness in (1, 0, 3):
        vector = np.full((1, 3 + 2 * 40 * 36), brightness)
        policy.act(vector, np.zeros(1))
        wanted = torch.tensor([0.0, 2 * brightness, 4 * brightness]).log_softmax(0)
        assert np.allclose(policy.policy(policy.history)[0], wanted)


def test_onnx_teacher__refuses_images_of_other_sizes(tmp_path):
    message = r"takes pixels \['B', 3, 40, 36\], dataset .* has pixels \(B, K 2, 40, 36\); put --teachers"
    with pytest.raises(UserError, match=message):
        OnnxTeacher(write_of_images(tmp_path / "x.onnx", ["B", 3, 40, 36]), task_of_images())
    with pytest.raises(UserError, match="takes pixels .*, dataset tests/walk-v0 has no images"):
        OnnxTeacher(write_of_images(tmp_path / "x.onnx", ["B", 2, 40, 36]), a_task(A=3, first_action=0))


def wrong(path: Path, kind: str) -> None:
    """Write a file that is no policy of a_task()."""
    f = Function(3, 2, seed=0)
    copy = [helper.make_node("Identity", ["observation"], ["action"])]
    if kind == "inputs":
        names = {"observation": ["B", 3], "memory": ["B", 7]}
        write(path, [helper.make_node("Concat", [*names], ["action"], axis=1)], names, {"action": ["B", 10]})
    elif kind == "outputs":
        f.write(path, "value")
    elif kind == "discrete":
        f.write(path, "logits")
    elif kind == "image":
        write(path, copy, {"observation": ["B", 3, 8, 8]}, {"action": ["B", 3, 8, 8]})
    elif kind == "fixed":
        write(path, copy, {"observation": [1, 3]}, {"action": [1, 3]})
    elif kind == "observations":
        Function(5, 2, seed=0).write(path)
    elif kind == "unnamed observations":
        weights = {"W": np.zeros((5, 2))}
        nodes = [helper.make_node("MatMul", ["observation", "W"], ["action"])]
        write(path, nodes, {"observation": ["B", "O"]}, {"action": ["B", 2]}, weights)
    elif kind == "actions":
        Function(3, 4, seed=0).write(path)
    elif kind == "log_std":
        nodes = [helper.make_node("Identity", ["observation"], [name]) for name in ("x", "log_std")]
        nodes.append(helper.make_node("MatMul", ["x", "W"], ["action"]))
        outputs = {"action": ["B", 2], "log_std": ["B", 3]}
        write(path, nodes, {"observation": ["B", 3]}, outputs, {"W": np.zeros((3, 2))})
    elif kind == "nan":
        f.W[:] = np.nan
        f.write(path)
    elif kind == "integers":
        nodes = [helper.make_node("Cast", ["observation"], ["action"], to=TensorProto.INT64)]
        write(path, nodes, {"observation": ["B", 3]}, {"action": ["B", 3]})
        model = onnx.load(path)
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
        path.write_bytes(model.SerializeToString())
    elif kind == "elsewhere":
        model = onnx.load(f.write(path))
        tensor = model.graph.initializer[0]
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="weights.bin")
        (path.parent / "weights.bin").write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
        path.write_bytes(model.SerializeToString())
    elif kind == "custom":
        nodes = [helper.make_node("Mine", ["observation"], ["action"], domain="mine")]
        write(path, nodes, {"observation": ["B", 3]}, {"action": ["B", 3]})
    elif kind == "loop":
        write(
            path, [helper.make_node("Loop", ["n", ""], ["action"])], {"observation": ["B", 3]}, {"action": []}
        )
    elif kind == "damaged":
        path.write_bytes(f.write(path).read_bytes()[:-50])
    elif kind == "names":
        path.write_bytes(f.write(path).read_bytes().replace(b"observation", b"observatio\xff"))
    elif kind == "operator":
        path.write_bytes(f.write(path).read_bytes().replace(b"Gemm", b"Gem\xff"))
    elif kind == "functions":
        model = onnx.load(f.write(path))
        opset = [helper.make_opsetid("", 17)]
        model.functions.append(helper.make_function("mine", "Mine", ["x"], ["y"], [], opset))
        path.write_bytes(model.SerializeToString())
    elif kind.startswith("history"):
        f = Average(4 if "observations" in kind else 3, 3 if "actions" in kind else 2, seed=0)
        f.write(path, {"any": "K", "none": 0, "long": 2000}.get(kind.split()[-1], 4))
        model = onnx.load(path)
        if "lengths" in kind:
            model.graph.input[1].type.tensor_type.shape.dim[1].dim_value = 5
        elif "integers" in kind:
            model.graph.input[3].type.tensor_type.elem_type = TensorProto.FLOAT
        path.write_bytes(model.SerializeToString())
    elif kind == "empty":
        path.write_bytes(b"")


REFUSED = {
    "inputs": r"inputs .*'memory'.* understood are inputs observation .*run directory",
    "outputs": r"outputs \['value'\]; understood",
    "discrete": r"actions are continuous: .*\['logits'\]",
    "image": r"\['B', 3, 8, 8\]",
    "fixed": r"takes batches of 1 alone; export .* dynamic first dimension of observation",
    "observations": r"takes 5 observations, dataset tests/walk-v0 has 3",
    "unnamed observations": r"does not run on 3 observations of 3 numbers",
    "actions": r"gives action \(3, 4\) for 3 observations, dataset tests/walk-v0 needs \(3, 2\)",
    "log_std": r"gives log_std \(3, 3\)",
    "nan": r"gives action NaN",
    "integers": r"action is not an array of floats",
    "elsewhere": r"keeps weights in other files; export it as one",
    "custom": r"no ONNX file that onnxruntime can run .*export it again",
    "loop": r"holds loops or functions",
    "damaged": r"no ONNX file that onnxruntime can run .*export it again",
    "names": r"no ONNX file that onnxruntime can run .*utf-8",
    "operator": r"no ONNX file that onnxruntime can run",
    "functions": r"holds loops or functions",
    "history observations": r"takes 4 observations, dataset tests/walk-v0 has 3",
    "history actions": r"takes 3 actions, dataset tests/walk-v0 has 2",
    "history lengths": r"takes observations of 4, actions of 5, returns_to_go of 4, .* with one fixed number",
    "history integers": r"'timesteps' tensor\(float\) .*; understood are .*history",
    "history any": r"takes observations of K, .* timesteps; .* one fixed number of 1 to 1024",
    "history none": r"takes observations of 0, ",
    "history long": r"takes observations of 2000, ",
    "empty": r"no ONNX file that onnxruntime can run .*export it again",
    "missing": r"can't read .*No such file",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_onnx_teacher__refuses(tmp_path, monkeypatch, capfd, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "policy.onnx"
    wrong(path, kind)
    with pytest.raises(UserError, match=REFUSED[kind]) as e:
        OnnxTeacher(path, a_task())
    assert "\n" not in str(e.value)
    assert str(path) in str(e.value)
    assert capfd.readouterr() == ("", "")


def test_onnx_teacher__refuses_means_for_discrete_actions(tmp_path):
    path = Function(3, 2, seed=0).write(tmp_path / "a.onnx")
    with pytest.raises(UserError, match="actions are discrete"):
        OnnxTeacher(path, a_task(first_action=0))


def test_onnx_teacher__stops_at_nan_later(tmp_path):
    nodes = [helper.make_node("Log", ["observation"], ["action"])]
    path = write(tmp_path / "a.onnx", nodes, {"observation": ["B", 2]}, {"action": ["B", 2]})
    task = a_task(2, 2, obs_mean=[1.0, 1.0], obs_std=[1.0, 1.0])
    model = OnnxTeacher(path, task)
    with pytest.raises(UserError, match="gives action NaN"):
        model.reset(0.0, 1)
        model.act(-np.ones((1, 2)), np.zeros(1))


def test_onnx_teacher__is_tried_beside_threads(tmp_path):
    """After a fork, libraries wait for ever for threads that only the parent has."""
    path = Function(3, 2, seed=0).write(tmp_path / "a.onnx")
    n = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        x = torch.randn(600, 600, requires_grad=True)
        (x @ x).exp().sum().backward()  # PyTorch's threads, those of autograd too
        start = time.monotonic()
        for _ in range(3):
            OnnxTeacher(path, a_task())
        assert time.monotonic() - start < 5
        (x @ x).sum().backward()
    finally:
        torch.set_num_threads(n)


# ---- a student of it ---------------------------------------------------------------------------------------

HOPPER = "tests/onnx-hopper-v0"
CARTPOLE = "tests/onnx-cartpole-v0"
TINY = {"steps": 20, "batch_size": 16, "n_layer": 1, "n_embd": 16, "warmup": 5, "log_interval": 10}
TINY |= {"eval_episodes": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def two_teachers(tmp_path_factory) -> tuple[Path, Path]:
    """An ONNX file of a cart pole; and a run directory of a hopper, context 4."""
    root = tmp_path_factory.mktemp("teachers")
    spaces = {"observation_space": Box(-1, 1, (4,)), "action_space": Discrete(2)}
    make_dataset(HOPPER, [9, 5, 23, 4, 12, 7], obs_dim=11, act_dim=3, spec="Hopper-v5")
    make_dataset(CARTPOLE, [9, 15, 23, 4, 12, 7], spec="CartPole-v1", **spaces)
    cfg = teacher.Config(dataset=HOPPER, context=4, out_dir=str(root / "hopper"), **TINY)
    f = Function(4, 2, seed=0)
    f.W = np.float32(2 * [[0, 0]] + [[-3, 3], [-1, 1]])  # pushes to the side that the pole falls to
    f.b *= 0
    return f.write(root / "cartpole.onnx", "logits"), teacher.main(cfg)


def distilled(two_teachers: tuple[Path, Path], out: Path, **options) -> None:
    teachers = tuple(map(str, two_teachers))
    options = {"datasets": (CARTPOLE, HOPPER), **TINY, **options}
    distill.main(distill.Config(teachers=teachers, out_dir=str(out), **options))


@pytest.mark.parametrize("targets", ["cached", "live"])
def test_distill__mixes_run_directories_and_onnx_files(two_teachers, tmp_path, targets, capsys):
    distilled(two_teachers, tmp_path, targets=targets, steps=60, lr=1e-2)
    log = files.read_csv(tmp_path / "log.csv")
    kl = log[f"heldout_kl_{CARTPOLE}"]
    kl = kl[~np.isnan(kl)]
    assert kl[-1] < kl[0] / 2
    meta = files.read_json(tmp_path / "model.json")
    of_teacher = meta["teachers"][CARTPOLE]
    task = data.load(CARTPOLE).task
    model = OnnxTeacher(two_teachers[0], task)
    returns, *_ = evaluate.play(model, task, 0.0, 2, evaluate.SEED)
    assert of_teacher["return_mean"] == returns.mean() > 60
    assert of_teacher["target"] == returns.mean()  # it is asked for nothing
    assert of_teacher["sweep"] is None and of_teacher["data"]["episodes"] == 5
    metrics = files.read_json(tmp_path / "metrics.json")
    of_student = metrics["tasks"][CARTPOLE]
    assert of_student["retention"] == of_student["normalized_score"] / of_teacher["normalized_score"]
    of_hopper = dt.load(two_teachers[1])[0].n_params
    assert metrics["compression"] == (of_hopper + 10) / metrics["parameters"]
    assert meta["config"]["context"] == 4
    report.main(report.Config(runs=(str(tmp_path),), film_steps=0))
    evaluate.main(evaluate.Config(str(tmp_path), eval_episodes=1, sweep=True, device="cpu"))
    assert f"{CARTPOLE}: {two_teachers[0]} returns" in capsys.readouterr().out


def test_distill__asks_a_file_without_return_to_go_in_other_states(two_teachers, tmp_path):
    options = {"datasets": (CARTPOLE,), "ask": 0.5}
    distilled(two_teachers[:1], tmp_path, steps=60, lr=1e-2, **options)
    kl = files.read_csv(tmp_path / "log.csv")[f"heldout_kl_{CARTPOLE}"]
    kl = kl[~np.isnan(kl)]
    assert kl[-1] < kl[0] / 2


def test_distill__sweeps_a_file_that_takes_return_to_go(two_teachers, tmp_path):
    path = Function(4, 2, seed=0).write(tmp_path / "a.onnx", "logits", rtg="(B,)")
    distilled((path,), tmp_path / "student", datasets=(CARTPOLE,), ask=0.5)
    meta = files.read_json(tmp_path / "student/model.json")
    of_teacher = meta["teachers"][CARTPOLE]
    task = data.load(CARTPOLE).task
    assert meta["config"]["context"] == 1
    assert [row["target"] for row in of_teacher["sweep"]] == sorted(task.targets.values())
    assert [row["episodes"] for row in of_teacher["sweep"]] == [1] * len(task.targets)
    assert of_teacher["target"] == task.target
    assert of_teacher["target_gap"] > 0


def test_distill__gives_the_student_the_context_of_a_teachers_history(two_teachers, tmp_path):
    names = ("observations", "actions")
    path = Average(4, 2, seed=0).write(tmp_path / "a.onnx", 4, names, "logits")
    distilled((path, two_teachers[1]), tmp_path / "mixed")
    assert files.read_json(tmp_path / "mixed/model.json")["config"]["context"] == 4
    distilled((path,), tmp_path / "alone", datasets=(CARTPOLE,), targets="live")
    assert files.read_json(tmp_path / "alone/model.json")["config"]["context"] == 4
    path = Average(4, 2, seed=0).write(tmp_path / "b.onnx", 3, names, "logits")
    with pytest.raises(UserError, match=r"different context lengths \[3, 4\]; .* histories of as many"):
        distilled((path, two_teachers[1]), tmp_path / "refused")


def test_example__controller_teaches_a_student(two_teachers, tmp_path):
    forked.python("examples/onnx_teacher.py balance.onnx --controller", tmp_path)
    path = tmp_path / "balance.onnx"
    model = OnnxTeacher(path, data.load(CARTPOLE).task)
    observation = np.random.default_rng(0).normal(size=(99, 4))
    model.reset(0.0, 99)
    by_hand = [collect_cartpole.balance(x) for x in observation]
    assert model.act(observation, np.zeros(99)).tolist() == by_hand
    distilled((path,), tmp_path / "student", datasets=(CARTPOLE,))
    assert files.read_json(tmp_path / "student/model.json")["teachers"][CARTPOLE]["return_mean"] == 500


def test_distill__without_evaluation_knows_no_retention(two_teachers, tmp_path):
    distilled(two_teachers, tmp_path, eval_episodes=0)
    assert files.read_json(tmp_path / "metrics.json")["tasks"][CARTPOLE]["retention"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"datasets": ()}, "cartpole.onnx: an ONNX file names no dataset; name each teacher's with"),
        ({"datasets": (CARTPOLE,)}, "2 --teachers for 1 tasks"),
        ({"ask": 0.5, "state_noise": 0.0}, "--ask 0.5: .*cartpole.onnx takes no return_to_go"),
        ({"datasets": (HOPPER, HOPPER)}, "whose actions are continuous"),
    ],
)
def test_distill__refuses(two_teachers, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        distilled(two_teachers, tmp_path, **options)
    assert not (tmp_path / "model.json").exists()


def test_read__refuses_a_file_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_teacher, "MAX_BYTES", 100)
    with pytest.raises(UserError, match="larger than 100 bytes"):
        OnnxTeacher(Function(3, 2, seed=0).write(tmp_path / "a.onnx"), a_task())

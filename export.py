"""Export a teacher or a student to ONNX: a file for each task, with everything in it that acting needs but the memory of the episode.

    python export.py out/student                 # out/student/hopper.onnx, hopper.json, ...
    python export.py out/student --int8          # and hopper.int8.onnx: weights quantised to 8 bits
    python export.py out/student --int8 --eval-episodes 20    # and what the files' own episodes return

Inputs, all with a batch in front (of any size, or of --batch): observation (B, O) and return_to_go (B,) in the environment's units, last_action (B, A), or (B,)
int64 of discrete ones (any at first), timestep (B,) int64, 0 at first, memory (B, M), zeros at first. Outputs: action, as last_action, in the environment's
units, and next_memory, which is the next step's memory. Rows of a batch may be at timesteps of their own. examples/act_onnx.py drives it with numpy and
onnxruntime alone.

The JSON beside each file is its card: sizes, environment, returns to ask for, what the run measured, how far the file is from the model.
"""

import contextlib
import dataclasses
import importlib.util
import io
import logging
import platform
import tempfile
import time
import warnings
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

import data
import evaluate
import model as dt
from policy import Actor, Policy
from support import UserError, cli, files, log

OPSET = 23  # of ONNX 1.18; onnxruntime reads it from 1.23 on


@dataclasses.dataclass
class Config:
    run: Annotated[str, tyro.conf.Positional]  # a run directory of teacher.py or distill.py
    batch: int = 0  # size of the batch; 0: any
    int8: bool = False  # also write a file of weights in 8 bits (onnxruntime's dynamic quantisation)
    eval_episodes: int = 0  # of each file, in its task's environment; 0: none
    overwrite: bool = False  # replace files that are there


class Step(torch.nn.Module):
    """One step of policy.Actor as a function of what it is given: no state, raw units."""

    def __init__(self, model, task: data.Task, index: int):
        super().__init__()
        self.model, self.task, self.index = model, task, index
        self.actor = Actor(model, index, 1, 1)
        self.actor.restart(slice(None))
        self.actor.time = self  # not a table of all timesteps, which would be most of a small file
        L, (_, _, nh, n, hs) = len(self.actor.caches), self.actor.caches[0].shape
        self.shape = (2, L, nh, n, hs)  # of an episode's memory
        embed = model.embed_action, model.embed_rtg, model.embed_state
        self.bias = torch.stack([e.bias[index] for e in embed]).detach()

    def __getitem__(self, timestep):
        steps = (timestep[:, None] - torch.tensor([1, 0, 0])).clamp_min(0)  # of a_{t-1}, R_t, s_t
        return (self.model.embed_time(dt.waves(steps.to(self.bias.dtype))) + self.bias).flatten(1)

    def forward(self, observation, return_to_go, last_action, timestep, memory):
        t, actor = self.task, self.actor
        mean, std, low, high = (torch.tensor(x) for x in (t.obs_mean, t.obs_std, t.act_low, t.act_high))
        actor.t, actor.caches = (
            timestep,
            list(memory.view(-1, *self.shape).permute(2, 1, 0, 3, 4, 5).unbind(0)),
        )
        last = (
            torch.eye(t.act_dim)[(last_action - t.first_action).clamp(0, t.act_dim - 1)]
            if t.discrete
            else 2 * (last_action - low) / (high - low) - 1
        )
        a = Actor.act.__wrapped__(actor, (observation - mean) / std, return_to_go / t.rtg_scale, last)
        memory = torch.stack(actor.caches).permute(2, 1, 0, 3, 4, 5).flatten(1)
        return (
            a.argmax(1) + t.first_action
            if t.discrete
            else ((a + 1) / 2 * (high - low) + low).clamp(low, high)
        ), memory

    def inputs(self, B):
        t = self.task
        timestep = torch.zeros(B, dtype=torch.long)
        action = torch.zeros(B, dtype=torch.long) if t.discrete else torch.zeros(B, t.act_dim)
        return (
            torch.zeros(B, t.obs_dim),
            torch.zeros(B),
            action,
            timestep,
            torch.zeros(B, int(np.prod(self.shape))),
        )


NAMES = ("observation", "return_to_go", "last_action", "timestep", "memory"), ("action", "next_memory")


@torch.no_grad()
def to_onnx(step: Step, batch: int) -> bytes:
    B = batch or 2
    shapes = None if batch else tuple({0: torch.export.Dim("batch")} for _ in NAMES[0])
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(step, step.inputs(B), dynamo=True, dynamic_shapes=shapes, opset_version=OPSET, verbose=False,
                                    input_names=NAMES[0], output_names=NAMES[1])  # fmt: skip
    return program.model_proto.SerializeToString()


def quantised(blob: bytes) -> bytes:
    """A file with weights in 8 bits, activations scaled as they come (onnxruntime's dynamic quantisation); of Gemm and MatMul alone, its Attention is not ONNX's."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as tmp:
        logging.disable(logging.WARNING)  # it advises a preprocessing that changes nothing here
        try:
            quantize_dynamic(
                onnx.load_from_string(blob),
                f"{tmp}/int8.onnx",
                op_types_to_quantize=["MatMul", "Gemm"],
                weight_type=QuantType.QInt8,
            )
        finally:
            logging.disable(logging.NOTSET)
        return Path(f"{tmp}/int8.onnx").read_bytes()


def session(file):
    """onnxruntime on one thread; file: a path, or the bytes of one."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


class Exported:
    """An exported file, acting as policy.Policy does."""

    def __init__(self, runtime, step: Step):
        self.runtime, self.step = runtime, step

    def reset(self, target_return, episodes):
        self.given = {k: x.numpy() for k, x in zip(NAMES[0], self.step.inputs(episodes), strict=True)}
        self.given["return_to_go"] += target_return

    def act(self, observation, reward):
        self.given["observation"] = observation.astype(np.float32)
        self.given["return_to_go"] = (self.given["return_to_go"] - reward).astype(np.float32)
        self.given["last_action"], self.given["memory"] = self.runtime.run(None, self.given)
        self.given["timestep"] = self.given["timestep"] + 1
        return self.given["last_action"]

    def keep(self, rows):
        self.given = {k: x[rows] for k, x in self.given.items()}


def compared(runtime, step: Step, B: int, T=50):
    """Largest difference between the file's actions and Policy's, in units of half the action range (of discrete ones, the share that differs), over B random
    episodes of T steps."""
    rng, t, worst = np.random.default_rng(0), dataclasses.replace(step.task, max_steps=T), 0.0
    policy, half = Policy.of(step.model, t, step.index), (np.array(t.act_high) - t.act_low) / 2
    policy.reset(episodes=B)
    given = {k: x.numpy() for k, x in zip(NAMES[0], step.inputs(B), strict=True)}
    for i in range(T):
        given["observation"] = (rng.normal(size=(B, t.obs_dim)) * t.obs_std + t.obs_mean).astype(np.float32)
        given["return_to_go"], given["timestep"] = (
            (rng.uniform(0, 1, B) * t.rtg_scale).astype(np.float32),
            np.full(B, i),
        )
        action, memory = runtime.run(None, given)
        wanted = policy.act(given["observation"], policy.left - given["return_to_go"])
        worst = (
            worst + (action != wanted).mean() / T
            if t.discrete
            else max(worst, np.abs((action - wanted) / half).max())
        )
        given["last_action"], given["memory"] = wanted, memory
    return float(worst)


def microseconds(runtime, step: Step, B: int, T=400):
    """Of a call, numpy to numpy: median of T, one right after another; between other work, which drives the file out of the caches, it takes longer."""
    policy, observation, took = Exported(runtime, step), np.zeros((B, step.task.obs_dim), np.float32), []
    policy.reset(0.0, B)
    for _ in range(T):
        start = time.perf_counter()
        policy.act(observation, 0.0)
        took.append(time.perf_counter() - start)
    return 1e6 * float(np.median(took))


def main(cfg: Config):
    cli.at_least(cfg, batch=0, eval_episodes=0)
    if cfg.batch and cfg.eval_episodes:
        raise UserError(
            f"--batch {cfg.batch}: files are evaluated with batches that shrink as episodes end; export with any size, --batch 0"
        )
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"exporting needs {package}: pip install onnx onnxscript onnxruntime")
    import onnxruntime

    model, meta = dt.load(cfg.run)
    tasks, metrics = (
        data.tasks(meta, cfg.run),
        (files.read_json(Path(cfg.run) / "metrics.json") or {}).get("tasks", {}),
    )
    torch.set_num_threads(1)
    rows = []
    for index, task in enumerate(tasks):
        path = Path(cfg.run) / f"{task.name.replace('/', '-')}.onnx"
        if path.exists() and not cfg.overwrite:
            raise UserError(f"{path} is there already; add --overwrite")
        step = Step(model, task, index).eval()
        blobs = {path.name: to_onnx(step, cfg.batch)}
        if cfg.int8:
            blobs[path.with_suffix(".int8.onnx").name] = quantised(blobs[path.name])
        for name, blob in blobs.items():
            files.write(path.with_name(name), blob)
        card = {"task": task.name, "environment": task.env_id, "environment_options": task.env_kwargs, "max_steps": task.max_steps, "targets": task.targets,
                "observation": task.obs_dim, "action_shape": [] if task.discrete else [task.act_dim], "action_type": "int64" if task.discrete else "float32",
                "action_low": task.act_low, "action_high": task.act_high, "memory": int(np.prod(step.shape)),
                "batch": cfg.batch or "any", "parameters_of_the_whole_model": model.n_params, "measured": metrics.get(task.name), "opset": OPSET,
                "torch": torch.__version__, "onnxruntime": onnxruntime.__version__, "machine": platform.machine(), "files": {}}  # fmt: skip
        for name, content in blobs.items():
            runtime = session(content)
            difference, us = (
                compared(runtime, step, cfg.batch or 1),
                microseconds(runtime, step, cfg.batch or 1),
            )
            told = card["files"][name] = {
                "bytes": len(content),
                "largest_difference": difference,
                "microseconds": us,
            }
            rows.append(
                {
                    "file": name,
                    "KB": len(content) / 1024,
                    "largest difference": difference,
                    "microseconds": us,
                }
            )
            if cfg.eval_episodes and task.env_id:
                returns, _ = evaluate.play(
                    Exported(runtime, step), task, task.targets["p95"], cfg.eval_episodes, evaluate.SEED
                )
                told |= evaluate.scores(returns, task, meta.get("teachers", {}).get(task.name))
                rows[-1] |= {
                    "return": told["return_mean"],
                    "+-": told["return_std"],
                    "score": told["normalized_score"],
                }
                if "retention" in told:
                    rows[-1]["retention"] = told["retention"]
        files.write_json(path.with_suffix(".json"), card)
    print(log.table(rows))


if __name__ == "__main__":
    cli.run(main, Config, __doc__)

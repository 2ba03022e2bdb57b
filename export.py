"""Export a teacher or a student to ONNX: one file for each task, with everything in it that acting needs.

    python export.py out/student                 # out/student/hopper.onnx, hopper.json, ...
    python export.py out/student --int8          # and hopper.int8.onnx: weights quantised to 8 bits
    python export.py out/student --int8 --eval-episodes 20    # and the returns of the files' own episodes

A file is a function of B rows, any number or --batch; an episode's memory is an input and an output. Inputs:

    observation (B, O) and return_to_go (B,), in the environment's units; of other spaces than a Box, the
        vectors of support/spaces.py
    last_action (B, A), or (B,) int64 discrete ones, (B, F) of F factors; at timestep 0 any
    timestep (B,) int64, from 0; each row may be at its own
    memory (B, M), at timestep 0 zeros

Outputs: action, like last_action, and next_memory, the memory of the next timestep.

examples/act_onnx.py acts with numpy and onnxruntime alone. The JSON file beside a task's files is their card:
sizes, environment, target returns, the run's metrics, and each file's largest difference from the model.
README.md is the run's card on the Hugging Face Hub: `hf upload <org>/<name> out/student` shares it.
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
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from numpy.typing import ArrayLike
from torch import Tensor

import data
import evaluate
import model as dt
from policy import Actor, Policy
from support import UserError, cli, environments, files, hub, log

OPSET = 23  # of ONNX 1.18; onnxruntime reads it from 1.23 on
INPUTS = ("observation", "return_to_go", "last_action", "timestep", "memory")
OUTPUTS = ("action", "next_memory")


@dataclasses.dataclass
class Config:
    run: Annotated[str, tyro.conf.Positional]  # a run directory of teacher.py or distill.py
    batch: int = 0  # size of the batch; 0: any
    int8: bool = False  # also write files with weights in 8 bits (onnxruntime's dynamic quantisation)
    eval_episodes: int = 0  # evaluation episodes of each file, in its task's environment; 0: none
    imports: cli.Imports = ()  # packages to import, which register environments
    overwrite: bool = False  # replace files that exist


# ---- a step as a function --------------------------------------------------------------------------------


class Step(torch.nn.Module):
    """One step of policy.Actor in the environment's units, as a function: INPUTS -> OUTPUTS."""

    def __init__(self, model: dt.DecisionTransformer, task: data.Task, index: int):
        super().__init__()
        self.model = model
        self.task = task
        self.index = index  # of the task in the model
        self.actor = Actor(model, index, episodes=1, max_steps=1)
        self.actor.restart(slice(None))  # every row of a batch has a timestep of its own
        # of an episode's memory: by block, keys and values
        self.shape = (len(self.actor.caches), *self.actor.caches[0].shape[1:])
        self._take_units()

    def forward(
        self, observation: Tensor, return_to_go: Tensor, last_action: Tensor, timestep: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Shapes: see this file's head."""
        task = self.task
        actor = self.actor
        actor.t = timestep
        actor.caches = list(memory.view(-1, *self.shape).unbind(1))  # each (B, 2, nh, rows, hs)
        if task.discrete:
            # at timestep 0 it may be any
            choices = last_action.view(-1, len(task.choices)) - torch.tensor(task.first_action)
            choices = torch.minimum(choices.clamp_min(0), torch.tensor(task.choices) - 1)
            last_action = dt.one_hot(choices, task.choices).float()
        action = actor.step(actor.time_embeddings(timestep), observation, return_to_go, last_action)
        next_memory = torch.cat([cache.flatten(1) for cache in actor.caches], 1)
        if task.discrete:
            action = dt.likeliest(action, task.choices) + torch.tensor(task.first_action)
            return action.view(-1, *task.action_shape), next_memory
        low = torch.tensor(task.act_low)
        high = torch.tensor(task.act_high)
        action = action * ((high - low) / 2) + (high + low) / 2
        return action.clamp(low, high), next_memory

    @torch.no_grad()
    def _take_units(self):
        """Fold normalisation into the actor's embeddings: from here on it takes the environment's units.

        What a last action adds at 0 goes to the place embeddings, which know where there is none.
        """
        task = self.task
        actor = self.actor
        action, rtg, state = actor.embed.double().split((task.act_dim, 1, task.obs_dim))
        mean, std = torch.tensor((task.obs_mean, task.obs_std), dtype=torch.float64)
        of_mean = (mean / std @ state).float()
        actor.embed_bias = actor.embed_bias - of_mean.view(actor.embed_bias.shape)
        if not task.discrete:
            low, high = torch.tensor((task.act_low, task.act_high), dtype=torch.float64)
            at_zero = (-(high + low) / (high - low) @ action).float()
            place, begins, *others = actor.phase_tables
            actor.phase_tables = (place + (1 - begins) * at_zero, begins, *others)
            action = action * (2 / (high - low))[:, None]
        actor.embed = torch.cat((action, rtg / task.rtg_scale, state / std[:, None])).float()

    def inputs(self, batch: int) -> tuple[Tensor, ...]:
        """The inputs of an episode's first timestep, all zeros, in the order of INPUTS."""
        task = self.task
        timestep = torch.zeros(batch, dtype=torch.long)
        observation = torch.zeros(batch, task.obs_dim)
        action_type = torch.long if task.discrete else torch.float32
        action = torch.zeros(batch, *task.action_shape, dtype=action_type)
        memory = torch.zeros(batch, int(np.prod(self.shape)))
        return observation, torch.zeros(batch), action, timestep, memory

    def feed(self, batch: int) -> dict[str, np.ndarray]:
        """`inputs` as onnxruntime takes them, by name."""
        return {name: x.numpy() for name, x in zip(INPUTS, self.inputs(batch), strict=True)}


# ---- files -----------------------------------------------------------------------------------------------


@torch.no_grad()
def to_onnx(step: Step, batch: int) -> bytes:
    """The file of a step, for batches of this size; 0: of any size."""
    any_size = tuple({0: torch.export.Dim("batch")} for _ in INPUTS)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            step,
            step.inputs(batch or 2),
            dynamo=True,
            dynamic_shapes=None if batch else any_size,
            opset_version=OPSET,
            verbose=False,
            input_names=INPUTS,
            output_names=OUTPUTS,
        )
    return program.model_proto.SerializeToString()


def quantised(blob: bytes) -> bytes:
    """The file with weights in 8 bits, activations scaled as they come (onnxruntime's dynamic quantisation).

    Of Gemm and MatMul alone: the Attention that onnxruntime quantises is not ONNX's. Those before the first
    LayerNormalization stay: they read numbers in the environment's units, of any scale.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load_from_string(blob)
    nodes = model.graph.node
    before = nodes[: [node.op_type for node in nodes].index("LayerNormalization")]
    # a Gemm becomes a MatMul and an Add first
    kept = [name for node in before for name in (node.name, f"{node.name}_MatMul")]
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp) / "int8.onnx"
        logging.disable(logging.WARNING)  # it advises a preprocessing that changes nothing here
        try:
            quantize_dynamic(
                model,
                path,
                nodes_to_exclude=kept,
                op_types_to_quantize=["MatMul", "Gemm"],
                weight_type=QuantType.QInt8,
            )
        finally:
            logging.disable(logging.NOTSET)
        return path.read_bytes()


def session(file: str | bytes, quiet: bool = False) -> Any:
    """An onnxruntime.InferenceSession on one thread, of a path or of bytes; quiet: it logs nothing."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    if quiet:
        options.log_severity_level = 4
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


# ---- acting with a file, and measuring it ----------------------------------------------------------------


class Exported:
    """An exported file acting as policy.Policy does, for evaluate.play."""

    def __init__(self, runtime: Any, step: Step):
        self.runtime = runtime  # of `session`
        self.step = step

    def reset(self, target_return: ArrayLike, episodes: int) -> None:
        self.feed = self.step.feed(episodes)
        self.feed["return_to_go"] += target_return

    def act(self, observation: np.ndarray, reward: np.ndarray | float) -> np.ndarray:
        """observation (E, O), reward (E,) -> action (E, A), or discrete ones (E,) or (E, F)."""
        feed = self.feed
        feed["observation"] = observation.astype(np.float32)
        feed["return_to_go"] = (feed["return_to_go"] - reward).astype(np.float32)
        feed["last_action"], feed["memory"] = self.runtime.run(None, feed)
        feed["timestep"] = feed["timestep"] + 1
        return feed["last_action"]

    def keep(self, rows: np.ndarray) -> None:
        """Go on with these episodes alone; rows (E,) bool."""
        self.feed = {name: x[rows] for name, x in self.feed.items()}


def compared(runtime: Any, step: Step, batch: int, n_steps: int = 50) -> float:
    """The largest difference between the file's actions and Policy's, in units of half the action range.

    Of discrete actions: the share that differs. Over `batch` random episodes of n_steps each.
    """
    rng = np.random.default_rng(0)
    task = dataclasses.replace(step.task, max_steps=n_steps)
    half_range = (np.array(task.act_high) - task.act_low) / 2
    policy = Policy.of(step.model, task, step.index)
    policy.reset(episodes=batch)
    feed = step.feed(batch)
    difference = 0.0
    for t in range(n_steps):
        observation = rng.normal(size=(batch, task.obs_dim)) * task.obs_std + task.obs_mean
        return_to_go = rng.uniform(0, 1, batch) * task.rtg_scale
        feed["observation"] = observation.astype(np.float32)
        feed["return_to_go"] = return_to_go.astype(np.float32)
        feed["timestep"] = np.full(batch, t)
        action, feed["memory"] = runtime.run(None, feed)
        reward = policy.return_to_go - feed["return_to_go"]  # so that the policy is asked for the same
        expected = policy.act(feed["observation"], reward)
        if task.discrete:
            difference += (action != expected).mean() / n_steps
        else:
            difference = max(difference, np.abs((action - expected) / half_range).max())
        feed["last_action"] = expected
    return float(difference)


def microseconds(runtime: Any, step: Step, batch: int, n_steps: int = 400) -> float:
    """Median time of a step, numpy to numpy, where one follows another.

    Between other work, which displaces the weights from the CPU's caches, a step takes longer.
    """
    policy = Exported(runtime, step)
    policy.reset(0.0, batch)
    observation = np.zeros((batch, step.task.obs_dim), np.float32)
    seconds = []
    for _ in range(n_steps):
        start = time.perf_counter()
        policy.act(observation, 0.0)
        seconds.append(time.perf_counter() - start)
    return 1e6 * float(np.median(seconds))


# ---- the command -----------------------------------------------------------------------------------------


def main(cfg: Config) -> None:
    cli.at_least(cfg, batch=0, eval_episodes=0)
    if cfg.batch and cfg.eval_episodes:
        raise UserError(
            f"--batch {cfg.batch}: files are evaluated with batches that shrink as episodes end; "
            f"export with any size, --batch 0"
        )
    _check_packages()
    environments.import_packages(cfg.imports)
    model, meta = dt.load(cfg.run)
    measured = (files.read_json(Path(cfg.run) / "metrics.json") or {}).get("tasks", {})
    torch.set_num_threads(1)
    rows = []
    for index, task in enumerate(data.tasks(meta, cfg.run)):
        path = Path(cfg.run) / f"{task.name.replace('/', '-')}.onnx"
        if path.exists() and not cfg.overwrite:
            raise UserError(f"{path} is there already; add --overwrite")
        step = Step(model, task, index).eval()
        blobs = {path.name: to_onnx(step, cfg.batch)}
        if cfg.int8:
            blobs[path.with_suffix(".int8.onnx").name] = quantised(blobs[path.name])
        for name, blob in blobs.items():
            files.write(path.with_name(name), blob)
        card = _card(cfg, step, measured.get(task.name))
        teacher = meta.get("teachers", {}).get(task.name)
        for name, blob in blobs.items():
            card["files"][name] = _measure(cfg, step, blob, teacher)
            rows.append(_row(name, card["files"][name]))
        files.write_json(path.with_suffix(".json"), card)
    run = Path(cfg.run)
    card = hub.model_card(run.resolve().name, data.tasks(meta, run), measured, model.n_params)
    files.write(run / "README.md", card.encode())
    print(log.table(rows))


def _check_packages():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"exporting needs {package}: pip install onnx onnxscript onnxruntime")


def _card(cfg, step, measured):
    """A task's card without its files. measured: the run's metrics of the task."""
    import onnxruntime

    task = step.task
    return {
        "task": task.name,
        "environment": task.env_id,
        "environment_options": task.env_kwargs,
        "max_steps": task.max_steps,
        "target": task.target,
        "targets": task.targets,
        "observation": task.obs_dim,
        "observation_space": task.obs_space,
        "action_shape": list(task.action_shape),
        "action_type": "int64" if task.discrete else "float32",
        "action_low": task.act_low,
        "action_high": task.act_high,
        "memory": int(np.prod(step.shape)),
        "batch": cfg.batch or "any",
        "parameters_of_the_whole_model": step.model.n_params,
        "measured": measured,
        "opset": OPSET,
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "machine": platform.machine(),
        "files": {},
    }


def _measure(cfg, step, blob, teacher):
    """A file's entry in the card: size, difference, time and, with --eval-episodes, its scores."""
    runtime = session(blob)
    batch = cfg.batch or 1
    entry = {
        "bytes": len(blob),
        "largest_difference": compared(runtime, step, batch),
        "microseconds": microseconds(runtime, step, batch),
    }
    task = step.task
    if cfg.eval_episodes and task.env_id:
        policy = Exported(runtime, step)
        entry |= evaluate.measured(policy, task, task.target, cfg.eval_episodes, evaluate.SEED, teacher)
    return entry


def _row(name, entry):
    """A file's entry in the card as a row of the printed table."""
    row = {
        "file": name,
        "KB": entry["bytes"] / 1024,
        "largest difference": entry["largest_difference"],
        "microseconds": entry["microseconds"],
    }
    columns = {
        "return": "return_mean",
        "+-": "return_std",
        "score": "normalized_score",
        "retention": "retention",
        "success": "success_rate",
    }
    return row | {column: entry[key] for column, key in columns.items() if key in entry}


if __name__ == "__main__":
    cli.run(main, Config, __doc__)

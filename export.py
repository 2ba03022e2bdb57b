"""Export a teacher or a student to ONNX: a file for each task, with everything in it that acting needs.

    python export.py out/student                 # out/student/hopper.onnx, hopper.json, ...; all-tasks.onnx
    python export.py out/student --int8          # and hopper.int8.onnx: weights quantised to 8 bits
    python export.py out/student --int8 --eval-episodes 20    # and the returns of the files' own episodes
    python export.py out/student --one-file only              # all-tasks.onnx alone

A file is a function of B rows, any number or --batch; an episode's memory is an input and an output. Inputs:

    observation (B, O) and return_to_go (B,), in the environment's units; of other spaces than a Box, the
        vectors of support/spaces.py
    pixels (B, c, H, W) uint8, where observations have images; then observation holds what else there is, and
        is left out where there is nothing else
    last_action (B, A), or (B,) int64 discrete ones, (B, F) of F factors; at timestep 0 any
    timestep (B,) int64, from 0; each row may be at its own
    memory (B, M), at timestep 0 zeros

Outputs: action, like last_action, and next_memory, the memory of the next timestep.

all-tasks.onnx is a file of a student's tasks together, each row in its own. One more input, task (B,) int64,
is a task's index in the list `tasks` of the card. Observations are padded with zeros to the task's of most
numbers. Actions are float32 (B, W), of which a task reads and writes the first ones: its A, or the number of
a discrete one, or of each of its factors.

examples/act_onnx.py acts with numpy and onnxruntime alone. The JSON file beside a task's files is their card:
sizes, environment, target returns, the run's metrics, and each file's largest difference from the model.
README.md is the run's card on the Hugging Face Hub: `hf upload <org>/<name> out/student` shares it.
"""

import contextlib
import dataclasses
import importlib.util
import io
import logging
import math
import platform
import tempfile
import time
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from numpy.typing import ArrayLike
from torch import Tensor

import data
import evaluate
import model as dt
from kernels.kl import NEVER
from policy import Actor, Policy
from support import UserError, cli, environments, files, hub, log, spaces

OPSET = 23  # of ONNX 1.18; onnxruntime reads it from 1.23 on
INPUTS = ("observation", "pixels", "return_to_go", "last_action", "timestep", "memory")
OUTPUTS = ("action", "next_memory")
ALL_TASKS = "all-tasks"  # name of the file of all tasks


@dataclasses.dataclass
class Config:
    run: Annotated[str, tyro.conf.Positional]  # a run directory of teacher.py or distill.py
    batch: int = 0  # size of the batch; 0: any
    int8: bool = False  # also write files with weights in 8 bits (onnxruntime's dynamic quantisation)
    one_file: Literal["also", "only", "no"] = "also"  # one of all tasks, where a student has several
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

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Shapes: see this file's head; those of `names`, in their order."""
        task = self.task
        *observation, return_to_go, last_action, timestep, memory = inputs
        pixels = observation.pop().flatten(1) if task.image else None
        states = observation[0] if observation else return_to_go[:, None][:, :0]
        actor = self.actor
        actor.t = timestep
        actor.caches = list(memory.view(-1, *self.shape).unbind(1))  # each (B, 2, nh, rows, hs)
        if task.discrete:
            # at timestep 0 it may be any
            choices = last_action.view(-1, len(task.choices)) - torch.tensor(task.first_action)
            choices = torch.minimum(choices.clamp_min(0), torch.tensor(task.choices) - 1)
            last_action = dt.one_hot(choices, task.choices).float()
        action = actor.step(actor.time_embeddings(timestep), states, return_to_go, last_action, pixels)
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
        n_features = len(actor.embed) - (task.act_dim + 1 + task.obs_dim)
        action, rtg, features, state = actor.embed.double().split((task.act_dim, 1, n_features, task.obs_dim))
        mean, std = torch.tensor((task.obs_mean, task.obs_std), dtype=torch.float64)
        of_mean = (mean / std @ state).float()
        actor.embed_bias = actor.embed_bias - of_mean.view(actor.embed_bias.shape)
        if not task.discrete:
            low, high = torch.tensor((task.act_low, task.act_high), dtype=torch.float64)
            at_zero = (-(high + low) / (high - low) @ action).float()
            place, begins, *others = actor.phase_tables
            actor.phase_tables = (place + (1 - begins) * at_zero, begins, *others)
            action = action * (2 / (high - low))[:, None]
        actor.embed = torch.cat((action, rtg / task.rtg_scale, features, state / std[:, None])).float()

    @property
    def names(self) -> list[str]:
        """Those of INPUTS that the task has."""
        absent = {"observation": self.task.obs_dim == 0, "pixels": not self.task.image}
        return [name for name in INPUTS if not absent.get(name)]

    def inputs(self, batch: int) -> dict[str, Tensor]:
        """The inputs of an episode's first timestep, all zeros, in the order of `names`."""
        task = self.task
        timestep = torch.zeros(batch, dtype=torch.long)
        observation = torch.zeros(batch, task.obs_dim)
        action_type = torch.long if task.discrete else torch.float32
        action = torch.zeros(batch, *task.action_shape, dtype=action_type)
        memory = torch.zeros(batch, int(np.prod(self.shape)))
        pixels = torch.zeros(batch, *task.image, dtype=torch.uint8)
        inputs = (observation, pixels, torch.zeros(batch), action, timestep, memory)
        return {name: x for name, x in zip(INPUTS, inputs, strict=True) if name in self.names}

    def feed(self, batch: int) -> dict[str, np.ndarray]:
        """`inputs` as onnxruntime takes them."""
        return {name: x.numpy() for name, x in self.inputs(batch).items()}

    def observed(self, vectors: np.ndarray) -> dict[str, np.ndarray]:
        """The inputs of what was observed, from vectors (E, O + P)."""
        task = self.task
        numbers, pixels = np.split(vectors, [task.obs_dim], 1)
        inputs = {"observation": numbers.astype(np.float32), "pixels": pixels.astype(np.uint8)}
        if task.image:
            inputs["pixels"] = inputs["pixels"].reshape(-1, *task.image)
        return {name: x for name, x in inputs.items() if name in self.names}


class AllSteps(torch.nn.Module):
    """The steps of all of a student's tasks as one function: INPUTS and `task` -> OUTPUTS.

    Weights and statistics are looked up by each row's task or group, padded with zeros to the largest.
    """

    names = (*(name for name in INPUTS if name != "pixels"), "task")

    @torch.no_grad()
    def __init__(self, model: dt.DecisionTransformer, tasks: list[data.Task]):
        super().__init__()
        actors = [Actor(model, i, episodes=1, max_steps=1) for i in range(len(tasks))]
        self.actor = actors[0]
        self.actor.restart(slice(None))
        self.shape = (len(self.actor.caches), *self.actor.caches[0].shape[1:])  # as Step's
        self.O = max(task.obs_dim for task in tasks)
        self.A = max(task.act_dim for task in tasks)
        self.W = max(math.prod(task.action_shape) for task in tasks)

        # weights, of the first task of each group; biases, of each task
        groups = model.cfg.groups
        self.group = torch.tensor(groups)  # (N,)
        of_group = [groups.index(g) for g in range(len(set(groups)))]
        self.embed = torch.stack([self._embed(actors[i], tasks[i]) for i in of_group])  # (G, A + 1 + O, nC)
        self.embed_bias = torch.stack([actor.embed_bias for actor in actors])  # (N, n, C)
        heads = [actors[i].head for i in of_group]
        self.head = torch.stack([_padded(weight, self.A, 1) for weight, _ in heads])  # (G, C, A)
        self.head_bias = torch.stack([_padded(bias, self.A) for _, bias in heads])  # (G, A)

        # statistics of each task
        self.obs_mean = self._table([task.obs_mean for task in tasks], self.O)
        self.obs_std = self._table([task.obs_std for task in tasks], self.O, 1.0)
        self.rtg_scale = torch.tensor([task.rtg_scale for task in tasks])  # (N,)
        self.low = self._table([task.act_low for task in tasks], self.A, -1.0)
        self.high = self._table([task.act_high for task in tasks], self.A, 1.0)
        self.factors = model.cfg.categorical()  # (F, N, A) bool: which columns are a factor's; or None
        if self.factors is not None:
            self.discrete = self.factors.any(0).any(1)  # (N,)
            # (F, N): the number of a factor's first choice, less its column
            self.first = torch.zeros(self.factors.shape[:2])
            for n, task in enumerate(tasks):
                for f, number in enumerate(np.ravel(task.first_action or 0)[: len(task.choices)]):
                    self.first[f, n] = float(number - sum(task.choices[:f]))

    def _embed(self, actor, task):
        """actor.embed with its parts, of actions and states, padded: (A + 1 + O, nC)."""
        action, rtg, state = actor.embed.split((task.act_dim, 1, task.obs_dim))
        return torch.cat((_padded(action, self.A, 0), rtg, _padded(state, self.O, 0)))

    def _table(self, rows, width, fill=0.0):
        """(N, width) float32."""
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Shapes: see this file's head; those of `names`, in their order."""
        observation, return_to_go, last_action, timestep, memory, task = inputs
        actor = self.actor
        actor.t = timestep
        actor.caches = list(memory.view(-1, *self.shape).unbind(1))
        states = (observation - self.obs_mean[task]) / self.obs_std[task]
        rtg = return_to_go / self.rtg_scale[task]
        actions = self._from_units(last_action, task)  # (B, A)

        # policy.Actor.step, with weights of each row's own
        group = self.group[task]
        embed = self.embed[group]  # (B, A + 1 + O, nC)
        actor.embed_bias = self.embed_bias[task]
        phase = actor.phase()
        x = torch.cat((actions, rtg[:, None], states), 1)
        x = actor.time_embeddings(timestep) + (x[:, None] @ embed)[:, 0]
        place = phase.place
        if actor.cfg.tokens == 1:
            place = place - phase.begins * (actions[:, None] @ embed[:, : self.A])
        x = actor.hidden(x[:, None] + place, phase)
        x = (x[:, None] @ self.head[group])[:, 0] + self.head_bias[group]
        next_memory = torch.cat([cache.flatten(1) for cache in actor.caches], 1)
        return self._in_units(x, task), next_memory

    def _from_units(self, action, task):
        """Actions (B, W) as the model takes them, (B, A)."""
        low = self.low[task]
        high = self.high[task]
        x = (torch.nn.functional.pad(action, (0, self.A - self.W)) - (high + low) / 2) / ((high - low) / 2)
        if self.factors is None:
            return x
        one_hot = torch.zeros_like(x)
        for f, (own, first) in enumerate(zip(self.factors, self.first, strict=True)):
            column = action[:, f] - first[task]
            one_hot = one_hot + (own[task] & (column[:, None] == torch.arange(self.A)))
        return torch.where(self.discrete[task, None], one_hot, x)

    def _in_units(self, x, task):
        """The head's outputs (B, A) as actions (B, W)."""
        low = self.low[task]
        high = self.high[task]
        action = (x.tanh() * ((high - low) / 2) + (high + low) / 2).clamp(low, high)
        if self.factors is not None:
            numbers = []
            for own, first in zip(self.factors, self.first, strict=True):
                numbers.append(x.masked_fill(~own[task], NEVER).argmax(1) + first[task])
            numbers = _padded(torch.stack(numbers, 1), self.A, 1)
            action = torch.where(self.discrete[task, None], numbers, action)
        return action[:, : self.W]

    def inputs(self, batch: int) -> dict[str, Tensor]:
        """The inputs of an episode's first timestep in the first task, all zeros."""
        index = torch.zeros(batch, dtype=torch.long)
        memory = torch.zeros(batch, int(np.prod(self.shape)))
        observation = torch.zeros(batch, self.O)
        action = torch.zeros(batch, self.W)
        inputs = (observation, torch.zeros(batch), action, index, memory, index.clone())
        return dict(zip(self.names, inputs, strict=True))


def _padded(x, size, dim=0):
    """x with zeros behind it along an axis."""
    shape = [*x.shape]
    shape[dim] = size - shape[dim]
    return torch.cat((x, x.new_zeros(shape)), dim)


# ---- files -----------------------------------------------------------------------------------------------


@torch.no_grad()
def to_onnx(step: Step | AllSteps, batch: int) -> bytes:
    """The file of a step, for batches of this size; 0: of any size."""
    any_size = ({0: torch.export.Dim("batch")},) * len(step.names)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            step,
            (*step.inputs(batch or 2).values(),),
            dynamo=True,
            dynamic_shapes=None if batch else (any_size,),
            opset_version=OPSET,
            verbose=False,
            input_names=step.names,
            output_names=OUTPUTS,
        )
    return program.model_proto.SerializeToString()


def quantised(blob: bytes) -> bytes:
    """The file with weights in 8 bits, activations scaled as they come (onnxruntime's dynamic quantisation).

    Of Gemm and MatMul alone: the Attention that onnxruntime quantises is not ONNX's. Those before the first
    LayerNormalization stay: they read numbers in the environment's units, of any scale. The map behind an
    image's convolutions does not: it has most of an encoder's weights.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load_from_string(blob)
    nodes = model.graph.node
    before = nodes[: [node.op_type for node in nodes].index("LayerNormalization")]
    weights = {tensor.name for tensor in model.graph.initializer}
    of_pixels = {"pixels"}  # and what is made of them alone
    for node in before:
        if {*node.input} <= of_pixels | weights:
            of_pixels.update(node.output)
    # a Gemm becomes a MatMul and an Add first
    before = [node for node in before if node.output[0] not in of_pixels]
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


class InTask:
    """A session of the file of all tasks in place of one of the task's own file."""

    def __init__(self, runtime: Any, steps: AllSteps, index: int):
        self.runtime = runtime
        self.steps = steps
        self.index = index  # of the task

    def run(self, outputs: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Takes and returns what the session of the task's own file does."""
        last = feed["last_action"]
        B = len(last)
        padded = {
            "observation": self._padded(feed["observation"], self.steps.O),
            "last_action": self._padded(last.reshape(B, -1), self.steps.W),
            "task": np.full(B, self.index),
        }
        action, memory = self.runtime.run(outputs, feed | padded)
        action = action[:, : math.prod(last.shape[1:])]
        return [action.astype(last.dtype).reshape(last.shape), memory]

    def _padded(self, x, width):
        return np.pad(x, ((0, 0), (0, width - x.shape[1]))).astype(np.float32)


class Exported:
    """An exported file acting as policy.Policy does, for evaluate.play."""

    def __init__(self, runtime: Any, step: Step):
        self.runtime = runtime  # of `session`
        self.step = step

    def reset(self, target_return: ArrayLike, episodes: int) -> None:
        self.feed = self.step.feed(episodes)
        self.feed["return_to_go"] += target_return

    def act(self, observation: np.ndarray, reward: np.ndarray | float) -> np.ndarray:
        """observation (E, O + P), reward (E,) -> action (E, A), or discrete ones (E,) or (E, F)."""
        feed = self.feed
        feed |= self.step.observed(observation)
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
        numbers = rng.normal(size=(batch, task.obs_dim)) * task.obs_std + task.obs_mean
        pixels = rng.integers(0, 256, (batch, spaces.n_pixels(task.observed)))
        observation = np.concatenate((numbers, pixels), 1).astype(np.float32)
        return_to_go = rng.uniform(0, 1, batch) * task.rtg_scale
        feed |= step.observed(observation)
        feed["return_to_go"] = return_to_go.astype(np.float32)
        feed["timestep"] = np.full(batch, t)
        action, feed["memory"] = runtime.run(None, feed)
        reward = policy.return_to_go - feed["return_to_go"]  # so that the policy is asked for the same
        expected = policy.act(observation, reward)
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
    observation = np.zeros((batch, step.task.obs_dim + spaces.n_pixels(step.task.observed)), np.float32)
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
    run = Path(cfg.run)
    tasks = data.tasks(meta, run)
    steps = [Step(model, task, index).eval() for index, task in enumerate(tasks)]
    several = len(tasks) > 1
    images = [task.name for task in tasks if task.image]
    if several and images and cfg.one_file == "only":
        raise UserError(
            f"--one-file only: {images[0]} has images, which no file of all tasks takes; use --one-file no"
        )
    rows = []
    if not several or cfg.one_file != "only":
        for step in steps:
            name = step.task.name.replace("/", "-")
            card = _card(cfg, step, measured.get(step.task.name))
            rows += _export(cfg, name, step, [step], [card], meta)
            files.write_json(run / f"{name}.json", card)
    if several and cfg.one_file != "no" and not images:
        whole = AllSteps(model, tasks).eval()
        cards = [{"index": s.index, **_card(cfg, s, measured.get(s.task.name))} for s in steps]
        rows += _export(cfg, ALL_TASKS, whole, steps, cards, meta)
        widths = {"observation_width": whole.O, "action_width": whole.W}
        files.write_json(run / f"{ALL_TASKS}.json", {**widths, "tasks": cards})
    card = hub.model_card(run.resolve().name, tasks, measured, model.n_params)
    files.write(run / "README.md", card.encode())
    print(log.table(rows))


def _export(cfg, name, whole, steps, cards, meta):
    """Write the files of `whole`, a Step or AllSteps, and enter them into the cards of its tasks' steps.

    Returns their rows in the printed table.
    """
    path = Path(cfg.run) / f"{name}.onnx"
    if path.exists() and not cfg.overwrite:
        raise UserError(f"{path} is there already; add --overwrite")
    blobs = {path: to_onnx(whole, cfg.batch)}
    if cfg.int8:
        blobs[path.with_suffix(".int8.onnx")] = quantised(blobs[path])
    rows = []
    for path, blob in blobs.items():
        files.write(path, blob)
        runtime = session(blob)
        for step, card in zip(steps, cards, strict=True):
            own = InTask(runtime, whole, step.index) if isinstance(whole, AllSteps) else runtime
            teacher = meta.get("teachers", {}).get(step.task.name)
            card["files"][path.name] = {"bytes": len(blob), **_measure(cfg, step, own, teacher)}
            label = f"{path.name}, {step.task.name}" if isinstance(whole, AllSteps) else path.name
            rows.append(_row(label, card["files"][path.name]))
    return rows


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
        "environment_wrappers": task.env_wrappers,
        "max_steps": task.max_steps,
        "target": task.target,
        "targets": task.targets,
        "observation": task.obs_dim,
        "observation_space": task.obs_space,
        "pixels": task.image,
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


def _measure(cfg, step, runtime, teacher):
    """A file's entry in the card, but for its size: difference, time and, with --eval-episodes, scores."""
    batch = cfg.batch or 1
    entry = {
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

"""Any policy as a teacher: an ONNX file from one observation to an action, run by onnxruntime on the CPU.

Used by teacher.find. Nothing in a file is unpickled or executed but ONNX's operators. In the environment's
units, of B rows, any number:

    inputs   observation (B, O); and, where the policy is asked for a return, return_to_go (B,) or (B, 1)
    outputs  mean or action (B, A), with or without log_std (B, A) or (A,); or logits (B, n) of n discrete
             actions; others are ignored
"""

import contextlib
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

import data
import evaluate
import export
import model as dt
from kernels.kl import LOG_STD, NEVER
from support import UserError, first_line, processes, verdict

MAX_BYTES = 2**30  # as of a model's weights
# Of a policy that has no log_std, in half action ranges: twice distill.py's --sigma-floor, so that the floor
# does not decide; the KL is then a squared error of the means, and a student's sigma does not collapse.
SIGMA = 0.1
TYPES = {"tensor(float)": np.float32, "tensor(double)": np.float64}
UNDERSTOOD = (
    "understood are inputs observation (B, O) and, optionally, return_to_go (B,), floats; outputs mean or "
    "action (B, A) with or without log_std, or logits (B, n) of discrete actions"
)


class OnnxTeacher:
    """Called as a dt.DecisionTransformer of one task is; and a policy for evaluate.play.

    Raises UserError where the file can't be read, or is not a policy of this task.
    """

    def __init__(self, path: Path, task: data.Task):
        self.path = path
        self.task = task
        self.cfg = dt.ModelConfig.of([task], context=1)
        blob = _read(path)
        self.n_params = _checked(path, blob)
        self.session, inputs, outputs = _session(path, blob)
        self._take_names(inputs, outputs)
        self._try()

    def _take_names(self, inputs, outputs):
        """Which of them there are; see _session. Raises UserError where they are not those of a policy."""
        ranks = {name: len(shape) for name, (_, shape) in inputs.items()}
        understood = ranks.pop("observation", None) == 2 and ranks.pop("return_to_go", 1) in (1, 2)
        understood = understood and not ranks and all(type_ in TYPES for type_, _ in inputs.values())
        wanted = ("logits",) if self.task.discrete else ("mean", "action")
        self.names = [name for name in wanted if name in outputs][:1]
        if not (understood and self.names):
            given = ", ".join(f"{name!r} {type_} {shape}" for name, (type_, shape) in inputs.items())
            kind = "discrete" if self.task.discrete else "continuous"
            raise UserError(
                f"{self.path} is no policy of {self.task.name}, whose actions are {kind}: inputs "
                f"{given[:300]}; outputs {str(outputs)[:200]}; {UNDERSTOOD}; of what export.py wrote, name "
                f"the run directory"
            )
        fixed = [name for name, (_, shape) in inputs.items() if isinstance(shape[0], int)]
        if fixed:
            raise UserError(
                f"{self.path} takes batches of {inputs[fixed[0]][1][0]} alone; export it again with a "
                f"dynamic first dimension of {', '.join(fixed)}"
            )
        self.types = {name: TYPES[type_] for name, (type_, _) in inputs.items()}
        self.takes_return = "return_to_go" in inputs
        if self.takes_return:
            self.return_shape = (-1, 1)[: len(inputs["return_to_go"][1])]
        if "log_std" in outputs and not self.task.discrete:
            self.names.append("log_std")
        observation_size = inputs["observation"][1][1]
        if isinstance(observation_size, int) and observation_size != self.task.obs_dim:
            raise UserError(
                f"{self.path} takes {observation_size} observations, dataset {self.task.dataset} has "
                f"{self.task.obs_dim}; put --teachers in the order of the tasks"
            )

    def _try(self):
        """Run it on three mean observations. Raises UserError where sizes are not those of the dataset."""
        task = self.task
        observation = np.tile(task.obs_mean, (3, 1))
        outputs = self._run(observation, np.full(3, task.target))
        name, action = self.names[0], outputs[0]
        if action.shape != (3, task.act_dim):
            raise UserError(
                f"{self.path} gives {name} {action.shape} for 3 observations, dataset {task.dataset} needs "
                f"(3, {task.act_dim}); put --teachers in the order of the tasks"
            )
        A = task.act_dim
        if len(outputs) > 1 and outputs[1].shape not in ((3, A), (1, A), (A,)):
            raise UserError(
                f"{self.path} gives log_std {outputs[1].shape} for 3 observations: must be (3, {A}) or ({A},)"
            )

    def _run(self, observation: np.ndarray, return_to_go: np.ndarray) -> list[np.ndarray]:
        """What the file makes of observation (B, O) and return_to_go (B,), all in the environment's units."""
        feed = {"observation": observation}
        if self.takes_return:
            feed["return_to_go"] = return_to_go.reshape(self.return_shape)
        feed = {name: x.astype(self.types[name]) for name, x in feed.items()}
        try:
            outputs = self.session.run(self.names, feed)
        except Exception as e:  # noqa: BLE001 - onnxruntime has a class of its own for each of its errors
            raise UserError(
                f"{self.path} does not run on {len(observation)} observations of {self.task.obs_dim} "
                f"numbers, as dataset {self.task.dataset} has them ({_reason(e)}); export it again for these"
            ) from None
        for name, x in zip(self.names, outputs, strict=True):
            if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
                raise UserError(f"{self.path}: {name} is not an array of floats; export it again")
            if np.isnan(x).any():
                raise UserError(
                    f"{self.path} gives {name} NaN for an observation of dataset {self.task.dataset}; "
                    f"check its weights and normalisation, and export it again"
                )
        return [x.astype(np.float64) for x in outputs]

    def policy(self, observation: np.ndarray, return_to_go: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, O) and (B,), in the environment's units -> mean and log_std (B, A), in the student's.

        Of discrete actions: their log-probabilities, and zeros.
        """
        action, *log_std = self._run(observation, return_to_go)
        if self.task.discrete:
            logits = torch.from_numpy(action.clip(NEVER, -NEVER))  # a mask's -inf too
            return logits.log_softmax(-1).numpy(), np.zeros_like(action)
        low = np.array(self.task.act_low)
        half_range = (np.array(self.task.act_high) - low) / 2
        mean = ((action.clip(low, self.task.act_high) - low) / half_range - 1).clip(-1, 1)
        log_std = log_std[0] - np.log(half_range) if log_std else math.log(SIGMA)
        return mean, np.broadcast_to(np.clip(log_std, *LOG_STD), mean.shape)

    def __call__(
        self, task: int, states: Tensor, actions: Tensor, rtg: Tensor, timesteps: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Shapes and units: dt.DecisionTransformer.forward. Zeros where mask is False."""
        observation = states[mask].double().cpu().numpy() * self.task.obs_std + self.task.obs_mean
        return_to_go = rtg[mask].double().cpu().numpy() * self.task.rtg_scale
        out = []
        for x in self.policy(observation, return_to_go):
            padded = states.new_zeros(*mask.shape, self.task.act_dim)
            padded[mask] = torch.from_numpy(x.astype(np.float32)).to(states)
            out.append(padded)
        return tuple(out)

    # ---- its own episodes, for evaluate.play ----

    def reset(self, target_return: ArrayLike, episodes: int) -> None:
        self.return_to_go = np.full(episodes, target_return, float)

    def act(self, observation: np.ndarray, reward: np.ndarray) -> np.ndarray:
        """observation (E, O), reward (E,) -> the mean (E, A), or the likeliest discrete action (E,)."""
        task = self.task
        self.return_to_go = self.return_to_go - reward
        mean, _ = self.policy(observation, self.return_to_go)
        if task.discrete:
            return mean.argmax(1) + task.first_action
        low = np.array(task.act_low)
        high = np.array(task.act_high)
        return (low + (mean + 1) / 2 * (high - low)).clip(low, high).astype(np.float32)

    def keep(self, rows: np.ndarray) -> None:
        self.return_to_go = self.return_to_go[rows]


# ---- a student's teacher -----------------------------------------------------------------------------------


def load_onnx(path: Path, name: str | None, cfg: Any) -> tuple[OnnxTeacher, data.Task, dict[str, Any]]:
    """A teacher.Teacher's fields. name: its task; its statistics are the dataset's. cfg: a distill.Config.

    Raises UserError as OnnxTeacher does, and where no task or no return can be asked for.
    """
    if name is None:
        raise UserError(
            f"{path}: an ONNX file names no dataset; name each teacher's with --envs or --datasets"
        )
    with processes.rank_0_first():
        dataset = data.load(name, cfg.seed)
    model = OnnxTeacher(path, dataset.task)
    if cfg.ask > 0 and cfg.loss != "nll" and not model.takes_return:
        raise UserError(f"--ask {cfg.ask}: {path} takes no return_to_go, it can't be asked; use --ask 0")
    return model, dataset.task, _metrics(model, dataset, cfg.eval_episodes)


def _metrics(model, dataset, eval_episodes):
    """As in the metrics.json of a run of teacher.py. `target`: without return_to_go, what it returned."""
    task = dataset.task
    names = ("return_mean", "return_std", "episodes", "normalized_score", "sweep", "retention")
    metrics = {"target": task.target, **dict.fromkeys(names), "data": dataset.facts()}
    if eval_episodes and task.env_id and not processes.rank():
        returns, _ = evaluate.play(model, task, task.target, eval_episodes, evaluate.SEED)
        metrics |= evaluate.scores(returns, task)
        if model.takes_return:
            episodes = evaluate.sweep_episodes(eval_episodes)
            metrics["sweep"] = evaluate.sweep(model, task, episodes, evaluate.SEED)
        else:
            metrics["target"] = metrics["return_mean"]
        print(
            f"{task.name}: {model.path} returns {metrics['return_mean']:.0f} +- {metrics['return_std']:.0f}, "
            f"score {metrics['normalized_score']:.1f} (mean and std of {eval_episodes} episodes)",
            flush=True,
        )
    metrics["target_gap"] = evaluate.target_gap(metrics["sweep"], metrics["data"], task)
    metrics["flags"] = verdict.verdict(task, metrics).names()
    return metrics


# ---- files -------------------------------------------------------------------------------------------------


def _read(path):
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} is larger than {MAX_BYTES:,} bytes; name a smaller policy")
        return path.read_bytes()
    except OSError as e:
        raise UserError(f"can't read {path} ({e.strerror}); name an ONNX file or a run directory") from None


def _checked(path: Path, blob: bytes) -> int:
    """The number of parameters. Raises UserError where weights lie in other files, or a loop need not end."""
    import onnx

    try:
        proto = onnx.load_from_string(blob)
        messages = list(_messages(proto))
    except Exception as e:  # noqa: BLE001 - protobuf's own, or a RecursionError
        raise UserError(_damaged(path, e)) from None
    if any(getattr(m, "data_location", 0) == onnx.TensorProto.EXTERNAL for m in messages):
        raise UserError(f"{path} keeps weights in other files; export it as one (external_data=False)")
    if proto.functions or any(getattr(m, "op_type", "") == "Loop" for m in messages):
        raise UserError(f"{path} holds loops or functions; export a feed-forward policy, functions inlined")
    return sum(math.prod(tensor.dims) for tensor in proto.graph.initializer)


def _messages(message: Any) -> Iterator[Any]:
    """A protobuf message and all messages in it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type:
            for part in value if hasattr(value, "__len__") else [value]:
                yield from _messages(part)


def _session(path, blob):
    """An onnxruntime.InferenceSession, {input: (type, shape)}, and the outputs' names."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # where it says that it tries again
            session = export.session(blob, quiet=True)
        inputs = {x.name: (x.type, x.shape) for x in session.get_inputs()}
        return session, inputs, [x.name for x in session.get_outputs()]
    except Exception as e:  # noqa: BLE001 - onnxruntime has a class of its own for each of its errors
        raise UserError(_damaged(path, e)) from None


def _damaged(path, e):
    return f"{path} is no ONNX file that onnxruntime can run ({_reason(e)}); export it again"


def _reason(e):
    return (first_line(e) or type(e).__name__)[:200]

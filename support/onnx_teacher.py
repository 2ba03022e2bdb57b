"""Any policy as a teacher: an ONNX file from observations to an action, run by onnxruntime on the CPU.

Used by teacher.find. Nothing in a file is unpickled or executed but ONNX's operators. In the environment's
units, of B rows, any number:

    inputs   observation (B, O); and, where the policy is asked for a return, return_to_go (B,) or (B, 1)
             or, beside or in place of these, a history of K timesteps, K fixed in the file: observations
             (B, K, O), with or without returns_to_go (B, K) or (B, K, 1), timesteps (B, K) int64, mask (B, K)
             bool, and actions (B, K, A), discrete ones one-hot
             or, of images, pixels (B, K c, H, W), uint8 or floats from 0 to 255, beside or in place of these:
             the images of the last K timesteps, c channels each, as support/spaces.py makes them
    outputs  mean or action (B, A), with or without log_std (B, A) or (A,); or logits (B, n) of n discrete
             actions, of several factors (MultiDiscrete) one after the other; others are ignored

A history ends with the present timestep, whose action is not chosen yet: zeros. Where an episode or a
student's window has fewer timesteps, it begins with zeros, at which mask is False.
"""

import contextlib
import functools
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
from support import UserError, isolation, processes, reason, spaces, verdict

MAX_BYTES = 2**30  # as of a model's weights
# Of a policy that has no log_std, in half action ranges: twice distill.py's --sigma-floor, so that the floor
# does not decide; the KL is then a squared error of the means, and a student's sigma does not collapse.
SIGMA = 0.1
FLOATS = {"tensor(float)": np.float32, "tensor(double)": np.float64}
TYPES = {
    "timesteps": {"tensor(int64)": np.int64},
    "mask": {"tensor(bool)": np.bool_},
    "pixels": {"tensor(uint8)": np.uint8, **FLOATS},
}  # of others: FLOATS
HISTORY = {"observations": (3,), "actions": (3,), "returns_to_go": (2, 3), "timesteps": (2,), "mask": (2,)}
RANKS = {"observation": (2,), "return_to_go": (1, 2), "pixels": (4,), **HISTORY}
UNDERSTOOD = (
    "understood are inputs observation (B, O) or pixels (B, K c, H, W) and, optionally, return_to_go (B,), "
    "floats, or a history (see docs/extending.md); outputs mean or action (B, A) with or without log_std, or "
    "logits (B, n) of discrete actions"
)
AT_ONCE = 4096  # timesteps, of all histories of a batch
IMAGES_AT_ONCE = 256

History = dict[str, np.ndarray]  # of N rows, in the environment's units, by the names of HISTORY


class OnnxTeacher:
    """Called as a dt.DecisionTransformer of one task is; and a policy for evaluate.play.

    Raises UserError where the file can't be read, or is not a policy of this task.
    """

    def __init__(self, path: Path, task: data.Task):
        import onnx  # noqa: F401 - an import in the process that is forked would be lost
        import onnxruntime  # noqa: F401

        self.path = path
        self.task = task
        blob = _read(path)
        # a small file can ask for any amount of memory or time: it is first tried where that is limited
        open_ = functools.partial(self._open, blob)
        isolation.isolated(open_, len(blob), functools.partial(_damaged, path))
        open_()

    def _open(self, blob):
        self.n_params = _checked(self.path, blob)
        self.session, inputs, outputs = _session(self.path, blob)
        self._take_names(inputs, outputs)
        self._check_sizes(inputs)
        self.cfg = dt.ModelConfig.of([self.task], context=self.K)
        self.rows = max(3, (IMAGES_AT_ONCE if self.task.image else AT_ONCE) // self.K)
        for rows in (3, self.rows):
            self._try(rows)

    def _take_names(self, inputs, outputs):
        """Which of them there are; see _session. Raises UserError where they are not those of a policy."""
        understood = not inputs.keys().isdisjoint({"observation", "observations", "pixels"})
        self.types = {}
        for name, (type_, shape) in inputs.items():
            types = TYPES.get(name, FLOATS)
            understood = understood and len(shape) in RANKS.get(name, ()) and type_ in types
            self.types[name] = types.get(type_)
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
        self.ranks = {name: len(shape) for name, (_, shape) in inputs.items()}
        self.takes_return = "return_to_go" in inputs or "returns_to_go" in inputs
        if "log_std" in outputs and not self.task.discrete:
            self.names.append("log_std")

    def _check_sizes(self, inputs):
        """Take K. Raises UserError where it is not fixed, or sizes are not those of the dataset."""
        lengths = {name: shape[1] for name, (_, shape) in inputs.items() if name in HISTORY}
        if "pixels" in inputs:
            self.n_frames = self._frames(inputs["pixels"][1])
            if self.n_frames > 1:
                lengths["pixels"] = self.n_frames
        self.takes_history = bool(lengths)
        self.K, *others = {*lengths.values()} or {1}
        if others or not isinstance(self.K, int) or not 0 < self.K <= dt.MAX_CONTEXT:
            given = ", ".join(f"{name} of {length}" for name, length in lengths.items())
            raise UserError(
                f"{self.path} takes {given} timesteps; export it again with one fixed number of 1 to "
                f"{dt.MAX_CONTEXT}"
            )
        sizes = {"observation": self.task.obs_dim, "observations": self.task.obs_dim}
        sizes["actions"] = self.task.act_dim
        for name in sizes.keys() & inputs.keys():
            given = inputs[name][1][-1]
            if isinstance(given, int) and given != sizes[name]:
                kind = "actions" if name == "actions" else "observations"
                raise UserError(
                    f"{self.path} takes {given} {kind}, dataset {self.task.dataset} has {sizes[name]}; put "
                    f"--teachers in the order of the tasks"
                )

    def _frames(self, shape):
        """How many timesteps' images the input `pixels` holds. Raises UserError where it can't hold them."""
        c, *sides = self.task.image or (0, 0, 0)
        _, channels, *given = shape
        if not c or given != sides or not isinstance(channels, int) or channels % c or not channels:
            wanted = f"pixels (B, K {c}, {', '.join(map(str, sides))})" if c else "no images"
            raise UserError(
                f"{self.path} takes pixels {shape}, dataset {self.task.dataset} has {wanted}; put "
                f"--teachers in the order of the tasks"
            )
        return channels // c

    def _try(self, rows):
        """Run it on mean observations. Raises UserError where sizes are not those of the dataset."""
        task = self.task
        history = self._empty(rows)
        observation = np.zeros((rows, task.obs_dim + spaces.n_pixels(task.observed)))
        observation[:, : task.obs_dim] = task.obs_mean
        self._append(history, observation, np.full(rows, task.target))
        outputs = self._run(history)
        name, action = self.names[0], outputs[0]
        A = task.act_dim
        if action.shape != (rows, A):
            raise UserError(
                f"{self.path} gives {name} {action.shape} for {rows} observations, dataset {task.dataset} "
                f"needs ({rows}, {A}); put --teachers in the order of the tasks"
            )
        if len(outputs) > 1 and outputs[1].shape not in ((rows, A), (1, A), (A,)):
            raise UserError(
                f"{self.path} gives log_std {outputs[1].shape} for {rows} observations: must be "
                f"({rows}, {A}) or ({A},)"
            )

    def _run(self, history: History) -> list[np.ndarray]:
        """What the file makes of N rows."""
        last = {"observation": "observations", "return_to_go": "returns_to_go"}
        feed = {}
        for name, type_ in self.types.items():
            x = history[last[name]][:, -1] if name in last else history[name]
            if name == "pixels":
                x = x[:, -self.n_frames :].reshape(len(x), -1, *self.task.image[1:])
            if x.ndim < self.ranks[name]:  # returns of (B, 1) or (B, K, 1)
                x = x[..., None]
            feed[name] = x.astype(type_)
        try:
            outputs = self.session.run(self.names, feed)
        except Exception as e:  # noqa: BLE001 - onnxruntime has a class of its own for each of its errors
            raise UserError(
                f"{self.path} does not run on {len(history['mask'])} observations of {self.task.obs_dim} "
                f"numbers, as dataset {self.task.dataset} has them ({reason(e)}); export it again for these"
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

    def policy(self, history: History) -> tuple[np.ndarray, np.ndarray]:
        """N rows -> mean and log_std (N, A) of their last timestep, in the student's units.

        Of discrete actions: their log-probabilities, and zeros.
        """
        action, *log_std = self._run(history)
        if self.task.discrete:
            logits = torch.from_numpy(action.clip(NEVER, -NEVER))  # a mask's -inf too
            return dt.log_softmax(logits, self.task.choices).numpy(), np.zeros_like(action)
        low = np.array(self.task.act_low)
        half_range = (np.array(self.task.act_high) - low) / 2
        mean = ((action.clip(low, self.task.act_high) - low) / half_range - 1).clip(-1, 1)
        log_std = log_std[0] - np.log(half_range) if log_std else math.log(SIGMA)
        return mean, np.broadcast_to(np.clip(log_std, *LOG_STD), mean.shape)

    def __call__(
        self,
        task: int,
        states: Tensor,
        actions: Tensor,
        rtg: Tensor,
        timesteps: Tensor,
        mask: Tensor,
        pixels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Shapes and units: dt.DecisionTransformer.forward. Zeros where mask is False."""
        task = self.task
        arrays = {
            "observations": states.double().cpu().numpy() * task.obs_std + task.obs_mean,
            "actions": self._in_units(actions.double().cpu().numpy()),
            "returns_to_go": rtg.double().cpu().numpy() * task.rtg_scale,
            "timesteps": timesteps.cpu().numpy(),
            "mask": mask.cpu().numpy(),
        }
        if pixels is not None:
            arrays["pixels"] = pixels.cpu().numpy()
        out = np.zeros((2, *mask.shape, task.act_dim), np.float32)
        windows, places = arrays["mask"].nonzero()
        for i in range(0, len(windows), self.rows):
            window = windows[i : i + self.rows]
            place = places[i : i + self.rows]
            history = self._empty(len(window))
            for back in range(min(self.K, mask.shape[1])):
                rows = (place >= back) & arrays["mask"][window, place - back]
                for name, x in arrays.items():
                    history[name][rows, -1 - back] = x[window[rows], place[rows] - back]
            history["actions"][:, -1] = 0
            out[:, window, place] = self.policy(history)
        return tuple(torch.from_numpy(out).to(states))

    def _in_units(self, actions):
        """(..., A), as datasets and students have them -> in the environment's units; discrete: one-hot."""
        if self.task.discrete:
            return actions
        low = np.array(self.task.act_low)
        return low + (actions + 1) / 2 * (np.array(self.task.act_high) - low)

    def _empty(self, rows: int) -> History:
        """Histories of no timestep."""
        return {
            "observations": np.zeros((rows, self.K, self.task.obs_dim)),
            "actions": np.zeros((rows, self.K, self.task.act_dim)),
            "returns_to_go": np.zeros((rows, self.K)),
            "timesteps": np.zeros((rows, self.K), np.int64),
            "mask": np.zeros((rows, self.K), bool),
            "pixels": np.zeros((rows, self.K, spaces.n_pixels(self.task.observed)), np.uint8),
        }

    def _append(self, history: History, observation: np.ndarray, return_to_go: np.ndarray) -> None:
        """Add a timestep, observation (N, O + P) and return_to_go (N,), whose action is not chosen yet."""
        timestep = np.where(history["mask"][:, -1], history["timesteps"][:, -1] + 1, 0)
        present = {
            "observations": observation[:, : self.task.obs_dim],
            "pixels": observation[:, self.task.obs_dim :],
            "actions": 0,
            "returns_to_go": return_to_go,
            "timesteps": timestep,
            "mask": True,
        }
        for name, x in history.items():
            x[:, :-1] = x[:, 1:]
            x[:, -1] = present[name]

    # ---- its own episodes, for evaluate.play ----

    def reset(self, target_return: ArrayLike, episodes: int) -> None:
        self.return_to_go = np.full(episodes, target_return, float)
        self.history = self._empty(episodes)

    def act(self, observation: np.ndarray, reward: np.ndarray) -> np.ndarray:
        """observation (E, O + P), reward (E,) -> the mean (E, A), or the likeliest of discrete actions (E,)
        or (E, F).
        """
        task = self.task
        self.return_to_go = self.return_to_go - reward
        self._append(self.history, observation, self.return_to_go)
        mean, _ = self.policy(self.history)
        if task.discrete:
            best = dt.likeliest(torch.from_numpy(mean), task.choices)
            self.history["actions"][:, -1] = dt.one_hot(best, task.choices).numpy()
            return best.numpy().reshape(-1, *task.action_shape) + task.first_action
        action = self._in_units(mean).clip(task.act_low, task.act_high).astype(np.float32)
        self.history["actions"][:, -1] = action
        return action

    def keep(self, rows: np.ndarray) -> None:
        self.return_to_go = self.return_to_go[rows]
        self.history = {name: x[rows] for name, x in self.history.items()}


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
    if cfg.ask not in ("auto", 0) and cfg.state_noise == 0 and cfg.loss != "nll" and not model.takes_return:
        raise UserError(
            f"--ask {cfg.ask}: {path} takes no return_to_go or returns_to_go, it can't be asked for returns; "
            f"ask in other states (--state-noise 0.5), or use --ask 0"
        )
    return model, dataset.task, _metrics(model, dataset, cfg.eval_episodes)


def _metrics(model, dataset, eval_episodes):
    """As in the metrics.json of a run of teacher.py. `target`: without return_to_go, what it returned."""
    task = dataset.task
    names = ("return_mean", "return_std", "episodes", "normalized_score", "sweep", "retention")
    metrics = {"target": task.target, **dict.fromkeys(names), "data": dataset.facts()}
    if eval_episodes and task.env_id and not processes.rank():
        metrics |= evaluate.measured(model, task, task.target, eval_episodes, evaluate.SEED)
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
        raise UserError(_damaged(path, reason(e))) from None
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
        raise UserError(_damaged(path, reason(e))) from None


def _damaged(path, why):
    return f"{path} is no ONNX file that onnxruntime can run ({why}); export it again"

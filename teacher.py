"""Train one teacher: a Decision Transformer on one offline dataset, by negative log-likelihood.

    python teacher.py --env hopper
    python teacher.py --dataset mujoco/hopper/medium-v0
    torchrun --nproc_per_node=8 teacher.py --env hopper

The run's directory, out/teacher-<task>, then holds config.json, log.csv, metrics.json and the model.
distill.py loads teachers, and trains those that are missing, by `find`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import evaluate
import kernels
import model as dt
import muon
from policy import Policy
from support import (
    UserError,
    cli,
    environments,
    files,
    hub,
    jobs,
    log,
    machine,
    processes,
    run_directory,
    training,
    verdict,
)
from support.checkpoint import Checkpoint
from support.onnx_teacher import OnnxTeacher, load_onnx


@dataclasses.dataclass
class Config:
    # task
    env: data.EnvName = "hopper"  # built-in task; mw/TASK: one of Meta-World's (docs/metaworld.md)
    dataset: str = ""  # Minari id, in place of --env
    # model
    context: int = 1  # K, timesteps; more where an observation does not hold the whole state
    n_layer: int = 3  # transformer blocks
    n_head: int = 1  # attention heads
    n_embd: int = 128  # channels
    tokens: Literal[1, 3] = 1  # of a timestep: R, s and a (Chen et al.), or one sum of R, s and the last a
    dropout: float = 0.0  # share of activations
    # optimisation
    steps: int = 1250  # updates
    batch_size: int = 512  # windows per update and process
    top: float = 0.1  # half of the windows come from this share of the data, of highest return; 1: all
    optimizer: Literal["muon", "adamw"] = "muon"  # of the blocks' matrices; all else: AdamW
    lr: float = 5e-3  # peak, after linear warm-up; then linear decay to zero
    warmup: int = 100  # updates
    weight_decay: float = 1e-4  # times the learning rate
    grad_clip: float = 0.25  # largest norm of an update's gradient
    # run
    out_dir: str = ""  # the run's directory; default: out/teacher-<task>
    eval_episodes: int = 20  # episodes per target return; 0: no evaluation
    imports: cli.Imports = ()  # packages to import, which register environments
    seed: int = 0  # of weights, windows and the held-out split
    device: str = "auto"  # cpu, cuda, cuda:<number> or auto
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the blocks; auto: bfloat16 where native
    data_device: Literal["auto", "device", "host"] = "auto"  # where the data lie; auto: host if too large
    log_interval: int = 100  # updates between rows of log.csv
    tensorboard: bool = False  # also log to TensorBoard, in the run's directory
    wandb: bool = False  # also log to Weights & Biases, project manyteachers
    checkpoint_interval: int = 1000  # updates between checkpoints
    resume: bool = False  # go on from the last checkpoint, if there is one
    overwrite: bool = False  # replace a run of other settings, or an unfinished one

    def check(self) -> None:
        """Raise UserError for a value that can't be, before anything is done."""
        cli.at_least(self, context=1, n_layer=1, n_head=1, n_embd=1, dropout=0)
        cli.at_least(self, steps=1, batch_size=1, lr=0, warmup=1, weight_decay=0, grad_clip=1e-9)
        cli.at_least(self, eval_episodes=0, seed=0, log_interval=1, checkpoint_interval=1)
        cli.check_trackers(self)
        machine.check_device(self.device)
        if self.dropout >= 1:
            raise UserError(f"--dropout {self.dropout}: must be below 1")
        if self.n_embd % self.n_head:
            raise UserError(f"--n-embd {self.n_embd}: must be a multiple of --n-head {self.n_head}")
        if self.context > dt.MAX_CONTEXT:
            raise UserError(f"--context {self.context}: must be at most {dt.MAX_CONTEXT}")
        cli.check_share(self)
        if not self.dataset:
            data.check_env(self.env)


def directory(name: str) -> Path:
    """The default run directory of a task's teacher; name: a key of data.ENVS or a Minari id."""
    return Path("out") / f"teacher-{name.replace('/', '-')}"


class Learner:
    """A teacher, and all that its updates change: tensors on the device, by name in `state`.

    `record` (log_interval, 2) holds in row step % log_interval: loss and gradient norm.
    """

    def __init__(
        self,
        cfg: Config,
        model: dt.DecisionTransformer,
        windows: data.Windows,
        generator: torch.Generator,
        factors: tuple[int, ...],
    ):
        device = windows.size.device
        self.cfg = cfg
        self.model = model
        self.windows = windows
        self.generator = generator
        self.factors = factors
        self.share = torch.ones(1, device=device)  # of the only task
        self.schedule = training.schedule(cfg.steps, cfg.lr, cfg.warmup).to(device)
        self.theta = dt.flatten(model)  # (P,)
        self.matrices = muon.shapes(model) if cfg.optimizer == "muon" else []
        self.m = torch.zeros_like(self.theta.data)  # (P,) the optimiser's moments
        self.v = torch.zeros_like(self.theta.data)
        self.done = torch.zeros(1, dtype=torch.long, device=device)  # updates
        self.alive = torch.ones((), dtype=torch.bool, device=device)  # no gradient so far was infinite or NaN
        self.record = torch.zeros(cfg.log_interval, 2, device=device)
        self.state = {"theta": self.theta.data}
        for name in ("m", "v", "done", "alive", "record"):
            self.state[name] = getattr(self, name)
        self.step = self.update
        if kernels.compiled(device) and not windows.host and processes.world() == 1:
            self.step = training.captured(self.update, list(self.state.values()), generator)

    def nll(self, batch: data.Batch) -> Tensor:
        """() in nats, mean over valid timesteps and action dimensions."""
        return dt.mean_nll(*self.model(0, *batch[1:7]), batch.actions, batch.mask, self.factors)

    @torch.no_grad()
    def held_out_nll(self, batch: data.Batch) -> float:
        """The same as the teacher will act: without dropout, in float32."""
        self.model.eval()
        nll = self.nll(batch).item()
        self.model.train()
        return nll

    @torch.no_grad()
    def held_out_log_std(self, batch: data.Batch) -> float | None:
        """Mean over valid timesteps and action dimensions, of a model in evaluation mode; None: discrete."""
        return None if self.factors else self.model(0, *batch[1:7])[1][batch.mask].mean().item()

    def update(self) -> None:
        """One update, in which nothing waits for the device."""
        batch = self.windows.sample(self.cfg.batch_size, self.share, self.generator)
        loss = self.nll(batch)
        n_tokens = batch.mask.sum()
        total, all_tokens = processes.summed(loss.detach() * n_tokens, n_tokens)
        self.theta.grad.zero_()
        (loss * (n_tokens / all_tokens)).backward()  # of the mean over all processes' tokens
        processes.all_reduce(self.theta.grad)
        with torch.no_grad():
            norm = muon.step(
                self.theta,
                self.theta.grad,
                None,
                self.m,
                self.v,
                schedule=self.schedule[self.done][0],
                alive=self.alive,
                clip=self.cfg.grad_clip,
                weight_decay=self.cfg.weight_decay,
                shapes=self.matrices,
            )[2]
            self.record[self.done % self.cfg.log_interval] = torch.stack((total / all_tokens, norm))
            self.done.add_(1)


def main(cfg: Config) -> Path:
    """Train and evaluate; returns the run's directory. Skips a run that is there already."""
    cfg.check()
    environments.import_packages(cfg.imports)
    name = data.task_name(cfg.dataset) if cfg.dataset else cfg.env
    out = Path(cfg.out_dir) if cfg.out_dir else directory(name)
    if not run_directory.start(out, cfg):
        print(f"teacher of {name} is there: {out} (--overwrite to train it again)")
        return out
    clock = log.Clock()
    with clock("data"):
        with processes.rank_0_first():
            dataset = data.load(name, cfg.seed)
        task = dataset.task
        if cfg.eval_episodes:
            evaluate.check([task])
        device = machine.device(cfg)
        of_task = ([task], cfg.context, device, cfg.data_device)
        pixels = [dataset.train_pixels]
        windows = data.Windows([dataset.train], *of_task, top=cfg.top, pixels=pixels)
        held_out = data.Windows([dataset.held_out], *of_task, pixels=[dataset.held_out_pixels]).spread()
    learner = make_learner(cfg, dataset, windows)
    model = learner.model
    held_out_nll = functools.partial(learner.held_out_nll, held_out)
    meta = {"tasks": [dataclasses.asdict(task)]}
    with clock("train"):
        checkpoint = train(cfg, out, learner, task, meta, held_out_nll)
    if processes.rank():
        processes.barrier()  # when rank 0 is done
        return out
    held = held_out_nll()
    seconds_of_training = checkpoint.seconds
    model.eval()
    dt.save(out, model, meta)
    with clock("evaluate"):
        metrics = evaluated(cfg, model, task, held)
    metrics["heldout_nll_rise"] = held - float(np.nanmin(files.read_csv(out / "log.csv")["heldout_nll"]))
    metrics["heldout_log_std"] = learner.held_out_log_std(held_out)
    metrics["data"] = dataset.facts()
    metrics["target_gap"] = evaluate.target_gap(metrics["sweep"], metrics["data"], task)
    metrics["flags"] = verdict.verdict(task, metrics).names()
    results = {
        "tasks": {task.name: metrics},
        "compression": None,
        "parameters": model.n_params,
        "seconds": {**clock.seconds, "train": round(seconds_of_training, 2)},
        "machine": machine.describe(cfg),
    }
    files.write_json(out / "metrics.json", results)
    checkpoint.finish()
    processes.barrier()
    for line in verdict.lines([task], results["tasks"]):
        print(line, flush=True)
    return out


def make_learner(cfg: Config, dataset: data.Dataset, windows: data.Windows) -> Learner:
    """A teacher, initialised by seed, and the generator of its windows; says what it is."""
    task = dataset.task
    device = windows.size.device
    torch.manual_seed(cfg.seed)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    sizes = {k: getattr(cfg, k) for k in ("n_layer", "n_head", "n_embd", "tokens", "context", "dropout")}
    model = dt.DecisionTransformer(dt.ModelConfig.of([task], **sizes)).to(device)
    model.bfloat16 = machine.bfloat16(cfg)
    training.seed_dropout(cfg)
    print(
        f"{task.name}: {len(dataset.lengths)} episodes, {dataset.lengths.sum():,} steps; "
        f"teacher of {model.n_params:,} parameters on {device}, "
        f"blocks in {'bfloat16' if model.bfloat16 else 'float32'}; kernels: {kernels.path(device)}",
        flush=True,
    )
    return Learner(cfg, model, windows, generator, model.cfg.factors[0])


def train(
    cfg: Config,
    out: Path,
    learner: Learner,
    task: data.Task,
    meta: dict[str, Any],
    held_out_nll: Callable[[], float],
) -> Checkpoint:
    """The loop of updates, with log and checkpoints; goes on from a checkpoint where --resume says so.

    Raises UserError where a loss is not finite; the model before that update is saved.
    """
    generators = {"windows": learner.generator}
    settings = run_directory.settings(cfg)
    checkpoint = Checkpoint(out, cfg, learner.state, generators, dataclasses.asdict(task), settings)
    first, csv = checkpoint.restore()
    silent = True if processes.rank() else None
    bar = tqdm(total=cfg.steps, initial=first, unit="step", desc=f"teacher {task.name}", disable=silent)
    with bar, checkpoint, training.Threads(learner.theta.device) as threads:
        for step in range(first, cfg.steps):
            threads(learner.step)
            bar.update()
            due = (step + 1) % cfg.log_interval == 0 or step + 1 == cfg.steps
            if due and not processes.rank():
                rows = learner.record[: step % cfg.log_interval + 1].tolist()
                check_finite(rows, step + 1 - len(rows), cfg, out, learner.model, task, meta)
                loss, norm = rows[-1]
                held = held_out_nll()
                lr = training.learning_rate(step, cfg.steps, cfg.lr, cfg.warmup)
                seconds = checkpoint.seconds
                csv.row(step=step + 1, nll=loss, heldout_nll=held, grad_norm=norm, lr=lr, seconds=seconds)
                csv.flush()
                text = f"nll {loss:7.3f} | held-out {held:7.3f} | grad {norm:6.2f}"
                bar.write(log.progress(step + 1, cfg.steps, seconds, text))
            checkpoint.after(step + 1)
    return checkpoint


def check_finite(
    rows: list[list[float]],
    first: int,
    cfg: Config,
    out: Path,
    model: dt.DecisionTransformer,
    task: data.Task,
    meta: dict[str, Any],
) -> None:
    """Raise UserError where a loss or a gradient of updates first, first + 1, ... is not finite.

    That update was not applied, nor any after it: the model of before is saved.
    """
    for i, (loss, norm) in enumerate(rows, first):
        if not math.isfinite(loss + norm):
            dt.save(out, model, meta)
            raise UserError(
                f"loss {loss:.4g}, gradient norm {norm:.4g} in step {i + 1} of teacher {task.name}: stopped; "
                f"the model before that step is kept in {out}; try a lower --lr than {cfg.lr:g}"
            )


def evaluated(cfg: Config, model: dt.DecisionTransformer, task: data.Task, held: float) -> dict[str, Any]:
    """metrics.json's part of the task; held: the held-out negative log-likelihood."""
    metrics = {
        "target": task.target,
        **dict.fromkeys(("return_mean", "return_std", "episodes", "normalized_score", "sweep")),
        **dict.fromkeys(("retention", "heldout_kl")),  # of students
        "heldout_nll": held,
    }
    if not (cfg.eval_episodes and task.env_id):
        return metrics
    for name in (task.target_name, "median"):
        target = task.targets[name]
        policy = Policy.of(model, task, 0)
        scores = evaluate.measured(policy, task, target, cfg.eval_episodes, evaluate.SEED)
        metrics |= scores if name == task.target_name else {name: {"target": target, **scores}}
        success = f", success rate {scores['success_rate']:.2f}" if "success_rate" in scores else ""
        print(
            f"{task.name}: target {target:.0f} ({name}) -> "
            f"return {scores['return_mean']:.0f} +- {scores['return_std']:.0f}, "
            f"score {scores['normalized_score']:.1f}{success} (mean and std of {cfg.eval_episodes} episodes)",
            flush=True,
        )
    episodes = evaluate.sweep_episodes(cfg.eval_episodes)
    metrics["sweep"] = evaluate.sweep(policy, task, episodes, evaluate.SEED)
    return metrics


# ---- the teachers of a student -----------------------------------------------------------------------------


Model = dt.DecisionTransformer | OnnxTeacher


class Teacher(NamedTuple):
    model: Model
    task: data.Task
    metrics: dict[str, Any]  # of its task, as in its metrics.json


def find(cfg: Any) -> list[Teacher]:
    """Load the teachers that distill.Config names, in that order, and train those that are missing first.

    Raises UserError where one could not be trained, or they do not fit the tasks or each other.
    """
    names = [*data.expanded(cfg.envs), *map(data.task_name, cfg.datasets)]
    if not names and not cfg.teachers:
        names = list(data.DEFAULT_ENVS)
    if names and cfg.teachers and len(names) != len(cfg.teachers):
        raise UserError(
            f"{len(cfg.teachers)} --teachers for {len(names)} tasks; "
            "name one for each task, in the same order"
        )
    with processes.rank_0_first():
        directories = [hub.directory(d) for d in cfg.teachers] or [directory(name) for name in names]
    listed = " ".join(map(str, directories))
    if len(set(directories)) < len(directories):
        raise UserError(f"the same task twice among {listed}; name each once")
    missing = [] if cfg.teachers else [name for name in names if not is_there(cfg, name)]
    if missing and cfg.share:  # before a teacher is trained in vain
        with processes.rank_0_first():
            data.groups_of([data.load(name, cfg.seed).task for name in names])
    if missing:
        train_missing(cfg, missing)
    found = []
    for i, path in enumerate(directories):
        name = names[i] if names else None
        is_onnx = path.suffix == ".onnx" or path.is_file()
        loaded = load_onnx(path, name, cfg) if is_onnx else load(path, machine.device(cfg), name)
        found.append(Teacher(*loaded))
    if len({t.task.name for t in found}) < len(found):
        raise UserError(f"two teachers of one task among {listed}; a student takes one for each task")
    models = [t.model for t in found]
    of_one_timestep = [m for m in models if isinstance(m, OnnxTeacher) and not m.takes_history]
    contexts = {m.cfg.context for m in models if m not in of_one_timestep}
    if len(contexts) > 1:
        raise UserError(
            f"teachers of different context lengths {sorted(contexts)}; train them with one --context, and "
            f"export ONNX files with histories of as many timesteps"
        )
    for model in of_one_timestep:  # of as many as the others are shown
        model.cfg = dataclasses.replace(model.cfg, context=max(contexts, default=1))
    return found


def is_there(cfg: Any, name: str) -> bool:
    """Whether the teacher of a task is trained, as rank 0 sees it; says so."""
    path = directory(name)
    if not processes.broadcast_int(files.read_json(path / "metrics.json") is not None):
        print(f"no teacher in {path}: training it", flush=True)
        return False
    steps = (files.read_json(path / "config.json") or {}).get("steps")
    note = f", of {steps} updates in place of {cfg.teacher_steps}"
    print(f"teacher of {name} is there: {path}{note if steps != cfg.teacher_steps else ''}")
    return True


def train_missing(cfg: Any, names: list[str]) -> None:
    """Train these tasks' teachers, as many at a time as cfg.jobs says; each process of a job takes its part.

    Raises UserError, when all have ended, where some failed.
    """
    mine = names[processes.rank() :: processes.world()]
    slots = job_slots(cfg, len(mine))
    if len(slots) <= 1 and processes.world() == 1:
        for name in mine:
            main(Config(**options_of(cfg, name)))
        return
    commands = {}
    for name in mine:
        words = [__file__]
        for option, value in options_of(cfg, name).items():
            if value and option == "imports":
                words += ["--import", *value]
            elif option != "imports" and value is not False:
                words.append(f"--{option.replace('_', '-')}")
                words.extend([] if value is True else [str(value)])
        commands[name] = words
    failures = jobs.run(commands, slots, cfg.teacher_steps) if mine else {}
    failed = "; ".join(f"{name} ({reason})" for name, reason in failures.items())
    failed = "; ".join(filter(None, processes.gathered_text(failed)))
    if failed:
        raise UserError(
            f"no teacher of {failed}; the other teachers are kept, the same command with --resume goes on"
        )


def job_slots(cfg: Any, n: int) -> list[dict[str, str]]:
    """What gives each of the teachers trained at a time its threads and GPU: environment variables."""
    threads = torch.get_num_threads()
    gpus = machine.gpus(cfg)
    at_a_time = cfg.jobs or max(1, len(gpus))
    if not cfg.jobs and machine.device(cfg) == "cpu":
        # rounds of equal size: 3 teachers on 2 cores at once, for with 2 and then 1 a core would be idle
        rounds = max(1, n // threads)
        at_a_time = math.ceil(n / rounds)
    n = min(n, at_a_time)
    slots = []
    for i in range(n):
        slots.append({"OMP_NUM_THREADS": str(max(1, threads // n))})
        if gpus:
            slots[i]["CUDA_VISIBLE_DEVICES"] = gpus[i % len(gpus)]
    return slots


def options_of(cfg: Any, name: str) -> dict[str, Any]:
    """The options of teacher.py for a task, where distill.Config says anything else than its defaults."""
    shared = (
        "seed",
        "device",
        "dtype",
        "eval_episodes",
        "imports",
        "checkpoint_interval",
        "resume",
        "overwrite",
        "data_device",
        "tensorboard",
        "wandb",
    )
    options = {option: getattr(cfg, option) for option in shared}
    options["env" if name in data.ENVS else "dataset"] = name
    return options | {"steps": cfg.teacher_steps, "top": cfg.teacher_top}


def load(path: Path, device: str, name: str | None) -> Teacher:
    """The teacher in a run directory. Raises UserError where it is not of the task `name`; None: of any."""
    model, meta = dt.load(path, device)
    task, *more = data.tasks(meta, path)
    if more:
        raise UserError(f"{path} holds a student of {1 + len(more)} tasks; a teacher has one")
    if name and task.name != name:
        raise UserError(
            f"{path} holds a teacher of {task.name}, not of {name}; put --teachers in the order of the tasks"
        )
    metrics = files.read_json(path / "metrics.json") or {}
    return Teacher(model, task, metrics.get("tasks", {}).get(task.name, {}))


if __name__ == "__main__":
    cli.run(main, Config, __doc__)

"""Distil many teachers, one per task, into one smaller student.

    python distill.py                          # hopper, halfcheetah, walker2d; trains missing teachers first
    python distill.py --envs hopper ant        # other built-in tasks
    python distill.py --datasets mujoco/hopper/medium-v0 mujoco/ant/medium-v0
    python distill.py --teachers out/teacher-hopper out/teacher-ant
    python distill.py --student out/student --envs ant --steps 1000 --out-dir out/of-four  # one task more
    torchrun --nproc_per_node=8 distill.py     # on several GPUs, or CPU cores

`Learner.update` is the method: which teacher next (curriculum.py), how far from it (kernels/kl.py), what to
do where the gradient conflicts with the last update (surgery.py). The run's directory then holds config.json,
log.csv (a row per update), metrics.json, the model and plots.png.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

import alignment
import curriculum
import data
import evaluate
import kernels
import model as dt
import muon
import report
import surgery
import teacher
from kernels.kl import DIRECTIONS, head_kl, own_map, per_teacher, policies
from policy import Policy
from support import (
    UserError,
    cli,
    environments,
    files,
    growing,
    log,
    machine,
    processes,
    run_directory,
    training,
    verdict,
)
from support.checkpoint import Checkpoint
from support.update_log import Diverged, UpdateLog

Envs = Annotated[
    tuple[Literal[tuple([*data.ENVS, *data.GROUPS])], ...],
    tyro.conf.arg(metavar=f"[{data.ENV_CHOICES[:-1]},{','.join(data.GROUPS)}}} ...]"),
]
Curricula = Literal[tuple(curriculum.METHODS)]
Surgeries = Literal[tuple(surgery.METHODS)]
TARGETS_AT_ONCE = 5120  # timesteps that a teacher is shown at a time, where its outputs are cached
ASKED_ROWS = 100_000  # of a task: timesteps at which its teacher is asked for other returns,
MOST_COPIES = 32  # of at most so many copies of an episode
GREEDY = 0.9  # of the most that a task may have of the batches: with more, and the highest KL, it is named
PROBED = 0.1  # of the updates, after which a run says how much any shares could do for the worst teacher


@dataclasses.dataclass
class Config:
    # tasks
    envs: Envs = ()  # built-in tasks; mw/TASK, mt10, mt50: Meta-World's; default: the first three
    datasets: tuple[str, ...] = ()  # Minari ids, besides or in place of --envs
    teachers: tuple[str, ...] = ()  # runs, hf://org/name, ONNX files; default: out/teacher-<task>, trained
    student: str = ""  # a finished student's run: begin with it, add these tasks to its own
    student_datasets: tuple[str, ...] = ()  # one for each teacher, in place of what it was trained on
    data_share: float = 1.0  # of each dataset's training episodes, for the student
    teacher_steps: int = teacher.Config.steps  # updates of a teacher trained first
    teacher_top: float = teacher.Config.top  # --top of a teacher trained first
    jobs: int = 0  # teachers trained at a time; 0: as many as keep all CPU cores or GPUs busy; 1: in turn
    # student
    n_layer: int = 2  # transformer blocks
    n_head: int = 1  # attention heads
    n_embd: int = 64  # channels
    tokens: Literal[1, 3] = 1  # of a timestep: R, s and a (Chen et al.), or one sum of R, s and the last a
    dropout: float = 0.0  # share of the activations dropped in training
    share: bool = False  # tasks of the same spaces share embedding and head, and get a task embedding
    # method
    curriculum: Curricula = "novelty"  # which teacher next
    novelty_power: float = 2.0  # shares ~ KL^power; inf: argmax of KL, 0: equal shares
    surgery: Surgeries = "none"  # of a gradient that conflicts
    surgery_scope: Literal["batch", "teacher"] = "batch"  # project the gradient of either
    alignment_weight: float = 0.0  # lambda of the score KL x (1 + lambda x alignment with the last update)
    alignment: Literal["exact", "estimate"] = "exact"  # forward mode, or the KL's change by an update
    loss: Literal["kl", "mse", "nll", "kl+nll"] = "kl"  # mse of the means; nll of the data's actions
    kl: Literal[DIRECTIONS] = "forward"  # forward: KL(teacher || student), reverse: KL(student || teacher)
    sigma_floor: float = 0.05  # added in squares to every variance, in half action ranges
    temperature: float = 1.0  # multiplies the teacher's sigma, divides its logits
    top: float = 0.1  # half of the windows come from this share of the data, of highest return; 1: all
    # share of the windows that ask teachers for other returns, in other states; auto: 0.5, without nll
    ask: float | Literal["auto"] = "auto"
    ask_low: float = 0.5  # lowest of these: 0 is the data's 10th percentile, 1 the default target return
    ask_high: float = 1.05  # highest, likewise
    state_noise: float = 0.5  # how far the states of these windows are moved, in standard deviations
    targets: Literal["cached", "live"] = "cached"  # teachers' outputs computed once, or in every update
    ask_copies: int = 0  # of an episode, with cached targets at other returns; 0: the more the less data
    probe_windows: int = 128  # windows per teacher, where KLs or alignments need windows of their own
    probe_interval: int = 1  # updates between probes, with --novelty-power inf
    # optimisation
    steps: int = 3000  # updates
    batch_size: int = 512  # windows per update and process, of all teachers together
    optimizer: Literal["muon", "adamw"] = "muon"  # of the blocks' matrices; all else: AdamW
    lr: float = 16e-3  # peak, after linear warm-up; then linear decay to zero
    warmup: int = 100  # updates
    weight_decay: float = 1e-4  # times the learning rate
    grad_clip: float = 0.25  # largest norm of an update's gradient
    # run
    out_dir: str = "out/student"  # the run's directory
    eval_episodes: int = 20  # episodes per task; 0: no evaluation
    retention: evaluate.Retained = "score"  # what it is of; success: the success rate, if a task reports one
    imports: cli.Imports = ()  # packages to import, which register environments
    seed: int = 0  # of weights, windows, and of a teacher trained first
    device: str = "auto"  # cpu, cuda, cuda:<number> or auto
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the blocks; auto: bfloat16 where native
    data_device: Literal["auto", "device", "host"] = "auto"  # where the data lie; auto: host if too large
    log_interval: int = 100  # updates between held-out KLs
    tensorboard: bool = False  # also log to TensorBoard, in the run's directory
    wandb: bool = False  # also log to Weights & Biases, project manyteachers
    checkpoint_interval: int = 1000  # updates between checkpoints
    resume: bool = False  # go on from the last checkpoint, of the teachers too
    overwrite: bool = False  # replace a run of other settings, or an unfinished one

    def check(self) -> None:
        """Raise UserError for a value that can't be, before anything is done."""
        cli.at_least(self, teacher_steps=1, jobs=0, n_layer=1, n_head=1, n_embd=1)
        cli.at_least(self, novelty_power=0, sigma_floor=0, temperature=1e-3)
        cli.at_least(self, probe_windows=1, probe_interval=1)
        cli.at_least(self, steps=1, batch_size=1, lr=0, warmup=1, weight_decay=0, grad_clip=1e-9)
        cli.at_least(self, eval_episodes=0, seed=0, log_interval=1, checkpoint_interval=1)
        cli.check_trackers(self)
        machine.check_device(self.device)
        if self.n_embd % self.n_head:
            raise UserError(f"--n-embd {self.n_embd}: must be a multiple of --n-head {self.n_head}")
        cli.check_share(self)
        if not 0 < self.teacher_top <= 1:
            raise UserError(f"--teacher-top {self.teacher_top}: must be above 0 and at most 1")
        cli.at_least(self, ask_copies=0, state_noise=0)
        if self.ask != "auto" and not 0 <= self.ask <= 1:
            raise UserError(f"--ask {self.ask}: must be auto, or at least 0 and at most 1")
        if not self.ask_low <= self.ask_high:  # nor NaN
            raise UserError(f"--ask-low {self.ask_low}: must be at most --ask-high {self.ask_high}")
        if not 0 < self.data_share <= 1:
            raise UserError(f"--data-share {self.data_share}: must be above 0 and at most 1")
        if not math.isfinite(self.alignment_weight):
            raise UserError(f"--alignment-weight {self.alignment_weight}: must be finite")
        if self.surgery_scope == "teacher" and self.surgery in ("none", *surgery.EACH):
            raise UserError(
                f"--surgery-scope teacher: with --surgery {self.surgery} there is nothing "
                "to project by teacher; choose previous"
            )
        if "nll" in self.loss and self.curriculum not in ("all", "fixed", "uniform"):
            raise UserError(
                f"--loss {self.loss} is no distance, for it may be negative: with --curriculum "
                f"{self.curriculum} it means nothing; choose all, fixed or uniform"
            )
        if self.loss == "kl+nll" and self.ask not in ("auto", 0):
            raise UserError(
                f"--loss kl+nll with --ask {self.ask}: the data's actions are no answer to another return; "
                f"use --ask 0 or --loss kl"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout {self.dropout}: must be at least 0 and below 1")
        if self.dropout and self.surgery in surgery.EACH:
            raise UserError(f"--dropout {self.dropout} with --surgery {self.surgery}: use one of them")
        for env in data.expanded(self.envs):
            data.check_env(env)


# ---- the method --------------------------------------------------------------------------------------------


class Losses(NamedTuple):
    """The distances of a batch, of all the job's processes unless said otherwise."""

    local: Tensor  # (N,) differentiable: this process's part of share_i L_i
    kl: Tensor  # (N,) L_i: KL, or what --loss says, a timestep and action dimension
    share: Tensor  # (N,) of the batch as drawn
    counts: Tensor  # (N,) valid timesteps
    c: Tensor  # (N,) <grad L_i, u> on this batch, where --surgery-scope teacher needs it


class Learner:
    """A student, and all that its updates change: tensors on the device, by name in `state`.

    cfg: see Config. student: its parameters are moved into one flat buffer, theta (P,). teachers: their
    models, read where targets are live. windows: the training data. generator: of the windows' device.
    `record` (log_interval, 5 + 3N) holds in row step % log_interval: loss, cosine, projected, gradient norm
    before and after surgery; and each teacher's share, KL and alignment.
    """

    def __init__(
        self,
        cfg: Config,
        student: dt.DecisionTransformer,
        teachers: list[teacher.Model],
        windows: data.Windows,
        generator: torch.Generator,
    ):
        self.cfg = cfg
        self.student = student
        self.teachers = teachers
        self.windows = windows
        self.generator = generator
        self.distance = Distance(cfg, student)
        self.choose, self.one_at_a_time = curriculum_of(cfg)
        # updates between probes; None: batches of mixed curricula show every teacher, they need no probe
        self.probe_interval = None
        if self.one_at_a_time:
            novelty = cfg.curriculum == "novelty"
            self.probe_interval = cfg.probe_interval if novelty else cfg.log_interval
        self.by_teacher = cfg.surgery_scope == "teacher"
        self.estimates = cfg.alignment == "estimate" and (cfg.alignment_weight != 0 or self.by_teacher)
        self.fused = kernels.compiled(windows.size.device) and cfg.surgery in surgery.FUSED
        self._allocate_state()
        self._capture_updates()

    def step(self, step: int) -> None:
        """Update number `step`, from 0. Raises Diverged where a KL has become NaN (on a CPU)."""
        try:
            if self.probe_interval and step % self.probe_interval == 0:
                self.probing_update()
            else:
                self.plain_update()
        except curriculum.NotANumber as e:
            raise Diverged(f"{e} in step {step + 1} of the student: stopped; it is") from None

    def update(self) -> None:
        """One update of the method, in which nothing waits for the device."""
        with torch.no_grad():
            # learn next from the teachers that the student matches least, weighed by their alignment a (N,)
            a = self.alignments.before_update()
            score = self.kl * (1 + self.cfg.alignment_weight * a).clamp_min(0)
            self.shares.copy_(self.choose(score, self.done, self.shares, self.generator))
            batch = self.windows.sample(self.cfg.batch_size, self.shares, self.generator)
            targets = self.targets(batch)

        # the distance from each teacher, and the gradient of their sum, weighted by share
        losses = self.losses(batch, targets)
        g = self.gradient(losses)

        with torch.no_grad():
            # never against the last update
            kappa = self.kappa(losses)
            step = self.operate_and_descend(g, kappa)
            self.alignments.after_update()
            self.remember(losses, step, a)

    def update_after_probe(self) -> None:
        """`update`, with the KLs measured on fixed windows of every teacher."""
        with torch.no_grad():
            self.kl.copy_(processes.averaged(self.probe(None)))
        self.update()

    # ---- the steps of an update ----

    def targets(self, batch: data.Batch) -> Tensor:
        """(2, B, K, A): what each window's own teacher makes of it."""
        if self.cfg.targets == "live" and self.cfg.loss != "nll":
            return live_targets(self.teachers, batch)
        return batch.targets

    def losses(self, batch: data.Batch, targets: Tensor) -> Losses:
        """The distance from each teacher on this batch."""
        n_windows = (batch.task == self.teacher_index[:, None]).sum(1)  # (N,)
        c = torch.zeros_like(self.kl)
        if self.by_teacher and not self.estimates:
            with torch.no_grad():
                c = alignment.exact(lambda x: self.distance.sums(batch, targets, x)[0], self.theta, self.u)
        sums, counts = self.distance.sums(batch, targets)
        all_sums, counts, n_windows, c = processes.summed(sums.detach(), counts, n_windows, c)
        share = n_windows / (self.cfg.batch_size * processes.world())
        n = counts.clamp_min(1)
        return Losses(share * (sums / n), all_sums / n, share, counts, c / n)

    def gradient(self, losses: Losses) -> Tensor:
        """(P,) of all processes' losses; (n, P), a row for each teacher in the batch, for surgery.EACH."""
        if self.cfg.surgery in surgery.EACH:
            parameters = tuple(dt.flat_order(self.student).values())
            rows = []
            for i in losses.share.nonzero().flatten():
                g_i = torch.autograd.grad(losses.local[i], parameters, retain_graph=True)
                rows.append(torch.cat([x.reshape(-1) for x in g_i]))
            g = torch.stack(rows)
        else:
            self.theta.grad.zero_()
            losses.local.sum().backward()
            g = self.theta.grad
        processes.all_reduce(g)
        return g

    def kappa(self, losses: Losses) -> Tensor | None:
        """How much of u to take away, with --surgery-scope teacher; None: what the batch's gradient says."""
        if not self.by_teacher:
            return None
        c = self.alignments.c if self.estimates else losses.c
        return surgery.per_teacher(c, losses.share, self.u @ self.u)

    def operate_and_descend(self, g: Tensor, kappa: Tensor | None) -> surgery.Step:
        """Surgery, clipping, Muon and AdamW, in place of theta, u, m and v."""
        return surgery.step(
            self.cfg.surgery,
            self.theta,
            g,
            self.u,
            self.m,
            self.v,
            kappa,
            fused=self.fused,
            alive=self.alive,
            schedule=self.schedule[self.done][0],
            clip=self.cfg.grad_clip,
            weight_decay=self.cfg.weight_decay,
            shapes=self.matrices,
        )

    def remember(self, losses: Losses, step: surgery.Step, a: Tensor) -> None:
        """Update the running mean of the KLs and write the update's row of `record`."""
        kl = self.kl
        if not self.probe_interval:
            # every teacher has windows: over about ten updates their KL costs nothing
            kl = torch.where(losses.counts > 0, kl + 0.1 * (losses.kl - kl), kl)
        loss = losses.share @ losses.kl
        scalars = torch.stack((loss, step.cosine, step.projected, step.norm, step.norm_after))
        self.record[self.done % self.cfg.log_interval] = torch.cat((scalars, losses.share, kl, a))
        self.kl.copy_(torch.where(self.alive, kl, self.kl))
        self.total_shares.add_(losses.share)
        self.done.add_(1)

    def mean_shares(self) -> Tensor:
        """(N,) of the updates so far."""
        return self.total_shares / self.done

    # ---- what can be captured and resumed ----

    def _allocate_state(self):
        """All that an update changes lies in tensors on the device, so it can be captured and replayed."""
        cfg = self.cfg
        device = self.windows.size.device
        N = len(self.student.cfg.act_dims)
        self.theta = dt.flatten(self.student)  # (P,)
        self.matrices = muon.shapes(self.student) if cfg.optimizer == "muon" else []
        self.u = torch.zeros_like(self.theta.data)  # (P,) the previous update's gradient, after surgery
        self.m = torch.zeros_like(self.theta.data)  # (P,) the optimiser's moments
        self.v = torch.zeros_like(self.theta.data)
        batch = self.windows.spread(cfg.probe_windows)
        with torch.no_grad():
            self.probe = functools.partial(self.distance, batch, self.targets(batch))
            self.kl = self.probe(None).clone()  # (N,) running mean
        kind = alignment.Exact if cfg.alignment_weight else alignment.Alignments
        kind = alignment.Estimated if self.estimates else kind
        self.alignments = kind(self.probe, self.theta, self.u, self.kl)
        self.shares = torch.full_like(self.kl, 1 / N)
        self.total_shares = torch.zeros_like(self.kl)
        self.done = torch.zeros(1, dtype=torch.long, device=device)  # updates
        self.alive = torch.ones((), dtype=torch.bool, device=device)  # no gradient was infinite or NaN yet
        self.record = torch.zeros(cfg.log_interval, 5 + 3 * N, device=device)
        self.schedule = training.schedule(cfg.steps, cfg.lr, cfg.warmup).to(device)
        self.teacher_index = torch.arange(N, device=device)
        self.state = {
            "theta": self.theta.data,
            "c": self.alignments.c,
            "last_probe_kl": self.alignments.last_kl,
        }
        for name in ("u", "m", "v", "kl", "shares", "total_shares", "done", "alive", "record"):
            self.state[name] = getattr(self, name)

    def _capture_updates(self):
        """The updates as CUDA graphs, where nothing reads the device in mid-update."""
        self.plain_update = self.update
        self.probing_update = self.update_after_probe
        reads_device = self.cfg.targets == "live" or self.cfg.surgery in surgery.EACH or self.windows.host
        reads_device = reads_device or len(set(self.student.cfg.images)) > 1  # which windows have which image
        if not kernels.compiled(self.theta.device) or reads_device or processes.world() > 1:
            return
        tensors = list(self.state.values())
        if self.probe_interval:
            self.probing_update = training.captured(self.update_after_probe, tensors, self.generator)
        self.plain_update = training.captured(self.update, tensors, self.generator)


class Distance:
    """The student's distance from each teacher: KL, or what --loss says."""

    def __init__(self, cfg: Config, student: dt.DecisionTransformer):
        device = student.head.weight.device
        self.cfg = cfg
        self.student = student
        self.act_dims = torch.tensor(student.cfg.act_dims, device=device)  # (N,)
        self.factors = student.cfg.categorical(device)  # (F, N, A) bool, or None
        self.groups = student.groups if student.cfg.shares else None  # (N,), which head is each task's

    def __call__(self, batch: data.Batch, targets: Tensor, theta: Tensor | None = None) -> Tensor:
        """L (N,): the mean over a teacher's valid timesteps, 0 where the batch has no window of it."""
        sums, counts = self.sums(batch, targets, theta)
        return sums / counts.clamp_min(1)

    @torch.no_grad()
    def held_out(self, batch: data.Batch, targets: Tensor) -> list[float]:
        """L (N,) in float32, as the student will act."""
        self.student.eval()
        held = self(batch, targets).tolist()
        self.student.train()
        return held

    def sums(self, batch: data.Batch, targets: Tensor, theta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """sums (N,) over the batch's timesteps of each teacher, and counts (N,) of them.

        theta (P,): parameters in place of the student's own.
        """
        cfg = self.cfg
        student = self.student
        if theta is None:
            h = student(*batch[:7], hidden=True)
            weight = student.head.weight
            bias = student.head.bias
        else:
            parameters = dt.unflatten(student, theta)
            h = torch.func.functional_call(student, parameters, batch[:7], {"hidden": True})
            weight = parameters["head.weight"]
            bias = parameters["head.bias"]
        kl = 0.0
        if "kl" in cfg.loss:
            options = (cfg.kl, cfg.sigma_floor, cfg.temperature, self.factors, self.groups)
            kl, counts = head_kl(h, weight, bias, *targets, batch.mask, batch.task, self.act_dims, *options)
            if cfg.loss == "kl":
                return kl, counts
        x = own_map(h, weight, bias, student.groups[batch.task])
        x = self._other(*policies(x, batch.task, self.factors), batch, targets)
        sums, counts = per_teacher(x, batch.mask, batch.task, self.act_dims, self.factors)
        return kl + sums, counts

    def _other(self, mean, log_std, batch, targets):
        """(B, K, A): squared error of the means, or probabilities; or the data's negative log-likelihood."""
        mse = self.cfg.loss == "mse"
        x = (mean - targets[0]).square() if mse else dt.gaussian_nll(mean, log_std, batch.actions)
        if self.factors is None:
            return x
        categorical = (mean.exp() - targets[0].exp()).square() if mse else -batch.actions * mean
        discrete = self.factors.any(2).any(0)[batch.task]  # (B,)
        return torch.where(discrete[:, None, None], categorical, x)


def curriculum_of(cfg: Config) -> tuple[Callable[..., Tensor], bool]:
    """The function of curriculum.METHODS that cfg asks for, and whether it takes one teacher at a time."""
    choose = curriculum.METHODS[cfg.curriculum]
    one_at_a_time = cfg.curriculum in curriculum.ONE_AT_A_TIME
    if cfg.curriculum == "novelty":
        choose = functools.partial(choose, power=cfg.novelty_power)
        one_at_a_time = cfg.novelty_power == math.inf
    return choose, one_at_a_time


# ---- teachers' targets ----------------------------------------------------------------------------


@torch.no_grad()
def live_targets(teachers: list[teacher.Model], batch: data.Batch) -> Tensor:
    """(2, B, K, A): mean and log_std of each window's own teacher, zero beyond the teacher's action size."""
    targets = torch.zeros(2, *batch.actions.shape, device=batch.actions.device)
    for i, model in enumerate(teachers):
        own = (batch.task == i).nonzero().flatten()
        if len(own) == 0:
            continue
        O = model.cfg.obs_dims[0]
        A = model.cfg.act_dims[0]
        states = batch.states[own, :, :O]
        actions = batch.actions[own, :, :A]
        inputs = [states, actions, batch.rtg[own], batch.timesteps[own], batch.mask[own]]
        if model.cfg.images[0]:
            inputs.append(batch.pixels[own, :, : math.prod(model.cfg.images[0])])
        policy = model(0, *inputs)
        targets[:, own, :, :A] = torch.stack(policy)
    return targets


@torch.no_grad()
def cache_targets(teachers: list[teacher.Model], windows: data.Windows) -> None:
    """Fill the last columns of windows.table: what a teacher says at each row.

    It comes from a window that shows the teacher at least half a context of what came before, or all there
    is. Each of a job's processes computes its part.
    """
    table = windows.table
    A = windows.A
    half = max(1, windows.K // 2)
    t = table[:, -2 * A - 1].to(windows.size.device).long()  # timestep of each row
    last_of_episode = torch.cat([t[1:] == 0, torch.ones(1, dtype=torch.bool, device=t.device)])
    # last rows of the windows: one for every `half` timesteps
    ends = ((t % half == half - 1) | last_of_episode).nonzero().flatten()
    task = torch.searchsorted(windows.offset, ends, right=True) - 1
    parts = torch.arange(len(ends), device=t.device).split(max(1, TARGETS_AT_ONCE // windows.K))
    parts = parts[processes.rank() :: processes.world()]
    silent = True if processes.rank() else None
    for part in tqdm(parts, desc="teachers' targets", unit="batch", disable=silent):
        batch = windows.gather(task[part], ends[part])
        newest = windows.steps_back <= (t[ends[part]] % half)[:, None]  # those no earlier window has filled
        targets = live_targets(teachers, batch)[:, newest]  # (2, rows, A)
        table[batch.rows[newest].to(table.device), -2 * A :] = torch.cat((*targets,), -1).to(table.device)
    if processes.world() > 1:
        for rows in table.split(2**20):
            x = rows[:, -2 * A :].contiguous()
            processes.all_reduce(x)
            rows[:, -2 * A :] = x


# ---- a run -------------------------------------------------------------------------------------------------


def main(cfg: Config, teachers: list[teacher.Teacher] | None = None) -> None:
    """Train what is missing, distil, evaluate; write the run's directory. Skips a finished run.

    teachers: in place of those that cfg names: their models may be anything that is called as theirs.
    """
    cfg.check()
    environments.import_packages(cfg.imports)
    cfg = growing.with_its_tasks(cfg) if cfg.student else cfg
    out = Path(cfg.out_dir)
    if not run_directory.start(out, cfg):
        print(f"student is there: {out} (--overwrite to train it again)")
        if not processes.rank():
            summary(out)
        return
    clock = log.Clock()
    with clock("teachers"):
        found = teachers or teacher.find(cfg)
    models = [t.model for t in found]
    tasks = [t.task for t in found]
    with clock("data"):
        if cfg.eval_episodes:
            evaluate.check(tasks)
        windows, held_out = make_windows(cfg, tasks, load_sets(cfg, tasks), models[0].cfg.context)
    student, generator = make_student(cfg, tasks, models)
    with clock("targets"):
        if windows.has_targets:
            cache_targets(models, windows)
        held_out_targets = live_targets(models, held_out)
    learner = Learner(cfg, student, models, windows, generator)
    kl = Distance(dataclasses.replace(cfg, loss="kl"), student)
    held_out_kl = functools.partial(kl.held_out, held_out, held_out_targets)
    meta = {"tasks": [dataclasses.asdict(t) for t in tasks]}
    with clock("train"):
        checkpoint = train(cfg, out, learner, tasks, meta, held_out_kl)
    if processes.rank():
        processes.barrier()  # when rank 0 is done
        return
    held = held_out_kl()
    seconds_of_training = checkpoint.seconds
    student.eval()
    teachers_metrics = {t.task.name: t.metrics for t in found}
    dt.save(out, student, {**meta, "teachers": teachers_metrics})
    with clock("evaluate"):
        metrics = evaluated(cfg, student, tasks, teachers_metrics, held)
    results = {
        "tasks": metrics,
        "compression": sum(m.n_params for m in models) / student.n_params,
        "parameters": student.n_params,
        "seconds": {**clock.seconds, "train": round(seconds_of_training, 2)},
        "machine": machine.describe(cfg),
    }
    files.write_json(out / "metrics.json", results)
    checkpoint.finish()
    processes.barrier()
    summary(out)


def load_sets(cfg: Config, tasks: list[data.Task]) -> list[data.Dataset]:
    """The tasks' datasets, or those in their place; UserError where one is not what its teacher learnt."""
    sources = cfg.student_datasets or [t.dataset for t in tasks]
    if len(sources) != len(tasks):
        raise UserError(
            f"{len(sources)} --student-datasets for {len(tasks)} teachers; name one for each, in order"
        )
    with processes.rank_0_first():
        sets = []
        for task, source in zip(tasks, sources, strict=True):
            like = task if cfg.student_datasets else None
            dataset = data.load(source, task.split_seed, like)
            check_unchanged(task, dataset.task)
            sets.append(data.share_of(dataset, cfg.data_share, cfg.seed))
    return sets


def make_windows(
    cfg: Config, tasks: list[data.Task], sets: list[data.Dataset], context: int
) -> tuple[data.Windows, data.Batch]:
    """Training windows, and held-out ones of data.HELD_OUT_TIMESTEPS of each task."""
    ask = asked_share(cfg)
    device = machine.device(cfg)
    train_tables = [s.train for s in sets]
    cached = cfg.targets == "cached" and cfg.loss != "nll"
    copies = 0
    if ask and cached:
        rows = sum(map(len, train_tables)) / len(tasks)
        copies = cfg.ask_copies or math.ceil(min(MOST_COPIES, ASKED_ROWS / rows))
    options = {"targets": cached, "top": cfg.top, "copies": copies, "pixels": [s.train_pixels for s in sets]}
    like = (tasks, context, device, cfg.data_device)
    windows = data.Windows(train_tables, *like, **options)
    if ask:
        lowest = torch.tensor([min(t.targets.values()) / t.rtg_scale for t in tasks])
        span = torch.tensor([t.target / t.rtg_scale for t in tasks]) - lowest
        low = lowest + cfg.ask_low * span
        high = lowest + cfg.ask_high * span
        generator = torch.Generator(device).manual_seed(cfg.seed)
        windows.ask(ask, low, high, cfg.state_noise, generator)
    pixels = [s.held_out_pixels for s in sets]
    held_out = data.Windows([s.held_out for s in sets], *like, pixels=pixels).spread()
    return windows, held_out


def asked_share(cfg: Config) -> float:
    """Of the windows: what --ask says; none where the loss learns from the data's actions."""
    if "nll" in cfg.loss:
        return 0.0
    return 0.5 if cfg.ask == "auto" else cfg.ask


def check_unchanged(task: data.Task, now: data.Task) -> None:
    """Raise UserError where a dataset is not what its teacher was trained on; now: its task as of now."""
    targets = {name: now.targets.get(name) for name in task.targets}  # older teachers have two
    same = dataclasses.replace(now, targets=targets)
    if json.dumps(dataclasses.asdict(task)) != json.dumps(dataclasses.asdict(same)):
        raise UserError(
            f"dataset {task.dataset} is not what the teacher of {task.name} was trained on any more; "
            f"train the teacher again with --overwrite"
        )


def make_student(
    cfg: Config, tasks: list[data.Task], teachers: list[teacher.Model]
) -> tuple[dt.DecisionTransformer, torch.Generator]:
    """The student, initialised by seed, and the generator of its windows; says what it is."""
    device = machine.device(cfg)
    torch.manual_seed(cfg.seed)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    sizes = {
        "n_layer": cfg.n_layer,
        "n_head": cfg.n_head,
        "n_embd": cfg.n_embd,
        "tokens": cfg.tokens,
        "dropout": cfg.dropout,
        "context": teachers[0].cfg.context,
        "groups": data.groups_of(tasks) if cfg.share else (),
    }
    student = dt.DecisionTransformer(dt.ModelConfig.of(tasks, **sizes)).to(device)
    if cfg.student:
        growing.take_over(student, tasks, cfg.student)
    student.bfloat16 = machine.bfloat16(cfg)
    training.seed_dropout(cfg)
    parameters = sum(t.n_params for t in teachers)
    heads = f"heads: {len(set(student.cfg.groups))}, " if cfg.share else ""
    print(
        f"{len(tasks)} teachers of {parameters:,} parameters -> student of {student.n_params:,}, "
        f"{parameters / student.n_params:.1f} times fewer, {heads}on {device}, "
        f"blocks in {'bfloat16' if student.bfloat16 else 'float32'}; kernels: {kernels.path(device)}",
        flush=True,
    )
    return student, generator


def train(
    cfg: Config,
    out: Path,
    learner: Learner,
    tasks: list[data.Task],
    meta: dict[str, Any],
    held_out_kl: Callable[[], list[float]],
) -> Checkpoint:
    """The loop of updates, with log and checkpoints; goes on from a checkpoint where --resume says so.

    Raises UserError where a loss is not finite; the student before that update is saved.
    """
    generators = {"windows": learner.generator}
    settings = run_directory.settings(cfg)
    checkpoint = Checkpoint(out, cfg, learner.state, generators, meta["tasks"], settings)
    first, csv = checkpoint.restore()
    rows = UpdateLog(cfg, learner.record, [t.name for t in tasks], csv, first, checkpoint)
    silent = True if processes.rank() else None
    probed = cfg.log_interval * max(1, round(PROBED / cfg.log_interval * cfg.steps))
    bar = tqdm(total=cfg.steps, initial=first, unit="step", desc="distil", disable=silent)
    with bar, checkpoint, training.Threads(learner.theta.device) as threads:
        for step in range(first, cfg.steps):
            try:
                threads(learner.step, step)
                bar.update()
                due = step == 0 or (step + 1) % cfg.log_interval == 0 or step + 1 == cfg.steps
                if due and not processes.rank():
                    held = held_out_kl()
                    bar.write(rows.write(step, held))
                    if step + 1 in (probed, cfg.steps) and len(tasks) > 1 and not learner.one_at_a_time:
                        bar.write(of_shares([t.name for t in tasks], held, learner.mean_shares()))
            except Diverged as e:
                if not processes.rank():
                    dt.save(out, learner.student, meta)
                raise UserError(f"{e} kept in {out}; try a lower --lr than {cfg.lr:g}") from None
            checkpoint.after(step + 1)
    return checkpoint


def of_shares(names: list[str], held: list[float], shares: Tensor) -> str:
    """What these tasks' held-out KLs (N,) and mean shares (N,) say of other shares; see curriculum.LAW.

    And which task had the most that one may have, and still has the highest KL.
    """
    shares = shares.cpu()
    equal, best = curriculum.worst_by_law(torch.tensor(held), shares)
    text = (
        f"worst KL {max(held):.3f}; by the share law {equal:.3f} with equal shares, "
        f"{best:.3f} with the best ({best / equal:.2f} of that)"
    )
    worst = int(np.argmax(held))
    if len(names) > 2 and shares[worst] > GREEDY * max(curriculum.MOST, 2 / len(names)):
        text += (
            f"\n{names[worst]} had {100 * shares[worst]:.0f} % of the batches and still has the highest KL: "
            f"perhaps nobody can learn its teacher; leave it out, or distil it on its own"
        )
    return text


def evaluated(
    cfg: Config,
    student: dt.DecisionTransformer,
    tasks: list[data.Task],
    teachers: dict[str, dict[str, Any]],
    held: list[float],
) -> dict[str, dict[str, Any]]:
    """metrics.json's part of each task. teachers: their metrics; held (N,): the student's held-out KLs."""
    metrics = {}
    for i, task in enumerate(tasks):
        unknown = dict.fromkeys(
            ("return_mean", "return_std", "episodes", "normalized_score", "retention", "sweep")
        )
        metrics[task.name] = {"target": task.target, **unknown, "heldout_kl": held[i]}
        if cfg.eval_episodes and task.env_id:
            policy = Policy.of(student, task, i)
            options = (cfg.eval_episodes, evaluate.SEED, teachers[task.name], cfg.retention)
            metrics[task.name] |= evaluate.measured(policy, task, task.target, *options)
            episodes = evaluate.sweep_episodes(cfg.eval_episodes)
            metrics[task.name]["sweep"] = evaluate.sweep(policy, task, episodes, evaluate.SEED)
        of_data = teachers[task.name].get("data")
        metrics[task.name]["data"] = of_data
        metrics[task.name]["target_gap"] = evaluate.target_gap(metrics[task.name]["sweep"], of_data, task)
        metrics[task.name]["flags"] = verdict.verdict(task, metrics[task.name], teachers[task.name]).names()
    return metrics


def summary(out: Path) -> None:
    """Print a finished run's table and draw its plots.png."""
    run = report.Run(out)
    print(log.table(run.rows()))
    for line in verdict.lines(data.tasks(run.meta, out), run.tasks, run.teachers):
        print(line)
    if run.retention:
        retention = list(run.retention.values())
        gaps = ", ".join(f"{model} {gap:.3f}" for model, gap in run.target_gaps().items())
        text = f"; mean gap from return to target, over the range of returns: {gaps}" if gaps else ""
        what = "retention of success" if run.of_success else "retention"
        print(f"{what}: mean {np.mean(retention):.3f}, worst {min(retention):.3f}{text}")
    rates = run.success_rates()
    if rates:
        means = ", ".join(f"{model} {rate:.3f}" for model, rate in rates.items())
        print(f"success rate, mean of the tasks that report one: {means}")
    compression = run.metrics["compression"]
    parameters = run.metrics["parameters"]
    print(
        f"compression: {compression:.1f} times ({parameters:,} parameters); seconds: {run.metrics['seconds']}"
    )
    report.plots(out)
    print(f"plots in {out / 'plots.png'}; python report.py {out} makes a page of it")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)

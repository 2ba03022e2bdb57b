"""Speed beside other libraries -> research/results/bench_<device>.csv and .png

    python -m research.bench                                   # ours and plain PyTorch
    python3 -m venv .venv-bench && .venv-bench/bin/pip install -r requirements-bench.txt
    python -m research.bench --peers .venv-bench/bin/python    # other libraries too, in that environment
    python -m research.bench --what teacher                    # some rows

Used by whoever changes a kernel or the loop; research/tables.py prints docs/speed.md's tables from the CSV.
Every contender is a process of its own that waits while the others run. They take turns for a number of
rounds; a row of the CSV holds the median.

    row        size         what is timed
    machine    m x k x n    one matrix product, and a copy of as many numbers as its factors and result hold
    teacher    batch        a whole update with sampling, with kzl's settings
    rollout    batch        one action for each environment, without the environments
    acting     model        one action at batch 1 from numpy to numpy: Policy, the exported file, and the
                            lower bound, its matrix products alone
    distil     teachers     an update of distill.py, synthetic teachers, batch 64
    teachers   teachers     the same for more teachers, and the peak memory
    share      teachers     the same with today's defaults, tasks of Meta-World's spaces; --share, and without
    surgery    parameters   the projection of one flat gradient
    update     parameters   projection, clipping, AdamW, and the copy of g into u
    attention  batch heads  forward and backward, T 60, C 128
    kl         teachers     forward and backward from the hidden states, batch 256, C 64
    processes  processes    an update of teacher and of student, each process with as many windows
    optimizer  model        an update of teacher.py and distill.py, by optimizer and tokens a timestep

Three rows train until a held-out loss is as low as the one that a contender ends with, which `size` names.
Their time is the process's CPU time on a CPU, as the optimizer row's, without imports, loading, the teachers'
targets, and measuring the held-out loss. Each contender trains once, from seed 0.

    to-nll           our teacher, and Decision Transformers of others, trained as they document it; hopper
    teacher-to-nll   today's defaults, those before, and what Muon and one token do by themselves
    student-to-kl    the same of a student of --teachers

    python -m research.bench --what student-to-kl --teachers out/teacher-hopper out/teacher-halfcheetah

A "copy" moves the bytes that our operation has to move at least: its time over ours is the share of the
memory's bandwidth in use.
"""

import csv
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import resource
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from support import UserError, files, machine

if TYPE_CHECKING:
    import data
    import distill
    import model as dt

# All else is imported where it is needed: the peers' environment lacks it, and a process measures its memory.

ROOT = Path(__file__).resolve().parent.parent
# kzl's settings for hopper (github.com/kzl/decision-transformer, gym/experiment.py); also 1 head, dropout 0.1
K = 20
O = 11
A = 3
C = 128
LAYERS = 3
EPISODE = 1000  # timesteps
STEPS = 100_000  # timesteps of the synthetic data

Step = Callable[[], Any]  # what is timed
MakeStep = Callable[[str, str, str], Step]  # of device, dtype and size


@dataclasses.dataclass
class Config:
    what: tuple[str, ...] = ()  # rows, as listed above; none: all
    peers: str = ""  # python of an environment with requirements-bench.txt; none: no other libraries
    device: str = "auto"  # cpu, cuda, or auto
    threads: int = 1  # of torch, on a CPU
    rounds: int = 5  # that a row is the median of
    seconds: float = 0.5  # about how long a contender runs in a round
    updates: int = 1000  # of other libraries' training, in the row to-nll
    interval: int = 25  # updates between held-out losses, where contenders train
    teachers: tuple[str, ...] = ()  # runs of teacher.py for the row student-to-kl; none: it is left out
    out: str = ""  # default: research/results/bench_<device>.csv


# ---- synthetic data ----------------------------------------------------------------------------------------


def episodes(n: int = STEPS, obs_dim: int = O, act_dim: int = A) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """n timesteps: states (n, O), actions (n, A), returns-to-go (n,), timesteps (n,)."""
    g = torch.Generator().manual_seed(0)
    states = torch.randn(n, obs_dim, generator=g)
    actions = torch.rand(n, act_dim, generator=g) * 2 - 1
    return states, actions, torch.rand(n, generator=g), torch.arange(n) % EPISODE


def table(n: int = STEPS, obs_dim: int = O, act_dim: int = A) -> np.ndarray:
    """The same as data.Windows takes them: (n, O + A + 2)."""
    states, actions, rtg, timesteps = episodes(n, obs_dim, act_dim)
    return torch.cat((states, actions, rtg[:, None], timesteps[:, None]), 1).numpy()


def sampler(
    device: str, batch: int, columns: tuple[Tensor, ...] = (), padding: bool = True
) -> Callable[[], tuple[Tensor, ...]]:
    """Batches of windows for peers that leave sampling to their user: one gather, as ours.

    Each call gives states (B, K, O), actions (B, K, A), returns-to-go, timesteps and mask (B, K). columns: as
    `episodes` gives, which is the default. padding: also of windows that begin before their episode does.
    """
    columns = [x.to(device) for x in columns or episodes()]
    steps_back = torch.arange(K - 1, -1, -1, device=device)
    last_rows = torch.arange(K, len(columns[0]), device=device)
    if not padding:
        last_rows = last_rows[columns[3][K:] >= K - 1]

    def sample() -> tuple[Tensor, ...]:
        last_row = last_rows[torch.randint(len(last_rows), (batch,), device=device)]
        rows = last_row[:, None] - steps_back
        states, actions, rtg, timesteps = [x[rows] for x in columns]
        return states, actions, rtg, timesteps, steps_back <= timesteps[:, -1:]

    return sample


def task(i: int = 0, obs_dim: int = O, act_dim: int = A) -> "data.Task":
    """A task of that size, without normalisation."""
    import data

    return data.Task(
        name=f"bench{i}",
        dataset="bench",
        env_id=None,
        env_kwargs={},
        max_steps=EPISODE,
        obs_dim=obs_dim,
        act_dim=act_dim,
        obs_mean=[0.0] * obs_dim,
        obs_std=[1.0] * obs_dim,
        act_low=[-1.0] * act_dim,
        act_high=[1.0] * act_dim,
        rtg_scale=1.0,
        targets={"p95": 3000.0},
        reference=(0.0, 1.0),
        reference_source="",
        split_seed=0,
    )


# ---- teacher -----------------------------------------------------------------------------------------------


def teacher_model(dropout: float = 0.0, tokens: int = 3) -> "dt.DecisionTransformer":
    import model as dt

    sizes = {"n_layer": LAYERS, "n_head": 1, "n_embd": C, "tokens": tokens, "context": K, "dropout": dropout}
    return dt.DecisionTransformer(dt.ModelConfig((O,), (A,), **sizes))


def ours_teacher(device: str, dtype: str, size: str, compile: bool = False) -> Step:
    import data
    import kernels
    import model as dt
    from kernels.project import project_adamw
    from support import processes, training

    windows = data.Windows([table()], [task()], K, device)
    model = teacher_model(dropout=0.1).to(device)
    model.bfloat16 = dtype == "bfloat16"
    theta = dt.flatten(model)
    m = torch.zeros_like(theta.data)
    v = torch.zeros_like(theta.data)
    alive = torch.ones((), dtype=torch.bool, device=device)
    share = torch.ones(1, device=device)
    generator = torch.Generator(device).manual_seed(0)
    schedule = training.schedule(10, 1e-4, 1)[5].to(device)
    if compile:
        model.compile()

    def step() -> None:
        batch = windows.sample(int(size), share, generator)
        loss = dt.mean_nll(*model(0, *batch[1:6]), batch.actions, batch.mask)
        n_tokens = batch.mask.sum()
        all_tokens = processes.summed(n_tokens)[0]
        theta.grad.zero_()
        (loss * (n_tokens / all_tokens)).backward()
        processes.all_reduce(theta.grad)
        with torch.no_grad():
            project_adamw(theta, theta.grad, None, m, v, schedule, alive, weight_decay=1e-4)

    if kernels.compiled(device) and not compile and processes.world() == 1:
        return training.captured(step, [theta.data, m, v, alive], generator)
    return step


def huggingface() -> torch.nn.Module:
    from transformers import DecisionTransformerConfig, DecisionTransformerModel

    config = DecisionTransformerConfig(
        state_dim=O,
        act_dim=A,
        hidden_size=C,
        max_ep_len=EPISODE,
        n_layer=LAYERS,
        n_head=1,
        n_inner=4 * C,
        activation_function="relu",
        n_positions=1024,
        resid_pdrop=0.1,
        attn_pdrop=0.1,
        embd_pdrop=0.1,
    )
    return DecisionTransformerModel(config)


def huggingface_actions(
    model: torch.nn.Module, states: Tensor, actions: Tensor, rtg: Tensor, timesteps: Tensor, mask: Tensor
) -> Tensor:
    """(B, K, A): what it predicts, of windows as `sampler` gives them."""
    return model(
        states=states,
        actions=actions,
        rewards=None,
        returns_to_go=rtg[..., None],
        timesteps=timesteps,
        attention_mask=mask.long(),
    ).action_preds


def huggingface_update(
    model: torch.nn.Module,
    sample: Callable[[], tuple[Tensor, ...]],
    optimizer: torch.optim.Optimizer,
    dtype: str,
) -> Step:
    def step() -> None:
        windows = sample()
        _, actions, _, _, mask = windows
        with torch.autocast(windows[0].device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            predicted = huggingface_actions(model, *windows)
        loss = (predicted[mask].float() - actions[mask]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()

    return step


def huggingface_teacher(device: str, dtype: str, size: str) -> Step:
    model = huggingface().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4, fused=True)
    return huggingface_update(model, sampler(device, int(size)), optimizer, dtype)


def d3rlpy_teacher(device: str, dtype: str, size: str, compile_graph: bool = False) -> Step:
    import d3rlpy

    states, actions, rtg, timesteps = [x.numpy() for x in episodes()]
    dataset = d3rlpy.dataset.MDPDataset(states, actions, rtg, (timesteps == EPISODE - 1).astype("float32"))
    config = d3rlpy.algos.DecisionTransformerConfig(
        batch_size=int(size),
        learning_rate=1e-4,
        context_size=K,
        max_timestep=EPISODE,
        num_heads=1,
        num_layers=LAYERS,
        attn_dropout=0.1,
        resid_dropout=0.1,
        embed_dropout=0.1,
        activation_type="relu",
        encoder_factory=d3rlpy.models.VectorEncoderFactory([C]),
        compile_graph=compile_graph,
    )
    algo = config.create(device=device)
    algo.build_with_dataset(dataset)
    return lambda: algo.update(dataset.sample_trajectory_batch(int(size), length=K))


# ---- rollout, acting ---------------------------------------------------------------------------------------


def ours_rollout(device: str, dtype: str, size: str) -> Step:
    import policy

    batch = int(size)
    model = teacher_model().to(device).eval()
    # as they come from an environment
    states, actions, rtg = [x[:, -1].contiguous() for x in sampler(device, batch)()[:3]]
    actor = policy.Actor(model, 0, batch, EPISODE)

    def step() -> None:
        nonlocal actor
        if actor.t == EPISODE:
            actor = policy.Actor(model, 0, batch, EPISODE)
        actor.act(states, rtg, actions).cpu()

    return step


def huggingface_rollout(device: str, dtype: str, size: str) -> Step:
    """The loop of HuggingFace's own example (examples/research_projects/decision_transformer), for a batch.

    Episodes grow by concatenation; the last 20 timesteps are cut out, padded (here they never need it), and
    sent through the model.
    """
    batch = int(size)
    model = huggingface().to(device).eval()
    *start, mask = sampler(device, batch)()
    last_state, _, last_rtg, last_timestep = [x[:, -1:] for x in start]
    attention_mask = mask.long()
    history = []

    @torch.inference_mode()
    def step() -> None:
        if not history or history[0].shape[1] == EPISODE:
            history[:] = start
        states, actions, rtg, timesteps = history
        actions = torch.cat((actions, torch.zeros(batch, 1, A, device=device)), 1)
        predicted = model(
            states=states[:, -K:],
            actions=actions[:, -K:],
            rewards=None,
            returns_to_go=rtg[:, -K:, None],
            timesteps=timesteps[:, -K:],
            attention_mask=attention_mask,
        ).action_preds
        action = predicted[:, -1]
        actions[:, -1] = action
        action.cpu()
        states = torch.cat((states, last_state), 1)
        rtg = torch.cat((rtg, last_rtg), 1)
        timesteps = torch.cat((timesteps, last_timestep), 1)
        history[:] = (states, actions, rtg, timesteps)

    return step


def acting_model(size: str) -> "tuple[dt.DecisionTransformer, data.Task]":
    """The "teacher" of hopper or the "student" of three tasks, with today's number of tokens a timestep; and
    hopper, the first task of both."""
    import distill
    import model as dt
    import teacher

    if size == "teacher":
        return teacher_model(tokens=teacher.Config.tokens).eval(), task()
    sizes = {"n_layer": 2, "n_head": 1, "n_embd": 64, "tokens": distill.Config.tokens, "context": K}
    cfg = dt.ModelConfig((O, 17, 17), (A, 6, 6), **sizes)
    return dt.DecisionTransformer(cfg).eval(), task()


def ours_policy(device: str, dtype: str, size: str) -> Step:
    import policy

    model, hopper = acting_model(size)
    actor = policy.Policy.of(model.to(device), hopper, 0)
    observations = episodes()[0].numpy()
    t = 0

    def step() -> None:
        nonlocal t
        if t % EPISODE == 0:
            actor.reset()
        actor.act(observations[t % STEPS], 1.0)
        t += 1

    return step


def onnx_policy(device: str, dtype: str, size: str, int8: bool = False) -> Step:
    import export

    exported = export.Step(*acting_model(size), 0).eval()
    blob = export.to_onnx(exported, 0)
    runtime = export.session(export.quantised(blob) if int8 else blob)
    start = exported.feed(1)
    feed = dict(start)
    observations = episodes()[0].numpy()
    t = 0

    def step() -> None:
        nonlocal t
        if t % EPISODE == 0:
            feed.update(start)
        feed["observation"] = observations[t % STEPS][None]
        feed["timestep"] = np.array([t % EPISODE])
        feed["last_action"], feed["memory"] = runtime.run(None, feed)
        t += 1

    return step


def products_of_acting(device: str, dtype: str, size: str) -> Step:
    """The lower bound: the matrix products of one action alone, of Actor's own weights."""
    import policy

    model, _ = acting_model(size)
    actor = policy.Actor(model.to(device), 0, 1, EPISODE)
    factors = [(1, actor.embed)]  # rows on the left, and the matrix on the right
    for i, (qkv, _, proj, _, fc, _, out, _) in enumerate(actor.blocks):
        n_tokens = 2 * model.cfg.tokens  # of a timestep, in two windows
        n = 1 if i == len(actor.blocks) - 1 else n_tokens  # of the last block, one token's output is read
        factors += [(n_tokens, qkv), (n, proj), (n, fc), (n, out)]
    factors.append((1, actor.head[0]))
    pairs = [(torch.randn(n, len(weight)).to(device), weight) for n, weight in factors]

    @torch.inference_mode()
    def step() -> None:
        for x, weight in pairs:
            torch.mm(x, weight)

    return step


def huggingface_acting(device: str, dtype: str, size: str) -> Step:
    """A model of its teacher's size, whatever `size` says: it has no smaller student."""
    return huggingface_rollout(device, dtype, "1")


# ---- distil, teachers, processes ---------------------------------------------------------------------------


def ours_distil(device: str, dtype: str, size: str, **options: Any) -> Step:
    """distill.Learner with these fields of distill.Config, teachers of built-in tasks' sizes."""
    import distill
    from research.variants import LONG_STUDENT

    dims = ((11, 3), (17, 6), (17, 6), (27, 8))
    cfg = distill.Config(steps=20_000, **{**LONG_STUDENT, **options})
    tasks = [task(i, *dims[i % 4]) for i in range(int(size))]
    return update_of_student(cfg, tasks, K, device, dtype)


def of_same_spaces(device: str, dtype: str, size: str, share: bool) -> Step:
    """The same with the defaults, teachers of Meta-World's sizes."""
    import distill

    tasks = [task(i, 39, 4) for i in range(int(size))]
    return update_of_student(distill.Config(steps=20_000, share=share), tasks, 1, device, dtype)


def update_of_student(
    cfg: "distill.Config", tasks: list["data.Task"], context: int, device: str, dtype: str
) -> Step:
    """An update of distill.py, on synthetic data and targets."""
    import data
    import distill
    import model as dt

    tables = [table(2000, t.obs_dim, t.act_dim) for t in tasks]
    windows = data.Windows(tables, tasks, context, device, targets=True)
    windows.table[:, -2 * windows.A :].uniform_(-1, 0)
    sizes = {"n_layer": 2, "n_head": 1, "n_embd": 64, "tokens": cfg.tokens, "context": context}
    sizes["groups"] = data.groups_of(tasks) if cfg.share else ()
    student = dt.DecisionTransformer(dt.ModelConfig.of(tasks, **sizes)).to(device)
    student.bfloat16 = dtype == "bfloat16"
    learner = distill.Learner(cfg, student, [], windows, torch.Generator(device).manual_seed(0))
    steps = itertools.cycle(range(cfg.steps))

    def step() -> None:
        i = next(steps)
        if i == 0:
            learner.state["done"].zero_()  # the schedule has no more rows
        learner.step(i)

    return step


def by_optimizer(device: str, dtype: str, size: str, **options: Any) -> Step:
    """An update of distill.py's "student" of three teachers, or of teacher.py's "teacher"."""
    if size == "student":
        return ours_distil(device, dtype, "3", **options)
    import data
    import teacher
    from research.variants import LONG_TEACHER

    cfg = teacher.Config(steps=20_000, device=device, dtype=dtype, **{**LONG_TEACHER, **options})
    windows = data.Windows([table()], [task()], cfg.context, device)
    generator = torch.Generator(device).manual_seed(0)
    model = teacher_model(tokens=cfg.tokens).to(device)
    model.bfloat16 = dtype == "bfloat16"
    learner = teacher.Learner(cfg, model, windows, generator, factors=())
    steps = itertools.cycle(range(cfg.steps))

    def step() -> None:
        if next(steps) == 0:
            learner.state["done"].zero_()
        learner.step()

    return step


# ---- training to a held-out loss ---------------------------------------------------------------------------

# these were the defaults; today's are teacher.Config and distill.Config, with a context of 20 timesteps
TEACHER_BEFORE = {"optimizer": "adamw", "tokens": 3, "lr": 3e-3, "steps": 5000, "batch_size": 32}
STUDENT_BEFORE = {"optimizer": "adamw", "tokens": 3, "lr": 8e-3, "steps": 4000, "batch_size": 64}
BATCH = 64  # of every peer


class Training:
    """A training run. Calling it is an update, of which the first builds all that is trained.

    steps: updates in all. build: returns an update and the held-out loss, two functions.
    """

    def __init__(self, steps: int, build: Callable[[], tuple[Step, Callable[[], float]]]):
        self.steps = steps
        self.build = build
        self.done = 0  # updates

    def __call__(self) -> None:
        if self.done == 0:
            self.update, self.held_out = self.build()
        self.update()
        self.done += 1


def write_folder(folder: Path, cfg: Config, name: str = "hopper") -> None:
    """What the contenders of a training row read: settings.json, and data.npz for the peers, who lack Minari.

    data.npz: a built-in dataset's training timesteps as `episodes` has them, and 256 held-out windows as
    `sampler` gives them, the ones that teacher.py measures; returns-to-go in thousands, as peers scale them.
    """
    import data

    dataset = data.load(name)
    of_task = [dataset.task]
    held_out = data.Windows([dataset.held_out], of_task, K).spread()
    thousands = dataset.task.rtg_scale / 1000
    train = torch.from_numpy(dataset.train)
    states, actions, rtg, timesteps = train.tensor_split([O, O + A, O + A + 1], dim=1)
    arrays = {
        "states": states,
        "actions": actions,
        "rtg": rtg[:, 0] * thousands,
        "timesteps": timesteps[:, 0].long(),
    }
    for field in ("states", "actions", "rtg", "timesteps", "mask"):
        arrays[f"held_{field}"] = getattr(held_out, field)
    arrays["held_rtg"] = held_out.rtg * thousands
    np.savez(folder / "data.npz", **arrays)
    teachers = [str(Path(x).resolve()) for x in cfg.teachers]
    files.write_json(folder / "settings.json", {"updates": cfg.updates, "teachers": teachers})


def settings(folder: str) -> dict[str, Any]:
    """A training row's `updates` of the peers, and `teachers`."""
    return json.loads((Path(folder) / "settings.json").read_bytes())


def offline_data(folder: str, device: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Of data.npz: states, actions, returns-to-go, timesteps; and these and the mask of held-out windows."""
    arrays = {name: torch.from_numpy(x).to(device) for name, x in np.load(Path(folder) / "data.npz").items()}
    names = ("states", "actions", "rtg", "timesteps")
    return tuple(arrays[x] for x in names), tuple(arrays[f"held_{x}"] for x in (*names, "mask"))


def nll_of_means(mean: Tensor, actions: Tensor, mask: Tensor) -> float:
    """Nats a dimension, of Gaussians about means (B, K, A) with the one sigma for each action dimension that
    makes it lowest on these very actions: what a model that predicts means alone could claim at best.
    """
    variance = (mean - actions)[mask].square().mean(0)  # (A,)
    return 0.5 * (2 * math.pi * math.e * variance).log().mean().item()


def ours_training(device: str, dtype: str, folder: str, **options: Any) -> Training:
    """teacher.py's own loop on hopper, with these fields of its Config."""
    import data
    import teacher
    from research.variants import LONG_TEACHER

    cfg = teacher.Config(device=device, dtype=dtype, **{**LONG_TEACHER, **options})
    dataset = data.load(cfg.env, cfg.seed)
    windows = data.Windows([dataset.train], [dataset.task], cfg.context, device)
    held_out = data.Windows([dataset.held_out], [dataset.task], cfg.context, device).spread()

    def build() -> tuple[Step, Callable[[], float]]:
        learner = teacher.make_learner(cfg, dataset, windows)
        return learner.step, lambda: learner.held_out_nll(held_out)

    return Training(cfg.steps, build)


def student_training(device: str, dtype: str, folder: str, **options: Any) -> Training:
    """distill.py's own loop, with these fields of its Config; its loss is the mean over teachers."""
    import distill
    import teacher
    from research.variants import LONG_STUDENT

    options = {**LONG_STUDENT, **options}
    cfg = distill.Config(device=device, dtype=dtype, teachers=settings(folder)["teachers"], **options)
    found = teacher.find(cfg)
    models = [t.model for t in found]
    tasks = [t.task for t in found]
    windows, held_out = distill.make_windows(cfg, tasks, distill.load_sets(cfg, tasks), models[0].cfg.context)
    distill.cache_targets(models, windows)
    targets = distill.live_targets(models, held_out)

    def build() -> tuple[Step, Callable[[], float]]:
        student, generator = distill.make_student(cfg, tasks, models)
        learner = distill.Learner(cfg, student, models, windows, generator)
        distance = distill.Distance(cfg, student)
        steps = itertools.count()
        return lambda: learner.step(next(steps)), lambda: np.mean(distance.held_out(held_out, targets))

    return Training(cfg.steps, build)


def huggingface_training(device: str, dtype: str, folder: str) -> Training:
    """As in huggingface.co/blog/train-decision-transformers, without Trainer's own work: a tenth of the
    updates warms up, then the learning rate falls to zero.
    """
    import torch._dynamo  # the first optimizer would, in time that is measured
    from transformers import DecisionTransformerModel  # noqa: F401

    from support import training

    steps = settings(folder)["updates"]
    columns, held_out = offline_data(folder, device)

    def build() -> tuple[Step, Callable[[], float]]:
        torch.manual_seed(0)
        model = huggingface().to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4, fused=True)
        update = huggingface_update(model, sampler(device, BATCH, columns), optimizer, dtype)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: training.learning_rate(step, steps, 1.0, max(1, steps // 10))
        )

        def step() -> None:
            update()
            schedule.step()

        @torch.no_grad()
        def nll() -> float:
            model.eval()
            mean = huggingface_actions(model, *held_out)
            model.train()
            return nll_of_means(mean, held_out[1], held_out[4])

        return step, nll

    return Training(steps, build)


def d3rlpy_training(device: str, dtype: str, folder: str) -> Training:
    """As in its reproductions/offline/decision_transformer.py, whose states, too, are normalised and whose
    rewards are in thousands. Of its 100,000 updates 10,000 warm up; here the same share does.
    """
    import d3rlpy
    import torch._dynamo  # likewise

    steps = settings(folder)["updates"]
    (states, actions, rtg, timesteps), held_out = offline_data(folder, "cpu")
    ends = timesteps.roll(-1) == 0  # rows before an episode's first, and the last: row 0 is a first one
    rewards = rtg - rtg.roll(-1).where(~ends, 0.0)
    arrays = [x.numpy() for x in (states, actions, rewards[:, None], ends.float())]
    states, actions, rtg, timesteps, mask = [x.to(device) for x in held_out]

    def build() -> tuple[Step, Callable[[], float]]:
        d3rlpy.seed(0)
        dataset = d3rlpy.dataset.MDPDataset(*arrays)
        optimizer = d3rlpy.optimizers.AdamWFactory(
            weight_decay=1e-4,
            clip_grad_norm=0.25,
            lr_scheduler_factory=d3rlpy.optimizers.WarmupSchedulerFactory(max(1, steps // 10)),
        )
        config = d3rlpy.algos.DecisionTransformerConfig(
            batch_size=BATCH,
            learning_rate=1e-4,
            optim_factory=optimizer,
            encoder_factory=d3rlpy.models.VectorEncoderFactory([C], exclude_last_activation=True),
            context_size=K,
            num_heads=1,
            num_layers=LAYERS,
            max_timestep=EPISODE,
        )
        algo = config.create(device=device)
        algo.build_with_dataset(dataset)
        model = algo.impl.modules.transformer

        @torch.no_grad()
        def nll() -> float:
            model.eval()  # its update switches back; its timesteps count from 1
            mean = model(states, actions, rtg[..., None], (timesteps + 1) * mask, 1 - mask.float())
            return nll_of_means(mean, actions, mask)

        return lambda: algo.update(dataset.sample_trajectory_batch(BATCH, length=K)), nll

    return Training(steps, build)


def torchrl_training(device: str, dtype: str, folder: str) -> Training:
    """As in its sota-implementations/decision_transformer (dt.py, dt_config.yaml), without its replay buffer.

    Its model has no mask: it trains on full windows, as there, and held-out ones are moved to the left. Of
    its 55,000 updates 10,000 warm up; here the same share does.
    """
    import torch._dynamo  # likewise
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule
    from torchrl.modules import DTActor, ProbabilisticActor, TanhDelta
    from torchrl.objectives import DTLoss
    from transformers import GPT2Model  # noqa: F401  which DTActor is made of

    steps = settings(folder)["updates"]
    columns, (states, actions, rtg, _, mask) = offline_data(folder, device)
    rows = torch.arange(len(mask), device=device)[:, None]
    first = (~mask).sum(1, keepdim=True)
    left = rows, (torch.arange(K, device=device) + first) % K
    inputs = ["observation_cat", "action_cat", "return_to_go_cat"]

    def build() -> tuple[Step, Callable[[], float]]:
        torch.manual_seed(0)
        sizes = {"n_embd": C, "n_layer": LAYERS, "n_head": 1, "n_inner": 4 * C, "n_positions": 1024}
        sizes |= {"activation": "relu", "resid_pdrop": 0.1, "attn_pdrop": 0.1}
        actor = ProbabilisticActor(
            TensorDictModule(DTActor(O, A, sizes).to(device), in_keys=inputs, out_keys=["param"]),
            in_keys=["param"],
            out_keys=["action"],
            distribution_class=TanhDelta,
            distribution_kwargs={"low": -1.0, "high": 1.0},
        )
        loss_module = DTLoss(actor, loss_function="l2")
        loss_module.set_keys(action_target="action_cat")
        parameters = list(loss_module.parameters())
        optimizer = torch.optim.Adam(parameters, lr=1e-4, weight_decay=5e-4, eps=1e-8)
        warmup = max(1, steps * 10_000 // 55_000)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warmup, 1))
        sample = sampler(device, BATCH, columns, padding=False)

        def windows(*tensors: Tensor) -> TensorDict:
            return TensorDict(dict(zip(inputs, tensors, strict=True)), batch_size=len(tensors[0]))

        def step() -> None:
            states, actions, rtg, _, _ = sample()
            loss = loss_module(windows(states, actions, rtg[..., None]))["loss"]
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 0.25)
            optimizer.step()
            schedule.step()

        @torch.no_grad()
        def nll() -> float:
            actor.eval()
            mean = actor(windows(states[left], actions[left], rtg[left][..., None]))["action"]
            actor.train()
            return nll_of_means(mean, actions[left], mask[left])

        return step, nll

    return Training(steps, build)


def job(contender: Callable[[str, str], Step], device: str, dtype: str, size: str) -> Step:
    """`contender` in `size` processes, of which this one starts the others and has them step with it."""
    from support import processes

    others = [] if "RANK" in os.environ else start_other_ranks(int(size))
    processes.join(SimpleNamespace(device=device))
    step = contender(device, dtype)

    def step_of_all() -> None:
        for p in others:
            p.stdin.write(b"1\n")
            p.stdin.flush()
        step()

    return step_of_all


def start_other_ranks(n: int) -> list[subprocess.Popen]:
    """This process becomes rank 0 of a job of n; the others run its own command."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n)}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}
    command = [sys.executable, "-m", "research.bench", *sys.argv[1:]]
    others = []
    for rank in range(1, n):
        env = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL}
        others.append(subprocess.Popen(command, cwd=ROOT, env=env, **pipes))
    return others


# ---- surgery, update ---------------------------------------------------------------------------------------


def two_vectors(size: str, device: str) -> tuple[Tensor, Tensor]:
    """g and u (P,) in conflict, where projecting costs most."""
    g = torch.randn(int(float(size)), device=device)
    u = torch.randn_like(g)
    return g - 0.1 * u, u


def copy(bytes_per_number: int) -> MakeStep:
    """A copy_ that moves as many bytes, read and written, as ours does per number."""

    def make(device: str, dtype: str, size: str) -> Step:
        n = int(float(size)) * bytes_per_number // 8
        x = torch.ones(n, device=device)
        y = torch.empty(n, device=device)
        return lambda: y.copy_(x)

    return make


def ours_surgery(device: str, dtype: str, size: str) -> Step:
    from kernels.project import project

    g, u = two_vectors(size, device)
    return lambda: project(g, u)


def torch_surgery(device: str, dtype: str, size: str) -> Step:
    g, u = two_vectors(size, device)

    def step() -> None:
        gu = g @ u
        uu = u @ u
        torch.where(gu < 0, g - gu / uu * u, g)

    return step


def foreach_surgery(device: str, dtype: str, size: str) -> Step:
    """Over a list of 50 tensors, as a model's parameters are."""
    g, u = [x.chunk(50) for x in two_vectors(size, device)]

    def dot(x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> Tensor:
        return torch.stack([product.sum() for product in torch._foreach_mul(x, y)]).sum()

    def step() -> None:
        gu = dot(g, u)
        uu = dot(u, u)
        torch._foreach_sub(g, torch._foreach_mul(u, torch.where(gu < 0, gu / uu, 0.0)))

    return step


def torchjd_surgery(device: str, dtype: str, size: str) -> Step:
    from torchjd.aggregation import PCGrad

    matrix = torch.stack(two_vectors(size, device))
    aggregate = PCGrad()
    return lambda: aggregate(matrix)


def ours_update(device: str, dtype: str, size: str) -> Step:
    from kernels.project import project_adamw
    from support import training

    g, u = two_vectors(size, device)
    theta = torch.randn_like(g)
    m = torch.zeros_like(g)
    v = torch.zeros_like(g)
    schedule = training.schedule(10, 1e-4, 1)[5].to(device)
    alive = torch.ones((), dtype=torch.bool, device=device)

    def step() -> None:
        with torch.no_grad():
            project_adamw(theta, g, u, m, v, schedule, alive)

    return step


def torch_update(device: str, dtype: str, size: str) -> Step:
    g, u = two_vectors(size, device)
    theta = torch.nn.Parameter(torch.randn_like(g))
    optimizer = torch.optim.AdamW([theta], lr=1e-4, fused=True)

    def step() -> None:
        with torch.no_grad():
            gu = g @ u
            uu = u @ u
            theta.grad = torch.where(gu < 0, g - gu / uu * u, g)
            u.copy_(theta.grad)
            torch.nn.utils.clip_grad_norm_([theta], 0.25)
            optimizer.step()

    return step


# ---- attention, kl, machine --------------------------------------------------------------------------------


def attention_step(attend: Callable[..., Tensor], device: str, dtype: str, size: str) -> Step:
    """attend(qkv, mask, heads) forward and backward; some windows are padded on the left."""
    B, heads = map(int, size.split("x"))
    T = 3 * K
    qkv = torch.randn(B, T, 3 * C, device=device, dtype=getattr(torch, dtype), requires_grad=True)
    padding = (torch.arange(B, device=device) % 64 == 0) * 30
    mask = torch.arange(T, device=device) >= padding[:, None]
    dout = torch.randn(B, T, C, device=device, dtype=qkv.dtype)
    return lambda: torch.autograd.grad(attend(qkv, mask, heads), qkv, dout)


def split_heads(qkv: Tensor, heads: int) -> Tensor:
    """(B, T, 3C) -> q, k and v as (3, B, heads, T, C / heads)."""
    return qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def ours_attention(device: str, dtype: str, size: str) -> Step:
    from kernels.attention import attention

    return attention_step(attention, device, dtype, size)


def compiled_attention(device: str, dtype: str, size: str) -> Step:
    from kernels.attention import attention_ref

    return attention_step(torch.compile(attention_ref), device, dtype, size)


def sdpa_attention(device: str, dtype: str, size: str, padding: bool = True) -> Step:
    """PyTorch's own choice of backend. Without padding it may be FlashAttention, which takes no mask."""
    causal = torch.ones(3 * K, 3 * K, dtype=torch.bool, device=device).tril()

    def attend(qkv: Tensor, mask: Tensor, heads: int) -> Tensor:
        visible = None
        if padding:
            visible = (causal & mask[:, None, None]) | torch.eye(3 * K, dtype=torch.bool, device=device)
        q, k, v = split_heads(qkv, heads)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, visible, is_causal=not padding)
        return y.transpose(1, 2).flatten(2)

    return attention_step(attend, device, dtype, size)


def flex_attention(device: str, dtype: str, size: str) -> Step:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    B = int(size.split("x")[0])
    flex = torch.compile(flex_attention)
    first = (torch.arange(B, device=device) % 64 == 0) * 30

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (j >= first[b])

    blocks = create_block_mask(visible, B, None, 3 * K, 3 * K, device=device)

    def attend(qkv: Tensor, mask: Tensor, heads: int) -> Tensor:
        return flex(*split_heads(qkv, heads), block_mask=blocks).transpose(1, 2).flatten(2)

    return attention_step(attend, device, dtype, size)


def attention_bytes(device: str, dtype: str, size: str) -> Step:
    """For each channel of each token: forward 3 numbers in and 1 out, backward 4 in and 3 out."""
    B = int(size.split("x")[0])
    return copy(11 * getattr(torch, dtype).itemsize)(device, dtype, str(B * 3 * K * C))


KL_BATCH = 256
KL_WIDTH = 64
KL_ACTIONS = 8  # of the widest task


def ours_kl(device: str, dtype: str, size: str, which: str = "head_kl", compile: bool = False) -> Step:
    import kernels.kl

    N = int(size)
    head_kl = getattr(kernels.kl, which)
    if compile:
        head_kl = torch.compile(head_kl)
    shape = (KL_BATCH, K, KL_WIDTH)
    h = torch.randn(shape, device=device, dtype=getattr(torch, dtype), requires_grad=True)
    weight = torch.randn(N, KL_WIDTH, 2 * KL_ACTIONS, device=device, requires_grad=True)
    bias = torch.zeros(N, 2 * KL_ACTIONS, device=device, requires_grad=True)
    targets = torch.rand(2, KL_BATCH, K, KL_ACTIONS, device=device) - 1
    mask = torch.ones(KL_BATCH, K, dtype=torch.bool, device=device)
    teacher = torch.arange(KL_BATCH, device=device) * N // KL_BATCH
    act_dims = torch.tensor([3, 6, 6, 8], device=device).repeat(N)[:N]
    ones = torch.ones(N, device=device)

    def step() -> None:
        sums = head_kl(h, weight, bias, *targets, mask, teacher, act_dims, "forward", 0.05)[0]
        torch.autograd.grad(sums, (h, weight, bias), ones)

    return step


def kl_bytes(device: str, dtype: str, size: str) -> Step:
    """h and its gradient, the targets; the heads in, their gradients zeroed and added."""
    hidden = 2 * KL_BATCH * K * KL_WIDTH
    targets = 2 * KL_BATCH * K * KL_ACTIONS
    heads = 3 * int(size) * KL_WIDTH * 2 * KL_ACTIONS
    return copy(4)(device, dtype, str(hidden + targets + heads))


def product(device: str, dtype: str, size: str) -> Step:
    m, k, n = map(int, size.split("x"))
    a = torch.randn(m, k, device=device, dtype=getattr(torch, dtype))
    b = torch.randn(n, k, device=device, dtype=getattr(torch, dtype))
    return lambda: torch.nn.functional.linear(a, b)


def product_bytes(device: str, dtype: str, size: str) -> Step:
    m, k, n = map(int, size.split("x"))
    return copy(getattr(torch, dtype).itemsize)(device, dtype, str(m * k + n * k + m * n))


# ---- the rows ----------------------------------------------------------------------------------------------


class Contender(NamedTuple):
    make: MakeStep
    dtypes: tuple[str, ...] = ("float32",)
    peer: bool = False  # whether it runs in the peers' environment


class Row(NamedTuple):
    cpu_sizes: tuple[str, ...]
    gpu_sizes: tuple[str, ...]
    contenders: dict[str, Contender]  # ratios are to the first
    cpu_time: bool = False  # of the process, on a CPU: other programs hardly disturb it
    # contenders whose last held-out loss the others train to; none: they only step
    targets: tuple[str, ...] = ()


def training_row(contenders: dict[str, Contender], *targets: str) -> Row:
    """Ratios are to the target's own time."""
    return Row((), (), contenders, cpu_time=True, targets=targets)


def changes(make: MakeStep, before: dict[str, Any]) -> dict[str, Contender]:
    """Our training with the defaults before, with today's, and with one of the two changes.

    Muon alone has today's learning rate and updates, one token alone has those of before.
    """
    options = {
        "before": before,
        "Muon": {"optimizer": "muon", "tokens": 3},
        "one token": {**before, "tokens": 1},
        "today": {},
    }
    return {name: Contender(functools.partial(make, **x), BOTH) for name, x in options.items()}


BOTH = ("float32", "bfloat16")
HALF = ("bfloat16",)
PARAMETERS = ("1e5", "1e6", "1e7", "1e8")
POINTS = ("64x1", "64x8", "512x1", "512x8", "4096x1", "4096x8")
ROUND_ROBIN = functools.partial(ours_distil, curriculum="fixed", surgery="none")
NOVELTY = functools.partial(ours_distil, curriculum="novelty", surgery="previous")
ALIGNED = functools.partial(NOVELTY, alignment_weight=1.0)
ESTIMATED = functools.partial(ALIGNED, alignment="estimate")
ROWS = {
    "machine": Row(("3840x128x512",), ("3840x128x512", "8192x8192x8192"), {
        "product": Contender(product, BOTH),
        "copy": Contender(product_bytes, BOTH),
    }),
    "teacher": Row(("64",), ("64", "4096"), {
        "ours": Contender(ours_teacher, BOTH),
        "ours, torch.compile": Contender(functools.partial(ours_teacher, compile=True), BOTH),
        "huggingface": Contender(huggingface_teacher, BOTH, peer=True),
        "d3rlpy": Contender(d3rlpy_teacher, peer=True),
        "d3rlpy, compile_graph": Contender(functools.partial(d3rlpy_teacher, compile_graph=True), peer=True),
    }),
    "rollout": Row(("1", "64"), ("1", "64"), {
        "ours": Contender(ours_rollout),
        "huggingface": Contender(huggingface_rollout, peer=True),
    }),
    "acting": Row(("teacher", "student"), ("teacher", "student"), {
        "Policy": Contender(ours_policy),
        "ONNX": Contender(onnx_policy),
        "ONNX, int8": Contender(functools.partial(onnx_policy, int8=True)),
        "products alone": Contender(products_of_acting),
        "huggingface": Contender(huggingface_acting, peer=True),
    }),
    "distil": Row(("3",), ("3",), {
        "fixed, no surgery": Contender(ROUND_ROBIN, HALF),
        "novelty, previous": Contender(NOVELTY, HALF),
        "novelty, previous, exact alignments": Contender(ALIGNED, HALF),
        "novelty, previous, estimated alignments": Contender(ESTIMATED, HALF),
    }),
    "teachers": Row(*2 * (("1", "3", "10", "30", "100", "300", "1000"),), {
        "novelty, previous": Contender(NOVELTY, HALF),
    }),
    "share": Row(*2 * (("10", "20", "50"),), {
        "own": Contender(functools.partial(of_same_spaces, share=False), BOTH),
        "--share": Contender(functools.partial(of_same_spaces, share=True), BOTH),
    }, cpu_time=True),
    "surgery": Row(PARAMETERS, PARAMETERS, {
        "ours": Contender(ours_surgery),
        "torch": Contender(torch_surgery),
        "torch foreach": Contender(foreach_surgery),
        "torchjd PCGrad": Contender(torchjd_surgery, peer=True),
        "copy": Contender(copy(20)),
    }),
    "update": Row(PARAMETERS, PARAMETERS, {
        "ours": Contender(ours_update),
        "torch": Contender(torch_update),
        "copy": Contender(copy(44)),
    }),
    "attention": Row(POINTS[:4], POINTS, {
        "ours": Contender(ours_attention, BOTH),
        "SDPA": Contender(sdpa_attention, BOTH),
        "SDPA, no padding": Contender(functools.partial(sdpa_attention, padding=False), BOTH),
        "FlexAttention": Contender(flex_attention, BOTH),
        "torch.compile": Contender(compiled_attention, BOTH),
        "copy": Contender(attention_bytes, BOTH),
    }),
    "kl": Row(*2 * (("3", "10", "30", "100"),), {
        "ours": Contender(ours_kl),
        "plain": Contender(functools.partial(ours_kl, which="head_kl_ref")),
        "torch.compile": Contender(functools.partial(ours_kl, which="head_kl_ref", compile=True)),
        "copy": Contender(kl_bytes),
    }),
    "processes": Row(("1", "2"), ("1", "2", "4", "8"), {
        "teacher": Contender(functools.partial(job, functools.partial(ours_teacher, size="64"))),
        "student": Contender(functools.partial(job, functools.partial(NOVELTY, size="3")), HALF),
    }),
    "optimizer": Row(*2 * (("teacher", "student"),), {
        "AdamW, 3 tokens": Contender(functools.partial(by_optimizer, optimizer="adamw", tokens=3), BOTH),
        "Muon, 3 tokens": Contender(functools.partial(by_optimizer, optimizer="muon", tokens=3), BOTH),
        "AdamW, 1 token": Contender(functools.partial(by_optimizer, optimizer="adamw", tokens=1), BOTH),
        "Muon, 1 token": Contender(functools.partial(by_optimizer, optimizer="muon", tokens=1), BOTH),
    }, cpu_time=True),
    "to-nll": training_row({
        "huggingface": Contender(huggingface_training, peer=True),
        "d3rlpy": Contender(d3rlpy_training, peer=True),
        "torchrl": Contender(torchrl_training, peer=True),
        "today": Contender(ours_training, BOTH),
        "before": Contender(functools.partial(ours_training, **TEACHER_BEFORE), BOTH),
    }, "huggingface", "d3rlpy", "torchrl"),
    "teacher-to-nll": training_row(changes(ours_training, TEACHER_BEFORE), "before"),
    "student-to-kl": training_row(changes(student_training, STUDENT_BEFORE), "before"),
}  # fmt: skip


# ---- a contender's process ---------------------------------------------------------------------------------


def work(what: str, name: str, dtype: str, size: str, device: str, threads: str) -> None:
    """Run n steps for each number n on stdin; print their seconds and the largest memory so far, in MiB.

    Of a training run also its held-out loss, updates done and in all; it takes no more than these.
    """
    torch.set_num_threads(int(threads))
    contender = ROWS[what].contenders[name]
    if not contender.peer:
        machine.keep_freed_memory()  # as our scripts do
    step = contender.make(device, dtype, size)
    on_gpu = device.startswith("cuda")
    clock = time.process_time if ROWS[what].cpu_time and not on_gpu else time.perf_counter
    for line in sys.stdin:
        n = int(line)
        if isinstance(step, Training):
            n = min(n, step.steps - step.done)
        start = clock()
        for _ in range(n):
            step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = clock() - start
        if on_gpu:
            memory = torch.cuda.max_memory_allocated() / 2**20
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        training = f"{step.held_out()} {step.done} {step.steps}" if isinstance(step, Training) else ""
        print(f"bench: {seconds} {memory} {training}", flush=True)


class Point(NamedTuple):
    """Where a training run stands."""

    seconds: float  # since its start
    held_out: float  # loss
    updates: int


class Runner:
    """A contender's process, seen from outside, and what it measured so far."""

    def __init__(self, python: str, name: str, dtype: str, what: str, size: str, device: str, threads: int):
        self.name = name
        self.dtype = dtype
        arguments = ["--work", what, name, dtype, size, device, str(threads)]
        self.command = [python, "-m", "research.bench", *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(self.command, cwd=ROOT, text=True, **pipes)
        self.ms = []  # per step, of each round
        self.memory = 0.0  # MiB
        self.curve: list[Point] = []  # of a training run
        self.finished = False

    def warm_up(self, seconds: float) -> bool:
        """The first steps, and how many take so long; False where the contender does not run here."""
        for _ in range(2):  # the first builds and compiles
            measured = self.turn(3)
        if measured is None:
            self.kill()
            return False
        self.n_steps = max(1, int(seconds / measured[0] * 3))
        return True

    def take_turn(self) -> None:
        """A round's steps."""
        seconds, self.memory = self.turn(self.n_steps)
        self.ms.append(1e3 * seconds / self.n_steps)

    def train(self, n: int) -> bool:
        """n updates more, and the held-out loss; False where the process has ended."""
        measured = self.turn(n)
        if measured is None:
            self.kill()
            return False
        seconds, self.memory, held_out, done, steps = measured
        before = self.curve[-1].seconds if self.curve else 0.0
        self.curve.append(Point(before + seconds, held_out, int(done)))
        self.finished = done == steps
        return True

    def reached(self, loss: float) -> Point:
        """Where a training run's held-out loss was first as low; its end where it never was."""
        return next((point for point in self.curve if point.held_out <= loss), self.curve[-1])

    def turn(self, n: int) -> list[float] | None:
        """What `work` prints after n steps; None where the process has ended."""
        try:
            self.process.stdin.write(f"{n}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        for line in self.process.stdout:  # libraries print there too
            if line.startswith("bench: "):
                return [float(x) for x in line.split()[1:]]
        return None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# ---- taking turns ------------------------------------------------------------------------------------------


def launch(what: str, size: str, device: str, cfg: Config) -> list[Runner]:
    """The processes of a row's contenders."""
    runners = []
    for name, contender in ROWS[what].contenders.items():
        python = cfg.peers if contender.peer else sys.executable
        if python:
            for dtype in contender.dtypes:
                runners.append(Runner(python, name, dtype, what, size, device, cfg.threads))
    return runners


def start(what: str, size: str, device: str, cfg: Config) -> list[Runner]:
    """The processes of the contenders that run here, warmed up; says which do not."""
    ready = []
    for runner in launch(what, size, device, cfg):
        if runner.warm_up(cfg.seconds):
            ready.append(runner)
        else:
            say_why(runner, f"{what} {size}")
    return ready


def say_why(runner: Runner, row: str) -> None:
    """Print how to see why a contender does not run."""
    command = f"cd {shlex.quote(str(ROOT))}; echo 1 | {shlex.join(runner.command)}"
    print(f"{row}: {runner.name} {runner.dtype} does not run here; to see why: {command}")


def race(what: str, size: str, device: str, cfg: Config) -> list[dict[str, Any]]:
    """The rows of one size: every contender's turns."""
    runners = start(what, size, device, cfg)
    for _ in range(cfg.rounds):
        for runner in runners:
            runner.take_turn()
    rows = []
    for runner in runners:
        runner.close()
        ratios = [
            ms / first for ms, first in zip(runner.ms, runners[0].ms, strict=True)
        ]  # neighbours in time
        row = {
            "what": what,
            "size": size,
            "contender": runner.name,
            "dtype": runner.dtype,
            "ms": f"{statistics.median(runner.ms):.4g}",
            "lowest": f"{min(runner.ms):.4g}",
            "highest": f"{max(runner.ms):.4g}",
            "ratio": f"{statistics.median(ratios):.3f}",
            "memory_mib": round(runner.memory),
        }
        rows.append(row)
    return rows


def race_to_loss(what: str, folder: Path, device: str, cfg: Config) -> list[dict[str, Any]]:
    """The rows of a training row: the time of each contender to the loss that each target ends with."""
    targets = ROWS[what].targets
    runners = launch(what, str(folder), device, cfg)
    while behind := [r for r in runners if not r.finished and trains_on(r, runners, targets)]:
        for runner in behind:
            if not runner.train(cfg.interval):
                say_why(runner, what)
                runners.remove(runner)
    rows = []
    for target in runners:
        if target.name not in targets:
            continue
        peer = ROWS[what].contenders[target.name].peer
        others = [r for r in runners if r.name not in targets and (peer or r.dtype == target.dtype)]
        loss = target.curve[-1].held_out
        for runner in [target, *others]:
            point = runner.reached(loss)
            ms = f"{1e3 * point.seconds:.4g}"
            row = {
                "what": what,
                "size": target.name,
                "contender": runner.name,
                "dtype": runner.dtype,
                **dict.fromkeys(("ms", "lowest", "highest"), ms),
                "ratio": f"{point.seconds / target.reached(loss).seconds:.3f}",
                "memory_mib": round(runner.memory),
                "updates": point.updates,
                "held_out": f"{point.held_out:.4f}",
                "target": f"{loss:.4f}",
            }
            rows.append(row)
    for runner in runners:
        runner.close()
    return rows


def trains_on(runner: Runner, runners: list[Runner], targets: tuple[str, ...]) -> bool:
    """A target trains to its end, another only while some target's held-out loss is lower."""
    if runner.name in targets or not runner.curve:
        return True
    lowest = min((r.curve[-1].held_out for r in runners if r.name in targets), default=math.inf)
    return runner.reached(lowest).held_out > lowest


def races(what: str, device: str, cfg: Config) -> Iterator[list[dict[str, Any]]]:
    """The rows of each size in turn."""
    needed = {"to-nll": "peers", "student-to-kl": "teachers"}.get(what)
    if not ROWS[what].targets:
        for size in ROWS[what].cpu_sizes if device == "cpu" else ROWS[what].gpu_sizes:
            yield race(what, size, device, cfg)
    elif needed and not getattr(cfg, needed):
        print(f"{what}: left out, for it needs --{needed}")
    else:
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), cfg)
            yield race_to_loss(what, Path(folder), device, cfg)


def main(cfg: Config) -> None:
    """Measure the rows asked for; those not measured again stay in the CSV, with where they were measured."""
    from support import cli

    cli.at_least(cfg, threads=1, rounds=1, seconds=0, updates=1, interval=1)
    machine.check_device(cfg.device)
    unknown = set(cfg.what) - set(ROWS)
    if unknown:
        raise UserError(f"--what {unknown.pop()}: choose from {', '.join(ROWS)}")
    if cfg.peers:
        cfg = dataclasses.replace(cfg, peers=absolute_program(cfg.peers))
    device = machine.device(cfg)
    path = Path(cfg.out) if cfg.out else ROOT / f"research/results/bench_{device.split(':')[0]}.csv"
    measured_on = machine.describe(SimpleNamespace(device=cfg.device, dtype="float32"))
    del measured_on["dtype"]  # each row has its own
    measured_on["threads"] = cfg.threads
    rows = [row for row in read(path) if cfg.what and row["what"] not in cfg.what]
    for what in cfg.what or ROWS:
        for of_size in races(what, device, cfg):
            for row in of_size:
                rows.append({**row, **measured_on})
                print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
            write(path, rows)
    plot(path.with_suffix(".png"), rows)


def absolute_program(name: str) -> str:
    """The path of a program, for a process in another directory. Raises UserError where there is none."""
    found = shutil.which(name)
    if found is None:
        raise UserError(f"--peers {name}: no such program; name an environment's python, as --help shows")
    return os.path.abspath(found)  # its links are kept: they tell Python which environment it is in


# ---- the CSV and its figure --------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """The rows in the order of ROWS; what only training rows have comes last, and is empty elsewhere."""
    if not rows:
        return
    text = io.StringIO()
    fields = [name for name in dict.fromkeys(itertools.chain(*rows)) if name not in OF_TRAINING]
    out = csv.DictWriter(text, [*fields, *OF_TRAINING], restval="")
    out.writeheader()
    out.writerows(sorted(rows, key=lambda row: list(ROWS).index(row["what"])))
    files.write(path, text.getvalue().encode())


OF_TRAINING = ("updates", "held_out", "target")  # losses: where the time was taken, and to be reached
PANELS = {"teachers": "teachers N", "surgery": "parameters", "update": "parameters", "kl": "teachers N"}


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Time against size, both logarithmic, of every row in PANELS."""
    import report

    measured = {row["what"] for row in rows}
    panels = {what: label for what, label in PANELS.items() if what in measured}
    if not panels:
        return
    fig, axes = report.figure(1, len(panels), (4 * len(panels), 3.4))
    for ax, (what, label) in zip(axes, panels.items(), strict=True):
        for i, name in enumerate(ROWS[what].contenders):
            points = [r for r in rows if r["what"] == what and r["contender"] == name]
            if points:
                sizes = [float(r["size"]) for r in points]
                ms = [float(r["ms"]) for r in points]
                ax.plot(sizes, ms, "o-", markersize=3, color=report.COLOURS[i], label=name)
        ax.set(xscale="log", yscale="log", xlabel=label, ylabel="ms", title=what)
        low, high = ax.get_ylim()
        # whole decades, lest a flat line look steep
        ax.set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
        ax.legend(frameon=False, fontsize=8)
    report.finish(fig, path, dpi=120)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:])
    else:
        from support import cli

        cli.run(main, Config, __doc__)

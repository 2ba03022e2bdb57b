"""Speed, side by side with what a user would pick instead -> research/results/bench_<device>.csv and .png

    python -m research.bench                                   # ours alone
    python3 -m venv .venv-bench && .venv-bench/bin/pip install -r requirements-bench.txt
    python -m research.bench --peers .venv-bench/bin/python    # others too, in that environment
    python -m research.bench --what teacher                    # some rows

Every contender is a process of its own that waits while the others run; they take turns, `rounds` times round, and a row is the median.

teacher    batch        a whole update with sampling, kzl's settings
rollout    batch        an action of so many environments, without the environments
acting     model        an action at batch 1 from numpy to numpy: Policy, the exported file, and the floor, the action's products alone
distil     teachers     an update of distill.py's loop, synthetic teachers, batch 64
surgery    parameters   the projection of one flat gradient
update     parameters   projection, clipping, AdamW, and the copy of g into u
attention  batch heads  forward and backward, T 60, C 128
kl         teachers     forward and backward from the hidden states, batch 256, C 64
processes  processes    an update of teacher and of student, each process with as many windows: all of them at the same speed is the best there can be
machine    m k n        one matrix product, and a copy_ of as many numbers as its factors and result hold: what the others are to be counted against
A "copy" moves the bytes that ours has to move at least, in one copy_: its time over ours is the share of the memory's bandwidth.
"""

import csv
import dataclasses
import functools
import io
import itertools
import math
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

K, O, A, C, LAYERS = (
    20,
    11,
    3,
    128,
    3,
)  # kzl's settings for hopper (github.com/kzl/decision-transformer, gym/experiment.py): also 1 head, dropout 0.1
STEPS = 100_000  # timesteps of the synthetic data


@dataclasses.dataclass
class Config:
    what: tuple[str, ...] = ()  # rows, as listed above; none: all
    peers: str = ""  # python of an environment with requirements-bench.txt; none: what needs no other package
    device: str = "auto"  # cpu, cuda, or auto
    threads: int = 1  # of torch, on a CPU
    rounds: int = 5  # that a row is the median of
    seconds: float = 0.5  # about how long a contender runs in a round
    out: str = ""  # default: research/results/bench_<device>.csv


# ---- teacher, rollout --------------------------------------------------------------------------------------------------
# a contender's function takes device, dtype, size (text), and returns a function that does one step


def episodes(n=STEPS, obs=O, act=A):
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(n, obs, generator=g),
        torch.rand(n, act, generator=g) * 2 - 1,
        torch.rand(n, generator=g),
        torch.arange(n) % 1000,
    )


def windows(device, batch):
    """Batches for peers that leave sampling to their user: one gather, as ours."""
    tables = [x.to(device) for x in episodes()]
    back = torch.arange(K - 1, -1, -1, device=device)

    def sample():
        end = torch.randint(K, STEPS, (batch,), device=device)
        rows = end[:, None] - back
        s, a, rtg, t = (x[rows] for x in tables)
        return s, a, rtg, t, back <= t[:, -1:]

    return sample


def task(i=0, obs=O, act=A):
    import data

    return data.Task(
        f"bench{i}", "bench", None, {}, 1000, obs, act, [], [], [], [], 1.0, {}, (0.0, 1.0), "", 0
    )


def ours_teacher(device, dtype, size, compile=False):
    import data
    import kernels
    import model as dt
    from kernels.project import project_adamw
    from support import processes, training

    s, a, rtg, t = episodes()
    train = data.Windows([torch.cat((s, a, rtg[:, None], t[:, None]), 1).numpy()], [task()], K, device)
    model = dt.DecisionTransformer(dt.ModelConfig((O,), (A,), LAYERS, 1, C, K, 0.1)).to(device)
    model.bfloat16 = dtype == "bfloat16"
    theta, generator, share = (
        dt.flatten(model),
        torch.Generator(device).manual_seed(0),
        torch.ones(1, device=device),
    )
    m, v, alive = (
        torch.zeros_like(theta.data),
        torch.zeros_like(theta.data),
        torch.ones((), dtype=torch.bool, device=device),
    )
    schedule = training.schedule(10, 1e-4, 1)[5].to(device)
    if compile:
        model.compile()

    def step():
        b = train.sample(int(size), share, generator)
        loss, tokens = dt.mean_nll(*model(0, *b[1:6]), b.actions, b.mask), b.mask.sum()
        all_tokens = processes.summed(tokens)[0]
        theta.grad.zero_()
        (loss * (tokens / all_tokens)).backward()
        processes.all_reduce(theta.grad)
        with torch.no_grad():
            project_adamw(theta, theta.grad, None, m, v, schedule, alive, weight_decay=1e-4)

    return (
        training.captured(step, [theta.data, m, v, alive], generator)
        if kernels.compiled(device) and not compile and processes.world() == 1
        else step
    )


def huggingface(dropout=0.1):
    from transformers import DecisionTransformerConfig, DecisionTransformerModel

    return DecisionTransformerModel(DecisionTransformerConfig(
        state_dim=O, act_dim=A, hidden_size=C, max_ep_len=1000, n_layer=LAYERS, n_head=1, n_inner=4 * C, activation_function="relu", n_positions=1024,
        resid_pdrop=dropout, attn_pdrop=dropout, embd_pdrop=dropout))  # fmt: skip


def huggingface_teacher(device, dtype, size):
    model, sample = huggingface().to(device).train(), windows(device, int(size))
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4, fused=True)

    def step():
        s, a, rtg, t, mask = sample()
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16"):
            got = model(
                states=s,
                actions=a,
                rewards=None,
                returns_to_go=rtg[..., None],
                timesteps=t,
                attention_mask=mask.long(),
            ).action_preds
        loss = (got[mask].float() - a[mask]).square().mean()
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        opt.step()

    return step


def d3rlpy_teacher(device, dtype, size, compile_graph=False):
    import d3rlpy

    s, a, rtg, t = (x.numpy() for x in episodes())
    data = d3rlpy.dataset.MDPDataset(s, a, rtg, (t == 999).astype("float32"))
    config = d3rlpy.algos.DecisionTransformerConfig(
        batch_size=int(size), learning_rate=1e-4, context_size=K, max_timestep=1000, num_heads=1, num_layers=LAYERS, attn_dropout=0.1, resid_dropout=0.1,
        embed_dropout=0.1, activation_type="relu", encoder_factory=d3rlpy.models.VectorEncoderFactory([C]), compile_graph=compile_graph)  # fmt: skip
    algo = config.create(device=device)
    algo.build_with_dataset(data)
    return lambda: algo.update(data.sample_trajectory_batch(int(size), length=K))


def ours_rollout(device, dtype, size):
    import model as dt
    import policy

    batch = int(size)
    model = dt.DecisionTransformer(dt.ModelConfig((O,), (A,), LAYERS, 1, C, K)).to(device).eval()
    s, a, rtg = (
        x[:, -1].contiguous() for x in windows(device, batch)()[:3]
    )  # as they come from an environment
    actors = [policy.Actor(model, 0, batch, 1000)]

    def step():
        if actors[0].t == 1000:
            actors[0] = policy.Actor(model, 0, batch, 1000)
        actors[0].act(s, rtg, a).cpu()

    return step


def acting_model(size):
    """The teacher of hopper, or the student of hopper, halfcheetah and walker2d, with default sizes; and hopper as their first task."""
    import model as dt

    cfg = (
        dt.ModelConfig((O,), (A,), LAYERS, 1, C, K)
        if size == "teacher"
        else dt.ModelConfig((O, 17, 17), (A, 6, 6), 2, 1, 64, K)
    )
    hopper = task()
    hopper.obs_mean, hopper.obs_std, hopper.act_low, hopper.act_high, hopper.targets = (
        [0.0] * O,
        [1.0] * O,
        [-1.0] * A,
        [1.0] * A,
        {"p95": 3000.0},
    )
    return dt.DecisionTransformer(cfg).eval(), hopper


def ours_policy(device, dtype, size):
    import policy

    model, hopper = acting_model(size)
    p, obs, t = policy.Policy.of(model.to(device), hopper, 0), episodes()[0].numpy(), 0

    def step():
        nonlocal t
        if t % 1000 == 0:
            p.reset()
        p.act(obs[t % STEPS], 1.0)
        t += 1

    return step


def onnx_policy(device, dtype, size, int8=False):
    import export

    step_ = export.Step(*acting_model(size), 0).eval()
    blob = export.to_onnx(step_, 0)
    runtime, obs, t = export.session(export.quantised(blob) if int8 else blob), episodes()[0].numpy(), 0
    start = {k: x.numpy() for k, x in zip(export.NAMES[0], step_.inputs(1), strict=True)}
    given = dict(start)

    def step():
        nonlocal t
        if t % 1000 == 0:
            given.update(start)
        given["observation"], given["timestep"] = obs[t % STEPS][None], np.array([t % 1000])
        given["last_action"], given["memory"] = runtime.run(None, given)
        t += 1

    return step


def products_of_acting(device, dtype, size):
    """The floor: the products of one action alone, out of Actor's own weights."""
    import policy

    model, hopper = acting_model(size)
    actor = policy.Actor(model.to(device), 0, 1, 1000)
    width = actor.embed.shape[1] // 3
    pairs = [(torch.randn(1, len(actor.embed)), actor.embed)]
    for i, (qkv, _, proj, _, fc, _, out, _) in enumerate(actor.blocks):
        n = 1 if i == len(actor.blocks) - 1 else 6  # of the last block, one token's output is read
        pairs += [(torch.randn(m, len(w)), w) for m, w in ((6, qkv), (n, proj), (n, fc), (n, out))]
    pairs = [(x.to(device), w) for x, w in [*pairs, (torch.randn(1, width), actor.head[0])]]

    @torch.inference_mode()
    def step():
        for x, w in pairs:
            torch.mm(x, w)

    return step


def huggingface_acting(device, dtype, size):
    return huggingface_rollout(device, dtype, "1")  # of the teacher's size: it has no smaller student


def huggingface_rollout(device, dtype, size):
    """The loop of HuggingFace's own example (examples/research_projects/decision_transformer), for a batch: episodes grow by concatenation,
    the last 20 timesteps are cut out, padded (here they never need it), and sent through the model."""
    batch = int(size)
    model = huggingface().to(device).eval()
    s, a, rtg, t, mask = (x.to(device) for x in windows(device, batch)())
    mask = mask.long()
    history = []

    @torch.inference_mode()
    def step():
        if not history or history[0].shape[1] == 1000:
            history[:] = s, a, rtg, t
        states, actions, returns, steps = history
        actions = torch.cat((actions, torch.zeros(batch, 1, A, device=device)), 1)
        act = model(states=states[:, -K:], actions=actions[:, -K:], rewards=None, returns_to_go=returns[:, -K:, None], timesteps=steps[:, -K:],
                    attention_mask=mask).action_preds[:, -1]  # fmt: skip
        actions[:, -1] = act
        act.cpu()
        history[:] = (
            torch.cat((states, s[:, -1:]), 1),
            actions,
            torch.cat((returns, rtg[:, -1:]), 1),
            torch.cat((steps, t[:, -1:]), 1),
        )

    return step


# ---- the loop ----------------------------------------------------------------------------------------------------------


def ours_distil(device, dtype, size, **options):
    import data
    import distill
    import model as dt

    N, dims = int(size), ((11, 3), (17, 6), (17, 6), (27, 8))
    cfg = distill.Config(steps=20_000, **options)
    tasks = [task(i, *dims[i % 4]) for i in range(N)]
    tables = []
    for t in tasks:
        s, a, rtg, steps = episodes(2000, t.obs_dim, t.act_dim)
        tables.append(torch.cat((s, a, rtg[:, None], steps[:, None]), 1).numpy())
    train = data.Windows(tables, tasks, K, device, targets=True)
    train.table[:, -2 * train.A :].uniform_(-1, 0)
    student = dt.DecisionTransformer(
        dt.ModelConfig(tuple(t.obs_dim for t in tasks), tuple(t.act_dim for t in tasks), 2, 1, 64, K)
    ).to(device)
    student.bfloat16 = dtype == "bfloat16"
    update, _, state = distill.learner(
        cfg, student, [], train, train.spread(cfg.probe_windows), torch.Generator(device).manual_seed(0)
    )
    steps = itertools.cycle(range(cfg.steps))

    def step():
        at = next(steps)
        if at == 0:
            state["done"].zero_()
        update(at)

    return step


def job(contender, device, dtype, size):
    """contender in `size` processes, of which this one starts the others and has them step with it."""
    from support import processes

    others = []
    if "RANK" not in os.environ:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            os.environ |= {
                "RANK": "0",
                "LOCAL_RANK": "0",
                "WORLD_SIZE": size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(s.getsockname()[1]),
            }
        for r in range(1, int(size)):
            others.append(subprocess.Popen([sys.executable, *sys.argv], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                           env=os.environ | {"RANK": str(r), "LOCAL_RANK": str(r)}))  # fmt: skip
    processes.join(SimpleNamespace(device=device))
    step = contender(device, dtype)

    def all_step():
        for p in others:
            p.stdin.write(b"1\n")
            p.stdin.flush()
        step()

    return all_step


# ---- kernels -----------------------------------------------------------------------------------------------------------


def two_vectors(size, device):
    g, u = (torch.randn(int(float(size)), device=device) for _ in range(2))
    return g - 0.1 * u, u  # in conflict, as where it costs


def copy(bytes_per_number):
    """A copy_ that moves as many bytes, read and written, as ours does per number."""

    def contender(device, dtype, size):
        n = int(float(size)) * bytes_per_number // 8
        x, y = torch.ones(n, device=device), torch.empty(n, device=device)
        return lambda: y.copy_(x)

    return contender


def ours_surgery(device, dtype, size):
    from kernels.project import project

    g, u = two_vectors(size, device)
    return lambda: project(g, u)


def torch_surgery(device, dtype, size):
    g, u = two_vectors(size, device)

    def step():
        dot, uu = g @ u, u @ u
        torch.where(dot < 0, g - dot / uu * u, g)

    return step


def foreach_surgery(device, dtype, size):
    """Over a list of 50 tensors, as a model's parameters are."""
    gs, us = (x.chunk(50) for x in two_vectors(size, device))

    def step():
        dot, uu = (torch.stack([x.sum() for x in torch._foreach_mul(x, us)]).sum() for x in (gs, us))
        torch._foreach_sub(gs, torch._foreach_mul(us, torch.where(dot < 0, dot / uu, 0.0)))

    return step


def torchjd_surgery(device, dtype, size):
    from torchjd.aggregation import PCGrad

    matrix, aggregate = torch.stack(two_vectors(size, device)), PCGrad()
    return lambda: aggregate(matrix)


def ours_update(device, dtype, size):
    from kernels.project import project_adamw
    from support import training

    g, u = two_vectors(size, device)
    theta, m, v = torch.randn_like(g), torch.zeros_like(g), torch.zeros_like(g)
    schedule, alive = (
        training.schedule(10, 1e-4, 1)[5].to(device),
        torch.ones((), dtype=torch.bool, device=device),
    )

    def step():
        with torch.no_grad():
            project_adamw(theta, g, u, m, v, schedule, alive)

    return step


def torch_update(device, dtype, size):
    g, u = two_vectors(size, device)
    theta = torch.nn.Parameter(torch.randn_like(g))
    opt = torch.optim.AdamW([theta], lr=1e-4, fused=True)

    def step():
        with torch.no_grad():
            dot, uu = g @ u, u @ u
            theta.grad = torch.where(dot < 0, g - dot / uu * u, g)
            u.copy_(theta.grad)
            torch.nn.utils.clip_grad_norm_([theta], 0.25)
            opt.step()

    return step


def attention_step(f, device, dtype, size):
    """f(qkv, mask, heads) forward and backward; some windows are padded on the left."""
    B, heads = (int(x) for x in size.split("x"))
    qkv = torch.randn(B, 3 * K, 3 * C, device=device, dtype=getattr(torch, dtype), requires_grad=True)
    mask = torch.arange(3 * K, device=device) >= (torch.arange(B, device=device) % 64 == 0)[:, None] * 30
    dout = torch.randn(B, 3 * K, C, device=device, dtype=qkv.dtype)
    return lambda: torch.autograd.grad(f(qkv, mask, heads), qkv, dout)


def heads_of(qkv, heads):
    return qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def ours_attention(*args):
    from kernels.attention import attention

    return attention_step(attention, *args)


def compiled_attention(*args):
    from kernels.attention import attention_ref

    return attention_step(torch.compile(attention_ref), *args)


def sdpa_attention(device, dtype, size, padding=True):
    """PyTorch's own choice of backend; without padding it may choose FlashAttention, which takes no mask."""
    causal = torch.ones(3 * K, 3 * K, dtype=torch.bool, device=device).tril()

    def f(qkv, mask, heads):
        seen = (
            (causal & mask[:, None, None]) | torch.eye(3 * K, dtype=torch.bool, device=device)
            if padding
            else None
        )
        y = torch.nn.functional.scaled_dot_product_attention(
            *heads_of(qkv, heads), seen, is_causal=not padding
        )
        return y.transpose(1, 2).flatten(2)

    return attention_step(f, device, dtype, size)


def flex_attention(device, dtype, size):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    B, flex = int(size.split("x")[0]), torch.compile(flex_attention)
    first = (torch.arange(B, device=device) % 64 == 0) * 30
    blocks = create_block_mask(
        lambda b, h, i, j: (i >= j) & (j >= first[b]), B, None, 3 * K, 3 * K, device=device
    )
    return attention_step(
        lambda qkv, mask, heads: flex(*heads_of(qkv, heads), block_mask=blocks).transpose(1, 2).flatten(2),
        device,
        dtype,
        size,
    )


def attention_bytes(device, dtype, size):
    B, e = int(size.split("x")[0]), getattr(torch, dtype).itemsize
    return copy(11 * e)(
        device, dtype, B * 3 * K * C
    )  # forward 3 in, 1 out; backward 4 in, 3 out: numbers for each channel of each token


def ours_kl(device, dtype, size, which="head_kl", compile=False):
    import kernels.kl

    N, B, width, act = int(size), 256, 64, 8
    f = getattr(kernels.kl, which)
    f = torch.compile(f) if compile else f
    h = torch.randn(B, K, width, device=device, dtype=getattr(torch, dtype), requires_grad=True)
    w, b = (
        torch.randn(N, width, 2 * act, device=device, requires_grad=True),
        torch.zeros(N, 2 * act, device=device, requires_grad=True),
    )
    targets = torch.rand(2, B, K, act, device=device) - 1
    mask, task = torch.ones(B, K, dtype=torch.bool, device=device), (torch.arange(B, device=device) * N // B)
    act_dims, up = torch.tensor([3, 6, 6, 8], device=device).repeat(N)[:N], torch.ones(N, device=device)

    def step():
        sums = f(h, w, b, *targets, mask, task, act_dims, "forward", 0.05)[0]
        torch.autograd.grad(sums, (h, w, b), up)

    return step


def kl_bytes(device, dtype, size):
    N, B, width, act = int(size), 256, 64, 8
    numbers = (
        2 * B * K * width + 2 * B * K * act + 3 * N * width * 2 * act
    )  # h, dh, targets; the heads in, their gradients zeroed and added
    return copy(4)(device, dtype, numbers)


def product(device, dtype, size):
    m, k, n = (int(x) for x in size.split("x"))
    a, b = (
        torch.randn(m, k, device=device, dtype=getattr(torch, dtype)),
        torch.randn(n, k, device=device, dtype=getattr(torch, dtype)),
    )
    return lambda: torch.nn.functional.linear(a, b)


def product_bytes(device, dtype, size):
    m, k, n = (int(x) for x in size.split("x"))
    return copy(getattr(torch, dtype).itemsize)(device, dtype, m * k + n * k + m * n)


# what: sizes on a CPU, sizes on a GPU, and {contender: (its function, precisions, whether it lives in the peers' environment)}. Ratios are to the first.
BOTH, SINGLE, HALF, PEER = ("float32", "bfloat16"), ("float32",), ("bfloat16",), True
TEN = ("1e5", "1e6", "1e7", "1e8")
NOVELTY = {"curriculum": "novelty", "surgery": "previous"}
POINTS = ("64x1", "64x8", "512x1", "512x8", "4096x1", "4096x8")
ROWS = {
    "machine": (("3840x128x512",), ("3840x128x512", "8192x8192x8192"), {"product": (product, BOTH), "copy": (product_bytes, BOTH)}),
    "teacher": (("64",), ("64", "4096"), {
        "ours": (ours_teacher, BOTH), "ours, torch.compile": (functools.partial(ours_teacher, compile=True), BOTH),
        "huggingface": (huggingface_teacher, BOTH, PEER), "d3rlpy": (d3rlpy_teacher, SINGLE, PEER),
        "d3rlpy, compile_graph": (functools.partial(d3rlpy_teacher, compile_graph=True), SINGLE, PEER)}),
    "rollout": (("1", "64"), ("1", "64"), {"ours": (ours_rollout, SINGLE), "huggingface": (huggingface_rollout, SINGLE, PEER)}),
    "acting": (*2 * (("teacher", "student"),), {
        "Policy": (ours_policy, SINGLE), "ONNX": (onnx_policy, SINGLE), "ONNX, int8": (functools.partial(onnx_policy, int8=True), SINGLE),
        "products alone": (products_of_acting, SINGLE), "huggingface": (huggingface_acting, SINGLE, PEER)}),
    "distil": (("3",), ("3",), {
        "fixed, no surgery": (functools.partial(ours_distil, curriculum="fixed", surgery="none"), HALF),
        "novelty, previous": (functools.partial(ours_distil, **NOVELTY), HALF),
        "novelty, previous, exact alignments": (functools.partial(ours_distil, **NOVELTY, alignment_weight=1.0), HALF),
        "novelty, previous, estimated alignments": (functools.partial(ours_distil, **NOVELTY, alignment_weight=1.0, alignment="estimate"), HALF)}),
    "teachers": (*2 * (("1", "3", "10", "30", "100", "300", "1000"),), {"novelty, previous": (functools.partial(ours_distil, **NOVELTY), HALF)}),
    "surgery": (TEN, TEN, {"ours": (ours_surgery, SINGLE), "torch": (torch_surgery, SINGLE), "torch foreach": (foreach_surgery, SINGLE),
                           "torchjd PCGrad": (torchjd_surgery, SINGLE, PEER), "copy": (copy(20), SINGLE)}),
    "update": (TEN, TEN, {"ours": (ours_update, SINGLE), "torch": (torch_update, SINGLE), "copy": (copy(44), SINGLE)}),
    "attention": (POINTS[:4], POINTS, {
        "ours": (ours_attention, BOTH), "SDPA": (sdpa_attention, BOTH), "SDPA, no padding": (functools.partial(sdpa_attention, padding=False), BOTH),
        "FlexAttention": (flex_attention, BOTH), "torch.compile": (compiled_attention, BOTH), "copy": (attention_bytes, BOTH)}),
    "kl": (*2 * (("3", "10", "30", "100"),), {
        "ours": (ours_kl, SINGLE), "plain": (functools.partial(ours_kl, which="head_kl_ref"), SINGLE),
        "torch.compile": (functools.partial(ours_kl, which="head_kl_ref", compile=True), SINGLE), "copy": (kl_bytes, SINGLE)}),
    "processes": (("1", "2"), ("1", "2", "4", "8"), {
        "teacher": (functools.partial(job, functools.partial(ours_teacher, size="64")), SINGLE),
        "student": (functools.partial(job, functools.partial(ours_distil, size="3", **NOVELTY)), HALF)}),
}  # fmt: skip


# ---- taking turns ------------------------------------------------------------------------------------------------------


def work(what, contender, dtype, size, device, threads):
    """A contender's process: for each number n on stdin, runs n steps and prints the seconds and the process's largest memory so far, in MiB."""
    torch.set_num_threads(int(threads))
    if not ROWS[what][2][contender][2:]:
        from support import machine

        machine.keep_freed_memory()  # as our scripts do
    step = ROWS[what][2][contender][0](device, dtype, size)
    cuda = device.startswith("cuda")
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        memory = (
            torch.cuda.max_memory_allocated() / 2**20
            if cuda
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        )
        print(f"bench: {seconds} {memory}", flush=True)


def turn(process, n):
    """Seconds per step of n steps of a contender, and its memory, while the others wait; None where it has ended."""
    try:
        process.stdin.write(f"{n}\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    for line in process.stdout:  # libraries talk on stdout too
        if line.startswith("bench: "):
            seconds, memory = map(float, line.split()[1:])
            return seconds / n, memory
    return None


def race(what, size, device, cfg):
    """The rows of one size: every contender's turns."""
    runs = {}
    for name, (_, dtypes, *peer) in ROWS[what][2].items():
        for dtype in dtypes:
            python = cfg.peers if peer else sys.executable
            if python:
                args = [
                    python,
                    "-m",
                    "research.bench",
                    "--work",
                    what,
                    name,
                    dtype,
                    size,
                    device,
                    str(cfg.threads),
                ]
                runs[name, dtype] = subprocess.Popen(
                    args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                )
    n = {}
    for who, p in list(runs.items()):
        for warm in (3, 3):  # the first builds and compiles
            got = turn(p, warm)
        if got is None:
            print(
                f"{what} {size}: {' '.join(who)} does not run here; to see why: echo 1 | {' '.join(repr(a) if ' ' in a else a for a in runs.pop(who).args)}"
            )
        else:
            n[who] = max(1, int(cfg.seconds / got[0]))
    times, memory = {who: [] for who in runs}, {}
    for _ in range(cfg.rounds):
        for who, p in runs.items():
            seconds, memory[who] = turn(p, n[who])
            times[who].append(1e3 * seconds)
    for p in runs.values():
        p.stdin.close()
        p.wait()
    if not times:
        return
    first = next(iter(times.values()))
    for (name, dtype), t in times.items():
        ratio = statistics.median(a / b for a, b in zip(t, first, strict=True))  # of neighbours in time
        yield {"what": what, "size": size, "contender": name, "dtype": dtype, "ms": f"{statistics.median(t):.4g}", "lowest": f"{min(t):.4g}",
               "highest": f"{max(t):.4g}", "ratio": f"{ratio:.3f}", "memory_mib": round(memory[name, dtype])}  # fmt: skip


def main(cfg: Config):
    from support import UserError, cli, machine

    cli.at_least(cfg, threads=1, rounds=1, seconds=0)
    machine.check_device(cfg.device)
    unknown = set(cfg.what) - set(ROWS)
    if unknown:
        raise UserError(f"--what {unknown.pop()}: choose from {', '.join(ROWS)}")
    device = machine.device(cfg)
    path = Path(cfg.out or f"research/results/bench_{device.split(':')[0]}.csv")
    at = {**machine.describe(SimpleNamespace(device=cfg.device, dtype="float32")), "threads": cfg.threads}
    del at["dtype"]  # each row has its own
    rows = [
        r for r in read(path) if cfg.what and r["what"] not in cfg.what
    ]  # those not measured again stay, with where they were measured
    for what in cfg.what or ROWS:
        for size in ROWS[what][0 if device == "cpu" else 1]:
            for row in race(what, size, device, cfg):
                rows.append({**row, **at})
                print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
            write(path, rows)
    plot(path.with_suffix(".png"), rows)


def read(path):
    if not path.exists():
        return []
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def write(path, rows):
    from support import files

    text = io.StringIO()
    out = csv.DictWriter(text, rows[0])
    out.writeheader()
    out.writerows(sorted(rows, key=lambda r: list(ROWS).index(r["what"])))
    files.write(path, text.getvalue().encode())


def plot(path, rows):
    """Time against size, both logarithmic, of every row that has several sizes."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    from report import COLOURS

    panels = {"teachers": "teachers N", "surgery": "parameters", "update": "parameters", "kl": "teachers N"}
    panels = {w: label for w, label in panels.items() if any(r["what"] == w for r in rows)}
    if not panels:
        return
    fig, axes = plt.subplots(
        1, len(panels), figsize=(4 * len(panels), 3.4), layout="constrained", squeeze=False
    )
    for ax, (what, label) in zip(axes[0], panels.items(), strict=True):
        for i, name in enumerate(ROWS[what][2]):
            points = [
                (float(r["size"]), float(r["ms"]))
                for r in rows
                if r["what"] == what and r["contender"] == name
            ]
            if points:
                ax.plot(*zip(*points, strict=True), "o-", markersize=3, color=COLOURS[i], label=name)
        ax.set(xscale="log", yscale="log", xlabel=label, ylabel="ms", title=what)
        low, high = ax.get_ylim()
        ax.set_ylim(
            10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high))
        )  # whole decades, lest a flat line look steep
        ax.legend(frameon=False, fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=120)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:])
    else:
        from support import cli

        cli.run(main, Config, __doc__)

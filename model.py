"""Decision Transformer (Chen et al. 2021, arXiv 2106.01345) with a Gaussian or categorical head: one class for teacher and student.

Notation, the same in every file:
    B windows, K timesteps of context, T = 3K tokens (R, s, a), C channels, nh heads, hs = C / nh
    N tasks, O and A observation and action dimension, P parameters
    rtg      return-to-go, divided by the task's rtg_scale
    states   normalised with the task's obs_mean and obs_std; actions scaled to [-1, 1], discrete ones one-hot: A is their number
    mask     (B, K) bool, True where there is a timestep and False where a window begins before its episode does (left padding)

A student is a model with several tasks: one trunk, and for each task its own input embeddings and head.
"""

import dataclasses
import hashlib
import json
import tempfile
from pathlib import Path

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F

import run
from kernels.attention import attention, kept
from kernels.kl import bounded, policies

WAVES = 16  # frequencies that timesteps are embedded by


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    obs_dims: tuple[int, ...]  # O of each task
    act_dims: tuple[int, ...]  # A of each task
    n_layer: int = 3
    n_head: int = 1
    n_embd: int = 128  # C
    context: int = 20  # K
    dropout: float = 0.0
    discrete: tuple[bool, ...] = ()  # whether each task's actions are; none given: no task's are

    def __post_init__(self):
        object.__setattr__(self, "discrete", self.discrete or (False,) * len(self.act_dims))

    @classmethod
    def of(cls, tasks, **sizes):
        """For these data.Tasks."""
        return cls(tuple(t.obs_dim for t in tasks), tuple(t.act_dim for t in tasks), discrete=tuple(t.discrete for t in tasks), **sizes)

    def categorical(self, device=None):
        """`discrete` as (N,) bool; None where no task's actions are."""
        return torch.tensor(self.discrete, device=device) if any(self.discrete) else None


def dropout(x, p):
    """F.dropout in training, with a CPU's masks from cheaper random bits."""
    return x if p == 0 else F.dropout(x, p) if x.is_cuda else x * kept(x.shape, p, x)


class Linear(nn.Linear):
    """In the precision of x, whatever the weights are kept in."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    """Likewise."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype))


MAX_CONTEXT = 1024  # timesteps; what acting keeps grows with the square


class Block(nn.Module):
    """Pre-norm transformer block (GPT-2's)."""

    def __init__(self, cfg):
        super().__init__()
        C = cfg.n_embd
        self.dropout = cfg.dropout
        self.ln1, self.ln2 = LayerNorm(C), LayerNorm(C)
        self.qkv, self.proj = Linear(C, 3 * C), Linear(C, C)
        self.fc, self.out = Linear(C, 4 * C), Linear(4 * C, C)

    def forward(self, x, attend, keep=...):
        """x (B, T, C); attend: packed (B, T, 3C) -> (B', T', C), the outputs of the tokens x[keep], those that somebody reads."""
        p = self.dropout if self.training else 0.0
        x = x[keep] + dropout(self.proj(attend(self.qkv(self.ln1(x)))), p)
        return x + dropout(self.out(F.relu(self.fc(self.ln2(x)))), p)


class Heads(nn.Module):
    """One affine map per task, padded to the widest task: x (B, K, in) -> (B, K, out), each window through its own task's."""

    def __init__(self, n_tasks, d_in, d_out, std):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_tasks, d_in, d_out) * std)
        self.bias = nn.Parameter(torch.randn(n_tasks, d_out) * std)  # not zero: LayerNorm would leave only the sign of a return-to-go

    def forward(self, x, task):  # task: an int, or one index per window (B,)
        w, b = self.weight[task], self.bias[task]
        return x @ w[: x.shape[-1]] + b if isinstance(task, int) else torch.baddbmm(b[:, None], x, w)


def waves(timesteps):
    """(B, K) -> (B, K, 2 WAVES): sines and cosines of 1/20 to 1/20,000 radian per timestep (after Vaswani et al. 2017, arXiv 1706.03762, section 3.5).

    Not a learnt row for each timestep, as the paper has it: of a thousand rows each sees little of a short training, and they would be half of
    a small student. And no faster waves: with a clock that fine, the first steps of episodes that begin alike can be acted by heart.
    """
    w = 1000.0 ** -torch.linspace(0, 1, WAVES, dtype=timesteps.dtype, device=timesteps.device) / 20
    x = timesteps[..., None] * w
    return torch.cat((x.sin(), x.cos()), dim=-1)


class DecisionTransformer(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.bfloat16 = False  # the blocks' matrix products, in training; embeddings, head and acting stay in float32
        N, C, O, A = len(cfg.obs_dims), cfg.n_embd, max(cfg.obs_dims), max(cfg.act_dims)
        self.embed_state = Heads(N, O, C, O**-0.5)
        self.embed_action = Heads(N, A, C, A**-0.5)
        self.embed_rtg = Heads(N, 1, C, 1.0)
        self.embed_time = nn.Linear(2 * WAVES, C)
        self.embed_place = nn.Embedding(cfg.context, C)  # in the window, its first valid timestep first
        self.ln_in, self.ln_out = nn.LayerNorm(C), nn.LayerNorm(C)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.head = Heads(N, C, 2 * A, 0.02)
        for name, p in self.blocks.named_parameters():  # unit scale through every product, and at the start of the residual stream
            if p.dim() == 2:
                nn.init.normal_(p, std=p.shape[1] ** -0.5 * ((2 * cfg.n_layer) ** -0.5 if "proj" in name or "out" in name else 1.0))
            elif "bias" in name:
                nn.init.zeros_(p)
        nn.init.normal_(self.embed_place.weight, std=0.2)

    def forward(self, task, states, actions, rtg, timesteps, mask, hidden=False):
        """The policy at every timestep, from what came before its action: mean, log_std, each (B, K, A), of discrete actions their log-probabilities and zeros;
        hidden: what its head reads, (B, K, C).

        task: an int, and states (B, K, O_task), actions (B, K, A_task); or one index per window (B,), and states and actions
        padded to the widest task's sizes, as then are the outputs. rtg (B, K), timesteps (B, K) integers, mask (B, K) bool.
        """
        m = mask[..., None]
        # what is masked must not matter, not even as NaN times zero in a gradient: cleared before anything is computed
        states, actions = states.masked_fill(~m, 0.0), actions.masked_fill(~m, 0.0)
        rtg, timesteps = rtg.masked_fill(~mask, 0.0), timesteps.masked_fill(~mask, 0)
        B, K = mask.shape
        t = self.embed_time(waves(timesteps.to(rtg.dtype))) + self.embed_place((mask.cumsum(1) - 1).clamp_min(0))
        r = self.embed_rtg(rtg[..., None], task) + t
        s = self.embed_state(states, task) + t
        a = self.embed_action(actions, task) + t
        x = torch.stack((r, s, a), dim=2).view(B, 3 * K, -1)  # (B, K, 3, C) -> (B, 3K, C)
        p, state = self.cfg.dropout if self.training else 0.0, slice(1, None, 3)
        x = dropout(self.ln_in(x), p)
        token_mask = mask.repeat_interleave(3, dim=1)  # (B, 3K)
        x = x.bfloat16() if self.bfloat16 and self.training else x
        for block in self.blocks[:-1]:
            x = block(x, lambda qkv: attention(qkv, token_mask, self.cfg.n_head, p))
        x = self.blocks[-1](x, lambda qkv: attention(qkv, token_mask, self.cfg.n_head, p, state), (slice(None), state))  # (B, K, C): they have seen R_t and s_t, not a_t
        x = self.ln_out(x.to(rtg.dtype))
        return x if hidden else self.policy(x, task)

    def policy(self, x, task):
        """What `forward` returns, of hidden states x (B, K, C)."""
        x, cfg = self.head(x, task), self.cfg
        if not isinstance(task, int):
            return policies(x, task, torch.tensor(cfg.act_dims, device=x.device), cfg.categorical(x.device))
        mean, log_std = (y[..., : cfg.act_dims[task]] for y in x.chunk(2, dim=-1))
        return (mean.log_softmax(-1), torch.zeros_like(mean)) if cfg.discrete[task] else (mean.tanh(), bounded(log_std))

    @property
    def n_params(self):
        return sum(p.numel() for p in self.parameters())


def flatten(model):
    """Move all parameters into one flat buffer, and their gradients into another: returns theta (P,) with theta.grad (P,).

    Each parameter becomes a view, so that surgery, clipping and the optimiser are single vector operations.
    """
    params = list(model.parameters())
    theta = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in params]))
    theta.grad = torch.zeros_like(theta)
    for p, v, g in zip(params, unflatten(model, theta.data).values(), unflatten(model, theta.grad).values(), strict=True):
        p.data, p.grad = v, g
    return theta


def unflatten(model, theta):
    """theta (P,) -> {parameter name: view of its shape}, the inverse of flatten's concatenation."""
    names, shapes = zip(*((n, p.shape) for n, p in model.named_parameters()), strict=True)
    return {n: v.view(s) for n, v, s in zip(names, theta.split([s.numel() for s in shapes]), shapes, strict=True)}


def gaussian_nll(mean, log_std, x):
    """Negative log-likelihood of x in nats, elementwise: all (B, K, A)."""
    return log_std + 0.5 * ((x - mean) * (-log_std).exp()).square() + 0.9189385332046727  # log(2 pi) / 2


def mean_nll(mean, log_std, x, mask, discrete=False):
    """Negative log-likelihood of a task's actions x (B, K, A), in nats: mean of valid tokens, mask (B, K), and of action dimensions (a discrete action is one)."""
    nll = -(x * mean).sum(-1) if discrete else gaussian_nll(mean, log_std, x).mean(-1)
    return nll.where(mask, 0.0).sum() / mask.sum()


def save(path, model, meta: dict):
    """Write model.safetensors and model.json into directory `path`. meta: all that acting needs besides the weights.

    Where that can't be written: into a new temporary directory, which the run.UserError names.
    JSON keys: config (ModelConfig), parameters, blake2b (of the weights file), and those of meta, {"tasks": [data.Task as a dict]}.
    """
    weights = safetensors.torch.save({n: p.detach().cpu().contiguous() for n, p in model.named_parameters()})
    meta = {"config": dataclasses.asdict(model.cfg), "parameters": model.n_params, "blake2b": hashlib.blake2b(weights).hexdigest(), **meta}
    files = {"model.safetensors": weights, "model.json": json.dumps(meta, indent=1).encode()}
    try:
        for name, blob in files.items():
            run.write(Path(path) / name, blob)
    except run.UserError as e:  # hours of training are not thrown away for want of a place
        elsewhere = Path(tempfile.mkdtemp(prefix="manyteachers-"))
        for name, blob in files.items():
            run.write(elsewhere / name, blob)
        raise run.UserError(f"{e}; what could not be written there is in {elsewhere}") from None


def load(path, device="cpu"):
    """Read what `save` wrote: (model in eval mode, meta). Raises run.UserError where it is missing or damaged."""
    path = Path(path)
    try:
        for name, limit in (("model.json", 2**24), ("model.safetensors", 2**30)):  # what a thousand tasks need; ten times the largest of this kind of model
            if (path / name).stat().st_size > limit:
                raise ValueError(f"{name} is larger than {limit:,} bytes")
        meta = json.loads((path / "model.json").read_bytes())
        weights = (path / "model.safetensors").read_bytes()
    except FileNotFoundError:
        raise run.UserError(f"no model in {path}; train one: python teacher.py --env hopper") from None
    except (OSError, ValueError, RecursionError) as e:
        raise run.UserError(f"can't read the model in {path} ({e}); train it again") from None
    try:
        if hashlib.blake2b(weights).hexdigest() != meta["blake2b"]:
            raise ValueError("model.safetensors is not the file that model.json was written for")
        weights = safetensors.torch.load(weights)
        cfg = ModelConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in meta["config"].items()})
        if len(cfg.discrete) != len(cfg.act_dims) or not all(type(d) is bool for d in cfg.discrete):
            raise ValueError(f"discrete {cfg.discrete} of {len(cfg.act_dims)} tasks")
        sizes = (*cfg.obs_dims, *cfg.act_dims, cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.context)
        if (not all(type(n) is int and n > 0 for n in sizes) or cfg.n_embd % cfg.n_head or cfg.n_layer > len(weights)
                or cfg.context > MAX_CONTEXT or not 0 <= cfg.dropout < 1):  # fmt: skip
            raise ValueError(f"sizes that no model has: {meta['config']}")
        N, C = len(cfg.obs_dims), cfg.n_embd
        large = {"embed_state.weight": (N, max(cfg.obs_dims), C), "embed_action.weight": (N, max(cfg.act_dims), C), "embed_place.weight": (cfg.context, C),
                 **{f"blocks.{i}.fc.weight": (4 * C, C) for i in range(cfg.n_layer)}}  # fmt: skip
        if any(weights[k].shape != size for k, size in large.items()):  # before memory is taken for what model.json asks for
            raise ValueError("the weights are not those of a model of the sizes that model.json gives")
        if not all(w.dtype == torch.float32 and w.isfinite().all() for w in weights.values()):
            raise ValueError("weights that are not finite float32 numbers")
        model = DecisionTransformer(cfg)
        model.load_state_dict(weights)
    except Exception as e:  # a damaged file can fail in any of these steps, each with its own exception
        raise run.UserError(f"the model in {path} is damaged ({(str(e).splitlines() or [type(e).__name__])[0][:200]}); train it again") from None
    return model.to(device).eval(), meta

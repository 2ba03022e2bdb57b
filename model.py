"""Decision Transformer (Chen et al. 2021, arXiv 2106.01345) with a Gaussian head: one class for teacher and student.

Notation, the same in every file:
    B windows, K timesteps of context, T = 3K tokens (R, s, a), C channels, nh heads, hs = C / nh
    N tasks, O and A observation and action dimension, P parameters
    rtg      return-to-go, divided by the task's rtg_scale
    states   normalised with the task's obs_mean and obs_std; actions scaled to [-1, 1]
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
from kernels.kl import bounded

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
        """The policy at every timestep, from what came before its action: mean, log_std, each (B, K, A); hidden: what its head reads, (B, K, C).

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
        """mean, log_std, each (B, K, A), of hidden states x (B, K, C)."""
        mean, log_std = self.head(x, task).chunk(2, dim=-1)
        if isinstance(task, int):
            mean, log_std = mean[..., : self.cfg.act_dims[task]], log_std[..., : self.cfg.act_dims[task]]
        return mean.tanh(), bounded(log_std)

    @property
    def n_params(self):
        return sum(p.numel() for p in self.parameters())


class Actor:
    """A model acting in E episodes of one task that began together: act() once a timestep.

    A step computes its three newest tokens alone, a_{t-1}, R_t and s_t, against kept keys and values of those before. What tokens turn into depends on where
    their window begins, so keys can't slide with it: there are two windows, every H = K // 2 timesteps the older one begins anew, and the other acts, on the
    last H + 1 to 2H timesteps (or all there are), as forward() does on a window that begins there. Both are one batch of six tokens, told apart by the mask.
    At batch 1 all is overhead: so the weights are laid out once, LayerNorms' own multiplied into the products that read them.
    """

    @torch.no_grad()
    def __init__(self, model, task: int, episodes: int, max_steps: int):
        self.cfg, self.t = model.cfg, 0
        K, C, A, O, nh = self.cfg.context, self.cfg.n_embd, self.cfg.act_dims[task], self.cfg.obs_dims[task], self.cfg.n_head
        dev, H = model.embed_place.weight.device, max(1, K // 2)

        def folded(weight, bias, norm=None):  # (in, out), (out,)
            return (weight.contiguous(), bias) if norm is None else (norm.weight[:, None] * weight, bias + norm.bias @ weight)

        embed = model.embed_action, model.embed_rtg, model.embed_state
        self.embed = torch.block_diag(*(e.weight[task, :d] for e, d in zip(embed, (A, 1, O), strict=True)))  # (A + 1 + O, 3C)
        self.ln_in = model.ln_in.weight, model.ln_in.bias
        self.blocks = [(*folded(b.qkv.weight.T, b.qkv.bias, b.ln1), *folded(b.proj.weight.T, b.proj.bias),
                        *folded(b.fc.weight.T, b.fc.bias, b.ln2), *folded(b.out.weight.T, b.out.bias)) for b in model.blocks]  # fmt: skip
        self.head = folded(model.head.weight[task, :, :A], model.head.bias[task, :A], model.ln_out)

        # what depends on time alone: the steps' embeddings, and of every phase of the two windows (first H, then 2H that repeat) places, rows, masks
        steps = (torch.arange(max(K, max_steps), device=dev)[:, None] - torch.tensor([1, 0, 0], device=dev)).clamp_min(0)  # of a_{t-1}, R_t, s_t
        place = model.embed_place.weight[steps[:K]].flatten(1)  # (K, 3C)
        self.time = (model.embed_time(waves(steps.to(place.dtype))) + torch.stack([e.bias[task] for e in embed])).flatten(1)  # (max_steps, 3C)
        # a window's rows: 3p + 1 for R, 3p + 2 for s, 3p + 3 for a of its timestep p; row 0 for what would be the action before its first, seen by nothing else
        n = 3 * K + 1
        seen = torch.ones(n, n, dtype=torch.bool, device=dev).tril()
        seen[1:, 0] = False
        self.phases = []
        for t in range(3 * H):
            p = (t, t) if t < H else (t % (2 * H), (t - H) % (2 * H)) if K > 1 else (0, 0)
            rows = torch.cat([i * n + 3 * q + torch.arange(3, device=dev) for i, q in enumerate(p)])
            mask = place.new_full((6, 2 * n), -torch.inf)
            for i, q in enumerate(p):
                mask[3 * i : 3 * i + 3, i * n : i * n + n].masked_fill_(seen[3 * q : 3 * q + 3], 0.0)
            self.phases.append((place[list(p)], rows, mask[None, None], 2 + 3 * (p[1] > p[0])))
        self.caches = [place.new_zeros(2, episodes, nh, 2 * n, C // nh) for _ in self.blocks]  # keys and values

    @torch.inference_mode()
    def act(self, states, rtg, actions):
        """This timestep's mean actions (E, A), from states (E, O), rtg (E,), and the actions (E, A) of the last one (any, before the first)."""
        E, C, nh, H = len(states), self.cfg.n_embd, self.cfg.n_head, len(self.phases) // 3
        place, rows, mask, newest = self.phases[self.t if self.t < H else H + (self.t - H) % (2 * H)]
        x = torch.addmm(self.time[self.t], torch.cat((actions, rtg[:, None], states), 1), self.embed)  # (E, 3C)
        x = torch.layer_norm((x[:, None] + place).view(6 * E, C), (C,), *self.ln_in)
        for cache, (qkv_w, qkv_b, proj_w, proj_b, fc_w, fc_b, out_w, out_b) in zip(self.caches, self.blocks, strict=True):
            qkv = torch.addmm(qkv_b, torch.layer_norm(x, (C,)), qkv_w).view(E, 6, 3, nh, -1).permute(2, 0, 3, 1, 4)  # (3, E, nh, 6, hs)
            cache.index_copy_(3, rows, qkv[1:])
            q, (k, v) = qkv[0], cache
            if cache is self.caches[-1]:  # only the acting window's state is read
                x, q, mask = x.view(E, 6, C)[:, newest], q[:, :, newest, None], mask[:, :, newest, None]
            y = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(-1, C)
            x = x + torch.addmm(proj_b, y, proj_w)
            x = x + torch.addmm(out_b, torch.addmm(fc_b, torch.layer_norm(x, (C,)), fc_w).relu_(), out_w)
        self.t += 1
        return torch.addmm(self.head[1], torch.layer_norm(x, (C,)), self.head[0]).tanh()

    def keep(self, rows):
        """Go on with these episodes alone; rows: indices (E',) or bools (E,)."""
        self.caches = [c[:, rows] for c in self.caches]


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


def gaussian_nll(mean, log_std, x, mask=None):
    """Negative log-likelihood in nats; mean, log_std, x (B, K, A): of each (B, K, A), or with a mask (B, K), the mean of valid tokens and action dimensions."""
    nll = log_std + 0.5 * ((x - mean) * (-log_std).exp()).square() + 0.9189385332046727  # log(2 pi) / 2
    return nll if mask is None else nll.mean(-1).where(mask, 0.0).sum() / mask.sum()


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

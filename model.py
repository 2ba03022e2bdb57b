"""Decision Transformer (Chen et al. 2021, arXiv 2106.01345) with a Gaussian or categorical head.

One class for teacher and student: a student has several tasks, one trunk, and for each task its own input
embeddings and head, or shares them among the tasks of a group, told apart by an embedding of the task. Used
by teacher.py, distill.py and all that act with a saved model.

Notation, the same in every file:
    B windows, K timesteps of context, T tokens: 3K (R, s, a) or K; C channels, nh heads, hs = C / nh
    N tasks, in G groups; O and A observation and action dimension, P parameters
    rtg      return-to-go, divided by the task's rtg_scale
    states   normalised with the task's obs_mean and obs_std
    actions  scaled to [-1, 1]; discrete ones one-hot: A is the number of choices, of all factors
    mask     (B, K) bool, True where there is a timestep, False where a window begins before its episode
    pixels   (B, K, P) uint8, of tasks whose observations have images (support/spaces.py)
"""

import dataclasses
import hashlib
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import attention, dropout_factors
from kernels.kl import bounded, own_map, policies
from support import UserError, files, reason
from support.spaces import MIN_SIDE

MAX_CONTEXT = 1024  # timesteps; what acting keeps grows with the square
N_FREQUENCIES = 16  # that timesteps are embedded by


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    obs_dims: tuple[int, ...]  # O of each task
    act_dims: tuple[int, ...]  # A of each task
    n_layer: int = 3
    n_head: int = 1
    n_embd: int = 128  # C
    context: int = 20  # K
    tokens: int = 3  # of a timestep: 3, Chen et al.'s R_t, s_t and a_t; or 1, the sum of R_t, s_t and a_{t-1}
    dropout: float = 0.0
    discrete: tuple[bool, ...] = ()  # whether each task's actions are; none given: no task's are
    # how many choices each factor of a task's discrete actions has; none given: there is one factor
    factors: tuple[tuple[int, ...], ...] = ()
    # of each task, 0 to G - 1: one has one embedding and one head; none given: N
    groups: tuple[int, ...] = ()
    # of each task: (channels, height, width), or (): its observations have none; none given: no task's have
    images: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self):
        discrete = self.discrete or (False,) * len(self.act_dims)
        one_factor = tuple((A,) if d else () for A, d in zip(self.act_dims, discrete, strict=False))
        object.__setattr__(self, "discrete", discrete)
        object.__setattr__(self, "factors", self.factors or one_factor)
        object.__setattr__(self, "groups", self.groups or tuple(range(len(self.act_dims))))
        object.__setattr__(self, "images", self.images or ((),) * len(self.act_dims))

    @property
    def shares(self) -> bool:
        """Whether some group has more than one task."""
        return len(set(self.groups)) < len(self.groups)

    @property
    def distinct_images(self) -> list[tuple[int, ...]]:
        """Those of all tasks, each once: there is an encoder for each."""
        return sorted({*self.images} - {()})

    @classmethod
    def of(cls, tasks: list, **sizes: Any) -> "ModelConfig":
        """For these data.Tasks."""
        obs_dims = tuple(t.obs_dim for t in tasks)
        act_dims = tuple(t.act_dim for t in tasks)
        discrete = tuple(t.discrete for t in tasks)
        factors = tuple(tuple(t.choices) for t in tasks)
        images = tuple(t.image for t in tasks)
        return cls(obs_dims, act_dims, discrete=discrete, factors=factors, images=images, **sizes)

    def categorical(self, device: torch.device | str | None = None) -> Tensor | None:
        """`factors` as kernels/kl.py takes them, (F, N, A) bool; None where no task has any."""
        if not any(self.discrete):
            return None
        columns = torch.zeros(max(map(len, self.factors)), len(self.act_dims), max(self.act_dims), dtype=bool)
        for task, sizes in enumerate(self.factors):
            for f, n in enumerate(sizes):
                first = sum(sizes[:f])
                columns[f, task, first : first + n] = True
        return columns.to(device)


# ---- layers ------------------------------------------------------------------------------------------------


def dropout(x: Tensor, p: float) -> Tensor:
    """F.dropout in training, with a CPU's masks from cheaper random bits."""
    if p == 0:
        return x
    return F.dropout(x, p) if x.is_cuda else x * dropout_factors(x.shape, p, x)


class Linear(nn.Linear):
    """In the precision of x, whatever the weights are kept in."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    """Likewise."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Block(nn.Module):
    """Pre-norm transformer block (GPT-2's)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        C = cfg.n_embd
        self.n_head = cfg.n_head
        self.dropout = cfg.dropout
        self.ln1 = LayerNorm(C)
        self.ln2 = LayerNorm(C)
        self.qkv = Linear(C, 3 * C)
        self.proj = Linear(C, C)
        self.fc = Linear(C, 4 * C)
        self.out = Linear(4 * C, C)

    def forward(self, x: Tensor, mask: Tensor, query: slice = slice(None)) -> Tensor:
        """x (B, T, C), mask (B, T) -> (B, T', C), the outputs of the tokens x[:, query]."""
        p = self.dropout if self.training else 0.0
        y = attention(self.qkv(self.ln1(x)), mask, self.n_head, p, query)
        x = x[:, query] + dropout(self.proj(y), p)
        return x + dropout(self.out(F.relu(self.fc(self.ln2(x)))), p)


class Heads(nn.Module):
    """One affine map per group of tasks, padded to the widest task: each window goes through its group's."""

    def __init__(self, n_groups: int, d_in: int, d_out: int, std: float):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_groups, d_in, d_out) * std)
        # the bias is not zero: LayerNorm would leave only the sign of a return-to-go
        self.bias = nn.Parameter(torch.randn(n_groups, d_out) * std)

    def forward(self, x: Tensor, group: int | Tensor) -> Tensor:
        """x (B, K, in) -> (B, K, out). group: an int, or one index per window (B,)."""
        if isinstance(group, int):
            return x @ self.weight[group, : x.shape[-1]] + self.bias[group]
        return own_map(x, self.weight, self.bias, group)


class Encoder(nn.Module):
    """Images to C features each: Mnih et al. 2015's convolutions (doi.org/10.1038/nature14236), a linear map.

    Theirs have 32, 64, 64 channels, here C / 4, C / 2, C / 2. What a ReLU reads is normalised; weights have
    a block's scale, their inputs the factor that is missing (Karras et al. 2018, arXiv 1710.10196, section
    4.1). Without these, a student's learning rate killed all ReLUs of a student of Pong and Breakout.
    """

    def __init__(self, image: tuple[int, int, int], C: int):
        super().__init__()
        self.image = image
        sizes = self.sizes(image, C)
        self.scales = [(C / math.prod(s[1:])) ** 0.5 for s in sizes]
        self.weights = nn.ParameterList(torch.randn(s) * C**-0.5 for s in sizes)
        self.biases = nn.ParameterList(torch.zeros(s[0]) for s in sizes)

    @staticmethod
    def sizes(image: tuple[int, int, int], C: int) -> list[tuple[int, ...]]:
        """Of the four weights."""
        c, H, W = image
        a = max(1, C // 4)
        b = max(1, C // 2)
        h, w = ((side // 4 - 1) // 2 - 3 for side in (H, W))  # of what the convolutions leave
        return [(a, c, 8, 8), (b, a, 4, 4), (b, b, 3, 3), (C, b * h * w)]

    def forward(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """pixels (B, K, P), padded to the largest image -> (B, K, C), computed in dtype."""
        x = pixels[..., : math.prod(self.image)].reshape(-1, *self.image).to(dtype) / 255
        layers = [(w.to(dtype), b.to(dtype)) for w, b in zip(self.weights, self.biases, strict=True)]
        for layer, scale, stride in zip(layers[:3], self.scales[:3], (4, 2, 1), strict=True):
            x = F.group_norm(F.conv2d(scale * x, *layer, stride), 1).relu()
        x = F.group_norm(F.linear(self.scales[3] * x.flatten(1), *layers[3]), 1).relu()
        return x.unflatten(0, pixels.shape[:2])


def waves(timesteps: Tensor) -> Tensor:
    """(B, K) -> (B, K, 2 N_FREQUENCIES): sines and cosines of 1/20 to 1/20,000 radian per timestep.

    After Vaswani et al. 2017, arXiv 1706.03762, section 3.5. Not a learnt row for each timestep, as Chen et
    al. have it: of a thousand rows each sees little of a short training, and they would be half of a small
    student. And no faster waves: with so fine a clock, the first steps of episodes that begin alike can be
    acted by heart.
    """
    exponents = torch.linspace(0, 1, N_FREQUENCIES, dtype=timesteps.dtype, device=timesteps.device)
    x = timesteps[..., None] * (1000.0**-exponents / 20)
    return torch.cat((x.sin(), x.cos()), dim=-1)


# ---- the model ---------------------------------------------------------------------------------------------


class DecisionTransformer(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.bfloat16 = False  # the blocks' products in training; embeddings, head and acting stay in float32
        G = len(set(cfg.groups))
        C = cfg.n_embd
        O = max(cfg.obs_dims)
        A = max(cfg.act_dims)
        self.register_buffer("groups", torch.tensor(cfg.groups), persistent=False)  # (N,)
        self.encoders = nn.ModuleList(Encoder(image, C) for image in cfg.distinct_images)
        self.n_features = C if self.encoders else 0  # of an image, which stand before a state's numbers
        self.embed_state = Heads(G, self.n_features + O, C, (self.n_features + O) ** -0.5)
        self.embed_action = Heads(G, A, C, A**-0.5)
        self.embed_rtg = Heads(G, 1, C, 1.0)
        if cfg.shares:
            self.embed_task = nn.Embedding(len(cfg.groups), C)
        self.embed_time = nn.Linear(2 * N_FREQUENCIES, C)
        self.embed_place = nn.Embedding(cfg.context, C)  # in the window, its first valid timestep first
        self.ln_in = nn.LayerNorm(C)
        self.ln_out = nn.LayerNorm(C)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.head = Heads(G, C, 2 * A, 0.02)
        self._initialise()

    def _initialise(self):
        """Unit scale through every product, and at the start of the residual stream."""
        for name, p in self.blocks.named_parameters():
            if p.dim() == 2:
                into_residual = "proj" in name or "out" in name
                scale = (2 * self.cfg.n_layer) ** -0.5 if into_residual else 1.0
                nn.init.normal_(p, std=p.shape[1] ** -0.5 * scale)
            elif "bias" in name:
                nn.init.zeros_(p)
        nn.init.normal_(self.embed_place.weight, std=0.2)

    def forward(
        self,
        task: int | Tensor,
        states: Tensor,
        actions: Tensor,
        rtg: Tensor,
        timesteps: Tensor,
        mask: Tensor,
        pixels: Tensor | None = None,
        hidden: bool = False,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """The policy at every timestep, from what came before its action: mean and log_std, each (B, K, A).

        Of discrete actions: their log-probabilities, and zeros. hidden: what the head reads instead, (B, K,
        C). task: an int, and states (B, K, O_task), actions (B, K, A_task); or one index per window (B,), and
        states and actions padded to the widest task's sizes, as then are the outputs. rtg (B, K), timesteps
        (B, K) integers, mask (B, K) bool.
        """
        x, token_mask = self._embed(task, states, actions, rtg, timesteps, mask, pixels)
        # they have seen R_t and s_t, not a_t
        state_tokens = slice(1, None, 3) if self.cfg.tokens == 3 else slice(None)
        if self.bfloat16 and self.training:
            x = x.bfloat16()
        for block in self.blocks[:-1]:
            x = block(x, token_mask)
        x = self.blocks[-1](x, token_mask, state_tokens)  # (B, K, C)
        x = self.ln_out(x.to(rtg.dtype))
        return x if hidden else self.policy(x, task)

    def _embed(self, task, states, actions, rtg, timesteps, mask, pixels):
        """Tokens (B, T, C) and which of them are valid, (B, T)."""
        B, K = mask.shape
        # what is masked must not matter, not even as NaN times zero in a gradient: cleared before anything is
        # computed
        states = states.masked_fill(~mask[..., None], 0.0)
        actions = actions.masked_fill(~mask[..., None], 0.0)
        rtg = rtg.masked_fill(~mask, 0.0)
        timesteps = timesteps.masked_fill(~mask, 0)
        place = (mask.cumsum(1) - 1).clamp_min(0)
        t = self.embed_time(waves(timesteps.to(rtg.dtype))) + self.embed_place(place)
        if self.cfg.shares:
            t = t + self.embed_task.weight[task].view(-1, 1, self.cfg.n_embd)
        group = self._group(task)
        r = self.embed_rtg(rtg[..., None], group)
        s = self.embed_state(self._with_features(states, pixels, task), group)
        if self.cfg.tokens == 3:
            a = self.embed_action(actions, group)
            x = torch.stack((r + t, s + t, a + t), dim=2).view(B, 3 * K, -1)  # (B, K, 3, C) -> (B, 3K, C)
            mask = mask.repeat_interleave(3, dim=1)
        else:
            previous = F.pad(actions, (0, 0, 1, 0))[:, :-1]  # a_{t-1}; zeros at a window's first timestep
            x = r + s + self.embed_action(previous, group) + t
        return dropout(self.ln_in(x), self.cfg.dropout if self.training else 0.0), mask

    def _group(self, task):
        """Of a task, or of each window's."""
        return self.cfg.groups[task] if isinstance(task, int) else self.groups[task]

    def _with_features(self, states, pixels, task):
        """states (B, K, O) behind the features of their images, zeros where a task has none: (B, K, C + O).

        Of a model without images: states.
        """
        if not self.encoders:
            return states
        dtype = torch.bfloat16 if self.bfloat16 and self.training else states.dtype
        images = self.cfg.images if isinstance(task, Tensor) else self.cfg.images[task : task + 1]
        features = states.new_zeros(*states.shape[:2], self.n_features)
        for encoder in self.encoders:
            has = [image == encoder.image for image in images]
            if all(has):
                features = encoder(pixels, dtype).to(states.dtype)
            elif any(has):
                own = torch.tensor(has, device=task.device)[task].nonzero().flatten()  # windows
                features = features.index_copy(0, own, encoder(pixels[own], dtype).to(states.dtype))
        return torch.cat((features, states), -1)

    def policy(self, x: Tensor, task: int | Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` returns, of hidden states x (B, K, C)."""
        x = self.head(x, self._group(task))
        cfg = self.cfg
        if not isinstance(task, int):
            return policies(x, task, cfg.categorical(x.device))
        mean, log_std = (y[..., : cfg.act_dims[task]] for y in x.chunk(2, dim=-1))
        if cfg.discrete[task]:
            return log_softmax(mean, cfg.factors[task]), torch.zeros_like(mean)
        return mean.tanh(), bounded(log_std)

    @property
    def n_params(self) -> int:
        return sum(p.numel() for p in self.parameters())


# a block's matrices, by groups of one shape: q, k and v lie one below the other in qkv
MATRICES = {"qkv": 1, "proj": 1, "fc": 2, "out": 3}


def flat_order(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by name, in the order of the flat vectors: the blocks' matrices last, group by group.

    Behind them those of images' encoders, in their order.
    """

    def group(name: str) -> int:
        layer, kind = name.split(".")[-2:] if "." in name else ("", name)
        if layer == "weights":
            return 4
        return MATRICES.get(layer, 0) if kind == "weight" else 0

    return dict(sorted(model.named_parameters(), key=lambda item: group(item[0])))


def flatten(model: nn.Module) -> nn.Parameter:
    """Move all parameters into one flat buffer, their gradients into another: theta (P,) with theta.grad
    (P,).

    Each parameter becomes a view, so that surgery, clipping and the optimiser are single vector operations.
    """
    parameters = list(flat_order(model).values())
    theta = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in parameters]))
    theta.grad = torch.zeros_like(theta)
    values = unflatten(model, theta.data).values()
    gradients = unflatten(model, theta.grad).values()
    for p, value, gradient in zip(parameters, values, gradients, strict=True):
        p.data = value
        p.grad = gradient
    return theta


def unflatten(model: nn.Module, theta: Tensor) -> dict[str, Tensor]:
    """theta (P,) -> {parameter name: view of its shape}, the inverse of flatten's concatenation."""
    shapes = {name: p.shape for name, p in flat_order(model).items()}
    pieces = theta.split([shape.numel() for shape in shapes.values()])
    return {name: x.view(shape) for (name, shape), x in zip(shapes.items(), pieces, strict=True)}


def gaussian_nll(mean: Tensor, log_std: Tensor, x: Tensor) -> Tensor:
    """Negative log-likelihood of x in nats, elementwise: all (B, K, A)."""
    return log_std + 0.5 * ((x - mean) * (-log_std).exp()).square() + 0.5 * math.log(2 * math.pi)


def mean_nll(mean: Tensor, log_std: Tensor, x: Tensor, mask: Tensor, factors: Sequence[int] = ()) -> Tensor:
    """Negative log-likelihood of a task's actions x (B, K, A), in nats.

    The mean of valid timesteps, mask (B, K), and of action dimensions. factors: the task's; each of them is
    one dimension.
    """
    nll = -(x * mean).sum(-1) / len(factors) if factors else gaussian_nll(mean, log_std, x).mean(-1)
    return nll.where(mask, 0.0).sum() / mask.sum()


def log_softmax(logits: Tensor, factors: Sequence[int]) -> Tensor:
    """Log-probabilities (..., A) of a task's logits (..., A), each factor's on their own."""
    return torch.cat([x.log_softmax(-1) for x in logits.split(list(factors), -1)], -1)


def likeliest(x: Tensor, factors: Sequence[int]) -> Tensor:
    """The choice of the largest x in each factor, from 0: (B, A) -> (B, F) int64."""
    return torch.stack([choices.argmax(1) for choices in x.split(list(factors), 1)], 1)


def one_hot(choices: Tensor, factors: Sequence[int]) -> Tensor:
    """The inverse: (B, F) int64 -> (B, A) int64."""
    return torch.cat([F.one_hot(x, n) for x, n in zip(choices.unbind(1), factors, strict=True)], 1)


# ---- files -------------------------------------------------------------------------------------------------

MAX_BYTES = {
    "model.json": 2**24,
    "model.safetensors": 2**30,
}  # a thousand tasks; ten times the largest such model


def save(path: Path | str, model: DecisionTransformer, meta: dict[str, Any]) -> None:
    """Write model.safetensors and model.json into directory `path`. meta: all that acting needs besides the
    weights.

    JSON keys: config (ModelConfig), parameters, blake2b (of the weights file), and those of meta, {"tasks":
    [data.Task as a dict]}. Where that can't be written: into a new temporary directory, which the UserError
    names.
    """
    weights = safetensors.torch.save({n: p.detach().cpu().contiguous() for n, p in model.named_parameters()})
    meta = {
        "config": dataclasses.asdict(model.cfg),
        "parameters": model.n_params,
        "blake2b": hashlib.blake2b(weights).hexdigest(),
        **meta,
    }
    blobs = {"model.safetensors": weights, "model.json": json.dumps(meta, indent=1).encode()}
    try:
        for name, blob in blobs.items():
            files.write(Path(path) / name, blob)
    except UserError as e:  # hours of training are not thrown away for want of a place
        elsewhere = Path(tempfile.mkdtemp(prefix="manyteachers-"))
        for name, blob in blobs.items():
            files.write(elsewhere / name, blob)
        raise UserError(f"{e}; what could not be written there is in {elsewhere}") from None


def load(path: Path | str, device: torch.device | str = "cpu") -> tuple[DecisionTransformer, dict[str, Any]]:
    """Read what `save` wrote: (model in eval mode, meta). Raises UserError where it is missing or damaged."""
    path = Path(path)
    try:
        for name, limit in MAX_BYTES.items():
            if (path / name).stat().st_size > limit:
                raise ValueError(f"{name} is larger than {limit:,} bytes")
        meta = json.loads((path / "model.json").read_bytes())
        blob = (path / "model.safetensors").read_bytes()
    except FileNotFoundError:
        raise UserError(f"no model in {path}; train one: python teacher.py --env hopper") from None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"can't read the model in {path} ({e}); train it again") from None
    try:
        if hashlib.blake2b(blob).hexdigest() != meta["blake2b"]:
            raise ValueError("model.safetensors is not the file that model.json was written for")
        weights = safetensors.torch.load(blob)
        _check_layout(path, meta["config"])
        cfg = ModelConfig(**{name: _tuples(value) for name, value in meta["config"].items()})
        _check_sizes(cfg, meta["config"], weights)
        model = DecisionTransformer(cfg)
        model.load_state_dict(weights)
    except UserError:
        raise
    except Exception as e:  # noqa: BLE001 - a damaged file can fail in any of these steps
        raise UserError(f"the model in {path} is damaged ({reason(e)}); train it again") from None
    return model.to(device).eval(), meta


def _tuples(x):
    """JSON's lists as tuples."""
    return tuple(map(_tuples, x)) if isinstance(x, list) else x


def _check_layout(path, config):
    """Raise UserError where model.json gives a model that this version does not know."""
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    unknown = {k: v for k, v in config.items() if k not in known or (k == "tokens" and v not in (1, 3))}
    if unknown:
        raise UserError(
            f"the model in {path} is of another layout ({unknown}); load it with the version that wrote it"
        )


def _check_sizes(cfg, given, weights):
    """Raise ValueError where sizes can't be, or differ from the weights': before memory is taken for them."""
    if len(cfg.discrete) != len(cfg.act_dims) or not all(type(d) is bool for d in cfg.discrete):
        raise ValueError(f"discrete {cfg.discrete} of {len(cfg.act_dims)} tasks")
    for discrete, A, sizes in zip(cfg.discrete, cfg.act_dims, cfg.factors, strict=True):
        whole = all(type(n) is int and n > 0 for n in sizes)
        if not whole or sum(sizes) != (A if discrete else 0):
            raise ValueError(f"{A} columns of discrete actions, in factors of {sizes}")
    sizes = (*cfg.act_dims, cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.context, *sum(cfg.images, ()))
    possible = all(type(n) is int and n > 0 for n in sizes) and cfg.n_embd % cfg.n_head == 0
    possible = possible and all(type(O) is int and O >= 0 for O in cfg.obs_dims)
    possible = possible and len(cfg.images) == len(cfg.obs_dims) == len(cfg.act_dims)
    for O, image in zip(cfg.obs_dims, cfg.images, strict=True):
        possible = possible and (O > 0 if image == () else len(image) == 3 and min(image[1:]) >= MIN_SIDE)
    possible = (
        possible and cfg.n_layer <= len(weights) and cfg.context <= MAX_CONTEXT and 0 <= cfg.dropout < 1
    )
    if not possible:
        raise ValueError(f"sizes that no model has: {given}")
    _check_groups(cfg)
    G = len(set(cfg.groups))
    C = cfg.n_embd
    n_features = C if any(cfg.images) else 0
    shapes = {
        "embed_state.weight": (G, n_features + max(cfg.obs_dims), C),
        "embed_action.weight": (G, max(cfg.act_dims), C),
        "embed_place.weight": (cfg.context, C),
    }
    if cfg.shares:
        shapes["embed_task.weight"] = (len(cfg.groups), C)
    shapes |= {f"blocks.{i}.fc.weight": (4 * C, C) for i in range(cfg.n_layer)}
    for i, image in enumerate(cfg.distinct_images):
        sizes = Encoder.sizes(image, C)
        shapes |= {f"encoders.{i}.weights.{j}": shape for j, shape in enumerate(sizes)}
    if any(weights[name].shape != shape for name, shape in shapes.items()):
        raise ValueError("the weights are not those of a model of the sizes that model.json gives")
    if not all(w.dtype == torch.float32 and w.isfinite().all() for w in weights.values()):
        raise ValueError("weights that are not finite float32 numbers")


def _check_groups(cfg):
    """Raise ValueError where groups are not 0 to G - 1, or hold tasks of different spaces."""
    spaces = (cfg.obs_dims, cfg.act_dims, cfg.factors, cfg.images)
    distinct = set(zip(cfg.groups, *spaces, strict=True))
    G = len(set(cfg.groups))
    if {type(g) for g in cfg.groups} != {int} or set(cfg.groups) != set(range(G)) or len(distinct) > G:
        raise ValueError(f"groups {cfg.groups} of tasks of sizes {spaces}")

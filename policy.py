"""Acting with a saved model, one episode or many at once. Used by evaluate.py and export.py.

    policy = Policy("out/student")
    policy.reset("hopper", target_return=3000)
    action = policy.act(observation)          # then, until the episode ends, policy.act(observation, reward)

Observations of other spaces than a Box are vectors (support/spaces.py), which
evaluate.make_env(task) gives: of images, behind an observation's numbers, the pixels.

A batch of episodes, here in environments that reset themselves in the step that ends an episode:

    mode = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    envs = gymnasium.make_vec("Hopper-v5", 16, "sync", vector_kwargs=mode)
    observations, _ = envs.reset()
    rewards = np.zeros(16)
    ended = np.zeros(16, bool)
    policy.reset("hopper", episodes=16)
    while ...:
        actions = policy.act(observations, rewards, began=ended)
        observations, rewards, terminated, truncated, _ = envs.step(actions)
        ended = terminated | truncated        # then `observations` holds the next episode's first
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

import data
import model as dt
from support import UserError

# ---- weights and phases ----------------------------------------------------------------------------------


class BlockWeights(NamedTuple):
    """A block's weights (in, out) and biases (out,), for torch.addmm, with LayerNorms folded in."""

    qkv: Tensor
    qkv_bias: Tensor
    proj: Tensor
    proj_bias: Tensor
    fc: Tensor
    fc_bias: Tensor
    out: Tensor
    out_bias: Tensor

    @classmethod
    def of(cls, block: dt.Block) -> "BlockWeights":
        qkv, qkv_bias = _fold(block.qkv.weight.T, block.qkv.bias, block.ln1)
        proj = block.proj.weight.T.contiguous()
        fc, fc_bias = _fold(block.fc.weight.T, block.fc.bias, block.ln2)
        out = block.out.weight.T.contiguous()
        return cls(qkv, qkv_bias, proj, block.proj.bias, fc, fc_bias, out, block.out.bias)


def _fold(weight, bias, norm):
    """weight (in, out) and bias (out,) with the scale and shift of `norm`, whose outputs they read."""
    return norm.weight[:, None] * weight, bias + norm.bias @ weight


class Phase(NamedTuple):
    """Where a timestep falls in the two windows (see Actor), if it is the same one in all episodes."""

    place: Tensor  # (2, nC) place embeddings of its n tokens in both windows
    begins: Tensor  # (2, 1) 1 where a window begins: the action before is outside of it; else 0
    rows: Tensor  # (2n,) of the cache, for the keys and values of its tokens
    mask: Tensor  # (1, 1, 2n, cache rows) added to attention's logits: 0 where a token sees a row, else -inf
    acting: int  # which of the 2n tokens acts: the last of the older window

    def write(self, cache: Tensor, keys_values: Tensor) -> Tensor:
        """The cache (E, 2, nh, rows, hs) with keys_values (E, 2, nh, 2n, hs) in their rows."""
        return cache.index_copy_(3, self.rows, keys_values)

    def select(self, x: Tensor) -> Tensor:
        """Of the 2n tokens x (E, 2n, C) the one that acts, (E, C)."""
        return x[:, self.acting]


class PhasePerEpisode(NamedTuple):
    """The same, where episodes are at timesteps of their own.

    index_copy_ takes one index for all episodes; so rows are one-hot here, and written by a product.
    """

    place: Tensor  # (E, 2, nC)
    begins: Tensor  # (E, 2, 1)
    rows: Tensor  # (E, 1, 1, cache rows, 2n) one-hot
    mask: Tensor  # (E, 1, 2n, cache rows)
    acting: Tensor  # (E, 1, 2n) one-hot
    others: Tensor  # (E, 1, 1, cache rows, 1) 0 for these rows, 1 for all others

    def write(self, cache: Tensor, keys_values: Tensor) -> Tensor:
        return cache * self.others + self.rows @ keys_values

    def select(self, x: Tensor) -> Tensor:
        return (self.acting @ x).squeeze(1)


def _phases(place, H, n):
    """The 3H phases, in their order, from the place embeddings (K, nC)."""
    K = len(place)
    # a window's cache rows: those of its place p begin at n p, for a_{t-1}, R_t and s_t, or for their sum
    sees = torch.ones(n * K, n * K, dtype=torch.bool, device=place.device).tril()
    if n == 3:
        sees[1:, 0] = False  # the action before a window's first timestep is outside of it
    phases = []
    for t in range(3 * H):
        places = (t, t) if t < H else (t % (2 * H), (t - H) % (2 * H))
        if K == 1:
            places = (0, 0)  # both windows begin anew every timestep
        begins = place.new_tensor([[p == 0] for p in places])
        rows = []
        mask = place.new_full((2, n, 2, n * K), -torch.inf)  # window and token, window and row
        for window, p in enumerate(places):
            tokens = n * p + torch.arange(n, device=place.device)
            rows.append(window * n * K + tokens)
            mask[window, :, window].masked_fill_(sees[tokens], 0.0)
        acting = n - 1 + n * int(places[1] > places[0])
        mask = mask.view(1, 1, 2 * n, -1)
        phases.append(Phase(place[list(places)], begins, torch.cat(rows), mask, acting))
    return phases


# ---- acting in the model's units -------------------------------------------------------------------------


class Actor:
    """A model acting in E episodes of one task, with cached keys and values: call `act` once a timestep.

    Tokens. A timestep adds n tokens: a_{t-1}, R_t and s_t, or one that is their sum. Only these are computed;
    they attend to the cached keys and values of the tokens before.

    Windows. A token's hidden states depend on where its window begins, so a cache can't slide along with it.
    There are two windows instead, H = K // 2 timesteps apart. Every H timesteps the older one begins anew,
    and the other, now the older, acts: on the last H + 1 to 2H timesteps, or on all where there are fewer.
    Its output is that of model.forward() on a window that begins there. The tokens of both windows, n + n,
    are one batch; the mask keeps the windows apart.

    Phases. A phase says where a timestep falls in the two windows: its place embeddings, cache rows and mask.
    In the first H phases both windows began with the episode; the next 2H repeat until it ends.

    At batch 1 nearly all time is overhead, so operations are few: weights are laid out once, and what depends
    on the timestep alone is looked up.
    """

    @torch.no_grad()
    def __init__(self, model: dt.DecisionTransformer, task: int, episodes: int, max_steps: int):
        cfg = model.cfg
        K = cfg.context
        C = cfg.n_embd
        A = cfg.act_dims[task]
        O = cfg.obs_dims[task]
        device = model.embed_place.weight.device
        self.cfg = cfg
        self.factors = cfg.factors[task]
        self.t: int | Tensor = 0  # timestep of all episodes; (E,) of each, once one of them began anew

        self.encoder = next((e for e in model.encoders if e.image == cfg.images[task]), None)
        embeddings = (model.embed_action, model.embed_rtg, model.embed_state)
        # a state's numbers stand behind the features of its image: O is then C + O
        first = 0 if self.encoder else model.n_features
        sizes = (slice(A), slice(1), slice(first, model.n_features + O))
        group = cfg.groups[task]
        weights = [e.weight[group, size] for e, size in zip(embeddings, sizes, strict=True)]
        biases = torch.stack([e.bias[group] for e in embeddings])  # (3, C)
        if cfg.tokens == 3:
            self.embed = torch.block_diag(*weights)  # (A + 1 + O, 3C): the three tokens in one product
            self.embed_bias = biases
        else:
            self.embed = torch.cat(weights)  # (A + 1 + O, C)
            self.embed_bias = biases.sum(0, keepdim=True)
        if cfg.shares:
            self.embed_bias = self.embed_bias + model.embed_task.weight[task]
        self.embed_time = model.embed_time
        self.ln_in = (model.ln_in.weight, model.ln_in.bias)
        self.blocks = [BlockWeights.of(block) for block in model.blocks]
        self.head = _fold(model.head.weight[group, :, :A], model.head.bias[group, :A], model.ln_out)

        self.time = self.time_embeddings(torch.arange(max(K, max_steps), device=device))  # (max_steps, nC)
        place = model.embed_place.weight[self._token_timesteps(torch.arange(K, device=device))]
        self.half = max(1, K // 2)  # H
        self.phases = _phases(place.flatten(1), self.half, cfg.tokens)
        rows = self.phases[0].mask.shape[-1]
        shape = (episodes, 2, cfg.n_head, rows, C // cfg.n_head)  # keys and values
        self.caches = [place.new_zeros(shape) for _ in self.blocks]

    def time_embeddings(self, timesteps: Tensor) -> Tensor:
        """(E,) -> (E, nC): what of the tokens' embeddings depends on the timestep alone, and biases."""
        waves = dt.waves(self._token_timesteps(timesteps).to(self.embed_bias.dtype))
        return (self.embed_time(waves) + self.embed_bias).flatten(1)

    def _token_timesteps(self, timesteps):
        """(E,) -> (E, n): the timesteps, or places, of a_{t-1}, R_t and s_t; or of their sum."""
        back = [1, 0, 0] if self.cfg.tokens == 3 else [0]
        return (timesteps[:, None] - torch.tensor(back, device=timesteps.device)).clamp_min(0)

    @torch.inference_mode()
    def act(self, states: Tensor, rtg: Tensor, actions: Tensor, pixels: Tensor | None = None) -> Tensor:
        """The actions (E, A) of this timestep: the policy's means, or one-hot the most likely discrete ones.

        states (E, O), rtg (E,), actions (E, A) of the timestep before; at an episode's first, any. pixels
        (E, P) uint8, where the task has images.
        """
        return self.step(self.time[self.t], states, rtg, actions, pixels)

    def step(
        self, time: Tensor, states: Tensor, rtg: Tensor, actions: Tensor, pixels: Tensor | None = None
    ) -> Tensor:
        """`act` as export.py traces it: with the time embeddings given, (nC,) or (E, nC)."""
        if self.encoder:
            features = self.encoder(pixels[:, None], states.dtype).squeeze(1)
            states = torch.cat((features, states), 1)
        phase = self.phase()
        x = torch.addmm(time, torch.cat((actions, rtg[:, None], states), 1), self.embed)  # (E, nC)
        place = phase.place
        if self.cfg.tokens == 1:  # of three, a mask hides the action before a window
            before = actions @ self.embed[: actions.shape[1]]
            place = place - phase.begins * before[:, None]
        weight, bias = self.head
        x = torch.addmm(bias, self.hidden(x[:, None] + place, phase), weight)  # (E, A)
        if not self.factors:
            return x.tanh()
        return dt.one_hot(dt.likeliest(x, self.factors), self.factors).to(x.dtype)

    def hidden(self, x: Tensor, phase: Phase | PhasePerEpisode) -> Tensor:
        """What the head reads of this timestep, (E, C), from its tokens in both windows, (E, 2, nC)."""
        C = self.cfg.n_embd
        x = torch.layer_norm(x.view(-1, C), (C,), *self.ln_in)  # (2nE, C)
        for i in range(len(self.blocks)):
            x = self._block(i, x, phase)
        self.t = self.t + 1
        return torch.layer_norm(x, (C,))

    def phase(self) -> Phase | PhasePerEpisode:
        """Of this timestep."""
        t = self.t
        H = self.half
        if isinstance(t, int):
            return self.phases[t if t < H else H + (t - H) % (2 * H)]
        index = torch.where(t < H, t, H + (t - H) % (2 * H))
        return PhasePerEpisode(*(table.index_select(0, index) for table in self.phase_tables))

    def _block(self, i, x, phase):
        """The i-th block, x (2nE, C) -> (2nE, C); the last one -> (E, C), the acting tokens alone."""
        C = self.cfg.n_embd
        nh = self.cfg.n_head
        n = self.cfg.tokens
        w = self.blocks[i]
        qkv = torch.addmm(w.qkv_bias, torch.layer_norm(x, (C,)), w.qkv)
        qkv = qkv.view(-1, 2 * n, 3, nh, C // nh).permute(0, 2, 3, 1, 4)  # (E, 3, nh, 2n, hs)
        self.caches[i] = phase.write(self.caches[i], qkv[:, 1:])
        k, v = self.caches[i].unbind(1)  # (E, nh, rows, hs)
        y = F.scaled_dot_product_attention(qkv[:, 0], k, v, phase.mask).transpose(1, 2).reshape(-1, C)
        x = x + torch.addmm(w.proj_bias, y, w.proj)
        if i == len(self.blocks) - 1:
            x = phase.select(x.view(-1, 2 * n, C))
        hidden = torch.addmm(w.fc_bias, torch.layer_norm(x, (C,)), w.fc).relu_()
        return x + torch.addmm(w.out_bias, hidden, w.out)

    def keep(self, rows: Tensor) -> None:
        """Go on with these episodes alone; rows: indices (E',) or bools (E,)."""
        self.caches = [cache[rows] for cache in self.caches]
        if not isinstance(self.t, int):
            self.t = self.t[rows]

    @torch.inference_mode()
    def restart(self, rows: Tensor | slice) -> None:
        """Begin these episodes anew; rows as in `keep`.

        Caches need no clearing: a token's mask ends at its own row, so it sees nothing of the old episode.
        """
        if isinstance(self.t, int):
            episodes = len(self.caches[0])
            self.t = torch.full((episodes,), self.t, device=self.time.device)
            self.phase_tables = self._stacked_phases()
        self.t[rows] = 0

    def _stacked_phases(self):
        """The fields of PhasePerEpisode, to be indexed by phase."""
        place, begins, rows, mask, acting = zip(*self.phases, strict=True)
        device = self.time.device
        every_row = torch.arange(mask[0].shape[-1], device=device)
        rows = (torch.stack(rows)[:, None, None, None] == every_row[:, None]).to(mask[0].dtype)
        acting = F.one_hot(torch.tensor(acting, device=device), 2 * self.cfg.tokens).to(mask[0].dtype)
        others = 1 - rows.sum(-1, keepdim=True)
        return torch.stack(place), torch.stack(begins), rows, torch.cat(mask), acting[:, None], others


# ---- acting in the environment's units -------------------------------------------------------------------


class Policy:
    """A model acting in one of its tasks: by the mean, or by the most likely of discrete actions.

    It keeps the context, normalises, and subtracts rewards from the return that is asked for.
    path: a run's directory. Raises UserError where it holds no model, or a damaged one.
    """

    def __init__(self, path: Path | str, device: torch.device | str = "cpu"):
        self.model, meta = dt.load(path, device)
        self.tasks = dict(enumerate(data.tasks(meta, path)))

    @classmethod
    def of(cls, model: dt.DecisionTransformer, task: data.Task, index: int) -> "Policy":
        """Of a model in memory, in its index-th task."""
        self = cls.__new__(cls)
        self.model = model
        self.tasks = {index: task}
        return self

    def reset(
        self, task: str | None = None, target_return: ArrayLike | None = None, episodes: int | None = None
    ) -> None:
        """Begin. Raises UserError for a task that the model does not have.

        task: its name; None: the only one. target_return: one number, or (E,) one of each episode; None: the
        task's default.
        episodes: E, how many act as a batch; None: one, without a batch axis.
        """
        found = [index for index, t in self.tasks.items() if task in (t.name, None)]
        if len(found) != 1:
            raise UserError(f"task {task!r}: this model has {', '.join(t.name for t in self.tasks.values())}")
        index = found[0]
        self.task = self.tasks[index]
        self.batched = episodes is not None
        E = episodes or 1
        target = np.asarray(self.task.target if target_return is None else target_return, float)
        if target.shape not in ((), (E,)):
            raise UserError(
                f"target_return of shape {target.shape}: must be one number, or one of each of {E}"
            )
        self.target = np.full(E, target)
        self.return_to_go = self.target.copy()
        self.steps = np.zeros(E, int)  # since each episode's first
        self.actor = Actor(self.model, index, E, self.task.max_steps)
        self.device = next(self.model.parameters()).device
        self.action = torch.zeros(E, self.task.act_dim, device=self.device)  # the last, in the model's units
        self.obs_mean = np.array(self.task.obs_mean)
        self.obs_std = np.array(self.task.obs_std)
        self.act_low = np.array(self.task.act_low)
        self.act_high = np.array(self.task.act_high)
        self.act_range = self.act_high - self.act_low

    def act(
        self, observation: ArrayLike, reward: ArrayLike = 0.0, began: ArrayLike | None = None
    ) -> np.ndarray | np.int64:
        """observation (O,) and the last action's reward -> action (A,); batched: (E, O) and (E,) -> (E, A).

        Of a task with images: (O + P,) or (E, O + P), the pixels last, from 0 to 255.
        Actions are float32 in the environment's units; discrete ones an int64, or (E,) of them; of F factors
        (F,) int64, or (E, F).
        began (E,) bool: which observations are the first of an episode; their rewards are ignored.
        Raises UserError past the task's last step.
        """
        observation = np.reshape(observation, (len(self.return_to_go), -1))
        pixels = None
        if self.task.image:
            observation, pixels = np.split(observation, [self.task.obs_dim], 1)
            pixels = torch.from_numpy(pixels.astype(np.uint8)).to(self.device)
        self.return_to_go -= np.reshape(np.asarray(reward, float), -1)
        if began is not None and np.any(began):
            self.return_to_go = np.where(began, self.target, self.return_to_go)
            self.steps = np.where(began, 0, self.steps)
            self.actor.restart(torch.from_numpy(np.asarray(began)))
        self.steps += 1
        if self.steps.max() > self.task.max_steps:
            raise UserError(
                f"an episode of {self.task.name} goes on after its {self.task.max_steps} steps; reset(), "
                f"or tell act() that another one `began`"
            )
        states = self._float32((observation - self.obs_mean) / self.obs_std)
        rtg = self._float32(self.return_to_go / self.task.rtg_scale)
        self.action = self.actor.act(states, rtg, self.action, pixels)
        action = self._in_units(self.action)
        return action if self.batched else action[0]

    def _float32(self, x):
        return torch.as_tensor(x, dtype=torch.float32, device=self.device)

    def _in_units(self, action):
        """The model's actions (E, A) as the environment takes them: (E, A), or discrete (E,) or (E, F)."""
        if self.task.discrete:
            chosen = dt.likeliest(action, self.task.choices).cpu().numpy() + self.task.first_action
            return chosen.reshape(-1, *self.task.action_shape)
        unit = (action.cpu().double().numpy() + 1) / 2
        action = unit * self.act_range + self.act_low
        return np.clip(action, self.act_low, self.act_high).astype(np.float32)

    def keep(self, rows: ArrayLike) -> None:
        """Go on with these episodes alone; rows (E,) bool."""
        rows = np.asarray(rows)
        selected = torch.from_numpy(rows)
        self.target = self.target[rows]
        self.return_to_go = self.return_to_go[rows]
        self.steps = self.steps[rows]
        self.action = self.action[selected]
        self.actor.keep(selected)

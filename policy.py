"""A saved model, acting.

    policy = Policy("out/student")
    policy.reset("hopper", target_return=3000)
    action = policy.act(observation)            # then, until the episode ends, policy.act(observation, reward)

Batched, also for gymnasium.make_vec, whose episodes begin anew by themselves, in this mode with the step that ends them:

    envs = gymnasium.make_vec("Hopper-v5", 16, "sync", vector_kwargs={"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP})
    policy.reset("hopper", episodes=16)
    observations, rewards, ended = envs.reset()[0], np.zeros(16), np.zeros(16, bool)
    while ...:
        actions = policy.act(observations, rewards, began=ended)    # what was observed with an end is the next episode's first
        observations, rewards, terminated, truncated, _ = envs.step(actions)
        ended = terminated | truncated
"""

import numpy as np
import torch
import torch.nn.functional as F

import data
import model as dt
from support import UserError


class Actor:
    """A model acting in E episodes of one task: act() once a timestep.

    A step computes its three newest tokens alone, a_{t-1}, R_t and s_t, against kept keys and values of those before. What tokens turn into depends on where
    their window begins, so keys can't slide with it: there are two windows, every H = K // 2 timesteps the older one begins anew, and the other acts, on the
    last H + 1 to 2H timesteps (or all there are), as forward() does on a window that begins there. Both are one batch of six tokens, told apart by the mask.
    At batch 1 all is overhead: so the weights are laid out once, LayerNorms' own multiplied into the products that read them.
    """

    @torch.no_grad()
    def __init__(self, model, task: int, episodes: int, max_steps: int):
        self.cfg, self.discrete, self.t = (
            model.cfg,
            model.cfg.discrete[task],
            0,
        )  # t: timestep of all episodes; (E,) of each once one of them began anew
        K, C, A, O, nh = (
            self.cfg.context,
            self.cfg.n_embd,
            self.cfg.act_dims[task],
            self.cfg.obs_dims[task],
            self.cfg.n_head,
        )
        dev, H = model.embed_place.weight.device, max(1, K // 2)

        def folded(weight, bias, norm=None):  # (in, out), (out,)
            return (
                (weight.contiguous(), bias)
                if norm is None
                else (norm.weight[:, None] * weight, bias + norm.bias @ weight)
            )

        embed = model.embed_action, model.embed_rtg, model.embed_state
        self.embed = torch.block_diag(
            *(e.weight[task, :d] for e, d in zip(embed, (A, 1, O), strict=True))
        )  # (A + 1 + O, 3C)
        self.ln_in = model.ln_in.weight, model.ln_in.bias
        self.blocks = [(*folded(b.qkv.weight.T, b.qkv.bias, b.ln1), *folded(b.proj.weight.T, b.proj.bias),
                        *folded(b.fc.weight.T, b.fc.bias, b.ln2), *folded(b.out.weight.T, b.out.bias)) for b in model.blocks]  # fmt: skip
        self.head = folded(model.head.weight[task, :, :A], model.head.bias[task, :A], model.ln_out)

        # what depends on time alone: the steps' embeddings, and of every phase of the two windows (first H, then 2H that repeat) places, rows, masks
        steps = (
            torch.arange(max(K, max_steps), device=dev)[:, None] - torch.tensor([1, 0, 0], device=dev)
        ).clamp_min(0)  # of a_{t-1}, R_t, s_t
        place = model.embed_place.weight[steps[:K]].flatten(1)  # (K, 3C)
        self.time = (
            model.embed_time(dt.waves(steps.to(place.dtype))) + torch.stack([e.bias[task] for e in embed])
        ).flatten(1)  # (max_steps, 3C)
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
        self.caches = [
            place.new_zeros(2, episodes, nh, 2 * n, C // nh) for _ in self.blocks
        ]  # keys and values

    @torch.inference_mode()
    def act(self, states, rtg, actions):
        """This timestep's mean actions, or the most likely discrete ones, one-hot: (E, A); from states (E, O), rtg (E,), and the actions (E, A) of the last one
        (any, before the first)."""
        E, C, nh, H = states.shape[0], self.cfg.n_embd, self.cfg.n_head, len(self.phases) // 3
        each = not isinstance(self.t, int)
        if each:
            phase = torch.where(self.t < H, self.t, H + (self.t - H) % (2 * H))
            place, put, mask, newest = (
                x[phase] for x in self.stacked
            )  # (E, 2, 3C), (E, 1, keys, 6) one-hot, (E, 1, 6, keys), (E,)
        else:
            place, rows, mask, newest = self.phases[self.t if self.t < H else H + (self.t - H) % (2 * H)]
        x = torch.addmm(
            self.time[self.t], torch.cat((actions, rtg[:, None], states), 1), self.embed
        )  # (E, 3C)
        x = torch.layer_norm((x[:, None] + place).view(6 * E, C), (C,), *self.ln_in)
        for i, (qkv_w, qkv_b, proj_w, proj_b, fc_w, fc_b, out_w, out_b) in enumerate(self.blocks):
            qkv = (
                torch.addmm(qkv_b, torch.layer_norm(x, (C,)), qkv_w)
                .view(E, 6, 3, nh, -1)
                .permute(2, 0, 3, 1, 4)
            )  # (3, E, nh, 6, hs)
            if each:
                self.caches[i] = self.caches[i] * (1 - put.sum(-1, keepdim=True)) + put @ qkv[1:]
            else:
                self.caches[i].index_copy_(3, rows, qkv[1:])
            q, (k, v) = qkv[0], self.caches[i]
            if i == len(self.blocks) - 1:  # only the acting window's state is read
                x = x.view(E, 6, C)
                if each:
                    at = newest[:, None, None]
                    x = x.gather(1, at.expand(E, 1, C))[:, 0]
                    q, mask = (
                        y.gather(2, at[..., None].expand(E, y.shape[1], 1, y.shape[3])) for y in (q, mask)
                    )
                else:
                    x, q, mask = x[:, newest], q[:, :, newest, None], mask[:, :, newest, None]
            y = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(-1, C)
            x = x + torch.addmm(proj_b, y, proj_w)
            x = x + torch.addmm(out_b, torch.addmm(fc_b, torch.layer_norm(x, (C,)), fc_w).relu_(), out_w)
        self.t = self.t + 1
        x = torch.addmm(self.head[1], torch.layer_norm(x, (C,)), self.head[0])
        return F.one_hot(x.argmax(1), x.shape[1]).to(x.dtype) if self.discrete else x.tanh()

    def keep(self, rows):
        """Go on with these episodes alone; rows: indices (E',) or bools (E,)."""
        self.caches = [c[:, rows] for c in self.caches]
        self.t = self.t if isinstance(self.t, int) else self.t[rows]

    @torch.inference_mode()
    def restart(self, rows):
        """These episodes begin anew, rows as in `keep`. What is kept of the old ones is seen by nothing: the mask ends at the newest token."""
        if isinstance(self.t, int):
            dev = self.time.device
            self.t = torch.full((self.caches[0].shape[1],), self.t, device=dev)
            places, at, masks, newest = zip(*self.phases, strict=True)
            put = torch.stack(at)[:, None, None] == torch.arange(masks[0].shape[-1], device=dev)[:, None]
            self.stacked = (
                torch.stack(places),
                put.to(masks[0].dtype),
                torch.cat(masks),
                torch.tensor(newest, device=dev),
            )
        self.t[rows] = 0


class Policy:
    """Acts by the mean, or the most likely of discrete actions, in one of a model's tasks: keeps the context, normalises, takes rewards off the return that is
    still asked for.

    path: a run's directory. Raises UserError where there is no model, or a damaged one.
    """

    def __init__(self, path, device="cpu"):
        self.model, meta = dt.load(path, device)
        self.tasks = dict(enumerate(data.tasks(meta, path)))

    @classmethod
    def of(cls, model, task: data.Task, index: int):
        """Of a model in memory, in its index-th task."""
        self = cls.__new__(cls)
        self.model, self.tasks = model, {index: task}
        return self

    def reset(self, task: str | None = None, target_return: float | None = None, episodes: int | None = None):
        """Begin. task: its name, or None where there is one alone; target_return: of an episode, None: the data's 95th percentile; episodes: how many act as
        a batch, None: one without a batch's axis. Raises UserError for a task that the model does not have."""
        found = [i for i, t in self.tasks.items() if task in (t.name, None)]
        if len(found) != 1:
            raise UserError(f"task {task!r}: this model has {', '.join(t.name for t in self.tasks.values())}")
        self.task, self.alone, n = self.tasks[found[0]], episodes is None, episodes or 1
        self.target = self.task.targets["p95"] if target_return is None else target_return
        self.left, self.age = (
            np.full(n, float(self.target)),
            np.zeros(n, int),
        )  # (n,) return still asked for; steps so far
        self.actor, self.device = (
            Actor(self.model, found[0], n, self.task.max_steps),
            next(self.model.parameters()).device,
        )
        self.action = torch.zeros(n, self.task.act_dim, device=self.device)  # (n, A), as the model gives them
        self.mean, self.std, self.low, self.high = (
            np.array(x)
            for x in (self.task.obs_mean, self.task.obs_std, self.task.act_low, self.task.act_high)
        )

    @torch.inference_mode()
    def act(self, observation, reward=0.0, began=None):
        """observation (O,) and the reward of the action before -> action (A,); batched: (n, O) and (n,) -> (n, A), float32, in the environment's units;
        discrete actions: an int64, or (n,) of them.
        began (n,) bool: which observations are the first of an episode, whose reward then counts for nothing. Raises UserError past the task's last step."""
        observation, reward = (
            np.reshape(observation, (len(self.left), -1)),
            np.reshape(np.asarray(reward, float), -1),
        )
        self.left -= reward
        if began is not None and np.any(began):
            self.left, self.age = np.where(began, self.target, self.left), np.where(began, 0, self.age)
            self.actor.restart(torch.from_numpy(np.asarray(began)))
        self.age += 1
        if self.age.max() > self.task.max_steps:
            raise UserError(
                f"an episode of {self.task.name} goes on after its {self.task.max_steps} steps; reset(), or tell act() that another one `began`"
            )
        states = torch.as_tensor(
            (observation - self.mean) / self.std, dtype=torch.float32, device=self.device
        )
        rtg = torch.as_tensor(self.left / self.task.rtg_scale, dtype=torch.float32, device=self.device)
        self.action = self.actor.act(states, rtg, self.action)
        if self.task.discrete:
            action = self.action.argmax(1).cpu().numpy() + self.task.first_action
            return action[0] if self.alone else action
        action = np.clip(
            (self.action.cpu().double().numpy() + 1) / 2 * (self.high - self.low) + self.low,
            self.low,
            self.high,
        ).astype(np.float32)
        return action[0] if self.alone else action

    def keep(self, rows):
        """Go on with these episodes alone; rows (n,) bool."""
        rows = np.asarray(rows)
        self.left, self.age, self.action = (
            self.left[rows],
            self.age[rows],
            self.action[torch.from_numpy(rows)],
        )
        self.actor.keep(torch.from_numpy(rows))

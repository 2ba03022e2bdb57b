"""Distil many teachers, one per task, into one smaller student.

    python distill.py                                          # hopper, halfcheetah, walker2d: all that is missing is made first
    python distill.py --envs hopper ant                        # other built-in tasks
    python distill.py --datasets mujoco/hopper/medium-v0 mujoco/ant/medium-v0
    python distill.py --teachers out/teacher-hopper out/teacher-ant
    torchrun --nproc_per_node=8 distill.py                     # on many GPUs, or CPUs

The loop, below, is the method: which teacher next (curriculum.py), how far from it (kernels/kl.py), what to do where its gradient
conflicts with the last update (surgery.py). Out come config.json, log.csv (a row per update), metrics.json, the model, plots.png.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.autograd import forward_ad
from tqdm import tqdm

import curriculum
import data
import evaluate
import kernels
import model as dt
import report
import run
import surgery
import teacher
from kernels.kl import DIRECTIONS, head_kl, per_teacher, policies
from kernels.project import project_adamw

ORDERS, SURGERIES = Literal[tuple(curriculum.METHODS)], Literal[tuple(surgery.METHODS)]


@dataclasses.dataclass
class Config:
    # tasks
    envs: tuple[str, ...] = ()  # keys of data.ENVS; hopper halfcheetah walker2d where neither this nor the next two are given
    datasets: tuple[str, ...] = ()  # Minari ids, besides or in place of --envs
    teachers: tuple[str, ...] = ()  # run directories of teacher.py; default: out/teacher-<task>, trained first where missing
    teacher_steps: int = teacher.Config.steps  # updates of a teacher trained first
    # student
    n_layer: int = 2  # transformer blocks
    n_head: int = 1  # of attention
    n_embd: int = 64  # channels
    # method
    curriculum: ORDERS = "novelty"  # which teacher next
    novelty_power: float = 2.0  # shares ~ KL^power; inf: farthest alone; 0: all alike (also least's, inverted); 4: up to 5 % nearer to the worst, may neglect the nearest
    surgery: SURGERIES = "none"  # of a gradient that conflicts; none: README, The study, where each cost as much as it brought, or more
    surgery_scope: Literal["batch", "teacher"] = "batch"  # project the batch's gradient, or each teacher's own part of it
    alignment_weight: float = 0.0  # lambda: a teacher's score is KL x (1 + lambda x its alignment with the last update)
    alignment: Literal["exact", "estimate"] = "exact"  # one forward-mode pass, or the change of its KL over the last update
    loss: Literal["kl", "mse", "nll"] = "kl"  # baselines: mse of the means, or probabilities; nll of the data's own actions, with no teacher
    kl: Literal[DIRECTIONS] = "forward"  # KL(teacher || student), or KL(student || teacher)
    sigma_floor: float = 0.05  # added to every variance of continuous actions, squared; in units of half their range
    temperature: float = 1.0  # times the teacher's sigma; its logits over it
    top: float = 0.1  # half of a teacher's windows come from this part of its data, that of the highest returns; 1: all alike (0.96 of scores are kept, with 0.1 1.01)
    targets: Literal["cached", "live"] = "cached"  # teachers' outputs computed once, or in every update
    probe_windows: int = 8  # per teacher, where distances or alignments need windows of their own
    probe_interval: int = 1  # updates between probes, where the farthest teacher alone is taken: an old distance takes it too often
    # optimisation
    steps: int = 4000  # updates
    batch_size: int = 64  # windows per update, of all teachers together, of each process
    lr: float = 8e-3  # AdamW's peak, after linear warm-up; then linear decay to zero
    warmup: int = 100  # updates
    weight_decay: float = 1e-4  # AdamW's, times the learning rate
    grad_clip: float = 0.25  # largest norm of an update's gradient
    # run
    out_dir: str = "out/student"  # the run's directory
    eval_episodes: int = 20  # per task; 0: none
    seed: int = 0  # of weights and windows, and of a teacher trained first
    device: str = "auto"  # cpu, cuda, or auto
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the blocks' matrix products in training; auto: bfloat16 where native
    data_device: Literal["auto", "device", "host"] = "auto"  # where the data lie; auto: on the host, mapped from a file, if they would fill half of the device's memory
    log_interval: int = 100  # updates between held-out KLs
    tensorboard: bool = False  # also log there: tensorboard --logdir out
    wandb: bool = False  # also log to Weights & Biases, project manyteachers
    checkpoint_interval: int = 1000  # updates between checkpoints, besides those that SIGTERM and SIGINT ask for
    resume: bool = False  # go on from the last checkpoint, a teacher's too, if there is one
    overwrite: bool = False  # replace a run of other settings, or an unfinished one


# ---- teachers and their targets --------------------------------------------------------------------------------------


def find_teachers(cfg: Config):
    """Load the teachers, training those missing: [(model, Task, metrics of its task)], in the order of the command line."""
    names = [*cfg.envs, *map(data.task_name, cfg.datasets)] or ([] if cfg.teachers else ["hopper", "halfcheetah", "walker2d"])
    if names and cfg.teachers and len(names) != len(cfg.teachers):
        raise run.UserError(f"{len(cfg.teachers)} --teachers for {len(names)} tasks; name one for each task, in the same order")
    dirs = [Path(d) for d in cfg.teachers] or [teacher.directory(n) for n in names]
    if len(set(dirs)) < len(dirs):
        raise run.UserError(f"the same task twice among {' '.join(map(str, dirs))}; name each once")
    out = []
    for i, path in enumerate(dirs):
        if not cfg.teachers and not run.read_json(path / "metrics.json"):
            print(f"no teacher in {path}: training it", flush=True)
            which = {"env": names[i]} if names[i] in data.ENVS else {"dataset": names[i]}
            teacher.main(teacher.Config(**which, steps=cfg.teacher_steps, seed=cfg.seed, device=cfg.device, dtype=cfg.dtype,
                                        eval_episodes=cfg.eval_episodes, checkpoint_interval=cfg.checkpoint_interval, resume=cfg.resume, overwrite=cfg.overwrite,
                                        data_device=cfg.data_device, tensorboard=cfg.tensorboard, wandb=cfg.wandb))  # fmt: skip
        elif not cfg.teachers:
            trained = (run.read_json(path / "config.json") or {}).get("steps")
            print(f"teacher of {names[i]} is there: {path}{f', of {trained} updates in place of {cfg.teacher_steps}' if trained != cfg.teacher_steps else ''}")
        model, meta = dt.load(path, run.device(cfg))
        task, *more = data.tasks(meta, path)
        if more:
            raise run.UserError(f"{path} holds a student of {1 + len(more)} tasks; a teacher has one")
        if names and task.name != names[i]:
            raise run.UserError(f"{path} holds a teacher of {task.name}, not of {names[i]}; put --teachers in the order of the tasks")
        metrics = (run.read_json(path / "metrics.json") or {}).get("tasks", {}).get(task.name, {})
        out.append((model, task, metrics))
    if len({t.name for _, t, _ in out}) < len(out):
        raise run.UserError(f"two teachers of one task among {' '.join(map(str, dirs))}; a student takes one for each task")
    if len({m.cfg.context for m, _, _ in out}) > 1:
        raise run.UserError(f"teachers of different context lengths {sorted({m.cfg.context for m, _, _ in out})}; train them with one --context")
    return out


@torch.no_grad()
def live_targets(teachers, batch):
    """What each window's own teacher makes of it: mean, log_std, each (B, K, A), zero beyond the teacher's action size."""
    out = torch.zeros(2, *batch.actions.shape, device=batch.actions.device)
    for i, t in enumerate(teachers):
        w = (batch.task == i).nonzero().flatten()
        if len(w):
            O, A = t.cfg.obs_dims[0], t.cfg.act_dims[0]
            out[:, w, :, :A] = torch.stack(t(0, batch.states[w, :, :O], batch.actions[w, :, :A], batch.rtg[w], batch.timesteps[w], batch.mask[w]))
    return out


@torch.no_grad()
def cache_targets(teachers, windows: data.Windows):
    """Fill the last 2A columns of windows.table: every row's target, from a window that shows its teacher at least half a context of what came before (or all
    there is). Of a job's processes each computes its part."""
    table, A = windows.table, windows.A
    H, t = max(1, windows.K // 2), table[:, -2 * A - 1].to(windows.size.device).long()
    last = torch.cat([t[1:] == 0, torch.ones(1, dtype=torch.bool, device=t.device)])  # of an episode
    ends = ((t % H == H - 1) | last).nonzero().flatten()  # a window for every H timesteps, whose newest ones it fills
    task = torch.searchsorted(windows.offset, ends, right=True) - 1
    parts = torch.arange(len(ends), device=t.device).split(256)[run.rank() :: run.world()]
    for part in tqdm(parts, desc="teachers' targets", unit="batch", disable=True if run.rank() else None):
        batch = windows.gather(task[part], ends[part])
        new = windows.back <= (t[ends[part]] % H)[:, None]
        table[batch.rows[new].to(table.device), -2 * A :] = torch.cat(tuple(live_targets(teachers, batch)), dim=-1)[new].to(table.device)
    if run.world() > 1:
        for rows in table.split(2**20):
            x = rows[:, -2 * A :].contiguous()
            run.add_up(x)
            rows[:, -2 * A :] = x


# ---- alignments ------------------------------------------------------------------------------------------------------


def exact_alignments(losses, theta, u):
    """losses(theta) -> L (N,): returns c (N,), c_i = <grad L_i, u>, in one forward-mode pass (no teacher's gradient is formed)."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(losses(forward_ad.make_dual(theta.detach(), u))).tangent


def estimated_alignments(before, after, u, delta):
    """c (N,) from the KLs (N,) of the same windows before and after an update that moved theta by delta (P,).

    First order: after - before = <grad L_i, delta>, so a_i = c_i / <u, u> is that over <u, delta>: exact for small steps along -u, an estimate where AdamW
    bends them (FAMO's trick, Liu et al. 2023, arXiv 2306.03792, section 3.2).
    """
    du = u @ delta
    return torch.where(du != 0, (after - before) / du, 0.0) * (u @ u)


# ---- the method ------------------------------------------------------------------------------------------------------


def learner(cfg: Config, student, teachers, train: data.Windows, probe: data.Batch, generator):
    """All of the method. student: its parameters are moved into one flat buffer; teachers: their models, read where targets are live; probe: windows of every
    teacher; generator: of the windows' device.

    Returns update(step), which makes one update and waits for nothing; distances(batch, targets) -> L (N,); and state, all tensors that an update
    changes, by name. Among them record (log_interval, 5 + 3N): row step % log_interval holds loss, cosine, projected, gradient norm before and after surgery, and
    the teachers' shares, distances and alignments.
    """
    device = probe.task.device
    act_dims, discrete = torch.tensor(student.cfg.act_dims, device=device), student.cfg.categorical(device)  # (N,) each
    N, theta = len(act_dims), dt.flatten(student)

    def targets(batch):
        return live_targets(teachers, batch) if cfg.targets == "live" and cfg.loss != "nll" else batch.targets

    def sums_and_counts(batch, wanted, vector=None, loss=cfg.loss):
        """sums (N,): the student's distance from each teacher, summed over the batch's timesteps of that teacher; counts (N,): how many there are."""
        if vector is None:
            h, weight, bias = student(*batch[:6], hidden=True), student.head.weight, student.head.bias
        else:
            p = dt.unflatten(student, vector)
            h, weight, bias = torch.func.functional_call(student, p, batch[:6], {"hidden": True}), p["head.weight"], p["head.bias"]
        if loss != "kl":
            mean, log_std = policies(torch.baddbmm(bias[batch.task][:, None], h, weight[batch.task]), batch.task, act_dims, discrete)
            x = (mean - wanted[0]).square() if loss == "mse" else dt.gaussian_nll(mean, log_std, batch.actions)
            if discrete is not None:
                of_categorical = (mean.exp() - wanted[0].exp()).square() if loss == "mse" else -batch.actions * mean
                x = torch.where(discrete[batch.task][:, None, None], of_categorical, x)
            return per_teacher(x, batch.mask, batch.task, act_dims, discrete)
        return head_kl(h, weight, bias, *wanted, batch.mask, batch.task, act_dims, cfg.kl, cfg.sigma_floor, cfg.temperature, discrete)

    def distances(batch, wanted, vector=None, loss=cfg.loss):
        """L (N,): the student's mean distance from each teacher, 0 where the batch has no window of it."""
        sums, counts = sums_and_counts(batch, wanted, vector, loss)
        return sums / counts.clamp_min(1)

    order = curriculum.METHODS[cfg.curriculum]
    if cfg.curriculum in ("novelty", "least"):
        order = functools.partial(order, power=cfg.novelty_power)
    farthest = cfg.curriculum in ("novelty", "least") and cfg.novelty_power == math.inf
    one_at_a_time, probe_interval = farthest or cfg.curriculum in curriculum.ONE_AT_A_TIME, cfg.probe_interval if farthest else cfg.log_interval
    by_teacher = cfg.surgery_scope == "teacher"
    estimate = cfg.alignment == "estimate" and (cfg.alignment_weight != 0 or by_teacher)
    fused = kernels.compiled(device) and cfg.surgery in surgery.FUSED  # surgery, clipping and AdamW in two launches

    # all that an update changes lies in tensors on the device, so that it can be captured once and replayed
    with torch.no_grad():
        probe_targets = targets(probe)
        d = distances(probe, probe_targets).clone()  # (N,) how far from each teacher
    d_probe, c = d.clone(), torch.zeros_like(d)  # (N,) on the probe's windows; each teacher's <grad L_i, u>
    shares, lead = torch.full_like(d, 1 / N), torch.full((), -1, device=device)
    u, m, v = (torch.zeros_like(theta.data) for _ in range(3))  # (P,) the previous update's gradient; AdamW's moments
    done, alive = torch.zeros(1, dtype=torch.long, device=device), torch.ones((), dtype=torch.bool, device=device)
    record = torch.zeros(cfg.log_interval, 5 + 3 * N, device=device)  # a row per update
    schedule, everyone = run.schedule(cfg.steps, cfg.lr, cfg.warmup).to(device), torch.arange(N, device=device)

    def update(probing):
        """One update, in which nothing waits for the device."""
        with torch.no_grad():
            # which teachers next: the least familiar, weighed by how much of the last update each would take part in
            if probing:
                d.copy_(run.averaged(distances(probe, probe_targets)))
            if cfg.alignment_weight and not estimate:
                c.copy_(run.averaged(exact_alignments(lambda x: distances(probe, probe_targets, x), theta, u)))
            uu = u @ u
            a = torch.where(uu > 0, c / uu, 0.0).clamp(-1, 1)
            shares.copy_(order(d * (1 + cfg.alignment_weight * a).clamp_min(0), done, shares, generator))
            batch = train.sample(cfg.batch_size, shares, generator)
            wanted = targets(batch)
            drawn = (batch.task == everyone[:, None]).sum(1)  # (N,)
            along = torch.zeros_like(d)  # each teacher's own <grad sums_i, u>
            if by_teacher and not estimate:
                along = exact_alignments(lambda x: sums_and_counts(batch, wanted, x)[0], theta, u)

        # how far from them, and which way to go
        sums, counts = sums_and_counts(batch, wanted)
        total_sums, counts, drawn, along = run.summed(sums.detach(), counts, drawn, along)  # over the job's processes
        part = drawn / (cfg.batch_size * run.world())  # (N,) the shares as drawn
        L = sums / counts.clamp_min(1)
        loss = part @ L
        if cfg.surgery in surgery.EACH:
            rows = [torch.autograd.grad(part[i] * L[i], student.parameters(), retain_graph=True) for i in part.nonzero().flatten()]
            g = torch.stack([torch.cat([x.reshape(-1) for x in r]) for r in rows])  # (n, P)
            run.add_up(g)
            total = g.sum(0)
        else:
            theta.grad.zero_()
            loss.backward()
            g = total = theta.grad  # (P,)
            run.add_up(g)

        with torch.no_grad():
            L = total_sums / counts.clamp_min(1)
            loss = part @ L
            # never against the last update
            kappa = None
            if by_teacher:
                kappa = surgery.per_teacher(c if estimate else along / counts.clamp_min(1), part, uu)
            changed = shares.argmax() != lead
            lead.copy_(shares.argmax())
            was = theta.detach().clone() if estimate else None
            options = {"schedule": schedule[done][0], "alive": alive, "clip": cfg.grad_clip, "weight_decay": cfg.weight_decay}
            if fused:
                gu, uu, norm, after, took = project_adamw(theta, g, u, m, v, kappa=kappa, **options, **surgery.FUSED[cfg.surgery](changed))
                projected = took != 0
            else:
                g, remembered = surgery.METHODS[cfg.surgery](g, u, kappa, changed)
                projected, gu, norm, after = (g != total).any(), total @ u, total.norm(), g.norm()
                project_adamw(theta, g, None, m, v, **options)
                u.copy_(torch.where(alive, remembered, u))
            cosine = gu / (norm * uu.sqrt()).clamp_min(1e-30)

            # how far now
            far = d if one_at_a_time else torch.where(counts > 0, d + 0.1 * (L - d), d)  # a running mean of the windows' own distance costs nothing
            if estimate:
                now = run.averaged(distances(probe, probe_targets))
                c.copy_(estimated_alignments(d_probe, now, u, theta.detach() - was))
                d_probe.copy_(now)
            record[done % cfg.log_interval] = torch.cat((torch.stack((loss, cosine, projected, norm, after)), part, far, a))
            d.copy_(torch.where(alive, far, d))
            done.add_(1)

    state = {"theta": theta.data, "u": u, "m": m, "v": v, "d": d, "d_probe": d_probe, "c": c, "shares": shares, "lead": lead, "done": done, "alive": alive,
             "record": record}  # fmt: skip
    # one captured graph for updates with a probe, one for those without; what reads the device in mid-update can't be captured
    updates = {True: functools.partial(update, True), False: functools.partial(update, False)}
    if kernels.compiled(device) and cfg.targets == "cached" and cfg.surgery not in surgery.EACH and not train.host and run.world() == 1:
        updates = {probing: run.captured(f, list(state.values()), generator) for probing, f in updates.items() if one_at_a_time or not probing}
    # mixed orders' batches show all teachers, always: they need no probe; fixed and uniform ones need it for the log alone
    return lambda step: updates[one_at_a_time and step % probe_interval == 0](), distances, state


LOG_ROWS = 10_000  # a training of more updates logs every second, third, ... of them


# ---- distillation ----------------------------------------------------------------------------------------------------


def main(cfg: Config):
    run.check(cfg, steps=1, batch_size=1, lr=0, warmup=1, n_layer=1, n_head=1, n_embd=1, log_interval=1, eval_episodes=0, seed=0, teacher_steps=1, novelty_power=0,
              sigma_floor=0, temperature=1e-3, grad_clip=1e-9, weight_decay=0, probe_windows=1, probe_interval=1, checkpoint_interval=1)  # fmt: skip
    if cfg.n_embd % cfg.n_head:
        raise run.UserError(f"--n-embd {cfg.n_embd}: must be a multiple of --n-head {cfg.n_head}")
    if not 0 < cfg.top <= 1:
        raise run.UserError(f"--top {cfg.top}: must be above 0 and at most 1")
    if cfg.surgery_scope == "teacher" and cfg.surgery in ("none", *surgery.EACH):
        raise run.UserError(f"--surgery-scope teacher: with --surgery {cfg.surgery} there is nothing to project by teacher; choose previous, switch or average")
    if cfg.loss == "nll" and cfg.curriculum in ("novelty", "least", "dro"):
        raise run.UserError(f"--loss nll is no distance, for it may be negative: with --curriculum {cfg.curriculum} it means nothing; choose all, fixed or uniform")
    if not math.isfinite(cfg.alignment_weight):
        raise run.UserError(f"--alignment-weight {cfg.alignment_weight}: must be finite")
    for e in cfg.envs:
        data.dataset_id(e)  # a mistyped one is told before anything is done
    out = Path(cfg.out_dir)
    if not run.start(out, cfg):
        print(f"student is there: {out} (--overwrite to train it again)")
        return None if run.rank() else summary(out)

    # ---- teachers, data, student -------------------------------------------------------------------------------------
    clock, device = run.Clock(), run.device(cfg)
    with clock("teachers"):
        found = find_teachers(cfg)
    teachers, tasks, N = [m for m, _, _ in found], [t for _, t, _ in found], len(found)
    with clock("data"):
        if cfg.eval_episodes:
            evaluate.check(tasks)
        with run.first():
            sets = [data.load(t.dataset, t.split_seed) for t in tasks]
        for t, s in zip(tasks, sets, strict=True):
            if json.dumps(dataclasses.asdict(t)) != json.dumps(dataclasses.asdict(s.task)):
                raise run.UserError(f"dataset {t.dataset} is not what the teacher of {t.name} was trained on any more; train the teacher again with --overwrite")
        context = teachers[0].cfg.context
        cached = cfg.targets == "cached" and cfg.loss != "nll"  # which asks no teacher
        train = data.Windows([s.train for s in sets], tasks, context, device, cfg.data_device, cached, cfg.top)
        held_out = data.Windows([s.held_out for s in sets], tasks, context, device, cfg.data_device).spread(256)
        del sets, s  # in the windows now
    torch.manual_seed(cfg.seed)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    student = dt.DecisionTransformer(dt.ModelConfig.of(tasks, n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd, context=context)).to(device)
    student.bfloat16 = run.bfloat16(cfg)
    parameters = sum(t.n_params for t in teachers)
    print(f"{N} teachers of {parameters:,} parameters -> student of {student.n_params:,}, {parameters / student.n_params:.1f} times fewer, on {device}, blocks in "
          f"{'bfloat16' if student.bfloat16 else 'float32'}; kernels: {kernels.path(device)}", flush=True)
    with clock("targets"):
        if cached:
            cache_targets(teachers, train)
        held_out_targets = live_targets(teachers, held_out)

    update, distances, state = learner(cfg, student, teachers, train, train.spread(cfg.probe_windows), generator)

    def held_out_kl():
        student.eval()  # in float32, as it will act
        with torch.no_grad():
            held = distances(held_out, held_out_targets, loss="kl").tolist()
        student.train()
        return held

    # ---- training ----------------------------------------------------------------------------------------------------
    meta = {"tasks": [dataclasses.asdict(t) for t in tasks]}
    saved = run.Checkpoint(out, cfg, state, {"windows": generator}, meta["tasks"])
    first, log = saved.restore()
    thin = -(-cfg.steps // LOG_ROWS)
    written, elapsed = max(first // cfg.log_interval * cfg.log_interval, min(first, 1)), saved.seconds  # rows logged before
    with clock("train"), tqdm(total=cfg.steps, initial=first, unit="step", desc="distil", disable=True if run.rank() else None) as bar, saved:
        for step in range(first, cfg.steps):
            try:
                update(step)
            except run.UserError:  # another process of the job is gone
                raise
            except ValueError as e:  # a curriculum was told a distance that is NaN
                if not run.rank():
                    dt.save(out, student, meta)
                raise run.UserError(f"{e} in step {step + 1} of the student: stopped; it is kept in {out}; try a lower --lr than {cfg.lr:g}") from None
            bar.update()
            if not run.rank() and (step == 0 or (step + 1) % cfg.log_interval == 0 or step + 1 == cfg.steps):
                held = held_out_kl()
                rows, before, elapsed = state["record"][: step % cfg.log_interval + 1].tolist()[-(step + 1 - written) :], elapsed, saved.seconds
                for i, row in enumerate(rows, written):
                    loss, cosine, projected, norm, after, *each = row
                    part, far, a = each[:N], each[N : 2 * N], each[2 * N :]
                    if not math.isfinite(loss + norm):  # this update was not applied, nor any after it: the parameters are still the last good ones
                        dt.save(out, student, meta)
                        bad = next((t.name for t, x in zip(tasks, far, strict=True) if not math.isfinite(x)), tasks[part.index(max(part))].name)
                        raise run.UserError(f"loss {loss:.4g}, gradient norm {norm:.4g} in step {i + 1} of the student, learning from teacher {bad}: stopped; "
                                            f"the student before that step is kept in {out}; try a lower --lr than {cfg.lr:g}")  # fmt: skip
                    if (i + 1) % thin and i not in (0, step):
                        continue
                    cells = {"step": i + 1, "loss": loss, "lr": run.learning_rate(i, cfg.steps, cfg.lr, cfg.warmup), "cosine": cosine, "projected": int(projected),
                             "grad_norm": norm, "surgered_norm": after, "seconds": before + (elapsed - before) * (i + 1 - written) / len(rows)}  # fmt: skip
                    for j, t in enumerate(tasks):
                        cells |= {f"share_{t.name}": part[j], f"kl_{t.name}": far[j], f"alignment_{t.name}": a[j], f"heldout_kl_{t.name}": held[j] if i == step else None}
                    log.row(**cells)
                log.flush()
                written = step + 1
                bar.write(run.line(step + 1, cfg.steps, saved.seconds, f"loss {loss:6.3f} | held-out KL {' '.join(f'{x:.3f}' for x in held)} | cos {cosine:5.2f}"))
            saved.after(step + 1)
    if run.rank():
        return run.meet()  # when rank 0 is done
    held, trained = held_out_kl(), saved.seconds
    student.eval()
    teachers_metrics = {t.name: m for _, t, m in found}
    dt.save(out, student, {**meta, "teachers": teachers_metrics})

    # ---- evaluation --------------------------------------------------------------------------------------------------
    metrics = {}
    with clock("evaluate"):
        for i, t in enumerate(tasks):
            m = metrics[t.name] = {"target": t.targets["p95"], **dict.fromkeys(("return_mean", "return_std", "normalized_score", "retention")), "heldout_kl": held[i]}
            if cfg.eval_episodes and t.env_id:
                m |= evaluate.scores(evaluate.rollout(student, t, i, t.targets["p95"], cfg.eval_episodes, 1000)[0], t, teachers_metrics[t.name])
    run.write_json(out / "metrics.json", {"tasks": metrics, "compression": parameters / student.n_params, "parameters": student.n_params,
                                          "seconds": {**clock.seconds, "train": round(trained, 2)}, "machine": run.machine(cfg)})  # fmt: skip
    saved.finish()
    run.meet()
    summary(out)


# ---- the report ------------------------------------------------------------------------------------------------------


def summary(out: Path):
    """Print a finished run's table and draw its plots.png."""
    r = report.Run(out)
    print(run.table(r.rows()))
    if r.retention:
        print(f"retention: mean {np.mean(list(r.retention.values())):.3f}, worst {min(r.retention.values()):.3f}")
    print(f"compression: {r.metrics['compression']:.1f} times ({r.metrics['parameters']:,} parameters); seconds: {r.metrics['seconds']}")
    report.plots(out)
    print(f"plots in {out / 'plots.png'}; python report.py {out} makes a page of it")


if __name__ == "__main__":
    run.cli(main, Config, __doc__)

"""Evaluate a teacher or a student in the environments of its tasks.

    python evaluate.py out/student --eval-episodes 100
    python evaluate.py out/teacher-hopper --target median --video

Prints, per task: mean and standard deviation of the return, normalised score (100 x (return - random) / (expert - random); D4RL's
constants where there are any, else the dataset's lowest and highest return) and a student's retention (its score / its teacher's).
Writes RUN/evaluation.json.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tqdm import tqdm

import data
import model as dt
from policy import Policy
from support import UserError, cli, environments, files, log, machine

SEED = 1000  # of the first evaluation episode; episode i has SEED + i


@dataclasses.dataclass
class Config:
    run: Annotated[str, tyro.conf.Positional]  # a run directory of teacher.py or distill.py
    eval_episodes: int = 20  # per task
    target: str = "p95"  # return to ask for: p95 or median of the dataset's returns, or a number
    seed: int = SEED  # of the first episode; episode i has seed + i
    device: str = "auto"  # cpu, cuda, or auto
    video: bool = False  # also film one episode of each task into RUN/<task>.gif


def check(tasks):
    """Raise UserError, before hours of training, where a task's environment can't be made or is not what its data came from."""
    for t in tasks:
        if t.env_id is None:
            continue
        env = environments.make_env(t.env_id, t.env_kwargs)
        fits(env, t)
        env.close()


def fits(env, t: data.Task):
    """Raise UserError where a task's environment is not what its data came from."""
    there = [
        type(s).__name__ if s.shape is None else environments.size(s)
        for s in (env.observation_space, env.action_space)
    ]  # a Dict has no shape
    if there != [t.obs_dim, t.act_dim]:
        raise UserError(f"environment {t.env_id} {t.env_kwargs} has {there[0]} observations and {there[1]} actions, dataset {t.dataset} {t.obs_dim} and "
                            f"{t.act_dim}: no evaluation there; use --eval-episodes 0")  # fmt: skip


def rollout(model, task: data.Task, index: int, target: float, episodes: int, seed: int, film=False):
    """A model's episodes in its index-th task; see `play`."""
    return play(Policy.of(model, task, index), task, target, episodes, seed, film)


def play(policy, task: data.Task, target: float, episodes: int, seed: int, film=False):
    """A policy's episodes, all as one batch. policy: a policy.Policy, or anything with its reset, act and keep. Returns (E,) returns, and every fourth
    frame of the first episode."""
    limit = task.max_steps
    envs = [environments.make_env(task.env_id, task.env_kwargs, max_episode_steps=limit, **({"render_mode": "rgb_array"} if film and i == 0 else {}))
            for i in range(episodes)]  # fmt: skip
    fits(envs[0], task)
    shape = envs[0].action_space.shape
    policy.reset(target_return=target, episodes=episodes)
    obs = np.stack([np.reshape(e.reset(seed=seed + i)[0], -1) for i, e in enumerate(envs)])
    rewards, returns, alive, frames = np.zeros(episodes), np.zeros(episodes), np.arange(episodes), []
    bar = tqdm(
        range(limit), desc=f"evaluate {task.name} at {target:.0f}", unit="step", disable=None, leave=False
    )
    for t in bar:
        going = np.ones(len(alive), bool)
        for j, (i, action) in enumerate(zip(alive, policy.act(obs[alive], rewards[alive]), strict=True)):
            o, rewards[i], terminated, truncated, _ = envs[i].step(action.reshape(shape))
            obs[i], returns[i] = np.reshape(o, -1), returns[i] + rewards[i]
            if film and i == 0 and t % 4 == 0:
                frames.append(envs[0].render())
            going[j] = not (terminated or truncated)
        if not going.all():
            alive = alive[going]
            policy.keep(going)
        if not len(alive):
            break
    for e in envs:
        e.close()
    return returns, frames


def scores(returns, task: data.Task, teacher=None) -> dict:
    """The metrics of one task's returns (E,); with its teacher's, where that has a score, retention too."""
    low, high = task.reference
    mean = float(returns.mean())
    out = {
        "return_mean": mean,
        "return_std": float(returns.std()),
        "normalized_score": 100 * (mean - low) / (high - low),
    }
    if teacher and teacher.get("normalized_score"):
        out["retention"] = out["normalized_score"] / teacher["normalized_score"]
    return out


def film(model, task, index, target, seed, file, width=320, **options):
    """One episode as an animated picture, every fourth step of it, in `file`; options as pillow's save takes them. Returns its return.
    Raises UserError where rendering does not work."""
    from PIL import Image

    if not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ) and sys.platform == "linux":
        os.environ.setdefault(
            "MUJOCO_GL", "egl"
        )  # GLFW, which is tried first, needs a display, and what comes after it can crash
    try:
        got, frames = rollout(model, task, index, target, 1, seed, film=True)
        pictures = [Image.fromarray(f) for f in frames]
        pictures = [p.resize((width, width * p.height // p.width)) for p in pictures]
    except UserError:
        raise
    except Exception as e:  # no display, no EGL, no GL library: each platform fails in its own way
        why = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
        raise UserError(
            f"no film of {task.name}: rendering does not work here ({why}); try MUJOCO_GL=egl or osmesa"
        ) from None
    pictures[0].save(file, save_all=True, append_images=pictures[1:], duration=40, loop=0, **options)
    return got[0]


def main(cfg: Config):
    cli.at_least(cfg, eval_episodes=1, seed=0)
    machine.check_device(cfg.device)
    model, meta = dt.load(cfg.run, machine.device(cfg))
    rows, out = [], {}
    for i, task in enumerate(data.tasks(meta, cfg.run)):
        try:
            target = task.targets[cfg.target] if cfg.target in task.targets else float(cfg.target)
        except ValueError:
            raise UserError(
                f"--target {cfg.target}: must be {' or '.join(task.targets)} or a number"
            ) from None
        if task.env_id is None:
            print(f"{task.name}: its dataset names no environment, nothing to evaluate in")
            continue
        returns, _ = rollout(model, task, i, target, cfg.eval_episodes, cfg.seed)
        teacher = (
            meta.get("teachers", {}).get(task.name) if cfg.target == "p95" else None
        )  # whose score is of that target
        m = out[task.name] = {"target": target, **scores(returns, task, teacher)}
        row = {
            "task": task.name,
            "target": target,
            "return": m["return_mean"],
            "std": m["return_std"],
            "score": m["normalized_score"],
        }
        if "retention" in m:
            row["retention"] = m["retention"]
        rows.append(row)
        if cfg.video:
            path = Path(cfg.run) / f"{task.name.replace('/', '-')}.gif"
            try:
                film(model, task, i, target, cfg.seed, path)
                print(f"film of {task.name} in {path}")
            except UserError as e:
                print(e)
    if rows:
        print(log.table(rows))
        files.write_json(
            Path(cfg.run) / "evaluation.json",
            {"eval_episodes": cfg.eval_episodes, "seed": cfg.seed, "tasks": out},
        )


if __name__ == "__main__":
    cli.run(main, Config, __doc__)

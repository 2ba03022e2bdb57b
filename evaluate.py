"""Evaluate a teacher or a student in the environments of its tasks.

    python evaluate.py out/student --eval-episodes 100
    python evaluate.py out/teacher-hopper --target median --video
    python evaluate.py out/student --sweep      # return asked against return obtained

Prints, per task: mean and standard deviation of the return, normalised score, and a student's retention (its
score / its teacher's). Writes RUN/evaluation.json. The score is 100 (return - random) / (expert - random): of
D4RL's constants where there are any, else of the dataset's lowest and highest return.

Also used by teacher.py, distill.py, export.py, report.py and scripts of research/.
"""

import contextlib
import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import tyro
from numpy.typing import ArrayLike
from tqdm import tqdm

import data
import model as dt
from policy import Policy
from support import UserError, cli, environments, files, first_line, log, machine, spaces, training, verdict

SEED = 1000  # of the first evaluation episode; episode i has SEED + i
FRAME_INTERVAL = 4  # steps between the frames of a film
Retained = Literal["score", "success"]


@dataclasses.dataclass
class Config:
    run: Annotated[str, tyro.conf.Positional]  # a run directory of teacher.py or distill.py
    eval_episodes: int = 20  # evaluation episodes per task
    target: str = "default"  # return to ask for: a number, or default, median, p75, ... of the data's returns
    seed: int = SEED  # of the first episode; episode i has seed + i
    device: str = "auto"  # cpu, cuda, cuda:<number>, or auto
    retention: Retained = "score"  # what it is of; success: of the success rate, where a task reports one
    sweep: bool = False  # also ask for each of the data's quantiles: a table, and RUN/sweep.png
    imports: cli.Imports = ()  # packages to import, which register environments
    video: bool = False  # also film one episode of each task into RUN/<task>.gif


# ---- environments ----------------------------------------------------------------------------------------


def check(tasks: list[data.Task]) -> None:
    """Raise UserError, before hours of training, where a task's environment can't be made or does not fit."""
    for task in tasks:
        if task.env_id is None:
            continue
        make_env(task).close()


def make_env(task: data.Task, **kwargs: Any) -> gym.Env:
    """A task's environment, whose observations are vectors (O,) as those of the dataset are.

    kwargs: of gymnasium.make. Raises UserError where it can't be made or does not fit.
    """
    env = environments.make_env(task.env_id, task.env_kwargs, task.env_wrappers, **kwargs)
    check_spaces(env, task)
    return spaces.VectorObservation(env, task.obs_space) if task.obs_space else env


def check_spaces(env: gym.Env, task: data.Task) -> None:
    """Raise UserError where an environment's spaces are not those of the task's dataset."""
    name = f"environment {task.env_id} {task.env_kwargs}"
    ours = task.observed
    theirs = spaces.describe(env.observation_space, name)
    has_shape = env.action_space.shape is not None  # a Dict has none
    actions = environments.size(env.action_space) if has_shape else type(env.action_space).__name__
    choices = environments.choices(env.action_space) if has_shape else []
    if theirs != spaces.without_words(ours) or actions != task.act_dim or choices != task.choices:
        raise UserError(
            f"{name} has {spaces.summary(theirs)} observations and {actions} actions, dataset "
            f"{task.dataset} {spaces.summary(ours)} and {task.act_dim}: no evaluation there; "
            f"use --eval-episodes 0"
        )


def _make_envs(task, episodes, film):
    """An environment for each episode; the first one of a film renders."""
    envs = []
    for i in range(episodes):
        rendering = {"render_mode": "rgb_array"} if film and i == 0 else {}
        envs.append(make_env(task, max_episode_steps=task.max_steps, **rendering))
    return envs


# ---- episodes --------------------------------------------------------------------------------------------


class Episodes(NamedTuple):
    returns: np.ndarray  # (E,)
    frames: list[np.ndarray]  # of the first one
    success: np.ndarray | None  # (E, 2) bool: in any step, in the last one; None where none is reported


def rollout(
    model: dt.DecisionTransformer, task: data.Task, index: int, target: ArrayLike, episodes: int, seed: int
) -> Episodes:
    """A model's episodes in its index-th task; see `play`."""
    return play(Policy.of(model, task, index), task, target, episodes, seed)


def play(
    policy: Any, task: data.Task, target: ArrayLike, episodes: int, seed: int, film: bool = False
) -> Episodes:
    """E episodes as one batch, the i-th with seed + i.

    policy: a policy.Policy, or anything with its reset, act and keep. target: the return it is asked for, one
    number, or (E,) one of each episode. film: keep every FRAME_INTERVAL-th frame; else there are none.
    """
    with contextlib.nullcontext() if task.image else training.one_thread():  # a small model, a few rows
        return _play(policy, task, target, episodes, seed, film)


def _play(policy, task, target, episodes, seed, film):
    envs = _make_envs(task, episodes, film)
    action_shape = envs[0].action_space.shape
    policy.reset(target_return=target, episodes=episodes)
    observations = np.stack([np.reshape(env.reset(seed=seed + i)[0], -1) for i, env in enumerate(envs)])
    rewards = np.zeros(episodes)
    returns = np.zeros(episodes)
    success = np.zeros((episodes, 2), bool)
    reported = False
    running = np.arange(episodes)  # indices of the episodes that have not ended
    frames = []
    asked = " to ".join(f"{x:.0f}" for x in sorted({np.min(target), np.max(target)}))
    description = f"evaluate {task.name} at {asked}"
    for t in tqdm(range(task.max_steps), desc=description, unit="step", disable=None, leave=False):
        actions = policy.act(observations[running], rewards[running])
        goes_on = np.ones(len(running), bool)
        for j, (i, action) in enumerate(zip(running, actions, strict=True)):
            observation, rewards[i], terminated, truncated, info = envs[i].step(action.reshape(action_shape))
            observations[i] = np.reshape(observation, -1)
            returns[i] += rewards[i]
            succeeds = info.get("success", info.get("is_success"))
            reported |= succeeds is not None
            success[i] = success[i, 0] | bool(succeeds), bool(succeeds)
            goes_on[j] = not (terminated or truncated)
            if film and i == 0 and t % FRAME_INTERVAL == 0:
                frames.append(envs[0].render())
        if not goes_on.all():
            running = running[goes_on]
            policy.keep(goes_on)
        if not len(running):
            break
    for env in envs:
        env.close()
    return Episodes(returns, frames, success if reported else None)


def measured(
    policy: Any,
    task: data.Task,
    target: ArrayLike,
    episodes: int,
    seed: int,
    teacher: dict[str, Any] | None = None,
    retention: Retained = "score",
) -> dict[str, Any]:
    """The metrics of E episodes: see `play` and `scores`.

    retention: "success": of the success rate in any step, where the task reports one; `retention_of` says so.
    """
    found = play(policy, task, target, episodes, seed)
    metrics = {**scores(found.returns, task, teacher), **success_rates(found.success)}
    if retention == "success" and teacher and "success_rate" in metrics:
        of_teacher = teacher.get("success_rate")
        metrics["retention"] = metrics["success_rate"] / of_teacher if of_teacher else None
        metrics["retention_of"] = "success"
    return metrics


def success_rates(success: np.ndarray | None) -> dict[str, float]:
    """Shares of the episodes (E, 2) that succeed in any step and in the last; {} where none is reported."""
    if success is None:
        return {}
    return dict(zip(("success_rate", "success_at_end"), success.mean(0).tolist(), strict=True))


def scores(returns: np.ndarray, task: data.Task, teacher: dict[str, Any] | None = None) -> dict[str, float]:
    """The metrics of a task's returns (E,); with those of its teacher, if that has a score, retention too."""
    low, high = task.reference
    mean = float(returns.mean())
    metrics = {
        "return_mean": mean,
        "return_std": float(returns.std()),
        "episodes": len(returns),
        "normalized_score": 100 * (mean - low) / (high - low),
    }
    if teacher and teacher.get("normalized_score"):
        metrics["retention"] = metrics["normalized_score"] / teacher["normalized_score"]
    return metrics


def sweep(policy: Any, task: data.Task, episodes: int, seed: int) -> list[dict[str, Any]]:
    """Return asked against return obtained: the scores at each of the task's named targets, lowest first.

    policy: see `play`. episodes: of each target. All of them are one batch, whose first episode has `seed`.
    """
    names = sorted(task.targets, key=task.targets.get)
    targets = np.repeat([task.targets[name] for name in names], episodes)
    found = play(policy, task, targets, len(targets), seed)
    rows = []
    for i, name in enumerate(names):
        own = slice(i * episodes, (i + 1) * episodes)
        row = {"name": name, "target": task.targets[name], **scores(found.returns[own], task)}
        success = None if found.success is None else found.success[own]
        rows.append({**row, **success_rates(success)})
    return rows


def target_gap(
    sweep: list[dict[str, Any]] | None, of_data: dict[str, float] | None, task: data.Task
) -> float | None:
    """How far returns are from what was asked: the mean of |return - target| over data.QUANTILES.

    As a share of the range from a random policy's return to the data's highest; of_data: Dataset.facts. None
    where nothing was evaluated.
    """
    if not sweep or not of_data:
        return None
    gaps = [abs(row["return_mean"] - row["target"]) for row in sweep if row["name"] in data.QUANTILES]
    low = min(of_data["return_min"], task.reference[0])
    return float(np.mean(gaps)) / max(of_data["return_max"] - low, 1e-9)


def sweep_episodes(eval_episodes: int) -> int:
    """Of each target, in the evaluation that follows a training: few, so that it stays short."""
    return max(1, eval_episodes // 4)


def film(
    model: dt.DecisionTransformer,
    task: data.Task,
    index: int,
    target: float,
    seed: int,
    file: Path | BinaryIO,
    width: int = 320,
    **options: Any,
) -> float:
    """Save one episode as an animated picture in `file`, and return its return.

    width: pixels. options: of pillow's Image.save. Raises UserError where rendering does not work.
    """
    from PIL import Image

    if not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ) and sys.platform == "linux":
        # MuJoCo would try GLFW first, which needs a display, and what it tries next can crash
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        returns, frames, _ = play(Policy.of(model, task, index), task, target, 1, seed, film=True)
        pictures = []
        for frame in frames:
            picture = Image.fromarray(frame)
            pictures.append(picture.resize((width, width * picture.height // picture.width)))
    except UserError:
        raise
    except Exception as e:  # noqa: BLE001 - no display, EGL or GL library: each platform fails in its own way
        reason = f"{type(e).__name__}: {first_line(e)}"
        raise UserError(
            f"no film of {task.name}: rendering does not work here ({reason}); try MUJOCO_GL=egl or osmesa"
        ) from None
    pictures[0].save(file, save_all=True, append_images=pictures[1:], duration=40, loop=0, **options)
    return returns[0]


# ---- the command -----------------------------------------------------------------------------------------


def main(cfg: Config) -> None:
    cli.at_least(cfg, eval_episodes=1, seed=0)
    machine.check_device(cfg.device)
    environments.import_packages(cfg.imports)
    model, meta = dt.load(cfg.run, machine.device(cfg))
    rows = []
    metrics = {}
    judged = {}  # what a verdict judges, of the tasks that are asked for their default target
    of_run = (files.read_json(Path(cfg.run) / "metrics.json") or {}).get("tasks", {})
    for index, task in enumerate(data.tasks(meta, cfg.run)):
        target = _target(cfg, task)
        if task.env_id is None:
            print(f"{task.name}: its dataset names no environment, nothing to evaluate in")
            continue
        teachers = meta.get("teachers", {}) if target == task.target else {}  # their scores are of that
        policy = Policy.of(model, task, index)
        options = (cfg.eval_episodes, cfg.seed, teachers.get(task.name), cfg.retention)
        of_task = measured(policy, task, target, *options)
        metrics[task.name] = {"target": target, **of_task}
        rows.append(_row(task.name, metrics[task.name]))
        if cfg.sweep:
            metrics[task.name]["sweep"] = sweep(policy, task, cfg.eval_episodes, cfg.seed)
        if target == task.target:
            judged[task.name] = {**of_run.get(task.name, {}), **metrics[task.name]}
        if cfg.video:
            _film_into_run(cfg, model, task, index, target)
    if rows:
        print(log.table(rows))
        rates = [of_task["success_rate"] for of_task in metrics.values() if "success_rate" in of_task]
        if len(rates) > 1:
            print(f"success rate: mean of {len(rates)} tasks {np.mean(rates):.3f}")
        if cfg.sweep:
            _print_and_draw_sweeps(cfg, meta, metrics)
        for line in verdict.lines(data.tasks(meta, cfg.run), judged, meta.get("teachers")):
            print(line)
        evaluation = {"eval_episodes": cfg.eval_episodes, "seed": cfg.seed, "tasks": metrics}
        files.write_json(Path(cfg.run) / "evaluation.json", evaluation)


def _target(cfg, task):
    """--target as a return of this task."""
    named = {"default": task.target, **task.targets}
    if cfg.target in named:
        return named[cfg.target]
    try:
        return float(cfg.target)
    except ValueError:
        raise UserError(f"--target {cfg.target}: must be {', '.join(named)} or a number") from None


def _row(name, metrics):
    """A task's metrics as a row of the printed table."""
    row = {
        "task": name,
        "target": metrics["target"],
        "return": metrics["return_mean"],
        "std": metrics["return_std"],
        "score": metrics["normalized_score"],
    }
    columns = {"retention": "retention", "success": "success_rate", "success at end": "success_at_end"}
    return row | {column: metrics[key] for column, key in columns.items() if key in metrics}


def _print_and_draw_sweeps(cfg, meta, metrics):
    """The sweeps of the tasks in metrics, and those of a student's teachers where their runs have any."""
    import report  # it imports this module

    teachers = meta.get("teachers", {})
    of_teachers = {name: teachers[name]["sweep"] for name in metrics if teachers.get(name, {}).get("sweep")}
    rows = []
    for name, of_task in metrics.items():
        obtained = {row["name"]: row["return_mean"] for row in of_teachers.get(name, [])}
        for row in of_task["sweep"]:
            columns = {"task": name, "quantile": row["name"], **_row(name, row)}
            rows.append(columns | ({"teacher's return": obtained.get(row["name"])} if obtained else {}))
    print(log.table(rows))
    sweeps = {"teacher": of_teachers} if of_teachers else {}
    sweeps["student" if teachers else "teacher"] = {name: m["sweep"] for name, m in metrics.items()}
    references = {task["name"]: task["reference"] for task in meta["tasks"] if task["name"] in metrics}
    fig, (ax,) = report.figure(1, 1, (6, 4.5))
    report.draw_sweep(ax, references, sweeps)
    path = Path(cfg.run) / "sweep.png"
    report.finish(fig, path, dpi=150)
    print(f"return asked against return obtained: {path}")


def _film_into_run(cfg, model, task, index, target):
    path = Path(cfg.run) / f"{task.name.replace('/', '-')}.gif"
    try:
        film(model, task, index, target, cfg.seed, path)
        print(f"film of {task.name} in {path}")
    except UserError as e:
        print(e)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)

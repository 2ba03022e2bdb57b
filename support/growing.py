"""A finished student takes more tasks: distill.py --student."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

import data
import model as dt
from support import UserError, files

NAMES = ("envs", "datasets", "teachers", "student_datasets")  # options that name tasks, in their order
SIZES = ("n_layer", "n_head", "n_embd", "tokens", "share")
OF_TASKS = ("embed_state", "embed_action", "embed_rtg", "embed_task", "encoders", "head")  # not of the trunk


def with_its_tasks(cfg: Any) -> Any:
    """distill.Config with the sizes and, before its own, the tasks of the student that cfg.student names.

    Raises UserError where that is no finished student, or where tasks are named in different ways.
    """
    path = Path(cfg.student)
    old = files.read_json(path / "config.json")
    if old is None or "curriculum" not in old or files.read_json(path / "metrics.json") is None:
        raise UserError(f"--student {path}: no finished student is there; train it with distill.py first")
    given = {name: tuple(getattr(cfg, name)) for name in NAMES}
    if not any(given.values()):
        raise UserError(f"--student {path}: name the tasks to add, with --envs, --datasets or --teachers")
    theirs = {name: tuple(old.get(name, ())) for name in NAMES}
    if not any(theirs.values()):
        theirs["envs"] = data.DEFAULT_ENVS
    for name in ("teachers", "student_datasets"):
        if bool(given[name]) != bool(theirs[name]):
            with_it, without = (path, "the new tasks") if theirs[name] else ("the new tasks", path)
            option = "--" + name.replace("_", "-")
            raise UserError(f"--student: {with_it} with {option}, {without} without; use it for both")
    return dataclasses.replace(
        cfg,
        **{name: theirs[name] + given[name] for name in NAMES},
        **{name: old[name] for name in SIZES if name in old},
    )


@torch.no_grad()
def take_over(student: dt.DecisionTransformer, tasks: list[data.Task], path: Path | str) -> None:
    """Give a new student, of these tasks, the weights of the one in `path`; those of other tasks stay new.

    Raises UserError where a task, or its teacher's context, is not what it was then.
    """
    old, meta = dt.load(path, student.head.weight.device)
    if old.cfg.context != student.cfg.context:
        raise UserError(
            f"--student {path} has a context of {old.cfg.context} timesteps, its teachers have one of "
            f"{student.cfg.context} by now: distil all tasks anew"
        )
    trunk = student.state_dict()
    for name, p in old.named_parameters():
        if not name.startswith(OF_TASKS):
            trunk[name].copy_(p)
    for encoder in old.encoders:
        same = next(e for e in student.encoders if e.image == encoder.image)
        same.load_state_dict(encoder.state_dict())
    now = {task.name: (j, task) for j, task in enumerate(tasks)}
    for i, task in enumerate(data.tasks(meta, path)):
        j, same = now.get(task.name, (0, None))
        if same is None or json.dumps(dataclasses.asdict(same)) != json.dumps(dataclasses.asdict(task)):
            raise UserError(
                f"--student {path}: the teacher of {task.name} has been trained anew since, on other data; "
                f"distil all tasks anew"
            )
        _take_over_task(student, j, old, i, task)


def _take_over_task(new, j, old, i, task):
    """Embeddings and head of task i of `old` become those of task j of `new`, of other padded widths."""
    h = new.cfg.groups[j]
    g = old.cfg.groups[i]
    if old.encoders:
        new.embed_state.weight[h, : new.n_features] = old.embed_state.weight[g, : old.n_features]
    of_states = slice(new.n_features, new.n_features + task.obs_dim)
    new.embed_state.weight[h, of_states] = old.embed_state.weight[g, old.n_features :][: task.obs_dim]
    new.embed_action.weight[h, : task.act_dim] = old.embed_action.weight[g, : task.act_dim]
    new.embed_rtg.weight[h] = old.embed_rtg.weight[g]
    for name in ("embed_state", "embed_action", "embed_rtg"):
        getattr(new, name).bias[h] = getattr(old, name).bias[g]
    for name in ("weight", "bias"):  # (..., 2A): means, then log_stds
        ours = getattr(new.head, name)[h].unflatten(-1, (2, -1))
        ours[..., : task.act_dim] = getattr(old.head, name)[g].unflatten(-1, (2, -1))[..., : task.act_dim]
    if new.cfg.shares and old.cfg.shares:
        new.embed_task.weight[j] = old.embed_task.weight[i]

"""support/growing.py: a new student says of the old tasks what the old one said, whatever else it gets."""

import dataclasses

import pytest
import torch

import data
import model as dt
from support import UserError, growing

SIZES = {"n_layer": 1, "n_head": 1, "n_embd": 16, "context": 4}
OBS = (3, 5, 5)
ACT = (2, 1, 1)


def task(i: int, **fields) -> data.Task:
    return data.Task(
        name=f"task{i}", dataset=f"tests/{i}-v0", env_id=None, env_kwargs={}, max_steps=10, obs_dim=OBS[i],
        act_dim=ACT[i], obs_mean=[0.0] * OBS[i], obs_std=[1.0] * OBS[i], act_low=[-1.0] * ACT[i],
        act_high=[1.0] * ACT[i], rtg_scale=1.0, targets={"p95": 1.0}, reference=(0.0, 1.0),
        reference_source="", split_seed=0, **fields,
    )  # fmt: skip


def student(tasks: list[data.Task], seed: int, groups: tuple[int, ...] = ()) -> dt.DecisionTransformer:
    torch.manual_seed(seed)
    return dt.DecisionTransformer(dt.ModelConfig.of(tasks, **SIZES, groups=groups)).eval()


def said(model: dt.DecisionTransformer, i: int, of: data.Task) -> torch.Tensor:
    """What a student says of its task i in some windows."""
    generator = torch.Generator().manual_seed(of.obs_dim)
    x = [torch.randn(6, 4, n, generator=generator) for n in (of.obs_dim, of.act_dim, 1)]
    timesteps = torch.arange(4).repeat(6, 1)
    with torch.no_grad():
        return torch.stack(model(i, x[0], x[1], x[2][..., 0], timesteps, torch.ones(6, 4, dtype=bool)))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("before", [(0,), (1,), (1, 2)])
def test_take_over__keeps_what_was_said_of_the_old_tasks(tmp_path, order, before):
    """Also where the new tasks are wider, and stand before them."""
    old = student([task(i) for i in before], seed=1)
    dt.save(tmp_path, old, {"tasks": [dataclasses.asdict(task(i)) for i in before]})
    tasks = [task(i) for i in order]
    new = student(tasks, seed=2)
    assert not torch.allclose(
        said(new, order.index(before[0]), task(before[0])), said(old, 0, task(before[0]))
    )
    growing.take_over(new, tasks, tmp_path)
    for k, i in enumerate(before):
        assert torch.allclose(said(new, order.index(i), task(i)), said(old, k, task(i)), atol=1e-6)


def test_take_over__keeps_it_where_tasks_share_a_head(tmp_path):
    old = student([task(1), task(2)], seed=1, groups=(0, 0))
    dt.save(tmp_path, old, {"tasks": [dataclasses.asdict(task(i)) for i in (1, 2)]})
    tasks = [task(0), task(1), task(2)]
    new = student(tasks, seed=2, groups=(0, 1, 1))
    growing.take_over(new, tasks, tmp_path)
    for k, i in enumerate((1, 2)):
        assert torch.allclose(said(new, i, task(i)), said(old, k, task(i)), atol=1e-6)


def test_take_over__refuses_a_task_that_is_another_by_now(tmp_path):
    dt.save(tmp_path, student([task(0)], seed=1), {"tasks": [dataclasses.asdict(task(0))]})
    now = [task(0, first_action=None), task(1)]
    now[0].obs_mean = [0.5] * 3
    for tasks in (now, now[1:]):
        with pytest.raises(UserError, match="teacher of task0 has been trained anew since, on other data"):
            growing.take_over(student(tasks, seed=2), tasks, tmp_path)


def test_take_over__refuses_another_context(tmp_path):
    dt.save(tmp_path, student([task(0)], seed=1), {"tasks": [dataclasses.asdict(task(0))]})
    tasks = [task(0), task(1)]
    longer = dt.DecisionTransformer(dt.ModelConfig.of(tasks, **{**SIZES, "context": 8}))
    with pytest.raises(UserError, match="has a context of 4 timesteps, its teachers have one of 8 by now"):
        growing.take_over(longer, tasks, tmp_path)

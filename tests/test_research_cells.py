"""research/cells.py: what is in a cell, how runs share the batch among them, rows of tiny students."""

import csv
import json

import gymnasium as gym
import numpy as np
import pytest
import torch

import curriculum
import data
from conftest import make_dataset
from research import cells


@pytest.fixture
def run(tiny_case, tmp_path, monkeypatch):
    """A function that runs the script on two tiny tasks of one environment; all rows so far, by run."""
    tiny_case(2, spec=gym.make("Pendulum-v1").spec, act_dim=1, eval_episodes=1)
    monkeypatch.setattr(cells, "ROWS", tmp_path / "cells.csv")

    def main(**options):
        cells.main(cells.Config(seeds=(0,), steps=30, episodes=1, **options))
        with open(tmp_path / "cells.csv") as f:
            return {row["run"]: row for row in csv.DictReader(f)}

    return main


def test_cells_of__part_the_episodes_by_their_returns():
    name = "tests/cells-c-v0"
    make_dataset(name, [9, 12, 5] * 20, seed=2)
    dataset = data.load(name)
    parts = cells.cells_of(dataset)
    for part in ("train", "held_out"):
        tables = [getattr(p, part) for p in parts]
        assert sum(map(len, tables)) == len(getattr(dataset, part))
        returns = [t[data.first_rows(t), -2] for t in tables]
        assert returns[0].max() <= returns[1].min()
        assert returns[1].max() <= returns[2].min()
    whole = dataset.train
    assert len(parts[2].train) == data.best_rows(data.first_rows(whole), len(whole))
    assert abs(len(parts[0].train) / len(whole) - 0.5) < 12 / len(whole)


def test_curriculum__gives_the_best_what_top_gives_them(run):
    run(runs=("uniform",))
    case = cells.Case(cells.Config(steps=30))
    best = case.uniform[0, 2].item()
    d = torch.tensor([1.0, 2, 3, 2, 4, 6])
    generator = torch.Generator()

    def of(name):
        return case.curriculum(name)(d, 0, d, generator).view(2, 3)

    assert torch.allclose(of("uniform"), case.uniform / 2)
    assert torch.allclose(of("top")[:, 2], torch.full((2,), (0.5 + 0.5 * best) / 2))
    assert torch.allclose(of("top").sum(1), torch.full((2,), 0.5))
    by_teacher = of("novelty, top")
    assert torch.allclose(by_teacher / by_teacher.sum(1, keepdim=True), case.top)
    kl = (d.view(2, 3) * case.top).sum(1)
    assert torch.allclose(by_teacher.sum(1), curriculum.novelty(kl, 0, kl, generator))
    assert torch.allclose(of("cells 1").flatten(), curriculum.novelty(d, 0, d, generator, power=1.0))


def test_main__evaluates_students_that_know_no_cell(run, tmp_path):
    rows = run(runs=("uniform", "cells 2"))
    for row in rows.values():
        assert np.array(json.loads(row["kl"])).shape == (6,)
        assert abs(sum(json.loads(row["shares"])) - 1) < 1e-3
        assert len(json.loads(row["retention"])) == len(json.loads(row["gap"])) == 2
    assert rows["uniform"]["shares"] != rows["cells 2"]["shares"]
    before = (tmp_path / "cells.csv").read_bytes()
    run(runs=("uniform",))
    assert (tmp_path / "cells.csv").read_bytes() == before
    assert cells.tables(list(rows.values())).count("\n") == 3
    case = cells.Case(cells.Config(steps=3))
    seen = []
    original = cells.evaluate.measured
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells.evaluate, "measured", lambda p, *args: seen.append(p) or original(p, *args))
        cells.student(case, "top", 0, 1)
    assert all((p.model.embed_task.weight == 0).all() for p in seen)

"""research/streaming.py: who gets the batch, what is left of old tasks, and rows of tiny streams."""

import csv
import json

import numpy as np
import pytest
import torch

import curriculum
from research import learners, streaming, study


@pytest.fixture
def run(tiny_case, tmp_path, monkeypatch):
    """A function that runs the script on three tiny tasks; all rows so far, by run."""
    tiny_case(3)
    monkeypatch.setattr(streaming, "ROWS", tmp_path / "streaming.csv")

    def main(**options):
        streaming.main(streaming.Config(seeds=(0,), steps=20, memory=4, **options))
        with open(tmp_path / "streaming.csv") as f:
            return {row["run"]: row for row in csv.DictReader(f)}

    return main


@pytest.fixture
def case(run):
    run(runs=("equal",))
    return study.Case(study.Config(case="builtin", steps=20))


def test_over_arrived__gives_nothing_to_those_that_are_not_there():
    d = torch.tensor([9.0, 1.0, 2.0, 4.0])
    s = torch.full((4,), 0.25)
    for name, choose in streaming.CURRICULA.items():
        x = streaming.over_arrived(choose, [3, 1])(d, torch.tensor(0), s, torch.Generator())
        assert x[0] == x[2] == 0, name
        assert abs(x.sum() - 1) < 1e-6, name
    novelty = streaming.over_arrived(curriculum.novelty, [3, 1])(d, 0, s, None)
    assert torch.allclose(novelty[[3, 1]], curriculum.novelty(torch.tensor([4.0, 1.0]), 0, s[:2], None))
    newest = streaming.over_arrived(streaming.CURRICULA["newest"], [3, 1, 0])(d, 0, s, None)
    assert newest.tolist() == [0.5, 0.25, 0.0, 0.25]


def test_memory__shows_old_tasks_by_the_windows_that_were_kept(case):
    w = case.windows
    equal = torch.full((3,), 1 / 3)
    kept = w.sample(6, equal, torch.Generator().manual_seed(1))
    memory = streaming.Memory(w, kept, [0, 2])
    batch = memory.sample(90, equal, torch.Generator().manual_seed(2))
    assert batch.task.bincount().tolist() == [30, 30, 30]
    for i in (0, 2):
        own = batch.task == i
        of_kept = kept.rows[kept.task == i].tolist()
        assert all(rows in of_kept for rows in batch.rows[own].tolist())
    assert len(set(map(tuple, batch.rows[batch.task == 1].tolist()))) > 10
    for x, rows in zip(batch.targets[0], batch.rows, strict=True):  # each window's fields are of one
        j = (
            [r.tolist() for r in kept.rows].index(rows.tolist())
            if rows.tolist() in kept.rows.tolist()
            else -1
        )
        assert j < 0 or torch.equal(x, kept.targets[0, j]) or int(kept.task[j]) == 1


def test_a_gem__leaves_nothing_against_the_memory(case, monkeypatch):
    references = []
    descended = []
    cfg = study.dataclasses.replace(case.cfg, curriculum="all", surgery="previous", seed=0)
    student, generator = streaming.distill.make_student(cfg, case.tasks, case.models)
    kept = case.windows.sample(12, torch.full((3,), 1 / 3), torch.Generator().manual_seed(1))
    memory = streaming.Memory(case.windows, kept, [0, 1])
    learner = learners.AGem([0, 1], cfg, student, case.models, memory, generator)
    learner.choose = streaming.over_arrived(streaming.CURRICULA["alone"], [0, 1, 2])
    step = streaming.distill.surgery.step
    monkeypatch.setattr(
        learner, "gradient", lambda losses: learner.theta.grad.normal_()
    )  # as it does, in place

    def spied(name, theta, g, u, *args, **options):
        references.append((u.clone(), g.clone()))
        stats = step(name, theta, g, u, *args, **options)
        descended.append(u.clone())  # what surgery leaves there: the gradient that was descended
        return stats

    monkeypatch.setattr(streaming.distill.surgery, "step", spied)
    for i in range(20):
        learner.step(i)
    conflicts = [float(u @ g) < 0 for u, g in references]
    assert 0 < sum(conflicts) < 20
    for (u, g), after in zip(references, descended, strict=True):
        assert u.norm() > 0
        assert u @ after >= -1e-4 * u.norm() * g.norm()


def test_measures__of_a_stream_made_by_hand():
    kls = np.array([[4.0, 9, 9], [2, 9, 9], [1, 6, 9], [1, 4, 9], [3, 4, 6], [2, 8, 2]])  # two points a phase
    found = streaming.measures(kls)
    assert found["worst"] == np.mean([4, 2, 6, 4, 6, 8])
    assert found["mean"] == pytest.approx(np.mean([4, 2, 3.5, 2.5, 13 / 3, 4]))
    assert found["last worst"] == 8
    assert found["newest"] == pytest.approx(np.sqrt(4 * 2))
    assert found["forgetting"] == pytest.approx(np.sqrt(2 / 2 * 8 / 4))


def test_main__adds_a_row_a_stream_and_makes_none_twice(run, tmp_path):
    rows = run(runs=("equal", "alone", "novelty 2, memory", "alone, a-gem", "alone, previous"))
    for row in rows.values():
        kls = np.array(json.loads(row["kl"]))
        assert kls.shape == (30, 3)
        assert kls[9, 0] < kls[0, 0]  # the first is learnt in its phase
    untouched = np.array(json.loads(rows["equal"]["kl"]))[:10, 2]
    assert untouched.std() < 0.3 * untouched.mean()  # the last isn't, but what moves is the trunk
    before = (tmp_path / "streaming.csv").read_bytes()
    run(runs=("alone",))
    assert (tmp_path / "streaming.csv").read_bytes() == before
    assert streaming.tables(list(rows.values())).count("\n") == 6

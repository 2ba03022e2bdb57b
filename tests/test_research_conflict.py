"""research/conflict.py: gradients of known cosines, and rows of tiny students."""

import csv
import json

import pytest
import torch

from research import conflict, study


def test_compared__finds_opposed_gradients_and_what_their_mean_raises():
    g = torch.tensor([[3.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    found = conflict.compared(g, 2 * g)
    lowest, _, median, _ = json.loads(found["cosine"])
    assert (found["pairs"], lowest, median) == (3, -1.0, 0.0)
    assert found["below 0"] == round(1 / 3, 4)
    assert found["raised"] == round(1 / 3, 4)  # the second's
    assert found["alike"] == 1


def test_compared__says_how_much_noise_hides():
    """Of equal parts of signal and noise sets are alike by 1/2, two together by 2/3."""
    generator = torch.Generator().manual_seed(0)
    signal, *noise = torch.randn(3, 9, 4000, generator=generator)
    found = conflict.compared(signal + noise[0], signal + noise[1])
    assert abs(found["alike"] - 2 / 3) < 0.02


@pytest.fixture
def rows(tiny_case, tmp_path, monkeypatch):
    """A function that runs the script on three tiny tasks of the same spaces; all rows so far."""
    tiny_case(3)
    tiny_case(3, "opposed", share=True)
    monkeypatch.setattr(conflict, "ROWS", tmp_path / "conflict.csv")

    def run(**options):
        conflict.main(conflict.Config(seeds=(0,), steps=100, windows=8, **options))
        with open(tmp_path / "conflict.csv") as f:
            return list(csv.DictReader(f))

    return run


def test_main__measures_the_layers_that_teachers_share(rows, tmp_path):
    own = rows()
    assert [row["updates"] for row in own] == ["1", "10", "50", "100"]
    assert {row["layer"] for row in own} == {"block 1"}
    before = (tmp_path / "conflict.csv").read_bytes()
    rows()
    assert (tmp_path / "conflict.csv").read_bytes() == before
    shared = rows(case="opposed")[len(own) :]
    assert [row["layer"] for row in shared[:3]] == ["embeddings", "block 1", "head"]
    assert {row["pairs"] for row in shared} == {"3"}
    text = conflict.tables(own + shared)
    assert text.count("\n") == 1 + len(own) + len(shared)


def test_gradients__of_a_teacher_are_of_its_own_windows(rows, monkeypatch):
    """The sum of all teachers' is what backward gives for the sum of their KLs on the same windows."""
    rows()
    case = study.Case(study.Config(case="builtin", steps=100))
    student, generator = conflict.distill.make_student(case.cfg, case.tasks, case.models)
    learner = conflict.distill.Learner(case.cfg, student, case.models, case.windows, generator)
    n = 8
    found = conflict.gradients(learner, n, torch.Generator().manual_seed(0))["block 1"]
    generator = torch.Generator().manual_seed(0)
    batches = [learner.windows.sample(n, share, generator) for share in torch.eye(3)]
    total = sum(learner.distance(b, learner.targets(b)).sum() for b in batches)
    names = [name for name in conflict.dt.flat_order(student) if name.startswith("blocks")]
    g = torch.autograd.grad(total, [student.get_parameter(name) for name in names])
    assert torch.allclose(found.sum(0), torch.cat([x.flatten() for x in g]), atol=1e-5)

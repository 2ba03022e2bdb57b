"""teacher.py: the update against one written out, whole runs in this process, bad input."""

from pathlib import Path

import numpy as np
import pytest
import torch

import data
import model as dt
import teacher
from conftest import make_dataset
from support import UserError, files

NAME = "tests/teacher-v0"
TINY = {"n_embd": 16, "context": 6, "log_interval": 10, "eval_episodes": 0, "device": "cpu"}


@pytest.fixture(scope="module", autouse=True)
def dataset():
    make_dataset(NAME, [9, 1, 23, 4, 12, 7])


@pytest.fixture
def one_thread():
    """Sums of several threads may differ in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(out: Path, **options) -> dict[str, np.ndarray]:
    """Run teacher.main; the run's log."""
    teacher.main(teacher.Config(dataset=NAME, out_dir=str(out), **{**TINY, **options}))
    return files.read_csv(out / "log.csv")


def test_main__lowers_the_held_out_nll(tmp_path):
    log = trained(tmp_path, steps=60, batch_size=16, n_layer=1)
    assert log["step"].tolist() == [10, 20, 30, 40, 50, 60]
    assert log["heldout_nll"][-1] < log["heldout_nll"][0] - 0.1


def test_main__without_muon_is_plain_adamw_on_the_nll(tmp_path):
    """Ten steps of an independent loop, parameter by parameter, give the same teacher."""
    clip = 30.0  # the norms lie on both sides of it: AdamW alone would not see their scale
    options = {"optimizer": "adamw", "lr": 4e-3, "dtype": "float32"}
    trained(tmp_path, steps=10, warmup=5, grad_clip=clip, **options)
    got, _ = dt.load(tmp_path)
    d = data.load(NAME)
    w = data.Windows([d.train], [d.task], 6, top=teacher.Config.top)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = dt.DecisionTransformer(got.cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=1e-4)
    norms = []
    for step in range(10):
        batch = w.sample(teacher.Config.batch_size, torch.ones(1), generator)
        mean, log_std = model(0, *batch[1:6])
        nll = -torch.distributions.Normal(mean, log_std.exp()).log_prob(batch.actions)[batch.mask].mean()
        optimizer.zero_grad()
        nll.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.param_groups[0]["lr"] = 4e-3 * min((step + 1) / 5, (10 - step) / 5)
        optimizer.step()
    assert min(norms) < clip < max(norms)
    for (name, p), q in zip(model.named_parameters(), got.parameters(), strict=True):
        if "qkv.bias" not in name:  # the keys' bias has no gradient but rounding, which AdamW enlarges
            assert torch.allclose(p, q, atol=1e-4), f"{name}: {(p - q).abs().max()}"


@pytest.mark.usefixtures("one_thread")
def test_main__gives_the_same_teacher_to_the_bit_for_the_same_seed(tmp_path):
    first = trained(tmp_path / "first", steps=20, dropout=0.1)
    again = trained(tmp_path / "again", steps=20, dropout=0.1)
    for column in first.keys() - {"seconds"}:
        assert np.array_equal(first[column], again[column]), column
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("first", "again")]
    assert weights[0] == weights[1]


def test_main__stops_at_a_nan_and_keeps_the_last_good_model(tmp_path, monkeypatch):
    gaussian_nll = dt.gaussian_nll
    calls = []

    def breaks(*args):
        calls.append(1)
        return gaussian_nll(*args) * (float("nan") if len(calls) == 7 else 1)

    monkeypatch.setattr(dt, "gaussian_nll", breaks)
    with pytest.raises(UserError, match=f"loss nan.* in step 7 of teacher {NAME}.*kept in"):
        trained(tmp_path, steps=20)
    assert all(p.isfinite().all() for p in dt.load(tmp_path)[0].parameters())


def test_main__cautions_where_nothing_was_evaluated(tmp_path, capsys):
    trained(tmp_path, steps=20)
    metrics = files.read_json(tmp_path / "metrics.json")["tasks"][NAME]
    task = data.load(NAME).task
    assert metrics["data"]["episodes"] == 5
    assert metrics["data"]["steps"] == len(data.load(NAME).train)
    assert metrics["data"]["return_min"] <= task.targets["p10"] <= task.targets["p95"]
    assert metrics["data"]["return_max"] >= task.targets["p95"]
    assert metrics["heldout_nll_rise"] >= -1e-5
    assert -4 < metrics["heldout_log_std"] < 0
    assert metrics["flags"] == ["few-data"]
    assert f"{NAME}, teacher: not evaluated, caution: few-data (5 episodes of " in capsys.readouterr().out


IMPOSSIBLE = [
    ("steps", 0),
    ("steps", -3),
    ("batch_size", 0),
    ("n_embd", -1),
    ("lr", -1.0),
    ("eval_episodes", -1),
    ("lr", float("nan")),
]


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_check__names_a_value_that_can_not_be(name, value, tmp_path):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value}: must be"):
        teacher.main(teacher.Config(out_dir=str(tmp_path / "x"), **{name: value}))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_embd": 48, "n_head": 5}, "--n-embd 48: must be a multiple of --n-head 5"),
        ({"dropout": 1.0}, "--dropout 1.0: must be below 1"),
        ({"context": 1025}, "--context 1025: must be at most 1024"),
        ({"env": "hoper"}, "unknown env 'hoper'"),
    ],
    ids=str,
)
def test_check__names_options_that_do_not_fit(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        teacher.main(teacher.Config(out_dir=str(tmp_path / "x"), **options))
    assert not (tmp_path / "x").exists()

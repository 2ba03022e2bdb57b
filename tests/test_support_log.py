"""support/log.py: log.csv, also on a full disk; TensorBoard and Weights & Biases; tables, progress lines."""

import sys
from pathlib import Path
from types import SimpleNamespace

import minari
import numpy as np
import pytest

import teacher
from conftest import make_dataset
from support import UserError, cli, files, log

DATASET = "tests/tracked-v0"
TINY = {"batch_size": 4, "device": "cpu", "eval_episodes": 0, "log_interval": 5, "n_embd": 8, "n_layer": 1}


# ---- log.csv -----------------------------------------------------------------------------------------------


def test_log__reads_back_as_it_was_written(tmp_path):
    csv = log.Log(tmp_path / "log.csv")
    csv.row(step=1, loss=0.1234567, heldout=2.0)
    csv.row(step=2, loss=1e-9, heldout=None)
    csv.flush()
    columns = files.read_csv(tmp_path / "log.csv")
    assert list(columns) == ["step", "loss", "heldout"]
    np.testing.assert_array_equal(columns["step"], [1, 2])
    np.testing.assert_allclose(columns["loss"], [0.1234567, 1e-9])
    np.testing.assert_array_equal(columns["heldout"], [2, np.nan])


def test_log__goes_on_after_the_bytes_of_its_checkpoint(tmp_path):
    path = tmp_path / "log.csv"
    csv = log.Log(path)
    csv.row(step=1)
    csv.flush()
    csv.row(step=2)
    size = csv.size
    csv.flush()
    csv = log.Log(path, size)  # a checkpoint that knows of the first row alone
    csv.row(step=3)
    csv.flush()
    assert path.read_text().split() == ["step", "1", "3"]
    with pytest.raises(UserError, match="shorter than its checkpoint says; --overwrite"):
        log.Log(path, path.stat().st_size + 1)


def test_log__begins_again_where_the_file_was_removed_during_the_run(tmp_path):
    path = tmp_path / "log.csv"
    csv = log.Log(path)
    csv.row(step=1)
    csv.flush()
    path.unlink()
    csv.row(step=2)
    csv.flush()
    assert path.read_text().split() == ["step", "2"]


def test_rows__wait_while_the_disk_is_full(tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    csv = log.Log(tmp_path / "log.csv")
    csv.row(a=1)
    csv.flush()
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", full)
        for i in (2, 3):
            csv.row(a=i)
            csv.flush()
    assert capsys.readouterr().err.count("its rows wait for room") == 1
    csv.row(a=4)
    csv.flush()
    assert (tmp_path / "log.csv").read_text().split() == ["a", "1", "2", "3", "4"]


# ---- trackers ----------------------------------------------------------------------------------------------


def train(path: Path, **options) -> dict[str, np.ndarray]:
    """Train a teacher for four log intervals; its log."""
    if DATASET not in minari.list_local_datasets():
        make_dataset(DATASET, [9, 12, 7], spec=None)
    teacher.main(teacher.Config(dataset=DATASET, steps=20, context=4, out_dir=str(path), **TINY, **options))
    return files.read_csv(path / "log.csv")


def test_tensorboard__shows_what_the_log_holds(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path, tensorboard=True, seed=1)
    rows = train(tmp_path, tensorboard=True, overwrite=True)  # replaces what was there
    events = reader.EventAccumulator(str(tmp_path)).Reload()
    for column in set(rows) - {"step"}:
        scalars = events.Scalars(column)
        assert [s.step for s in scalars] == [5, 10, 15, 20]
        np.testing.assert_allclose([s.value for s in scalars], rows[column], rtol=1e-5)
    last = events.Scalars(f"{DATASET}/heldout_nll")[0].value  # of metrics.json
    assert last == pytest.approx(rows["heldout_nll"][-1], rel=1e-5)


class FakeWandB:
    """Stands in for the module wandb: remembers what it was asked to do."""

    __spec__ = SimpleNamespace()

    def __init__(self):
        self.options = []  # of each init
        self.rows = {}  # {step: values}
        self.finished = 0

    def init(self, **options):
        self.options.append(options)
        return SimpleNamespace(id=options["id"] or "abc", log=self.log, finish=self.finish)

    def log(self, values, step):
        self.rows.setdefault(step, {}).update(values)

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch) -> FakeWandB:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: True)
    return fake


def test_wandb__receives_what_the_log_holds(tmp_path, wandb):
    rows = train(tmp_path, wandb=True)
    (options,) = wandb.options
    assert options["project"] == "manyteachers" and options["id"] is None
    assert options["config"]["n_embd"] == 8
    assert list(wandb.rows) == [5, 10, 15, 20]
    for column in set(rows) - {"step"}:
        values = [row[column] for row in wandb.rows.values()]
        np.testing.assert_allclose(values, rows[column], rtol=1e-6)
    assert f"{DATASET}/heldout_nll" in wandb.rows[20]  # of metrics.json
    assert wandb.finished == 1


def test_wandb__goes_on_with_the_same_run_after_a_resume(tmp_path, wandb):
    for step in (0, 10):
        log.WandB(tmp_path, {}, step)
    assert [options["id"] for options in wandb.options] == [None, "abc"]


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_tracker__is_reported_before_anything_is_done(tmp_path, monkeypatch, package):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    message = f"--{package} needs a package that is not here: pip install {package}"
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", **{package: True})
    assert not (tmp_path / "run").exists()


# ---- what is printed ---------------------------------------------------------------------------------------


def test_table__aligns_numbers_to_the_right():
    rows = [{"task": "hopper", "return": 3239.4, "KL": 0.03703}, {"task": "ant", "return": None}]
    assert log.table(rows).splitlines() == [
        "task    return     KL",
        "hopper    3239  0.037",
        "ant          -      -",
    ]


@pytest.mark.parametrize(("seconds", "left"), [(1.0, "0:03"), (20.0, "1:00"), (36.0, "1:48"), (39.9, "2:00")])
def test_progress__gives_the_remaining_time_in_minutes_and_seconds(seconds, left):
    """After 100 of 400 steps, three times as long is left."""
    assert log.progress(100, 400, seconds, "").endswith(f" {left} left")

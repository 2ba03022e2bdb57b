"""An exported file does what the model does, and needs neither torch nor this project."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_evaluate import TASK
from test_model import make
from test_policy import CARTPOLE, HOPPER

import evaluate
import export
import model as dt
import policy
from conftest import ROOT
from support import (
    UserError,
)

TASKS = TASK, HOPPER, CARTPOLE


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A student of three tasks, the last of them with discrete actions, and its files."""
    home = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    m = make(dt.ModelConfig((2, 11, 4), (1, 3, 2), 2, 2, 32, 7, discrete=(False, False, True)))
    for p in m.parameters():  # biases too, which begin at zero
        p.data += 0.1 * torch.randn_like(p)
    dt.save(home, m, {"tasks": [dataclasses.asdict(t) for t in TASKS]})
    export.main(export.Config(str(home), int8=True))
    return home, m


def test_an_exported_file_acts_as_the_model_does_on_a_thousand_windows(exported):
    home, m = exported
    for index, task in enumerate(TASKS):
        difference = export.compared(
            export.session(str(home / f"{task.name}.onnx")), export.Step(m, task, index), B=20, T=50
        )
        assert difference < 1e-5
        card = json.loads((home / f"{task.name}.json").read_text())
        assert (
            card["files"][f"{task.name}.onnx"]["bytes"] == (home / f"{task.name}.onnx").stat().st_size
            and card["observation"] == task.obs_dim
        )


def test_rows_of_a_batch_may_be_at_timesteps_of_their_own(exported):
    home, m = exported
    runtime, rng = export.session(str(home / "hopper.onnx")), np.random.default_rng(0)
    one, both = (
        {k: x.numpy() for k, x in zip(export.NAMES[0], export.Step(m, HOPPER, 1).inputs(B), strict=True)}
        for B in (1, 2)
    )
    seen = rng.normal(size=(30, 11)).astype(np.float32)
    alone = []
    for t in range(30):
        one |= {
            "observation": seen[t : t + 1],
            "return_to_go": np.float32([100 - t]),
            "timestep": np.array([t]),
        }
        action, one["memory"] = runtime.run(None, one)
        alone.append(action[0])
        one["last_action"] = action
    late = 11  # the second row begins so many steps after the first
    for t in range(30):
        times = np.array([t, max(0, t - late)])
        if t == late:
            both["memory"][1] = 5.0  # whatever an old episode left
        both |= {
            "observation": seen[times],
            "return_to_go": (100 - times).astype(np.float32),
            "timestep": times,
        }
        action, memory = runtime.run(None, both)
        both["last_action"], both["memory"] = action, memory.copy()
        assert np.allclose(action[0], alone[t], atol=1e-5) and (
            t < late or np.allclose(action[1], alone[t - late], atol=1e-5)
        )


def test_weights_in_8_bits_are_smaller_and_near(exported):
    home, m = exported
    assert (home / "hopper.int8.onnx").stat().st_size < 0.8 * (home / "hopper.onnx").stat().st_size
    assert (
        1e-5
        < export.compared(
            export.session(str(home / "hopper.int8.onnx")), export.Step(m, HOPPER, 1), B=1, T=50
        )
        < 0.3
    )


def test_the_example_needs_neither_torch_nor_this_project_and_gets_the_same_returns(exported, tmp_path):
    home, m = exported
    blocked = ("import runpy, sys; sys.modules |= dict.fromkeys(('torch', 'model', 'policy', 'data', 'run', 'minari')); "
               "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0])")  # fmt: skip
    p = subprocess.run([sys.executable, "-c", blocked, str(ROOT / "examples/act_onnx.py"), str(home / "hopper.onnx"), "--episodes", "4"],
                       cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    assert p.returncode == 0, p.stderr
    got = float(re.search(r"return ([-\d.]+)", p.stdout)[1])
    returns, _ = evaluate.rollout(m, HOPPER, 1, 300.0, 4, 1000)
    assert got == pytest.approx(
        returns.mean(), abs=0.06
    )  # as far as it is printed: these episodes are too short for rounding to grow


def test_the_example_acts_by_discrete_actions_too(exported, tmp_path):
    home, m = exported
    p = subprocess.run(
        [sys.executable, str(ROOT / "examples/act_onnx.py"), str(home / "cartpole.onnx"), "--episodes", "4"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert p.returncode == 0, p.stderr
    returns, _ = evaluate.rollout(m, CARTPOLE, 2, 500.0, 4, 1000)
    assert float(re.search(r"return ([-\d.]+)", p.stdout)[1]) == pytest.approx(returns.mean(), abs=0.06)


def test_an_exported_policy_keeps_context_and_what_is_left_of_the_return_as_ours_does(exported):
    home, m = exported
    ours, rng = policy.Policy.of(m, HOPPER, 1), np.random.default_rng(0)
    theirs = export.Exported(export.session(str(home / "hopper.onnx")), export.Step(m, HOPPER, 1))
    ours.reset(target_return=500, episodes=4)
    theirs.reset(target_return=500, episodes=4)
    n, last = 4, None
    for t in range(25):
        observation, reward = 2 * rng.normal(size=(n, 11)), 40 * rng.normal(size=n)
        a, b = ours.act(observation, reward), theirs.act(observation, reward)
        assert np.allclose(a, b, atol=1e-4) and (last is None or not np.allclose(a, last, atol=1e-3))
        if t == 12:
            rows = np.array([False, True, False, True])
            ours.keep(rows)
            theirs.keep(rows)
        n, last = len(ours.left), a[rows] if t == 12 else a


def test_files_are_evaluated_as_the_model_is(exported, tmp_path, capsys):
    _, m = exported
    tasks = [dataclasses.replace(TASK, env_id=None), HOPPER, CARTPOLE]
    dt.save(
        tmp_path,
        m,
        {
            "tasks": [dataclasses.asdict(t) for t in tasks],
            "teachers": {"hopper": {"normalized_score": 500.0}},
        },
    )
    export.main(export.Config(str(tmp_path), eval_episodes=3, int8=True))
    for index, task in ((1, HOPPER), (2, CARTPOLE)):
        card = json.loads((tmp_path / f"{task.name}.json").read_text())["files"]
        want = evaluate.scores(evaluate.rollout(m, task, index, task.targets["p95"], 3, 1000)[0], task)
        assert (
            card[f"{task.name}.onnx"]["return_mean"] == pytest.approx(want["return_mean"], abs=0.05)
            and "return_mean" in card[f"{task.name}.int8.onnx"]
        )
    card = json.loads((tmp_path / "hopper.json").read_text())["files"]["hopper.onnx"]
    assert (
        card["retention"] == pytest.approx(card["normalized_score"] / 500)
        and "return_mean" not in (tmp_path / "walk.json").read_text()
    )
    assert re.search(r"walk\.onnx .* -\n", capsys.readouterr().out)
    with pytest.raises(UserError, match="--batch 3: files are evaluated with batches that shrink"):
        export.main(export.Config(str(tmp_path), eval_episodes=3, batch=3))


def test_a_fixed_batch_takes_no_other(exported, tmp_path):
    _, m = exported
    dt.save(tmp_path, m, {"tasks": [dataclasses.asdict(t) for t in TASKS]})
    export.main(export.Config(str(tmp_path), batch=3))
    runtime = export.session(str(tmp_path / "walk.onnx"))
    assert [i.shape[0] for i in runtime.get_inputs()] == [3] * 5
    assert export.compared(runtime, export.Step(m, TASK, 0), B=3, T=20) < 1e-5


def test_files_that_are_there_are_kept_and_what_is_missing_is_told(exported, monkeypatch):
    home, _ = exported
    with pytest.raises(UserError, match="walk.onnx is there already; add --overwrite"):
        export.main(export.Config(str(home)))
    with pytest.raises(UserError, match="no model in"):
        export.main(export.Config(str(home / "nothing")))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else 1)
    with pytest.raises(
        UserError, match="exporting needs onnxruntime: pip install onnx onnxscript onnxruntime"
    ):
        export.main(export.Config(str(home), overwrite=True))

"""export.py: an exported file does what the model does, and needs neither torch nor this project."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_evaluate import WALK
from test_model import make
from test_policy import CARTPOLE, HOPPER

import data
import evaluate
import export
import model as dt
import policy
from conftest import ROOT
from support import UserError

OF_ALL_SCALES = dataclasses.replace(HOPPER, obs_std=[0.01] * 4 + [2.0] * 3 + [100.0] * 4)
EXAMPLE = str(ROOT / "examples/act_onnx.py")


@dataclasses.dataclass
class Run:
    home: Path
    model: dt.DecisionTransformer
    tasks: list[data.Task]
    printed: str = ""

    def write_files(self, **options) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            export.main(export.Config(str(self.home), **options))
        self.printed = out.getvalue()

    def step(self, index: int = 0) -> export.Step:
        return export.Step(self.model, self.tasks[index], index)

    def session(self, name: str):
        return export.session(str(self.home / name))

    def card(self, name: str) -> dict:
        return json.loads((self.home / f"{name}.json").read_text())


def saved_run(home: Path, tasks: list[data.Task], tokens: int = 3, **options) -> Run:
    """A student of these tasks, and a score of its teacher in hopper."""
    cfg = dt.ModelConfig.of(tasks, n_layer=2, n_head=2, n_embd=32, context=7, tokens=tokens, **options)
    m = make(cfg)
    for p in m.parameters():  # biases too, which begin at zero
        p.data += 0.1 * torch.randn_like(p)
    teachers = {"hopper": {"normalized_score": 500.0}}
    dt.save(home, m, {"tasks": [dataclasses.asdict(task) for task in tasks], "teachers": teachers})
    return Run(home, m, tasks)


@pytest.fixture(scope="module")
def hopper(tmp_path_factory) -> Run:
    """A run of one task and its files, evaluated. An export takes seconds: the fast tests share this one."""
    run = saved_run(tmp_path_factory.mktemp("hopper"), [OF_ALL_SCALES], tokens=1)
    run.write_files(int8=True, eval_episodes=3)
    return run


@pytest.fixture(scope="module")
def three_tasks(tmp_path_factory) -> Run:
    """A run of three tasks, the first without environment, the last with discrete actions, and its files."""
    tasks = [dataclasses.replace(WALK, env_id=None), HOPPER, CARTPOLE]
    run = saved_run(tmp_path_factory.mktemp("three_tasks"), tasks)
    run.write_files(int8=True, eval_episodes=3)
    return run


# ---- a step, and its file ----------------------------------------------------------------------------------


class Eager:
    """A step in place of its file."""

    def __init__(self, step: export.Step):
        self.step = step

    @torch.no_grad()
    def run(self, outputs, feed):
        inputs = [torch.from_numpy(feed[name]) for name in self.step.names]
        return [x.numpy() for x in self.step(*inputs)]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_step__acts_as_the_model_does(tmp_path, index):
    step = saved_run(tmp_path, [WALK, HOPPER, CARTPOLE]).step(index)
    assert export.compared(Eager(step), step, batch=20) < 1e-5


def assert_acts_as_the_model_does(run: Run, index: int) -> None:
    """On 20 episodes of 50 windows; and the file's card belongs to it."""
    task = run.tasks[index]
    name = f"{task.name}.onnx"
    assert export.compared(run.session(name), run.step(index), batch=20) < 1e-5
    card = run.card(task.name)
    assert card["files"][name]["bytes"] == (run.home / name).stat().st_size
    assert card["files"][name]["largest_difference"] < 1e-5
    assert card["observation"] == task.obs_dim


def test_to_onnx__acts_as_the_model_does(hopper):
    assert_acts_as_the_model_does(hopper, 0)


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1, 2])
def test_to_onnx__acts_as_a_student_of_several_tasks_does_in_each(three_tasks, index):
    assert_acts_as_the_model_does(three_tasks, index)


def test_to_onnx__lets_rows_be_at_timesteps_of_their_own(hopper):
    runtime = hopper.session("hopper.onnx")
    T = 30
    observations = np.random.default_rng(0).normal(size=(T, 11)).astype(np.float32)

    def timestep(feed, t):
        """The action (B, 3) and next memory of rows at timesteps t (B,)."""
        feed["observation"] = observations[t]
        feed["return_to_go"] = (100 - t).astype(np.float32)
        feed["timestep"] = t
        return runtime.run(None, feed)

    feed = hopper.step().feed(1)
    alone = []
    for t in range(T):
        feed["last_action"], feed["memory"] = timestep(feed, np.array([t]))
        alone.append(feed["last_action"][0])

    delay = 11  # the second row begins so many steps after the first
    feed = hopper.step().feed(2)
    for t in range(T):
        if t == delay:
            feed["memory"][1] = 5.0  # whatever an old episode left
        action, memory = timestep(feed, np.array([t, max(0, t - delay)]))
        feed["last_action"] = action
        feed["memory"] = memory.copy()
        assert np.allclose(action[0], alone[t], atol=1e-5)
        assert t < delay or np.allclose(action[1], alone[t - delay], atol=1e-5)


def test_to_onnx__takes_no_other_batch_than_a_fixed_one(tmp_path):
    run = saved_run(tmp_path, [WALK])
    run.write_files(batch=3)
    runtime = run.session("walk.onnx")
    assert [x.shape[0] for x in runtime.get_inputs()] == [3] * 5
    assert export.compared(runtime, run.step(), batch=3, n_steps=20) < 1e-5
    assert run.card("walk")["batch"] == 3


def test_quantised__is_smaller_and_close(hopper):
    int8 = hopper.home / "hopper.int8.onnx"
    assert int8.stat().st_size < 0.8 * (hopper.home / "hopper.onnx").stat().st_size
    difference = export.compared(hopper.session(int8.name), hopper.step(), batch=1)
    assert 1e-5 < difference < 0.3


# ---- the file of all tasks ---------------------------------------------------------------------------------


def like(task: data.Task, name: str) -> data.Task:
    """Another task of the same spaces, in other units."""
    low = [x - 0.5 for x in task.act_low]
    mean = [x + 1 for x in task.obs_mean]
    return dataclasses.replace(task, name=name, act_low=low, obs_mean=mean, rtg_scale=3 * task.rtg_scale)


SEVERAL = {
    "mixed": [WALK, HOPPER, dataclasses.replace(CARTPOLE, first_action=-3)],
    "continuous": [HOPPER, WALK],
    "discrete": [
        CARTPOLE,
        dataclasses.replace(CARTPOLE, name="three", act_dim=3, act_low=[0.0] * 3, act_high=[1.0] * 3),
    ],
    "factors": [
        dataclasses.replace(
            CARTPOLE, act_dim=5, factors=[3, 2], first_action=[-2, 1], act_low=[0.0] * 5, act_high=[1.0] * 5
        ),
        CARTPOLE,
        WALK,
    ],
    "shared": [WALK, OF_ALL_SCALES, like(WALK, "run"), like(HOPPER, "hop")],
}


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("tasks", SEVERAL.values(), ids=SEVERAL.keys())
def test_all_steps__act_as_the_model_does_in_each_task(tmp_path, tasks, tokens):
    run = saved_run(tmp_path, tasks, tokens, groups=(1, 0, 1, 0) if len(tasks) == 4 else ())
    steps = export.AllSteps(run.model, tasks)
    for index in range(len(tasks)):
        runtime = export.InTask(Eager(steps), steps, index)
        assert export.compared(runtime, run.step(index), batch=20) < 2e-5


def test_all_steps__lets_rows_be_in_tasks_of_their_own(tmp_path):
    """A batch of rows in all tasks gives what batches of one task do."""
    tasks = SEVERAL["mixed"]
    steps = export.AllSteps(saved_run(tmp_path, tasks).model, tasks)
    inputs = list(steps.inputs(6).values())
    for i in (0, 1, 2):
        inputs[i] = torch.randn_like(inputs[i])
    inputs[3] = torch.arange(6)
    inputs[5] = torch.arange(6) % 3
    with torch.no_grad():
        together = steps(*inputs)
        for row in range(6):
            alone = steps(*(x[row : row + 1] for x in inputs))
            for a, b in zip(together, alone, strict=True):
                assert torch.allclose(a[row], b[0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all-tasks.onnx", "all-tasks.int8.onnx"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_to_onnx__of_all_tasks_acts_as_the_model_does_in_each(three_tasks, name, index):
    steps = export.AllSteps(three_tasks.model, three_tasks.tasks)
    runtime = export.InTask(three_tasks.session(name), steps, index)
    difference = export.compared(runtime, three_tasks.step(index), batch=20)
    assert difference < (0.3 if "int8" in name else 1e-5)
    card = three_tasks.card("all-tasks")
    assert (card["observation_width"], card["action_width"]) == (11, 3)
    of_task = card["tasks"][index]
    entry = of_task.pop("files")[name]
    assert entry["bytes"] == (three_tasks.home / name).stat().st_size
    assert ("return_mean" in entry) == (index > 0)
    own = three_tasks.card(three_tasks.tasks[index].name)
    del own["files"]
    assert of_task == {"index": index, **own}


@pytest.mark.slow
def test_to_onnx__of_ten_tasks_is_no_larger_than_a_student_of_them(tmp_path):
    """Of MT10's sizes: at most 1.2 MB."""
    tasks = []
    for i in range(10):
        sizes = {"obs_dim": 39, "act_dim": 4, "obs_mean": [0.1 * i] * 39, "obs_std": [1.0 + i] * 39}
        bounds = {"act_low": [-1.0] * 4, "act_high": [1.0] * 4}
        tasks.append(dataclasses.replace(HOPPER, name=f"task-{i}", **sizes, **bounds))
    for groups in ((), (0,) * 10):
        cfg = dt.ModelConfig.of(tasks, n_layer=3, n_embd=64, context=20, tokens=1, groups=groups)
        model = make(cfg)
        steps = export.AllSteps(model, tasks)
        blob = export.to_onnx(steps, 0)
        assert len(blob) < 1.2e6
        for index in (0, 9):
            runtime = export.InTask(export.session(blob), steps, index)
            step = export.Step(model, tasks[index], index)
            assert export.compared(runtime, step, batch=3) < 1e-5


# ---- acting with a file ------------------------------------------------------------------------------------


def test_exported__keeps_context_and_return_to_go_as_policy_does(hopper):
    rng = np.random.default_rng(0)
    ours = policy.Policy.of(hopper.model, OF_ALL_SCALES, 0)
    theirs = export.Exported(hopper.session("hopper.onnx"), hopper.step())
    ours.reset(target_return=500, episodes=4)
    theirs.reset(target_return=500, episodes=4)
    n = 4
    last = None
    for t in range(25):
        observation = 2 * rng.normal(size=(n, 11))
        reward = 40 * rng.normal(size=n)
        action = ours.act(observation, reward)
        assert np.allclose(action, theirs.act(observation, reward), atol=1e-4)
        assert last is None or not np.allclose(action, last, atol=1e-3)
        last = action
        if t == 12:
            rows = np.array([False, True, False, True])
            ours.keep(rows)
            theirs.keep(rows)
            n = 2
            last = action[rows]


def printed_return(command: list[str], cwd: Path) -> float:
    p = subprocess.run([sys.executable, *command, "--episodes", "4"], cwd=cwd, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    return float(re.search(r"return ([-\d.]+)", p.stdout)[1])


def test_act_onnx__needs_neither_torch_nor_this_project(hopper, tmp_path):
    blocked = ("torch", "model", "policy", "data", "support", "minari")
    code = (
        f"import runpy, sys; sys.modules |= dict.fromkeys({blocked}); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    printed = printed_return(["-c", code, EXAMPLE, str(hopper.home / "hopper.onnx")], tmp_path)
    returns, *_ = evaluate.rollout(hopper.model, OF_ALL_SCALES, 0, 300.0, 4, evaluate.SEED)
    # to the digit that is printed: these episodes are too short for rounding to grow
    assert printed == pytest.approx(returns.mean(), abs=0.06)


@pytest.mark.slow
def test_act_onnx__takes_discrete_actions(three_tasks, tmp_path):
    printed = printed_return([EXAMPLE, str(three_tasks.home / "cartpole.onnx")], tmp_path)
    returns, *_ = evaluate.rollout(three_tasks.model, CARTPOLE, 2, 500.0, 4, evaluate.SEED)
    assert printed == pytest.approx(returns.mean(), abs=0.06)


@pytest.mark.slow
@pytest.mark.parametrize("index", [1, 2])
def test_act_onnx__takes_a_file_of_all_tasks(three_tasks, tmp_path, index):
    task = three_tasks.tasks[index]
    printed = printed_return(
        [EXAMPLE, str(three_tasks.home / "all-tasks.onnx"), "--task", task.name], tmp_path
    )
    returns, *_ = evaluate.rollout(three_tasks.model, task, index, task.target, 4, evaluate.SEED)
    assert printed == pytest.approx(returns.mean(), abs=0.06)


@pytest.mark.slow
def test_act_onnx__names_the_tasks_of_a_file_of_all(three_tasks):
    command = [sys.executable, EXAMPLE, str(three_tasks.home / "all-tasks.onnx"), "--task", "swimmer"]
    p = subprocess.run(command, capture_output=True, text=True)
    assert p.returncode == 1
    assert p.stderr == "--task swimmer: the file has walk, hopper, cartpole\n"


# ---- the command -------------------------------------------------------------------------------------------


def assert_evaluated_as_the_model_is(run: Run, index: int) -> None:
    task = run.tasks[index]
    entries = run.card(task.name)["files"]
    returns, *_ = evaluate.rollout(run.model, task, index, task.target, 3, evaluate.SEED)
    return_mean = evaluate.scores(returns, task)["return_mean"]
    assert entries[f"{task.name}.onnx"]["return_mean"] == pytest.approx(return_mean, abs=0.05)
    assert "return_mean" in entries[f"{task.name}.int8.onnx"]


def test_main__evaluates_files_as_the_model_is_evaluated(hopper):
    assert_evaluated_as_the_model_is(hopper, 0)
    entry = hopper.card("hopper")["files"]["hopper.onnx"]
    assert entry["retention"] == pytest.approx(entry["normalized_score"] / 500)


@pytest.mark.slow
@pytest.mark.parametrize("index", [1, 2])
def test_main__evaluates_a_student_in_each_of_its_environments(three_tasks, index):
    assert_evaluated_as_the_model_is(three_tasks, index)


@pytest.mark.slow
def test_main__evaluates_nothing_where_there_is_no_environment(three_tasks):
    assert re.search(r"walk\.onnx .* -\n", three_tasks.printed)
    assert "return_mean" not in (three_tasks.home / "walk.json").read_text()


def test_main__refuses_to_evaluate_a_fixed_batch(tmp_path):
    with pytest.raises(UserError, match="--batch 3: files are evaluated with batches that shrink"):
        export.main(export.Config(str(tmp_path), eval_episodes=3, batch=3))


def test_main__writes_a_card_with_all_that_acting_needs(hopper):
    card = hopper.card("hopper")
    for name, entry in card.pop("files").items():
        assert entry["bytes"] == (hopper.home / name).stat().st_size
        assert entry["microseconds"] > 0
    versions = {name: card.pop(name) for name in ("torch", "onnxruntime", "machine")}
    assert versions["torch"] == torch.__version__
    assert card == {
        "task": "hopper",
        "environment": "Hopper-v5",
        "environment_options": {},
        "environment_wrappers": [],
        "max_steps": 1000,
        "target": 300.0,
        "targets": {"p95": 300.0},
        "observation": 11,
        "observation_space": None,
        "pixels": [],
        "action_shape": [3],
        "action_type": "float32",
        "action_low": [-1.0] * 3,
        "action_high": [1.0] * 3,
        "memory": 2 * 2 * 2 * 7 * 32,  # keys and values, blocks, windows, rows, channels
        "batch": "any",
        "parameters_of_the_whole_model": hopper.model.n_params,
        "measured": None,
        "opset": export.OPSET,
    }


def test_main__replaces_no_file_unless_told(hopper):
    with pytest.raises(UserError, match="hopper.onnx is there already; add --overwrite"):
        export.main(export.Config(str(hopper.home)))


def test_main__names_what_is_missing(hopper, monkeypatch):
    with pytest.raises(UserError, match="no model in"):
        export.main(export.Config(str(hopper.home / "nothing")))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else 1)
    message = "exporting needs onnxruntime: pip install onnx onnxscript onnxruntime"
    with pytest.raises(UserError, match=message):
        export.main(export.Config(str(hopper.home), overwrite=True))

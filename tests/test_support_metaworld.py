"""support/metaworld.py: Meta-World's tasks, of the package if it is installed, and of a stand-in for it."""

import functools
import importlib.machinery
import importlib.util
import json
import shutil
import sys
import types

import gymnasium as gym
import minari
import numpy as np
import pytest
from minari.storage.datasets_root_dir import get_dataset_path

import data
import distill
import evaluate
import forked
import report
import research.metaworld
from conftest import ROOT
from support import UserError, environments, metaworld

package_needed = pytest.mark.skipif(
    importlib.util.find_spec("metaworld") is None,
    reason="needs metaworld==3.1.1, in an environment of its own (it pins mujoco==3.3.0)",
)


class StandIn(gym.Env):
    """As the package's environments are: goals are drawn in reset, which ignores its seed."""

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode=None, camera_name=None):
        self.render_mode = render_mode
        self._partially_observable = True
        self.observation_space = self.sawyer_observation_space
        self.action_space = gym.spaces.Box(-1, 1, (4,), np.float32)
        self.seeded_rand_vec = False

    @functools.cached_property
    def sawyer_observation_space(self):
        high = np.ones(39)
        high[-3:] = not self._partially_observable
        return gym.spaces.Box(-high, high, dtype=np.float64)

    def seed(self, seed):
        self._np_random = np.random.default_rng(seed)

    def reset(self, seed=None, options=None):
        assert self._set_task_called and not self._partially_observable and not self._freeze_rand_vec
        goal = (self.np_random if self.seeded_rand_vec else np.random).uniform(-1, 1, 39)
        self.goal = goal
        self.t = 0
        return goal.copy(), {}

    def render(self):
        return np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)

    def step(self, action):
        self.t += 1
        reward = 1 - float(np.abs(action[:3]).mean())
        return self.goal.copy(), reward, False, self.t == metaworld.EPISODE_STEPS, {"success": reward > 0.99}


class Expert:
    def get_action(self, obs):
        obs[4:7] += 0.05  # as door-close's does with what it is shown
        return np.array([0.0, 0.0, 0.0, 3.0])  # the package's experts go beyond the actions' bounds


@pytest.fixture
def stand_in(monkeypatch):
    modules = {
        name: types.ModuleType(name) for name in ("metaworld", "metaworld.env_dict", "metaworld.policies")
    }
    modules["metaworld.env_dict"].ENV_CLS_MAP = {"reach-v3": StandIn}
    modules["metaworld.policies"].ENV_POLICY_MAP = {"reach-v3": Expert}
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)


def collected(task, steps):
    """A dataset of these timesteps; its episodes."""
    name = data.dataset_id(task)
    shutil.rmtree(get_dataset_path(name), ignore_errors=True)
    data.collect_if_missing(name, steps)
    return list(minari.load_dataset(name).iterate_episodes())


def rollout(env, seed, actions=10):
    """The observations of an episode of equal actions."""
    observations = [env.reset(seed=seed)[0]]
    for _ in range(actions):
        observations.append(env.step(np.full(4, 0.5, np.float32))[0])
    return np.stack(observations)


# ---- names -------------------------------------------------------------------------------------------------


def test_tasks__are_fifty_and_ten_of_them_mt10():
    assert len(set(metaworld.TASKS)) == 50
    assert len(set(metaworld.MT10) & set(metaworld.TASKS)) == 10


def test_expanded__puts_a_groups_tasks_in_its_place():
    names = data.expanded(("hopper", "mt10", "ant"))
    assert names == ("hopper", *(f"mw/{task}" for task in metaworld.MT10), "ant")
    assert len(data.expanded(("mt50",))) == 50


def test_register__makes_specs_that_can_be_written_and_read():
    for task in metaworld.TASKS:
        spec = gym.spec(f"mw/{task}-v3")
        assert gym.envs.registration.EnvSpec.from_json(spec.to_json()) == spec
        assert spec.max_episode_steps == metaworld.EPISODE_STEPS


def test_check_env__names_a_missing_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for check in (
        lambda: data.check_env("mw/reach"),
        lambda: distill.Config(envs=("mt10",)).check(),
        lambda: environments.make_env("mw/reach-v3", {}),
    ):
        with pytest.raises(UserError, match=r"pip install metaworld==3\.1\.1.*mujoco==3\.3\.0"):
            check()
    data.check_env("hopper")


def test_check_env__names_the_choices():
    with pytest.raises(
        UserError, match="unknown env 'mw/reech'; choose from mw/assembly, .*, mw/window-open, "
    ):
        data.check_env("mw/reech")


# ---- environments and data, of a stand-in for the package -------------------------------------------------


def test_make__draws_the_goal_from_the_seed(stand_in):
    env = environments.make_env("mw/reach-v3", {})
    first = env.reset(seed=3)[0]
    other = env.reset()[0]
    assert (first != other).any()
    assert (env.reset(seed=3)[0] == first).all()
    assert (environments.make_env("mw/reach-v3", {}).reset(seed=3)[0] == first).all()
    assert env.observation_space.high[-1] == 1  # the goal is observed


def test_make__turns_the_pictures_of_a_camera_that_hangs_upside_down(stand_in):
    env = environments.make_env("mw/reach-v3", {}, render_mode="rgb_array")
    env.reset(seed=0)
    assert env.render()[0, 0].tolist() == [15, 16, 17]


def test_collect__writes_graded_noise_random_episodes_and_goals_of_their_own(stand_in):
    episodes = collected("mw/reach", 10 * metaworld.EPISODE_STEPS)
    again = collected("mw/reach", 10 * metaworld.EPISODE_STEPS)
    assert len(episodes) == 10
    for episode, same in zip(episodes, again, strict=True):
        assert len(episode.rewards) == metaworld.EPISODE_STEPS
        assert (episode.observations == same.observations).all()
        assert (episode.actions == same.actions).all()
        assert (episode.observations == episode.observations[0]).all()  # whatever the expert did to its own
    assert len({episode.observations[0].tobytes() for episode in episodes}) == 10
    spread = [episode.actions[:, 0].std() for episode in episodes]
    assert spread[:9] == pytest.approx([*metaworld.NOISE, *metaworld.NOISE[:4]], rel=0.1)
    assert (episodes[0].actions[0] == [0, 0, 0, 1]).all()  # clipped before the noise is added
    assert spread[9] == pytest.approx(1 / 3**0.5, rel=0.1)  # uniform in [-1, 1]
    shutil.rmtree(get_dataset_path(data.dataset_id("mw/reach")))


def test_collect__names_a_dataset_that_loads_as_the_task(stand_in):
    collected("mw/reach", 1000)
    loaded = data.load("mw/reach")
    assert loaded.task.name == "mw/reach"
    assert loaded.task.env_id == "mw/reach-v3"
    assert loaded.task.max_steps == metaworld.EPISODE_STEPS
    evaluate.check([loaded.task])
    name = data.dataset_id("mw/reach")
    spec = json.loads((get_dataset_path(name) / "data/metadata.json").read_text())["env_spec"]
    assert gym.envs.registration.EnvSpec.from_json(spec).kwargs == {"task": "reach"}
    shutil.rmtree(get_dataset_path(name))


def test_goals__of_data_are_not_those_of_evaluations():
    n_episodes = metaworld.STEPS // metaworld.EPISODE_STEPS
    of_data = range(metaworld.FIRST_GOAL, metaworld.FIRST_GOAL + n_episodes)
    assert of_data[0] > evaluate.SEED + 100_000


@pytest.mark.slow
def test_table__has_experts_teachers_and_a_student(stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    collected("mw/reach", 5000)
    options = {"steps": 2, "n_embd": 8, "eval_episodes": 2, "device": "cpu"}
    distill.main(distill.Config(envs=("mw/reach",), teacher_steps=2, out_dir="out/student", **options))
    research.metaworld.main(research.metaworld.Config(("out/student",)))
    experts = json.loads((tmp_path / "out/student/experts.json").read_text())
    assert experts["mw/reach"]["success_rate"] == 1
    assert experts["mw/reach"]["return_mean"] == metaworld.EPISODE_STEPS
    assert experts["mw/reach"]["episodes"] == 2
    capsys.readouterr()
    research.metaworld.main(research.metaworld.Config(("out/student",), table=True))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| mw/reach | 1.00 / 1.00 |")
    assert lines[3].startswith("| **mean** | 1.00 / 1.00 |")
    shutil.rmtree(get_dataset_path(data.dataset_id("mw/reach")))


MT10 = ("asked", "asked-1", "asked-2", "asked-3", "asked-4", "fifty", "labels", "data")
MT50 = ("fifteen", "fifty")


@pytest.fixture(params=[("mt10", MT10), ("mt50", MT50)], ids=["mt10", "mt50"])
def committed(request):
    """The runs of docs/metaworld.md, and the experts in their goals."""
    group, names = request.param
    folder = ROOT / "research/results" / group
    experts = json.loads((folder / names[0] / "experts.json").read_text())
    assert {path.parent.name for path in folder.glob("*/metrics.json")} == set(names)
    return [report.Run(folder / name) for name in names], experts


def test_docs__have_the_tables_of_the_committed_runs(committed):
    runs, experts = committed
    lines = research.metaworld.of_tasks(runs[0], experts)
    assert len(lines) == 1 + len(runs[0].tasks)
    lines += [research.metaworld.of_run(run, experts) for run in runs]
    text = (ROOT / "docs/metaworld.md").read_text()
    assert [line for line in lines if f"| {' | '.join(line)} |" not in text] == []


def test_of_run__has_a_students_size_success_and_retention(committed):
    runs, experts = committed
    of_channels = {58: ("52.1", "116,428"), 116: ("15.4", "394,248")}  # of MT10
    of_channels |= {156: ("49.7", "610,436"), 280: ("15.7", "1,928,928")}  # of MT50
    for run in runs:
        name, times, parameters, *numbers = research.metaworld.of_run(run, experts)
        assert (name, times, parameters) == (run.path.name, *of_channels[run.config["n_embd"]])
        expert, teachers, student, mean, worst, *_ = map(float, numbers)
        assert expert == pytest.approx(np.mean([m["success_rate"] for m in experts.values()]), abs=6e-4)
        ratios = []  # of tasks whose teachers succeed at all
        for task, of_student in run.tasks.items():
            if run.teachers[task]["success_rate"]:
                ratios.append(of_student["success_rate"] / run.teachers[task]["success_rate"])
        assert mean == pytest.approx(np.mean(ratios), abs=6e-4)
        assert worst == pytest.approx(min(ratios), abs=0.006)
        for found, of_tasks in ((teachers, run.teachers), (student, run.tasks)):
            assert found == pytest.approx(np.mean([m["success_rate"] for m in of_tasks.values()]), abs=6e-4)


# ---- the package itself ------------------------------------------------------------------------------------


@package_needed
@pytest.mark.slow
def test_make__gives_each_of_the_fifty_tasks_a_goal_by_seed():
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS, MT10_V3

    assert {f"{task}-v3" for task in metaworld.TASKS} == set(ALL_V3_ENVIRONMENTS)
    assert [f"{task}-v3" for task in metaworld.MT10] == list(MT10_V3)
    for task in metaworld.TASKS:
        env = environments.make_env(f"mw/{task}-v3", {})
        first = rollout(env, 1000)
        assert (first[0] != rollout(env, 1001)[0]).any(), task
        assert (rollout(env, 1000) == first).all(), task
        assert (rollout(gym.make(gym.spec(f"mw/{task}-v3")), 1000) == first).all(), task
        assert (first[0, -3:] != 0).any(), task  # the goal is observed


@package_needed
@pytest.mark.slow
def test_collect__has_experts_that_succeed_and_episodes_that_do_not():
    episodes = collected("mw/drawer-close", 10 * metaworld.EPISODE_STEPS)
    returns = [episode.rewards.sum() for episode in episodes]
    assert min(returns[:9]) > 3000
    assert returns[9] < 2500
    env = minari.load_dataset(data.dataset_id("mw/drawer-close")).recover_environment()
    observation, _ = env.reset(seed=metaworld.FIRST_GOAL)
    assert (observation == episodes[0].observations[0]).all()
    for action, expected in zip(episodes[0].actions, episodes[0].observations[1:], strict=True):
        observation, _, _, _, info = env.step(action)
        assert (observation == expected).all()
    assert info["success"]


@package_needed
@pytest.mark.slow
def test_distill__learns_meta_worlds_tasks_and_reports_success(tmp_path):
    for task in ("mw/reach", "mw/drawer-close"):
        collected(task, 10 * metaworld.EPISODE_STEPS)
    sizes = "--teacher-steps 200 --steps 200 --n-embd 32 --eval-episodes 2 --out-dir out"
    printed = forked.python(f"distill.py --envs mw/reach mw/drawer-close {sizes}", tmp_path)
    assert "student success" in printed
    tasks = json.loads((tmp_path / "out/metrics.json").read_text())["tasks"]
    assert set(tasks["mw/reach"]) >= {"success_rate", "success_at_end"}
    for task in tasks:
        shutil.rmtree(get_dataset_path(data.dataset_id(task)))

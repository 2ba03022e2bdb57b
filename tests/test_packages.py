"""Packages of environments (requirements-envs.txt): data of each group are learnt, distilled and acted on.

One student has all groups that are installed: goals, categories, words and vectors, discrete and continuous
actions. Data and trainings are tiny: what is shown is that they run.
"""

import contextlib
import importlib.metadata
import io
import runpy
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import minari
import numpy as np
import pytest
from gymnasium import spaces as gs
from minari.data_collector import EpisodeBuffer
from test_support_spaces import DESCRIBED, recorded

import data
import distill
import evaluate
import export
import model as dt
import teacher
from conftest import ROOT
from support import UserError, files, spaces

pytestmark = pytest.mark.slow
EPISODES = 4
STEPS = 20  # of an episode at most


# ---- the groups --------------------------------------------------------------------------------------------


def at_random(env):
    return lambda observation: env.action_space.sample()


def towards_the_goal(env):
    """In a maze without walls between."""

    def policy(observation):
        position, velocity = np.split(observation["observation"], 2)
        step = 5 * (observation["desired_goal"] - position) - velocity
        return np.clip(step, -1, 1).astype(np.float32)

    return policy


def baby_ai_bot(env):
    from minigrid.utils.baby_ai_bot import BabyAIBot

    bot = BabyAIBot(env.unwrapped)
    return lambda observation: np.int64(bot.replan())


class Group(NamedTuple):
    package: str
    env_id: str
    observed: str  # what its observations are made of: spaces.summary
    options: dict[str, Any] = {}
    policy: Callable = at_random  # of an environment that was just reset
    success: bool = False  # whether it reports any
    mujoco_3: bool = False  # whether it needs one before 3.12
    wrapper: str = ""  # of the package


GROUPS = {
    "pointmaze": Group(
        "gymnasium_robotics",
        "PointMaze_Open-v3",
        "4 numbers at 'observation', 2 numbers at 'desired_goal'",
        policy=towards_the_goal,
        success=True,
    ),
    "antmaze": Group(
        "gymnasium_robotics",
        "AntMaze_UMaze-v5",
        "105 numbers at 'observation', 2 numbers at 'desired_goal'",
        success=True,
    ),
    "kitchen": Group(
        "gymnasium_robotics",
        "FrankaKitchen-v1",
        "59 numbers at 'observation', 7 numbers at 'desired_goal/kettle', "
        "1 numbers at 'desired_goal/microwave'",
        {"tasks_to_complete": ["microwave", "kettle"]},
        mujoco_3=True,
    ),
    "adroit": Group("gymnasium_robotics", "AdroitHandPen-v1", "45", success=True),
    "fetch": Group(
        "gymnasium_robotics",
        "FetchReach-v4",
        "10 numbers at 'observation', 3 numbers at 'desired_goal'",
        success=True,
        mujoco_3=True,
    ),
    "babyai": Group(
        "minigrid",
        "BabyAI-GoToRedBallGrey-v0",
        "4 one-hot at 'direction', 7x7x3 symbols at 'image', text at 'mission'",
        policy=baby_ai_bot,
    ),
    "babyai-fullobs": Group(
        "minigrid",
        "BabyAI-GoToRedBallGrey-v0",
        "4 one-hot at 'direction', 8x8x3 symbols at 'image', text at 'mission'",
        policy=baby_ai_bot,
        wrapper="FullyObsWrapper",
    ),
    "minigrid": Group(
        "minigrid",
        "MiniGrid-FourRooms-v0",
        "4 one-hot at 'direction', 7x7x3 symbols at 'image', text at 'mission'",
    ),
    "pong": Group("ale_py", "ALE/Pong-v5", "210x160 image", {"obs_type": "grayscale"}),
    "breakout": Group("ale_py", "ALE/Breakout-v5", "210x160x3 image"),
}
OF_IMAGES = ("pong", "breakout")


def made(group: Group) -> gym.Env:
    """Its environment; skips the test where that can't be."""
    why = f"needs {group.package}: pip install -r requirements-envs.txt"
    package = pytest.importorskip(group.package, reason=why)
    if group.mujoco_3:
        version = tuple(map(int, importlib.metadata.version("mujoco").split(".")[:2]))
        if version >= (3, 12):  # an integer is then no element of a tuple of joint types
            pytest.skip(f"{group.env_id} of gymnasium-robotics 1.4.2 needs: pip install 'mujoco<3.12'")
    env = gym.make(group.env_id, max_episode_steps=STEPS, disable_env_checker=True, **group.options)
    return getattr(package.wrappers, group.wrapper)(env) if group.wrapper else env


def in_texts(space: gym.Space) -> gym.Space:
    """The same with Text for minigrid's MissionSpace, which Minari can't write."""
    if isinstance(space, gs.Dict):
        return gs.Dict({key: in_texts(inner) for key, inner in space.spaces.items()})
    return gs.Text(200, charset=string.printable) if space.dtype.kind == "U" else space


def collect(name: str, group: Group) -> None:
    """A Minari dataset of its policy's episodes."""
    env = made(group)
    env.action_space.seed(0)
    space = in_texts(env.observation_space)
    buffers = []
    for i in range(EPISODES):
        observations = [env.reset(seed=i)[0]]
        policy = group.policy(env)
        actions = []
        rewards = []
        done = False
        while not done:
            actions.append(policy(observations[-1]))
            observation, reward, terminated, truncated, _ = env.step(actions[-1])
            observations.append(observation)
            rewards.append(reward)
            done = terminated or truncated
        ended = np.arange(len(rewards)) == len(rewards) - 1
        buffers.append(
            EpisodeBuffer(
                id=i,
                observations=recorded(space, observations),
                actions=np.stack(actions),
                rewards=rewards,
                terminations=ended & terminated,
                truncations=ended & (not terminated),
            )
        )
    minari.create_dataset_from_buffers(name, buffers, env=env, observation_space=space, **DESCRIBED)


# ---- teachers and a student --------------------------------------------------------------------------------

TINY = {"n_layer": 1, "n_embd": 16, "steps": 3, "batch_size": 32, "eval_episodes": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("packages")


def teacher_of(name: str, home: Path) -> Path:
    """Its run directory; trained at the first call."""
    out = home / name
    if not out.exists():
        collect(f"tests/packages/{name}-v0", GROUPS[name])
        with contextlib.redirect_stdout(io.StringIO()):
            options = {"imports": (GROUPS[name].package,), "context": 4, **TINY}
            teacher.main(teacher.Config(dataset=f"tests/packages/{name}-v0", out_dir=str(out), **options))
    return out


@pytest.mark.parametrize("name", GROUPS)
def test_teacher__learns_and_acts(name, home):
    out = teacher_of(name, home)
    metrics = files.read_json(out / "metrics.json")["tasks"][f"tests/packages/{name}-v0"]
    assert np.isfinite([metrics["return_mean"], metrics["heldout_nll"]]).all()
    assert ("success_rate" in metrics) == GROUPS[name].success
    (task,) = data.tasks(dt.load(out)[1], out)
    assert spaces.summary(task.observed) == GROUPS[name].observed
    assert task.max_steps == STEPS


def student_of(names: Sequence[str], home: Path, one_file: str) -> Path:
    """Its run directory, evaluated and exported. Skips the test where no package of these is installed."""
    there = []
    for name in names:
        with contextlib.suppress(pytest.skip.Exception):
            teacher_of(name, home)
            there.append(name)
    if not there:
        pytest.skip("needs any of the packages: pip install -r requirements-envs.txt")
    out = home / f"student-{one_file}"
    imports = tuple({GROUPS[name].package for name in there})
    with contextlib.redirect_stdout(io.StringIO()):
        teachers = tuple(str(home / name) for name in there)
        distill.main(distill.Config(teachers=teachers, out_dir=str(out), imports=imports, ask=0.2, **TINY))
        evaluate.main(evaluate.Config(str(out), eval_episodes=2, imports=imports, device="cpu"))
        export.main(export.Config(str(out), imports=imports, one_file=one_file))
    return out


def assert_files_act_as_the_student_does(out: Path, one_file: str) -> None:
    evaluated = files.read_json(out / "evaluation.json")["tasks"]
    example = runpy.run_path(str(ROOT / "examples/act_onnx.py"))
    for name in evaluated:
        file = out / ("all-tasks" if one_file == "only" else name.replace("/", "-"))
        session = export.session(str(file.with_suffix(".onnx")))
        card = example["card_of"](file.with_suffix(".json"), name)
        env = example["make_env"](card)
        returns = [example["play"](session, env, card, card["target"], evaluate.SEED + i) for i in range(2)]
        mean = evaluated[name]["return_mean"]
        assert np.mean(returns) == pytest.approx(mean, abs=1e-3 * (1 + abs(mean))), name


def test_student__of_all_groups_acts_by_onnxruntime_as_it_does_here(home):
    out = student_of([name for name in GROUPS if name not in OF_IMAGES], home, "only")
    assert_files_act_as_the_student_does(out, "only")


def test_student__of_images_and_of_others_acts_by_onnxruntime_as_it_does_here(home):
    out = student_of(["babyai", *OF_IMAGES], home, "no")
    assert_files_act_as_the_student_does(out, "no")
    pong = files.read_json(out / "tests-packages-pong-v0.json")
    assert pong["pixels"] == [1, 84, 84]
    with pytest.raises(UserError, match="--one-file only: tests/packages/pong-v0 has images"):
        export.main(export.Config(str(out), one_file="only"))

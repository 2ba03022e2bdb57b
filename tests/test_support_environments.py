"""support/environments.py: packages that register environments are imported where the user asks for it."""

import sys

import gymnasium as gym
import numpy as np
import pytest
import tyro

import data
import distill
import evaluate
import export
import report
import teacher
from conftest import make_dataset
from support import UserError, environments, jobs, run_directory

PACKAGE = '''"""Registers an environment."""
import gymnasium as gym

gym.register("tests/Imported-v0", "gymnasium.envs.classic_control:PendulumEnv")


class Doubled(gym.RewardWrapper):
    def reward(self, reward):
        return 2 * reward
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The name of a package that is not imported yet."""
    (tmp_path / "our_envs.py").write_text(PACKAGE)
    (tmp_path / "our_broken_envs.py").write_text("raise OSError('no display\\nat all')")
    monkeypatch.syspath_prepend(tmp_path)
    yield "our_envs"
    sys.modules.pop("our_envs", None)
    gym.registry.pop("tests/Imported-v0", None)


def test_make_env__takes_environments_of_packages_that_were_asked_for(package):
    with pytest.raises(UserError, match="'tests/Imported-v0' is not registered with Gymnasium; add --import"):
        environments.make_env("tests/Imported-v0", {})
    with pytest.raises(UserError, match="not imported unasked; add --import our_envs if you trust it"):
        environments.make_env(f"{package}:tests/Imported-v0", {})
    assert package not in sys.modules
    environments.import_packages((package,))
    for env_id in ("tests/Imported-v0", f"{package}:tests/Imported-v0"):
        assert environments.make_env(env_id, {}).spec.id == "tests/Imported-v0"
    with pytest.raises(UserError, match="'our_envs:Nothing-v0' is not registered"):
        environments.make_env("our_envs:Nothing-v0", {})


def test_make_env__wraps_as_a_dataset_says_in_what_is_imported(package):
    """Wrappers of Gymnasium, with options, and of a package, without."""
    environments.import_packages((package,))
    env = gym.make("Pendulum-v1", max_episode_steps=5)
    env = sys.modules[package].Doubled(gym.wrappers.RescaleAction(env, -1.0, 3.0))
    make_dataset("tests/wrapped-v0", [5, 5], obs_dim=3, act_dim=1, spec=env, action_space=env.action_space)
    task = data.load("tests/wrapped-v0").task
    assert [w["entry_point"].split(":")[1] for w in task.env_wrappers] == ["RescaleAction", "Doubled"]
    ours = evaluate.make_env(task)
    assert ours.action_space.high == 3.0
    for e in (env, ours):
        e.reset(seed=0)
    assert ours.step(np.ones(1))[1] == env.step(np.ones(1))[1]
    sys.modules.pop(package)
    with pytest.raises(
        UserError, match=f"'{package}:Doubled', .* not imported unasked; add --import our_envs"
    ):
        evaluate.make_env(task)


@pytest.mark.parametrize(
    "entry_point",
    [
        "gymnasium.wrappers:RecordVideo",
        "os:system",
        "os:nothing",
        "os",
        "builtins:open",
        "gymnasium:Env",
        ":",
    ],
)
def test_make_env__refuses_what_may_do_more_than_wrap(entry_point, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrapper = {"entry_point": entry_point, "kwargs": {"video_folder": "x"}}
    with pytest.raises(UserError, match="which wraps neither observations|not imported unasked"):
        environments.make_env("Pendulum-v1", {}, [wrapper])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong", [None, {}, [3], ["x:y"], [{}], [{"entry_point": "x:y"}], [{"entry_point": 3, "kwargs": {}}]]
)
def test_are_wrappers__refuses_what_can_not_be(wrong):
    assert environments.are_wrappers([{"entry_point": "x:y", "kwargs": {"a": 1}}])
    assert not environments.are_wrappers(wrong)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_package.envs", "can't be imported .No module named .* try pip install no-such-package"),
        ("our_broken_envs", "can't be imported .no display.; try"),
        ("", "can't be imported"),
        (".", "can't be imported"),
    ],
)
def test_import_packages__names_what_can_not_be_imported(package, name, message):
    with pytest.raises(UserError, match=f"--import {name}: {message}") as e:
        environments.import_packages((name,))
    assert "\n" not in str(e.value)


RUNS = {data: "--env=hopper", teacher: "--env=hopper", distill: "--envs=hopper"}
RUNS |= {evaluate: "out", export: "out", report: "out"}


@pytest.mark.parametrize("script", RUNS, ids=lambda script: script.__name__)
def test_import__is_an_option_of_every_script_and_comes_first(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = tyro.cli(script.Config, args=[RUNS[script], "--import", "no_such_package", "nor_this"])
    assert cfg.imports == ("no_such_package", "nor_this")
    with pytest.raises(UserError, match="--import no_such_package: can't be imported"):
        script.main(cfg)
    assert not list(tmp_path.iterdir())


def test_import__is_passed_on_to_teachers_and_is_no_setting_of_a_run(monkeypatch):
    words = {}
    monkeypatch.setattr(jobs, "run", lambda commands, *_: words.update(commands) or {})
    for imports in ((), ("a", "b")):
        cfg = distill.Config(imports=imports, jobs=2, device="cpu")
        teacher.train_missing(cfg, ["hopper", "ant"])
        assert tyro.cli(teacher.Config, args=words["ant"][1:]).imports == imports
        assert run_directory.settings(cfg) == run_directory.settings(distill.Config(jobs=2, device="cpu"))

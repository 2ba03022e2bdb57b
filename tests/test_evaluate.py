import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch

import data
import distill
import evaluate
import model as dt
import teacher
from conftest import make_dataset
from support import (
    UserError,
)


class Walk(gym.Env):
    """An episode of seed s lasts 3 + s % 5 steps; the observation is two random numbers, the reward their sum plus the action."""

    observation_space, action_space = (
        gym.spaces.Box(-np.inf, np.inf, (2,), np.float64),
        gym.spaces.Box(-3.0, 1.0, (1,), np.float32),
    )
    played: dict = {}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left, self.log = 3 + seed % 5, []
        Walk.played[seed] = self.log
        self.obs = self.np_random.normal(size=2)
        return self.obs, {}

    def step(self, action):
        self.left -= 1
        reward = float(self.obs.sum() + action[0])
        self.log.append((self.obs, action.copy(), reward))
        self.obs = self.np_random.normal(size=2)
        return self.obs, reward, self.left == 0, False, {}


gym.register("tests/Walk-v0", Walk)
TASK = data.Task(
    "walk",
    "-",
    "tests/Walk-v0",
    {},
    10,
    2,
    1,
    [0.5, -0.5],
    [2.0, 3.0],
    [-3.0],
    [1.0],
    4.0,
    {"p95": 8.0, "median": 2.0},
    (1.0, 5.0),
    "-",
    0,
)


def make():
    torch.manual_seed(0)
    return dt.DecisionTransformer(dt.ModelConfig((2,), (1,), 1, 1, 16, 4)).eval()


def test_what_the_model_sees_when_acting_is_what_it_sees_in_training():
    """Played episodes, made into a table as training does, give the very action that was played in a window of as many timesteps as Actor shows."""
    m, Walk.played = make(), {}
    returns, _ = evaluate.rollout(m, TASK, 0, 8.0, 6, 100)
    for seed, episode in Walk.played.items():
        obs, act, rew = (np.array(x, dtype=np.float64) for x in zip(*episode, strict=True))
        assert returns[seed - 100] == pytest.approx(rew.sum()) and len(rew) == 3 + seed % 5
        rtg = (8.0 - np.concatenate([[0], np.cumsum(rew)[:-1]])) / 4.0
        table = np.concatenate(
            [
                (obs - TASK.obs_mean) / TASK.obs_std,
                (act + 3) / 4 * 2 - 1,
                rtg[:, None],
                np.arange(len(rew))[:, None],
            ],
            1,
        ).astype(np.float32)
        w = data.Windows([table], [TASK], 4)
        b = w.gather(torch.zeros(len(rew), dtype=torch.long), torch.arange(len(rew)))
        t = b.timesteps[:, -1:]
        first = (t // 2 * 2 - 2).clamp_min(
            0
        )  # context 4: of two windows, begun every 2 timesteps in turn, the older one acts
        with torch.no_grad():
            mean = m(0, *b[1:5], b.mask & (b.timesteps >= first))[0][:, -1]
        assert torch.allclose(mean, b.actions[:, -1], atol=1e-6)


def test_episodes_are_the_same_alone_and_in_a_batch():
    m = make()
    together, _ = evaluate.rollout(m, TASK, 0, 8.0, 5, 200)
    alone = [evaluate.rollout(m, TASK, 0, 8.0, 1, 200 + i)[0][0] for i in range(5)]
    assert np.allclose(together, alone, atol=1e-4)


def test_scores():
    s = evaluate.scores(np.array([2.0, 4.0]), TASK)
    assert s == {"return_mean": 3.0, "return_std": 1.0, "normalized_score": 50.0}


class Broken(gym.Env):
    def __init__(self):
        raise ImportError("no module named simulator\nand more")


gym.register("tests/Broken-v0", Broken)


class Named(Walk):
    observation_space = gym.spaces.Dict({"where": Walk.observation_space})


gym.register("tests/Dict-v0", Named)


def test_an_environment_that_can_not_be_played_in_is_told_before_training():
    evaluate.check([TASK, dataclasses.replace(TASK, env_id=None)])
    for change, message in (
        (
            {"env_id": "tests/Nowhere-v0"},
            "'tests/Nowhere-v0' is not registered with Gymnasium; .*--eval-episodes 0",
        ),
        (
            {"env_id": "tests/Broken-v0"},
            r"'tests/Broken-v0' can't be made \(no module named simulator\); .*--eval-episodes 0",
        ),
        ({"env_id": "tests/Dict-v0"}, "tests/Dict-v0 {} has Dict observations and 1 actions"),
        (
            {"obs_dim": 3},
            "tests/Walk-v0 {} has 2 observations and 1 actions, dataset - 3 and 1.*--eval-episodes 0",
        ),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.check([dataclasses.replace(TASK, **change)])


def test_teacher_and_student_are_checked_before_they_are_trained(tmp_path):
    make_dataset("tests/elsewhere-v0", [5, 6, 7], obs_dim=3, spec="Hopper-v5")
    options = {
        "dataset": "tests/elsewhere-v0",
        "out_dir": str(tmp_path / "teacher"),
        "device": "cpu",
        "steps": 2,
        "n_embd": 8,
        "context": 4,
    }
    with pytest.raises(
        UserError,
        match="Hopper-v5 {} has 11 observations and 3 actions, dataset tests/elsewhere-v0 3 and 2",
    ):
        teacher.main(teacher.Config(**options))
    assert not (tmp_path / "teacher/log.csv").exists()
    teacher.main(teacher.Config(**options, eval_episodes=0))
    with pytest.raises(UserError, match="has 11 observations"):
        distill.main(
            distill.Config(
                teachers=(options["out_dir"],), out_dir=str(tmp_path / "student"), device="cpu", steps=2
            )
        )
    assert not (tmp_path / "student/log.csv").exists()

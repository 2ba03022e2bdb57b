"""evaluate.py: acting sees what training sees, scores, and environments that do not fit are named in time."""

import dataclasses
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from test_model import make

import data
import distill
import evaluate
import model as dt
import policy
import teacher
from conftest import make_dataset
from support import UserError, files

CFG = dt.ModelConfig(obs_dims=(2,), act_dims=(1,), n_layer=1, n_head=1, n_embd=16, context=4)


class Walk(gym.Env):
    """Seed s lasts 3 + s % 5 steps. An observation is two random numbers, a reward their sum + the action."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-3.0, 1.0, (1,), np.float32)
    played: dict[int, list[tuple]] = {}  # seed: (observation, action, reward) of every step

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps_left = 3 + seed % 5
        self.log = []
        Walk.played[seed] = self.log
        self.observation = self.np_random.normal(size=2)
        return self.observation, {}

    def step(self, action):
        self.steps_left -= 1
        reward = float(self.observation.sum() + action[0])
        self.log.append((self.observation, action.copy(), reward))
        self.observation = self.np_random.normal(size=2)
        return self.observation, reward, self.steps_left == 0, False, {}


class Game(Walk):
    """Won at the second step, whatever is done; still won at the end of the episodes of even seeds."""

    key = "success"

    def reset(self, *, seed=None, options=None):
        self.seed = seed
        return super().reset(seed=seed)

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        wins = len(self.log) == 2 or (terminated and self.seed % 2 == 0)
        return observation, reward, terminated, truncated, {self.key: np.float64(wins)}


class OtherGame(Game):
    key = "is_success"


class DictWalk(Walk):
    observation_space = gym.spaces.Dict({"position": Walk.observation_space})


class Broken(gym.Env):
    def __init__(self):
        raise ImportError("no module named simulator\nand more")


gym.register("tests/Walk-v0", Walk)
gym.register("tests/Game-v0", Game)
gym.register("tests/OtherGame-v0", OtherGame)
gym.register("tests/Dict-v0", DictWalk)
gym.register("tests/Broken-v0", Broken)
WALK = data.Task(
    name="walk",
    dataset="-",
    env_id="tests/Walk-v0",
    env_kwargs={},
    max_steps=10,
    obs_dim=2,
    act_dim=1,
    obs_mean=[0.5, -0.5],
    obs_std=[2.0, 3.0],
    act_low=[-3.0],
    act_high=[1.0],
    rtg_scale=4.0,
    targets={"p95": 8.0, "median": 2.0},
    reference=(1.0, 5.0),
    reference_source="-",
    split_seed=0,
)


# ---- episodes ----------------------------------------------------------------------------------------------


def test_rollout__shows_the_model_what_training_shows_it():
    """In training's form, windows of the length that Actor shows give the very actions that were played."""
    m = make(CFG)
    Walk.played = {}
    returns, *_ = evaluate.rollout(m, WALK, 0, target=8.0, episodes=6, seed=100)
    for seed, episode in Walk.played.items():
        observations = np.array([step[0] for step in episode])
        actions = np.array([step[1] for step in episode], np.float64)
        rewards = np.array([step[2] for step in episode])
        assert len(rewards) == 3 + seed % 5
        L = len(rewards)
        assert returns[seed - 100] == pytest.approx(rewards.sum())
        states = (observations - WALK.obs_mean) / WALK.obs_std
        scaled = (actions + 3) / 4 * 2 - 1
        rtg = (8.0 - np.concatenate([[0], np.cumsum(rewards)[:-1]])) / 4.0
        table = np.concatenate([states, scaled, rtg[:, None], np.arange(L)[:, None]], 1).astype(np.float32)
        windows = data.Windows([table], [WALK], 4)
        b = windows.gather(torch.zeros(L, dtype=torch.long), torch.arange(L))
        # context 4: two windows, begun in turn every 2 timesteps, of which the older acts
        t = b.timesteps[:, -1:]
        begin = (t // 2 * 2 - 2).clamp_min(0)
        with torch.no_grad():
            mean, _ = m(0, *b[1:5], b.mask & (b.timesteps >= begin))
        assert torch.allclose(mean[:, -1], b.actions[:, -1], atol=1e-6)


def test_rollout__gives_the_same_returns_alone_and_in_a_batch():
    m = make(CFG)
    together, *_ = evaluate.rollout(m, WALK, 0, target=8.0, episodes=5, seed=200)
    alone = []
    for seed in range(200, 205):
        returns, *_ = evaluate.rollout(m, WALK, 0, target=8.0, episodes=1, seed=seed)
        alone.append(returns[0])
    assert np.allclose(together, alone, atol=1e-4)


def test_rollout__asks_each_episode_for_its_own_target():
    m = make(CFG)
    targets = np.array([8.0, 2.0, -1.0, 8.0])
    together, *_ = evaluate.rollout(m, WALK, 0, target=targets, episodes=4, seed=200)
    alone = []
    for i, target in enumerate(targets):
        returns, *_ = evaluate.rollout(m, WALK, 0, target=target, episodes=1, seed=200 + i)
        alone.append(returns[0])
    assert np.allclose(together, alone, atol=1e-4)
    same, *_ = evaluate.rollout(m, WALK, 0, target=8.0, episodes=4, seed=200)
    assert not np.allclose(together, same, atol=1e-4)


def test_rollout__acts_by_the_policy(monkeypatch):
    act = policy.Policy.act
    batch_sizes = []

    def counted(self, observation, *args):
        batch_sizes.append(len(observation))
        return act(self, observation, *args)

    monkeypatch.setattr(policy.Policy, "act", counted)
    evaluate.rollout(make(CFG), WALK, 0, target=8.0, episodes=3, seed=100)
    assert batch_sizes[0] == 3


def test_played__acts_in_one_thread(monkeypatch):
    """Two threads that wait for each other beside busy processes took ten times as long."""
    counts = [2]
    seen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: counts[-1])
    monkeypatch.setattr(torch, "set_num_threads", counts.append)

    class Still:
        def reset(self, target_return, episodes):
            pass

        def keep(self, goes_on):
            pass

        def act(self, observations, rewards):
            seen.append(counts[-1])
            return np.zeros((len(observations), 1), np.float32)

    evaluate.play(Still(), WALK, 1.0, 2, 0)
    assert set(seen) == {1}
    assert counts == [2, 1, 2]


def test_scores__are_the_mean_the_deviation_and_the_normalised_score():
    scores = evaluate.scores(np.array([2.0, 4.0]), WALK)
    assert scores == {"return_mean": 3.0, "return_std": 1.0, "episodes": 2, "normalized_score": 50.0}


def test_scores__have_retention_where_the_teacher_has_a_score():
    returns = np.array([2.0, 4.0])
    assert evaluate.scores(returns, WALK, {"normalized_score": 40.0})["retention"] == 1.25
    assert "retention" not in evaluate.scores(returns, WALK, {})


@pytest.mark.parametrize("env_id", ["tests/Game-v0", "tests/OtherGame-v0"])
def test_measured__has_success_rates_where_the_environment_reports_success(env_id):
    game = dataclasses.replace(WALK, env_id=env_id)
    player = policy.Policy.of(make(CFG), game, 0)
    metrics = evaluate.measured(player, game, 8.0, episodes=5, seed=200, teacher={"normalized_score": 1.0})
    assert metrics["success_rate"] == 1.0
    assert metrics["success_at_end"] == 0.6
    returns, *_ = evaluate.play(player, game, 8.0, 5, 200)
    of_returns = evaluate.scores(returns, game, {"normalized_score": 1.0})
    assert metrics == {**of_returns, "success_rate": 1.0, "success_at_end": 0.6}
    rows = evaluate.sweep(player, game, episodes=3, seed=200)
    assert [row["success_at_end"] for row in rows] == pytest.approx([2 / 3, 1 / 3])
    player = policy.Policy.of(make(CFG), WALK, 0)
    assert "success_rate" not in evaluate.measured(player, WALK, 8.0, episodes=2, seed=200)


def test_measured__has_retention_of_success_where_it_is_asked_for_and_reported():
    game = dataclasses.replace(WALK, env_id="tests/Game-v0")
    player = policy.Policy.of(make(CFG), game, 0)
    teacher = {"normalized_score": 1.0, "success_rate": 0.8}
    metrics = evaluate.measured(player, game, 8.0, 5, 200, teacher, "success")
    assert metrics["retention"] == 1.25  # 1.0 / 0.8
    assert metrics["retention_of"] == "success"
    never = {"normalized_score": 1.0, "success_rate": 0.0}
    assert evaluate.measured(player, game, 8.0, 5, 200, never, "success")["retention"] is None
    player = policy.Policy.of(make(CFG), WALK, 0)
    metrics = evaluate.measured(player, WALK, 8.0, 2, 200, {"normalized_score": 40.0}, "success")
    assert metrics["retention"] == metrics["normalized_score"] / 40
    assert "retention_of" not in metrics


def test_sweep__plays_every_target_lowest_first():
    m = make(CFG)
    rows = evaluate.sweep(policy.Policy.of(m, WALK, 0), WALK, episodes=3, seed=200)
    assert [(row["name"], row["target"]) for row in rows] == [("median", 2.0), ("p95", 8.0)]
    for row, seed in zip(rows, (200, 203), strict=True):
        returns, *_ = evaluate.rollout(m, WALK, 0, row["target"], 3, seed)
        assert row["return_mean"] == pytest.approx(returns.mean(), abs=1e-4)
        assert row["return_std"] == pytest.approx(returns.std(), abs=1e-4)
        assert row["episodes"] == 3


def test_sweep__takes_targets_that_are_equal():
    task = dataclasses.replace(WALK, targets={"p95": 8.0, "p10": 8.0, "median": 8.0})
    rows = evaluate.sweep(policy.Policy.of(make(CFG), task, 0), task, episodes=1, seed=200)
    assert [row["target"] for row in rows] == [8.0] * 3
    assert all(np.isfinite(row["return_mean"]) for row in rows)


def test_target_gap__is_the_mean_distance_over_the_range_of_returns():
    rows = [("p10", 0.0, 1.0), ("median", 5.0, 3.0), ("supported", 9.0, -90.0)]  # the last is no quantile
    sweep = [{"name": name, "target": target, "return_mean": mean} for name, target, mean in rows]
    task = dataclasses.replace(WALK, reference=(-2.0, 50.0))
    assert evaluate.target_gap(sweep, {"return_min": 0.0, "return_max": 8.0}, task) == pytest.approx(0.15)
    assert evaluate.target_gap(sweep, {"return_min": -7.0, "return_max": 8.0}, task) == pytest.approx(0.1)
    assert evaluate.target_gap(None, {"return_min": 0.0, "return_max": 8.0}, task) is None
    assert evaluate.target_gap(sweep, None, task) is None


# ---- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path) -> Path:
    """A student of two tasks, of which the second names no environment."""
    tasks = [WALK, dataclasses.replace(WALK, name="data only", env_id=None)]
    sizes = {"obs_dims": (2, 2), "act_dims": (1, 1)}
    cfg = dataclasses.replace(CFG, **sizes, discrete=(), factors=(), groups=(), images=())
    meta = {
        "tasks": [dataclasses.asdict(task) for task in tasks],
        "teachers": {"walk": {"normalized_score": 50.0}},
    }
    dt.save(tmp_path, make(cfg), meta)
    return tmp_path


@pytest.mark.parametrize("target, value", [("default", 8.0), ("p95", 8.0), ("median", 2.0), ("-1.5", -1.5)])
def test_main__writes_what_it_prints(run, capsys, target, value):
    evaluate.main(evaluate.Config(str(run), eval_episodes=3, target=target, device="cpu"))
    returns, *_ = evaluate.rollout(dt.load(run)[0], WALK, 0, value, 3, evaluate.SEED)
    evaluation = files.read_json(run / "evaluation.json")
    # the teacher's score is of its default target: with other targets there is nothing to compare
    teacher_scores = {"normalized_score": 50.0} if value == WALK.target else None
    scores = evaluate.scores(returns, WALK, teacher_scores)
    assert evaluation == {
        "eval_episodes": 3,
        "seed": evaluate.SEED,
        "tasks": {"walk": {"target": value, **scores}},
    }
    printed = capsys.readouterr().out
    assert "data only: its dataset names no environment" in printed
    assert ("retention" in printed) == (value == WALK.target)


def test_main__sweeps_the_targets_and_draws_them(run, capsys):
    evaluate.main(evaluate.Config(str(run), eval_episodes=2, sweep=True, device="cpu"))
    swept = files.read_json(run / "evaluation.json")["tasks"]["walk"]["sweep"]
    assert swept == evaluate.sweep(policy.Policy.of(dt.load(run)[0], WALK, 0), WALK, 2, evaluate.SEED)
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line.startswith("walk ")]
    assert [row[1] for row in rows[1:]] == ["median", "p95"]
    assert (run / "sweep.png").stat().st_size > 10_000
    assert "sweep.png" in printed


def test_main__names_a_target_that_is_none(run):
    with pytest.raises(UserError, match="--target best: must be default, p95, median or a number"):
        evaluate.main(evaluate.Config(str(run), target="best", device="cpu"))


# ---- environments that do not fit --------------------------------------------------------------------------


def test_check__takes_tasks_that_fit_or_name_no_environment():
    evaluate.check([WALK, dataclasses.replace(WALK, env_id=None)])


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"env_id": "tests/Nowhere-v0"},
            "'tests/Nowhere-v0' is not registered with Gymnasium; .*--eval-episodes 0",
        ),
        (
            {"env_id": "tests/Broken-v0"},
            r"'tests/Broken-v0' can't be made \(no module named simulator\); .*--eval-episodes 0",
        ),
        (
            {"env_id": "tests/Dict-v0"},
            "tests/Dict-v0 {} has 2 numbers at 'position' observations and 1 actions, dataset - 2 and 1",
        ),
        (
            {"obs_dim": 3},
            "tests/Walk-v0 {} has 2 observations and 1 actions, dataset - 3 and 1.*--eval-episodes 0",
        ),
    ],
)
def test_check__names_an_environment_that_can_not_be_played_in(change, message):
    with pytest.raises(UserError, match=message):
        evaluate.check([dataclasses.replace(WALK, **change)])


def test_check__comes_before_a_teachers_and_a_students_training(tmp_path):
    make_dataset("tests/elsewhere-v0", [5, 6, 7], obs_dim=3, spec="Hopper-v5")
    options = {"device": "cpu", "steps": 2}
    size = {"n_embd": 8, "context": 4}
    teacher_dir = str(tmp_path / "teacher")
    config = teacher.Config(dataset="tests/elsewhere-v0", out_dir=teacher_dir, **options, **size)
    message = "Hopper-v5 {} has 11 observations and 3 actions, dataset tests/elsewhere-v0 3 and 2"
    with pytest.raises(UserError, match=message):
        teacher.main(config)
    assert not (tmp_path / "teacher/log.csv").exists()
    teacher.main(dataclasses.replace(config, eval_episodes=0))
    with pytest.raises(UserError, match=message):
        distill.main(distill.Config(teachers=(teacher_dir,), out_dir=str(tmp_path / "student"), **options))
    assert not (tmp_path / "student/log.csv").exists()

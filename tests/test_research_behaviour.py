"""research/behaviour.py: which of PPO's policies are chosen and written; what is told without its library."""

import sys

import numpy as np
import pytest

from research import behaviour
from support import UserError, collect


def test_choose__takes_steady_policies_of_evenly_spread_returns():
    returns = np.array([0.0, 1, 2, 50, 51, 98, 99, 100])[:, None] + np.array([-1.0, 1.0])
    assert behaviour.choose(returns, 3) == [0, 3, 7]
    returns[3] = (0, 100)  # falls every other time
    returns[7] = (0, 300)
    assert behaviour.choose(returns, 3) == [0, 4, 6]
    assert behaviour.choose(returns, 10) == [0, 1, 2, 4, 5, 6]


def test_choose__needs_a_steady_policy():
    with pytest.raises(UserError, match="none of 2 policies is steady"):
        behaviour.choose(np.array([[0.0, 10.0], [0.0, 20.0]]), 1)


def test_train__says_what_to_install_without_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)  # as if it were not installed
    with pytest.raises(UserError, match="pip install stable-baselines3"):
        behaviour.train(behaviour.Config())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"env": "hoper"},
            "unknown env 'hoper'; choose from ant, halfcheetah, halfcheetah-back, hopper, walk",
        ),
        ({"eval_episodes": 0}, "--eval-episodes 0: must be at least 1"),
        ({"steps": -1}, "--steps -1: must be at least 0"),
    ],
)
def test_main__tells_a_mistake_before_it_trains(option, message):
    with pytest.raises(UserError, match=message):
        behaviour.main(behaviour.Config(**option))


def test_noisy_actions__stay_in_the_action_space_and_differ(monkeypatch):
    env = behaviour.NoisyActions(behaviour.make_env("hopper"))
    env.reset(seed=0)
    low = env.action_space.low
    noisy = np.array([env.action(low) for _ in range(100)])
    assert noisy.dtype == np.float32
    assert (noisy >= low).all()
    assert 0.02 < noisy.std() < 0.2


def test_main__writes_the_chosen_policies_as_collecting_reads_them(monkeypatch, tmp_path, capsys):
    bundled = [policy.weights for policy in collect.load_behaviours("hopper")[:3]]
    monkeypatch.setattr(collect, "BEHAVIOURS", tmp_path / "behaviours")
    monkeypatch.setattr(behaviour, "train", lambda cfg: bundled)
    monkeypatch.setattr(behaviour, "STEADY", 1.0)
    behaviour.main(behaviour.Config(eval_episodes=2))
    written = collect.load_behaviours("hopper")
    assert len(written) == 3
    for policy, weights in zip(written, bundled, strict=True):
        for name in weights:
            assert np.array_equal(policy.weights[name], weights[name]), name
    assert "hopper: kept 3 of 3, returns " in capsys.readouterr().out

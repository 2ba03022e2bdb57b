"""Acting: what is kept from step to step changes nothing, and a policy means what its environment's units say."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_evaluate import TASK
from test_model import make

import data
import evaluate
import model as dt
import policy
from support import (
    UserError,
)


@pytest.mark.parametrize("K, n_head", [(1, 1), (2, 2), (3, 1), (6, 2), (7, 1)])
def test_an_actor_acts_as_forward_does_on_the_window_that_it_shows(f64, K, n_head):
    E, T, task, H = 4, 23, 1, max(1, K // 2)
    m = make(dt.ModelConfig((3, 5), (2, 1), 2, n_head, 16, K))
    for p in m.parameters():  # LayerNorms', too, which begin at one and zero
        p.data += 0.1 * torch.randn_like(p)
    states, rtg, actions = torch.randn(E, T, 5), torch.rand(E, T), torch.rand(E, T, 1) * 2 - 1
    actor, going = policy.Actor(m, task, E, T), torch.arange(E)
    for t in range(T):
        got = actor.act(
            states[going, t], rtg[going, t], actions[going, t - 1]
        )  # before the first timestep, whatever the last one holds
        start = max(0, (t // H - 1) * H) if K > 1 else t
        w, n = slice(start, t + 1), t + 1 - start
        assert n <= K and (n > K // 2 or start == 0)
        want = m(
            task,
            states[going, w],
            actions[going, w],
            rtg[going, w],
            torch.arange(start, t + 1).expand(len(going), n),
            torch.ones(len(going), n, dtype=torch.bool),
        )
        assert torch.allclose(got, want[0][:, -1], atol=1e-12)
        if t in (4, 11):
            still = torch.arange(len(going)) != 1
            actor.keep(still)
            going = going[still]


@given(st.integers(0, 1000), st.sampled_from([1, 2, 5, 6]))
def test_episodes_that_begin_anew_one_by_one_act_as_if_each_were_alone(seed, K):
    E, T, rng = 3, 17, np.random.default_rng(seed)
    m = make(dt.ModelConfig((3, 5), (2, 1), 2, 2, 16, K), seed)
    together, alone = policy.Actor(m, 1, E, T), [policy.Actor(m, 1, 1, T) for _ in range(E)]
    a = torch.zeros(E, 1)
    for _ in range(T):
        begin = torch.from_numpy(rng.random(E) < 0.2)
        if begin.any():
            together.restart(begin)
            alone = [policy.Actor(m, 1, 1, T) if b else x for b, x in zip(begin, alone, strict=True)]
        if rng.random() < 0.1 and len(alone) > 1:
            keep = torch.arange(len(alone)) != int(rng.integers(len(alone)))
            together.keep(keep)
            a, alone = a[keep], [x for k, x in zip(keep, alone, strict=True) if k]
        E = len(alone)
        states, rtg = (
            torch.from_numpy(rng.normal(size=(E, 5))).float(),
            torch.from_numpy(rng.random(E)).float(),
        )
        want = torch.cat(
            [x.act(states[i : i + 1], rtg[i : i + 1], a[i : i + 1]) for i, x in enumerate(alone)]
        )
        a = together.act(states, rtg, a)
        assert torch.allclose(a, want, atol=1e-5)


# ---- in an environment -----------------------------------------------------------------------------------------------

HOPPER = data.Task(
    "hopper",
    "-",
    "Hopper-v5",
    {},
    1000,
    11,
    3,
    [0.1] * 11,
    [2.0] * 11,
    [-1.0] * 3,
    [1.0] * 3,
    100.0,
    {"p95": 300.0},
    (0.0, 1.0),
    "-",
    0,
)


BY_THEMSELVES = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}


def of_hopper():
    return policy.Policy.of(make(dt.ModelConfig((11,), (3,), 1, 1, 16, 6)), HOPPER, 0)


def test_in_a_vector_of_environments_that_begin_anew_each_acts_as_it_would_alone():
    p, n = of_hopper(), 4
    envs = gym.make_vec("Hopper-v5", n, "sync", vector_kwargs=BY_THEMSELVES)
    p.reset("hopper", episodes=n)
    observations, rewards, ended, seen = envs.reset(seed=0)[0], np.zeros(n), np.zeros(n, bool), []
    for _ in range(60):
        actions = p.act(observations, rewards, began=ended)
        seen.append((observations, rewards, ended, actions))
        observations, rewards, terminated, truncated, _ = envs.step(actions)
        ended = terminated | truncated
    envs.close()
    ends = 0
    for (
        observations,
        _,
        ended,
        _,
    ) in seen:  # what `began` tells of is where Hopper-v5 begins: 1.25 m high, all else within 0.005 of zero
        assert np.allclose(observations[ended] - [1.25, *[0] * 10], 0, atol=0.006)
    for i in range(n):
        one, begun = of_hopper(), False
        for observations, rewards, ended, actions in seen:
            if not begun or ended[i]:
                one.reset(target_return=300)
                ends, begun = ends + ended[i], True
                got = one.act(observations[i])
            else:
                got = one.act(observations[i], rewards[i])
            assert got.shape == (3,) and got.dtype == np.float32 and np.allclose(got, actions[i], atol=1e-5)
    assert ends >= 4


def test_a_policy_asks_for_what_is_left_of_the_return():
    p = of_hopper()
    p.reset(target_return=50)
    for reward in (0, 3, 4):
        p.act(np.zeros(11), reward)
    assert p.left.tolist() == [43]
    p.reset()
    assert p.left.tolist() == [300]


CARTPOLE = data.Task(
    "cartpole",
    "-",
    "CartPole-v1",
    {},
    500,
    4,
    2,
    [0.0] * 4,
    [1.0] * 4,
    [0.0] * 2,
    [1.0] * 2,
    100.0,
    {"p95": 500.0},
    (0.0, 1.0),
    "-",
    0,
    0,
)


@pytest.mark.parametrize("first", [0, -3])
def test_of_discrete_actions_the_most_likely_is_taken_and_numbered_as_the_environment_does(f64, first):
    m = make(dt.ModelConfig((4, 3), (3, 2), 2, 1, 16, 8, discrete=(True, False)))
    task = data.dataclasses.replace(CARTPOLE, act_dim=3, first_action=first)
    p = policy.Policy.of(m, task, 0)
    p.reset(episodes=5)
    states, rtg, taken = torch.randn(5, 4, 4), torch.full((5, 4), 5.0), torch.zeros(5, 4, 3)
    for t in range(4):
        action = p.act(states[:, t].numpy(), np.zeros(5))
        n = t + 1
        logp, nothing = m(
            0,
            states[:, :n],
            taken[:, :n],
            rtg[:, :n],
            torch.arange(n).expand(5, -1),
            torch.ones(5, n, dtype=torch.bool),
        )
        assert np.allclose(logp.exp().sum(-1).detach(), 1) and not nothing.any()
        assert action.dtype == np.int64 and action.tolist() == (logp[:, -1].argmax(-1) + first).tolist()
        taken[range(5), t, action - first] = 1
    assert len(set(taken.argmax(-1).flatten().tolist())) > 1  # not always the same


def test_discrete_actions_are_taken_in_a_vector_of_environments_and_alone():
    p = policy.Policy.of(make(dt.ModelConfig((4,), (2,), 1, 1, 16, 6, discrete=(True,))), CARTPOLE, 0)
    envs = gym.make_vec("CartPole-v1", 3, "sync", vector_kwargs=BY_THEMSELVES)
    p.reset(episodes=3)
    observations, rewards, ended = envs.reset(seed=0)[0], np.zeros(3), np.zeros(3, bool)
    for _ in range(30):
        observations, rewards, terminated, truncated, _ = envs.step(p.act(observations, rewards, began=ended))
        ended = terminated | truncated
    envs.close()
    p.reset()
    assert gym.spaces.Discrete(2).contains(p.act(observations[0]))


def test_an_episode_longer_than_its_task_is_told():
    p = policy.Policy.of(make(dt.ModelConfig((2,), (1,), 1, 1, 16, 4)), TASK, 0)
    p.reset(episodes=2)
    for t in range(15):
        p.act(np.zeros((2, 2)), np.zeros(2), began=[t == 5, t == 7])
    with pytest.raises(UserError, match="goes on after its 10 steps"):
        p.act(np.zeros((2, 2)), np.zeros(2))


def test_a_saved_students_policy_is_told_its_task_by_name(tmp_path):
    m = make(dt.ModelConfig((2, 11), (1, 3), 1, 1, 16, 4))
    dt.save(tmp_path, m, {"tasks": [data.dataclasses.asdict(t) for t in (TASK, HOPPER)]})
    p = policy.Policy(tmp_path)
    p.reset("hopper")
    assert p.act(np.zeros(11)).shape == (3,)
    p.reset("walk", episodes=2)
    action = p.act(np.zeros((2, 2)), [0, 0])
    assert action.shape == (2, 1) and (action >= -3).all() and (action <= 1).all()
    for wrong in ("swimmer", None):
        with pytest.raises(UserError, match="this model has walk, hopper"):
            p.reset(wrong)


def test_evaluation_acts_by_the_policy(monkeypatch):
    acted, real = [], policy.Policy.act
    monkeypatch.setattr(policy.Policy, "act", lambda self, *a: acted.append(len(self.left)) or real(self, *a))
    evaluate.rollout(make(dt.ModelConfig((2,), (1,), 1, 1, 16, 4)), TASK, 0, 8.0, 3, 100)
    assert acted[0] == 3

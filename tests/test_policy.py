"""policy.py: what is cached from step to step changes nothing; a policy speaks in its environment's units."""

import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_evaluate import WALK
from test_model import make

import data
import model as dt
import policy
from support import UserError

TWO_TASKS = {"obs_dims": (3, 5), "act_dims": (2, 1), "n_layer": 2, "n_embd": 16}
SHARED_BY_TWO = {**TWO_TASKS, "obs_dims": (5, 5), "act_dims": (1, 1), "groups": (0, 0)}
HOPPER = data.Task(
    name="hopper",
    dataset="-",
    env_id="Hopper-v5",
    env_kwargs={},
    max_steps=1000,
    obs_dim=11,
    act_dim=3,
    obs_mean=[0.1] * 11,
    obs_std=[2.0] * 11,
    act_low=[-1.0] * 3,
    act_high=[1.0] * 3,
    rtg_scale=100.0,
    targets={"p95": 300.0},
    reference=(0.0, 1.0),
    reference_source="-",
    split_seed=0,
)
CARTPOLE = data.Task(
    name="cartpole",
    dataset="-",
    env_id="CartPole-v1",
    env_kwargs={},
    max_steps=500,
    obs_dim=4,
    act_dim=2,
    obs_mean=[0.0] * 4,
    obs_std=[1.0] * 4,
    act_low=[0.0] * 2,
    act_high=[1.0] * 2,
    rtg_scale=100.0,
    targets={"p95": 500.0},
    reference=(0.0, 1.0),
    reference_source="-",
    split_seed=0,
    first_action=0,
)


# ---- Actor -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("sizes", [TWO_TASKS, SHARED_BY_TWO], ids=["own", "shared"])
@pytest.mark.parametrize("K, n_head", [(1, 1), (2, 2), (3, 1), (6, 2), (7, 1)])
def test_actor__acts_as_forward_does_on_the_older_window(f64, K, n_head, sizes, tokens):
    E = 4
    T = 23
    H = max(1, K // 2)
    task = 1
    m = make(dt.ModelConfig(**sizes, n_head=n_head, context=K, tokens=tokens))
    for p in m.parameters():  # LayerNorms' too, which begin at one and zero
        p.data += 0.1 * torch.randn_like(p)
    states = torch.randn(E, T, 5)
    rtg = torch.rand(E, T)
    actions = torch.rand(E, T, 1) * 2 - 1
    actor = policy.Actor(m, task, E, T)
    running = torch.arange(E)
    for t in range(T):
        last = actions[running, t - 1]  # at t = 0 the last timestep's, which must not matter
        got = actor.act(states[running, t], rtg[running, t], last)

        begin = max(0, (t // H - 1) * H) if K > 1 else t
        n = t + 1 - begin
        assert n <= K
        assert n > K // 2 or begin == 0
        window = slice(begin, t + 1)
        timesteps = torch.arange(begin, t + 1).expand(len(running), n)
        mask = torch.ones(len(running), n, dtype=torch.bool)
        mean, _ = m(
            task, states[running, window], actions[running, window], rtg[running, window], timesteps, mask
        )
        assert torch.allclose(got, mean[:, -1], atol=1e-12)

        if t in (4, 11):
            goes_on = torch.arange(len(running)) != 1
            actor.keep(goes_on)
            running = running[goes_on]


@given(st.integers(0, 1000), st.sampled_from([1, 2, 5, 6]), st.sampled_from([1, 3]))
def test_actor__lets_episodes_restart_as_if_each_were_alone(seed, K, tokens):
    rng = np.random.default_rng(seed)
    T = 17
    m = make(dt.ModelConfig(**TWO_TASKS, n_head=2, context=K, tokens=tokens), seed)

    def actor(episodes):
        return policy.Actor(m, 1, episodes, T)

    together = actor(3)
    alone = [actor(1) for _ in range(3)]
    actions = torch.zeros(3, 1)
    for _ in range(T):
        begins = torch.from_numpy(rng.random(len(alone)) < 0.2)
        if begins.any():
            together.restart(begins)
            alone = [actor(1) if begin else a for begin, a in zip(begins, alone, strict=True)]
        if rng.random() < 0.1 and len(alone) > 1:
            goes_on = torch.arange(len(alone)) != int(rng.integers(len(alone)))
            together.keep(goes_on)
            actions = actions[goes_on]
            alone = [a for keeps, a in zip(goes_on, alone, strict=True) if keeps]
        states = torch.from_numpy(rng.normal(size=(len(alone), 5))).float()
        rtg = torch.from_numpy(rng.random(len(alone))).float()
        expected = []
        for i, a in enumerate(alone):
            row = slice(i, i + 1)
            expected.append(a.act(states[row], rtg[row], actions[row]))
        actions = together.act(states, rtg, actions)
        assert torch.allclose(actions, torch.cat(expected), atol=1e-5)


# ---- Policy ------------------------------------------------------------------------------------------------


def hopper_policy() -> policy.Policy:
    cfg = dt.ModelConfig((11,), (3,), n_layer=1, n_head=1, n_embd=16, context=6)
    return policy.Policy.of(make(cfg), HOPPER, 0)


def self_resetting(env_id: str, n: int) -> gym.vector.VectorEnv:
    """n environments that reset themselves in the step that ends an episode."""
    mode = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    return gym.make_vec(env_id, n, "sync", vector_kwargs=mode)


def test_act__in_environments_that_reset_themselves_acts_as_each_would_alone():
    n = 4
    p = hopper_policy()
    p.reset("hopper", episodes=n)
    envs = self_resetting("Hopper-v5", n)
    observations, _ = envs.reset(seed=0)
    rewards = np.zeros(n)
    began = np.zeros(n, bool)
    steps = []
    for _ in range(60):
        actions = p.act(observations, rewards, began=began)
        steps.append((observations, rewards, began, actions))
        observations, rewards, terminated, truncated, _ = envs.step(actions)
        began = terminated | truncated
    envs.close()

    for observations, _, began, _ in steps:
        # Hopper-v5 begins 1.25 m high, all else within 0.005 of zero
        assert np.allclose(observations[began] - [1.25, *[0] * 10], 0, atol=0.006)
    n_restarts = 0
    for i in range(n):
        alone = hopper_policy()
        alone.reset(target_return=300)
        first = True
        for observations, rewards, began, actions in steps:
            if began[i]:
                alone.reset(target_return=300)
                n_restarts += 1
            if first or began[i]:
                action = alone.act(observations[i])
            else:
                action = alone.act(observations[i], rewards[i])
            first = False
            assert action.shape == (3,)
            assert action.dtype == np.float32
            assert np.allclose(action, actions[i], atol=1e-5)
    assert n_restarts >= 4


def test_act__subtracts_rewards_from_the_return_asked_for():
    p = hopper_policy()
    p.reset(target_return=50)
    for reward in (0, 3, 4):
        p.act(np.zeros(11), reward)
    assert p.return_to_go.tolist() == [43]
    p.reset()
    assert p.return_to_go.tolist() == [300]


def test_reset__takes_a_target_of_each_episode():
    p = hopper_policy()
    p.reset(target_return=[50, 60, 70], episodes=3)
    p.act(np.zeros((3, 11)))
    p.keep([True, False, True])
    p.act(np.zeros((2, 11)), [3, 4])
    assert p.return_to_go.tolist() == [47, 66]
    p.act(np.zeros((2, 11)), [1, 1], began=[False, True])
    assert p.return_to_go.tolist() == [46, 70]
    with pytest.raises(
        UserError, match=r"target_return of shape \(2,\): must be one number, or one of each of 3"
    ):
        p.reset(target_return=[50, 60], episodes=3)


@pytest.mark.parametrize("first_action", [0, -3])
def test_act__takes_the_most_likely_discrete_action_by_the_environments_number(f64, first_action):
    cfg = dt.ModelConfig((4, 3), (3, 2), n_layer=2, n_head=1, n_embd=16, context=8, discrete=(True, False))
    m = make(cfg)
    task = dataclasses.replace(CARTPOLE, act_dim=3, first_action=first_action)
    p = policy.Policy.of(m, task, 0)
    p.reset(episodes=5)
    states = torch.randn(5, 4, 4)
    rtg = torch.full((5, 4), 5.0)
    one_hot = torch.zeros(5, 4, 3)
    for t in range(4):
        action = p.act(states[:, t].numpy(), np.zeros(5))
        n = t + 1
        timesteps = torch.arange(n).expand(5, -1)
        mask = torch.ones(5, n, dtype=torch.bool)
        logp, log_std = m(0, states[:, :n], one_hot[:, :n], rtg[:, :n], timesteps, mask)
        assert np.allclose(logp.exp().sum(-1).detach(), 1)
        assert not log_std.any()
        assert action.dtype == np.int64
        assert action.tolist() == (logp[:, -1].argmax(-1) + first_action).tolist()
        one_hot[range(5), t, action - first_action] = 1
    assert len(set(one_hot.argmax(-1).flatten().tolist())) > 1  # not always the same


def test_act__gives_discrete_actions_that_environments_take():
    cfg = dt.ModelConfig((4,), (2,), n_layer=1, n_head=1, n_embd=16, context=6, discrete=(True,))
    p = policy.Policy.of(make(cfg), CARTPOLE, 0)
    p.reset(episodes=3)
    envs = self_resetting("CartPole-v1", 3)
    observations, _ = envs.reset(seed=0)
    rewards = np.zeros(3)
    began = np.zeros(3, bool)
    for _ in range(30):
        actions = p.act(observations, rewards, began=began)
        observations, rewards, terminated, truncated, _ = envs.step(actions)
        began = terminated | truncated
    envs.close()
    p.reset()
    assert gym.spaces.Discrete(2).contains(p.act(observations[0]))


def test_act__refuses_an_episode_longer_than_its_task():
    p = policy.Policy.of(make(dt.ModelConfig((2,), (1,), 1, 1, 16, 4)), WALK, 0)
    p.reset(episodes=2)
    for t in range(15):  # of the task's 10; each episode has begun anew after 5 or 7
        p.act(np.zeros((2, 2)), np.zeros(2), began=[t == 5, t == 7])
    with pytest.raises(UserError, match="goes on after its 10 steps"):
        p.act(np.zeros((2, 2)), np.zeros(2))


def test_reset__chooses_a_saved_students_task_by_name(tmp_path):
    m = make(dt.ModelConfig((2, 11), (1, 3), 1, 1, 16, 4))
    dt.save(tmp_path, m, {"tasks": [dataclasses.asdict(task) for task in (WALK, HOPPER)]})
    p = policy.Policy(tmp_path)
    p.reset("hopper")
    assert p.act(np.zeros(11)).shape == (3,)
    p.reset("walk", episodes=2)
    action = p.act(np.zeros((2, 2)), [0, 0])
    assert action.shape == (2, 1)
    assert (action >= -3).all()
    assert (action <= 1).all()
    for wrong in ("swimmer", None):
        with pytest.raises(UserError, match="this model has walk, hopper"):
            p.reset(wrong)

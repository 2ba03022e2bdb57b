"""Discrete actions of one factor or several, from a dataset to a file that acts; beside continuous ones."""

import contextlib
import dataclasses
import io
import json
import runpy

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces as gs
from hypothesis import given
from hypothesis import strategies as st
from test_support_spaces import collect

import data
import distill
import evaluate
import export
import model as dt
import teacher
from conftest import ROOT, make_dataset, slow
from policy import Policy
from support import UserError, environments, files

# ---- spaces ------------------------------------------------------------------------------------------------

factor = st.tuples(st.integers(1, 4), st.integers(-3, 3))


def multi_discrete(factors):
    n, start = np.moveaxis(np.array(factors), -1, 0)
    return gs.MultiDiscrete(n, start=start)


discrete_spaces = st.one_of(
    factor.map(lambda f: gs.Discrete(f[0], start=f[1])),
    st.lists(factor, min_size=1, max_size=4).map(multi_discrete),
    st.lists(st.tuples(factor, factor), min_size=1, max_size=2).map(multi_discrete),
    st.integers(1, 4).map(gs.MultiBinary),
    st.lists(st.integers(1, 3), min_size=2, max_size=2).map(gs.MultiBinary),
)


@given(discrete_spaces, st.integers(0, 2**31))
def test_one_hot__is_undone_by_what_acts(space, seed):
    space.seed(seed)
    actions = np.stack([space.sample() for _ in range(5)])
    choices = environments.choices(space)
    one_hot = environments.one_hot(actions, space)
    assert one_hot.shape == (5, environments.size(space)) == (5, sum(choices))
    assert (one_hot.sum(1) == len(choices)).all()
    chosen = dt.likeliest(torch.from_numpy(one_hot), choices)
    assert torch.equal(dt.one_hot(chosen, choices).float(), torch.from_numpy(one_hot))
    assert np.array_equal((chosen.numpy() + environments.first_action(space)).ravel(), actions.ravel())


def test_one_hot__names_an_action_outside_its_space():
    space = gs.MultiDiscrete([2, 3], start=[1, 0])
    with pytest.raises(ValueError, match=r"action \[3 0\] is not in MultiDiscrete"):
        environments.one_hot(np.array([[2, 2], [3, 0]]), space)


def test_read__refuses_actions_of_too_many_choices():
    space = gs.MultiDiscrete([6000, 6000])

    def edit(i, episode):
        episode["actions"] = np.zeros((len(episode["actions"]), 2), int)

    make_dataset("tests/many-v0", [3, 3], spec=None, edit=edit, action_space=space)
    with pytest.raises(UserError, match="tests/many-v0 has actions of 12000 choices; at most 10000"):
        data.load("tests/many-v0")


# ---- models ------------------------------------------------------------------------------------------------


def test_mean_nll__of_factors_is_the_mean_of_theirs():
    torch.manual_seed(0)
    logits = torch.randn(4, 5, 6)
    mask = torch.rand(4, 5) < 0.5
    wanted = 0
    actions = []
    for x in logits.split([4, 2], -1):
        chosen = torch.randint(x.shape[-1], (4, 5))
        wanted -= torch.distributions.Categorical(logits=x).log_prob(chosen)[mask].mean() / 2
        actions.append(torch.nn.functional.one_hot(chosen, x.shape[-1]))
    got = dt.mean_nll(dt.log_softmax(logits, (4, 2)), None, torch.cat(actions, -1), mask, (4, 2))
    assert torch.allclose(got, wanted)


def test_forward__gives_log_probabilities_of_each_factor_on_its_own():
    cfg = dt.ModelConfig((3, 2), (5, 4), 1, 1, 16, 4, discrete=(True, False), factors=((2, 3), ()))
    torch.manual_seed(0)
    m = dt.DecisionTransformer(cfg).eval()
    mask = torch.ones(2, 4, dtype=torch.bool)
    states, actions, rtg = torch.randn(2, 4, 3), torch.zeros(2, 4, 5), torch.randn(2, 4)
    timesteps = torch.arange(4).expand(2, -1)
    logp, zeros = m(0, states, actions, rtg, timesteps, mask)
    for part in logp.split([2, 3], -1):
        assert torch.allclose(part.exp().sum(-1), torch.ones(2, 4))
    assert not zeros.any()
    of_batch, _ = m(torch.zeros(2, dtype=torch.long), states, actions, rtg, timesteps, mask)
    assert torch.allclose(of_batch, logp, atol=1e-6)


@pytest.mark.parametrize(
    "factors",
    [[[2]], [[2, 3]], [[5, 0]], [[-1, 6]], [[2.0, 3]], [[]], [2, 3], [[2, 3], [5]], "5", {"5": 1}, 5],
)
def test_load__refuses_factors_that_can_not_be(tmp_path, factors):
    dt.save(tmp_path, dt.DecisionTransformer(dt.ModelConfig((2,), (4,), 1, 1, 8, 4, discrete=(True,))), {})
    meta = json.loads((tmp_path / "model.json").read_text())
    assert meta["config"]["factors"] == [[4]]
    meta["config"]["factors"] = factors
    (tmp_path / "model.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="is damaged"):
        dt.load(tmp_path)


# ---- runs --------------------------------------------------------------------------------------------------

SPACES = {
    "two": gs.MultiDiscrete([2, 3], start=[1, -1]),
    "table": gs.MultiDiscrete([[2, 3], [2, 2]]),
    "bits": gs.MultiBinary(2),
    "one": gs.Discrete(3, start=2),
}


class Levers(gym.Env):
    """Pays for each lever that is moved to where the observation says."""

    def __init__(self, kind: str):
        self.action_space = SPACES[kind]
        self.choices = np.array(environments.choices(self.action_space))
        self.first = environments.first_action(self.action_space)
        self.observation_space = gs.Box(0, 9, (len(self.choices),), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._observation(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        reward = float((np.ravel(action) == self.asked + self.first).sum())
        return self._observation(), reward, False, False, {}

    def _observation(self):
        self.asked = self.np_random.integers(self.choices)
        return self.asked.astype(np.float32)


def noisily_right(kind, rng):
    """A policy that moves two of three levers as they should be."""
    space = SPACES[kind]

    def policy(observation):
        asked = observation.astype(int) + environments.first_action(space)
        right = rng.random(len(asked)) < 2 / 3
        action = np.where(right, asked, np.ravel(space.sample()))
        return action.reshape(space.shape).astype(space.dtype)

    return policy


for kind in SPACES:
    options = {"max_episode_steps": 8, "kwargs": {"kind": kind}}
    gym.register(f"tests/Levers-{kind}-v0", "test_actions:Levers", **options)
OPTIONS = {"batch_size": 64, "eval_episodes": 2, "device": "cpu"}
KINDS = ("two", "bits", "one")  # besides one with continuous actions
LIMIT = {"two": 16, "bits": 16, "one": 8}  # a perfect policy's return


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Teachers of all kinds of actions."""
    home = tmp_path_factory.mktemp("levers")
    for kind in SPACES:
        rng = np.random.default_rng(0)
        SPACES[kind].seed(0)
        collect(f"tests/levers/{kind}-v0", f"tests/Levers-{kind}-v0", 60, noisily_right(kind, rng))
    make_dataset("tests/levers/pendulum-v0", [20] * 5, obs_dim=3, act_dim=1, spec="Pendulum-v1")
    for kind in (*KINDS, "pendulum"):
        size = {"n_layer": 1, "n_embd": 32, "context": 2, "steps": 100}
        with contextlib.redirect_stdout(io.StringIO()):
            teacher.main(
                teacher.Config(dataset=f"tests/levers/{kind}-v0", out_dir=str(home / kind), **size, **OPTIONS)
            )
    return home


def distilled(home, **options):
    out = home / "-".join(["student", *map(str, options.values())])
    cfg = distill.Config(
        teachers=tuple(str(home / kind) for kind in (*KINDS, "pendulum")),
        out_dir=str(out),
        **{"n_layer": 1, "n_embd": 16, "steps": 100, "log_interval": 50, **options, **OPTIONS},
    )
    with contextlib.redirect_stdout(io.StringIO()):
        distill.main(cfg)
    return out


@pytest.fixture(scope="module")
def student(home):
    return distilled(home, ask=0.3)


def tasks_of(run):
    return files.read_json(run / "metrics.json")["tasks"]


def test_teacher__learns_each_factor(home):
    for kind in KINDS:
        metrics = tasks_of(home / kind)[f"tests/levers/{kind}-v0"]
        assert metrics["return_mean"] >= 0.9 * LIMIT[kind], kind
        assert metrics["heldout_log_std"] is None
    assert tasks_of(home / "two")["tests/levers/two-v0"]["heldout_nll"] < np.log(2 * 3) / 2  # uniform actions


def assert_close_to_its_teachers(run):
    log = files.read_csv(run / "log.csv")
    for kind in KINDS:
        kl = log[f"heldout_kl_tests/levers/{kind}-v0"]
        assert kl[np.isfinite(kl)][-1] < 0.5 * kl[0], kind


def test_student__of_all_kinds_of_actions_acts_as_its_teachers_do(student):
    assert_close_to_its_teachers(student)
    tasks = tasks_of(student)
    for kind in KINDS:
        assert tasks[f"tests/levers/{kind}-v0"]["return_mean"] >= 0.9 * LIMIT[kind], kind
    with contextlib.redirect_stdout(io.StringIO()):
        evaluate.main(evaluate.Config(str(student), eval_episodes=2, device="cpu"))
    evaluated = files.read_json(student / "evaluation.json")["tasks"]
    assert evaluated["tests/levers/two-v0"]["return_mean"] == tasks["tests/levers/two-v0"]["return_mean"]


@pytest.mark.parametrize("loss", slow("mse", "nll", "kl+nll"))
def test_student__learns_by_other_losses(home, loss):
    assert_close_to_its_teachers(distilled(home, loss=loss, curriculum="all"))


def test_policy__gives_actions_of_the_space(student):
    for kind in KINDS:
        p = Policy(student)
        p.reset(f"tests/levers/{kind}-v0")
        action = p.act(np.zeros(len(p.task.choices)))
        assert SPACES[kind].contains(action), kind
        p.reset(f"tests/levers/{kind}-v0", episodes=3)
        assert p.act(np.zeros((3, len(p.task.choices)))).shape == (3, *SPACES[kind].shape)


def test_model__of_one_factor_from_before_there_were_several_is_the_same(home):
    run = home / "one"
    model, meta = dt.load(run)
    blob = (run / "model.json").read_bytes()
    before = json.loads(blob)
    del before["config"]["factors"]
    del before["tasks"][0]["factors"]
    try:
        (run / "model.json").write_text(json.dumps(before))
        old_model, old_meta = dt.load(run)
    finally:
        (run / "model.json").write_bytes(blob)
    assert old_model.cfg == model.cfg
    assert data.tasks(old_meta, run) == data.tasks(meta, run)


def test_tasks__refuse_factors_that_are_not_the_models(home):
    _, meta = dt.load(home / "two")
    for field, value in (("factors", [3, 2]), ("factors", None), ("first_action", 1), ("first_action", [1])):
        changed = {**meta, "tasks": [{**meta["tasks"][0], field: value}]}
        with pytest.raises(UserError, match=f"{field}|first_action"):
            data.tasks(changed, home)


def test_check__refuses_an_environment_of_other_factors(student):
    task = data.tasks(dt.load(student)[1], student)[0]
    with pytest.raises(
        UserError, match="and 5 actions, dataset tests/levers/two-v0 2 and 5: no evaluation there"
    ):
        evaluate.check([dataclasses.replace(task, factors=[3, 2])])


def test_load__reads_actions_that_are_a_table(home):
    d = data.load("tests/levers/table-v0")
    assert d.task.factors == [2, 3, 2, 2]
    assert d.task.act_dim == 9
    assert (d.train[:, d.task.obs_dim : -2].sum(1) == 4).all()


def test_step__acts_as_the_model_does(student):
    model, meta = dt.load(student)
    for index, task in enumerate(data.tasks(meta, student)):
        step = export.Step(model, task, index).eval()
        feed = step.feed(2)
        feed["last_action"] = feed["last_action"] + 99  # at the first timestep any
        with torch.no_grad():
            action, _ = step(*(torch.from_numpy(feed[name]) for name in step.names))
        p = Policy.of(model, task, index)
        p.reset(task.name, target_return=0.0, episodes=2)
        expected = p.act(np.zeros((2, task.obs_dim)))
        assert action.shape == expected.shape
        assert np.allclose(action, expected, atol=1e-5)


@pytest.mark.slow
def test_student__acts_by_onnxruntime_as_it_does_here(student):
    with contextlib.redirect_stdout(io.StringIO()):
        export.main(export.Config(str(student), eval_episodes=2))
    model, meta = dt.load(student)
    example = runpy.run_path(str(ROOT / "examples/act_onnx.py"))
    of_all = files.read_json(student / "all-tasks.json")["tasks"]
    for index, task in enumerate(data.tasks(meta, student)[: len(KINDS)]):
        name = task.name.replace("/", "-")
        card = files.read_json(student / f"{name}.json")
        assert card["action_type"] == "int64"
        assert card["action_shape"] == list(SPACES[KINDS[index]].shape)
        of_both = [card["files"][f"{name}.onnx"], of_all[index]["files"]["all-tasks.onnx"]]
        assert [entry["largest_difference"] for entry in of_both] == [0, 0]
        returns, *_ = evaluate.rollout(model, task, index, task.target, 2, evaluate.SEED)
        assert card["files"][f"{name}.onnx"]["return_mean"] == returns.mean()
        session = export.session(str(student / f"{name}.onnx"))
        env = gym.make(task.env_id)
        alone = [example["play"](session, env, card, task.target, evaluate.SEED + i) for i in range(2)]
        assert np.array_equal(alone, returns)

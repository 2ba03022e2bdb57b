"""support/spaces.py: a sample becomes the same numbers in an environment and in a recorded episode."""

import dataclasses
import re
import runpy
from collections import OrderedDict

import gymnasium as gym
import hypothesis
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces as gs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from minari.data_collector import EpisodeBuffer

import data
import distill
import evaluate
import export
import model as dt
import policy
import report
import teacher
from conftest import ROOT, make_dataset
from support import UserError, files, minari_files, spaces

DESCRIBED = dict.fromkeys(("author", "author_email", "code_permalink", "algorithm_name", "description"), "-")
LETTERS = "ab "  # few: so that samples share their words


# ---- random spaces -----------------------------------------------------------------------------------------


@st.composite
def boxes(draw):
    shape = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
    if draw(st.booleans()):
        return gs.Box(-3, 200, shape, draw(st.sampled_from([np.int64, np.float64, np.float32])))
    return gs.Box(0, 255, shape, np.uint8)


IMAGES = [(36, 90), (40, 37), (100, 36, 3), (2, 40, 37), (85, 84, 1)]


def multi_discrete(sizes):
    return gs.MultiDiscrete([n for n, _ in sizes], start=[start for _, start in sizes])


def in_any_order(inner):
    """A Dict whose entries are not sorted: that of an environment need not be, that of a dataset is."""
    return gs.Dict(OrderedDict(inner))


sizes = st.tuples(st.integers(1, 4), st.integers(-3, 3))
leaves = st.one_of(
    boxes(),
    st.sampled_from(IMAGES).map(lambda shape: gs.Box(0, 255, shape, np.uint8)),
    sizes.map(lambda n: gs.Discrete(n[0], start=n[1])),
    st.lists(sizes, min_size=1, max_size=3).map(multi_discrete),
    st.integers(1, 4).map(gs.MultiBinary),
    st.lists(st.integers(1, 3), min_size=2, max_size=2).map(gs.MultiBinary),
    st.just(gs.Text(12, charset=LETTERS)),
)
nested = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda x: gs.Tuple(tuple(x))),
        st.dictionaries(st.text("xyz", min_size=1, max_size=2), inner, min_size=1, max_size=3).map(
            in_any_order
        ),
        st.fixed_dictionaries(dict.fromkeys(sorted(spaces.GOAL_KEYS), inner)).map(gs.Dict),
    ),
    max_leaves=6,
)


def recorded(space, samples):
    """Samples of a space as one episode's field."""
    if isinstance(space, gs.Dict):
        return {key: recorded(inner, [x[key] for x in samples]) for key, inner in space.spaces.items()}
    if isinstance(space, gs.Tuple):
        return tuple(recorded(inner, [x[i] for x in samples]) for i, inner in enumerate(space.spaces))
    return list(samples) if isinstance(space, gs.Text) else np.stack(samples)


def write(name, space, episodes, data_format="hdf5"):
    """A Minari dataset of these observations; each episode has one more of them than steps."""
    rng = np.random.default_rng(0)
    buffers = []
    for i, samples in enumerate(episodes):
        L = len(samples) - 1
        buffers.append(
            EpisodeBuffer(
                id=i,
                observations=recorded(space, samples),
                actions=rng.uniform(-1, 1, (L, 2)).astype(np.float32),
                rewards=rng.normal(size=L),
                terminations=np.zeros(L, bool),
                truncations=np.arange(L) == L - 1,
            )
        )
    minari.create_dataset_from_buffers(
        name,
        buffers,
        observation_space=space,
        action_space=gs.Box(-1, 1, (2,), np.float32),
        data_format=data_format,
        jpeg_encoding=False,
        **DESCRIBED,
    )


class Replay(gym.Env):
    """Shows given observations, one after the other."""

    def __init__(self, space, samples):
        self.observation_space = space
        self.action_space = gs.Discrete(1)
        self.samples = iter(samples)

    def reset(self, *, seed=None, options=None):
        return next(self.samples), {}

    def step(self, action):
        return next(self.samples), 0.0, False, False, {}


# ---- the same numbers --------------------------------------------------------------------------------------


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(nested, st.sampled_from(["hdf5", "arrow"]), st.integers(0, 2**31))
def test_vectors__are_the_same_of_an_environment_and_of_its_recorded_episodes(space, data_format, seed):
    space.seed(seed)
    episodes = [[space.sample() for _ in range(L + 1)] for L in (3, 1)]
    name = "tests/nested-v0"
    if name in minari.list_local_datasets():
        minari.delete_dataset(name)
    write(name, space, episodes, data_format)
    try:
        table, lengths, about, pixels = minari_files.read_minari(name, minari_files.local(name))
    except UserError as e:
        # texts of spaces alone; what fits in no encoder, and with 36 numbers of any value is no symbols
        assert re.search("without a word|images of several sizes|too small for the encoder", str(e))
        return
    O = table.shape[1] - 4
    if pixels is None:
        pixels = np.zeros((len(table), 0))
    description = about["obs_space"] or spaces.box(O)
    assert spaces.is_valid(description, O)
    assert spaces.without_words(description) == spaces.describe(space, "it")
    observed = np.concatenate((table[:, :O], pixels), 1)
    for samples, rows in zip(episodes, np.split(observed, np.cumsum(lengths)[:-1]), strict=True):
        env = spaces.VectorObservation(Replay(space, samples), description)
        shown = [env.reset()[0]] + [env.step(0)[0] for _ in rows[1:]]
        assert all(x.dtype == np.float32 and x in env.observation_space for x in shown)
        assert np.array_equal(np.stack(shown), rows)


def test_vectors__are_what_the_table_says():
    space = gs.Dict(
        {
            "z": gs.Tuple((gs.Discrete(3, start=5), gs.MultiDiscrete([2, 3]))),
            "a": gs.Box(-1, 1, (2, 1)),
            "m": gs.MultiBinary(2),
            "t": gs.Text(50),
        }
    )
    observation = {
        "z": (6, np.array([1, 0])),
        "a": np.array([[0.5], [-0.5]]),
        "m": np.array([1, 0]),
        "t": "The red ball, by the box",
    }
    description = spaces.describe(space, "it")
    assert spaces.size(description) == 2 + 2 + 0 + 3 + 5
    episode = recorded(space, [observation, observation])
    description = spaces.with_words(description, [episode], "it")
    text = [1.2, 1.5, 1.3, 1.1, 1 + 1.4]  # ball, box, by, red, the
    wanted = np.float32([0.5, -0.5, 1, 0, *text, 0, 1, 0, 0, 1, 1, 0, 0])
    assert spaces.vector(description, observation) == pytest.approx(wanted)
    assert np.array_equal(spaces.vectors(description, episode), [spaces.vector(description, observation)] * 2)
    assert spaces.measured(description).tolist() == [True] * 2 + [False] * 15


def test_vectors__of_goal_dicts_leave_out_what_is_achieved_and_only_of_these():
    box = gs.Box(-1, 1, (2,))
    goal = {
        "achieved_goal": box,
        "desired_goal": gs.Dict({"microwave": gs.Box(-1, 1, (1,)), "kettle": gs.Box(-1, 1, (7,))}),
        "observation": box,
    }
    paths = [part["path"] for part in spaces.describe(gs.Dict(goal), "it")]
    assert paths == [["observation"], ["desired_goal", "kettle"], ["desired_goal", "microwave"]]
    paths = [part["path"] for part in spaces.describe(gs.Dict({**goal, "more": box}), "it")]
    assert paths[0] == ["achieved_goal"]
    assert len(paths) == 5


def test_vectors__tell_apart_texts_of_the_same_words():
    description = [{"path": [], "kind": "text", "words": ["ball", "blue", "box", "by", "red", "the"]}]
    texts = ["the red ball by the blue box", "the blue ball by the red box", "the red box by the blue ball"]
    assert len(np.unique(spaces.vectors(description, texts), axis=0)) == 3


def test_vector__tells_once_of_a_word_that_was_never_seen(capsys):
    description = [{"path": ["mission"], "kind": "text", "words": ["ball", "red"]}]
    seen = spaces.vector(description, {"mission": "red ball"})
    for _ in range(3):
        assert np.array_equal(spaces.vector(description, {"mission": "red ball Zebra"}), seen)
    message = "'zebra' at 'mission' is not among the words of the training data: it is ignored\n"
    assert capsys.readouterr().err == message


class MissionSpace(gym.Space):
    """A space of strings that is no Text, as minigrid's."""

    def __init__(self):
        super().__init__(dtype=str)


def test_describe__takes_any_space_of_strings_for_a_text():
    spaces_of_both = [gs.Dict({"mission": space}) for space in (MissionSpace(), gs.Text(9))]
    ours, texts = (spaces.describe(space, "it") for space in spaces_of_both)
    assert ours == texts


WHOLE = {
    "numbers": {"path": ["a", 0], "kind": "numbers", "size": 3},
    "bits": {"path": [], "kind": "bits", "size": 3},
    "one-hot": {"path": [], "kind": "one-hot", "sizes": [1, 2], "first": [-1, 0]},
    "text": {"path": [], "kind": "text", "words": ["a", "b", "c"]},
    "symbols": {"path": [], "kind": "symbols", "shape": [1, 1, 1], "values": [[4, 0, 255]]},
}
IMAGE = {"path": [], "kind": "image", "shape": [100, 40, 3], "pixels": [1, 84, 40]}
DAMAGE = [
    ("numbers", {"size": 2}),
    ("numbers", {"size": 3.0}),
    ("numbers", {"size": [3]}),
    ("numbers", {"path": "a"}),
    ("numbers", {"path": [-1]}),
    ("numbers", {"path": [["a"]]}),
    ("numbers", {"kind": "one-hot"}),
    ("numbers", {"kind": "words"}),
    ("numbers", {"kind": ["numbers"]}),
    ("numbers", {"more": 0}),
    ("bits", {"size": True}),
    ("one-hot", {"sizes": [3]}),
    ("one-hot", {"sizes": [4, -1]}),
    ("one-hot", {"sizes": [1.0, 2.0]}),
    ("one-hot", {"first": [0, 2**63]}),
    ("one-hot", {"first": None}),
    ("text", {"words": ["a", "b", "b"]}),
    ("text", {"words": ["a", "b", 3]}),
    ("text", {"words": [[], "b", "c"]}),
    ("text", {"words": "abc"}),
    ("symbols", {"shape": [1]}),
    ("symbols", {"shape": [1, 1, 1, 1]}),
    ("symbols", {"shape": [0, 1, 1]}),
    ("symbols", {"shape": [2, 1]}),
    ("symbols", {"shape": None}),
    ("symbols", {"values": [[4, 0], [255]]}),
    ("symbols", {"values": [[4, 4, 0]]}),
    ("symbols", {"values": [[4, "0", 1]]}),
    ("symbols", {"values": [[4, -1, 0]]}),
    ("symbols", {"values": 3}),
]
DAMAGED_IMAGES = [
    {"shape": [100, 40, 2]},
    {"shape": [2**40, 40, 2]},
    {"shape": [83, 40, 3]},
    {"shape": "abc"},
    {"pixels": [1, 84]},
    {"pixels": [1, 101, 40]},
    {"pixels": [1, 35, 40]},
    {"pixels": [1, 84.0, 40]},
    {"pixels": [3, 84, 40]},
    {"pixels": None},
    {"values": []},
]


@pytest.mark.parametrize(("kind", "change"), DAMAGE, ids=str)
def test_is_valid__refuses_what_no_space_is_described_by(kind, change):
    assert spaces.is_valid([WHOLE[kind]], 3)
    assert not spaces.is_valid([WHOLE[kind] | change], 3)
    assert not spaces.is_valid([WHOLE[kind], change], 3)


@pytest.mark.parametrize("change", DAMAGED_IMAGES, ids=str)
def test_is_valid__refuses_what_no_image_is_described_by(change):
    assert spaces.is_valid([IMAGE], 0)
    assert not spaces.is_valid([IMAGE | change], 0)


# ---- images ------------------------------------------------------------------------------------------------


def averaged(plane, height, width):
    """By its definition: each element repeated, then means of equal blocks."""
    H, W = plane.shape
    fine = plane.repeat(height, 0).repeat(width, 1).astype(np.float64)
    return fine.reshape(height, H, width, W).mean((1, 3))


@pytest.mark.parametrize(
    "shape", [(210, 160, 3), (210, 160), (3, 100, 36), (85, 84, 1), (84, 84), (4, 84, 84)]
)
def test_pixels__are_grey_and_averaged_over_areas(shape):
    space = gs.Box(0, 255, shape, np.uint8)
    space.seed(0)
    x = space.sample()
    description = spaces.describe(gs.Dict({"a": space, "b": gs.Box(-1, 1, (2,))}), "it")
    c, H, W = spaces.image(description)
    planes = {2: lambda: x[None], 3: lambda: x if shape[0] < 5 else np.moveaxis(x, 2, 0)}[len(shape)]()
    if shape[-1] == 3:
        planes = np.tensordot([[0.299, 0.587, 0.114]], planes, 1)
    assert [min(84, n) for n in planes.shape[1:]] == [H, W]
    wanted = [averaged(plane, H, W) for plane in planes]
    observation = {"a": x, "b": np.float32([0.25, 4])}
    vector = spaces.vector(description, observation)
    assert vector[:2].tolist() == [0.25, 4]
    assert np.abs(vector[2:] - np.ravel(wanted)).max() <= 0.501
    if planes.dtype == np.uint8 and planes.shape[1:] == (H, W):
        assert np.array_equal(vector[2:], np.ravel(planes))
    pixels = spaces.pixels(description, {"a": np.stack([x] * 3), "b": np.zeros((3, 2))})
    assert pixels.dtype == np.uint8
    assert pixels.shape == (3, c * H * W)
    assert np.array_equal(pixels, [vector[2:]] * 3)


def test_pixels__of_several_images_are_one_image():
    eye = gs.Box(0, 255, (40, 50, 3), np.uint8)
    hand = gs.Box(0, 255, (2, 40, 50), np.uint8)
    space = gs.Dict({"eye": eye, "hand": hand})
    description = spaces.describe(space, "it")
    assert spaces.image(description) == (3, 40, 50)
    space.seed(0)
    x = space.sample()
    assert np.array_equal(spaces.vector(description, x)[40 * 50 :], np.ravel(x["hand"]))
    assert not spaces.is_valid(description[::-1] + description[:1], 1)


SYMBOLS = gs.Dict({"image": gs.Box(0, 255, (3, 2, 3), np.uint8)})


def test_symbols__are_one_hot_of_each_channels_values(capsys):
    first = np.uint8([[[1, 0, 0], [2, 5, 0]], [[1, 5, 0], [8, 0, 0]], [[1, 0, 0], [1, 0, 0]]])
    last = np.ones_like(first)
    last[..., 1:] = 0
    description = spaces.with_words(
        spaces.describe(SYMBOLS, "it"), [{"image": first[None]}, {"image": last[None]}], "it"
    )
    assert description[0]["values"] == [[1, 2, 8], [0, 5], [0]]
    objects = [[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 0]]
    colours = [[1, 0], [0, 1], [0, 1], [1, 0], [1, 0], [1, 0]]
    wanted = [*np.ravel(objects), *np.ravel(colours), *[1] * 6]
    assert spaces.vector(description, {"image": first}).tolist() == wanted
    assert not spaces.measured(description).any()
    last[0, 0, 0] = 3
    for _ in range(2):
        assert not spaces.vector(description, {"image": last})[:3].any()
    message = "3 at 'image' is not among the symbols of the training data: it is ignored\n"
    assert capsys.readouterr().err == message


def test_with_words__refuses_small_images_that_are_no_symbols(monkeypatch):
    space = gs.Box(0, 255, (20, 35, 3), np.uint8)
    space.seed(0)
    message = "it has images of 20x35x3, too small for the encoder.* 36.* more than 32 values.*; enlarge them"
    with pytest.raises(UserError, match=message):
        spaces.with_words(spaces.describe(space, "it"), [space.sample()[None]], "it")
    monkeypatch.setattr(spaces, "MAX_CATEGORIES", 20 * 35 * 3 - 1)
    with pytest.raises(UserError, match="it has symbols of 20x35x3, 2100 categories; at most 2099"):
        spaces.with_words(spaces.describe(space, "it"), [np.zeros((1, 20, 35, 3), np.uint8)], "it")


# ---- datasets ----------------------------------------------------------------------------------------------

BABY = gs.Dict({"direction": gs.Discrete(4), "mission": gs.Text(30), "position": gs.Box(-10, 10, (2,))})


def baby_episodes(missions, seed=0):
    """Of 5 steps, one for each mission."""
    rng = np.random.default_rng(seed)
    episodes = []
    for mission in missions:
        episode = []
        for _ in range(6):
            position = rng.normal(3, 5, size=2).astype(np.float32)
            episode.append({"direction": rng.integers(2), "mission": mission, "position": position})
        episodes.append(episode)
    return episodes


@pytest.fixture(scope="module")
def baby():
    write("tests/baby-v0", BABY, baby_episodes(["go to the red ball"] * 19 + ["go to the blue ball"]))
    return "tests/baby-v0"


def test_load__normalises_measurements_alone(baby):
    for _ in range(2):  # the second time from the cache
        d = data.load(baby)
        assert [part["kind"] for part in d.task.obs_space] == ["one-hot", "text", "numbers"]
        assert d.task.obs_space[1]["words"] == ["ball", "blue", "go", "red", "the", "to"]
        assert np.array_equal(np.unique(d.train[:, :4]), [0, 1])
        assert d.train[:, 4:10].max() == np.float32(1.4)
        assert d.train[:, 10:12].std(0) == pytest.approx(1, abs=1e-3)
        assert d.task.obs_mean[:10] == [0.0] * 10
        assert d.task.obs_std[:10] == [1.0] * 10


def test_load__refuses_the_statistics_of_a_task_with_other_words(baby):
    of = data.load(baby).task
    write("tests/baby-same-v0", BABY, baby_episodes(["go to the blue red ball"] * 5, seed=1))
    assert data.load("tests/baby-same-v0", like=of).task is of
    write("tests/baby-other-v0", BABY, baby_episodes(["go to the red green ball"] * 5))
    with pytest.raises(UserError, match="tests/baby-other-v0 has other observations, or other words, than"):
        data.load("tests/baby-other-v0", like=of)


UNSUPPORTED = {
    "sequence": (gs.Sequence(gs.Discrete(2)), "has Sequence observations; only Box, Discrete, .* of these"),
    "graph": (
        gs.Dict({"a": gs.Tuple((gs.Discrete(2), gs.Graph(gs.Discrete(2), None)))}),
        "has Graph observations at 'a/1'; only Box",
    ),
    "many": (gs.Dict({"a": gs.Discrete(10**9)}), "at 'a' of 1000000000 categories; at most 10000"),
    "none": (gs.Box(-1, 1, (0,)), "has observations without a number"),
    "sizes": (
        gs.Tuple((gs.Box(0, 255, (40, 50), np.uint8), gs.Box(0, 255, (120, 90, 3), np.uint8))),
        "has images of several sizes, 40x50, 84x84 pixels; give them one, or keep one of them",
    ),
    "empty": (gs.Dict({"a": gs.Tuple(())}), "has observations without a number"),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_describe__names_a_space_that_is_not_supported_and_where_it_stands(kind):
    space, message = UNSUPPORTED[kind]
    with pytest.raises(UserError, match=f"dataset x/y-v0 .*{message}") as e:
        spaces.describe(space, "dataset x/y-v0")
    assert "\n" not in str(e.value)


def test_read__refuses_too_many_words(monkeypatch):
    monkeypatch.setattr(spaces, "MAX_WORDS", 5)
    write("tests/wordy-v0", BABY, baby_episodes(["go to the red ball", "go to the blue ball"]))
    with pytest.raises(UserError, match="tests/wordy-v0 has more than 5 words in its texts at 'mission'"):
        data.load("tests/wordy-v0")


def test_read__names_an_observation_outside_its_space():
    episodes = baby_episodes(["go"] * 3)
    episodes[2][1]["direction"] = 7
    write("tests/lost-v0", BABY, episodes)
    with pytest.raises(UserError, match="past episode 2 .ValueError: observation 7 at 'direction' is not in"):
        data.load("tests/lost-v0")


# ---- a run -------------------------------------------------------------------------------------------------


class Reach(gym.Env):
    """A point on a line is to go to a goal that is named by a number and a colour."""

    observation_space = gs.Dict(
        {
            "observation": gs.Tuple((gs.Box(-9, 9, (1,), np.float64), gs.Discrete(2, start=1))),
            "desired_goal": gs.Dict(
                {"x": gs.Box(-9, 9, (1,), np.float64), "colour": gs.Text(9, charset="dark e")}
            ),
            "achieved_goal": gs.Box(-9, 9, (1,), np.float64),
        }
    )
    action_space = gs.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = np.zeros(1)
        self.goal = self.np_random.uniform(-2, 2, 1)
        return self._observation(), {}

    def step(self, action):
        self.x = np.clip(self.x + action, -9, 9)
        distance = float(abs(self.x - self.goal)[0])
        return self._observation(), -distance, distance < 0.1, False, {"success": distance < 0.1}

    def _observation(self):
        side = 1 + int(self.x[0] > self.goal[0])
        goal = {"x": self.goal, "colour": "dark red" if side == 1 else "red"}
        return {"observation": (self.x, side), "desired_goal": goal, "achieved_goal": self.x}


gym.register("tests/Reach-v0", "test_support_spaces:Reach", max_episode_steps=12)


def collect(name, env_id, n_episodes, policy):
    """A Minari dataset of a policy's episodes."""
    env = gym.make(env_id)
    buffers = []
    for seed in range(n_episodes):
        observations = [env.reset(seed=seed)[0]]
        actions = []
        rewards = []
        done = False
        while not done:
            actions.append(policy(observations[-1]))
            observation, reward, terminated, truncated, _ = env.step(actions[-1])
            observations.append(observation)
            rewards.append(reward)
            done = terminated or truncated
        L = len(rewards)
        buffers.append(
            EpisodeBuffer(
                id=seed,
                observations=recorded(env.observation_space, observations),
                actions=np.stack(actions),
                rewards=rewards,
                terminations=np.zeros(L, bool),
                truncations=np.arange(L) == L - 1,
            )
        )
    minari.create_dataset_from_buffers(name, buffers, env=env, **DESCRIBED)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Of a task of goals and of one of vectors; its directory. Both are learnt for an instant only."""
    rng = np.random.default_rng(0)

    def towards_the_goal(observation):
        step = observation["desired_goal"]["x"] - observation["observation"][0] + rng.normal(0, 0.3, 1)
        return np.clip(step, -1, 1).astype(np.float32)

    collect("tests/reach-v0", "tests/Reach-v0", 20, towards_the_goal)
    make_dataset("tests/pendulum-v0", [20] * 5, obs_dim=3, act_dim=1, spec="Pendulum-v1")
    home = tmp_path_factory.mktemp("goals")
    options = {"steps": 20, "batch_size": 64, "eval_episodes": 2, "device": "cpu"}
    teachers = []
    for name in ("reach", "pendulum"):
        out = str(home / name)
        size = {"n_layer": 1, "n_embd": 32, "context": 2}
        teachers.append(
            str(teacher.main(teacher.Config(dataset=f"tests/{name}-v0", out_dir=out, **size, **options)))
        )
    out = home / "student"
    distill.main(
        distill.Config(teachers=tuple(teachers), out_dir=str(out), n_layer=1, n_embd=16, ask=0.3, **options)
    )
    return out


def test_student__of_goals_and_of_vectors_is_evaluated_in_both(student):
    tasks = files.read_json(student / "metrics.json")["tasks"]
    assert all(np.isfinite(task["return_mean"]) for task in tasks.values())
    model, meta = dt.load(student)
    reach, pendulum = data.tasks(meta, student)
    assert spaces.size(reach.obs_space) == reach.obs_dim == 1 + 2 + 2 + 1
    assert pendulum.obs_space is None
    evaluate.main(evaluate.Config(str(student), eval_episodes=2, device="cpu"))
    evaluated = files.read_json(student / "evaluation.json")["tasks"]["tests/reach-v0"]
    for key in ("return_mean", "success_rate", "success_at_end"):
        assert evaluated[key] == tasks["tests/reach-v0"][key]
    assert "success_rate" not in tasks["tests/pendulum-v0"]
    assert [list(row)[-1] for row in report.Run(student).rows()] == ["student success", "held-out KL"]
    other = dataclasses.replace(reach, obs_space=reach.obs_space[::-1])
    message = "at 'observation/0', .* and 1 actions, dataset tests/reach-v0 1 numbers at 'desired_goal/x'"
    with pytest.raises(UserError, match=message):
        evaluate.check([other])


def test_tasks__of_models_from_before_there_were_descriptions_have_one_box(student):
    _, meta = dt.load(student)
    for fields in meta["tasks"]:
        del fields["obs_space"]
    tasks = data.tasks(meta, student)
    assert [task.obs_space for task in tasks] == [None, None]
    with pytest.raises(UserError, match="dataset tests/reach-v0 6 and 1"):
        evaluate.check(tasks)
    evaluate.check(tasks[1:])


@pytest.mark.slow
def test_student__acts_by_onnxruntime_as_it_does_here(student):
    export.main(export.Config(str(student), eval_episodes=2))
    model, meta = dt.load(student)
    task = data.tasks(meta, student)[0]
    card = files.read_json(student / "tests-reach-v0.json")
    returns, *_ = evaluate.rollout(model, task, 0, task.target, 2, evaluate.SEED)
    assert card["files"]["tests-reach-v0.onnx"]["return_mean"] == pytest.approx(returns.mean(), abs=1e-4)
    example = runpy.run_path(str(ROOT / "examples/act_onnx.py"))
    session = export.session(str(student / "tests-reach-v0.onnx"))
    env = gym.make("tests/Reach-v0")
    alone = [example["play"](session, env, card, task.target, evaluate.SEED + i) for i in range(2)]
    assert np.allclose(alone, returns, atol=1e-4)


class Sides(gym.Env):
    """An image whose left or right half is bright, at random; an action names the bright one."""

    observation_space = gs.Box(0, 255, (40, 90, 3), np.uint8)
    action_space = gs.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._observation(), {}

    def step(self, action):
        reward = float(action == self.side)
        return self._observation(), reward, False, False, {}

    def _observation(self):
        self.side = int(self.np_random.integers(2))
        image = self.np_random.integers(0, 60, self.observation_space.shape, np.uint8)
        image[:, 45 * self.side :][:, :45] += 150
        return image


gym.register("tests/Sides-v0", "test_support_spaces:Sides", max_episode_steps=8)


@pytest.fixture(scope="module")
def student_of_images(tmp_path_factory):
    """Of a task of images and of one of vectors; its directory."""
    rng = np.random.default_rng(0)

    def bright_half(observation):
        return np.int64(rng.integers(2) if rng.random() < 0.3 else observation[:, 45:].mean() > 100)

    collect("tests/sides-v0", "tests/Sides-v0", 40, bright_half)
    make_dataset("tests/swing-v0", [20] * 40, obs_dim=3, act_dim=1, spec="Pendulum-v1")
    home = tmp_path_factory.mktemp("images")
    options = {"n_layer": 1, "n_embd": 16, "batch_size": 32, "eval_episodes": 4, "device": "cpu"}
    options |= {"steps": 60, "warmup": 10}
    teachers = []
    for name in ("sides", "swing"):
        out = str(home / name)
        config = teacher.Config(dataset=f"tests/{name}-v0", out_dir=out, context=2, **options)
        teachers.append(str(teacher.main(config)))
    out = home / "student"
    distill.main(distill.Config(teachers=tuple(teachers), out_dir=str(out), ask=0.3, **options))
    return out


def test_student__of_images_sees_them(student_of_images):
    metrics = files.read_json(student_of_images / "metrics.json")["tasks"]["tests/sides-v0"]
    of_teacher = files.read_json(student_of_images.parent / "sides/metrics.json")["tasks"]["tests/sides-v0"]
    assert min(metrics["return_mean"], of_teacher["return_mean"]) > 7.5  # of 8; at random 4
    model, meta = dt.load(student_of_images)
    assert model.cfg.images == ((1, 40, 84), ())
    assert data.tasks(meta, student_of_images)[0].obs_dim == 0


def test_policy__of_images_acts_as_the_model_on_the_whole_window(student_of_images):
    model, meta = dt.load(student_of_images)
    task = data.tasks(meta, student_of_images)[0]
    p = policy.Policy.of(model, task, 0)
    p.reset(target_return=6.0, episodes=30)
    images = np.random.default_rng(0).integers(0, 100, (30, 40, 84))
    images[:20, :, 42:] += 150
    images[10:, :, :42] += 150
    vectors = images.reshape(30, -1).astype(np.float32)
    actions = p.act(vectors)
    pixels = torch.from_numpy(vectors.astype(np.uint8))[:, None]
    rtg = torch.full((30, 1), 6.0 / task.rtg_scale)
    timesteps = torch.zeros(30, 1, dtype=torch.long)
    inputs = (torch.zeros(30, 1, 0), torch.zeros(30, 1, 2), rtg, timesteps, timesteps == 0, pixels)
    logits = model(0, *inputs)[0][:, 0]
    assert np.array_equal(actions, logits.argmax(1).numpy())
    assert len(set(actions.tolist())) == 2


@pytest.mark.slow
def test_student__of_images_acts_by_onnxruntime_as_it_does_here(student_of_images):
    export.main(export.Config(str(student_of_images), eval_episodes=4, int8=True))
    card = files.read_json(student_of_images / "tests-sides-v0.json")
    returns = files.read_json(student_of_images / "metrics.json")["tasks"]["tests/sides-v0"]["return_mean"]
    whole, int8 = card["files"].values()
    assert whole["return_mean"] == int8["return_mean"] == returns
    assert whole["largest_difference"] < 1e-2  # the share of actions that differ
    assert int8["bytes"] < 0.95 * whole["bytes"]
    example = runpy.run_path(str(ROOT / "examples/act_onnx.py"))
    session = export.session(str(student_of_images / "tests-sides-v0.onnx"))
    env = gym.make("tests/Sides-v0")
    alone = [example["play"](session, env, card, card["target"], evaluate.SEED + i) for i in range(4)]
    assert np.mean(alone) == returns
    assert not (student_of_images / "all-tasks.onnx").exists()


@settings(max_examples=40)
@given(nested, st.integers(0, 2**31))
def test_act_onnx__makes_the_same_vectors(space, seed):
    space.seed(seed)
    samples = [space.sample() for _ in range(3)]
    try:
        description = spaces.with_words(spaces.describe(space, "it"), [recorded(space, samples)], "it")
    except UserError:  # of texts alone, none of which has a word; or of images of several sizes
        hypothesis.assume(False)
    vector = runpy.run_path(str(ROOT / "examples/act_onnx.py"))["vector"]
    for sample in samples:
        assert vector(sample, description)[0] == pytest.approx(spaces.vector(description, sample))

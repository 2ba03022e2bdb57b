"""Observations of any space as vectors of O numbers, the same for recorded episodes and for environments.

Used by data.py, evaluate.py, environments.py and minari_files.py.

    space            becomes
    Box              its elements, flat
    Discrete         one-hot
    MultiDiscrete    one-hot of each of its numbers, one after the other
    MultiBinary      its bits, flat
    Text             a number for each word of the dataset's own vocabulary
    goal Dict        `observation`, then `desired_goal`; `achieved_goal` is dropped
    other Dict       its entries in the order of their keys
    Tuple            its entries in their order

Dicts and Tuples may be nested. A goal Dict has those three keys and no others (gymnasium-robotics). Text
stands for any space of strings, such as minigrid's MissionSpace. A word at position p of a text, from 0, adds
1 + p / 10 to its number: counts alone would take "the red ball by the blue box" for "the blue ball by the red
box".

A space is described by the list of its parts, in their order. It is JSON, saved with every model:
    {"path": ["desired_goal", 0], "kind": "numbers", "size": 3}
    {"path": [], "kind": "bits", "size": 3}
    {"path": [], "kind": "one-hot", "sizes": [2, 5], "first": [0, 0]}
    {"path": ["mission"], "kind": "text", "words": ["ball", "blue"]}
A path holds keys of Dicts and indices of Tuples.
"""

import functools
import re
import sys
from collections.abc import Iterable
from typing import Any

import gymnasium as gym
import numpy as np

from support import UserError

GOAL_KEYS = {"observation", "desired_goal", "achieved_goal"}
SUPPORTED = "Box, Discrete, MultiDiscrete, MultiBinary, Text, and Dicts and Tuples of these"
FIELDS = {"numbers": {"size"}, "bits": {"size"}, "one-hot": {"sizes", "first"}, "text": {"words"}}
MAX_CATEGORIES = 10_000  # of one space
MAX_WORDS = 1000  # of one text

Description = list[dict[str, Any]]


# ---- descriptions ------------------------------------------------------------------------------------------


def describe(space: gym.Space, owner: str) -> Description:
    """The parts of a space, its texts without words yet; owner: whose observations they are, for the errors.

    Raises UserError for a space that is not supported.
    """
    parts = []
    for path, leaf in _leaves(space, []):
        part = _part(leaf)
        if part is None:
            raise UserError(
                f"{owner} has {type(leaf).__name__} observations{_at(path)}; only {SUPPORTED} "
                f"can be learnt from"
            )
        sizes = part.get("sizes", [])
        if sum(sizes) > MAX_CATEGORIES:
            raise UserError(
                f"{owner} has {type(leaf).__name__} observations{_at(path)} of {sum(sizes)} categories; "
                f"at most {MAX_CATEGORIES} can be learnt from"
            )
        parts.append({"path": path, **part})
    if not any(part["kind"] == "text" for part in parts) and size(parts) == 0:
        raise UserError(
            f"{owner} has observations without a number, {space}: nothing can be learnt from them"
        )
    return parts


def _leaves(space, path):
    """(path, space) of the spaces in a nesting that are no Dicts or Tuples."""
    if isinstance(space, gym.spaces.Dict):
        keys = sorted(space.spaces)
        if set(keys) == GOAL_KEYS:
            keys = ["observation", "desired_goal"]
    elif isinstance(space, gym.spaces.Tuple):
        keys = range(len(space.spaces))
    else:
        return [(path, space)]
    leaves = []
    for key in keys:
        leaves += _leaves(space.spaces[key], [*path, key])
    return leaves


def _part(space):
    """What describes a space that is no Dict or Tuple, without its path; None where it is not supported."""
    if isinstance(space, gym.spaces.Box):
        return {"kind": "numbers", "size": int(np.prod(space.shape))}
    if isinstance(space, gym.spaces.MultiBinary):
        return {"kind": "bits", "size": int(np.prod(space.shape))}
    if isinstance(space, gym.spaces.Discrete):
        return {"kind": "one-hot", "sizes": [int(space.n)], "first": [int(space.start)]}
    if isinstance(space, gym.spaces.MultiDiscrete):
        first = np.ravel(space.start).tolist()
        return {"kind": "one-hot", "sizes": np.ravel(space.nvec).tolist(), "first": first}
    if space.dtype is not None and space.dtype.kind == "U":
        return {"kind": "text", "words": []}
    return None


def _at(path):
    return f" at {'/'.join(map(str, path))!r}" if path else ""


def box(O: int) -> Description:
    """Of one Box of O elements."""
    return [{"path": [], "kind": "numbers", "size": O}]


def summary(description: Description) -> str:
    """For messages: "11", or "3 numbers at 'observation', text at 'mission'"."""
    if description == box(size(description)):
        return str(size(description))
    sizes = ["text" if "words" in part else f"{_size(part)} {part['kind']}" for part in description]
    return ", ".join(x + _at(part["path"]) for x, part in zip(sizes, description, strict=True))


def size(description: Description) -> int:
    """O, how many numbers an observation becomes."""
    return sum(_size(part) for part in description)


def _size(part):
    if part["kind"] == "text":
        return len(part["words"])
    return sum(part["sizes"]) if part["kind"] == "one-hot" else part["size"]


def measured(description: Description) -> np.ndarray:
    """(O,) bool: which of the numbers are measurements, to be normalised: those of Boxes."""
    kinds = [np.full(_size(part), part["kind"] == "numbers") for part in description]
    return np.concatenate(kinds)


def without_words(description: Description) -> Description:
    """The same, of texts of any words: what two spaces have in common that only differ in their texts."""
    return [{**part, "words": []} if part["kind"] == "text" else part for part in description]


def is_valid(description: Any, O: int) -> bool:
    """Whether this is a description of observations of O numbers. It may be anything that JSON can be."""
    return isinstance(description, list) and all(map(_is_valid_part, description)) and size(description) == O


def _is_valid_part(part):
    def whole(x, least):
        return type(x) is int and least <= x < 2**63

    def is_list(x, is_element):
        return isinstance(x, list) and all(map(is_element, x))

    kind = part.get("kind") if isinstance(part, dict) else None
    if not isinstance(kind, str) or set(part) != {"path", "kind", *FIELDS.get(kind, ())}:
        return False
    valid = {
        "path": lambda x: is_list(x, lambda key: isinstance(key, str) or whole(key, 0)),
        "kind": lambda x: x in FIELDS,
        "size": lambda x: whole(x, 0),
        "sizes": lambda x: is_list(x, lambda n: whole(n, 1)) and len(x) == len(part["first"]),
        "first": lambda x: is_list(x, lambda n: whole(n, -(2**63))),
        "words": lambda x: is_list(x, lambda word: isinstance(word, str)) and len(set(x)) == len(x),
    }
    return all(valid[field](part[field]) for field in ("kind", "path", "first", *part) if field in part)


# ---- texts -------------------------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """Its words in their order: runs of letters and digits, in lower case."""
    return re.findall(r"\w+", text.lower())


def with_words(description: Description, episodes: Iterable[Any], owner: str) -> Description:
    """The same with the words of these episodes' observations. Raises UserError where there are too many."""
    words = {i: set() for i, part in enumerate(description) if part["kind"] == "text"}
    if not words:
        return description
    for observations in episodes:
        for i in words:
            for text in set(_find(observations, description[i]["path"])):
                words[i].update(words_of(text))
            if len(words[i]) > MAX_WORDS:
                raise UserError(
                    f"{owner} has more than {MAX_WORDS} words in its texts{_at(description[i]['path'])}; "
                    f"so many can't be learnt from"
                )
    found = [
        {**part, "words": sorted(words[i])} if i in words else part for i, part in enumerate(description)
    ]
    if size(found) == 0:
        raise UserError(f"{owner} has observations without a word: nothing can be learnt from them")
    return found


@functools.cache
def _tell_of_unknown_word(word, at):
    """Once in a process."""
    print(f"{word!r}{at} is not among the words of the training data: it is ignored", file=sys.stderr)


# ---- observations to numbers -------------------------------------------------------------------------------


def vectors(description: Description, observations: Any) -> np.ndarray:
    """(T, O) float32 of T observations of one nesting, whose arrays have an axis of T.

    Raises ValueError and the like where they are not of the space.
    """
    return np.concatenate([_encode(part, _find(observations, part["path"])) for part in description], 1)


def vector(description: Description, observation: Any) -> np.ndarray:
    """(O,) float32 of one observation."""
    return np.concatenate([_encode(part, [_find(observation, part["path"])])[0] for part in description])


def _find(observation, path):
    for key in path:
        observation = observation[key]
    return observation


def _encode(part, x):
    """x: T elements of a part's space. (T, n) float32."""
    if part["kind"] == "one-hot":
        return _one_hot(part, np.reshape(x, (len(x), -1)).astype(np.int64))
    if part["kind"] == "text":
        of_text = {text: _of_text(part, text) for text in set(x)}
        return np.stack([of_text[text] for text in x])
    return np.reshape(x, (len(x), part["size"])).astype(np.float32)


def _one_hot(part, x):
    """x (T, k) -> (T, sum of the k sizes)."""
    index = x - np.array(part["first"])
    outside = (index < 0) | (index >= np.array(part["sizes"]))
    if outside.any():
        raise ValueError(f"observation {x[outside][0]}{_at(part['path'])} is not in its space")
    offset = np.cumsum([0, *part["sizes"][:-1]])
    encoded = np.zeros((len(x), _size(part)), np.float32)
    np.put_along_axis(encoded, index + offset, 1.0, 1)
    return encoded


def _of_text(part, text):
    """(number of words,)."""
    encoded = np.zeros(len(part["words"]), np.float32)
    known = {word: i for i, word in enumerate(part["words"])}
    for position, word in enumerate(words_of(text)):
        if word in known:
            encoded[known[word]] += 1 + position / 10
        else:
            _tell_of_unknown_word(word, _at(part["path"]))
    return encoded


class VectorObservation(gym.ObservationWrapper):
    """An environment whose observations are the vectors (O,) of a description of its space."""

    def __init__(self, env: gym.Env, description: Description):
        super().__init__(env)
        self.description = description
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size(description),), np.float32)

    def observation(self, observation: Any) -> np.ndarray:
        return vector(self.description, observation)

"""Observations of any space as O numbers and P pixels, the same for recorded episodes and for environments.

Used by data.py, evaluate.py, environments.py and minari_files.py.

    space            becomes
    Box              its elements, flat
    image            pixels: a Box of uint8 with two or three axes, whose sides are at least MIN_SIDE
    symbols          such a Box with a smaller side: one-hot of each of its elements, as minigrid's 7x7x3
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

Of three axes the shorter of the first and the last one holds channels; both alike: the last. An image of
three channels on its last axis is a colour one and becomes grey; other channels stay, such as the four frames
of (4, 84, 84). Sides longer than MAX_SIDE are averaged over areas down to it. Pixels stay uint8, in cache and
batch; the model's encoder makes features of them. The images of an observation must become of one size: they
are one image, their channels one after the other. Which symbols there are, the dataset's own episodes say,
each channel its own; one never seen is zeros.

A space is described by the list of its parts, in their order. It is JSON, saved with every model:
    {"path": ["desired_goal", 0], "kind": "numbers", "size": 3}
    {"path": [], "kind": "bits", "size": 3}
    {"path": [], "kind": "one-hot", "sizes": [2, 5], "first": [0, 0]}
    {"path": ["mission"], "kind": "text", "words": ["ball", "blue"]}
    {"path": [], "kind": "symbols", "shape": [7, 7, 3], "values": [[0, 1, 8], [0, 5], [0]]}
    {"path": [], "kind": "image", "shape": [210, 160, 3], "pixels": [1, 84, 84]}
A path holds keys of Dicts and indices of Tuples.
"""

import copy
import functools
import math
import re
import sys
from collections.abc import Iterable
from typing import Any

import gymnasium as gym
import numpy as np

from support import UserError

GOAL_KEYS = {"observation", "desired_goal", "achieved_goal"}
SUPPORTED = "Box, Discrete, MultiDiscrete, MultiBinary, Text, and Dicts and Tuples of these"
FIELDS = {
    "numbers": {"size"},
    "bits": {"size"},
    "one-hot": {"sizes", "first"},
    "text": {"words"},
    "symbols": {"shape", "values"},
    "image": {"shape", "pixels"},
}
MAX_CATEGORIES = 10_000  # of one space
MAX_WORDS = 1000  # of one text
MAX_VALUES = 32  # of one channel of symbols
MAX_SIDE = 84  # of the pixels that an image becomes, Mnih et al.'s
MIN_SIDE = 36  # of an image, the least that the encoder's three convolutions take
AT_ONCE = 256  # images

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
    if not any(part["kind"] in ("text", "symbols", "image") for part in parts) and size(parts) == 0:
        raise UserError(
            f"{owner} has observations without a number, {space}: nothing can be learnt from them"
        )
    sizes = {tuple(part["pixels"][1:]) for part in parts if part["kind"] == "image"}
    if len(sizes) > 1:
        raise UserError(
            f"{owner} has images of several sizes, {', '.join(f'{h}x{w}' for h, w in sorted(sizes))} pixels; "
            f"give them one, or keep one of them"
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
    is_image = isinstance(space, gym.spaces.Box) and space.dtype == np.uint8 and len(space.shape) in (2, 3)
    if is_image and min(space.shape) > 0:
        return _image(list(space.shape))
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


def _image(shape):
    """The same of a uint8 Box of this shape."""
    c, H, W = _channels_first(shape)
    if min(H, W) < MIN_SIDE:
        return {"kind": "symbols", "shape": shape, "values": [[] for _ in range(c)]}
    channels = 1 if _is_colour(shape) else c
    return {"kind": "image", "shape": shape, "pixels": [channels, min(H, MAX_SIDE), min(W, MAX_SIDE)]}


def _channels_first(shape):
    """(c, H, W) of an image's shape."""
    if len(shape) == 2:
        return 1, *shape
    return (*shape,) if shape[0] < shape[2] else (shape[2], *shape[:2])


def _planes(x, shape):
    """T images of this shape -> (T, c, H, W)."""
    x = np.reshape(x, (len(x), *shape))
    if len(shape) == 3 and shape[0] >= shape[2]:
        x = np.moveaxis(x, 3, 1)
    return x.reshape(len(x), *_channels_first(shape))


def _is_colour(shape):
    return len(shape) == 3 and shape[2] == 3 <= shape[0]


def _at(path):
    return f" at {'/'.join(map(str, path))!r}" if path else ""


def box(O: int) -> Description:
    """Of one Box of O elements."""
    return [{"path": [], "kind": "numbers", "size": O}]


def summary(description: Description) -> str:
    """For messages: "11", or "3 numbers at 'observation', text at 'mission'"."""
    if description == box(size(description)):
        return str(size(description))
    parts = []
    for part in description:
        shape = "x".join(map(str, part.get("shape", ())))
        n = "" if part["kind"] == "text" else f"{shape or _size(part)} "
        parts.append(f"{n}{part['kind']}{_at(part['path'])}")
    return ", ".join(parts)


def size(description: Description) -> int:
    """O, how many numbers an observation becomes."""
    return sum(_size(part) for part in description)


def _size(part):
    if part["kind"] == "text":
        return len(part["words"])
    if part["kind"] == "symbols":
        return math.prod(part["shape"]) // len(part["values"]) * sum(map(len, part["values"]))
    if part["kind"] == "image":
        return 0
    return sum(part["sizes"]) if part["kind"] == "one-hot" else part["size"]


def image(description: Description) -> tuple[int, ...]:
    """(channels, height, width) of the pixels that an observation becomes; (): it has none."""
    images = [part["pixels"] for part in description if part["kind"] == "image"]
    return (sum(c for c, _, _ in images), *images[0][1:]) if images else ()


def n_pixels(description: Description) -> int:
    """P, how many pixels an observation becomes."""
    shape = image(description)
    return math.prod(shape) if shape else 0


def measured(description: Description) -> np.ndarray:
    """(O,) bool: which of the numbers are measurements, to be normalised: those of Boxes."""
    kinds = [np.full(_size(part), part["kind"] == "numbers") for part in description]
    return np.concatenate(kinds)


def without_words(description: Description) -> Description:
    """The same, of any words and symbols: what two spaces have in common that only differ in these."""
    cleared = []
    for part in description:
        of_data = {"text": {"words": []}, "symbols": {"values": [[]] * len(part.get("values", ()))}}
        cleared.append({**part, **of_data.get(part["kind"], {})})
    return cleared


def is_valid(description: Any, O: int) -> bool:
    """Whether this is a description of observations of O numbers. It may be anything that JSON can be."""
    return isinstance(description, list) and all(map(_is_valid_part, description)) and size(description) == O


def _is_valid_part(part):
    def whole(x, least):
        return type(x) is int and least <= x < 2**63

    def is_list(x, is_element):
        return isinstance(x, list) and all(map(is_element, x))

    def is_values(x):
        return is_list(x, lambda value: whole(value, 0)) and len(set(x)) == len(x)

    def fits(pixels, shape):
        c, H, W = _channels_first(shape)
        channels = 1 if _is_colour(shape) else c
        small_enough = MIN_SIDE <= pixels[1] <= H and MIN_SIDE <= pixels[2] <= W
        return small_enough and pixels[0] == channels

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
        "shape": lambda x: is_list(x, lambda n: whole(n, 1)) and len(x) in (2, 3),
        "values": lambda x: is_list(x, is_values) and len(x) == _channels_first(part["shape"])[0],
        "pixels": lambda x: is_list(x, lambda n: whole(n, 1)) and len(x) == 3 and fits(x, part["shape"]),
    }
    first = ("kind", "path", "first", "shape")
    return all(valid[field](part[field]) for field in (*first, *part) if field in part)


# ---- texts -------------------------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """Its words in their order: runs of letters and digits, in lower case."""
    return re.findall(r"\w+", text.lower())


def with_words(description: Description, episodes: Iterable[Any], owner: str) -> Description:
    """The same with the words and symbols of these episodes' observations.

    Raises UserError where there are too many.
    """
    description = copy.deepcopy(description)
    of_data = [part for part in description if part["kind"] in ("text", "symbols")]
    if not of_data:
        return description
    for observations in episodes:
        for part in of_data:
            x = _find(observations, part["path"])
            if part["kind"] == "text":
                words = {word for text in set(x) for word in words_of(text)}
                part["words"] = sorted(words.union(part["words"]))
            else:
                planes = np.moveaxis(_planes(x, part["shape"]), 1, 0)  # (c, T, H, W)
                for i, plane in enumerate(planes):
                    part["values"][i] = sorted({*part["values"][i], *np.unique(plane).tolist()})
            _check_contents(part, owner)
    if size(description) + n_pixels(description) == 0:
        raise UserError(f"{owner} has observations without a word: nothing can be learnt from them")
    return description


def _check_contents(part, owner):
    """Raise UserError where a text has too many words, or symbols too many values."""
    at = _at(part["path"])
    if len(part.get("words", ())) > MAX_WORDS:
        raise UserError(
            f"{owner} has more than {MAX_WORDS} words in its texts{at}; so many can't be learnt from"
        )
    shape = "x".join(map(str, part.get("shape", ())))
    if max(map(len, part.get("values", [[]]))) > MAX_VALUES:
        raise UserError(
            f"{owner} has images of {shape}{at}, too small for the encoder, whose sides must be at least "
            f"{MIN_SIDE}, and of more than {MAX_VALUES} values, too many for symbols; enlarge them"
        )
    if part["kind"] == "symbols" and _size(part) > MAX_CATEGORIES:
        raise UserError(
            f"{owner} has symbols of {shape}{at}, {_size(part)} categories; at most {MAX_CATEGORIES} can be "
            f"learnt from"
        )


@functools.cache
def _tell_of_unknown(x, kind, at):
    """Once in a process."""
    print(f"{x!r}{at} is not among the {kind} of the training data: it is ignored", file=sys.stderr)


# ---- observations to numbers -------------------------------------------------------------------------------


def vectors(description: Description, observations: Any) -> np.ndarray:
    """(T, O) float32 of T observations of one nesting, whose arrays have an axis of T.

    Raises ValueError and the like where they are not of the space.
    """
    return np.concatenate([_encode(part, _find(observations, part["path"])) for part in description], 1)


def pixels(description: Description, observations: Any) -> np.ndarray:
    """(T, P) uint8 of the same observations."""
    images = [part for part in description if part["kind"] == "image"]
    return np.concatenate([_pixels(part, _find(observations, part["path"])) for part in images], 1)


def vector(description: Description, observation: Any) -> np.ndarray:
    """(O + P,) float32 of one observation: its numbers, then its pixels, from 0 to 255."""
    pieces = []
    for part in sorted(description, key=lambda part: part["kind"] == "image"):
        encode = _pixels if part["kind"] == "image" else _encode
        pieces.append(encode(part, [_find(observation, part["path"])])[0])
    return np.concatenate(pieces, dtype=np.float32)


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
    if part["kind"] == "symbols":
        return _of_symbols(part, x)
    if part["kind"] == "image":
        return np.zeros((len(x), 0), np.float32)  # its pixels are kept apart
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
            _tell_of_unknown(word, "words", _at(part["path"]))
    return encoded


def _of_symbols(part, x):
    """x: T images -> (T, n): channel by channel, one-hot of each element."""
    encoded = []
    for plane, values in zip(np.moveaxis(_planes(x, part["shape"]), 1, 0), part["values"], strict=True):
        is_value = plane[..., None] == np.array(values, int)  # (T, H, W, number of values)
        for value in np.unique(plane[~is_value.any(-1)]).tolist():
            _tell_of_unknown(value, "symbols", _at(part["path"]))
        encoded.append(is_value.reshape(len(x), -1))
    return np.concatenate(encoded, 1, dtype=np.float32)


def _pixels(part, x):
    """x: T images -> (T, c H W) uint8: grey where they are coloured, and averaged over areas."""
    c, H, W = part["pixels"]
    pixels = []
    for start in range(0, len(x), AT_ONCE):
        planes = _planes(x[start : start + AT_ONCE], part["shape"])
        if _is_colour(part["shape"]):
            red, green, blue = (planes[:, i].astype(np.float32) for i in range(3))
            planes = (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]  # ITU-R BT.601
        if planes.dtype != np.uint8 or planes.shape[2:] != (H, W):
            rows = _averages(planes.shape[2], H)
            columns = _averages(planes.shape[3], W).T
            planes = np.rint(rows @ np.ascontiguousarray(planes, np.float32) @ columns)
        pixels.append(planes.astype(np.uint8).reshape(len(planes), c * H * W))
    return np.concatenate(pixels)


def _averages(n, m):
    """(m, n) float32: the mean over each of m equal stretches of n elements, some of which they share."""
    ends = np.arange(m + 1)[:, None] * (n / m)
    i = np.arange(n)
    overlap = np.minimum(ends[1:], i + 1) - np.maximum(ends[:-1], i)
    return (overlap.clip(0) * (m / n)).astype(np.float32)


class VectorObservation(gym.ObservationWrapper):
    """An environment whose observations are the vectors (O + P,) of a description of its space."""

    def __init__(self, env: gym.Env, description: Description):
        super().__init__(env)
        self.description = description
        n = size(description) + n_pixels(description)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (n,), np.float32)

    def observation(self, observation: Any) -> np.ndarray:
        return vector(self.description, observation)

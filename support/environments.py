"""Environments and their spaces. Used by data.py, evaluate.py, minari_files.py and research/behaviour.py."""

import importlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from support import UserError, reason

WRAPPERS = (gym.ObservationWrapper, gym.ActionWrapper, gym.RewardWrapper)  # and two that are more than these
WRAPPERS += (gym.wrappers.AtariPreprocessing, gym.wrappers.FrameStackObservation)


def import_packages(names: Iterable[str]) -> None:
    """Import packages that register environments (--import). Raises UserError where one can't be imported."""
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as e:  # noqa: BLE001 - what a package's own code raises
            package = name.split(".")[0].replace("_", "-")
            raise UserError(
                f"--import {name}: can't be imported ({reason(e)}); try pip install {package}"
            ) from None


def make_env(
    env_id: str, env_kwargs: dict[str, Any], wrappers: Sequence[dict[str, Any]] = (), **kwargs: Any
) -> gym.Env:
    """gym.make; raises UserError where the environment is not registered or can't be made.

    env_id: Gymnasium's, also as module:id, whose module must have been imported: a dataset names it.
    wrappers: data.Task.env_wrappers, the innermost first.
    """
    module, _, name = env_id.rpartition(":")
    if module and module not in sys.modules:
        raise UserError(
            f"environment {env_id!r} is of a package that a dataset names, which is not imported unasked; "
            f"add --import {module} if you trust it, or use --eval-episodes 0"
        )
    if name not in gym.registry:  # also keeps a dataset from naming an entry point of its own to import
        raise UserError(
            f"environment {env_id!r} is not registered with Gymnasium; add --import and the package that "
            f"registers it, for example --import gymnasium_robotics, or use --eval-episodes 0"
        )
    classes = [_wrapper_class(env_id, wrapper["entry_point"]) for wrapper in wrappers]
    _silence_mujoco()
    try:
        env = gym.make(name, **{"disable_env_checker": True, **env_kwargs, **kwargs})
        for cls, wrapper in zip(classes, wrappers, strict=True):
            env = cls(env, **wrapper["kwargs"])
        return env
    except UserError:  # an environment of our own says what it needs
        raise
    except Exception as e:  # noqa: BLE001 - a package that it needs, an option that it does not know, ...
        raise UserError(
            f"environment {env_id!r} can't be made ({reason(e)}); "
            f"install what it needs, or use --eval-episodes 0"
        ) from None


def _wrapper_class(env_id, entry_point):
    """What module:name stands for. Raises UserError where that is not imported, or may do anything else."""
    module, _, name = entry_point.partition(":")
    if module not in sys.modules:
        raise UserError(
            f"environment {env_id!r} is wrapped in {entry_point!r}, as a dataset says, which is not imported "
            f"unasked; add --import {module} if you trust it, or use --eval-episodes 0"
        )
    cls = getattr(sys.modules[module], name, None)
    if not (isinstance(cls, type) and issubclass(cls, WRAPPERS)):  # RecordVideo, for one, writes files
        raise UserError(
            f"environment {env_id!r} is wrapped in {entry_point!r}, as a dataset says, which wraps neither "
            f"observations nor actions nor rewards; use --eval-episodes 0"
        )
    return cls


def are_wrappers(x: Any) -> bool:
    """Whether this can be data.Task.env_wrappers. It may be anything that JSON can be."""
    fields = {"entry_point": str, "kwargs": dict}
    for wrapper in x if isinstance(x, list) else [None]:
        if not isinstance(wrapper, dict) or {k: type(v) for k, v in wrapper.items()} != fields:
            return False
    return True


def _silence_mujoco():
    """Drop MuJoCo's warning, on every gym.make of HalfCheetah, that its model file's format is deprecated."""
    try:
        import mujoco
    except ImportError:
        return

    def warn(text: str) -> None:
        if "is deprecated" not in text:
            print(f"MuJoCo: {text}")

    mujoco.set_mju_user_warning(warn)


def size(space: gym.Space) -> int:
    """A: how many numbers a Box's element holds, or how many choices discrete actions have in all."""
    return sum(choices(space)) or int(np.prod(space.shape))


def choices(space: gym.Space) -> list[int]:
    """How many choices each factor of discrete actions has; [] of a space that is not discrete."""
    if isinstance(space, gym.spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, gym.spaces.MultiDiscrete):
        return np.ravel(space.nvec).tolist()
    return [2] * int(np.prod(space.shape)) if isinstance(space, gym.spaces.MultiBinary) else []


def first_action(space: gym.Space) -> int | list[int] | None:
    """The first of a Discrete space; of each factor of other discrete spaces; None of one that is not."""
    if isinstance(space, gym.spaces.Discrete):
        return int(space.start)
    if isinstance(space, gym.spaces.MultiDiscrete):
        return np.ravel(space.start).tolist()
    return [0] * len(choices(space)) or None


def is_valid_action(first_action: Any, factors: Any, A: int) -> bool:
    """Whether these can be data.Task's, of A columns. They may be anything that JSON can be."""

    def are_integers(x):
        return isinstance(x, list) and all(type(n) is int and abs(n) < 2**62 for n in x)

    if factors is None:
        return first_action is None or are_integers([first_action])
    if not (are_integers(first_action) and are_integers(factors)):
        return False
    return len(first_action) == len(factors) > 0 and min(factors) > 0 and sum(factors) == A


def one_hot(actions: np.ndarray, space: gym.Space) -> np.ndarray:
    """Discrete actions (L, ...) -> (L, A) float32, the factors one after the other.

    Raises ValueError where one is not in the space.
    """
    sizes = choices(space)
    index = np.reshape(actions, (len(actions), len(sizes))).astype(np.int64) - first_action(space)
    inside = ((index >= 0) & (index < sizes)).all(1)
    if not inside.all():
        raise ValueError(f"action {actions[~inside][0]} is not in {space}")
    return np.concatenate([np.eye(n, dtype=np.float32)[i] for n, i in zip(sizes, index.T, strict=True)], 1)

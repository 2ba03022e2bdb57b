"""Environments and their spaces. Used by data.py, evaluate.py, minari_files.py and research/behaviour.py."""

import importlib
import sys
from collections.abc import Iterable
from typing import Any

import gymnasium as gym
import numpy as np

from support import UserError, reason


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


def make_env(env_id: str, env_kwargs: dict[str, Any], **kwargs: Any) -> gym.Env:
    """gym.make; raises UserError where the environment is not registered or can't be made.

    env_id: Gymnasium's, also as module:id, whose module must have been imported: a dataset names it.
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
    _silence_mujoco()
    try:
        return gym.make(name, **{"disable_env_checker": True, **env_kwargs, **kwargs})
    except Exception as e:  # noqa: BLE001 - a package that it needs, an option that it does not know, ...
        raise UserError(
            f"environment {env_id!r} can't be made ({reason(e)}); "
            f"install what it needs, or use --eval-episodes 0"
        ) from None


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
    """How many numbers a Box's element holds, or how many actions a Discrete space has."""
    return int(space.n if isinstance(space, gym.spaces.Discrete) else np.prod(space.shape))


def one_hot(actions: np.ndarray, space: gym.spaces.Discrete) -> np.ndarray:
    """actions (L,) -> (L, n) float32. Raises ValueError where one is not in the space."""
    index = np.reshape(actions, -1).astype(np.int64) - space.start
    inside = (index >= 0) & (index < space.n)
    if not inside.all():
        raise ValueError(f"action {actions[~inside][0]} is not in {space}")
    return np.eye(int(space.n), dtype=np.float32)[index]

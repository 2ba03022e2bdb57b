"""Meta-World's fifty tasks: environments with goals by seed, and episodes of the package's scripted experts.

Used by data.py. The package is optional and pins an older mujoco: pip install metaworld==3.1.1, in an
environment of its own. It is imported where an environment is made, not here: importing this module registers
the environments mw/<task>-v3 with Gymnasium. How tasks are learnt from it, and what came of it:
docs/metaworld.md.
"""

import importlib.util
import math
import warnings
from collections.abc import Iterator

import gymnasium as gym
import numpy as np
from tqdm import tqdm

from support import UserError, collect

TASK_NAMES = """
assembly basketball bin-picking box-close button-press button-press-topdown button-press-topdown-wall
button-press-wall coffee-button coffee-pull coffee-push dial-turn disassemble door-close door-lock
door-open door-unlock drawer-close drawer-open faucet-close faucet-open hammer hand-insert handle-press
handle-press-side handle-pull handle-pull-side lever-pull peg-insert-side peg-unplug-side
pick-out-of-hole pick-place pick-place-wall plate-slide plate-slide-back plate-slide-back-side
plate-slide-side push push-back push-wall reach reach-wall shelf-place soccer stick-pull stick-push
sweep sweep-into window-close window-open
"""
TASKS = tuple(TASK_NAMES.split())
MT10 = (
    "reach",
    "push",
    "pick-place",
    "door-open",
    "drawer-open",
    "drawer-close",
    "button-press-topdown",
    "peg-insert-side",
    "window-open",
    "window-close",
)
EPISODE_STEPS = 500
STEPS = 300 * EPISODE_STEPS  # timesteps of a built-in dataset
NOISE = (0.0, 0.1, 0.2, 0.3, 0.5)  # standard deviations of action noise, in units of half the action range
RANDOM_INTERVAL = 10  # episodes: one in so many has uniformly random actions
FIRST_GOAL = 1_000_000  # seed of the first episode's goal; evaluations begin at evaluate.SEED
ALGORITHM = "scripted experts with action noise"
DESCRIPTION = (
    f"Meta-World's scripted expert under action noise of {', '.join(map(str, NOISE))} of half the action "
    f"range; every {RANDOM_INTERVAL}th episode of random actions; a goal for each episode"
)


def check_installed() -> None:
    """Raise UserError where the package is missing."""
    if importlib.util.find_spec("metaworld") is None:
        raise UserError(
            "tasks mw/... need a package that is not here: pip install metaworld==3.1.1 (it pins "
            "mujoco==3.3.0: best in an environment of its own)"
        )


def make(task: str, render_mode: str | None = None) -> gym.Env:
    """The environment of one of TASKS, whose goal is observed; Gymnasium's entry point.

    reset(seed) chooses the positions of goal and objects. The package's own environments ignore it
    (github.com/Farama-Foundation/Metaworld/issues/555). Raises UserError where the package is missing.
    """
    check_installed()
    from metaworld.env_dict import ENV_CLS_MAP

    class GoalBySeed(ENV_CLS_MAP[f"{task}-v3"]):
        def reset(self, *, seed=None, options=None):
            if seed is not None:
                self.seed(seed)
            return super().reset()

        def render(self):
            image = super().render()
            return np.ascontiguousarray(image[::-1, ::-1])  # the camera hangs upside down

    env = GoalBySeed(render_mode=render_mode, camera_name="corner2")
    # what its set_task does, but that a goal is drawn at each reset, by the environment's own generator
    env._set_task_called = True
    env._freeze_rand_vec = False
    env.seeded_rand_vec = True
    env._partially_observable = False
    del env.sawyer_observation_space  # cached, of the hidden goal
    env.observation_space = env.sawyer_observation_space
    return env


for name in TASKS:
    options = {"max_episode_steps": EPISODE_STEPS, "kwargs": {"task": name}}
    gym.register(f"mw/{name}-v3", "support.metaworld:make", **options)


def episodes(env: gym.Env, task: str, steps: int, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """At least `steps` timesteps of whole episodes; task: mw/<task>. Noise levels take turns."""
    from metaworld.policies import ENV_POLICY_MAP

    rng = np.random.default_rng(seed)
    low = env.action_space.low
    high = env.action_space.high
    policy = ENV_POLICY_MAP[f"{task.removeprefix('mw/')}-v3"]()

    def expert(obs: np.ndarray) -> np.ndarray:
        return np.clip(policy.get_action(obs.copy()), low, high)  # some change what they are shown

    n_episodes = math.ceil(steps / EPISODE_STEPS)
    bar = tqdm(range(n_episodes), unit="episode", desc=f"collect {task}", disable=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experts tell that their actions will be clipped
        for i in bar:
            if i % RANDOM_INTERVAL == RANDOM_INTERVAL - 1:
                yield collect.rollout(env, lambda obs: rng.uniform(low, high), 0.0, rng, FIRST_GOAL + i)
            else:
                yield collect.rollout(env, expert, NOISE[i % len(NOISE)], rng, FIRST_GOAL + i)

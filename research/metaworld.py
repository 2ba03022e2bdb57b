"""Meta-World's scripted experts in the goals of an evaluation, and the table of docs/metaworld.md.

    python -m research.metaworld out/student                # plays the experts -> out/student/experts.json
    python -m research.metaworld out/student --table        # experts, teachers and student by task

Needs the package metaworld (support/metaworld.py). The goals are those of evaluate.py: by seed, of so many
episodes as the student was evaluated in. Teachers' rates are of their evaluation.json (evaluate.py) in the
folders --teachers, where there is one, else of the student's run.
"""

import dataclasses
import warnings
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

import data
import evaluate
import report
from research.markdown import table
from support import cli, files


@dataclasses.dataclass
class Config:
    run: Annotated[str, tyro.conf.Positional]  # a student's run directory
    table: bool = False  # print the table, of experts that have been played
    teachers: str = "out"  # folder of the teachers' run directories


class Expert:
    """The scripted expert of a task, as a policy that evaluate.played takes."""

    def __init__(self, task: str):
        from metaworld.policies import ENV_POLICY_MAP

        self.policy = ENV_POLICY_MAP[f"{task.removeprefix('mw/')}-v3"]()

    def reset(self, target_return: Any, episodes: int) -> None:
        """It asks for no return and has no state."""

    def keep(self, goes_on: np.ndarray) -> None:
        """Likewise."""

    def act(self, observations: np.ndarray, rewards: np.ndarray) -> np.ndarray:
        """observations (E, 39) -> actions (E, 4) within their bounds."""
        return np.stack([np.clip(self.policy.get_action(obs), -1, 1) for obs in observations])


def played(task: data.Task, episodes: int) -> dict[str, float]:
    """The metrics of a task's expert."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experts tell that their actions will be clipped
        return evaluate.measured(Expert(task.name), task, task.target, episodes, evaluate.SEED)


def rows(run: report.Run, experts: dict[str, Any], teachers: Path) -> list[list[str]]:
    """The table's: success in any step / at the end, and returns, of expert, teacher and student."""
    lines = []
    found = []
    for task in data.tasks(run.meta, run.path):
        of_run = files.read_json(teachers / f"teacher-{task.name.replace('/', '-')}" / "evaluation.json")
        teacher = of_run["tasks"][task.name] if of_run else run.teachers[task.name]
        models = (experts[task.name], teacher, run.tasks[task.name])
        found.append([(m["success_rate"], m["success_at_end"], m["return_mean"]) for m in models])
        lines.append([task.name, *_cells(found[-1])])
    return [*lines, ["**mean**", *_cells(np.mean(found, 0))]]


def _cells(models):
    success = [f"{any_step:.2f} / {at_end:.2f}" for any_step, at_end, _ in models]
    return [*success, *(f"{mean:.0f}" for _, _, mean in models)]


def main(cfg: Config) -> None:
    run = report.Run(cfg.run)
    path = run.path / "experts.json"
    if cfg.table:
        columns = [
            f"{kind} {who}" for kind in ("success", "return") for who in ("expert", "teacher", "student")
        ]
        print(table(["task", *columns], rows(run, files.read_json(path), Path(cfg.teachers))))
        return
    experts = {}
    for task in data.tasks(run.meta, run.path):
        experts[task.name] = played(task, run.tasks[task.name]["episodes"])
        print(task.name, experts[task.name], flush=True)
    files.write_json(path, experts)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)

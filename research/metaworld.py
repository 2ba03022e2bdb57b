"""Meta-World's scripted experts in the goals of an evaluation, and the tables of docs/metaworld.md.

    python -m research.metaworld out/student                # plays the experts -> out/student/experts.json
    python -m research.metaworld out/student --table        # experts, teachers and student; by task, too
    python -m research.metaworld out/a out/b --table        # two students of the same tasks, a line each

Playing needs the package metaworld (support/metaworld.py). The goals are those of evaluate.py: by seed, of so
many episodes as the student was evaluated in. Tables take the experts of the first run.
"""

import dataclasses
import warnings
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
    runs: Annotated[tuple[str, ...], tyro.conf.Positional]  # students' run directories
    table: bool = False  # print a table, of experts that have been played


class Expert:
    """The scripted expert of a task, as a policy that evaluate.play takes."""

    def __init__(self, task: str):
        from metaworld.policies import ENV_POLICY_MAP

        self.policy = ENV_POLICY_MAP[f"{task.removeprefix('mw/')}-v3"]()

    def reset(self, target_return: Any, episodes: int) -> None:
        """It asks for no return and has no state."""

    def keep(self, goes_on: np.ndarray) -> None:
        """Likewise."""

    def act(self, observations: np.ndarray, rewards: np.ndarray) -> np.ndarray:
        """observations (E, 39) -> actions (E, 4) within their bounds."""
        return np.stack([np.clip(self.policy.get_action(obs.copy()), -1, 1) for obs in observations])


def played(task: data.Task, episodes: int) -> dict[str, float]:
    """The metrics of a task's expert."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experts tell that their actions will be clipped
        return evaluate.measured(Expert(task.name), task, task.target, episodes, evaluate.SEED)


def of_tasks(run: report.Run, experts: dict[str, Any]) -> list[list[str]]:
    """By task: success in any step / at the end, and returns, of expert, teacher and student."""
    lines = []
    found = []
    for name in run.tasks:
        models = (experts[name], run.teachers[name], run.tasks[name])
        found.append([(m["success_rate"], m["success_at_end"], m["return_mean"]) for m in models])
        lines.append([name, *_cells(found[-1])])
    return [*lines, ["**mean**", *_cells(np.mean(found, 0))]]


def _cells(models):
    success = [f"{any_step:.2f} / {at_end:.2f}" for any_step, at_end, _ in models]
    return [*success, *(f"{mean:.0f}" for _, _, mean in models)]


def of_run(run: report.Run, experts: dict[str, Any]) -> list[str]:
    """Of all tasks: the student's size, mean success of each kind, and what the student retains of it."""
    models = (experts, run.teachers, run.tasks)
    success = [f"{np.mean([m[name]['success_rate'] for name in run.tasks]):.3f}" for m in models]
    retained = [*run.retention.values()]
    kl = np.mean([m["heldout_kl"] for m in run.tasks.values()])
    return [
        run.path.name,
        f"{run.metrics['compression']:.1f}",
        f"{run.metrics['parameters']:,}",
        *success,
        f"{np.mean(retained):.3f}",
        f"{min(retained):.2f}",
        f"{kl:.3f}",
        f"{run.metrics['seconds']['train']:.0f}",
    ]


def main(cfg: Config) -> None:
    runs = [report.Run(path) for path in cfg.runs]
    if cfg.table:
        experts = files.read_json(runs[0].path / "experts.json")
        if len(runs) == 1:
            columns = [
                f"{kind} {who}" for kind in ("success", "return") for who in ("expert", "teacher", "student")
            ]
            print(table(["task", *columns], of_tasks(runs[0], experts)), end="\n\n")
        head = ["student", "times fewer", "parameters", "success expert", "teachers", "student"]
        head += ["retained, mean", "worst", "held-out KL", "seconds of training"]
        print(table(head, [of_run(run, experts) for run in runs]))
        return
    for run in runs:
        experts = {}
        for task in data.tasks(run.meta, run.path):
            experts[task.name] = played(task, run.tasks[task.name]["episodes"])
            print(task.name, experts[task.name], flush=True)
        files.write_json(run.path / "experts.json", experts)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)

"""Teachers, students and baselines on the datasets of research/battery.py.

    python -m research.battery_runs --datasets unseen --logs ../logs   # or: all, choosing, hopper-quiet ...
    python -m research.battery_runs --students 0 1 2                   # seeds; of GROUPS of those teachers
    python -m research.battery_runs --students 0 1 2 --students-of "context 1" --ask 0

A row of research/results/battery.csv for each dataset, variant, seed and return asked for: 20 episodes, of
the last checkpoint. A run whose rows are there is skipped. One thread: run several processes at a time, each
with datasets of its own. research/tables.py prints the tables of docs/data.md.

Baselines: behaviour cloning by an MLP (256-256, squared error, 10,000 updates of 256 timesteps with Adam) of
all episodes, and of the tenth with the highest returns (Chen et al. 2021, section 4.2); the same transformer
without weighting of episodes; and teacher.py's defaults as they were before, with a context of 20 timesteps.

Needs: pip install gymnasium-robotics==1.4.2 (pen and mazes); the logs that examples/collect_trpo.py names
"""

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn as nn

import data
import distill
import evaluate
import model as dt
import teacher
from policy import Policy
from research import battery, study_rows
from research.variants import LONG_TEACHER
from support import UserError, cli, files, machine

RESULTS = Path(__file__).parent / "results" / "battery.csv"
VARIANTS: dict[str, dict[str, Any] | float] = {  # options of teacher.py; of BC, the share of episodes
    "default": {},
    "before": LONG_TEACHER,
    "context 1": {"context": 1, "top": 1.0},
    "BC": 1.0,
    "BC best 10 %": 0.1,
}
GROUPS = {  # teachers of a student
    "A": ("hopper-best5", "halfcheetah-trpo", "walker2d-authors", "ant-authors"),
    "B": ("hopper-quiet", "halfcheetah-replay", "walker2d-quiet", "pen"),
    "C": ("walker2d-medium-expert", "halfcheetah-expert", "walker2d-one", "maze-medium"),
}
EPISODES = 20
BC_UPDATES = 10_000
BC_BATCH = 256


@dataclasses.dataclass
class Config:
    datasets: tuple[str, ...] = ()  # names in battery.DATASETS, or: all, choosing, unseen
    seeds: tuple[int, ...] = (0, 1, 2)  # of weights, windows and the held-out split
    variants: tuple[str, ...] = tuple(VARIANTS)
    students: tuple[int, ...] = ()  # seeds of students of GROUPS
    students_of: str = "default"  # variant of their teachers
    ask: float | Literal["auto"] = "auto"  # as distill.py's
    logs: str = "../logs"  # folder of the TRPO run's files, for datasets that are missing
    work_dir: str = "out/battery"  # of the teachers


# ---- behaviour cloning -------------------------------------------------------------------------------------


class Cloned:
    """An MLP that imitates some episodes; acts as evaluate.play asks for."""

    def __init__(self, dataset: data.Dataset, share: float, seed: int):
        self.task = dataset.task
        O = self.task.obs_dim
        A = self.task.act_dim
        first = data.first_rows(dataset.train)  # of episodes, lowest return first
        n_best = max(1, round(share * len(first)))
        table = torch.from_numpy(dataset.train[first[-n_best] :])
        torch.manual_seed(seed)
        self.net = nn.Sequential(
            nn.Linear(O, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, A), nn.Tanh()
        )
        optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, BC_UPDATES)
        for _ in range(BC_UPDATES):
            rows = table[torch.randint(len(table), (BC_BATCH,))]
            loss = (self.net(rows[:, :O]) - rows[:, O : O + A]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    def reset(self, target_return: float, episodes: int) -> None:
        """It asks for no return and remembers nothing."""

    def keep(self, rows: np.ndarray) -> None:
        """Likewise."""

    @torch.no_grad()
    def act(self, observations: np.ndarray, rewards: np.ndarray) -> np.ndarray:
        task = self.task
        x = (observations - np.array(task.obs_mean)) / np.array(task.obs_std)
        actions = self.net(torch.from_numpy(x.astype(np.float32))).double().numpy()
        low = np.array(task.act_low)
        high = np.array(task.act_high)
        return (low + (actions + 1) / 2 * (high - low)).astype(np.float32)


# ---- runs --------------------------------------------------------------------------------------------------


def directory(cfg: Config, name: str, variant: str, seed: int) -> Path:
    return Path(cfg.work_dir) / name / f"{variant.replace(' ', '-')}-{seed}"


def run(cfg: Config, name: str, variant: str, seed: int) -> None:
    """Train and evaluate one variant on one dataset; adds its rows."""
    options = VARIANTS[variant]
    asked = ("supported", "p95", "median")
    flags = ()
    if isinstance(options, dict):
        out = directory(cfg, name, variant, seed)
        episodes = EPISODES if variant == "default" else 0
        teacher.main(
            teacher.Config(
                dataset=battery.dataset_id(name),
                out_dir=str(out),
                seed=seed,
                eval_episodes=episodes,
                resume=True,
                **options,
            )
        )
        model, meta = dt.load(out)
        task = data.tasks(meta, out)[0]
        policy = Policy.of(model, task, 0)
        metrics = files.read_json(out / "metrics.json")
        flags = metrics["tasks"][task.name].get("flags", ())
        seconds = metrics["seconds"]["train"]
    else:
        start = time.time()
        dataset = data.load(battery.dataset_id(name), seed)
        task = dataset.task
        policy = Cloned(dataset, options, seed)
        seconds = time.time() - start
        asked = asked[:1]  # it returns the same, whatever it is asked for
    for target in asked:
        returns, *_ = evaluate.play(policy, task, task.targets[target], EPISODES, evaluate.SEED)
        scores = {"target": task.targets[target], **evaluate.scores(returns, task), "flags": flags}
        add(name, variant, seed, target, scores, seconds, low=round(task.reference[0], 2))


def run_students(cfg: Config, seed: int) -> None:
    """A student of each group of teachers; adds a row for each of their datasets."""
    kind = "student" if cfg.students_of == "default" else f"{cfg.students_of} student"
    if cfg.ask != "auto":
        kind = f"ask {cfg.ask:g} {kind}"
    for group, names in GROUPS.items():
        variant = f"{kind} {group}"
        if (names[0], variant, seed) in measured():
            continue
        teachers = tuple(str(directory(cfg, name, cfg.students_of, seed)) for name in names)
        out = Path(cfg.work_dir) / f"{variant.replace(' ', '-')}-{seed}"
        distill.main(
            distill.Config(
                teachers=teachers,
                seed=seed,
                ask=cfg.ask,
                out_dir=str(out),
                eval_episodes=EPISODES,
                resume=True,
            )
        )
        metrics = files.read_json(out / "metrics.json")
        for name in names:
            of_task = metrics["tasks"][battery.dataset_id(name)]
            add(name, variant, seed, "supported", of_task, metrics["seconds"]["train"])


def measured() -> set[tuple[str, str, int]]:
    """Dataset, variant and seed of the rows of RESULTS."""
    rows = study_rows.read(RESULTS)
    return {(row["dataset"], row["variant"], int(row["seed"])) for row in rows}


def add(
    name: str,
    variant: str,
    seed: int,
    asked: str,
    scores: dict[str, Any],
    seconds: float,
    low: float | str = "",
) -> None:
    """Add a row to RESULTS.

    scores: keys of a task in metrics.json. low: the return of score 0, of teachers' rows.
    """
    row = {
        "dataset": name,
        "variant": variant,
        "seed": seed,
        "asked": asked,
        "target": round(scores["target"], 2),
        "return_mean": round(scores["return_mean"], 2),
        "return_std": round(scores["return_std"], 2),
        "low": low,
        "flags": " ".join(scores.get("flags", ())),
        "seconds": round(seconds, 1),
        "commit": machine.commit(),
    }
    study_rows.add(RESULTS, row)
    print({k: row[k] for k in ("dataset", "variant", "seed", "asked", "target", "return_mean")}, flush=True)


def main(cfg: Config) -> None:
    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        battery.register_robotics()
    sets = {"all": battery.DATASETS, "choosing": battery.CHOOSING, "unseen": battery.UNSEEN}
    names = [name for given in cfg.datasets for name in sets.get(given, (given,))]
    unknown = set(names) - set(battery.DATASETS) | set(cfg.variants) - set(VARIANTS)
    if unknown:
        raise UserError(f"{unknown}: choose from {', '.join((*battery.DATASETS, *VARIANTS))}")
    for name in names:
        battery.make_dataset(name, Path(cfg.logs))
    for seed in cfg.seeds:
        for name in names:
            for variant in cfg.variants:
                if (name, variant, seed) not in measured():
                    run(cfg, name, variant, seed)
    for seed in cfg.students:
        run_students(cfg, seed)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)

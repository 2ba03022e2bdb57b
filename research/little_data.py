"""Students that see a share of their teachers' data -> research/results/little_data.csv

    python -m research.little_data --tune                      # data alone: its best settings at each share
    python -m research.little_data --shares 0.02 0.1 --seeds 0 1 2
    python -m research.little_data --tasks thirdparty --shares 0.05 --modes labels asked
    python -m research.little_data --shares 0.02 --n-embd 40   # 48.5 times fewer parameters than its teachers
    python -m research.little_data --worst-half                # no episode above the median
    python -m research.little_data --shares 1 --modes "equal shares" surgery

Teachers see all of their data, students whole episodes drawn by seed. A row for each task of a student; a
student whose rows are there is skipped. Seed s has the teachers of seed s % 5. Teachers are evaluated once,
over 100 episodes; "clone" is the same teacher over as many other episodes as a student: what chance alone
makes of retention. One thread: run several processes at a time. research/tables.py prints the tables.

Third-party data: examples/collect_trpo.py
"""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any, Literal

import minari
import numpy as np
import torch

import data
import distill
import evaluate
import model as dt
import teacher
from policy import Policy
from research import study_rows
from research.tables import RESULTS
from research.variants import BUILTIN, THIRDPARTY
from support import cli, files, machine

TASKS = {"builtin": BUILTIN, "thirdparty": THIRDPARTY}
MODES: dict[str, dict[str, Any]] = {  # options of distill.py; "data, tuned": and those that `tune` found
    "data": {"loss": "nll", "curriculum": "all"},
    "data, tuned": {"loss": "nll", "curriculum": "all"},
    "labels": {"ask": 0.0},
    "asked": {"ask": 0.5},
    "both": {"loss": "kl+nll", "curriculum": "all"},
    "ensemble": {"ask": 0.0},  # labels of the teachers of all seeds as one
    # asked, without a part of the method or with one more
    "equal shares": {"curriculum": "all"},
    "round-robin": {"curriculum": "fixed"},
    "surgery": {"surgery": "previous"},
    "uniform windows": {"top": 1.0},
}
MAIN_MODES = ("data", "data, tuned", "labels", "asked", "both")
GRID = {"steps": (750, 3000), "dropout": (0.0, 0.1), "weight_decay": (1e-4, 0.1)}
TEACHER_OPTIONS: dict[str, Any] = {}  # besides the defaults, in tests
STUDENT_OPTIONS: dict[str, Any] = {}
TUNING_SEED = 100  # of the draw of episodes that `tune` sees; no student of the table has it
TEACHER_SEEDS = 5
TEACHER_EPISODES = 100
EPISODES = 20  # of a student in each task: other draws and seeds differ far more than other episodes do
SWEEP_EPISODES = 5
SWEEP_SEEDS = 5  # students of fewer seeds are also asked for lower returns
CLONE_SEED = evaluate.SEED + 10_000  # of its first episode


@dataclasses.dataclass
class Config:
    tasks: tuple[Literal[tuple(TASKS)], ...] = ("builtin",)
    shares: tuple[float, ...] = (0.02, 0.05, 0.1, 0.3, 1.0)  # of the training episodes
    modes: tuple[Literal[tuple(MODES)], ...] = MAIN_MODES  # what the student learns from, and how
    seeds: tuple[int, ...] = tuple(range(10))  # of students and of their draw of episodes
    n_embd: int = distill.Config.n_embd  # the student's channels
    worst_half: bool = False  # students see all episodes up to the median return, and no other
    tune: bool = False  # look for the settings of data alone instead
    work_dir: str = "out/little_data"


# ---- teachers ----------------------------------------------------------------------------------------------


def teachers(cfg: Config, tasks: str, seed: int) -> tuple[str, ...]:
    """The directories of a seed's teachers; trains missing ones."""
    directories = []
    for name in TASKS[tasks]:
        out = Path(cfg.work_dir) / f"{name.replace('/', '-')}-{seed}"
        source = {"dataset": name} if "/" in name else {"env": name}
        options = {"seed": seed, "eval_episodes": 0, "resume": True, **source, **TEACHER_OPTIONS}
        teacher.main(teacher.Config(out_dir=str(out), **options))
        directories.append(str(out))
    return tuple(directories)


def teacher_scores(cfg: Config, tasks: str, seed: int) -> dict[str, dict[str, Any]]:
    """A seed's teachers evaluated, by task: from the rows of "teacher", or made, with those of "clone"."""
    rows = read(tasks=tasks, mode="teacher", teacher_seed=seed)
    if not rows:
        made = []
        for directory in map(Path, teachers(cfg, tasks, seed)):
            model, meta = dt.load(directory)
            task = data.tasks(meta, directory)[0]
            policy = Policy.of(model, task, 0)
            row = {"tasks": tasks, "teacher_seed": seed, "seed": seed, "task": task.name}
            own = scores(policy, task, TEACHER_EPISODES, evaluate.SEED)
            facts = files.read_json(directory / "metrics.json")["tasks"][task.name]["data"]
            own["target_gap"] = gap(policy, task, facts)
            made.append(({**row, "mode": "teacher", **own}, own))
            made.append(({**row, "mode": "clone", **scores(policy, task, EPISODES, CLONE_SEED)}, own))
        add_all(made)
        rows = read(tasks=tasks, mode="teacher", teacher_seed=seed)
    numbers = ("return_mean", "target_gap", "score")
    return {row["task"]: {key: float(row[key]) for key in numbers} for row in rows}


def scores(policy: Any, task: data.Task, episodes: int, seed: int) -> dict[str, Any]:
    """Of episodes that ask for the default target return; score: data.Task.reference."""
    returns, *_ = evaluate.play(policy, task, task.target, episodes, seed)
    of_returns = evaluate.scores(returns, task)
    return {
        "return_mean": of_returns["return_mean"],
        "return_std": of_returns["return_std"],
        "n_episodes": episodes,
        "score": of_returns["normalized_score"],
    }


def gap(policy: Any, task: data.Task, facts: dict[str, float]) -> float:
    """evaluate.target_gap; facts: of the teacher's data."""
    sweep = evaluate.sweep(policy, task, SWEEP_EPISODES, evaluate.SEED)
    return evaluate.target_gap(sweep, facts, task)


class Ensemble:
    """Teachers of one task by several seeds as one: the Gaussian with the mean and variance of their mixture.

    It takes states and returns in the units of the first. After Lakshminarayanan et al. 2017,
    arXiv 1612.01474, section 2.4.
    """

    def __init__(self, models: list[dt.DecisionTransformer], tasks: list[data.Task]):
        self.models = models
        self.cfg = models[0].cfg
        self.n_params = models[0].n_params  # so that compression is that of the other students
        self.units = [(torch.tensor(t.obs_mean), torch.tensor(t.obs_std), t.rtg_scale) for t in tasks]

    def __call__(self, task, states, actions, rtg, timesteps, mask):
        """As dt.DecisionTransformer.forward."""
        mean, std, scale = self.units[0]
        observations = states * std + mean
        policies = []
        for model, (m, s, own_scale) in zip(self.models, self.units, strict=True):
            own_rtg = rtg * (scale / own_scale)
            policies.append(model(task, (observations - m) / s, actions, own_rtg, timesteps, mask))
        means, log_stds = (torch.stack(x) for x in zip(*policies, strict=True))
        mean = means.mean(0)
        variance = ((2 * log_stds).exp() + means.square()).mean(0) - mean.square()
        return mean, 0.5 * variance.clamp_min(1e-8).log()


def ensemble(cfg: Config, tasks: str, seed: int) -> list[teacher.Teacher]:
    """A student's teachers, each the ensemble of all seeds, that of `seed` first."""
    order = [seed, *(s for s in range(TEACHER_SEEDS) if s != seed)]
    of_seeds = [[teacher.load(Path(d), "cpu", None) for d in teachers(cfg, tasks, s)] for s in order]
    found = []
    for of_task in zip(*of_seeds, strict=True):
        model = Ensemble([t.model for t in of_task], [t.task for t in of_task])
        found.append(of_task[0]._replace(model=model))
    return found


# ---- students ----------------------------------------------------------------------------------------------


def student(cfg: Config, tasks: str, share: float, mode: str, seed: int) -> None:
    """Train and evaluate one student; adds its rows."""
    teacher_seed = seed % TEACHER_SEEDS
    of_teachers = teacher_scores(cfg, tasks, teacher_seed)
    kind = "worst half" if cfg.worst_half else "all"
    name = f"{tasks}-{share:g}-{mode}-{seed}-{cfg.n_embd}{'-worst' if cfg.worst_half else ''}"
    out = Path(cfg.work_dir) / name.replace(", ", "-")
    options = {**STUDENT_OPTIONS, **MODES[mode], **(tuned(tasks, share) if mode == "data, tuned" else {})}
    if cfg.worst_half:
        options["student_datasets"] = tuple(worst_half(task) for task in TASKS[tasks])
    distill.main(
        distill.Config(
            teachers=teachers(cfg, tasks, teacher_seed),
            seed=seed,
            data_share=share,
            n_embd=cfg.n_embd,
            out_dir=str(out),
            eval_episodes=0,
            overwrite=True,
            **options,
        ),
        ensemble(cfg, tasks, teacher_seed) if mode == "ensemble" else None,
    )
    metrics = files.read_json(out / "metrics.json")
    model, meta = dt.load(out)
    rows = []
    for i, task in enumerate(data.tasks(meta, out)):
        policy = Policy.of(model, task, i)
        row = {"tasks": tasks, "data_share": share, "data": kind, "mode": mode, "teacher_seed": teacher_seed}
        row |= {
            "seed": seed,
            "task": task.name,
            "n_embd": cfg.n_embd,
            "compression": round(metrics["compression"], 1),
        }
        of_task = metrics["tasks"][task.name]
        episodes = of_task["data"]["episodes"]
        if cfg.worst_half:
            episodes = training_episodes(options["student_datasets"][i], task.split_seed)
        row["episodes"] = round(share * episodes)
        row |= scores(policy, task, EPISODES, evaluate.SEED)
        if seed < SWEEP_SEEDS:
            row["target_gap"] = gap(policy, task, of_task["data"])
        row["heldout_kl"] = of_task["heldout_kl"]
        row["seconds"] = metrics["seconds"]["train"]
        rows.append((row, of_teachers[task.name]))
    add_all(rows)


def training_episodes(dataset: str, split_seed: int) -> int:
    """How many episodes of a dataset are not held out."""
    return len(data.first_rows(data.load(dataset, split_seed).train))


def worst_half(name: str) -> str:
    """The Minari id of a task's episodes of at most the median return; writes it where it is missing."""
    source = data.dataset_id(name) if name in data.ENVS else name
    id_ = f"little/{source.replace('/', '-').replace('-v0', '')}-worst-half-v0"
    if id_ not in minari.list_local_datasets():
        dataset = minari.load_dataset(source)
        returns = np.array([episode.rewards.sum() for episode in dataset.iterate_episodes()])
        below = np.flatnonzero(returns <= np.median(returns))
        buffers = []
        for episode in dataset.iterate_episodes(below):
            fields = ("observations", "actions", "rewards", "terminations", "truncations")
            arrays = {key: list(getattr(episode, key)) for key in fields}
            buffers.append(minari.data_collector.EpisodeBuffer(id=len(buffers), **arrays))
        minari.create_dataset_from_buffers(
            id_,
            buffers,
            env=dataset.spec.env_spec,
            observation_space=dataset.observation_space,
            action_space=dataset.action_space,
            description=f"the episodes of {source} up to the median return",
            author="manyteachers",
            author_email="-@-.org",
            code_permalink="research/little_data.py",
        )
    return id_


# ---- data alone, tuned -------------------------------------------------------------------------------------


def tune(cfg: Config, tasks: str, share: float) -> None:
    """The held-out NLL of every setting of GRID, one seed, the mean over tasks; a row for each."""
    for values in itertools.product(*GRID.values()):
        setting = dict(zip(GRID, values, strict=True))
        key = {"tasks": tasks, "data_share": share, **setting}
        if study_rows.find(TUNING, key):
            continue
        run = distill.Config(
            teachers=teachers(cfg, tasks, 0), seed=TUNING_SEED, data_share=share, eval_episodes=0,
            out_dir=str(Path(cfg.work_dir) / "tuning"), overwrite=True, **MODES["data"], **setting,
        )  # fmt: skip
        distill.main(run)
        model, meta = dt.load(run.out_dir)
        of_tasks = data.tasks(meta, run.out_dir)
        _, held_out = distill.make_windows(run, of_tasks, distill.load_sets(run, of_tasks), model.cfg.context)
        nll = distill.Distance(run, model).held_out(held_out, held_out.targets)
        row = {**key, "heldout_nll": round(float(np.mean(nll)), 4), "commit": machine.commit()}
        study_rows.add(TUNING, row)
        print(row, flush=True)


def tuned(tasks: str, share: float) -> dict[str, float]:
    """The options of the lowest held-out NLL at the nearest share that was tuned. Run --tune first."""
    rows = [row for row in study_rows.read(TUNING) if row["tasks"] == tasks]

    def distance(row):
        return abs(math.log(float(row["data_share"]) / share))

    nearest = min(map(distance, rows))
    rows = [row for row in rows if distance(row) == nearest]
    best = min(rows, key=lambda row: float(row["heldout_nll"]))
    return {"steps": int(best["steps"]), **{k: float(best[k]) for k in ("dropout", "weight_decay")}}


# ---- rows --------------------------------------------------------------------------------------------------

ROWS = RESULTS / "little_data.csv"
TUNING = RESULTS / "little_data_tuning.csv"
COLUMNS = {  # a row's, with digits after the point
    "tasks": None, "data_share": None, "data": None, "mode": None, "n_embd": None, "compression": None,
    "teacher_seed": None, "seed": None, "task": None, "episodes": None, "teacher_return": 1,
    "return_mean": 1, "return_std": 1, "n_episodes": None, "score": 3, "retention": 4, "heldout_kl": 4,
    "target_gap": 4, "teacher_gap": 4, "seconds": 1, "commit": None,
}  # fmt: skip


def read(**key: Any) -> list[dict[str, str]]:
    """The rows with these values."""
    return [row for row in study_rows.read(ROWS) if all(row[k] == str(v) for k, v in key.items())]


def add_all(rows: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """`add` each of the rows, which are all made by now: all or none, as far as a crash allows."""
    for row, of_teacher in rows:
        add(row, of_teacher)


def add(row: dict[str, Any], of_teacher: dict[str, Any]) -> None:
    """Add a row, with what it has in common with its teacher's scores."""
    row = {"data_share": 1.0, "data": "all", "compression": 1.0, **row, "commit": machine.commit()}
    row["teacher_return"] = of_teacher["return_mean"]
    row["teacher_gap"] = of_teacher.get("target_gap", "")
    row["retention"] = row["score"] / of_teacher["score"]
    rounded = {}
    for key, digits in COLUMNS.items():
        value = row.get(key, "")
        rounded[key] = round(value, digits) if digits and value != "" else value
    study_rows.add(ROWS, rounded)
    print({k: rounded[k] for k in ("tasks", "data_share", "mode", "seed", "task", "retention")}, flush=True)


def main(cfg: Config) -> None:
    torch.set_num_threads(1)
    cli.at_least(cfg, n_embd=1)
    if cfg.tune:
        for tasks, share in itertools.product(cfg.tasks, cfg.shares):
            tune(cfg, tasks, share)
        return
    for seed, tasks, share, mode in itertools.product(cfg.seeds, cfg.tasks, cfg.shares, cfg.modes):
        key = {"tasks": tasks, "data_share": share, "mode": mode, "seed": seed, "n_embd": cfg.n_embd}
        if len(read(**key, data="worst half" if cfg.worst_half else "all")) < len(TASKS[tasks]):
            student(cfg, tasks, share, mode, seed)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)

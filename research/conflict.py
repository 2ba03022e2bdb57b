"""Do the gradients of different teachers conflict? -> research/results/conflict.csv

    python -m research.conflict --case builtin
    python -m research.conflict --table           # what docs/study.md shows of these rows

A student is trained with equal shares. After 1, 10, 50 and 100 % of its updates the gradient of each
teacher's KL is taken on two sets of training windows of that teacher's. A row for each layer that teachers
share says how two teachers' gradients compare (those of both sets together), how alike the gradients of a
teacher's two sets are (below 1 it is noise, which hides conflict and agreement alike), and how many teachers'
KL a step down the mean of all gradients would raise. Cases and teachers are those of research/study.py. One
thread.
"""

import dataclasses
import json
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import distill
import model as dt
from research import study, study_rows
from research.markdown import table
from research.tables import RESULTS
from research.variants import CASES
from support import cli, machine

AT = (0.01, 0.1, 0.5, 1.0)  # of the updates
SHARED = ("blocks", "embed_state", "embed_action", "embed_rtg", "head")  # these but the first with --share
QUANTILES = (0, 0.05, 0.5, 0.95)  # of the cosines of all pairs
KEY = ("case", "n_embd", "steps", "windows", "seed")
ROWS = RESULTS / "conflict.csv"


@dataclasses.dataclass
class Config:
    case: Literal[tuple(CASES)] = "builtin"
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 1000
    n_embd: int = 0  # 0: the case's
    windows: int = 2048  # of a teacher, in each of its two sets
    table: bool = False  # make no students


def gradients(learner: distill.Learner, n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """By layer (N, P): the gradient of each teacher's KL on n windows of its own."""
    student = learner.student
    names = [name for name in dt.flat_order(student) if name.startswith(SHARED)]
    layers = {layer_of(name): [] for name in names if learner.cfg.share or name.startswith("blocks")}
    for share in torch.eye(len(learner.kl)):
        batch = learner.windows.sample(n, share, generator)
        kl = learner.distance(batch, learner.targets(batch)).sum()
        g = torch.autograd.grad(kl, [student.get_parameter(name) for name in names])
        for layer, found in layers.items():
            found.append(
                torch.cat([x.flatten() for x, m in zip(g, names, strict=True) if layer_of(m) == layer])
            )
    return {layer: torch.stack(rows) for layer, rows in layers.items()}


def layer_of(name: str) -> str:
    """embeddings, block 1, block 2, ..., or head."""
    first, *rest = name.split(".")
    return f"block {int(rest[0]) + 1}" if first == "blocks" else first if first == "head" else "embeddings"


def compared(first: Tensor, second: Tensor) -> dict[str, Any]:
    """What a row says of the gradients (N, P) on both sets of windows."""
    N = len(first)
    g = first + second
    unit = g / g.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T)[*torch.triu_indices(N, N, 1)]
    alike = torch.cosine_similarity(first, second)
    return {
        "pairs": len(cosines),
        "cosine": json.dumps([round(x, 4) for x in cosines.quantile(torch.tensor(QUANTILES)).tolist()]),
        "below 0": round(float((cosines < 0).double().mean()), 4),
        "alike": round(float((2 * alike / (1 + alike)).median()), 4),  # of sets of twice the size
        "raised": round(float((g @ g.mean(0) < 0).double().mean()), 4),
    }


def measure(case: study.Case, cfg: Config, seed: int) -> list[dict[str, Any]]:
    """Train a student. Returns its rows, without KEY."""
    options = dataclasses.replace(case.cfg, seed=seed, curriculum="all")
    student, generator = distill.make_student(options, case.tasks, case.models)
    learner = distill.Learner(options, student, case.models, case.windows, generator)
    of_sets = torch.Generator().manual_seed(seed)
    rows = []
    for step in range(cfg.steps):
        learner.step(step)
        if step + 1 in [round(x * cfg.steps) for x in AT]:
            sets = [gradients(learner, cfg.windows, of_sets) for _ in range(2)]
            for layer in sets[0]:
                rows.append({"updates": step + 1, "layer": layer, **compared(*(s[layer] for s in sets))})
    return rows


# ---- the table ---------------------------------------------------------------------------------------------


def tables(rows: list[dict[str, str]]) -> str:
    """Of each case and layer, means over seeds, as Markdown."""
    groups = {}
    for row in rows:
        key = (row["case"], row["n_embd"], row["steps"], row["layer"], row["updates"])
        groups.setdefault(key, []).append(row)
    lines = []
    for (case, n_embd, _, layer, updates), of_seeds in groups.items():
        cosines = np.mean([json.loads(row["cosine"]) for row in of_seeds], 0)
        means = [np.mean([float(row[k]) for row in of_seeds]) for k in ("below 0", "alike", "raised")]
        students = f"{case}, {n_embd} channels"
        about = [students, layer, updates, str(len(of_seeds)), of_seeds[0]["pairs"]]
        lines.append([*about, *(f"{x:.2f}" for x in (*cosines, *means))])
    head = ["students", "layer", "updates", "seeds", "pairs", "lowest cosine", "5 %", "median", "95 %"]
    return table([*head, "below 0", "a teacher's two sets", "KLs raised"], lines)


def main(cfg: Config) -> None:
    torch.set_num_threads(1)
    if cfg.table:
        print(tables(study_rows.read(ROWS)))
        return
    cli.at_least(cfg, steps=100, windows=1)
    case = None
    for seed in cfg.seeds:
        about = study.Config(case=cfg.case, steps=cfg.steps, n_embd=cfg.n_embd)
        key = dict(zip(KEY, (cfg.case, study.channels(about), cfg.steps, cfg.windows, seed), strict=True))
        if study_rows.find(ROWS, key):
            continue
        case = case or study.Case(about)
        for row in measure(case, cfg, seed):
            study_rows.add(ROWS, {**key, **row, "commit": machine.commit()})
        print(f"{cfg.case}, seed {seed}: measured", flush=True)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)

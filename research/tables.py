"""The tables of docs/results.md, docs/speed.md, docs/log.md and, of little data, of docs/study.md.

    python -m research.tables

Made from the runs in research/results/. A test compares them with the docs.
"""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from report import Run
from research import battery as datasets
from research import little_data_report
from research.markdown import table
from research.statistics import cell

RESULTS = Path(__file__).parent / "results"
GRADIENT_SIZES = {
    "teacher": 605_190 + 1,
    "student": 111_140 + 4 * 3,
}  # numbers that an update's all-reduce sums
PROCESSES = (8, 64, 1000)
CHANGES = {  # in the rows that train to the same loss, and in the row `optimizer`
    "before": "AdamW, 3 tokens",
    "Muon": "Muon, 3 tokens",
    "one token": "AdamW, 1 token",
    "today": "Muon, 1 token",
}
TRAINING = {"teacher": "teacher-to-nll", "student": "student-to-kl"}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    return json.loads(path.read_bytes())


def read_rows(name: str | Path) -> list[dict[str, str]]:
    """The rows of a CSV file: a name in research/results/, or any path."""
    with open(RESULTS / name, newline="") as f:
        return list(csv.DictReader(f))


def mean_and_std(metrics: dict[str, Any]) -> str:
    """A return over episodes: 3231 ± 33."""
    return f"{float(metrics['return_mean']):.0f} ± {float(metrics['return_std']):.0f}"


# ---- runs of distill.py ------------------------------------------------------------------------------------


def student(run: str) -> str:
    """A run as a table, and the lines below it."""
    metrics = read_json(RESULTS / run / "metrics.json")
    teachers = read_json(RESULTS / run / "model.json")["teachers"]
    columns = ["task", "target return", "teacher", "student", "retention", "held-out KL"]
    columns += ["lower target", "teacher"]
    lines = []
    for name, m in metrics["tasks"].items():
        of_teacher = teachers[name]
        lines.append(
            [
                name.split("/")[1] if "/" in name else name,
                f"{m['target']:.0f}",
                mean_and_std(of_teacher),
                mean_and_std(m),
                f"{m['retention']:.2f}",
                f"{m['heldout_kl']:.3f}",
                f"{of_teacher['median']['target']:.0f}",
                mean_and_std(of_teacher["median"]),
            ]
        )
    gaps = Run(RESULTS / run).target_gaps()
    gap = (
        f"Asked for five quantiles of the data's returns, the student misses them by {gaps['student']:.3f} "
        f"of the range of returns on average, its teachers by {gaps['teacher']:.3f}."
    )
    return f"{table(columns, lines)}\n\n{summary(metrics)}\n{gap}"


def summary(metrics: dict[str, Any]) -> str:
    """A run's retention, size, seconds and machine, in two lines."""
    retention = [m["retention"] for m in metrics["tasks"].values()]
    mean = sum(retention) / len(retention)
    seconds = metrics["seconds"]
    at = metrics["machine"]
    return (
        f"Retention {mean:.3f} on average, {min(retention):.3f} at worst; "
        f"{metrics['parameters']:,} parameters, {metrics['compression']:.1f} times fewer.\n"
        f"Seconds: teachers' targets {seconds['targets']:.0f}, student {seconds['train']:.0f}, "
        f"evaluation {seconds['evaluate']:.0f} ({at['device']}, threads: {at['threads']}, {at['dtype']}, "
        f"torch {at['torch']}, commit {at['commit']})."
    )


def lower_targets(run: str) -> str:
    """Returns of a student asked for the median of its data's; empty where it was not evaluated so."""
    path = RESULTS / run / "median.json"
    if not path.exists():
        return ""
    lines = []
    for task, of_teacher in read_json(RESULTS / run / "model.json")["teachers"].items():
        median = of_teacher["median"]
        returns = (median, read_json(path)["tasks"][task])
        lines.append([f"{task}, {median['target']:.0f}", *map(mean_and_std, returns)])
    return table(["lower target", "teacher", "student"], lines)


def exported(run: str) -> str:
    """A run's files of export.py: float32 beside weights in 8 bits. Empty where there is none."""
    lines = []
    for card in sorted(RESULTS.glob(f"{run}/*.json")):
        for name, f in read_json(card).get("files", {}).items():
            size = f"{f['bytes'] / 1024:.0f}"
            lines.append(
                [name, size, f"{f['largest_difference']:.1g}", mean_and_std(f), f"{f['retention']:.2f}"]
            )
    columns = ["file", "KB", "furthest from the model's actions", "return", "retention"]
    return table(columns, lines) if lines else ""


# ---- speed -------------------------------------------------------------------------------------------------


def speed(device: str) -> str:
    """The benchmark's rows as tables, one for each kind of row, and what they were taken on."""
    rows = read_rows(f"bench_{device}.csv")
    out = []
    for what in dict.fromkeys(row["what"] for row in rows):
        of_kind = [row for row in rows if row["what"] == what]
        make = training_table if of_kind[0].get("target") else speed_table
        out += [make(what, of_kind), ""]
    if any(row["what"] in TRAINING.values() for row in rows):
        out += [changes(rows), ""]
    machines = {(row["device"], row["threads"], row["torch"], row["commit"]) for row in rows}
    for name, threads, torch, commit in sorted(machines):
        out.append(f"{name}, threads: {threads}, torch {torch}, commit {commit}.")
    return "\n".join(out)


def speed_table(what: str, rows: list[dict[str, str]]) -> str:
    """Median milliseconds: a line for each contender, a column for each size."""
    cells = {(row["contender"], row["dtype"], row["size"]): row for row in rows}
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    all_float32 = {row["dtype"] for row in rows} == {"float32"}
    lines = []
    for contender, dtype in dict.fromkeys((row["contender"], row["dtype"]) for row in rows):
        line = [contender if all_float32 else f"{contender}, {dtype}"]
        for size in sizes:
            cell = cells.get((contender, dtype, size))
            line.append(f"{float(cell['ms']):.3g}" if cell else "")
        lines.append(line)
    if what == "teachers":  # of the last contender
        lines.append(["MiB", *(cells[contender, dtype, size]["memory_mib"] for size in sizes)])
    return table([f"{what}, ms", *sizes], lines)


def training_table(what: str, rows: list[dict[str, str]]) -> str:
    """A line for each contender and each loss to be reached: CPU seconds, updates, how many times as fast."""
    lines = []
    for row in rows:
        itself = row["contender"] == row["size"]
        line = ["" if itself else row["size"], f"{row['contender']}, {row['dtype']}", row["target"]]
        line += [seconds(row), row["updates"], "1" if itself else times(row)]
        lines.append(line)
    return table([f"{what}: loss of", "who trains", "loss", "s", "updates", "times as fast"], lines)


def reached(row: dict[str, str]) -> bool:
    """Whether a training row's contender came to the loss."""
    return float(row["held_out"]) <= float(row["target"])


def seconds(row: dict[str, str]) -> str:
    """A training row's seconds; where its loss stayed above the target, where it ended."""
    s = f"{float(row['ms']) / 1000:.3g}"
    return s if reached(row) else f"not in {s}: ends at {float(row['held_out']):.3f}"


def times(row: dict[str, str]) -> str:
    """How many times as fast as the target a contender was; nothing where it did not come to the loss."""
    return f"{1 / float(row['ratio']):.2f}" if reached(row) else ""


def changes(rows: list[dict[str, str]]) -> str:
    """What Muon, one token a timestep and both gave: times as fast an update, and to the loss of before."""
    found = {(r["what"], r["size"], r["contender"], r["dtype"]): r for r in rows}
    lines = []
    for model, what in TRAINING.items():
        for name, contender in CHANGES.items():
            for dtype in ("float32", "bfloat16"):
                update = found.get(("optimizer", model, contender, dtype))
                before = found.get(("optimizer", model, CHANGES["before"], dtype))
                training = found.get((what, "before", name, dtype))
                if name == "before" or not (update or training):
                    continue
                line = [f"{model}, {dtype}", "both: today" if name == "today" else name]
                line.append(f"{float(before['ms']) / float(update['ms']):.2f}" if update else "")
                line += [times(training) or seconds(training), training["updates"]] if training else ["", ""]
                lines.append(line)
    columns = [
        "what each change gave",
        "",
        "times as fast an update",
        "times as fast to the same loss",
        "updates",
    ]
    return table(columns, lines)


def processes(
    device: str, bandwidth: float = 50e9, latency: float = 10e-6, update: float = 2e-3
) -> str:  # bytes/s, s a hop, s
    """Efficiency at two processes, measured; at more, computed for updates of `update` seconds on such links.

    A ring all-reduce has each of W processes send 2 (W - 1) / W of the gradient's bytes.
    """
    ms = {}
    for row in read_rows(f"bench_{device}.csv"):
        if row["what"] == "processes":
            ms[row["contender"], row["size"]] = float(row["ms"])
    lines = []
    for name, numbers in GRADIENT_SIZES.items():
        one = ms[name, "1"]
        two = ms[name, "2"]
        line = [name, f"{one:.3g} ms", f"{two:.3g} ms", f"{one / two:.2f}"]
        sent = {W: 2 * (W - 1) / W * 4 * numbers for W in PROCESSES}  # bytes
        line.append(f"{sent[PROCESSES[-1]] / 1e6:.2f} MB")
        for W in PROCESSES:
            communication = sent[W] / bandwidth + 4 * math.log2(W) * latency
            line.append(f"{update / (update + communication):.2f}")
        lines.append(line)
    columns = ["", "1 process", "2 processes", "efficiency", f"sent by each of W = {PROCESSES[-1]}"]
    return table([*columns, *(f"W = {W}" for W in PROCESSES)], lines)


# ---- kernels that were compiled, not run -------------------------------------------------------------------


def inspected() -> tuple[str, str]:
    """What an update's kernels compile to for an H100; and registers and spilled bytes on every GPU."""
    rows = read_rows("inspect.csv")
    lines = []
    of_gpus = {}
    for row in rows:
        attention = "tile" in row["kernel"] and "tangent" not in row["kernel"]
        attention = attention and row["precision"] == "bfloat16" and "dropout" not in row["case"]
        kl = row["kernel"] == "_head_kl" and row["precision"] == "ieee"
        update = row["kernel"] in ("_dots", "_update")
        if not (attention or kl or update):
            continue
        name = f"`{row['kernel']}`, {row['case']}"
        of_gpus.setdefault(name, {})[row["GPU"]] = f"{row['registers']} / {row['spilled']}"
        if row["GPU"] == "h100":
            line = [name, row["registers"], row["spilled"], f"{int(row['shared']) / 1024:.0f}"]
            line += [f"{100 * float(row['occupancy']):.0f} %", row["programs"], row["matrix"]]
            line += [f"{100 * float(row['wide']):.0f} %", row["bytes"], row["H100 us"]]
            lines.append(line)
    columns = ["kernel", "registers", "spilled, B", "shared, KiB", "occupancy", "programs"]
    columns += ["matrix instructions", "16-byte loads", "bytes / formula", "roofline, µs (computed)"]
    gpus = list(dict.fromkeys(row["GPU"] for row in rows))
    by_gpu = [[name, *(found.get(gpu, "") for gpu in gpus)] for name, found in of_gpus.items()]
    return table(columns, lines), table(["registers / spilled bytes of a thread", *gpus], by_gpu)


# ---- one token a timestep or three -------------------------------------------------------------------------


def tokens() -> str:
    """Teachers by task, then students, of one token and of three: means over seeds, and of their differences.

    Intervals: 95 %, bootstrap over the pairs of one task and seed, tasks being strata.
    """
    rows = read_rows("tokens.csv")
    tasks = list(dict.fromkeys(row["task"] for row in rows))

    def values(model: str, column: str, n_tokens: str) -> np.ndarray:
        """(tasks, seeds)"""
        chosen = [row for row in rows if (row["model"], row["tokens"]) == (model, n_tokens)]
        chosen.sort(key=lambda row: (tasks.index(row["task"]), row["seed"]))
        return np.array([float(row[column]) for row in chosen]).reshape(len(tasks), -1)

    def line(name: str, one: np.ndarray, three: np.ndarray, digits: int) -> list[str]:
        strata = list(np.atleast_2d(one - three))
        difference = cell(lambda x: np.mean([y.mean(-1) for y in x], 0), strata, f"{{:.{digits}f}}")
        return [name, f"{one.mean():.{digits}f}", f"{three.mean():.{digits}f}", difference]

    lines = []
    scores = [values("teacher", "score", n) for n in "13"]
    nlls = [values("teacher", "heldout", n) for n in "13"]
    retentions = [values("student", "retention", n) for n in "13"]
    kls = [values("student", "heldout", n) for n in "13"]
    for i, task in enumerate(tasks):
        lines.append(line(f"teacher's score, {task}", scores[0][i], scores[1][i], 1))
    lines.append(line("teacher's score, all", *scores, 1))
    lines.append(line("teacher's held-out NLL", *nlls, 4))
    lines.append(line("student's retention, mean", *retentions, 3))
    lines.append(line("student's retention, worst task", *(x.min(0) for x in retentions), 3))
    lines.append(line("student's held-out KL", *kls, 4))
    return table(["", "one token", "three tokens", "difference"], lines)


# ---- the battery -------------------------------------------------------------------------------------------

BASELINES = ("before", "context 1", "BC", "BC best 10 %")


def battery_means(rows: list[dict[str, str]]) -> dict[tuple[str, str, str], list[float]]:
    """Returns of each seed by dataset, variant and what was asked for; a student's without its group."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        variant = row["variant"].rsplit(" ", 1)[0] if "student" in row["variant"] else row["variant"]
        found.setdefault((row["dataset"], variant, row["asked"]), []).append(float(row["return_mean"]))
    return found


def battery(names: list[str]) -> str:
    """Returns on these datasets, means over seeds, and the default's share of the best baseline."""
    rows = [row for row in read_rows("battery.csv") if row["dataset"] in names]
    returns = battery_means(rows)
    low = {row["dataset"]: float(row["low"]) for row in rows if row["low"]}
    lines = []
    shares = []
    of_baselines = []  # of the default's return
    retention = []
    for name in names:
        of_dataset = [row for row in rows if row["dataset"] == name]
        target = np.mean([float(row["target"]) for row in of_dataset if row["asked"] == "supported"])
        ours = np.mean(returns[name, "default", "supported"])
        others = []
        for baseline in BASELINES:
            targets = [returns.get((name, baseline, asked), [-math.inf]) for asked in ("supported", "p95")]
            others.append(max(map(np.mean, targets)))
        of_ours = [(other - low[name]) / (ours - low[name]) for other in others]
        of_baselines.append(of_ours)
        shares.append(1 / max(of_ours))
        student = ""
        if (name, "ask 0 student", "supported") in returns:
            mean = np.mean(returns[name, "ask 0 student", "supported"])
            retention.append((mean - low[name]) / (ours - low[name]))
            student = number(mean)
        n_seeds = len(returns[name, "default", "supported"])
        cells = [number(target), number(ours), student, *map(number, others), f"{shares[-1]:.2f}", n_seeds]
        lines.append([name, *cells, flags(of_dataset, "default"), flags(of_dataset, "ask 0 student")])
    head = ["dataset", "asked for", "default", "student, --ask 0", *BASELINES, "default / best", "seeds"]
    text = f"Default / best baseline: {np.mean(shares):.2f} on average, {min(shares):.2f} at worst."
    each = []
    for baseline, of_ours in zip(BASELINES, np.transpose(of_baselines), strict=True):
        each.append(f"{baseline} {np.mean(of_ours):.2f} ({min(of_ours):.2f})")
    text += f" Baseline / default, on average (at worst): {', '.join(each)}."
    if retention:
        text += f" Students' retention: {np.mean(retention):.2f} on average, {min(retention):.2f} at worst."

    def of_students(a: str, b: str) -> str:
        """Returns of one kind of students over another's, from the return of a random policy."""
        ratios = []
        for name in names:
            if (name, a, "supported") in returns and (name, b, "supported") in returns:
                mean, other = (np.mean(returns[name, kind, "supported"]) - low[name] for kind in (a, b))
                ratios.append(mean / other)
        return f"{np.mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""

    asked = of_students("student", "ask 0 student")
    if asked:
        text += f" With the default over --ask 0: {asked}."
    uniform = of_students("ask 0 context 1 student", "ask 0 student")
    if uniform:
        text += f" With --ask 0, of context 1's teachers over of the default's: {uniform}."
    return f"{table([*head, 'flags of teachers', 'of students'], lines)}\n\n{text}"


def number(x: float) -> str:
    """A return: 3731, or 0.85."""
    return f"{x:.0f}" if abs(x) >= 10 else f"{x:.2f}"


def flags(rows: list[dict[str, str]], variant: str) -> str:
    """The verdicts' flags of a variant's seeds: below-target 2, overfit 1."""
    found = []
    for row in rows:
        if row["variant"].startswith(variant) and row["asked"] == "supported":
            found += row["flags"].split()
    return ", ".join(f"{name} {found.count(name)}" for name in dict.fromkeys(found))


def battery_median(names: list[str]) -> str:
    """Returns on these datasets when asked for the median of the data's own, means over seeds."""
    rows = [row for row in read_rows("battery.csv") if row["dataset"] in names and row["asked"] == "median"]
    returns = battery_means(rows)
    asked = {row["dataset"]: float(row["target"]) for row in rows}
    variants = ("default", "before", "context 1")
    lines = []
    for name in (name for name in names if name in asked):
        cells = [
            f"{np.mean(returns[name, v, 'median']):.0f}" if (name, v, "median") in returns else ""
            for v in variants
        ]
        lines.append([name, f"{asked[name]:.0f}", *cells])
    return table(["dataset", "median asked for", *variants], lines)


def remedies() -> str:
    """What was tried on datasets of CHOOSING, one seed: returns asked for the 95th percentile."""
    rows = read_rows("remedies.csv")
    names = list(dict.fromkeys(row["dataset"] for row in rows if row["dataset"] in datasets.CHOOSING))
    cells = {(row["remedy"], row["dataset"]): mean_and_std(row) for row in rows}
    lines = []
    for remedy in dict.fromkeys(row["remedy"] for row in rows):
        lines.append([remedy, *(cells.get((remedy, name), "") for name in names)])
    return table(["", *names], lines)


def students() -> str:
    """Options tried for students: mean and lowest retention over tasks and seeds, by group of teachers."""
    rows = read_rows("students.csv")

    def group(row: dict[str, str]) -> str:
        return f"{row['teachers']}, {float(row['data_share']):.0%}"

    groups = sorted({group(row) for row in rows})
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row["options"], group(row)), []).append(float(row["retention"]))
    lines = []
    for options in dict.fromkeys(row["options"] for row in rows):
        of_options = [found.get((options, name), []) for name in groups]
        cells = [f"{np.mean(x):.2f}, {min(x):.2f} ({len(x)})" if x else "" for x in of_options]
        lines.append([options, *cells])
    return table(["", *groups], lines)


# ---- what was tried ----------------------------------------------------------------------------------------


def tried(path: Path) -> list[str]:
    """A line for each task of a metrics.json: of a teacher, or of a student."""
    metrics = read_json(path)
    lines = []
    for name, m in metrics["tasks"].items():
        line = f"{path.stem:20} {name.removeprefix('thirdparty/'):11} "
        if m["return_mean"] is not None:
            line += f"{mean_and_std(m)} of {m['target']:.0f}; "
        if "heldout_nll" in m:
            line += f"held-out NLL {m['heldout_nll']:.3f}"
        else:
            line += f"held-out KL {m['heldout_kl']:.3f}"
        if m["retention"] is not None:
            line += f", retention {m['retention']:.2f}"
        lines.append(f"{line}; training {metrics['seconds']['train']:.0f} s")
    return lines


def main() -> None:
    """Print all of them."""
    for run in sorted(path.parent.name for path in RESULTS.glob("*/model.json")):
        print(f"\n{run}\n\n{student(run)}\n\n{lower_targets(run)}")
        files = exported(run)
        if files:
            print(f"\n{files}")
    measured = {row["dataset"] for row in read_rows("battery.csv")}
    for half in ("UNSEEN", "CHOOSING"):
        names = [name for name in getattr(datasets, half) if name in measured]
        if names:
            print(f"\nbattery, {half.lower()}\n\n{battery(names)}\n\n{battery_median(names)}")
    print(f"\nremedies\n\n{remedies()}")
    print(f"\nstudents\n\n{students()}")
    rows = read_rows("little_data.csv")
    print(f"\nlittle data\n\n{little_data_report.tables(rows)}")
    print(f"\nlittle data, README\n\n{little_data_report.readme_table(rows)}")
    print("\ninspect\n\n{}\n\n{}".format(*inspected()))
    print(f"\ntokens\n\n{tokens()}")
    for path in sorted(RESULTS.glob("bench_*.csv")):
        device = path.stem.removeprefix("bench_")
        print(f"\n{path.stem}\n\n{speed(device)}")
        print(f"\n{processes(device)}")
    print(
        "\ntried: return, mean ± standard deviation over episodes, of the return asked for; "
        "NLL of a teacher, KL of a student"
    )
    for path in sorted(RESULTS.glob("tried/*.json")):
        print("\n".join(tried(path)))


if __name__ == "__main__":
    main()

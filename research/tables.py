"""README's tables and figures, from the runs kept in this folder; a test holds README to them.

python -m research.tables
"""

import csv
import json
import math
from pathlib import Path

HERE = Path(__file__).parent / "results"


def student(run: str) -> str:
    """A run of distill.py as a Markdown table, and the line below it."""
    metrics, teachers = (json.loads((HERE / run / f).read_bytes()) for f in ("metrics.json", "model.json"))
    out = [
        "| task | target return | teacher | student | retention | held-out KL | lower target | teacher |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, m in metrics["tasks"].items():
        t = teachers["teachers"][name]
        out.append(f"| {name.split('/')[1] if '/' in name else name} | {m['target']:.0f} | {t['return_mean']:.0f} ± {t['return_std']:.0f} | "
                   f"{m['return_mean']:.0f} ± {m['return_std']:.0f} | {m['retention']:.2f} | {m['heldout_kl']:.3f} | "
                   f"{t['median']['target']:.0f} | {t['median']['return_mean']:.0f} ± {t['median']['return_std']:.0f} |")  # fmt: skip
    kept, s, at = [m["retention"] for m in metrics["tasks"].values()], metrics["seconds"], metrics["machine"]
    mean, worst = sum(kept) / len(kept), min(kept)
    out += [f"\nRetention {mean:.3f} on average, {worst:.3f} at worst; {metrics['parameters']:,} parameters, {metrics['compression']:.1f} times fewer.",
            f"Seconds: teachers' targets {s['targets']:.0f}, student {s['train']:.0f}, evaluation {s['evaluate']:.0f} "
            f"({at['device']}, threads: {at['threads']}, {at['dtype']}, torch {at['torch']}, commit {at['commit']})."]  # fmt: skip
    return "\n".join(out)


def lower(run: str) -> str:
    """What students return that are asked for the median of their data's returns: the default's, and one that saw all windows alike."""
    found = {"student": "median.json", "student, --top 1": "median-top-1.json"}
    found = {
        who: json.loads((HERE / run / f).read_bytes())["tasks"]
        for who, f in found.items()
        if (HERE / run / f).exists()
    }
    if not found:
        return ""
    teachers = {
        name: t["median"]
        for name, t in json.loads((HERE / run / "model.json").read_bytes())["teachers"].items()
    }
    out = [f"| lower target | teacher | {' | '.join(found)} |", "|---" * (2 + len(found)) + "|"]
    for name, t in teachers.items():
        returns = [t, *(tasks[name] for tasks in found.values())]
        out.append(
            " | ".join(
                (
                    f"| {name}, {t['target']:.0f}",
                    *(f"{m['return_mean']:.0f} ± {m['return_std']:.0f}" for m in returns),
                )
            )
            + " |"
        )
    return "\n".join(out)


def speed(device: str) -> str:
    """bench_<device>.csv as Markdown tables, one for each kind of row: median milliseconds, a line for each contender, a column for each size."""
    with open(HERE / f"bench_{device}.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    out = []
    for what in dict.fromkeys(r["what"] for r in rows):
        these = [r for r in rows if r["what"] == what]
        cells = {(r["contender"], r["dtype"], r["size"]): r for r in these}
        sizes, named = (
            list(dict.fromkeys(r["size"] for r in these)),
            {r["dtype"] for r in these} != {"float32"},
        )
        out += [f"| {what}, ms | " + " | ".join(sizes) + " |", "|---|" + "---|" * len(sizes)]
        for name, dtype in dict.fromkeys((r["contender"], r["dtype"]) for r in these):
            line = [cells.get((name, dtype, s)) for s in sizes]
            out.append(
                f"| {name}{f', {dtype}' if named else ''} | "
                + " | ".join(f"{float(r['ms']):.3g}" if r else "" for r in line)
                + " |"
            )
        if what == "teachers":
            out.append("| MiB | " + " | ".join(cells[name, dtype, s]["memory_mib"] for s in sizes) + " |")
        out.append("")
    at = {(r["device"], r["threads"], r["torch"], r["commit"]) for r in rows}
    return "\n".join([*out, *(f"{d}, threads: {t}, torch {v}, commit {c}." for d, t, v, c in sorted(at))])


def processes(device: str, bandwidth=50e9, latency=10e-6, update=2e-3) -> str:
    """Efficiency at two processes, measured; at more, for an update of `update` seconds on links of so many bytes a second and seconds a hop, worked out."""
    with open(HERE / f"bench_{device}.csv", newline="") as f:
        ms = {
            (r["contender"], r["size"]): float(r["ms"]) for r in csv.DictReader(f) if r["what"] == "processes"
        }
    out = [
        "| | 1 process | 2 processes | efficiency | sent by each of W = 1000 | W = 8 | W = 64 | W = 1000 |",
        "|---" * 8 + "|",
    ]
    for who, numbers in (
        ("teacher", 605_190 + 1),
        ("student", 111_140 + 4 * 3),
    ):  # the gradient's and the scores'
        one, two = ms[who, "1"], ms[who, "2"]
        sent = {W: 2 * (W - 1) / W * 4 * numbers for W in (8, 64, 1000)}  # bytes of a ring all-reduce
        worked_out = [update / (update + b / bandwidth + 4 * math.log2(W) * latency) for W, b in sent.items()]
        out.append(
            f"| {who} | {one:.3g} ms | {two:.3g} ms | {one / two:.2f} | {sent[1000] / 1e6:.2f} MB | "
            + " | ".join(f"{x:.2f}" for x in worked_out)
            + " |"
        )
    return "\n".join(out)


def exported(run: str) -> str:
    """What export.py's files do: float32 beside weights in 8 bits."""
    out = ["| file | KB | furthest from the model's actions | return | retention |", "|---|---|---|---|---|"]
    for card in sorted(HERE.glob(f"{run}/*.json")):
        for name, f in json.loads(card.read_bytes()).get("files", {}).items():
            out.append(
                f"| {name} | {f['bytes'] / 1024:.0f} | {f['largest_difference']:.1g} | {f['return_mean']:.0f} ± {f['return_std']:.0f} | {f['retention']:.2f} |"
            )
    return "\n".join(out)


def main():
    for run in sorted(p.parent.name for p in HERE.glob("*/model.json")):
        print(f"\n{run}\n\n{student(run)}\n\n{lower(run)}")
        if "onnx" in (files := exported(run)):
            print(f"\n{files}")
    for f in sorted(HERE.glob("bench_*.csv")):
        print(f"\n{f.stem}\n\n{speed(f.stem.removeprefix('bench_'))}")
        print(f"\n{processes(f.stem.removeprefix('bench_'))}")
    print(
        "\ntried: return, mean ± standard deviation over episodes, of the return asked for; NLL of a teacher, KL of a student"
    )
    for f in sorted(HERE.glob("tried/*.json")):
        for name, m in json.loads(f.read_bytes())["tasks"].items():
            held = f"KL {m['heldout_kl']:.3f}" if "heldout_nll" not in m else f"NLL {m['heldout_nll']:.3f}"
            got = (
                ""
                if m["return_mean"] is None
                else f"{m['return_mean']:.0f} ± {m['return_std']:.0f} of {m['target']:.0f}; "
            )
            kept = "" if m["retention"] is None else f", retention {m['retention']:.2f}"
            print(
                f"{f.stem:20} {name.removeprefix('thirdparty/'):11} {got}held-out {held}{kept}; training {json.loads(f.read_bytes())['seconds']['train']:.0f} s"
            )


if __name__ == "__main__":
    main()

"""A run as one page: what was distilled from what, how the training went, what came out, and a short film of each task.

    python report.py out/student                    # -> out/student/report.html
    python report.py out/student out/student-32     # others too in the figure of compression against retention

The page is one file that needs no network and runs no script. distill.py's plots.png shows the same panels.
"""

import base64
import dataclasses
import html
import io
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

import data
import evaluate
import model as dt
from support import UserError, cli, files, log


@dataclasses.dataclass
class Config:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional]  # run directories: the first is reported
    film_steps: int = 400  # of an episode, in each task's film; 0: no films
    width: int = 240  # of a film, pixels


class Run:
    """What a finished run left behind. Raises UserError where it is not there or not finished."""

    def __init__(self, path):
        self.path = Path(path)
        found = [files.read_json(self.path / name) for name in ("metrics.json", "config.json", "model.json")]
        if None in found:
            raise UserError(f"{path} holds no finished run; train one: python distill.py")
        self.metrics, self.config, self.meta = found
        self.tasks, self.teachers = (
            self.metrics["tasks"],
            self.meta.get("teachers"),
        )  # teachers: None where this is one
        self.log = files.read_csv(self.path / "log.csv")
        self.step, self.retention = (
            self.log["step"],
            {n: m["retention"] for n, m in self.tasks.items() if m["retention"] is not None},
        )

    def rows(self):
        """One of each task, for a table."""
        rows = []
        for name, m in self.tasks.items():
            if self.teachers:
                t = self.teachers[name]
                rows.append({"task": name, "target": m["target"], "teacher": t.get("return_mean"), "student": m["return_mean"], "+-": m["return_std"],
                             "teacher score": t.get("normalized_score"), "student score": m["normalized_score"], "retention": m["retention"],
                             "held-out KL": m["heldout_kl"]})  # fmt: skip
            else:
                rows.append({"task": name, "target": m["target"], "teacher": m["return_mean"], "+-": m["return_std"], "teacher score": m["normalized_score"],
                             "held-out NLL": m["heldout_nll"]})  # fmt: skip
        return rows


# ---- panels: each draws one question into matplotlib axes ------------------------------------------------------------

COLOURS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#F0E442",
    "#000000",
)  # Okabe and Ito's, told apart by all eyes


def style(i):
    return {"color": COLOURS[i % 8], "linestyle": ("-", "--", ":", "-.")[i // 8 % 4]}


def plain(name):
    """A task's name, no formula in it."""
    return name.replace("$", r"\$")


def smooth(r: Run, column):
    """A noisy column averaged over a window: steps, values, and how many updates the window spans."""
    rows = max(1, min(100, len(r.step) // 10))
    return (
        r.step[rows - 1 :],
        np.convolve(r.log[column], np.ones(rows) / rows, "valid"),
        int(r.step[rows - 1] - r.step[0]) + 1,
    )


def distance(r: Run, ax):
    for i, name in enumerate(r.tasks):
        known = ~np.isnan(r.log[f"heldout_kl_{name}"])
        ax.plot(r.step[known], r.log[f"heldout_kl_{name}"][known], label=plain(name), **style(i))
    ax.set(
        yscale="log",
        xlabel="update",
        ylabel="KL per action dimension (nats)",
        title="Distance from each teacher, held-out episodes",
    )


def lines(r: Run, ax, labels):
    """Smooth columns, {column: label}, a line each; how many updates their window spans."""
    for i, (column, label) in enumerate(labels.items()):
        x, y, window = smooth(r, column)
        ax.plot(x, y, label=label, **style(i))
    return window


def timeline(r: Run, ax):
    window = lines(r, ax, {f"share_{name}": plain(name) for name in r.tasks})
    ax.set(
        xlabel="update",
        ylabel="share of the batch",
        ylim=(0, 1),
        title=f"What the curriculum chose (mean of {window} updates)",
    )


def conflict(r: Run, ax):
    for key, label, i in (
        ("cosine", "cosine to the previous update", 0),
        ("projected", "share of updates projected", 5),
    ):
        x, y, window = smooth(r, key)
        ax.plot(x, y, label=label, **style(i))
    ax.axhline(0, color="grey", linewidth=0.8)
    ax.set(
        xlabel="update",
        ylabel="cosine; share",
        ylim=(-1, 1),
        title=f"Conflict with the previous update (mean of {window} updates)",
    )


def alignments(r: Run, ax):
    window = lines(r, ax, {f"alignment_{name}": plain(name) for name in r.tasks})
    ax.axhline(0, color="grey", linewidth=0.8)
    ax.set(
        xlabel="update",
        ylabel="alignment",
        ylim=(-1, 1),
        title=f"How much of the last update each teacher would take (mean of {window} updates)",
    )


def likelihood(r: Run, ax):
    for i, (key, label) in enumerate((("nll", "of a batch"), ("heldout_nll", "held-out episodes"))):
        ax.plot(r.step, r.log[key], label=label, **style(i))
    ax.set(
        xlabel="update",
        ylabel="NLL per action dimension (nats)",
        title="Negative log-likelihood of the data's actions",
    )


def returns(r: Run, ax):
    at, rows = np.arange(len(r.tasks)), r.rows()
    for j, who in enumerate(("teacher", "student") if r.teachers else ("teacher",)):
        ax.bar(at + 0.4 * j, [x[f"{who} score"] or 0 for x in rows], 0.38, label=who, color=COLOURS[j])
    ax.set_xticks(at + 0.2 * bool(r.teachers), [plain(n).replace("/", "\n") for n in r.tasks])
    ax.set(
        ylabel="normalised score (100 = expert)", title="Return at the dataset's 95th percentile as target"
    )


def compression(runs: list[Run], ax):
    runs = [r for r in runs if r.retention]  # teachers have none
    names = list(dict.fromkeys(n for r in runs for n in r.retention))
    for i, name in enumerate(names):
        points = sorted((r.metrics["compression"], r.retention[name]) for r in runs if name in r.retention)
        ax.plot(*zip(*points, strict=True), marker="o", label=plain(name), **style(i))
    points = sorted((r.metrics["compression"], np.mean(list(r.retention.values()))) for r in runs)
    ax.plot(*zip(*points, strict=True), marker="_", markersize=16, color="black", linewidth=2.5, label="mean")
    ax.axhline(1, color="grey", linewidth=0.8)
    ax.set(
        xscale="log",
        xlabel="times fewer parameters than the teachers",
        ylabel="student's score / teacher's",
        title="Compression against retention",
    )
    ax.set_xticks([x for x, _ in points], [f"{x:.3g}" for x, _ in points])
    ax.minorticks_off()


def panels(r: Run):
    """[(draw, what it shows)] of a run."""
    if not r.teachers:
        return [(likelihood, "What the teacher was trained to lower. Where the held-out curve turns upwards, the teacher begins to learn its data by heart."),
                (returns, "Score of the episodes that were evaluated after training.")]  # fmt: skip
    kl = "KL(teacher ‖ student)" if r.config["kl"] == "forward" else "KL(student ‖ teacher)"
    out = [(distance, f"{kl} on episodes that neither was trained on, after every log interval."),
           (timeline, "Each teacher's share of the windows of an update: the farther the student is from it, the larger."),
           (conflict, "Cosine of an update's gradient to the one before it, and how often it opposed that one and was projected."),
           (returns, "The last checkpoint's score beside its teacher's.")]  # fmt: skip
    if any((r.log[f"alignment_{n}"] != 0).any() for n in r.tasks):
        out.insert(3, (alignments, "1: all of it, −1: the opposite of it."))
    return out


def figure(rows, columns, size):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "manyteachers"  # the same figure is the same bytes
    fig, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    return fig, list(axes.flat)


def finish(fig, axes, file, **options):
    import matplotlib.pyplot as plt

    for ax in axes:
        if (
            len(ax.get_legend_handles_labels()[1]) <= 20
        ):  # of a hundred tasks nobody could tell the lines apart
            ax.legend(frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(file, **options)
    plt.close(fig)


def plots(out):
    """RUN/plots.png of a student: its first four panels."""
    r = Run(out)
    fig, axes = figure(2, 2, (12, 7.5))
    for ax, draw in zip(axes, (distance, timeline, conflict, returns), strict=True):
        draw(r, ax)
    finish(fig, axes, out / "plots.png", dpi=120)


# ---- the page --------------------------------------------------------------------------------------------------------

STYLE = """
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; }
h1 { font-size: 1.6rem; margin-bottom: 0.2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } .lead { font-size: 1.1rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.8rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
.text { text-align: left; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.5rem; }
.films { grid-template-columns: repeat(auto-fill, 15rem); }
figure { margin: 0; break-inside: avoid; } figure svg, figure img { width: 100%; height: auto; display: block; }
figcaption { color: #555; font-size: 0.875rem; }
code, pre { font: 0.875rem/1.4 ui-monospace, monospace; } pre { background: #f5f5f5; padding: 0.8rem; overflow-x: auto; }
@media print { body { margin: 0; max-width: none; font-size: 10pt; } h2 { break-after: avoid; }
  .figures { grid-template-columns: 1fr 1fr; } .films { grid-template-columns: repeat(4, 1fr); } }
"""


def text(x):
    return html.escape(log.cell(x))


def as_table(rows):
    def cell(tag, v, like):
        return f"<{tag}{' class=text' if isinstance(like, str) else ''}>{text(v)}</{tag}>"

    head = "".join(cell("th", k, v) for k, v in rows[0].items())
    lines = "".join("<tr>" + "".join(cell("td", v, v) for v in r.values()) + "</tr>" for r in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{lines}</table></div>'


def svg(draw, what, caption):
    fig, axes = figure(1, 1, (6, 3.9))
    draw(what, axes[0])
    title, out = axes[0].get_title(), io.StringIO()
    finish(fig, axes, out, format="svg", metadata={"Date": None})
    drawn = out.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(
        "<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1
    )
    return f"<figure>{drawn}<figcaption>{html.escape(caption)}</figcaption></figure>"


def film(model, task, index, cfg: Config):
    """The beginning of an episode as a figure, or why there is none."""
    if task.env_id is None:
        return f"<p>no film of {html.escape(task.name)}: its dataset names no environment</p>"
    short, out = dataclasses.replace(task, max_steps=min(cfg.film_steps, task.max_steps)), io.BytesIO()
    try:
        got = evaluate.film(
            model, short, index, task.targets["p95"], 1000, out, cfg.width, format="webp", quality=60
        )
    except UserError as e:
        return f"<p>{html.escape(str(e))}</p>"
    source = f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"
    caption = html.escape(
        f"{task.name}: the first {short.max_steps} steps, asked for {task.targets['p95']:.0f}, {got:.0f} so far"
    )
    return f'<figure><img src="{source}" width="{cfg.width}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def page(runs: list[Run], films: list[str]) -> str:
    r = runs[0]
    machine, seconds = r.metrics["machine"], {k: f"{v:.0f} s" for k, v in r.metrics["seconds"].items()}
    if r.teachers:
        total = round(r.metrics["compression"] * r.metrics["parameters"])
        kept = (
            r.retention
            and f", and keeps {100 * np.mean(list(r.retention.values())):.1f} % of their scores, {100 * min(r.retention.values()):.1f} % of the worst"
        )
        lead = f"{len(r.tasks)} teachers of {total:,} parameters, one student of {r.metrics['parameters']:,}: {r.metrics['compression']:.1f} times fewer{kept or ''}."
    else:
        lead = f"A teacher of {r.metrics['parameters']:,} parameters."
    sources = [{"task": t["name"], "environment": t["env_id"], "dataset": t["dataset"], "observations": t["obs_dim"], "actions": t["act_dim"],
                "scores 0 and 100": f"{t['reference'][0]:.0f} and {t['reference'][1]:.0f}, {t['reference_source']}"}
               for t in r.meta["tasks"]]  # fmt: skip
    figures = "\n".join([*(svg(draw, r, caption) for draw, caption in panels(r)),
                         *([svg(compression, runs, "Every task of each run named on the command line.")] if r.retention else [])])  # fmt: skip
    name = html.escape(str(r.path))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{name}</title><style>{STYLE}</style>
</head>
<body>
<h1>{name}</h1>
<p class="lead">{html.escape(lead)}</p>
<h2>What came out</h2>
{as_table(r.rows())}
<p>Means over {r.config["eval_episodes"]} episodes of the last checkpoint, +- their standard deviation. Retention: the student's score over its teacher's.</p>
<h2>From what</h2>
{as_table(sources)}
<h2>Training and result</h2>
<div class="figures">
{figures}
</div>
{'<h2>Films</h2><div class="figures films">' + "".join(films) + "</div>" if films else ""}
<h2>How it was made</h2>
<p>{text(machine["device"])}, {machine["threads"]} threads, {text(machine["dtype"])}, Python {text(machine["python"])}, torch {text(machine["torch"])},
commit {text(machine["commit"])}; {html.escape(", ".join(f"{k} {v}" for k, v in seconds.items()))}.</p>
<details><summary>Every option</summary><pre>{html.escape(json.dumps(r.config, indent=1))}</pre></details>
</body>
</html>
"""


def main(cfg: Config):
    cli.at_least(cfg, film_steps=0, width=16)
    if not cfg.runs:
        raise UserError("name a run directory: python report.py out/student")
    runs = [Run(path) for path in cfg.runs]
    films, out = [], runs[0].path / "report.html"
    files.write(out, page(runs, films).encode())
    if cfg.film_steps:  # the page is there already: a graphics library can crash
        model, meta = dt.load(runs[0].path)
        films = [film(model, task, i, cfg) for i, task in enumerate(data.tasks(meta, runs[0].path))]
        files.write(out, page(runs, films).encode())
    print(
        f"{out}: {out.stat().st_size / 1e6:.1f} MB, needs no network; films of {sum('<img' in f for f in films)} of {len(films)} tasks"
    )


if __name__ == "__main__":
    cli.run(main, Config, __doc__)

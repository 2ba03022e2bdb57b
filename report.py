"""Plots of a run, and its report on one page: results, data, training curves, a short video of each task.

    python report.py out/student                    # -> out/student/report.html
    python report.py out/student out/student-32     # also plots compression against retention over these runs

The page is one file that needs no network and runs no script. distill.py takes a finished run's table and
plots.png from here, research/ the style of its figures.
"""

import base64
import dataclasses
import functools
import html
import io
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import tyro

import data
import evaluate
import model as dt
from support import UserError, cli, environments, files, log, verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclasses.dataclass
class Config:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional]  # run directories: the first is reported
    film_steps: int = 400  # environment steps in the video of each task; 0: no videos
    width: int = 240  # of a video, pixels
    imports: cli.Imports = ()  # packages to import, which register environments


class Run:
    """A finished run: its metrics, options, tasks and log. Raises UserError where `path` holds none.

    `teachers` holds the metrics of each task's teacher; None where the run is itself a teacher.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.metrics = files.read_json(self.path / "metrics.json")
        self.config = files.read_json(self.path / "config.json")
        self.meta = files.read_json(self.path / "model.json")
        if None in (self.metrics, self.config, self.meta):
            raise UserError(f"{path} holds no finished run; train one: python distill.py")
        self.tasks = self.metrics["tasks"]  # {name: metrics}
        self.teachers = self.meta.get("teachers")
        self.log = files.read_csv(self.path / "log.csv")  # {column: values}
        self.step = self.log["step"]
        self.retention = {n: m["retention"] for n, m in self.tasks.items() if m["retention"] is not None}
        self.of_success = any("retention_of" in m for m in self.tasks.values())  # what retention is of

    def rows(self) -> list[dict[str, Any]]:
        """The table of results, a row for each task."""
        return [self._student_row(name) if self.teachers else self._teacher_row(name) for name in self.tasks]

    def _student_row(self, name):
        student = self.tasks[name]
        teacher = self.teachers[name]
        return {
            "task": name,
            "target": student["target"],
            "teacher": teacher.get("return_mean"),
            "student": student["return_mean"],
            "+-": student["return_std"],
            "teacher score": teacher.get("normalized_score"),
            "student score": student["normalized_score"],
            "retention": student["retention"],
            "held-out KL": student["heldout_kl"],
            **_success("teacher success", teacher),
            **_success("student success", student),
        }

    def _teacher_row(self, name):
        teacher = self.tasks[name]
        return {
            "task": name,
            "target": teacher["target"],
            "teacher": teacher["return_mean"],
            "+-": teacher["return_std"],
            "teacher score": teacher["normalized_score"],
            "held-out NLL": teacher["heldout_nll"],
            **_success("teacher success", teacher),
        }

    def sweeps(self) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """{"teacher" or "student": {task: its sweep of target returns}}, of the tasks that have one."""
        models = (
            {"teacher": self.teachers, "student": self.tasks} if self.teachers else {"teacher": self.tasks}
        )
        found = {}
        for model, by_task in models.items():
            sweeps = {name: metrics["sweep"] for name, metrics in by_task.items() if metrics.get("sweep")}
            if sweeps:
                found[model] = sweeps
        return found

    def success_rates(self) -> dict[str, float]:
        """{"teacher", "student": the mean success rate of the tasks that report one}."""
        by_model = {"teacher": self.teachers or self.tasks}
        if self.teachers:
            by_model["student"] = self.tasks
        found = {}
        for model, by_task in by_model.items():
            rates = [metrics["success_rate"] for metrics in by_task.values() if "success_rate" in metrics]
            if rates:
                found[model] = float(np.mean(rates))
        return found

    def target_gaps(self) -> dict[str, float]:
        """{"teacher", "student": the mean of evaluate.target_gap over the tasks that have one}."""
        by_model = {"teacher": self.teachers or self.tasks}
        if self.teachers:
            by_model["student"] = self.tasks
        found = {}
        for model, by_task in by_model.items():
            gaps = []
            for task in data.tasks(self.meta, self.path):
                of_task = by_task[task.name]
                gaps.append(evaluate.target_gap(of_task.get("sweep"), of_task.get("data"), task))
            gaps = [gap for gap in gaps if gap is not None]
            if gaps:
                found[model] = float(np.mean(gaps))
        return found

    def references(self) -> dict[str, tuple[float, float]]:
        """{task: returns of score 0 and 100}."""
        return {task["name"]: tuple(task["reference"]) for task in self.meta["tasks"]}

    def scored_rows(self) -> list[dict[str, Any]]:
        """The rows of the tasks that were evaluated."""
        score = "student score" if self.teachers else "teacher score"
        return [row for row in self.rows() if row[score] is not None]


def _success(column, metrics):
    """A row's column of the success rate, where the environment reports one."""
    return {column: metrics["success_rate"]} if "success_rate" in metrics else {}


# ---- style: colours, names, smoothing ----------------------------------------------------------------------

# Okabe and Ito's, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
ANNOTATION_LIMIT = 6  # tasks whose bars have room for their values
NAMES_LIMIT = 12  # lines, or tasks on an axis, that have room for their names
NAME_LENGTH = 20  # characters of a name in a plot


def style(i: int) -> dict[str, str]:
    """Colour and line style of line i."""
    return {"color": COLOURS[i % 8], "linestyle": ("-", "--", ":", "-.")[i // 8 % 4]}


def short_names(names: Iterable[str]) -> dict[str, str]:
    """{task: label in a plot}: without the parts of a path that all tasks share, cut, and with no formula."""
    parts = {name: name.split("/") for name in names}
    if len(parts) > 1 and len({len(p) for p in parts.values()}) == 1:
        differs = [len(set(column)) > 1 for column in zip(*parts.values(), strict=True)]
        for name, path in parts.items():
            parts[name] = [part for part, keep in zip(path, differs, strict=True) if keep]
    labels = ["/".join(path) for path in parts.values()]
    cut = [_cut(label) for label in labels]
    if len(set(cut)) == len(labels):
        labels = cut
    return {name: label.replace("$", r"\$") for name, label in zip(parts, labels, strict=True)}


def _cut(label):
    """A long label without its middle."""
    if len(label) <= NAME_LENGTH:
        return label
    return f"{label[: NAME_LENGTH // 2]}…{label[1 - NAME_LENGTH // 2 :]}"


def add_legend(ax: "Axes", **options: Any) -> None:
    """A legend, unless there is one already, nothing to tell apart, or too much. options: of Axes.legend."""
    n_entries = len(ax.get_legend_handles_labels()[1])
    if ax.get_legend() is None and 0 < n_entries <= NAMES_LIMIT:
        size = {"fontsize": "small", "labelspacing": 0.2} if n_entries > 6 else {}
        ax.legend(frameon=False, **options, **size)


def smoothing_rows(run: Run) -> int:
    """How many rows of the log a moving average spans."""
    return max(1, min(100, len(run.step) // 10))


def smoothing_note(run: Run) -> str:
    """The same in updates, for an axis label: a long training logs only some of them."""
    n_updates = int(run.step[smoothing_rows(run) - 1] - run.step[0]) + 1
    return f"mean of {n_updates} updates"


def moving_average(run: Run, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the column's mean over the rows up to each."""
    n = smoothing_rows(run)
    return run.step[n - 1 :], np.convolve(run.log[column], np.ones(n) / n, "valid")


# ---- panels: each draws one question into matplotlib axes --------------------------------------------------


def plot_returns(run: Run, ax: "Axes") -> None:
    """Bars: the score of teacher and student in each task that was evaluated."""
    rows = run.scored_rows()
    models = ("teacher", "student") if run.teachers else ("teacher",)
    width = 0.8 / len(models)
    x = np.arange(len(rows))
    for j, model in enumerate(models):
        scores = np.array([row[f"{model} score"] for row in rows], dtype=float)  # None: NaN, no bar
        bars = ax.bar(x + j * width, scores, 0.95 * width, label=model, color=COLOURS[j])
        if len(rows) <= ANNOTATION_LIMIT:
            ax.bar_label(bars, ["" if np.isnan(s) else f"{s:.0f}" for s in scores], padding=1)
    label_tasks(ax, x + (len(models) - 1) * width / 2, [row["task"] for row in rows])
    ax.margins(y=0.25)  # room for the legend above the bars
    ax.set(ylabel="score (0 random, 100 expert)", title=f"Normalised return: {' and '.join(models)}")
    add_legend(ax, loc="upper center", ncols=2)


def plot_sweep(run: Run, ax: "Axes") -> None:
    """Return asked against return obtained."""
    draw_sweep(ax, run.references(), run.sweeps())


def draw_sweep(
    ax: "Axes",
    references: dict[str, tuple[float, float]],
    sweeps: dict[str, dict[str, list[dict[str, Any]]]],
) -> None:
    """Lines of return asked against return obtained, as scores: a colour for each task.

    references: the returns of score 0 and 100, by task. sweeps: {"teacher" or "student": {task: what
    evaluate.sweep returned}}; a teacher's line is dashed where a student's is beside it.
    """
    labels = short_names(references)
    limits = []
    for model, by_task in sweeps.items():
        beside = model == "teacher" and len(sweeps) > 1
        look = {"linestyle": "--", "markerfacecolor": "white"} if beside else {"linestyle": "-"}
        for i, name in enumerate(references):
            if name not in by_task:
                continue
            low, high = references[name]
            asked = [100 * (row["target"] - low) / (high - low) for row in by_task[name]]
            obtained = [row["normalized_score"] for row in by_task[name]]
            label = labels[name] if model == list(sweeps)[-1] else None
            ax.plot(asked, obtained, marker="o", markersize=4, color=COLOURS[i % 8], label=label, **look)
            limits += [min(asked), max(asked)]
        if beside:
            ax.plot([], [], color="grey", marker="o", markersize=4, label="teachers", **look)
    ends = [min(limits), max(limits)]
    ax.plot(ends, ends, color="grey", linestyle=":", linewidth=1, label="as asked")
    ax.set(
        xlabel="return asked for, as a score",
        ylabel="return obtained, as a score",
        title="Return asked against return obtained",
    )


def label_tasks(ax: "Axes", x: np.ndarray, names: list[str]) -> None:
    """The tasks' names at x (N,) on the horizontal axis."""
    labels = list(short_names(names).values())
    if len(labels) > NAMES_LIMIT:
        ax.set_xticks([])
        ax.set_xlabel(f"{len(labels)} tasks")
    elif sum(map(len, labels)) > 35:  # side by side they would overlap
        ax.set_xticks(x, labels, rotation=30, ha="right", rotation_mode="anchor")
    else:
        ax.set_xticks(x, labels)


def plot_kl(run: Run, ax: "Axes") -> None:
    """The KL to each teacher over training; the legend tells where it ended."""
    for i, (name, label) in enumerate(short_names(run.tasks).items()):
        kl = run.log[f"heldout_kl_{name}"]
        measured = ~np.isnan(kl)
        ax.plot(run.step[measured], kl[measured], label=f"{label}, last {kl[measured][-1]:.3f}", **style(i))
    ax.set(
        yscale="log",
        xlabel="update",
        ylabel="KL per action dimension (nats)",
        title="KL to each teacher, held-out episodes",
    )
    ax.yaxis.set_major_formatter("{x:g}")  # 0.1, 1, 10


def plot_shares(run: Run, ax: "Axes") -> None:
    """The share of each teacher's windows in a batch over training."""
    largest = 0.0
    for i, (name, label) in enumerate(short_names(run.tasks).items()):
        steps, share = moving_average(run, f"share_{name}")
        ax.plot(steps, share, label=label, **style(i))
        largest = max(largest, share.max())
    ax.axhline(1 / len(run.tasks), color="grey", linewidth=0.8, label="equal shares")
    ax.set(
        xlabel="update",
        ylabel=f"share ({smoothing_note(run)})",
        ylim=(0, 1.5 * largest),  # room for the legend
        title="Share of the batch by teacher",
    )
    add_legend(ax, loc="upper center", ncols=2)


def plot_conflict(run: Run, ax: "Axes") -> None:
    """How often the gradient was projected, and its cosine to the previous update's, over training."""
    ax.plot(*moving_average(run, "cosine"), label="cosine to the previous gradient", **style(0))
    ax.plot(*moving_average(run, "projected"), label="share of updates projected", **style(5))
    ax.axhline(0, color="grey", linewidth=0.8)
    ax.set(
        xlabel="update",
        ylabel=f"cosine, share ({smoothing_note(run)})",
        ylim=(-1, 1),
        title="Conflict with the previous update",
    )


def plot_alignments(run: Run, ax: "Axes") -> None:
    """Each teacher's alignment with the previous update over training."""
    for i, (name, label) in enumerate(short_names(run.tasks).items()):
        ax.plot(*moving_average(run, f"alignment_{name}"), label=label, **style(i))
    ax.axhline(0, color="grey", linewidth=0.8)
    ax.set(
        xlabel="update",
        ylabel=f"alignment ({smoothing_note(run)})",
        ylim=(-1, 1),
        title="Alignment of each teacher with the previous update",
    )


def plot_nll(run: Run, ax: "Axes") -> None:
    """A teacher's training loss."""
    ax.plot(run.step, run.log["nll"], label="training batches", **style(0))
    ax.plot(run.step, run.log["heldout_nll"], label="held-out episodes", **style(1))
    ax.set(
        xlabel="update",
        ylabel="NLL per action dimension (nats)",
        title="Negative log-likelihood of the dataset's actions",
    )


def plot_compression(runs: list[Run], ax: "Axes") -> None:
    """Retention by task against compression, of several students."""
    names = {}
    for run in runs:
        names |= run.retention
    for i, (name, label) in enumerate(short_names(names).items()):
        points = [(r.metrics["compression"], r.retention[name]) for r in runs if name in r.retention]
        ax.plot(*zip(*sorted(points), strict=True), marker="o", label=label, **style(i))
    means = sorted((run.metrics["compression"], np.mean([*run.retention.values()])) for run in runs)
    ax.plot(*zip(*means, strict=True), marker="_", markersize=16, color="black", linewidth=2.5, label="mean")
    ax.axhline(1, color="grey", linewidth=0.8)
    ax.set(
        xscale="log",
        xlabel="compression (parameters of the teachers / of the student)",
        ylabel="retention (score of the student / of its teacher)",
        title="Compression against retention",
    )
    ax.set_xticks([x for x, _ in means], [f"{x:.3g}" for x, _ in means])
    ax.minorticks_off()


# ---- which panels a run has --------------------------------------------------------------------------------


class Panel(NamedTuple):
    draw: Callable[["Axes"], None]
    caption: str


def panels(run: Run) -> list[Panel]:
    """What there is to show of a run, its result first; a quantity that was always zero has no panel."""
    captions = {}
    if run.scored_rows():
        captions[plot_returns] = "Mean over the evaluation episodes of the last checkpoint."
    if run.sweeps():
        captions[plot_sweep] = (
            "Each point: the mean over episodes that were asked for one return, a quantile of the data's. "
            "On the dotted line a model obtains what it is asked for."
        )
        gaps = [f"{model} {gap:.3f}" for model, gap in run.target_gaps().items()]
        if gaps:
            captions[plot_sweep] += f" Mean gap, over the range of returns: {', '.join(gaps)}."
    if run.teachers:
        captions |= _student_captions(run)
    else:
        captions[plot_nll] = "The training loss. Where the held-out curve rises, the teacher overfits."
    return [Panel(functools.partial(plot, run), caption) for plot, caption in captions.items()]


def _student_captions(run):
    direction = "KL(teacher ‖ student)" if run.config["kl"] == "forward" else "KL(student ‖ teacher)"
    captions = {plot_kl: f"{direction} on episodes that neither was trained on, every log interval."}
    if len(run.tasks) > 1:
        captions[plot_shares] = "Each teacher's share of the windows in a batch, as the curriculum chose it."
    if run.log["projected"].any():
        captions[plot_conflict] = (
            "Cosine of each gradient to the previous one, and how often it was projected."
        )
    if any(run.log[f"alignment_{name}"].any() for name in run.tasks):
        captions[plot_alignments] = "How much of the previous update each teacher would repeat, in [−1, 1]."
    return captions


def compression_panel(runs: list[Run]) -> list[Panel]:
    """Compression against retention, where the runs are students of several sizes."""
    students = [run for run in runs if run.retention]
    if len({run.metrics["compression"] for run in students}) < 2:
        return []
    caption = "Every task of each run named on the command line."
    return [Panel(functools.partial(plot_compression, students), caption)]


# ---- figures -----------------------------------------------------------------------------------------------


def figure(rows: int, columns: int, size: tuple[float, float]) -> "tuple[Figure, list[Axes]]":
    """A figure of rows x columns axes; size: width and height in inches."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "manyteachers"  # the same figure is the same bytes
    fig, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    return fig, list(axes.flat)


def finish(fig: "Figure", file: Path | io.StringIO, **options: Any) -> None:
    """Add legends, save, close. options: savefig's."""
    import matplotlib.pyplot as plt

    for ax in fig.axes:
        add_legend(ax)
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(file, **options)
    plt.close(fig)


def plots(out: Path) -> None:
    """Draw a student's plots.png in its run directory: up to three panels in a row, more in two."""
    shown = panels(Run(out))
    rows = 1 if len(shown) < 4 else 2
    columns = math.ceil(len(shown) / rows)
    fig, axes = figure(rows, columns, (4.4 * columns, 3.75 * rows))
    fig.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    for ax, panel in zip(axes, shown, strict=False):
        panel.draw(ax)
    for ax in axes[len(shown) :]:
        ax.remove()
    finish(fig, out / "plots.png", dpi=150)


# ---- the page ----------------------------------------------------------------------------------------------

STYLE = """
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif;
  color: #1a1a1a; background: #fff; }
h1 { font-size: 1.6rem; margin-bottom: 0.2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.lead { font-size: 1.1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9375rem; }
th, td { padding: 0.25rem 0.6rem; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top; }
td { white-space: nowrap; }
.text { text-align: left; white-space: normal; min-width: 7.5rem; }
td.text { overflow-wrap: anywhere; }
.figures { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
.videos { grid-template-columns: repeat(auto-fill, 15rem); }
figure { margin: 0; break-inside: avoid; }
figure svg, figure img { width: 100%; height: auto; display: block; }
figcaption { color: #555; font-size: 0.875rem; }
code, pre { font: 0.875rem/1.4 ui-monospace, monospace; }
pre { background: #f5f5f5; padding: 0.8rem; overflow-x: auto; }
@media print {
  body { margin: 0; max-width: none; font-size: 10pt; }
  h2 { break-after: avoid; }
  .figures { grid-template-columns: 1fr 1fr; }
  .videos { grid-template-columns: repeat(4, 1fr); }
}
"""


def page(runs: list[Run], films: list[str]) -> str:
    """The report of runs[0] as HTML. films: what `film` returned for each of its tasks, or nothing."""
    run = runs[0]
    name = html.escape(str(run.path))
    figures = "\n".join(svg(panel) for panel in [*panels(run), *compression_panel(runs)])
    videos = f'<h2>Videos</h2>\n<div class="figures videos">{"".join(films)}</div>' if films else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{name}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{name}</h1>
<p class="lead">{html.escape(headline(run))}</p>
<h2>Results</h2>
{as_table(run.rows())}
{verdicts(run)}
<p>Means over {run.config["eval_episodes"]} episodes of the last checkpoint, +- their standard deviation.
Retention: the student's score divided by its teacher's.</p>
<h2>Tasks and data</h2>
{as_table(sources(run))}
<h2>Plots</h2>
<div class="figures">
{figures}
</div>
{videos}
<h2>Machine and options</h2>
<p>{html.escape(provenance(run))}</p>
<details><summary>All options</summary><pre>{html.escape(json.dumps(run.config, indent=1))}</pre></details>
</body>
</html>
"""


def headline(run: Run) -> str:
    """What the run made, in one or two sentences."""
    n_parameters = run.metrics["parameters"]
    if not run.teachers:
        return f"A teacher of {n_parameters:,} parameters."
    compression = run.metrics["compression"]
    n_of_teachers = round(compression * n_parameters)
    text = (
        f"{len(run.tasks)} teachers of {n_of_teachers:,} parameters, one student of {n_parameters:,}: "
        f"{compression:.1f} times fewer."
    )
    if run.retention:
        retention = [100 * x for x in run.retention.values()]
        text += (
            f" It retains {np.mean(retention):.1f} % of their "
            f"{'success rates' if run.of_success else 'scores'} on average, "
            f"{min(retention):.1f} % on the worst task."
        )
    return text


def verdicts(run: Run) -> str:
    """What is wrong with the run and the remedies, as a list; empty if all is well."""
    lines = verdict.lines(data.tasks(run.meta, run.path), run.tasks, run.teachers)
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if lines else ""


def sources(run: Run) -> list[dict[str, Any]]:
    """The table of tasks and their data."""
    rows = []
    for task in run.meta["tasks"]:
        low, high = task["reference"]
        row = {
            "task": task["name"],
            "environment": task["env_id"],
            "dataset": task["dataset"],
            "observations": task["obs_dim"],
            "actions": task["act_dim"],
            "returns of scores 0 and 100": f"{low:.0f} and {high:.0f}, {task['reference_source']}",
        }
        rows.append(row)
    return rows


def provenance(run: Run) -> str:
    """The machine that made the run, and the seconds of each phase."""
    machine = {k: log.cell(v) for k, v in run.metrics["machine"].items()}
    seconds = [f"{phase} {s:.0f} s" for phase, s in run.metrics["seconds"].items()]
    return (
        f"{machine['device']}, {machine['threads']} threads, {machine['dtype']}, Python {machine['python']}, "
        f"torch {machine['torch']}, commit {machine['commit']}; {', '.join(seconds)}."
    )


def as_table(rows: list[dict[str, Any]]) -> str:
    """Rows of the same columns as HTML; columns of text may wrap."""
    lines = ["".join(_cell("th", name, value) for name, value in rows[0].items())]
    for row in rows:
        lines.append("".join(_cell("td", value, value) for value in row.values()))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table>{body}</table></div>'


def _cell(tag, content, like):
    align = " class=text" if isinstance(like, str) else ""
    text = html.escape(log.cell(content)).replace("/", "/<wbr>")  # a dataset's name may break there
    return f"<{tag}{align}>{text}</{tag}>"


def svg(panel: Panel) -> str:
    """A panel and its caption as a figure."""
    fig, axes = figure(1, 1, (6, 3.9))
    panel.draw(axes[0])
    title = html.escape(axes[0].get_title())
    drawn = io.StringIO()
    finish(fig, drawn, format="svg", metadata={"Date": None})
    drawn = drawn.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    return f"<figure>{drawn}<figcaption>{html.escape(panel.caption)}</figcaption></figure>"


def film(model: dt.DecisionTransformer, task: data.Task, index: int, cfg: Config) -> str:
    """A video of the beginning of an episode as a figure, or a paragraph on why there is none."""
    if task.env_id is None:
        return f"<p>no film of {html.escape(task.name)}: its dataset names no environment</p>"
    short = dataclasses.replace(task, max_steps=min(cfg.film_steps, task.max_steps))
    video = io.BytesIO()
    options = {"format": "webp", "quality": 60}
    try:
        reached = evaluate.film(model, short, index, task.target, evaluate.SEED, video, cfg.width, **options)
    except UserError as e:
        return f"<p>{html.escape(str(e))}</p>"
    source = f"data:image/webp;base64,{base64.b64encode(video.getvalue()).decode()}"
    caption = (
        f"{task.name}: the first {short.max_steps} steps. "
        f"Return so far {reached:.0f}; target {task.target:.0f}."
    )
    caption = html.escape(caption)
    image = f'<img src="{source}" width="{cfg.width}" alt="{caption}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def main(cfg: Config) -> None:
    """Write RUN/report.html of the first run named."""
    cli.at_least(cfg, film_steps=0, width=16)
    if not cfg.runs:
        raise UserError("name a run directory: python report.py out/student")
    environments.import_packages(cfg.imports)
    runs = [Run(path) for path in cfg.runs]
    out = runs[0].path / "report.html"
    films = []
    files.write(out, page(runs, films).encode())  # before any film: a graphics library can crash
    if cfg.film_steps:
        model, meta = dt.load(runs[0].path)
        films = [film(model, task, i, cfg) for i, task in enumerate(data.tasks(meta, runs[0].path))]
        files.write(out, page(runs, films).encode())
    n_films = sum("<img" in f for f in films)
    size = out.stat().st_size / 1e6
    print(f"{out}: {size:.1f} MB, needs no network; films of {n_films} of {len(films)} tasks")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)

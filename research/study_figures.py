"""The figures of the study's report: curricula, surgeries, retention. Used by research/study_report.py.

by_case is {case: {variant: its rows}}, the rows as research/study_rows.py reads them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import report
from report import COLOURS, style
from research.statistics import interval, iqm, pooled
from research.study_rows import (
    Row,
    curve,
    final_kls,
    iqm_kl,
    kl_ratios,
    mean_retention,
    worst_retention,
)
from research.variants import CASES, ROUND_ROBIN, VARIANTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

ByCase = dict[str, dict[str, list[Row]]]

DPI = 120
CURRICULA = (
    "fixed",
    "all",
    "uniform",
    "dro",
    "novelty p=1",
    "novelty p=2",
    "least",
    "novelty p=4",
    "novelty p=inf",
)
BESIDE_EQUAL_SHARES = ("dro", "novelty p=1", "novelty p=2", "novelty p=4")


def figure(
    n: int, columns: int, width: float = 4.2, height: float = 3.6
) -> "tuple[Figure, list[Axes]]":  # n axes
    """n axes in rows of `columns`; width and height of each, in inches."""
    rows = -(-n // columns)
    fig, axes = report.figure(rows, columns, (width * columns, height * rows))
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[n:]:
        ax.remove()
    return fig, axes[:n]


def save(fig: "Figure", path: Path) -> None:
    """Write the figure and forget it."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=DPI)
    plt.close(fig)


def set_logarithmic_ticks(axis: "Axis") -> None:
    """Plain numbers at 1, 1.5, 2, 3, 5 and 7 of each decade."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda x, _: f"{x:g}")


def share_limits(axes: "list[Axes]", direction: str) -> None:
    """Give all axes the same limits, which hold what each shows; direction: x or y."""
    limits = np.array([getattr(ax, f"get_{direction}lim")() for ax in axes])
    for ax in axes:
        getattr(ax, f"set_{direction}lim")(limits[:, 0].min(), limits[:, 1].max())


# ---- curricula ---------------------------------------------------------------------------------------------


def plot_curricula(path: Path, by_case: ByCase) -> None:
    """KL to the worst teacher over updates by case; performance profiles; final KL beside equal shares'."""
    fig, (*axes, profiles, ratios) = figure(len(by_case) + 2, 3)
    for ax, (case, by_variant) in zip(axes, by_case.items(), strict=True):
        plot_curves(ax, case, by_variant)
    for ax in axes[::3]:
        ax.set_ylabel("KL to the worst teacher, held-out (nats)")
    plot_profiles(profiles, by_case)
    plot_ratios_to_equal_shares(ratios, by_case)
    lines = {}
    for ax in axes:
        for line, name in zip(*ax.get_legend_handles_labels(), strict=True):
            lines[name] = line
    names = [name for name in CURRICULA if name in lines]
    handles = [lines[name] for name in names]
    fig.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    save(fig, path)


def plot_curves(ax: "Axes", case: str, by_variant: dict[str, list[Row]]) -> None:
    """Interquartile means over seeds, with their intervals."""
    n_seeds = set()
    for i, name in enumerate(CURRICULA):
        rows = by_variant.get(name, [])
        if not rows:
            continue
        n_seeds.add(len(rows))
        steps = rows[0]["steps_at"][1:]
        curves = np.array([curve(row) for row in rows])[:, 1:]  # (seeds, points) after the untrained student
        bands = np.array([interval(pooled, [x], 300) for x in curves.T])
        ax.plot(steps, iqm(curves.T), **style(i), label=name)
        ax.fill_between(steps, *bands.T, color=COLOURS[i % len(COLOURS)], alpha=0.12, linewidth=0)
    seeds = "/".join(map(str, sorted(n_seeds)))
    ax.set(yscale="log", xlabel="update", title=f"{case} ({seeds} seeds)")
    set_logarithmic_ticks(ax.yaxis)


def plot_profiles(ax: "Axes", by_case: ByCase) -> None:
    """Performance profiles of the curricula that have runs of every case."""
    tau = np.geomspace(0.3, 3, 200)
    for i, name in enumerate(CURRICULA):
        if not all(name in by_variant for by_variant in by_case.values()):
            continue
        shares = []
        for by_variant in by_case.values():
            divided = final_kls(by_variant[name]) / iqm_kl(by_variant[ROUND_ROBIN])
            shares.append((divided <= tau[:, None]).mean(1))
        ax.plot(tau, np.mean(shares, 0), **style(i))
    ax.set(xscale="log", xlabel="final KL / round-robin's (τ)", ylabel="share of runs at or below τ")
    ax.set_title("performance profiles, all cases")
    set_logarithmic_ticks(ax.xaxis)


def plot_ratios_to_equal_shares(ax: "Axes", by_case: ByCase) -> None:
    """What mixing by KL changes beside equal shares, for runs with the same teachers."""
    for k, by_variant in enumerate(by_case.values()):
        for j, name in enumerate(BESIDE_EQUAL_SHARES):
            ratios = kl_ratios(by_variant.get(name, []), by_variant.get("all", []))
            if len(ratios):
                x = k + (j - 1.5) / 6
                line = style(CURRICULA.index(name))
                ax.plot([x, x], interval(pooled, [ratios]), **line)
                ax.plot(x, iqm(ratios), "o", **line, markersize=4)
    ax.axhline(1, color="grey", linewidth=0.8)
    ax.set_xticks(range(len(by_case)), by_case)
    ax.set(ylabel="final KL / equal shares'", title="runs with the same teachers")


# ---- surgeries ---------------------------------------------------------------------------------------------


def without_surgery(variant: str) -> str | None:
    """The variant with the same options but no surgery; None for one that has none."""
    options = dict(VARIANTS[variant])
    if options["surgery"] == "none":
        return None
    options.pop("surgery_scope", None)
    options["surgery"] = "none"
    return next(name for name in VARIANTS if VARIANTS[name] == options)


def plot_surgery(path: Path, by_case: ByCase) -> bool:
    """Final KL divided by that of the same curriculum without surgery, for runs with the same teachers.

    In grey: the share of updates projected. Returns False where there is nothing to draw.
    """
    bases = {name: base for name in VARIANTS if (base := without_surgery(name))}
    ratios = {}  # {case: {variant: (pairs,)}}
    for case, by_variant in by_case.items():
        for name, base in bases.items():
            found = kl_ratios(by_variant.get(name, []), by_variant.get(base, []))
            if len(found):
                ratios.setdefault(case, {})[name] = found
    if not ratios:
        return False
    found = set().union(*ratios.values())
    names = [name for name in bases if name in found]
    colours = dict(zip(dict.fromkeys(bases.values()), 8 * COLOURS, strict=False))
    fig, axes = figure(len(ratios), len(ratios), 3.2, 1.4 + 0.25 * len(names))
    for ax, (case, of_case) in zip(axes, ratios.items(), strict=True):
        for name, x in of_case.items():
            y = -names.index(name)
            colour = colours[bases[name]]
            ax.plot(interval(pooled, [x]), [y, y], color=colour, linewidth=2)
            ax.plot(iqm(x), y, "o", color=colour)
            projected = 100 * np.mean([row["projected"] for row in by_case[case][name]])
            annotate_right(ax, y, f"{projected:.0f} %")
        ax.axvline(1, color="grey", linewidth=0.8)
        ax.set_yticks([-i for i in range(len(names))], names if ax is axes[0] else [], fontsize=8)
        ax.set(xlabel="final KL / that without surgery", title=case, ylim=(-len(names) + 0.5, 0.5))
    share_limits(axes, "x")
    save(fig, path)
    return True


def annotate_right(ax: "Axes", y: float, text: str) -> None:
    """Grey text at the right edge of the axes, at y."""
    coordinates = ("axes fraction", "data")
    style = {"va": "center", "fontsize": 7, "color": "grey"}
    ax.annotate(text, (1.0, y), (2, 0), xycoords=coordinates, textcoords="offset points", **style)


# ---- retention ---------------------------------------------------------------------------------------------


def plot_retention(path: Path, by_size: dict[float, ByCase]) -> bool:
    """Retention against compression, of the cases and variants that have runs of several sizes.

    by_size: {compression: by_case}. Returns False where there is nothing to draw.
    """
    points = {}  # {(case, variant): {compression: rows}}
    for times, by_case in by_size.items():
        for case, by_variant in by_case.items():
            for name, rows in by_variant.items():
                points.setdefault((case, name), {})[times] = rows
    points = {pair: of_pair for pair, of_pair in points.items() if len(of_pair) > 1}
    if not points:
        return False
    cases_found, names_found = zip(*points, strict=True)
    cases = [case for case in CASES if case in cases_found]
    names = [name for name in VARIANTS if name in names_found]
    all_times = sorted(set().union(*points.values()))
    fig, axes = figure(2 * len(cases), 2)
    for row, case in enumerate(cases):
        left, right = axes[2 * row : 2 * row + 2]
        for ax, retention in ((left, mean_retention), (right, worst_retention)):
            for i, name in enumerate(names):
                if (case, name) in points:
                    shift = 1.02 ** (i - len(names) / 2)  # so that intervals stand side by side
                    plot_sizes(ax, points[case, name], retention, shift, label=name, **style(i))
            ax.axhline(1, color="grey", linewidth=0.8)
            ax.set(xscale="log", xlabel="compression: teachers' parameters / student's")
            ax.set_xticks(all_times, [f"{times:g}" for times in all_times])
            ax.minorticks_off()
        left.set(title=f"{case}: mean over tasks", ylabel="retention: student's score / teacher's")
        right.set_title(f"{case}: worst task")
        left.legend(frameon=False, fontsize=8)
    share_limits(axes, "y")
    save(fig, path)
    return True


def plot_sizes(
    ax: "Axes",
    of_pair: dict[float, list[Row]],
    retention: Callable[[list[Row]], np.ndarray],
    shift: float,
    label: str,
    **line: str,
) -> None:
    """Retention of a variant's students at each compression, with intervals."""
    values = [retention(rows) for rows in of_pair.values()]
    middle = np.array([iqm(x) for x in values])
    low, high = np.array([interval(pooled, [x]) for x in values]).T
    n_seeds = "/".join(str(len(x)) for x in values)
    x = np.array(list(of_pair)) * shift
    bars = [middle - low, high - middle]
    label = f"{label} ({n_seeds} seeds)"
    ax.errorbar(x, middle, bars, marker="o", markersize=4, capsize=2, label=label, **line)

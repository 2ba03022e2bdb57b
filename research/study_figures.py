"""Figures of the study, and what those of other scripts share. Used by research/*_report.py."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

DPI = 120


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

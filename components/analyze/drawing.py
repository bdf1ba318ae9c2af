"""Figures that can be read 360 px wide, in colours that colour-blind people tell apart (Okabe and Ito's)."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from components.analyze.estimates import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
WIDTH_IN, DPI = 3.6, 200  # 360 px at 100 to the inch, drawn at twice that


def new_figure(height_in: float = 2.8, *, rows: int = 1, columns: int = 1) -> "tuple[Figure, np.ndarray]":
    """A figure and its axes [rows, columns], drawn without any window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        one.tick_params(labelsize=8)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def label(axes: "Axes", *, x: str = "", y: str = "", title: str = "") -> None:
    """Words at the axes, at a size that can be read."""
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.set_title(title, fontsize=9)


def legend(figure: "Figure", axes: "Axes", *, columns: int = 2) -> None:
    """A legend below the axes."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


@dataclass(frozen=True)
class Line:
    """How a curve is drawn."""

    name: str
    number: int  # picks its mark, and its colour where none is given
    colour: str | None = None


def curve(axes: "Axes", x: Sequence[float], points: Sequence[Estimate], line: Line) -> None:
    """A line through estimates with their intervals."""
    colour = line.colour or COLOURS[line.number % len(COLOURS)]
    mark = MARKS[line.number % len(MARKS)]
    axes.plot(x, [one.value for one in points], mark, ls="-", ms=4, lw=1.5, color=colour, label=line.name)
    axes.fill_between(x, [one.low for one in points], [one.high for one in points], color=colour, alpha=0.15, lw=0)


def shades(number: int) -> list[str]:
    """``number`` colours in an order that the eye sees as one, dark to light."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](place)) for place in np.linspace(0.0, 0.85, number)]


def png(figure: "Figure") -> bytes:
    """The figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()

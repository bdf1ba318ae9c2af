"""Plots as SVG that is part of the page, so that its colours follow the reader's light or dark.

matplotlib draws with stand-in colours; they become the page's own CSS variables afterwards.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from components.report.read import Curve, Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, SOFT, LINE, FIRST, SECOND = "#000001", "#000002", "#000003", "#000004", "#000005"
VARIABLES = {INK: "--ink", SOFT: "--soft", LINE: "--line", FIRST: "--first", SECOND: "--second"}
SIZE_IN = (4.6, 3.0)  # 331 pt wide: on a phone's 358 px its 9 pt letters are 9.7 px
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,  # a name with a dollar sign is a name
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def draw_curve(curve: Curve, tasks: Sequence[Task], *, metric: str) -> Markup:
    """Mean and spread of a metric against tokens, and what the rules that read it came to."""
    tokens = [row["num_tokens"] for row in curve.rows]
    means = [row["mean"] for row in curve.rows]
    chosen = [(task.name, task.mine["mean_tokens"], task.mine["value"]) for task in tasks if task.column == curve.name]
    chosen = [(name, at, value) for name, at, value in chosen if value is not None]

    def draw(axes: "Axes") -> None:
        axes.fill_between(
            tokens,
            [row["p5"] for row in curve.rows],
            [row["p95"] for row in curve.rows],
            color=FIRST,
            alpha=0.16,
            linewidth=0,
        )
        axes.plot(tokens, [row["median"] for row in curve.rows], ":", color=FIRST, linewidth=1.2)
        axes.plot(tokens, means, "o-", color=FIRST, markersize=3.5, linewidth=1.6)
        for _, at, value in chosen:
            axes.plot(at, value, "D", color=SECOND, markersize=6)
        axes.set_xlabel("tokens an image")
        axes.set_ylabel(metric)
        axes.set_xticks(tokens if len(tokens) <= 9 else tokens[:: len(tokens) // 8 + 1])

    said = ", ".join(f"{mean:.3g} at {at}" for at, mean in zip(tokens, means, strict=True))
    marks = "".join(f"; {name} comes to {value:.3g} at {at:.1f} tokens in the mean" for name, at, value in chosen)
    return _svg(draw, f"Mean {metric} against tokens an image: {said}{marks}.")


def draw_histogram(histogram: Mapping[int, int], *, mean: float) -> Markup:
    """How many images got each count, and the mean count."""
    total = max(1, sum(histogram.values()))
    places = {tokens: place for place, tokens in enumerate(histogram)}
    budgets = list(histogram)
    spacing = (budgets[-1] - budgets[0]) / max(1, len(budgets) - 1)
    even = len(budgets) > 1 and all(b - a == spacing for a, b in zip(budgets, budgets[1:], strict=False))

    def draw(axes: "Axes") -> None:
        bars = axes.bar(list(places.values()), list(histogram.values()), color=FIRST, width=0.72)
        axes.bar_label(bars, [f"{images / total:.0%}" for images in histogram.values()], fontsize=8, color=SOFT)
        if even:
            axes.axvline((mean - budgets[0]) / spacing, color=SECOND, linewidth=1.6, label=f"mean {mean:.1f}")
            axes.legend()
        axes.set_xticks(list(places.values()), [str(tokens) for tokens in histogram])
        axes.set_xlabel("tokens an image")
        axes.set_ylabel("images")
        axes.margins(y=0.16)

    said = ", ".join(f"{images} at {tokens}" for tokens, images in histogram.items())
    return _svg(draw, f"Images by their number of tokens: {said}; the mean is {mean:.1f}.")


def draw_bars(values: Mapping[str, float], *, unit: str) -> Markup:
    """Named figures as horizontal bars on a logarithmic scale."""
    names = list(values)[::-1]

    def draw(axes: "Axes") -> None:
        bars = axes.barh(names, [values[name] for name in names], color=FIRST, height=0.62)
        axes.bar_label(bars, [f" {values[name]:,.0f}" for name in names], fontsize=8, color=SOFT)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_minor_formatter("")
        axes.set_xlabel(f"{unit}, logarithmic")
        axes.grid(visible=False)
        axes.margins(x=0.2)

    said = ", ".join(f"{name} {value:,.0f}" for name, value in values.items())
    return _svg(draw, f"{unit}: {said}.", height_in=0.9 + 0.32 * len(names))


def _svg(draw: "Callable[[Axes], None]", alt: str, height_in: float = SIZE_IN[1]) -> Markup:
    """The figure that ``draw`` fills, as an <svg> with ``alt`` as its name for who can't see it."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": alt}):  # ids are unique on the page, and the same each time
        figure = Figure(figsize=(SIZE_IN[0], height_in), layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)  # as wide as its place
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # it would be the whole page's
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same in every figure, and nothing refers to them
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    named = text.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ', 1)
    return Markup(named)  # matplotlib has escaped its text

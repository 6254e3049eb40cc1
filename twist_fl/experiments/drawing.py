"""Parts of the experiments' figures, in the style of `plots.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

Looks = Mapping[str, Mapping[str, Any]]
"""By label, what `Axes.plot` is given."""


def figure_of(width: float, height: float, looks: Looks | None = None, columns: int = 2) -> Figure:
    """An empty figure, in inches, with a legend above where the axes go."""
    figure = Figure(figsize=(width, height), layout="constrained")
    if looks:
        handles = [Line2D([], [], linewidth=1.6, markersize=5, **look) for look in looks.values()]
        figure.legend(handles, list(map(printed, looks)), loc="outside upper left", ncols=columns, frameon=False)
    return figure


def printed(text: str) -> str:
    """`SE_6/12` with its index below the line."""
    head, _, index = text.partition("_")
    return f"{head}$_{{{index}}}$" if index else text


def value_bars(axes: Axes, values: Mapping[str, float], colors: Mapping[str, str], decimals: int) -> None:
    """A bar from zero per name, its value above it."""
    bars = axes.bar(list(values), list(values.values()), color=[colors[name] for name in values], width=0.65)
    axes.bar_label(bars, [f"{value:,.{decimals}f}" for value in values.values()], padding=2)
    axes.margins(y=0.12)
    axes.grid(visible=False, axis="x")
    axes.set_axisbelow(True)

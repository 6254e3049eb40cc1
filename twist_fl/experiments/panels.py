"""Figures of several panels below one legend, in the style of `plots.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from twist_fl.plots import COLORS, MARKERS

WIDTH = 7.0
"""Inches: the text of a page."""


def looks(count: int) -> list[dict[str, Any]]:
    return [{"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]} for i in range(count)]


def panels(labels: Sequence[str], names: Sequence[str], *, share_y: bool, height: float) -> tuple[Figure, list[Axes]]:
    """Panels side by side, each named, with the legend of `labels` (as `looks` shows them) above them."""
    columns = 3
    figure = Figure(figsize=(WIDTH, height + 0.22 * -(-len(labels) // columns)), layout="constrained")
    handles = [Line2D([], [], **look, linewidth=1.6, markersize=5) for look in looks(len(labels))]
    figure.legend(handles, list(labels), loc="outside upper left", ncols=columns, frameon=False)
    found: list[Axes] = list(figure.subplots(1, len(names), sharey=share_y, squeeze=False).flatten())
    for axes, name in zip(found, names, strict=True):
        axes.set_title(name, fontsize=10)
    return figure, found

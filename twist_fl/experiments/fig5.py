"""Figures 5, 9 and 10: perplexity of tickets of one size, by the size that the workers held in training."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from twist_fl.blueprint.division import Setting
from twist_fl.experiments.experiment import Data, Experiment
from twist_fl.experiments.lab import Lab, Task
from twist_fl.experiments.runs import twist
from twist_fl.experiments.shared import (
    PAPER,
    SE_6,
    about,
    caption,
    draws,
    label,
    of_perplexity,
    seeds,
    ticket_rows,
    tickets,
)
from twist_fl.report.cells import Cells
from twist_fl.report.compare import MISSING
from twist_fl.report.plots import LOG_FROM, PERPLEXITY, figure_of, log_ticks
from twist_fl.system.units import perplexity_text

SIZES = (4, 6, 8, 10)
LABELS = tuple(map(label, SIZES))


def tasks(setting: Setting, lab: Lab) -> list[Task]:
    runs = [twist(setting, size) for size in SIZES]
    return [*runs, *(tickets(lab, run, setting) for run in runs)]


def collect(setting: Setting, lab: Lab) -> Data:
    """`mean[trained][evaluated]`: perplexity."""
    mean = {}
    for trained in SIZES:
        rows = ticket_rows(lab, twist(setting, trained), setting)
        mean[label(trained)] = {size: rows[size]["mean"] for size in LABELS}
    return {
        "about": about(lab),
        "setting": setting,
        "mean": mean,
        "paper": _paper_cells(setting),
        "paper_range": PAPER.get(f"robustness_{setting}", {}).get("train 4/12", {}).get("eval range", []),
    }


def _paper_cells(setting: Setting) -> dict[str, dict[str, float]]:
    """The cells that the paper prints, `[trained][evaluated]`: those that are in its Table 1, and two in its text."""
    table = PAPER["table1_perplexity"]
    matched, mid = (dict(zip(table["kappa"], table["rows"][setting][row], strict=True)) for row in ("TwIST SE", SE_6))
    cells: dict[str, dict[str, float]] = {size: {size: matched[size]} for size in LABELS if size in matched}
    cells[label(6)] |= {size: mid[size] for size in LABELS if size in mid}
    said = PAPER.get(f"robustness_{setting}", {}).get("train 10/12", {})
    return cells | {label(10): {text.removeprefix("eval "): value for text, value in said.items()}}


def tables(data: Data) -> dict[str, Cells]:
    what = f"mean of tickets, setting {data['setting']}, by size in training and in evaluation"
    return {
        caption(of_perplexity(what), data): _cells(data["mean"]),
        f"The same in the paper, setting {data['setting']}, where it is printed": _cells(data["paper"]),
    }


def _cells(mean: Mapping[str, Mapping[str, float]]) -> Cells:
    lines = [
        [
            evaluated,
            *(
                perplexity_text(mean[trained][evaluated]) if evaluated in mean[trained] else MISSING
                for trained in LABELS
            ),
        ]
        for evaluated in LABELS[::-1]
    ]
    return [["evaluated at", *(f"trained at {trained}" for trained in LABELS)], *lines]


def notes(data: Data) -> list[str]:
    worst = {trained: max(row.values()) for trained, row in data["mean"].items()}
    best = min(worst, key=lambda trained: worst[trained])
    found = [
        seeds(data),
        f"The worst size's perplexity is lowest when trained at {best}: {perplexity_text(worst[best])}. "
        "The paper finds training at 6/12 the most even.",
    ]
    if data["paper_range"]:
        row = data["mean"][label(4)].values()
        found.append(
            f"Trained at {label(4)}, over all sizes: {_range(data['paper_range'])} in the paper's text, "
            f"ours {_range(row)}."
        )
    return found


def _range(values: Collection[float]) -> str:
    return f"{perplexity_text(min(values))} to {perplexity_text(max(values))}"


def draw(data: Data) -> Figure:
    """Trained at: to the right; evaluated at: upwards. The brighter (yellow), the lower the perplexity."""
    figure = figure_of(3.9)
    axes = figure.subplots()
    mean = data["mean"]
    grid = np.array([[mean[trained][evaluated] for trained in LABELS] for evaluated in LABELS], dtype=float)
    finite = grid[np.isfinite(grid)]
    colors = colormaps["viridis_r"]
    low, high = float(finite.min()), max(float(finite.max()), 1.001 * float(finite.min()))
    norm = LogNorm(low, high)
    image = axes.imshow(grid, origin="lower", cmap=colors, norm=norm, aspect="auto")
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            axes.text(x, y, perplexity_text(value), ha="center", va="center", color=_readable(colors(norm(value))))
    axes.grid(visible=False)
    axes.set_xticks(range(len(LABELS)), LABELS)
    axes.set_yticks(range(len(LABELS)), LABELS)
    axes.set_xlabel(f"blocks in training ({data['setting']})")
    axes.set_ylabel("blocks in evaluation")
    ticks = log_ticks(low, high) if high > LOG_FROM * low else MaxNLocator(5).tick_values(low, high)
    ticks = [tick for tick in ticks if low <= tick <= high]
    bar = figure.colorbar(image, ax=axes, ticks=ticks)
    bar.set_ticks(ticks, labels=[f"{tick:,.10g}" for tick in ticks])
    bar.set_label(f"mean {PERPLEXITY}")
    bar.ax.minorticks_off()
    return figure


def reading(data: Data) -> str:
    return f"Yellow is best: perplexity is lowest there. A cell is the mean over {draws(data)}"


def _readable(color: Any) -> str:
    """Black or white, whichever has more contrast by WCAG's relative luminance."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3])
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "white"


def _figure(number: int, setting: Setting) -> Experiment:
    name = f"fig{number}"
    title = f"Figure {number}: tickets of sizes not trained for, {setting}"
    return Experiment(
        name, title, partial(tasks, setting), partial(collect, setting), tables, {name: draw}, reading, notes
    )


FIG5, FIG9, FIG10 = _figure(5, "attn"), _figure(9, "both"), _figure(10, "ffn")

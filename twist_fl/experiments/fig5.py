"""Figures 5, 9 and 10: perplexity of tickets of one size, by the size that the workers held in training."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from twist_fl.blueprint import Setting
from twist_fl.compare import perplexity_text
from twist_fl.experiments.drawing import figure_of
from twist_fl.experiments.experiment import Cells, Data, Experiment
from twist_fl.experiments.lab import Lab, Task
from twist_fl.experiments.runs import twist
from twist_fl.experiments.shared import PAPER, about, caption, label, seeds, ticket_rows, tickets
from twist_fl.plots import log_ticks

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
        "paper": PAPER.get(f"robustness_{setting}", {}),
    }


def tables(data: Data) -> dict[str, Cells]:
    mean = data["mean"]
    header = ["evaluated at", *(f"trained at {trained}" for trained in LABELS)]
    lines = [
        [evaluated, *(perplexity_text(mean[trained][evaluated]) for trained in LABELS)] for evaluated in LABELS[::-1]
    ]
    text = f"Mean test perplexity of random tickets, setting {data['setting']}, by size in training and in evaluation"
    return {caption(text, data): [header, *lines]}


def notes(data: Data) -> list[str]:
    worst = {trained: max(row.values()) for trained, row in data["mean"].items()}
    best = min(worst, key=lambda trained: worst[trained])
    found = [
        seeds(data),
        f"Worst perplexity over the sizes is least when trained at {best}: {perplexity_text(worst[best])}.",
    ]
    known = [
        f"{_said(trained)} {_said(evaluated)}: {_numbers(value)} ({_ours(data, trained, evaluated)})"
        for trained, row in data["paper"].items()
        for evaluated, value in row.items()
    ]
    if not known:
        return [*found, "The paper prints no numbers of this figure."]
    return [*found, f"The paper's text: {'; '.join(known)}."]


def _said(words: str) -> str:
    """ "train 10/12" and "eval 4/12" as a reader says it."""
    verb, _, what = words.partition(" ")
    if what == "range":
        return "evaluated at all sizes"
    return f"{'trained' if verb == 'train' else 'evaluated'} at {what}"


def _numbers(value: float | list[float]) -> str:
    return " to ".join(map(perplexity_text, value)) if isinstance(value, list) else perplexity_text(value)


def _ours(data: Data, trained: str, evaluated: str) -> str:
    row = data["mean"][trained.removeprefix("train ")]
    size = evaluated.removeprefix("eval ")
    return f"ours {_numbers([min(row.values()), max(row.values())] if size == 'range' else row[size])}"


def draw(data: Data) -> Figure:
    """Trained at: to the right; evaluated at: upwards. The brighter (yellow), the lower the perplexity."""
    figure = figure_of(5.0, 4.2)
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
    ticks = log_ticks(low, high)
    bar = figure.colorbar(image, ax=axes, ticks=ticks, format="%g")
    bar.set_label("mean test perplexity")
    bar.ax.minorticks_off()
    return figure


def _readable(color: Any) -> str:
    red, green, blue, _ = color
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def _figure(number: int, setting: Setting) -> Experiment:
    name = f"fig{number}"
    title = f"Figure {number}: tickets of sizes not trained for, {setting}"
    return Experiment(name, title, partial(tasks, setting), partial(collect, setting), tables, {name: draw}, notes)


FIG5, FIG9, FIG10 = _figure(5, "attn"), _figure(9, "both"), _figure(10, "ffn")

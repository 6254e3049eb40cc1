"""Figures 4, 7 and 8: how the test loss of random tickets is distributed, TwIST trained at 6/12 against DDP."""

from __future__ import annotations

from functools import partial
from math import isfinite, log
from statistics import fmean, median, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from twist_fl.blueprint import Setting
from twist_fl.experiments.drawing import figure_of
from twist_fl.experiments.experiment import Cells, Data, Experiment
from twist_fl.experiments.lab import Lab, Task
from twist_fl.experiments.runs import DDP, twist
from twist_fl.experiments.shared import PAPER, SE_6, about, caption, label, seeds, ticket_rows, tickets
from twist_fl.plots import COLORS, MARKERS

SIZES = (4, 6, 8, 10)
TRAINED = 6
LOOKS: dict[str, dict[str, Any]] = {
    name: {"color": COLORS[i], "marker": MARKERS[i]} for i, name in enumerate((SE_6, "DDP"))
}


def _runs(setting: Setting) -> dict[str, Task]:
    return {SE_6: twist(setting, TRAINED), "DDP": DDP}


def tasks(setting: Setting, lab: Lab) -> list[Task]:
    runs = _runs(setting).values()
    return [*runs, *(tickets(lab, run, setting) for run in runs)]


def collect(setting: Setting, lab: Lab) -> Data:
    """The natural logarithms of the tickets' perplexities, nats per token."""
    losses = {}
    for name, run in _runs(setting).items():
        rows = ticket_rows(lab, run, setting)
        losses[name] = {label(size): [log(value) for value in rows[label(size)]["perplexities"]] for size in SIZES}
    return {
        "about": about(lab),
        "setting": setting,
        "losses": losses,
        "paper": PAPER["stability_loss"].get(setting, {}),
    }


def tables(data: Data) -> dict[str, Cells]:
    lines = [
        [size, name, *(f"{value:.3f}" for value in _summary(data["losses"][name][size]))]
        for size in map(label, SIZES)
        for name in LOOKS
    ]
    text = f"Test loss of random tickets in nats per token, setting {data['setting']}"
    header = ["blocks", "run", "median", "mean", "standard deviation", "lowest", "highest"]
    return {caption(text, data): [header, *lines]}


def _summary(losses: list[float]) -> tuple[float, ...]:
    spread = stdev(losses) if len(losses) > 1 else 0.0
    return median(losses), fmean(losses), spread, min(losses), max(losses)


def notes(data: Data) -> list[str]:
    least = label(min(SIZES))
    spreads = {name: _summary(data["losses"][name][least])[2] for name in LOOKS}
    found = [
        seeds(data),
        f"Standard deviation at {least}: {', '.join(f'{name} {spread:.3f}' for name, spread in spreads.items())}.",
    ]
    said = "; ".join(f"{name} {text}" for name, text in data["paper"].items())
    return [*found, f"The paper's text: {said}."] if said else [*found, "The paper prints no numbers of this figure."]


def draw(data: Data) -> Figure:
    """At each size, a box with the extremes as whiskers and a dot per ticket, for either run."""
    figure = figure_of(5.0, 3.8, {name: {**look, "linestyle": "none"} for name, look in LOOKS.items()})
    axes = figure.subplots()
    for i, (name, look) in enumerate(LOOKS.items()):
        for place, size in enumerate(map(label, SIZES)):
            _box(axes, [v for v in data["losses"][name][size] if isfinite(v)], place + 0.36 * (i - 0.5), look)
    axes.set_xticks(range(len(SIZES)), list(map(label, SIZES)))
    axes.set_xlim(-0.5, len(SIZES) - 0.5)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel(f"blocks in a layer of the ticket ({data['setting']})")
    axes.set_ylabel("test loss (nats per token)")
    return figure


def _box(axes: Axes, values: list[float], place: float, look: dict[str, Any]) -> None:
    if not values:
        return
    line = {"color": look["color"], "linewidth": 1.2}
    axes.boxplot(
        values, positions=[place], widths=0.3, whis=(0, 100), showfliers=False, manage_ticks=False,
        boxprops=line, whiskerprops=line, capprops=line, medianprops=line | {"linewidth": 2.2},
    )  # fmt: skip
    spread = [place + 0.2 * (0.618 * draw % 1 - 0.5) for draw in range(len(values))]
    axes.plot(spread, values, **look, linestyle="none", markersize=3.5, alpha=0.55, markeredgewidth=0)


def _figure(number: int, setting: Setting) -> Experiment:
    name = f"fig{number}"
    title = f"Figure {number}: test loss of random tickets, {setting}"
    return Experiment(name, title, partial(tasks, setting), partial(collect, setting), tables, {name: draw}, notes)


FIG4, FIG7, FIG8 = _figure(4, "attn"), _figure(7, "both"), _figure(8, "ffn")

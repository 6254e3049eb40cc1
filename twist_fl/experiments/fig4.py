"""Figures 4, 7 and 8: how the test loss of random tickets is distributed, TwIST trained at 6/12 against DDP."""

from __future__ import annotations

from functools import partial
from math import isfinite, log
from statistics import fmean, median, stdev

from matplotlib.figure import Figure

from twist_fl.blueprint.division import Setting
from twist_fl.experiments.experiment import Data, Experiment
from twist_fl.experiments.lab import Lab, Task
from twist_fl.experiments.runs import DDP, twist
from twist_fl.experiments.shared import (
    PAPER,
    SE_6,
    about,
    caption,
    draws,
    label,
    printed,
    seeds,
    ticket_rows,
    tickets,
)
from twist_fl.report.cells import Cells
from twist_fl.report.glossary import LOWER
from twist_fl.report.plots import NO_LINE, box, figure_of, looks_of

SIZES = (4, 6, 8, 10)
TRAINED = 6
LOOKS = {name: look | NO_LINE for name, look in looks_of((SE_6, "DDP")).items()}


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
        [size, name, *_texts(*_summary(data["losses"][name][size]))] for size in map(label, SIZES) for name in LOOKS
    ]
    text = f"Test loss ({LOWER}) of random tickets in nats per token, setting {data['setting']}"
    header = ["blocks kept", "run", "median", "mean ± std", "lowest", "highest"]
    return {caption(text, data): [header, *lines]}


def _texts(middle: float, mean: float, spread: float, least: float, most: float) -> list[str]:
    return [f"{middle:.3f}", f"{mean:.3f} ± {spread:.3f}", f"{least:.3f}", f"{most:.3f}"]


def _summary(losses: list[float]) -> tuple[float, float, float, float, float]:
    """Median, mean, standard deviation, lowest, highest."""
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
    figure = figure_of(3.6, {printed(name): look for name, look in LOOKS.items()})
    axes = figure.subplots()
    for i, (name, look) in enumerate(LOOKS.items()):
        for place, size in enumerate(map(label, SIZES)):
            losses = [loss for loss in data["losses"][name][size] if isfinite(loss)]
            box(axes, losses, place + 0.36 * (i - 0.5), 0.3, look)
    axes.set_xticks(range(len(SIZES)), list(map(label, SIZES)))
    axes.set_xlim(-0.5, len(SIZES) - 0.5)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel(f"blocks in a layer of the ticket ({data['setting']})")
    axes.set_ylabel(f"test loss (nats per token,\n{LOWER})")
    return figure


def reading(data: Data) -> str:
    return (
        f"Test loss ({LOWER}). "
        f"A dot is a ticket; boxes reach from the first to the third quartile, with the median, whiskers to the "
        f"extremes. {draws(data)}"
    )


def _figure(number: int, setting: Setting) -> Experiment:
    name = f"fig{number}"
    title = f"Figure {number}: test loss of random tickets, {setting}"
    return Experiment(
        name, title, partial(tasks, setting), partial(collect, setting), tables, {name: draw}, reading, notes
    )


FIG4, FIG7, FIG8 = _figure(4, "attn"), _figure(7, "both"), _figure(8, "ffn")

"""What the paper's experiments share: the paper's numbers, one measurement of a run's tickets, and words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from matplotlib.figure import Figure

from twist_fl.blueprint.division import Setting
from twist_fl.experiments.lab import Lab, Task, measure
from twist_fl.report.glossary import LOWER
from twist_fl.report.plots import PERPLEXITY, figure_of, looks_of, scale_perplexity
from twist_fl.system.errors import ConfigError
from twist_fl.system.units import size_label

PAPER: Mapping[str, Any] = json.loads(files("twist_fl.experiments").joinpath("paper.json").read_text())
"""Numbers printed in arXiv 2511.03983."""
BLOCKS = 12
"""Heads, and FFN blocks, of a layer: what the paper's sizes are counted of."""
TICKET_SIZES = (10, 8, 6, 4, 3)
"""Every size that some table or figure evaluates: a run's tickets are measured once for all."""
SE_6 = "TwIST SE_6/12"


def printed(text: str) -> str:
    """`SE_6/12` with its index below the line, for a figure."""
    head, _, index = text.partition("_")
    return f"{head}$_{{{index}}}$" if index else text


def label(size: int) -> str:
    return f"{size}/{BLOCKS}"


def about(lab: Lab) -> dict[str, Any]:
    """What the captions and notes say of the lab."""
    return {"scale": lab.scale.name, "seed": lab.base.seed, "tickets": lab.scale.tickets}


def caption(text: str, data: Mapping[str, Any]) -> str:
    """`text`, with the scale's name if the numbers are not of the paper's."""
    scale = data["about"]["scale"]
    return text if scale == "paper" else f"{text} (scale {scale})"


def of_perplexity(text: str) -> str:
    """A caption of `text` about perplexities."""
    return f"Test perplexity ({LOWER}), {text}"


def seeds(data: Mapping[str, Any]) -> str:
    about = data["about"]
    return (
        f"One training run each, with seed {about['seed']}; {about['tickets']} random tickets a size, drawn with the "
        "same seed: every run is asked for the same blocks."
    )


def draws(data: Mapping[str, Any]) -> str:
    return f"{data['about']['tickets']} random tickets a size; seed {data['about']['seed']}."


def tickets(lab: Lab, run: Task, setting: Setting) -> Task:
    return measure("tickets", run, setting=setting, sizes=list(TICKET_SIZES), draws=lab.scale.tickets)


def ticket_rows(lab: Lab, run: Task, setting: Setting) -> dict[str, dict[str, Any]]:
    """`evaluate.Tickets.summary` by size, "4/12". Raises ConfigError if a layer of the run has not 12 blocks."""
    rows = lab.result(tickets(lab, run, setting))["tickets"]
    if wrong := {row["of"] for row in rows} - {BLOCKS}:
        raise ConfigError(
            f"the paper's sizes are of {BLOCKS} blocks a layer, {run.name} has {wrong.pop()}: train with 12 heads "
            "(model.n_head) and as many FFN blocks"
        )
    return {size_label(row): row for row in rows}


def by_size(lines: Mapping[str, Sequence[tuple[float, float | None]]], tickets: Sequence[Mapping[str, Any]]) -> Figure:
    """Perplexity against the blocks kept: of each line (value, deviation or None), the full model and all `tickets`."""
    looks = looks_of(lines)
    figure = figure_of(3.2, looks)
    axes = figure.subplots()
    kept = [tickets[0]["of"], *(ticket["size"] for ticket in tickets)]
    for name, line in lines.items():
        values, deviations = zip(*line, strict=True)
        bars = None if None in deviations else deviations
        axes.errorbar(kept, values, yerr=bars, **looks[name], capsize=2, linewidth=1.4, markersize=5)
    axes.set_xticks(kept)
    axes.set_xlabel(f"blocks kept of {kept[0]}")
    axes.set_ylabel(PERPLEXITY)
    scale_perplexity(axes, [value for line in lines.values() for value, _ in line])
    return figure

"""Exploration and exploitation: how often subnets are drawn, how many blocks are common, how large a subnet is."""

from __future__ import annotations

from textwrap import fill

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from twist_fl.experiments import runs
from twist_fl.experiments.experiment import Data, Experiment
from twist_fl.experiments.lab import Lab, Task
from twist_fl.experiments.shared import of_perplexity
from twist_fl.report.cells import Cells
from twist_fl.report.glossary import LOWER
from twist_fl.report.plots import PERPLEXITY, figure_of, looks_of, scale_perplexity
from twist_fl.system.units import perplexity_text, size_label

INTERVALS = (5, 15, 50)
"""Batches between two draws; of the tiny scale's 1,500 batches all are divisors, 45 is not."""
COMMON = (0, 1, 2, 4)
"""At 6 of 12 blocks with four workers, 4 is the most that still covers all blocks."""
SIZES = (8, 6, 4, 3)
NAMES = {"interval": "batches between two draws", "common": "common blocks |C|, of 6", "size": "blocks a worker holds"}
DRAWN = (6, 3)
"""Ticket sizes in the figure."""


def swept(lab: Lab) -> dict[str, dict[int, Task]]:
    """By what is swept, and its value."""
    base = runs.twist("both", 6)
    return {
        "interval": {interval: _interval(lab, interval) for interval in INTERVALS},
        "common": {
            count: runs.variation(f"common-{count}", f"blueprint.common={count}") if count else base for count in COMMON
        },
        "size": {size: runs.twist("both", size) for size in SIZES},
    }


def _interval(lab: Lab, interval: int) -> Task:
    """The scale's budget in intervals of another length, to the nearest whole number; epochs stay as they are."""
    train = lab.base.train
    if interval == train.interval:
        return runs.twist("both", 6)
    overrides = [f"train.interval={interval}"]
    if train.rounds:
        overrides.append(f"train.rounds={max(1, round(train.rounds * train.interval / interval))}")
    return runs.variation(f"interval-{interval}", *overrides)


def tasks(lab: Lab) -> list[Task]:
    found = {task.name: task for values in swept(lab).values() for task in values.values()}
    return list(found.values())


def collect(lab: Lab) -> Data:
    return {"swept": {name: [_row(lab, value, task) for value, task in tasks.items()]
                      for name, tasks in swept(lab).items()}}  # fmt: skip


def _row(lab: Lab, value: int, task: Task) -> Data:
    results = lab.result(task)
    train = results["config"]["train"]
    keep = ("size", "of", "mean", "std", "min", "max")
    return {
        "value": value,
        "batches": results["rounds"] * train["interval"] if train["rounds"] else None,
        "epochs": None if train["rounds"] else train["epochs"],
        "rounds": results["rounds"],
        "full": results["full"],
        "tickets": [{key: ticket[key] for key in keep} for ticket in results["tickets"]],
        "draws": results["config"]["eval"]["tickets"],
        "seed": results["config"]["seed"],
    }


def tables(data: Data) -> dict[str, Cells]:
    """One table a swept value."""
    found = {}
    for name, rows in data["swept"].items():
        sizes = [size_label(ticket) for ticket in rows[0]["tickets"]]
        header = [NAMES[name], "full model", *sizes]
        cells = [
            [f"{row['value']} ({row['rounds']:,} rounds)", perplexity_text(row["full"]), *_tickets(row)] for row in rows
        ]
        found[of_perplexity(f"by {NAMES[name]}")] = [header, *cells]
    return found


def _tickets(row: Data) -> list[str]:
    return [f"{perplexity_text(ticket['mean'])} ± {perplexity_text(ticket['std'])}" for ticket in row["tickets"]]


def _lines(rows: list[Data]) -> dict[str, list[tuple[int, float]]]:
    """(swept value, perplexity) of the full model and of the tickets in the figure."""
    found = {"full model": [(row["value"], row["full"]) for row in rows]}
    for i, ticket in enumerate(rows[0]["tickets"]):
        if ticket["size"] in DRAWN:
            found[f"{size_label(ticket)} tickets"] = [(row["value"], row["tickets"][i]["mean"]) for row in rows]
    return found


def draw(data: Data) -> Figure:
    """A panel for each swept value: the full model and the mean of random tickets, on one perplexity axis."""
    looks = looks_of(_lines(data["swept"]["interval"]))
    figure = figure_of(3.0, looks)
    axes = figure.subplots(1, len(data["swept"]), sharey=True)
    every: list[float] = []
    for panel, (name, rows) in zip(axes, data["swept"].items(), strict=True):
        for line, look in zip(_lines(rows).values(), looks.values(), strict=True):
            panel.plot(*zip(*line, strict=True), **look, linewidth=1.4, markersize=5)
            every += [perplexity for _, perplexity in line]
        if name == "interval":
            panel.set_xscale("log")
            panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xticks([row["value"] for row in rows], [str(row["value"]) for row in rows])
        panel.set_xlabel(fill(NAMES[name], 16))
    axes[0].set_ylabel(PERPLEXITY)
    scale_perplexity(axes[0], every)
    return figure


def reading(data: Data) -> str:
    first = data["swept"]["interval"][0]
    return (
        f"Perplexity: {LOWER}. A point is one training run; tickets are means over {first['draws']} random ones. Seed "
        f"{first['seed']}."
    )


def notes(data: Data) -> list[str]:
    intervals = data["swept"]["interval"]
    first, values = intervals[0], ", ".join(str(row["value"]) for row in intervals)
    budget = ", ".join(f"{row['batches']:,}" for row in intervals) + " batches a worker"
    found = [
        f"Each ticket's figure is a mean over {first['draws']} random ones with their deviation; runs and tickets have "
        f"seed {first['seed']}. All are `both` 6/12 but for the swept value.",
        "Common blocks are ids 0 to |C| - 1, and a ticket holds them too (one smaller than |C| holds only of them).",
        f"The budget at intervals of {values} is {budget if first['batches'] else str(first['epochs']) + ' epochs'}.",
    ]
    for name, rows in data["swept"].items():
        best = [
            f"{line} at {value} ({perplexity_text(perplexity)})"
            for line, points in _lines(rows).items()
            for value, perplexity in [min(points, key=lambda point: point[1])]
        ]
        found.append(f"By {NAMES[name]}, best are: {', '.join(best)}.")
    return found


SWEEP = Experiment(
    "sweep", "Interval, common blocks and subnet size", tasks, collect, tables, {"sweep": draw}, reading, notes
)

"""Which way of choosing blocks gives the flattest tickets, over seeds, beside the best pruner of a dense model."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure

from twist_fl.experiments import runs
from twist_fl.experiments.ablation import MIXED, ORDERED
from twist_fl.experiments.experiment import Data, Experiment
from twist_fl.experiments.lab import Lab, Task, measure, train
from twist_fl.experiments.shared import by_size, of_perplexity
from twist_fl.experiments.table1 import CALIBRATION_WINDOWS
from twist_fl.report.cells import Cells
from twist_fl.report.compare import spread_text
from twist_fl.report.glossary import LOWER
from twist_fl.system.units import perplexity_text, size_label

SHUFFLED = (MIXED, "blueprint.assign=shuffled")
COMMON = "blueprint.common=2"
RECIPES = {
    "random, 6/12 (the paper)": runs.twist("both", 6),
    "random, 12, 6, 4, 3": runs.variation("mixed-shuffled", *SHUFFLED),
    "random, 6/12, two common": runs.variation("common-2", COMMON),
    "random, 12, 6, 4, 3, two common": runs.variation("common-2-mixed", COMMON, *SHUFFLED),
}
NESTED = "nested, 12, 6, 4, 3"
PRUNED = "DDP, then SparseGPT"


def seeded(lab: Lab, task: Task) -> list[Task]:
    """The run with as many seeds as the scale has; the first is the lab's own, which other experiments train, too."""
    first = lab.base.seed
    more = [
        replace(
            task, name=f"{task.name}-seed-{s}", arguments={"overrides": [*task.arguments["overrides"], f"seed={s}"]}
        )
        for s in range(first + 1, first + lab.scale.seeds)
    ]
    return [task, *more]


def _nested(lab: Lab) -> list[Task]:
    """Tickets of each layer's first blocks, one a size."""
    return [measure("ordered_tickets", run, sizes=lab.base.eval.sizes) for run in seeded(lab, ORDERED[1])]


def _pruned(lab: Lab, run: Task) -> list[Task]:
    settings = {"method": "sparsegpt", "setting": "both"}
    return [
        measure("prune", run, **settings, size=size, calibration=CALIBRATION_WINDOWS) for size in lab.base.eval.sizes
    ]


def tasks(lab: Lab) -> list[Task]:
    trained = [run for task in RECIPES.values() for run in seeded(lab, task)]
    dense = seeded(lab, runs.DDP)
    return [
        *trained,
        *seeded(lab, ORDERED[1]),
        *_nested(lab),
        *dense,
        *(task for run in dense for task in _pruned(lab, run)),
    ]


def collect(lab: Lab) -> Data:
    found: dict[str, list[Data]] = {
        label: [_row(lab, run, lab.result(run)["tickets"]) for run in seeded(lab, task)]
        for label, task in RECIPES.items()
    }
    found[NESTED] = [_row(lab, train(task.runs[0]), lab.result(task)["tickets"]) for task in _nested(lab)]
    found[PRUNED] = [
        _row(
            lab,
            run,
            [
                {"size": task.arguments["size"], "of": 12, "mean": lab.result(task)["perplexity"]}
                for task in _pruned(lab, run)
            ],
        )
        for run in seeded(lab, runs.DDP)
    ]
    return {"recipes": found, "draws": lab.scale.tickets}


def _row(lab: Lab, run: Task, tickets: list[dict[str, Any]]) -> Data:
    results = lab.result(run)
    keep = ("size", "of", "mean", "std")
    return {
        "seed": results["config"]["seed"],
        "full": results["full"],
        "tickets": [{key: ticket[key] for key in keep if key in ticket} for ticket in tickets],
    }


def over_seeds(rows: list[Data]) -> list[tuple[float, float | None]]:
    """(mean, standard deviation) over seeds: of the full model, then of each size's mean ticket. Of one seed None."""
    columns = [[row["full"] for row in rows]]
    columns += [[row["tickets"][i]["mean"] for row in rows] for i in range(len(rows[0]["tickets"]))]
    return [(fmean(column), stdev(column) if len(column) > 1 else None) for column in columns]


def spread_cell(value: tuple[float, float | None]) -> str:
    """(mean, deviation or None) as text."""
    mean, deviation = value
    return perplexity_text(mean) if deviation is None else spread_text(mean, deviation)


def sizes_of(data: Data) -> list[dict[str, Any]]:
    first: list[Data] = next(iter(data["recipes"].values()))
    return list(first[0]["tickets"])


def tables(data: Data) -> dict[str, Cells]:
    header = ["blocks of a worker", "full model", *map(size_label, sizes_of(data))]
    lines = [[label, *map(spread_cell, over_seeds(rows))] for label, rows in data["recipes"].items()]
    seeds = len(next(iter(data["recipes"].values())))
    return {of_perplexity(f"mean ± deviation over {seeds} seeds"): [header, *lines]}


def draw(data: Data) -> Figure:
    """Perplexity against the blocks kept, down from the full model; a bar is the deviation over seeds."""
    return by_size({label: over_seeds(rows) for label, rows in data["recipes"].items()}, sizes_of(data))


def reading(data: Data) -> str:
    seeds = [row["seed"] for row in next(iter(data["recipes"].values()))]
    return (
        f"Perplexity: {LOWER}. "
        f"Means over training runs with seed {', '.join(map(str, seeds))}, bars are their deviation; each run's "
        f"tickets are a mean over {data['draws']} random ones, nested ones and SparseGPT's models are one a size."
    )


def notes(data: Data) -> list[str]:
    recipes = {label: over_seeds(rows) for label, rows in data["recipes"].items()}
    found = [
        "Numbers are the sizes that the four workers hold, shuffled among them every round; common blocks are ids 0 "
        "and 1, and tickets hold them too. Nested: whoever holds k blocks holds the first k, and a ticket is those. "
        "All train as many batches.",
    ]
    for i, name in enumerate(["The full model", *(f"{size_label(ticket)}" for ticket in sizes_of(data))]):
        best = min(recipes, key=lambda label: recipes[label][i][0])
        ours = min((label for label in recipes if label != PRUNED), key=lambda label: recipes[label][i][0])
        text = f"{name}: best is '{best}' with {perplexity_text(recipes[best][i][0])}"
        if ours != best:
            text += f", of TwIST '{ours}' with {perplexity_text(recipes[ours][i][0])}"
        found.append(text + ".")
    return found


RECIPE = Experiment(
    "recipe", "Flat tickets: which blocks workers hold", tasks, collect, tables, {"recipe": draw}, reading, notes
)

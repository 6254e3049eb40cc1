"""Nodes that fail where every divided layer lies on all of them: each loses the same block ids in all layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from twist_fl.blueprint.architectures import KINDS
from twist_fl.blueprint.blocks import Layout
from twist_fl.blueprint.blueprint import Blueprint, Scale
from twist_fl.blueprint.division import Division
from twist_fl.blueprint.drawing import full_blueprint
from twist_fl.experiments import runs
from twist_fl.experiments.experiment import Data, Experiment
from twist_fl.experiments.lab import Lab, Task, measure
from twist_fl.experiments.shared import of_perplexity
from twist_fl.report.cells import Cells, turned
from twist_fl.report.glossary import LOWER
from twist_fl.report.plots import PERPLEXITY, figure_of, looks_of, scale_perplexity
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.trained import TrainedRun
from twist_fl.system.units import perplexity_text
from twist_fl.tickets.evaluate import Tickets, subnet_perplexity

LOST = [0, 1, 2, 3, 4, 6, 8, 9]
"""Nodes lost, of as many as a layer has blocks."""
RUNS = {
    "DDP": runs.DDP,
    "FedAvg": runs.FEDAVG,
    "TwIST, 6 of 12": runs.twist("both", 6),
    "TwIST, 4 of 12": runs.twist("both", 4),
    "TwIST, 12, 6, 4 and 3": runs.variation("mixed", "blueprint.num_sub=[12,6,4,3]"),
}


def num_nodes(layout: Layout, division: Division) -> int:
    """As many as heads, or as FFN blocks where only those are divided."""
    return layout.num_blocks[0 if division.divides("attn") else 1]


def survivors(layout: Layout, division: Division, lost: Sequence[int]) -> Blueprint:
    """What is left of a model of which node i of N holds block i of every divided layer and kind.

    Where a kind has more or fewer blocks than there are nodes, neighbouring blocks share a node or lie on every other.
    Raises ValueError if a layer is left without a block.
    """
    nodes, full = num_nodes(layout, division), full_blueprint(layout)
    rows = {"attn": list(full.attn), "ffn": list(full.ffn)}
    for kind, num_full in zip(KINDS, layout.num_blocks, strict=True):
        alive = tuple(block for block in range(num_full) if block * nodes // num_full not in lost)
        if not alive:
            raise ValueError(f"with nodes {list(lost)} of {nodes} lost no {kind} block is left: lose fewer")
        for layer in division.layers(layout.num_layers) if division.divides(kind) else ():
            rows[kind][layer] = alive
    return Blueprint(layout.num_blocks, tuple(rows["attn"]), tuple(rows["ffn"]))


def choices(nodes: int, lost: int, draws: int, seed: int) -> list[tuple[int, ...]]:
    """All choices of `lost` nodes if they are at most `draws`, else so many different random ones."""
    if comb(nodes, lost) <= draws:
        return list(combinations(range(nodes), lost))
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, lost))))
    found: dict[tuple[int, ...], None] = {}
    while len(found) < draws:
        found[tuple(sorted(int(node) for node in rng.permutation(nodes)[:lost]))] = None
    return list(found)


def failure(folder: RunFolder, *, lost: list[int], draws: int) -> dict[str, Any]:
    """Perplexity of what is left without `lost` nodes: with the run's scale factor, and without one."""
    run = TrainedRun(folder.path)
    job, state = run.job, run.state
    config, windows = job.config, run.test
    nodes = num_nodes(job.layout, job.division)
    scales: dict[str, Scale] = {"scaled": config.blueprint.scale, "unscaled": "none"}
    found: dict[str, Any] = {"nodes": nodes, "seed": config.seed}
    for name, scale in scales.items():
        models, rows = job.models(scale=scale), []
        for count in lost:
            blueprints = [
                survivors(job.layout, job.division, chosen) for chosen in choices(nodes, count, draws, config.seed)
            ]
            values = [
                subnet_perplexity(models, state.params, [each], windows, config.eval.batch_size) for each in blueprints
            ]
            heads, ffn_blocks = blueprints[0].shape
            num_params = job.layout.num_params(blueprints[0])
            tickets = Tickets((min(heads), min(ffn_blocks)), num_params, tuple(values))
            rows.append({"lost": count, **tickets.summary()})
        found[name] = rows
    return found


def _measured(lab: Lab) -> dict[str, Task]:
    return {label: measure("failure", run, lost=LOST, draws=lab.scale.tickets) for label, run in RUNS.items()}


def tasks(lab: Lab) -> list[Task]:
    return [*RUNS.values(), *_measured(lab).values()]


def collect(lab: Lab) -> Data:
    return {"runs": [{"label": label, **lab.result(task)} for label, task in _measured(lab).items()]}


def tables(data: Data) -> dict[str, Cells]:
    """Mean and worst case."""
    what = of_perplexity("mean (worst) over choices of the lost nodes")
    return {
        f"{what}; the nodes know how many are left": _cells(data, "scaled"),
        "The same without the scale factor": _cells(data, "unscaled"),
    }


def _cells(data: Data, scale: str) -> Cells:
    """A line per number of lost nodes, a column per run."""
    header = ["nodes lost", *(str(row["lost"]) for row in data["runs"][0][scale])]
    return turned([header, *([run["label"], *map(_cell, run[scale])] for run in data["runs"])])


def _cell(row: Data) -> str:
    mean, worst = perplexity_text(row["mean"]), perplexity_text(row["max"])
    return f"{mean} ({worst})" if row["lost"] else mean


def draw(data: Data) -> Figure:
    """Mean perplexity (lines) between the best and the worst choice of lost nodes (bands)."""
    every = [row[key] for run in data["runs"] for scale in _PANELS for row in run[scale] for key in ("min", "max")]
    looks = looks_of(run["label"] for run in data["runs"])
    figure = figure_of(3.2, looks)
    axes = figure.subplots(1, len(_PANELS), sharey=True)
    for panel, (scale, title) in zip(axes, _PANELS.items(), strict=True):
        panel.set_title(title, fontsize=10)
        for run, look in zip(data["runs"], looks.values(), strict=True):
            lost, mean, least, most = ([row[key] for row in run[scale]] for key in ("lost", "mean", "min", "max"))
            panel.plot(lost, mean, **look, linewidth=1.4, markersize=4.5)
            panel.fill_between(lost, least, most, color=look["color"], alpha=0.13, linewidth=0)
        panel.set_xticks([row["lost"] for row in data["runs"][0]["scaled"]])
        panel.set_xlabel(f"nodes lost, of {data['runs'][0]['nodes']}")
    axes[0].set_ylabel(PERPLEXITY)
    scale_perplexity(axes[0], every)
    return figure


_PANELS = {"scaled": "with the scale factor", "unscaled": "without it"}


def reading(data: Data) -> str:
    first = data["runs"][0]
    most = max(len(row["perplexities"]) for row in first["scaled"])
    return (
        f"Perplexity: {LOWER}. "
        f"Lines: the mean over up to {most} choices of lost nodes; bands: from the best to the worst choice. Seed "
        f"{first['seed']}."
    )


def notes(data: Data) -> list[str]:
    """Which run stands best after a quarter, a half and three quarters of the nodes are gone."""
    first = data["runs"][0]
    nodes, most = first["nodes"], max(len(row["perplexities"]) for row in first["scaled"])
    found = [
        f"Node i of {nodes} holds block i of every divided layer, heads and FFN; what is not divided is on all. For "
        f"each number of lost nodes all choices are measured, or {most} different random ones where there are more "
        f"(seed {first['seed']}); the same for every run."
    ]
    for count in (nodes // 4, nodes // 2, 3 * nodes // 4):
        best = min(data["runs"], key=lambda run: _mean(run, "scaled", count))
        others = "" if best is first else f"; {first['label']} has {_both(first, count)}"
        found.append(f"With {count} of {nodes} nodes lost, {best['label']} is best: {_both(best, count)}{others}.")
    return found


def _both(run: Data, lost: int) -> str:
    scaled, unscaled = (perplexity_text(_mean(run, scale, lost)) for scale in ("scaled", "unscaled"))
    return f"{scaled} on average ({unscaled} without the scale factor)"


def _mean(run: Data, scale: str, lost: int) -> float:
    return next(float(row["mean"]) for row in run[scale] if row["lost"] == lost)


FAILURE = Experiment(
    "failure",
    "Nodes that fail in a model-parallel deployment",
    tasks,
    collect,
    tables,
    {"failure": draw},
    reading,
    notes,
)

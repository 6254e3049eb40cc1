"""Figure 2: the memory of a subnet with half the blocks, against the full model's, for GPT-2's four sizes."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from transformers import GPT2Config

from twist_fl.blueprint.blocks import make_layout
from twist_fl.blueprint.cost import training_gib
from twist_fl.blueprint.division import Division
from twist_fl.blueprint.drawing import draw_ticket
from twist_fl.experiments.experiment import Data, Experiment
from twist_fl.experiments.lab import Lab
from twist_fl.report.cells import Cells
from twist_fl.report.plots import figure_of, looks_of

MODELS = {"small": (12, 12, 768), "medium": (24, 16, 1024), "large": (36, 20, 1280), "XL": (48, 25, 1600)}
"""(layers, heads, width) of GPT-2."""
UNDIVIDED = {"first and last two layers whole": 2, "all layers divided": 0}
LOOKS = looks_of(UNDIVIDED)


def collect(lab: Lab) -> Data:
    return {"models": {f"GPT-2 {name}": _model(*sizes) for name, sizes in MODELS.items()}}


def _model(layers: int, heads: int, width: int) -> dict[str, Any]:
    layout = make_layout(GPT2Config(n_layer=layers, n_head=heads, n_embd=width).to_dict())
    full = training_gib(layout)
    # Memory is linear in the blocks held, so that the mean of 12 and 13 of XL's 25 is that of half.
    halves = ((heads // 2,) * 2, (heads - heads // 2,) * 2)
    half = {
        name: fmean(
            training_gib(layout, draw_ticket(layout, Division("both", (), n, n), size, 0, 0)) for size in halves
        )
        for name, n in UNDIVIDED.items()
    }
    return {
        "params": layout.num_params(),
        "full_gib": full,
        "half_gib": half,
        "share": {name: gib / full for name, gib in half.items()},
    }


def tables(data: Data) -> dict[str, Cells]:
    header = [
        "model",
        "parameters",
        "full, GiB",
        *(f"half, {way}, GiB (share)" for way in ("ends whole", "all divided")),
    ]
    lines = [
        [
            name,
            f"{model['params']:,}",
            f"{model['full_gib']:.2f}",
            *(f"{model['half_gib'][way]:.2f} ({100 * model['share'][way]:.1f} %)" for way in UNDIVIDED),
        ]
        for name, model in data["models"].items()
    ]
    return {"Training memory of a subnet with half the heads and FFN blocks": [header, *lines]}


def notes(data: Data) -> list[str]:
    first, *_, last = data["models"].values()
    shares = [
        f"{name}: from {100 * first['share'][name]:.1f} % to {100 * last['share'][name]:.1f} %" for name in UNDIVIDED
    ]
    return [
        f"From the cost model alone, no training. Share of the full model's memory, {'; '.join(shares)}. "
        "The paper prints no numbers, and says that the share approaches 50 %.",
        "'Ends whole': the first and last two layers are not divided. XL has 25 heads: its half is the mean of subnets "
        "with 12 and with 13 blocks.",
    ]


def draw(data: Data) -> Figure:
    figure = figure_of(3.2, LOOKS)
    axes = figure.subplots()
    models = data["models"]
    for name, look in LOOKS.items():
        shares = [100 * model["share"][name] for model in models.values()]
        axes.plot(range(len(models)), shares, **look, linewidth=1.4, markersize=5)
    axes.axhline(50, color="#808080", linestyle="--", linewidth=1.0)
    axes.annotate("half", (0, 50), (0, 3), textcoords="offset points")
    sizes = [f"{name.removeprefix('GPT-2 ')}\n{m['params'] / 1e6:,.0f}" for name, m in models.items()]
    axes.set_xticks(range(len(models)), sizes)
    axes.set_ylim(bottom=45)
    axes.set_ylabel("memory of half the blocks\n(% of the full model's)")
    axes.set_xlabel("GPT-2, and its parameters (millions)")
    return figure


def reading(data: Data) -> str:
    return "Computed, so without seed or draws. Dashed: half the memory, which the shared parameters keep out of reach."


FIG2 = Experiment(
    "fig2",
    "Figure 2: memory of a subnet with half the blocks",
    lambda lab: (),
    collect,
    tables,
    {"fig2": draw},
    reading,
    notes,
)

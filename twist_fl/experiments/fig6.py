"""Figure 6: milliseconds per batch of the full model and of subnets with 4 of 12 blocks."""

from __future__ import annotations

from matplotlib.figure import Figure

from twist_fl.experiments.drawing import figure_of, value_bars
from twist_fl.experiments.experiment import Cells, Data, Experiment
from twist_fl.experiments.lab import Lab, Task, measure
from twist_fl.experiments.runs import DDP
from twist_fl.experiments.shared import PAPER, about, caption
from twist_fl.plots import COLORS

FULL = "DDP 12/12"
SHAPES = {FULL: "full", "ffn 4/12": "ffn", "attn 4/12": "attn", "both 4/12": "both"}
"""The paper's names of what `latency` measures."""
MEASURE = measure("latency", DDP, settings=["ffn", "attn", "both"], size=4, turns=9)


def tasks(lab: Lab) -> list[Task]:
    return [DDP, MEASURE]


def collect(lab: Lab) -> Data:
    found = lab.result(MEASURE)
    milliseconds = found.pop("ms")
    return {
        "about": about(lab),
        "ms": {name: milliseconds[shape] for name, shape in SHAPES.items()},
        "measured": found,
        "paper": PAPER["figure6_ms_per_batch"],
    }


def tables(data: Data) -> dict[str, Cells]:
    ours, paper = data["ms"], data["paper"]
    header = ["shape", "ms per batch", "paper's ms", "ratio to DDP", "paper's ratio"]
    lines = [
        [
            name,
            f"{ours[name]:.2f}",
            f"{paper[name]:.0f}",
            f"{ours[name] / ours[FULL]:.3f}",
            f"{paper[name] / paper[FULL]:.3f}",
        ]
        for name in SHAPES
    ]
    return {caption("Time of a training step", data): [header, *lines]}


def notes(data: Data) -> list[str]:
    found = data["measured"]
    hardware = found["hardware"]
    where = hardware["gpu"] if found["device"].startswith("cuda") else hardware["processor"]
    return [
        f"Medians of {found['turns']} turns of {found['batches']} batches of {found['tokens']:,} tokens, the shapes "
        f"one after another in one process: {found['num_params']:,} parameters, seed {data['about']['seed']}, {where}, "
        f"{found['threads']} thread(s). A step is forward, backward and Adam; nothing is sent.",
        "The paper: GPT-2 124M, batches of 2 x 1,024 tokens, Tesla P100. The smaller the model, the more of a step is "
        "the shared part: embeddings, head and undivided layers.",
    ]


def draw(data: Data) -> Figure:
    figure = figure_of(7.0, 3.2)
    panels = figure.subplots(1, 2)
    colors = {name: COLORS[i] for i, name in enumerate(SHAPES)}
    for axes, whose, values, decimals in zip(
        panels, ("ours", "paper"), (data["ms"], data["paper"]), (1, 0), strict=True
    ):
        value_bars(axes, {name: values[name] for name in SHAPES}, colors, decimals)
        axes.set_title(whose, fontsize=10)
        axes.set_xticks(range(len(SHAPES)), [name.replace(" ", "\n") for name in SHAPES])
        axes.set_xlabel("blocks in a divided layer")
    panels[0].set_ylabel("training step (ms per batch)")
    return figure


FIG6 = Experiment("fig6", "Figure 6: time of a training step", tasks, collect, tables, {"fig6": draw}, notes)

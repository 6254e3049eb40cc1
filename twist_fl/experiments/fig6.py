"""Figure 6: milliseconds per batch of the full model and of subnets with 4 of 12 blocks, beside their FLOPs."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from transformers import GPT2Config

from twist_fl.blueprint.blocks import make_layout
from twist_fl.blueprint.cost import step_flops
from twist_fl.blueprint.division import Division, Setting
from twist_fl.blueprint.drawing import draw_ticket
from twist_fl.experiments.experiment import Data, Experiment
from twist_fl.experiments.lab import Lab, Task
from twist_fl.experiments.latency import FULL, MEASURE, shape_name, subnet
from twist_fl.experiments.runs import DDP
from twist_fl.experiments.shared import PAPER, about, caption
from twist_fl.report.cells import Cells
from twist_fl.report.plots import COLORS, NO_LINE, figure_of

SIZE = 4
SHAPES: dict[str, Setting | None] = {FULL: None} | {shape_name(s, SIZE): s for s in ("ffn", "attn", "both")}
PAPER_BATCH = (2, 1024)
"""Windows, and tokens of each."""
FLOPS: dict[str, Any] = {"marker": "D", "color": "black", "markerfacecolor": "white", **NO_LINE}


def tasks(lab: Lab) -> list[Task]:
    return [DDP, MEASURE]


def collect(lab: Lab) -> Data:
    found = lab.result(MEASURE)
    milliseconds = found.pop("ms")
    return {
        "about": about(lab),
        "ms": {name: milliseconds[name] for name in SHAPES},
        "measured": found,
        "flops": _flops(lab),
        "paper": PAPER["figure6_ms_per_batch"],
        "paper_flops": _paper_flops(),
    }


def _flops(lab: Lab) -> dict[str, float]:
    """A step's, of the full model's."""
    job = lab.run(DDP.name).job()
    batch = (job.config.train.batch_size, job.config.data.window)
    tickets = {name: setting and subnet(job, setting, SIZE) for name, setting in SHAPES.items()}
    found = {name: step_flops(job.layout, ticket, *batch) for name, ticket in tickets.items()}
    return {name: flops / found[FULL] for name, flops in found.items()}


def _paper_flops() -> dict[str, float]:
    """Of GPT-2 124M, the first and last two layers whole."""
    layout = make_layout(GPT2Config().to_dict())
    tickets = {
        name: setting and draw_ticket(layout, Division(setting, ()), (SIZE, SIZE), 0, 0)
        for name, setting in SHAPES.items()
    }
    found = {name: step_flops(layout, ticket, *PAPER_BATCH) for name, ticket in tickets.items()}
    return {name: flops / found[FULL] for name, flops in found.items()}


def tables(data: Data) -> dict[str, Cells]:
    return {
        caption("Time of a training step", data): _cells(data["ms"], data["flops"], 2),
        "The same in the paper, GPT-2 124M on a P100": _cells(data["paper"], data["paper_flops"], 0),
    }


def _cells(ms: dict[str, float], flops: dict[str, float], decimals: int) -> Cells:
    lines = [[name, f"{ms[name]:.{decimals}f}", f"{ms[name] / ms[FULL]:.3f}", f"{flops[name]:.3f}"] for name in SHAPES]
    return [["shape", "ms per batch", "of DDP's time", "of DDP's FLOPs"], *lines]


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
        "FLOPs are those of a step's matrix products, by the cost model; the paper's are those of GPT-2 124M with the "
        "first and last two layers whole. Not in them: Adam, norms, softmax, the loss, what starting a product takes.",
    ]


def draw(data: Data) -> Figure:
    """A bar per shape with its time, of DDP's so that both machines share a scale; and its share of DDP's FLOPs."""
    figure = figure_of(3.2, {"FLOPs, of DDP's": FLOPS})
    names = list(SHAPES)
    sides = (("ours", data["ms"], data["flops"]), ("paper", data["paper"], data["paper_flops"]))
    for axes, (whose, ms, flops) in zip(figure.subplots(1, 2, sharey=True), sides, strict=True):
        bars = axes.bar(range(len(names)), [ms[name] / ms[FULL] for name in names], color=COLORS[0], width=0.85)
        decimals = 0 if max(ms.values()) >= 100 else 1  # three digits fill a bar on a phone
        labels = [f"{ms[name]:.{decimals}f}" for name in names]
        axes.bar_label(bars, labels, label_type="center", color="white")
        axes.plot(range(len(names)), [flops[name] for name in names], **FLOPS, markersize=6)
        axes.set_title(whose, fontsize=10)
        axes.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names])
        axes.set_xlabel("blocks in a divided layer")
        axes.set_ylabel("time of a training step / DDP's" if whose == "ours" else "")
        axes.grid(visible=False, axis="x")
        axes.set_axisbelow(True)
    return figure


def reading(data: Data) -> str:
    found = data["measured"]
    return (
        f"Bars: the median of {found['turns']} turns, relative to DDP's; in them, milliseconds per batch. Seed "
        f"{data['about']['seed']}. Right: the paper's, on a P100."
    )


FIG6 = Experiment("fig6", "Figure 6: time of a training step", tasks, collect, tables, {"fig6": draw}, reading, notes)

"""Theorems A.6 and A.10 on real models: the norm of a layer's output from some of its blocks, over that from all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from statistics import fmean, stdev
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from torch import nn

from twist_fl.blueprint.architectures import KINDS, Kind
from twist_fl.blueprint.drawing import draw_ticket, full_blueprint
from twist_fl.config.sizes import blocks_per_layer, ticket_size
from twist_fl.data.corpus import Windows
from twist_fl.experiments import runs
from twist_fl.experiments.experiment import Data, Experiment
from twist_fl.experiments.lab import Lab, Task, measure
from twist_fl.report.cells import Cells
from twist_fl.report.plots import NO_LINE, figure_of, looks_of
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.trained import TrainedRun
from twist_fl.training.job import Job

SIZES = [10, 8, 6, 4, 3]
WINDOWS = 4
LAWS: dict[str, dict[str, Any]] = {
    "√κ (theorem)": {"color": "black", "linewidth": 1.1},
    "κ (linear law)": {"color": "black", "linewidth": 1.1, "linestyle": "--"},
}
MODELS: dict[str, tuple[Task, Literal["start", "end"]]] = {
    "at initialisation": (runs.twist("both", 6), "start"),
    "after TwIST, 6 of 12": (runs.twist("both", 6), "end"),
    "after DDP": (runs.DDP, "end"),
}


def output_inputs(
    job: Job, params: Mapping[str, torch.Tensor], windows: Windows
) -> dict[tuple[Kind, int], torch.Tensor]:
    """What enters each divided layer's output projection in the full model: (tokens, blocks x width), float64."""
    model: nn.Module = job.models().load_sliced(full_blueprint(job.layout), params)
    places = [(kind, layer) for kind in KINDS for layer in job.division.layers(job.layout.num_layers)]
    seen: dict[tuple[Kind, int], torch.Tensor] = {}

    def keep(place: tuple[Kind, int]) -> Any:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            seen[place] = inputs[0].flatten(0, 1).double().cpu()

        return hook

    hooks = [
        model.get_submodule(job.layout.outputs[kind].format(layer=layer)).register_forward_pre_hook(keep((kind, layer)))
        for kind, layer in places
    ]
    try:
        with torch.inference_mode():
            model.eval()(torch.tensor(windows, dtype=torch.int64, device=job.device()))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def norm_ratios(
    job: Job, params: Mapping[str, torch.Tensor], windows: Windows, size: int, draws: int
) -> dict[tuple[Kind, int], list[float]]:
    """For each divided (kind, layer) and draw: mean over tokens of the norm of the held blocks' sum, over all blocks'.

    The sum is the output projection without its bias and without a scale factor. The layer's input is the full
    model's: given that, blocks do not know of each other, and a subnet's sum is the full one without the others' terms.
    """
    division = replace(job.division, setting="both", common=(0, 0), ticket_policy="random")
    num_sub = ticket_size(job.layout, division, size).num_sub
    tickets = [draw_ticket(job.layout, division, num_sub, job.config.seed, draw) for draw in range(draws)]
    found = {}
    for (kind, layer), z in output_inputs(job, params, windows).items():
        param = job.layout.by_name[job.layout.outputs[kind].format(layer=layer) + ".weight"]
        weight = params[param.name].double().cpu().movedim(param.dim, 0)  # (blocks x width, d_model)
        full = (z @ weight).norm(dim=-1).mean()
        kept = [param.index(ticket.held(kind, layer)) for ticket in tickets]
        found[kind, layer] = [float((z[:, index] @ weight[index]).norm(dim=-1).mean() / full) for index in kept]
    return found


def norms(
    folder: RunFolder, *, at: Literal["start", "end"], sizes: list[int], draws: int, windows: int
) -> dict[str, Any]:
    """Norm ratios of a run's first or last model by kind and size: mean and deviation over draws and layers."""
    run = TrainedRun(folder.path)
    job, state = run.job, run.state
    params = job.initial_state() if at == "start" else state.params
    rows: list[dict[str, Any]] = []
    of = blocks_per_layer(job.layout, "both")
    for size in sizes:
        ratios = norm_ratios(job, params, job.corpus.test[:windows], size, draws)
        for kind in KINDS:
            layers = {str(layer): fmean(values) for (k, layer), values in ratios.items() if k == kind}
            every = [value for (k, _), values in ratios.items() if k == kind for value in values]
            rows.append(
                {"kind": kind, "size": size, "of": of, "mean": fmean(every), "std": stdev(every), "by_layer": layers}
            )
    tokens = windows * job.config.data.window
    return {"rows": rows, "draws": draws, "tokens": tokens, "seed": job.config.seed}


def _measured(lab: Lab) -> dict[str, Task]:
    return {
        label: measure("norms", run, at=at, sizes=SIZES, draws=lab.scale.tickets, windows=WINDOWS)
        for label, (run, at) in MODELS.items()
    }


def tasks(lab: Lab) -> list[Task]:
    return [runs.twist("both", 6), runs.DDP, *_measured(lab).values()]


def collect(lab: Lab) -> Data:
    return {"models": [{"label": label, **lab.result(task)} for label, task in _measured(lab).items()]}


def _of_kind(model: Data, kind: str) -> list[Data]:
    return [row for row in model["rows"] if row["kind"] == kind]


def tables(data: Data) -> dict[str, Cells]:
    """The norms, and the factors that would restore them, of each kind."""
    found = {}
    for kind in KINDS:
        sizes = [(row["size"], row["of"]) for row in _of_kind(data["models"][0], kind)]
        header = ["model", *(f"{size}/{of}" for size, of in sizes)]
        models = {model["label"]: _of_kind(model, kind) for model in data["models"]}
        found[f"Norm of a layer's sum over the blocks held, over that of all blocks: {kind}"] = [
            header,
            ["√κ (theorem)", *(f"{sqrt(size / of):.3f}" for size, of in sizes)],
            *([name, *(f"{row['mean']:.3f} ± {row['std']:.3f}" for row in rows)] for name, rows in models.items()),
        ]
        found[f"The factor that would restore the norm: {kind}"] = [
            header,
            ["sqrt: √(1/κ)", *(f"{sqrt(of / size):.2f}" for size, of in sizes)],
            ["linear: 1/κ", *(f"{of / size:.2f}" for size, of in sizes)],
            *([name, *(f"{1 / row['mean']:.2f}" for row in rows)] for name, rows in models.items()),
        ]
    return found


def draw(data: Data) -> Figure:
    """Measured ratios with their deviation, the theorem's square root and the linear law."""
    names = {"attn": "attention (A.10)", "ffn": "feed-forward (A.6)"}
    looks = looks_of(model["label"] for model in data["models"])
    figure = figure_of(3.2, {label: look | NO_LINE for label, look in looks.items()} | LAWS)
    axes = figure.subplots(1, len(names), sharey=True)
    kappas = [0.2 + 0.8 * i / 80 for i in range(81)]
    root, linear = LAWS.values()
    for panel, (kind, title) in zip(axes, names.items(), strict=True):
        panel.set_title(title, fontsize=10)
        panel.plot(kappas, [sqrt(kappa) for kappa in kappas], **root)
        panel.plot(kappas, kappas, **linear)
        for i, (model, look) in enumerate(zip(data["models"], looks.values(), strict=True)):
            rows = _of_kind(model, kind)
            places = [row["size"] / row["of"] + 0.012 * (i - (len(looks) - 1) / 2) for row in rows]
            means, stds = [row["mean"] for row in rows], [row["std"] for row in rows]
            panel.errorbar(places, means, yerr=stds, **look | NO_LINE, markersize=4.5, capsize=2)
        ticks = {row["size"] / row["of"]: str(row["size"]) for row in _of_kind(data["models"][0], kind)}
        of = data["models"][0]["rows"][0]["of"]
        panel.set_xticks([*ticks, 1.0], [*ticks.values(), str(of)])
        panel.set_xlabel(f"blocks held of {of}\n(κ = held / {of})")
    axes[0].set_ylabel("norm of the block sum,\nover that of all blocks")
    return figure


def reading(data: Data) -> str:
    first = data["models"][0]
    return f"Bars: one standard deviation over {first['draws']} random subnets and the layers. Seed {first['seed']}."


def notes(data: Data) -> list[str]:
    first = data["models"][0]
    found = [
        f"The norm is the mean over {first['tokens']:,} test tokens of the output projection's, without bias and "
        f"scale; mean and deviation are over {first['draws']} random subnets (seed {first['seed']}) and "
        "the divided layers."
    ]
    for model in data["models"]:
        far = max(model["rows"], key=lambda row: abs(row["mean"] / sqrt(row["size"] / row["of"]) - 1))
        kappa, label = far["size"] / far["of"], model["label"]
        laws = f"where the theorem has {sqrt(kappa):.3f} and the linear law {kappa:.3f}"
        found.append(
            f"{label[0].upper()}{label[1:]}, the ratio is furthest from √κ in {far['kind']} at "
            f"{far['size']}/{far['of']}: {far['mean']:.3f}, {laws}."
        )
    return found


THEOREM = Experiment("figA", "Theorems A.6 and A.10, measured", tasks, collect, tables, {"figA": draw}, reading, notes)

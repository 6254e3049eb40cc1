"""Table 1: perplexity of subnets and of pruned models, by setting, size and method, and what each method costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from twist_fl.blueprint.division import Setting
from twist_fl.experiments.experiment import Data, Experiment
from twist_fl.experiments.lab import Lab, Task, measure
from twist_fl.experiments.runs import DDP, twist
from twist_fl.experiments.shared import (
    BLOCKS,
    PAPER,
    SE_6,
    about,
    caption,
    draws,
    label,
    of_perplexity,
    printed,
    seeds,
    ticket_rows,
    tickets,
)
from twist_fl.report.cells import Cells
from twist_fl.report.compare import MISSING, spread_text
from twist_fl.report.glossary import LOWER
from twist_fl.report.plots import PERPLEXITY, figure_of, looks_of, scale_perplexity
from twist_fl.system.units import perplexity_text

SIZES = (8, 6, 4, 3)
LABELS = tuple(map(label, SIZES))
PRUNERS = {
    "SparseGPT": "sparsegpt",
    "Wanda": "wanda",
    "Z-Pruner": "zpruner",
    "Block Prune": "block",
    "Magnitude": "magnitude",
}
SE_DDP, SE = "SE (DDP)", "TwIST SE"
EXTRACTED = (SE_DDP, SE, SE_6)
METHODS = (*PRUNERS, *EXTRACTED)
CALIBRATION_WINDOWS = 128
LOOKS = {
    method: look | {"linestyle": "-" if method in (SE, SE_6) else "--"}
    for method, look in looks_of((SE_6, SE_DDP, SE, *PRUNERS)).items()
}


def _run(method: str, setting: Setting, size: int) -> Task:
    """The run whose random tickets are the row's."""
    return {SE_DDP: DDP, SE: twist(setting, size), SE_6: twist(setting, 6)}[method]


def _prune(method: str, setting: Setting, size: int) -> Task:
    settings = {"method": PRUNERS[method], "setting": setting, "size": size, "calibration": CALIBRATION_WINDOWS}
    return measure("prune", DDP, **settings)


def tasks(lab: Lab) -> list[Task]:
    runs = [DDP, *(twist(setting, size) for setting in lab.settings for size in SIZES)]
    measured = [
        *(_prune(method, setting, size) for setting in lab.settings for method in PRUNERS for size in SIZES),
        *(tickets(lab, DDP, setting) for setting in lab.settings),
        *(tickets(lab, twist(setting, size), setting) for setting in lab.settings for size in SIZES),
    ]
    return [*runs, *measured]


def collect(lab: Lab) -> Data:
    return {
        "about": about(lab),
        "settings": {setting: _setting(lab, setting) for setting in lab.settings},
        "cost": {
            method: {key: found[key] for key in ("seconds", "peak_bytes", "calibration_tokens")}
            for method in PRUNERS
            for found in [lab.result(_prune(method, lab.settings[-1], 6))]
        },
        "paper": PAPER["table1_perplexity"]["rows"],
    }


def _setting(lab: Lab, setting: Setting) -> dict[str, Any]:
    pruned = {method: {label(size): lab.result(_prune(method, setting, size)) for size in SIZES} for method in PRUNERS}
    extracted = {
        method: {
            label(size): {
                key: ticket_rows(lab, _run(method, setting, size), setting)[label(size)][key]
                for key in ("mean", "std", "min", "max")
            }
            for size in SIZES
        }
        for method in EXTRACTED
    }
    return {
        "rows": {
            method: {size: {"mean": found["perplexity"]} for size, found in row.items()}
            for method, row in pruned.items()
        }
        | extracted,
        "full": {"DDP": lab.result(DDP)["full"]}
        | {label(size): lab.result(twist(setting, size))["full"] for size in SIZES},
        "remarks": {
            f"{method} {size}": len(found["notes"])
            for method, row in pruned.items()
            for size, found in row.items()
            if found["notes"]
        },
    }


def tables(data: Data) -> dict[str, Cells]:
    drawn, last = data["about"]["tickets"], list(data["settings"])[-1]
    perplexities: dict[str, Cells] = {}
    for setting in data["settings"]:
        what = f"setting {setting}, by blocks kept per layer"
        perplexities[caption(of_perplexity(what), data)] = _table(data, setting, _ours)
        perplexities[f"The same in the paper, {what}"] = _table(data, setting, _paper)
    return perplexities | {
        caption(of_perplexity(f"lowest and highest of {drawn} random tickets"), data): [
            ["setting", "method", *LABELS],
            *(
                [setting, method, *(_range_text(data["settings"][setting]["rows"][method][size]) for size in LABELS)]
                for setting in data["settings"]
                for method in EXTRACTED
            ),
        ],
        caption(of_perplexity("of the full models, by the size that their workers held"), data): [
            ["setting", "DDP", *LABELS],
            *(
                [setting, *map(perplexity_text, data["settings"][setting]["full"].values())]
                for setting in data["settings"]
            ),
        ],
        caption(f"What a method costs after training, setting {last}, {label(6)}", data): _costs(data),
    }


def _table(data: Data, setting: str, row: Callable[[Data, str, str], list[str]]) -> Cells:
    return [["method", *LABELS], *([method, *row(data, setting, method)] for method in METHODS)]


def _ours(data: Data, setting: str, method: str) -> list[str]:
    found = data["settings"][setting]["rows"][method]
    return [
        spread_text(found[size]["mean"], found[size]["std"])
        if "std" in found[size]
        else perplexity_text(found[size]["mean"])
        for size in LABELS
    ]


def _paper(data: Data, setting: str, method: str) -> list[str]:
    values = data["paper"][setting].get(method)
    return [perplexity_text(value) for value in values] if values else [MISSING] * len(LABELS)


def _range_text(found: Mapping[str, float]) -> str:
    return f"{perplexity_text(found['min'])} to {perplexity_text(found['max'])}"


def _costs(data: Data) -> Cells:
    """A random ticket is drawn and sliced: nothing is measured, calibrated or solved."""
    free = {"seconds": 0.0, "peak_bytes": 0, "calibration_tokens": 0}
    return [
        ["method", "seconds", "peak memory MB", "calibration tokens"],
        *(
            [
                method,
                f"{found['seconds']:.2f}" if found["seconds"] else "0",
                f"{found['peak_bytes'] / 1e6:,.0f}",
                f"{found['calibration_tokens']:,}",
            ]
            for method, found in (data["cost"] | dict.fromkeys(EXTRACTED, free)).items()
        ),
    ]


def notes(data: Data) -> list[str]:
    size, paper = label(4), PAPER["table1_perplexity"]
    column = paper["kappa"].index(size)
    found = [f"SE rows are mean ± standard deviation. {seeds(data)} The paper does not say how many it drew."]
    for setting in data["settings"]:
        rows, theirs = data["settings"][setting]["rows"], data["paper"][setting]
        pairs = [
            f"{method} {perplexity_text(rows[method][size]['mean'])} (paper {perplexity_text(theirs[method][column])})"
            for method in (SE, SE_6, "SparseGPT", SE_DDP)
        ]
        found.append(f"{setting} {size}: {', '.join(pairs)}.")
    remarks = {f"{s} {key}": n for s in data["settings"] for key, n in data["settings"][s]["remarks"].items()}
    if remarks:
        listed = "; ".join(f"{key} ({number})" for key, number in remarks.items())
        found.append(f"Matrices that a pruner remarked on, mostly for more damping: {listed}.")
    return found


def draw(data: Data) -> Figure:
    """Against kappa: a row per setting, ours left and the paper's right; thin lines reach to tickets' extremes."""
    figure = figure_of(2.4 * len(data["settings"]), {printed(method): look for method, look in LOOKS.items()})
    panels = figure.subplots(len(data["settings"]), 2, sharex=True, sharey="col", squeeze=False)
    every: dict[str, list[float]] = {"ours": [], "paper": []}
    for (left, right), setting in zip(panels, data["settings"], strict=True):
        ours: dict[str, dict[str, Any]] = data["settings"][setting]["rows"]
        for method in EXTRACTED:
            least, most = ([ours[method][size][key] for size in LABELS] for key in ("min", "max"))
            left.vlines(SIZES, least, most, color=LOOKS[method]["color"], linewidth=0.8)
            every["ours"] += [*least, *most]
        means = {method: [row[size]["mean"] for size in LABELS] for method, row in ours.items()}
        for axes, whose, lines in ((left, "ours", means), (right, "paper", data["paper"][setting])):
            _panel(axes, f"{setting}, {whose}", lines)
            every[whose] += [value for values in lines.values() for value in values]
        left.set_ylabel(PERPLEXITY)
    for axes in panels[-1]:
        axes.set_xlabel(f"blocks kept of {BLOCKS}")
        axes.set_xticks(SIZES)
    for axes, values in zip(panels[0], every.values(), strict=True):
        scale_perplexity(axes, values)
    return figure


def reading(data: Data) -> str:
    return (
        f"Test perplexity ({LOWER}) against the blocks kept in each divided layer. Left, ours, on one "
        "scale; right, the paper's, on another, since model and text differ. In ours, points of SE are means, thin "
        f"lines reach to the extremes, of {draws(data)}"
    )


def _panel(axes: Axes, heading: str, lines: Mapping[str, Sequence[float]]) -> None:
    axes.set_title(heading, fontsize=10)
    for method, values in lines.items():
        axes.plot(SIZES, values, **LOOKS[method], linewidth=1.4, markersize=4.5)


TABLE1 = Experiment(
    "table1",
    "Table 1: perplexity of subnets and pruned models",
    tasks,
    collect,
    tables,
    {"table1": draw},
    reading,
    notes,
)

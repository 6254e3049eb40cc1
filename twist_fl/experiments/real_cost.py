"""What pruned models really weigh and how fast they really are, beside their perplexity: zeros save neither."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from twist_fl.experiments import runs
from twist_fl.experiments.experiment import Data, Experiment
from twist_fl.experiments.lab import Lab, Task, measure
from twist_fl.experiments.weighing import LABELS, TOKEN, WINDOW
from twist_fl.report.cells import Cells
from twist_fl.report.glossary import LOWER
from twist_fl.report.plots import COLORS, MARKERS, NO_LINE, PERPLEXITY, figure_of, scale_perplexity
from twist_fl.system.units import perplexity_text

SIZE = 4
CALIBRATION = 128
"""Windows."""
DDP_METHODS = ["sparsegpt", "wanda", "magnitude", "block", "se"]
TURNS = 31
NEW_TOKENS = 16


_RUNS = {
    "DDP": (runs.DDP, DDP_METHODS),
    "TwIST, 4 of 12": (runs.twist("both", 4), ["se"]),
    "TwIST, 6 of 12": (runs.twist("both", 6), ["se"]),
}


def _measured(lab: Lab) -> dict[str, Task]:
    fixed: dict[str, Any] = {"size": SIZE, "draws": lab.scale.tickets, "calibration": CALIBRATION}
    fixed |= {"new_tokens": NEW_TOKENS, "turns": TURNS}
    return {label: measure("real_cost", run, methods=methods, **fixed) for label, (run, methods) in _RUNS.items()}


def tasks(lab: Lab) -> list[Task]:
    return [*(run for run, _ in _RUNS.values()), *_measured(lab).values()]


def collect(lab: Lab) -> Data:
    return {"runs": [{"label": label, **lab.result(task)} for label, task in _measured(lab).items()]}


def tables(data: Data) -> dict[str, Cells]:
    """What is stored, then how fast it is."""
    sizes: Cells = [["model", "perplexity", "parameters", "not zero", "file, MB", "gzip, MB"]]
    times: Cells = [["model", "ms/window", "speed", "ms/token", "speed"]]
    for run in data["runs"]:
        full = run["rows"][0]
        for row in run["rows"]:
            sizes.append(
                [
                    _label(run, row),
                    perplexity_text(row["perplexity"]),
                    f"{row['num_params']:,}",
                    f"{row['nonzero']:,}",
                    *(f"{row[key] / 1e6:,.2f}" for key in ("file_bytes", "gzip_bytes")),
                ]
            )
            speeds = [(f"{row[key]:.2f}", f"{_speed(full, row, key):.2f}x") for key in (WINDOW, TOKEN)]
            times.append([_label(run, row), *speeds[0], *speeds[1]])
    first = data["runs"][0]
    pruned = f"Pruned to {first['size']}/{first['of']} of every divided layer"
    stored, fast = f"{pruned}: test perplexity ({LOWER}), and what is stored", f"{pruned}: speed on one CPU thread"
    return {stored: sizes, fast: times}


def _label(run: Data, row: Data) -> str:
    return f"{run['label']}: {LABELS[row['method']]}"


def _speed(full: Data, row: Data, key: str) -> float:
    """How many times as fast as the full model of the same process."""
    return float(full[key] / row[key])


def draw(data: Data) -> Figure:
    """Perplexity against the file's size, and against the speed, both relative to the run's full model.

    The marker is the method; colour, and how the marker is filled, is the run.
    """
    methods = {method: {"marker": marker} for method, marker in zip(LABELS, MARKERS, strict=False)}
    found: dict[str, dict[str, Any]] = {
        run["label"]: {"color": color, "fillstyle": filled, "markerfacecoloralt": "white"}
        for run, color, filled in zip(data["runs"], COLORS, ("none", "left", "full"), strict=False)
    }
    legend: dict[str, dict[str, Any]] = {label: look | NO_LINE | {"marker": "o"} for label, look in found.items()}
    legend |= {LABELS[method]: look | NO_LINE | {"color": "#606060"} for method, look in methods.items()}
    figure = figure_of(3.2, legend)
    axes = figure.subplots(1, 2, sharey=True)
    for run in data["runs"]:
        full = run["rows"][0]
        for row in run["rows"]:
            look = found[run["label"]] | methods[row["method"]] | NO_LINE
            places = (row["file_bytes"] / full["file_bytes"], _speed(full, row, WINDOW))
            for panel, place in zip(axes, places, strict=True):
                panel.plot([place], [row["perplexity"]], **look, markersize=7)
    axes[0].set_xlabel("file size /\nthe full model's")
    axes[1].set_xlabel("windows per second /\nthe full model's")
    axes[0].set_ylabel(PERPLEXITY)
    for panel in axes:
        panel.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    scale_perplexity(axes[0], [row["perplexity"] for run in data["runs"] for row in run["rows"]])
    return figure


def reading(data: Data) -> str:
    first = data["runs"][0]
    draws = max(row["draws"] for row in first["rows"])
    return (
        f"Perplexity: {LOWER}. The best place is below, to the left in the first panel, to the right in the second. "
        f"Random tickets are means over {draws} draws. Seed {first['seed']}."
    )


def notes(data: Data) -> list[str]:
    first = data["runs"][0]
    full, others = first["rows"][0], first["rows"][1:]
    dense = [row for row in others if row["num_params"] == full["num_params"]]
    small = [row for row in others if row["num_params"] < full["num_params"]]
    best = {run["label"]: min(run["rows"][1:], key=lambda row: float(row["perplexity"])) for run in data["runs"]}
    return [
        f"Speeds are medians of {first['turns']} turns on one CPU thread, in which the models of a run follow each "
        "other; 'speed' is relative to the full model of the same process. A window has "
        f"{first['window']} tokens; tokens are generated with a KV cache.",
        f"Perplexity of random tickets is a mean over {max(row['draws'] for row in others)} draws "
        f"(seed {first['seed']}); their size and speed are the first draw's.",
        f"Of {first['label']}, full-size models with zeros ({_names(dense)}) have {_share(dense, full, 'nonzero')} of "
        f"the nonzero parameters, but {_share(dense, full, 'file_bytes')} of the file and {_fast(dense, full)} of the "
        f"speed; gzip finds the zeros: {_share(dense, full, 'gzip_bytes')} of the full model's.",
        f"Smaller dense models ({_names(small)}) have {_share(small, full, 'file_bytes')} of the file and "
        f"{_fast(small, full)} of the speed.",
        "Best perplexity at this sparsity: "
        + "; ".join(f"{_label(run, best[run['label']])} {_best_text(best[run['label']])}" for run in data["runs"])
        + ".",
    ]


def _names(rows: list[Data]) -> str:
    return ", ".join(LABELS[row["method"]] for row in rows)


def _fast(rows: list[Data], full: Data) -> str:
    """Of the full model's windows per second."""
    return _range([_speed(full, row, WINDOW) for row in rows])


def _best_text(row: Data) -> str:
    return f"{perplexity_text(row['perplexity'])} with a file of {row['file_bytes'] / 1e6:,.2f} MB"


def _share(rows: list[Data], full: Data, key: str) -> str:
    return _range([row[key] / full[key] for row in rows])


def _range(values: list[float]) -> str:
    """'67 %', or '65 to 70 %' where they differ."""
    least, most = (f"{100 * value:.0f}" for value in (min(values), max(values)))
    return f"{least} %" if least == most else f"{least} to {most} %"


REAL_COST = Experiment(
    "realcost", "Size and CPU speed of pruned models", tasks, collect, tables, {"realcost": draw}, reading, notes
)

"""What pruned models really weigh and how fast they really are, beside their perplexity: zeros save neither."""

from __future__ import annotations

import gzip
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from safetensors.torch import load_file
from torch import nn

from twist_fl.blueprint.drawing import full_blueprint
from twist_fl.experiments import runs
from twist_fl.experiments.experiment import Data, Experiment
from twist_fl.experiments.lab import Lab, Task, measure
from twist_fl.model.subnet import fold_scale
from twist_fl.pruning.methods import Pruned, prune, pruned_perplexities, save_pruned
from twist_fl.report.cells import Cells
from twist_fl.report.compare import perplexity_text
from twist_fl.report.glossary import LOWER
from twist_fl.report.plots import COLORS, MARKERS, NO_LINE, PERPLEXITY, figure_of, scale_perplexity
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.trained import TrainedRun
from twist_fl.system.errors import ConfigError
from twist_fl.tickets.edge_client import decode
from twist_fl.training.job import Job

SIZE = 4
CALIBRATION = 128
"""Windows."""
DDP_METHODS = ["sparsegpt", "wanda", "magnitude", "block", "se"]
TURNS = 31
NEW_TOKENS = 16
FULL = "full"
_WINDOW, _TOKEN = "ms_per_window", "ms_per_token"
_LABELS = {
    FULL: "full model",
    "sparsegpt": "SparseGPT",
    "wanda": "Wanda",
    "magnitude": "magnitude",
    "block": "Block Prune",
    "se": "random ticket",
}


@dataclass(frozen=True)
class Size:
    """Of an exported model's weights, read from its file."""

    num_params: int
    nonzero: int
    file_bytes: int
    gzip_bytes: int


def weigh(job: Job, pruned: Pruned) -> Size:
    """Export the model as it would be shipped, and count what is in the file."""
    with tempfile.TemporaryDirectory(prefix="twist-cost-") as scratch:
        folder = Path(scratch) / "model"
        save_pruned(job, pruned, folder)
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file).values()
        return Size(
            sum(tensor.numel() for tensor in tensors),
            sum(int(tensor.count_nonzero()) for tensor in tensors),
            file.stat().st_size,
            _gzip_bytes(file),
        )


def _gzip_bytes(file: Path) -> int:
    """Of `gzip -6`: piece by piece, so that a large file needs no memory."""
    packed = file.with_suffix(".gz")
    with file.open("rb") as source, gzip.open(packed, "wb", compresslevel=6) as target:
        while piece := source.read(1 << 20):
            target.write(piece)
    return packed.stat().st_size


def dense_model(job: Job, pruned: Pruned) -> nn.Module:
    """The model that is shipped, on the CPU: the scale is in its weights, so that no hook takes time."""
    blueprint = pruned.blueprint or full_blueprint(job.layout)
    params = {name: tensor.cpu() for name, tensor in pruned.params.items()}
    folded = fold_scale(job.layout, params, blueprint, pruned.scale)
    model: nn.Module = job.models(device="cpu", scale="none").load(blueprint, folded)
    return model.eval()


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def speeds(
    models: Mapping[str, nn.Module], window: torch.Tensor, new_tokens: int, turns: int
) -> dict[str, dict[str, float]]:
    """Median ms per window (1, T) and per generated token of each model, which take turns; one thread.

    The first turn warms up and does not count.
    """
    forward: dict[str, list[float]] = {name: [] for name in models}
    token: dict[str, list[float]] = {name: [] for name in models}
    with _one_thread(), torch.inference_mode():
        for turn in range(turns + 1):
            for name, model in models.items():
                start = time.perf_counter()
                model(window, use_cache=False)
                seconds = time.perf_counter() - start
                steps = decode(model, window[:, :-new_tokens], new_tokens)[1]
                if turn:
                    forward[name].append(1e3 * seconds)
                    token[name].append(1e3 * median(steps))
    return {name: {_WINDOW: median(forward[name]), _TOKEN: median(token[name])} for name in models}


def real_cost(
    folder: RunFolder, *, methods: list[str], size: int, draws: int, calibration: int, new_tokens: int, turns: int
) -> dict[str, Any]:
    """Size, CPU speed and perplexity of a run's full model and of what each method makes of it at `size` blocks.

    Raises ConfigError unless a window is longer than `new_tokens`.
    """
    run = TrainedRun(folder.path)
    job, state = run.job, run.state
    config, windows = job.config, run.test
    if new_tokens >= config.data.window:
        raise ConfigError(f"new_tokens={new_tokens} leaves no prompt: a window has data.window={config.data.window}")
    job = replace(job, division=replace(job.division, setting="both"))
    full = Pruned(FULL, size, size, dict(state.params), None, "none", 0.0, 0, 0)
    made = {
        method: prune(job, state.params, method, size, seed=config.seed, calibration_windows=calibration)
        for method in methods
    }
    models = {FULL: full} | made
    prompt = torch.tensor(windows[:1], dtype=torch.int64)
    timed = speeds({name: dense_model(job, each) for name, each in models.items()}, prompt, new_tokens, turns)
    rows = []
    for name, each in models.items():
        values = pruned_perplexities(job, each, windows, config.eval.batch_size, draws=draws, seed=config.seed)
        rows.append({"method": name, **vars(weigh(job, each)), **timed[name], "perplexity": fmean(values),
                     "draws": len(values)})  # fmt: skip
    return {"rows": rows, "size": size, "of": next(iter(made.values())).of, "seed": config.seed, "turns": turns,
            "window": config.data.window, "threads": 1}  # fmt: skip


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
            speeds = [(f"{row[key]:.2f}", f"{_speed(full, row, key):.2f}x") for key in (_WINDOW, _TOKEN)]
            times.append([_label(run, row), *speeds[0], *speeds[1]])
    first = data["runs"][0]
    pruned = f"Pruned to {first['size']}/{first['of']} of every divided layer"
    stored, fast = f"{pruned}: test perplexity ({LOWER}), and what is stored", f"{pruned}: speed on one CPU thread"
    return {stored: sizes, fast: times}


def _label(run: Data, row: Data) -> str:
    return f"{run['label']}: {_LABELS[row['method']]}"


def _speed(full: Data, row: Data, key: str) -> float:
    """How many times as fast as the full model of the same process."""
    return float(full[key] / row[key])


def draw(data: Data) -> Figure:
    """Perplexity against the file's size, and against the speed, both relative to the run's full model.

    The marker is the method; colour, and how the marker is filled, is the run.
    """
    methods = {method: {"marker": marker} for method, marker in zip(_LABELS, MARKERS, strict=False)}
    found: dict[str, dict[str, Any]] = {
        run["label"]: {"color": color, "fillstyle": filled, "markerfacecoloralt": "white"}
        for run, color, filled in zip(data["runs"], COLORS, ("none", "left", "full"), strict=False)
    }
    legend: dict[str, dict[str, Any]] = {label: look | NO_LINE | {"marker": "o"} for label, look in found.items()}
    legend |= {_LABELS[method]: look | NO_LINE | {"color": "#606060"} for method, look in methods.items()}
    figure = figure_of(3.2, legend)
    axes = figure.subplots(1, 2, sharey=True)
    for run in data["runs"]:
        full = run["rows"][0]
        for row in run["rows"]:
            look = found[run["label"]] | methods[row["method"]] | NO_LINE
            places = (row["file_bytes"] / full["file_bytes"], _speed(full, row, _WINDOW))
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
    return ", ".join(_LABELS[row["method"]] for row in rows)


def _fast(rows: list[Data], full: Data) -> str:
    """Of the full model's windows per second."""
    return _range([_speed(full, row, _WINDOW) for row in rows])


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

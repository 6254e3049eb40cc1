"""The demo: TwIST as the paper uses it, on a trained model, beside plain training and pruning. Minutes on a CPU."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console

from twist_fl.cli.commands import AGAINST_PRUNING, DEPLOYED, deploy, report, rows_in
from twist_fl.cli.progress import waits_for
from twist_fl.cli.tickets import generate
from twist_fl.cli.train import train_or_go_on
from twist_fl.config.schema import load_config
from twist_fl.report.cells import Cells, terminal_table
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.start import model_name
from twist_fl.system.files import write_json

MODEL = files("twist_fl.model") / "demo_model"
"""The trained model that the demo starts from; benchmarks/demo_model.py makes it."""
ALIKE = ("eval.tickets=10",)
OURS = (
    *("data.window=128", "blueprint.undivided_first=0", "blueprint.undivided_last=1", "eval.batch_size=32"),
    *("train.batch_size=4", "train.lr=4e-3", "train.rounds=70"),
)
"""What suits our tiny model. The learning rate was the best of those tried for FedAvg before it had an outer momentum;
for TwIST, 1.5 x it is better for the smallest tickets alone. The first layer is divided too: in a model this young, a
random ticket of plain training misses most what it finds there."""
OF_A_USER = ("train.rounds=10",)
"""For a larger model, of which a round takes long."""
RUNS = {"twist": (), "fedavg": ("algorithm=fedavg",)}
"""Of the preset `finetune`, whose outer momentum and beta2 together are better for FedAvg, too."""
PRUNERS = {"magnitude": "FedAvg, then magnitude", "sparsegpt": "FedAvg, then SparseGPT"}
SHARES = ("1/2", "1/4")
_CALIBRATION, _DRAWS, _NEW_TOKENS, _TURNS = 128, 10, 16, 15
_PROMPT = "The module"


def demo(
    console: Console, directory: Path | None, overrides: list[str], model: str | None = None, prompt: str = _PROMPT
) -> None:
    """TwIST and FedAvg from one trained model on one budget; FedAvg's pruned; three devices; one table, one report.

    What is already there is used: a finished run as it is, an interrupted one from its checkpoint. `model`: a folder, a
    name on the hub or a GGUF file instead of ours; devices allow for shares of its size.
    """
    if model is None:
        directory, start = directory or Path("runs/demo"), [f"model.pretrained={MODEL}", *OURS]
    else:
        directory = directory or Path(f"runs/demo-{model_name(model)}")
        start = [f"model.pretrained={model}", *OF_A_USER]
    words = [*start, *ALIKE, *overrides]
    configs = {name: load_config("finetune", [*words, *own, f"dir={directory / name}"]) for name, own in RUNS.items()}
    console.print(
        "TwIST against FedAvg and pruning: the same trained model, text and batches. Ctrl-C is safe: run it again to "
        "go on."
    )
    runs = [train_or_go_on(console, config, RunFolder(directory / name)) for name, config in configs.items()]
    found = rows_in(runs, DEPLOYED)
    devices = found or deploy(console, str(runs[0].path), [])
    from twist_fl.report.tables import against_pruning_table, device_tables

    _show(console, device_tables(found))
    for device in devices:
        console.print(f"{device['name']} writes: ", end="", style="bold")
        generate(console, str(runs[0].path / "deployed" / device["name"]), prompt, 40, 0.7, None, 0)
    _show(console, against_pruning_table(rows_in(runs, AGAINST_PRUNING) or _against_pruning(console, *runs)))
    report(console, [run.path for run in runs], directory / "report.html")


def _show(console: Console, tables: dict[str, Cells]) -> None:
    for caption, cells in tables.items():
        console.print(terminal_table(caption, cells))


def _against_pruning(console: Console, twist: RunFolder, fedavg: RunFolder) -> list[dict[str, Any]]:
    """The full models, and smaller ones of two sizes: tickets, and FedAvg's model pruned to as many weights."""
    waits_for(console, "pruning FedAvg's model, and measuring all of them")
    from twist_fl.config.sizes import TicketSize, ticket_size
    from twist_fl.experiments.weighing import rows_of, whole
    from twist_fl.pruning.methods import Pruned, prune
    from twist_fl.runs.trained import TrainedRun

    ours, rival = TrainedRun(twist.path), TrainedRun(fedavg.path)
    layout, division, seed = ours.job.layout, ours.job.division, ours.job.config.seed
    full, *sizes = (ticket_size(layout, division, share) for share in ("1/1", *SHARES))
    windows = min(_CALIBRATION, len(rival.job.corpus.train))

    def pruned(run: TrainedRun, method: str, size: TicketSize) -> Pruned:
        return prune(run.job, run.state.params, method, size, seed=seed, calibration_windows=windows)

    models = [("FedAvg", rival, whole(rival.state.params, full))]
    models += [(label, rival, pruned(rival, method, size)) for method, label in PRUNERS.items() for size in sizes]
    models += [("TwIST", ours, whole(ours.state.params, full))]
    models += [("TwIST's tickets", ours, pruned(ours, "se", size)) for size in sizes]
    measured = rows_of(
        [(run.job, model) for _, run, model in models], ours.test, draws=_DRAWS, new_tokens=_NEW_TOKENS, turns=_TURNS
    )
    window = ours.job.config.data.window
    rows = [{"label": label, "window": window, **row} for (label, _, _), row in zip(models, measured, strict=True)]
    write_json(rows, twist.path / AGAINST_PRUNING)
    return rows

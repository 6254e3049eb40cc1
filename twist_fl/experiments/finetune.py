"""TwIST as the paper uses it, on a trained model: what it costs the full model, and what its tickets gain.

The paper fine-tunes a pretrained GPT-2. Here the pretrained model is the lab's own DDP run, and every method goes on
from its weights for as many batches again, at a lower learning rate.
"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from twist_fl.experiments import runs
from twist_fl.experiments.experiment import Data, Experiment
from twist_fl.experiments.lab import Lab, Task, measure, train
from twist_fl.experiments.recipe import COMMON, SHUFFLED
from twist_fl.experiments.shared import about, caption, of_perplexity
from twist_fl.experiments.table1 import CALIBRATION_WINDOWS
from twist_fl.report.cells import Cells
from twist_fl.report.compare import spread_text
from twist_fl.report.glossary import LOWER
from twist_fl.report.plots import PERPLEXITY, figure_of, looks_of, scale_perplexity
from twist_fl.system.units import perplexity_text, size_label

LR = "train.lr=3e-4"
BOTH = "blueprint.setting=both"
BEFORE, DDP = "before: DDP", "DDP"
TRAINED = {
    DDP: train("finetune-ddp", "algorithm=ddp", LR, after=runs.DDP),
    "FedAvg": train("finetune-fedavg", "algorithm=fedavg", LR, after=runs.DDP),
    "TwIST, 6/12": train("finetune-both-6", BOTH, "blueprint.num_sub=6", LR, after=runs.DDP),
    "TwIST, 4/12": train("finetune-both-4", BOTH, "blueprint.num_sub=4", LR, after=runs.DDP),
    "TwIST, 12, 6, 4, 3, two common": train("finetune-mixed", BOTH, COMMON, *SHUFFLED, LR, after=runs.DDP),
}
PRUNERS = {"DDP, then SparseGPT": "sparsegpt", "DDP, then Wanda": "wanda"}


def _prune(method: str, size: int) -> Task:
    settings = {"method": method, "setting": "both", "size": size, "calibration": CALIBRATION_WINDOWS}
    return measure("prune", TRAINED[DDP], **settings)


def tasks(lab: Lab) -> list[Task]:
    pruned = [_prune(method, size) for method in PRUNERS.values() for size in lab.base.eval.sizes]
    return [runs.DDP, *TRAINED.values(), *pruned]


def collect(lab: Lab) -> Data:
    trained = {BEFORE: runs.DDP, **TRAINED}
    rows = {label: _row(lab, task) for label, task in trained.items()}
    for label, method in PRUNERS.items():
        found = {size: lab.result(_prune(method, size))["perplexity"] for size in lab.base.eval.sizes}
        tickets = [{**ticket, "mean": found[ticket["size"]], "std": None} for ticket in rows[DDP]["tickets"]]
        rows[label] = {"full": rows[DDP]["full"], "tickets": tickets}
    return {"about": about(lab), "rows": rows}


def _row(lab: Lab, task: Task) -> Data:
    results, keep = lab.result(task), ("size", "of", "mean", "std")
    return {"full": results["full"], "tickets": [{key: each[key] for key in keep} for each in results["tickets"]]}


def tables(data: Data) -> dict[str, Cells]:
    rows: dict[str, Data] = data["rows"]
    header = ["fine-tuned by", "full model", *map(size_label, rows[BEFORE]["tickets"])]
    lines = [[name, perplexity_text(row["full"]), *map(_text, row["tickets"])] for name, row in rows.items()]
    return {
        caption(of_perplexity("after fine-tuning, setting both; of tickets mean ± deviation"), data): [header, *lines]
    }


def _text(ticket: dict[str, Any]) -> str:
    if ticket["std"] is None:
        return perplexity_text(ticket["mean"])
    return spread_text(ticket["mean"], ticket["std"])


def draw(data: Data) -> Figure:
    """Perplexity against the blocks kept, down from the full model."""
    rows: dict[str, Data] = data["rows"]
    looks = looks_of(rows)
    figure = figure_of(3.2, looks)
    axes = figure.subplots()
    sizes = rows[BEFORE]["tickets"]
    kept = [sizes[0]["of"], *(ticket["size"] for ticket in sizes)]
    lines = {name: [row["full"], *(ticket["mean"] for ticket in row["tickets"])] for name, row in rows.items()}
    for name, values in lines.items():
        axes.plot(kept, values, **looks[name], linewidth=1.4, markersize=5)
    axes.set_xticks(kept)
    axes.set_xlabel(f"blocks kept of {kept[0]}")
    axes.set_ylabel(PERPLEXITY)
    scale_perplexity(axes, [value for values in lines.values() for value in values])
    return figure


def reading(data: Data) -> str:
    return (
        f"Perplexity: {LOWER}. "
        f"Points are means over {data['about']['tickets']} random tickets, pruned models are one a size. "
        f"Seed {data['about']['seed']}."
    )


def notes(data: Data) -> list[str]:
    rows: dict[str, Data] = data["rows"]
    dense = rows[DDP]["full"]
    found = [
        f"All start from the lab's DDP run and train as many batches again, with {LR} and new optimiser state.",
        *(
            f"{name}: the full model has {rows[name]['full'] / dense:.3f} of fine-tuned DDP's perplexity."
            for name in TRAINED
            if name != DDP
        ),
    ]
    for i, ticket in enumerate(rows[BEFORE]["tickets"]):
        values = {name: row["tickets"][i]["mean"] for name, row in rows.items()}
        best = min(values, key=lambda name: values[name])
        found.append(f"{size_label(ticket)}: best is '{best}' with {perplexity_text(values[best])}.")
    return found


FINETUNE = Experiment(
    "finetune", "Fine-tuning a trained model", tasks, collect, tables, {"finetune": draw}, reading, notes
)

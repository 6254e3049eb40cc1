"""TwIST as the paper uses it, on a trained model: what it costs the full model, and what its tickets gain.

The paper fine-tunes a pretrained GPT-2. Here the pretrained model is the lab's own DDP run, and every method goes on
from its weights for as many batches again, with one schedule and with as many tries of the learning rate as its best
needs to lie between two others or at the end that the method itself sets.
"""

from __future__ import annotations

from math import log

from matplotlib.figure import Figure

from twist_fl.experiments import runs
from twist_fl.experiments.experiment import Data, Experiment
from twist_fl.experiments.lab import Lab, Task, measure, train
from twist_fl.experiments.recipe import COMMON, SHUFFLED, spread_cell
from twist_fl.experiments.shared import about, by_size, caption, of_perplexity
from twist_fl.experiments.table1 import CALIBRATION_WINDOWS
from twist_fl.report.cells import Cells
from twist_fl.report.glossary import LOWER
from twist_fl.system.units import perplexity_text, size_label

SCHEDULE = ("train.schedule=wsd", "train.warmup=0.05", "train.decay=0.3", "train.clip_norm=1.0", "train.beta2=0.95")
BOTH = "blueprint.setting=both"
BEFORE, DDP, TWIST = "before: DDP", "DDP", "TwIST, 12, 6, 4, 3, two common"
METHODS = {
    DDP: ("ddp", ("algorithm=ddp",), ("5e-4", "1e-3", "2e-3", "4e-3", "8e-3")),
    "FedAvg": ("fedavg", ("algorithm=fedavg",), ("2e-3", "4e-3", "8e-3")),
    "TwIST, 6/12 (the paper)": ("both-6", (BOTH, "blueprint.num_sub=6"), ("2e-3", "4e-3")),
    TWIST: ("mixed", (BOTH, COMMON, *SHUFFLED), ("2e-3", "4e-3", "8e-3")),
}
"""Each method's name of a run, its settings and the learning rates tried."""
PRUNERS = {"SparseGPT": "sparsegpt", "Wanda": "wanda", "Block Prune": "block", "magnitude": "magnitude"}


def task_of(name: str, lr: str, *overrides: str) -> Task:
    return train(f"finetune-{name}", *_last_of_each(*SCHEDULE, f"train.lr={lr}", *overrides), after=runs.DDP)


def _last_of_each(*overrides: str) -> list[str]:
    return [f"{key}={value}" for key, value in dict(word.split("=", 1) for word in overrides).items()]


def tried(method: str) -> dict[str, Task]:
    """The method's runs by learning rate."""
    name, overrides, rates = METHODS[method]
    return {lr: task_of(f"{name}-{lr}", lr, *overrides) for lr in rates}


def pruned(lab: Lab, run: Task, method: str) -> list[Task]:
    settings = {"method": method, "setting": "both", "calibration": CALIBRATION_WINDOWS}
    return [measure("prune", run, **settings, size=size) for size in lab.base.eval.sizes]


def tasks(lab: Lab) -> list[Task]:
    trained = [run for method in reversed(METHODS) for run in tried(method).values()]
    zeroed = [task for run in tried(DDP).values() for method in PRUNERS.values() for task in pruned(lab, run, method)]
    return [runs.DDP, *trained, *zeroed]


def collect(lab: Lab) -> Data:
    rows: list[Data] = [{"method": BEFORE, "lr": None} | row_of(lab, runs.DDP)]
    rows += [{"method": method, "lr": lr} | row_of(lab, run) for method in METHODS for lr, run in tried(method).items()]
    for label, method in PRUNERS.items():
        for lr, run in tried(DDP).items():
            row = pruned_row(lab, row_of(lab, run), pruned(lab, run, method))
            rows.append({"method": f"DDP, then {label}", "lr": lr} | row)
    return {"about": about(lab), "rows": rows}


def row_of(lab: Lab, task: Task) -> Data:
    results, keep = lab.result(task), ("size", "of", "mean", "std")
    return {"full": results["full"], "tickets": [{key: each[key] for key in keep} for each in results["tickets"]]}


def pruned_row(lab: Lab, dense: Data, tasks: list[Task]) -> Data:
    """The model of the row `dense` as the tasks have pruned it, one a size."""
    found = [lab.result(task)["perplexity"] for task in tasks]
    sizes = [{key: ticket[key] for key in ("size", "of")} for ticket in dense["tickets"]]
    tickets = [size | {"mean": mean, "std": None} for size, mean in zip(sizes, found, strict=True)]
    return {"full": dense["full"], "tickets": tickets}


def best(data: Data) -> dict[str, Data]:
    """By method: of TwIST one checkpoint, with the least mean logarithm of perplexity over the full model and all
    ticket sizes; every rival has, in each column, the best of its learning rates."""
    found: dict[str, Data] = {}
    for method in dict.fromkeys(row["method"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["method"] == method]
        if method.startswith("TwIST"):
            found[method] = min(rows, key=lambda row: sum(map(log, values_of(row))))
        else:
            columns = zip(*(row["tickets"] for row in rows), strict=True)
            tickets = [min(column, key=lambda ticket: float(ticket["mean"])) for column in columns]
            found[method] = {"lr": None, "full": min(row["full"] for row in rows), "tickets": tickets}
    return found


def values_of(row: Data) -> list[float]:
    return [row["full"], *(ticket["mean"] for ticket in row["tickets"])]


def cells_of(row: Data) -> list[str]:
    tickets = [(ticket["mean"], ticket["std"]) for ticket in row["tickets"]]
    return [perplexity_text(row["full"]), *map(spread_cell, tickets)]


def tables(data: Data) -> dict[str, Cells]:
    sizes = ["full model", *map(size_label, data["rows"][0]["tickets"])]
    bests = [[name, *cells_of(row)] for name, row in best(data).items()]
    every = [[f"{row['method']}, {row['lr']}", *cells_of(row)] for row in data["rows"] if row["lr"]]
    return {
        caption(of_perplexity("after fine-tuning, setting both; of tickets mean ± deviation"), data): [
            ["fine-tuned by", *sizes],
            *bests,
        ],
        of_perplexity("every learning rate"): [["method, learning rate", *sizes], *every],
    }


def draw(data: Data) -> Figure:
    """Perplexity against the blocks kept, down from the full model."""
    rows = best(data)
    lines = {name: [(value, None) for value in values_of(row)] for name, row in rows.items()}
    return by_size(lines, rows[BEFORE]["tickets"])


def reading(data: Data) -> str:
    return (
        f"Perplexity: {LOWER}. "
        f"Points are means over {data['about']['tickets']} random tickets, pruned models are one a size. "
        f"Seed {data['about']['seed']}."
    )


def notes(data: Data) -> list[str]:
    rows = best(data)
    dense = rows[DDP]["full"]
    found = [
        "All start from the lab's DDP run and train as many batches again, with new optimiser state and "
        f"{', '.join(SCHEDULE)}.",
        "Each line of TwIST is one checkpoint: the learning rate with the least geometric mean over the line. Of each "
        "rival every number is the best of its learning rates, so a line may be several checkpoints.",
        *(
            f"{name}, learning rate {rows[name]['lr']}: the full model has {rows[name]['full'] / dense:.3f} of "
            "fine-tuned DDP's perplexity."
            for name in METHODS
            if name.startswith("TwIST")
        ),
    ]
    for i, ticket in enumerate(rows[BEFORE]["tickets"]):
        values = {name: row["tickets"][i]["mean"] for name, row in rows.items()}
        first = min(values, key=lambda name: values[name])
        found.append(
            f"{size_label(ticket)}: best is '{first}' with {perplexity_text(values[first])}; the last TwIST has "
            f"{values[TWIST] / dense:.3f} of DDP's full model and {values[TWIST] / values['DDP, then SparseGPT']:.3f} "
            "of DDP, then SparseGPT."
        )
    return found


FINETUNE = Experiment(
    "finetune", "Fine-tuning a trained model", tasks, collect, tables, {"finetune": draw}, reading, notes
)

"""The best recipe found, the preset `finetune`'s, beside DDP of the same budget, pruned, over seeds."""

from __future__ import annotations

from itertools import chain

from matplotlib.figure import Figure

from twist_fl.experiments import finetune, runs
from twist_fl.experiments.experiment import Data, Experiment
from twist_fl.experiments.finetune import BOTH, PRUNERS, pruned, pruned_row, row_of, task_of
from twist_fl.experiments.lab import Lab, Task
from twist_fl.experiments.recipe import SHUFFLED, over_seeds, seeded, spread_cell
from twist_fl.experiments.search import MOMENTUM, TOGETHER
from twist_fl.experiments.shared import about, by_size, caption, of_perplexity
from twist_fl.report.cells import Cells
from twist_fl.report.glossary import LOWER
from twist_fl.system.units import size_label

LR = "4e-3"
BEFORE, TWIST, DDP, FEDAVG = "before: DDP", "TwIST", "DDP", "FedAvg"
METHODS = {
    TWIST: task_of("best-twist", LR, BOTH, *SHUFFLED, *TOGETHER, "blueprint.rewire=true"),
    DDP: finetune.tried(finetune.DDP)[LR],
    FEDAVG: task_of("best-fedavg", LR, "algorithm=fedavg", *MOMENTUM, "train.beta2=0.99"),
}


def _runs(lab: Lab, label: str) -> list[Task]:
    """Over seeds what is claimed and its rival; FedAvg, which says what averaging alone costs, once."""
    return seeded(lab, METHODS[label])[: 1 if label == FEDAVG else None]


def _pruned(lab: Lab) -> dict[str, list[list[Task]]]:
    """By pruner: of each run of DDP one task a size. Only SparseGPT prunes every seed's."""
    dense = _runs(lab, DDP)
    return {
        name: [pruned(lab, run, method) for run in (dense if method == "sparsegpt" else dense[:1])]
        for name, method in PRUNERS.items()
    }


def tasks(lab: Lab) -> list[Task]:
    trained = [run for label in METHODS for run in _runs(lab, label)]
    return [runs.DDP, *trained, *(task for each in _pruned(lab).values() for task in chain(*each))]


def collect(lab: Lab) -> Data:
    rows = {BEFORE: [row_of(lab, runs.DDP)]}
    rows |= {label: [row_of(lab, run) for run in _runs(lab, label)] for label in METHODS}
    for pruner, each in _pruned(lab).items():
        rows[f"{DDP}, then {pruner}"] = [pruned_row(lab, row, task) for row, task in zip(rows[DDP], each, strict=False)]
    return {"about": about(lab), "rows": rows}


def tables(data: Data) -> dict[str, Cells]:
    sizes = ["full model", *map(size_label, data["rows"][TWIST][0]["tickets"])]
    lines = [[label, *map(spread_cell, over_seeds(rows))] for label, rows in data["rows"].items()]
    return {
        caption(of_perplexity(f"after fine-tuning at {LR}, setting both"), data): [["fine-tuned by", *sizes], *lines]
    }


def draw(data: Data) -> Figure:
    """Perplexity against the blocks kept, down from the full model; a bar is the deviation over seeds."""
    lines = {label: over_seeds(rows) for label, rows in data["rows"].items() if label != BEFORE}
    return by_size(lines, data["rows"][TWIST][0]["tickets"])


def reading(data: Data) -> str:
    first, last = data["about"]["seed"], data["about"]["seed"] + len(data["rows"][TWIST]) - 1
    return (
        f"Perplexity: {LOWER}. Random tickets are a mean over {data['about']['tickets']} draws a size, pruned models "
        "one a size. "
        + (f"± is the deviation over seeds {first} to {last}; lines without it are" if last > first else "All are")
        + f" of seed {first}."
    )


def notes(data: Data) -> list[str]:
    rows = {label: over_seeds(each) for label, each in data["rows"].items()}
    sparse = rows[f"{DDP}, then SparseGPT"]
    of_dense = ", ".join(f"{mean / rows[DDP][0][0]:.3f}" for mean, _ in rows[TWIST])
    averaged = rows[FEDAVG][0][0] / rows[DDP][0][0]
    of_sparse = ", ".join(f"{mean / sparse[i][0]:.2f}" for i, (mean, _) in enumerate(rows[TWIST]) if i)
    return [
        "All start from the lab's DDP run and train as many batches again, with new optimiser state and "
        f"{', '.join(finetune.SCHEDULE)}; TwIST and FedAvg with {', '.join(MOMENTUM)}, train.beta2=0.99.",
        "TwIST: workers of 12, 6, 4 and 3 blocks, three common, so that its ticket of 3/12 is always those three.",
        f"TwIST has {of_dense} of DDP's full model, from left to right; {of_sparse} of SparseGPT's model of each size.",
        f"FedAvg's full model has {averaged:.3f} of DDP's: the price of averaging once a round instead of after "
        "every batch. What TwIST's has beyond it is the price of the division.",
    ]


BEST = Experiment("best", "The best recipe beside pruning", tasks, collect, tables, {"best": draw}, reading, notes)

"""The best recipe found, the preset `finetune`'s, beside rivals with the same budget, over seeds."""

from __future__ import annotations

from itertools import chain

from matplotlib.figure import Figure

from twist_fl.experiments import finetune, runs
from twist_fl.experiments.experiment import Data, Experiment
from twist_fl.experiments.finetune import BOTH, PRUNERS, pruned, pruned_row, row_of, task_of
from twist_fl.experiments.lab import Lab, Task
from twist_fl.experiments.recipe import SHUFFLED, over_seeds, seeded, seeds_text
from twist_fl.experiments.search import MOMENTUM, TOGETHER
from twist_fl.experiments.shared import about, by_size, caption, of_perplexity
from twist_fl.report.cells import Cells
from twist_fl.report.glossary import LOWER
from twist_fl.system.units import size_label

LR = "4e-3"
TWIST, OFTEN, FEDAVG, DDP = "TwIST, rewired", "TwIST, rewired, averaged every 5 batches", "FedAvg", "DDP"
SLOWER = "DDP, 2e-3"
_REWIRED = (BOTH, *SHUFFLED, *TOGETHER, "blueprint.rewire=true")


def _repeated(lab: Lab) -> dict[str, Task]:
    """What is trained with every seed, at LR."""
    often = ["train.interval=5"]
    if rounds := lab.base.train.rounds:  # else the budget is epochs, whatever the interval
        often.append(f"train.rounds={rounds * lab.base.train.interval // 5}")
    return {
        TWIST: task_of("best-twist", LR, *_REWIRED),
        DDP: finetune.tried(finetune.DDP)[LR],
        OFTEN: task_of("best-often", LR, *_REWIRED, *often),
        FEDAVG: task_of("best-fedavg", LR, "algorithm=fedavg", *MOMENTUM, "train.beta2=0.99"),
    }


def _slower() -> Task:
    return finetune.tried(finetune.DDP)["2e-3"]


def _runs(lab: Lab) -> dict[str, list[Task]]:
    return {label: seeded(lab, task) for label, task in _repeated(lab).items()} | {SLOWER: [_slower()]}


def _pruned(lab: Lab, label: str) -> dict[str, list[list[Task]]]:
    """By pruner: of each run of DDP that `label` names, one task a size. Only SparseGPT prunes every seed's."""
    dense = _runs(lab)[label]
    return {
        name: [pruned(lab, run, method) for run in (dense if method == "sparsegpt" else dense[:1])]
        for name, method in PRUNERS.items()
    }


def tasks(lab: Lab) -> list[Task]:
    pruning = [task for label in (DDP, SLOWER) for each in _pruned(lab, label).values() for task in chain(*each)]
    return [runs.DDP, *chain(*_runs(lab).values()), *pruning]


def collect(lab: Lab) -> Data:
    rows = {"before: DDP": [row_of(lab, runs.DDP)]}
    rows |= {label: [row_of(lab, task) for task in each] for label, each in _runs(lab).items()}
    for label in (DDP, SLOWER):
        for pruner, each in _pruned(lab, label).items():
            found = [pruned_row(lab, row, task) for row, task in zip(rows[label], each, strict=False)]
            rows[f"{label}, then {pruner}"] = found
    return {"about": about(lab), "rows": rows}


def _seeds(data: Data) -> int:
    return len(data["rows"][TWIST])


def tables(data: Data) -> dict[str, Cells]:
    sizes = ["full model", *map(size_label, data["rows"][TWIST][0]["tickets"])]
    lines = [[label, *map(seeds_text, over_seeds(rows))] for label, rows in data["rows"].items()]
    return {
        caption(of_perplexity(f"after fine-tuning at {LR}, setting both"), data): [["fine-tuned by", *sizes], *lines]
    }


def draw(data: Data) -> Figure:
    """Perplexity against the blocks kept, down from the full model; a bar is the deviation over seeds."""
    names = (TWIST, OFTEN, FEDAVG, DDP, *(f"{DDP}, then {pruner}" for pruner in PRUNERS))
    return by_size({name: over_seeds(data["rows"][name]) for name in names}, data["rows"][TWIST][0]["tickets"])


def reading(data: Data) -> str:
    first, last = data["about"]["seed"], data["about"]["seed"] + _seeds(data) - 1
    return (
        f"Perplexity: {LOWER}. Random tickets are a mean over {data['about']['tickets']} draws a size, pruned models "
        "one a size. "
        + (f"± is the deviation over seeds {first} to {last}; lines without it are" if last > first else "All are")
        + f" of seed {first}."
    )


def notes(data: Data) -> list[str]:
    rows = {label: over_seeds(each) for label, each in data["rows"].items()}
    dense = min(rows[label][0][0] for label in (DDP, SLOWER))
    sparse = [min(rows[f"{label}, then SparseGPT"][i][0] for label in (DDP, SLOWER)) for i in range(len(rows[DDP]))]
    found = [
        "All start from the lab's DDP run and train as many batches again, with new optimiser state and "
        f"{', '.join(finetune.SCHEDULE)}; TwIST and FedAvg with {', '.join(MOMENTUM)}, train.beta2=0.99.",
        "TwIST: workers of 12, 6, 4 and 3 blocks, three common, so that its ticket of 3/12 is always those three.",
    ]
    for label in (TWIST, OFTEN, FEDAVG):
        of_dense = ", ".join(f"{mean / dense:.3f}" for mean, _ in rows[label])
        of_sparse = ", ".join(f"{mean / sparse[i]:.2f}" for i, (mean, _) in enumerate(rows[label]) if i)
        found.append(
            f"{label}: {of_dense} of the better DDP's full model, from left to right; {of_sparse} of SparseGPT's "
            "better model of each size."
        )
    return found


BEST = Experiment("best", "The best recipe beside its rivals", tasks, collect, tables, {"best": draw}, reading, notes)

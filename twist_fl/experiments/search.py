"""The search for a recipe of fine-tuning: one change at a time, then the best over seeds beside rivals."""

from __future__ import annotations

from itertools import chain
from math import exp, log
from statistics import fmean

from matplotlib.figure import Figure

from twist_fl.experiments import finetune, runs
from twist_fl.experiments.experiment import Data, Experiment
from twist_fl.experiments.finetune import DDP, TWIST, pruned, row_of, task_of
from twist_fl.experiments.lab import Lab, Task
from twist_fl.experiments.recipe import NUM_SEEDS, PRUNED, over_seeds, seeded
from twist_fl.experiments.shared import about, by_size, caption, of_perplexity
from twist_fl.report.cells import Cells
from twist_fl.report.compare import spread_text
from twist_fl.report.glossary import LOWER
from twist_fl.system.units import perplexity_text, size_label

LR = "4e-3"
INTERVAL = ("train.interval=5", "train.rounds=300")
DISTILLED = ("train.distill=0.5",)
MOMENTUM = ("aggregate.optimizer=momentum", "aggregate.momentum=0.3")
TOGETHER = (*MOMENTUM, "blueprint.common=3", "blueprint.scale=none", "train.beta2=0.99")
"""Whatever is better alone and costs no exchange."""
BEST = "these four, interval 5"
CHANGES = {
    "interval 5": ("interval-5", INTERVAL),
    "distillation of a half": ("distill", DISTILLED),
    "interval 5, distillation of a half": ("interval-5-distill", (*INTERVAL, *DISTILLED)),
    "workers of 12, 8, 4, 3": ("larger", ("blueprint.num_sub=12,8,4,3",)),
    "three common": ("common-3", ("blueprint.common=3",)),
    "outer Nesterov, 0.7 and 0.9": ("nesterov", (
        "aggregate.optimizer=nesterov", "aggregate.server_lr=0.7", "aggregate.momentum=0.9",
    )),
    "outer momentum, 1 and 0.3": ("momentum", MOMENTUM),
    "scale linear": ("linear", ("blueprint.scale=linear",)),
    "no scale": ("unscaled", ("blueprint.scale=none",)),
    "beta2 0.99": ("beta2", ("train.beta2=0.99",)),
    "moments factored": ("factored", ("train.optimizer_state=factored",)),
    "constant 3e-4, no clipping, beta2 0.999": ("constant", (
        "train.schedule=constant", "train.warmup=0", "train.clip_norm=null", "train.beta2=0.999", "train.lr=3e-4",
    )),
    "cosine": ("cosine", ("train.schedule=cosine",)),
    "momentum, three common, no scale, beta2 0.99": ("together", TOGETHER),
    BEST: ("together-interval-5", (*TOGETHER, *INTERVAL)),
}  # fmt: skip
"""What is changed of TWIST at LR, one thing, or what was better alone together: the run's name, and the settings."""
PLAIN, FEDAVG = "as it is", "FedAvg"


def changed(label: str) -> Task:
    name, overrides, _ = finetune.METHODS[TWIST]
    change, more = CHANGES[label]
    return task_of(f"{name}-{change}", LR, *overrides, *more)


def _repeated(lab: Lab) -> dict[str, list[Task]]:
    """What is claimed, over seeds: all start from the same model."""
    found = {f"TwIST, {PLAIN}": finetune.tried(TWIST)[LR], f"TwIST, {BEST}": changed(BEST)}
    found |= {method: finetune.tried(method)[LR] for method in (FEDAVG, DDP)}
    return {label: seeded(lab, task) for label, task in found.items()}


def tasks(lab: Lab) -> list[Task]:
    screened = [changed(label) for label in CHANGES]
    repeated = _repeated(lab)
    pruning = [task for run in repeated[DDP] for task in pruned(lab, run, "sparsegpt")]
    every = [runs.DDP, finetune.tried(TWIST)[LR], *screened, *chain.from_iterable(repeated.values()), *pruning]
    return list({task.name: task for task in every}.values())


def collect(lab: Lab) -> Data:
    rows = {PLAIN: finetune.tried(TWIST)[LR]} | {label: changed(label) for label in CHANGES}
    repeated = _repeated(lab)
    seeds = {label: [row_of(lab, task) for task in each] for label, each in repeated.items()}
    seeds[PRUNED] = []
    for dense, task in zip(seeds[DDP], repeated[DDP], strict=True):
        means = [lab.result(each)["perplexity"] for each in pruned(lab, task, "sparsegpt")]
        tickets = [ticket | {"mean": mean} for ticket, mean in zip(dense["tickets"], means, strict=True)]
        seeds[PRUNED].append({"full": dense["full"], "tickets": tickets})
    return {"about": about(lab), "changes": {label: row_of(lab, task) for label, task in rows.items()}, "seeds": seeds}


def _mean(row: Data) -> float:
    """Geometric, over the full model and all ticket sizes."""
    return exp(fmean(map(log, finetune.values_of(row))))


def tables(data: Data) -> dict[str, Cells]:
    sizes = ["full model", *map(size_label, data["changes"][PLAIN]["tickets"])]
    lines = [[label, *map(perplexity_text, finetune.values_of(row))] for label, row in data["changes"].items()]
    seeds = [[label, *(spread_text(*each) for each in over_seeds(rows))] for label, rows in data["seeds"].items()]
    return {
        caption(of_perplexity(f"TwIST at {LR}, what is changed, means of random tickets"), data): [
            ["changed", *sizes],
            *lines,
        ],
        of_perplexity(f"mean ± deviation over {NUM_SEEDS} seeds, all at {LR}"): [["fine-tuned by", *sizes], *seeds],
    }


def draw(data: Data) -> Figure:
    """Perplexity against the blocks kept, down from the full model; a bar is the deviation over seeds."""
    found = {label: over_seeds(rows) for label, rows in data["seeds"].items()}
    return by_size(found, data["changes"][PLAIN]["tickets"])


def reading(data: Data) -> str:
    return (
        f"Perplexity: {LOWER}. Means over fine-tuning the same model with seed "
        f"{', '.join(str(data['about']['seed'] + i) for i in range(NUM_SEEDS))}, bars are their deviation; "
        f"each run's tickets are a mean over {data['about']['tickets']} random ones, pruned models are one a size."
    )


def notes(data: Data) -> list[str]:
    means = {label: _mean(row) for label, row in data["changes"].items()}
    order = sorted(means, key=lambda label: means[label])
    found = [
        "Best to worst, by the geometric mean over the line: "
        + ", ".join(f"{label} ({perplexity_text(means[label])})" for label in order)
        + ".",
        f"All start from the lab's DDP run, with {', '.join(finetune.SCHEDULE)}, and train as many batches.",
    ]
    repeated = {label: over_seeds(rows) for label, rows in data["seeds"].items()}
    ours, dense, sparse = (repeated[label] for label in (f"TwIST, {BEST}", DDP, PRUNED))
    shares = [f"{mean / dense[0][0]:.2f}" for mean, _ in ours]
    found.append(
        f"TwIST, {BEST}: {', '.join(shares)} of fine-tuned DDP's full model, from left to right; "
        f"{', '.join(f'{ours[i][0] / sparse[i][0]:.2f}' for i in range(1, len(ours)))} of {PRUNED}, size by size."
    )
    return found


SEARCH = Experiment(
    "search", "The search for a recipe, fine-tuning", tasks, collect, tables, {"search": draw}, reading, notes
)

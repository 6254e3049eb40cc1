"""The search for a recipe of fine-tuning: one change at a time, then what was better alone together."""

from __future__ import annotations

from math import exp, log
from statistics import fmean

from twist_fl.experiments import finetune, runs
from twist_fl.experiments.experiment import Data, Experiment
from twist_fl.experiments.finetune import TWIST, row_of, task_of
from twist_fl.experiments.lab import Lab, Task
from twist_fl.experiments.shared import about, caption, of_perplexity
from twist_fl.report.cells import Cells
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
PLAIN = "as it is"


def changed(label: str) -> Task:
    name, overrides, _ = finetune.METHODS[TWIST]
    change, more = CHANGES[label]
    return task_of(f"{name}-{change}", LR, *overrides, *more)


def _runs() -> dict[str, Task]:
    return {PLAIN: finetune.tried(TWIST)[LR]} | {label: changed(label) for label in CHANGES}


def tasks(lab: Lab) -> list[Task]:
    return [runs.DDP, *_runs().values()]


def collect(lab: Lab) -> Data:
    return {"about": about(lab), "changes": {label: row_of(lab, task) for label, task in _runs().items()}}


def _mean(row: Data) -> float:
    """Geometric, over the full model and all ticket sizes."""
    return exp(fmean(map(log, finetune.values_of(row))))


def tables(data: Data) -> dict[str, Cells]:
    sizes = ["full model", *map(size_label, data["changes"][PLAIN]["tickets"])]
    lines = [[label, *map(perplexity_text, finetune.values_of(row))] for label, row in data["changes"].items()]
    return {
        caption(of_perplexity(f"TwIST at {LR}, what is changed, means of random tickets"), data): [
            ["changed", *sizes],
            *lines,
        ]
    }


def notes(data: Data) -> list[str]:
    means = {label: _mean(row) for label, row in data["changes"].items()}
    order = sorted(means, key=lambda label: means[label])
    return [
        "Best to worst, by the geometric mean over the line: "
        + ", ".join(f"{label} ({perplexity_text(means[label])})" for label in order)
        + ".",
        f"All start from the lab's DDP run, with {', '.join(finetune.SCHEDULE)}, and train as many batches.",
        reading(data),
    ]


def reading(data: Data) -> str:
    about = data["about"]
    return f"Perplexity: {LOWER}. Means over {about['tickets']} random tickets a size; seed {about['seed']}."


SEARCH = Experiment("search", "The search for a recipe, fine-tuning", tasks, collect, tables, {}, reading, notes)

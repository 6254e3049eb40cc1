"""The time of a training step of each shape in Table 2 and Figure 6, measured side by side."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import Any, get_args

import torch

from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.blueprint.division import Setting
from twist_fl.blueprint.drawing import draw_ticket, full_blueprint
from twist_fl.config.sizes import ticket_size
from twist_fl.experiments.lab import measure
from twist_fl.experiments.runs import DDP
from twist_fl.experiments.shared import BLOCKS, label
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.provenance import provenance
from twist_fl.training.interval import train_interval
from twist_fl.training.job import Job

SIZES = (10, 8, 6, 4)
FULL = f"DDP {label(BLOCKS)}"
MEASURE = measure("latency", DDP, settings=list(get_args(Setting)), sizes=list(SIZES), turns=9)


def shape_name(setting: Setting, size: int) -> str:
    """As the paper names it: `both 4/12`."""
    return f"{setting} {label(size)}"


def latency(folder: RunFolder, *, settings: list[Setting], sizes: list[int], turns: int) -> dict[str, Any]:
    """Milliseconds per batch of the run's model, whole and with each of `sizes` blocks a divided layer in each setting.

    One process trains an interval of each shape in turn, `turns` times after one that does not count; the median is
    what other work on the machine disturbs least. Only the run's job is needed, not its weights.
    """
    job = folder.job()
    config, state, models = job.config, job.initial_state(), job.models(compile=job.config.train.compile)
    batches = _batches(job)
    shapes = {FULL: full_blueprint(job.layout)}
    shapes |= {shape_name(setting, size): subnet(job, setting, size) for setting in settings for size in sizes}
    seconds: dict[str, list[float]] = {name: [] for name in shapes}
    threads = torch.get_num_threads()
    torch.set_num_threads(config.train.threads or 1)
    try:
        for _ in range(turns + 1):
            for name, blueprint in shapes.items():
                model = models.load_sliced(blueprint, state)
                started = perf_counter()
                train_interval(model, batches, config.train, config.seed)
                seconds[name].append((perf_counter() - started) / len(batches))
    finally:
        torch.set_num_threads(threads)
    return {
        "ms": {name: 1000 * median(found[1:]) for name, found in seconds.items()},
        "turns": turns,
        "batches": len(batches),
        "tokens": batches[0].numel(),
        "device": job.device(),
        "threads": config.train.threads or 1,
        "num_params": job.layout.num_params(),
        "hardware": provenance()["hardware"],
    }


def _batches(job: Job) -> list[torch.Tensor]:
    """Worker 0's first interval, on the device."""
    shard, windows = job.shard(0), job.corpus.train
    return [
        torch.tensor(windows[shard.batch(cursor)], dtype=torch.int64, device=job.device())  # (B, T)
        for cursor in range(job.config.train.interval)
    ]


def subnet(job: Job, setting: Setting, size: int) -> Blueprint:
    """With `size` blocks in each divided layer."""
    division = replace(job.division, setting=setting, ticket_policy="random")
    return draw_ticket(job.layout, division, ticket_size(job.layout, division, size).num_sub, job.config.seed, 0)

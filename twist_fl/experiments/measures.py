"""Measurements of finished runs, each a function of one run's folder whose result is plain JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from twist_fl.blueprint.division import Setting
from twist_fl.config.sizes import ticket_size
from twist_fl.experiments.ablation import ordered_tickets
from twist_fl.experiments.failure import failure
from twist_fl.experiments.latency import latency
from twist_fl.experiments.theorem import norms
from twist_fl.experiments.weighing import real_cost
from twist_fl.pruning import methods
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.trained import TrainedRun
from twist_fl.tickets import evaluate


def tickets(folder: RunFolder, *, setting: Setting, sizes: list[int], draws: int) -> dict[str, Any]:
    """Perplexity of `draws` random tickets a size, and of the full model; the run may have divided anything else."""
    run = TrainedRun(folder.path)
    job, state = run.job, run.state
    division = replace(job.division, setting=setting)
    windows, config, models = run.test, job.config, run.models
    chosen = [ticket_size(job.layout, division, size) for size in sizes]
    rows = [
        evaluate.ticket_distribution(
            models,
            state.params,
            division,
            size.num_sub,
            windows,
            tickets=draws,
            seed=config.seed,
            batch_size=config.eval.batch_size,
        ).summary()
        | size.row
        for size in chosen
    ]
    return {"tickets": rows}


def prune(folder: RunFolder, *, method: str, setting: Setting, size: int, calibration: int) -> dict[str, Any]:
    """Perplexity of the run's model pruned after training, and what that cost."""
    run = TrainedRun(folder.path)
    job, state = run.job, run.state
    job = replace(job, division=replace(job.division, setting=setting))
    windows, config = run.test, job.config
    pruned = methods.prune(job, state.params, method, size, seed=config.seed, calibration_windows=calibration)
    return {
        "perplexity": methods.pruned_perplexity(job, pruned, windows, config.eval.batch_size),
        "seconds": pruned.seconds,
        "peak_bytes": pruned.peak_bytes,
        "calibration_tokens": pruned.calibration_tokens,
        "notes": pruned.notes,
    }


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    "tickets": tickets,
    "prune": prune,
    "latency": latency,
    "failure": failure,
    "norms": norms,
    "real_cost": real_cost,
    "ordered_tickets": ordered_tickets,
}

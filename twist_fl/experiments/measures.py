"""Measurements of finished runs, each a function of one run's folder whose result is plain JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from twist_fl import rounds
from twist_fl.blueprint.division import Setting
from twist_fl.blueprint.drawing import full_blueprint
from twist_fl.config.shares import Size
from twist_fl.config.sizes import ticket_size
from twist_fl.data.corpus import Windows
from twist_fl.experiments.ablation import ordered_tickets
from twist_fl.experiments.failure import failure
from twist_fl.experiments.latency import latency
from twist_fl.experiments.theorem import norms
from twist_fl.experiments.weighing import real_cost
from twist_fl.model.subnet import State
from twist_fl.pruning import methods
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.trained import TrainedRun
from twist_fl.tickets import evaluate
from twist_fl.training.job import Job


def tickets(folder: RunFolder, *, setting: Setting, sizes: list[Size], draws: int) -> dict[str, Any]:
    """Perplexity of `draws` random tickets a size; the run may have divided anything else."""
    run = TrainedRun(folder.path)
    job = replace(run.job, division=replace(run.job.division, setting=setting))
    return {"tickets": _tickets(job, run.state.params, run.test, sizes, draws)}


def start(folder: RunFolder, *, sizes: list[Size], draws: int) -> dict[str, Any]:
    """What a run started from: perplexity of the full model and of `draws` random tickets a size."""
    job = folder.job()
    params, windows = rounds.start(job).params, job.corpus.test[: job.config.eval.max_windows]
    full = full_blueprint(job.layout)
    perplexity = evaluate.subnet_perplexity(job.models(), params, [full], windows, job.config.eval.batch_size)
    return {"full": perplexity, "tickets": _tickets(job, params, windows, sizes, draws)}


def _tickets(job: Job, params: State, windows: Windows, sizes: list[Size], draws: int) -> list[dict[str, Any]]:
    models, eval_ = job.models(), job.config.eval
    found = []
    for size in (ticket_size(job.layout, job.division, wanted) for wanted in sizes):
        drawn = evaluate.ticket_distribution(
            models,
            params,
            job.division,
            size.num_sub,
            windows,
            tickets=draws,
            seed=job.config.seed,
            batch_size=eval_.batch_size,
        )
        found.append(drawn.summary() | size.row)
    return found


def prune(folder: RunFolder, *, method: str, setting: Setting, size: Size, calibration: int) -> dict[str, Any]:
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
    "start": start,
    "prune": prune,
    "latency": latency,
    "failure": failure,
    "norms": norms,
    "real_cost": real_cost,
    "ordered_tickets": ordered_tickets,
}

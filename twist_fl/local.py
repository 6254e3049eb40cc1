"""A whole run in this process, without Flower: the same weights, log and checkpoints, and no bytes on any wire.

Experiments train many small runs this way, one beside the other: `python -m twist_fl.local RUN_FOLDER`.
"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from twist_fl.checkpoint import RunFolder
from twist_fl.checks import LaunchError
from twist_fl.keeper import Keeper
from twist_fl.results import final_results
from twist_fl.rounds import plan, start, twist_round
from twist_fl.shelf import MomentShelf, moment_folder
from twist_fl.worker import Worker


def train_local(folder: RunFolder) -> None:
    """Train the run in `folder` from its newest checkpoint (or from the start) to its results.

    Raises LaunchError when no worker's reply counts: the model has diverged.
    """
    job = folder.job()
    with folder.lock("server"), folder.failures_logged():
        state = folder.load() or start(job)
        keeper = Keeper(job, folder, state.round)
        keeper.begin(state)
        torch.set_num_threads(job.config.train.threads or 1)
        worker = Worker(job, MomentShelf(moment_folder(job.run_id)))
        while state.round < job.num_rounds:
            began, tasks = time.perf_counter(), plan(job, state)
            state, report = twist_round(job, state, [worker] * len(tasks), keeper.saved_round)
            seconds = time.perf_counter() - began
            folder.log(
                "round",
                **asdict(report),
                seconds=seconds,
                bytes_down={},
                bytes_up={},
                predicted_bytes=keeper.predicted_bytes(tasks),
                predicted_peak_bytes=keeper.predicted_peak_bytes(tasks),
            )
            if not report.answered:
                raise LaunchError(f"round {report.round}: no worker's reply counted: {report.dropped}")
            keeper.end_of_round(state, tasks)
        final_results(job, state, folder, job.config.train.threads)
    shutil.rmtree(moment_folder(job.run_id), ignore_errors=True)
    folder.log("done", round=state.round)


if __name__ == "__main__":
    train_local(RunFolder(Path(sys.argv[1])))

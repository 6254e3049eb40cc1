"""A whole run in this process, without Flower: the same weights, log and checkpoints, and no bytes on any wire.

`twist-fl train --local` trains so, and experiments train many small runs, one beside the other. A run may be begun
here and go on through Flower, or the other way round.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch

from twist_fl.rounds import plan, start, twist_round
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.recorder import Keeper
from twist_fl.runs.results import final_results
from twist_fl.system.cores import usable_cores
from twist_fl.system.errors import LaunchError
from twist_fl.training.client_state import MomentShelf, keep_moments, moment_folder, take_moments
from twist_fl.training.worker import Worker

Events = list[dict[str, Any]]


class Here:
    """Looks like the process of a run to who follows it."""

    ended = False

    def poll(self) -> int | None:
        return 0 if self.ended else None


def train_here(folder: RunFolder, follow: Callable[[Here], Events]) -> Events:
    """`train_local` on all cores between rounds, while another thread shows what `follow` sees; its events.

    Raises LaunchError with the reason if the run fails.
    """
    here = Here()
    with folder.lock("command"), ThreadPoolExecutor(1) as pool:
        following = pool.submit(follow, here)
        try:
            train_local(folder, usable_cores())
        except RuntimeError as error:
            raise LaunchError(f"the run failed: {error}") from error
        except OSError as error:
            raise LaunchError(f"the run failed: {error}; {folder.way_on}") from error
        finally:
            here.ended = True
        return following.result()


def train_local(folder: RunFolder, eval_threads: int | None = None) -> None:
    """Train the run in `folder` from its newest checkpoint (or from the start) to its results.

    Workers train one after another, each on train.threads: with as many, a simulation gives the same bits.
    `eval_threads` (default: train.threads) evaluate. Raises LaunchError when no worker's reply counts: the model has
    diverged.
    """
    job = folder.job()
    worker_threads = job.config.train.threads or 1
    eval_threads = eval_threads or worker_threads
    with folder.lock("server"), folder.failures_logged():
        take_moments(job.run_id, folder.moments_folder)
        state = folder.load() or start(job)
        keeper = Keeper(job, folder)
        keeper.begin(state)
        worker = Worker(job, MomentShelf(moment_folder(job.run_id)))
        while state.round < job.num_rounds:
            torch.set_num_threads(worker_threads)
            began, tasks = time.perf_counter(), plan(job, state)
            before = state
            state, report = twist_round(job, before, [worker] * job.config.train.workers, keeper.keep_from)
            seconds = time.perf_counter() - began
            if worker.device == "cpu":
                report.peak_bytes = 0  # the server's state is in the same process: a worker's own is not known
            folder.log(
                "round",
                **asdict(report),
                seconds=seconds,
                bytes_down={},
                bytes_up={},
                **keeper.predicted(tasks),
            )
            if not report.answered:
                keeper.keep(before)
                raise LaunchError(f"round {report.round}: no worker's reply counted: {report.dropped}; {folder.way_on}")
            torch.set_num_threads(eval_threads)
            keeper.end_of_round(state, tasks)
        final_results(job, state, folder, eval_threads)
        keep_moments(job.run_id, folder.moments_folder, folder.saved_rounds)
    folder.log("done", round=state.round)

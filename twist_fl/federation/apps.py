"""What the two Flower apps do, beside the strategy: open a run, train it to its results, ship its tickets."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from flwr.serverapp import Grid

from twist_fl.config.schema import load_config
from twist_fl.data.node_text import Place
from twist_fl.federation.strategy import TwistStrategy
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.events import Event
from twist_fl.runs.results import final_results
from twist_fl.runs.resume import go_on
from twist_fl.runs.story import Follower, lines, warnings
from twist_fl.runs.trackers import check_trackers
from twist_fl.system.errors import ConfigError
from twist_fl.training.client_state import MomentShelf, keep_moments, moment_folder, take_moments
from twist_fl.training.job import Job, job_from_json, make_job
from twist_fl.training.worker import Worker


def wait_for(file: str) -> None:
    """Until the command that has started us, and stops us if it fails, has made the run's folder."""
    while file and not Path(file).exists():
        time.sleep(0.05)


@contextmanager
def mistakes_in_words() -> Iterator[None]:
    """What the user can mend is one line of `flwr run --stream`; Flower would print a page of traceback before it."""
    try:
        yield
    except ConfigError as error:
        print(f"twist_fl: error: {error}", flush=True)
        logging.getLogger("flwr").addFilter(_without_traceback)
        raise error from None


def _without_traceback(record: logging.LogRecord) -> bool:
    if record.exc_info and isinstance(record.exc_info[1], ConfigError):
        record.exc_info = (*record.exc_info[:2], None)
    return True


def open_run(run_dir: str, preset: str, overrides: str) -> tuple[RunFolder, Job]:
    """The run in `run_dir` if there is one, to go on with and longer if overrides say so; else a new one from both.

    Raises ConfigError. The working folder of a Flower app is not the user's: `run_dir` must be absolute.
    """
    if run_dir and not Path(run_dir).expanduser().is_absolute():
        raise ConfigError(f"run-dir={run_dir!r} must be an absolute path: Flower runs the app in another folder")
    if run_dir and RunFolder(Path(run_dir)).job_file.is_file():
        folder = RunFolder(Path(run_dir))
        continued = go_on(folder, _words(overrides))
        print(f"twist_fl: {continued.note}\n" * bool(continued.note), end="", flush=True)
        return folder, continued.job
    config = load_config(preset or None, _words(overrides), strict=True)
    if config.dir and not Path(config.dir).expanduser().is_absolute():
        raise ConfigError(f"dir={config.dir!r} must be an absolute path: Flower runs the app in another folder")
    check_trackers(config)
    folder = RunFolder(Path(run_dir or config.dir or f"~/twist_fl_runs/{config.name}"))
    job = make_job(config)
    folder.create(job)
    return folder, job


def _words(overrides: str) -> list[str]:
    try:
        return shlex.split(overrides)
    except ValueError as error:
        raise ConfigError(f"overrides={overrides!r} cannot be split into words ({error}): close its quotes") from error


def train_run(grid: Grid, folder: RunFolder, job: Job) -> None:
    """Train to the end and write results.json; what goes wrong is in the run's log as well as in Flower's."""
    if folder.finished(job.num_rounds):
        print(f"{folder.path} is finished; it can be trained longer, with overrides=train.rounds=...", flush=True)
        return
    print(f"run folder {folder.path}", flush=True)
    folder.event_log.listeners.append(speaker(folder.events_file))
    with folder.lock("server"), folder.failures_logged():
        take_moments(job.run_id, folder.moments_folder)
        state = TwistStrategy(job, folder).run(grid)
        final_results(job, state, folder)
        keep_moments(job.run_id, folder.moments_folder, folder.saved_rounds)
    folder.log("done", round=state.round)
    print(f"finished; results in {folder.results_file}", flush=True)


def speaker(log: Path) -> Callable[[Event], None]:
    """A listener that prints what is new in `log`: on standard output, which `flwr run --stream` shows."""
    follower = Follower(log)
    for _ in follower.look():
        pass  # what is there already is not news

    def say(_: Event) -> None:
        for event in follower.look():
            for text in (*warnings(event), *lines(event, follower.story)):
                print(text, flush=True)

    return say


@lru_cache(maxsize=2)
def worker_for(job_json: str, node: Place | None = None) -> Worker:
    """This process's worker for a job, kept warm between rounds: keyed by content, not by node; if the node has its own
    text, by that, too."""
    job = job_from_json(job_json, node)
    return Worker(job, MomentShelf(moment_folder(job.run_id)))

"""Runs are trained, and go on, on a console; or without one, for `twist_fl.train`."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from twist_fl.cli.progress import RunProgress, waits_for
from twist_fl.config.schema import Config
from twist_fl.federation.simulation import Simulation, flower_run, why_it_ended
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.story import results_text
from twist_fl.runs.trackers import check_trackers
from twist_fl.runs.trained import TrainedRun
from twist_fl.system.children import clear_stale
from twist_fl.system.errors import LaunchError
from twist_fl.system.files import read_json
from twist_fl.training.device import check_simulation, check_training

if TYPE_CHECKING:
    from twist_fl.training.job import Job


def train(config: Config, *, flower: bool = False, show: bool = True) -> TrainedRun:
    """Train `config` to its end, in this process or with `flower` in a private simulation on this machine.

    The same weights either way. What is in its folder (`config.dir`, else runs/NAME) is used: a finished run as it is,
    an interrupted one from its newest checkpoint. `show`: progress on standard output. Raises ConfigError if it cannot
    work or the folder holds a run with other settings, LaunchError if it fails; what is trained until then is saved.
    """
    folder = RunFolder(Path(config.dir or f"runs/{config.name}"))
    return TrainedRun(train_or_go_on(Console(markup=False, quiet=not show), config, folder, not flower).path)


def train_or_go_on(console: Console, config: Config, folder: RunFolder, local: bool = False) -> RunFolder:
    """A run that is there goes on. Raises ConfigError if it was begun with other settings."""
    if not folder.job_file.is_file():
        return train_new(console, config, local)
    from twist_fl.runs.results import refuse_other_settings

    refuse_other_settings(folder, config)
    return resume(console, folder.path, local=local)


def train_new(console: Console, config: Config, local: bool = False) -> RunFolder:
    """A new run, refused before anything starts if it cannot work."""
    check_trackers(config)
    folder = RunFolder(Path(config.dir or f"runs/{config.name}"))
    folder.refuse_second_run()
    config.dir = str(folder.path)
    new = not folder.path.exists()
    try:
        with _simulation(console, folder, config, local) as simulation:
            waits_for(console, "loading torch, reading the model's configuration and the text")
            (check_training if local else check_simulation)(config)
            from twist_fl.training.job import make_job

            job = make_job(config)
            folder.create(job)
            _run(console, folder, job, simulation)
    finally:
        if new and not folder.job_file.is_file():
            shutil.rmtree(folder.path, ignore_errors=True)
    return folder


@contextmanager
def _simulation(console: Console, folder: RunFolder, config: Config, local: bool) -> Iterator[Simulation | None]:
    """It starts while this process loads torch and reads the text: begin it as soon as the run's folder is ready.

    An interruption is reported when the simulation has ended: until then it may save another round.
    """
    try:
        if local:
            yield None
            return
        from twist_fl.training.job import clients

        with flower_run(folder, config, len(clients(config)), {"mode": "train"}) as simulation:
            yield simulation
    except KeyboardInterrupt:
        if folder.job_file.is_file():
            words = f"twist-fl train {'--local ' * local}--resume {shlex.quote(str(folder.path))}"
            round_ = folder.saved_round
            saved = f"round {round_} is saved; go on after it" if round_ else "nothing is saved yet; begin again"
            console.print(f"\ninterrupted; {saved} with:  {words}", soft_wrap=True)
        raise


def resume(console: Console, path: Path, overrides: Sequence[str] = (), local: bool = False) -> RunFolder:
    """Go on with a run from its newest checkpoint; with other settings, as far as it stays the same run."""
    folder = RunFolder(path)
    folder.check_run()
    from twist_fl.runs.resume import go_on

    with folder.lock("command"):
        clear_stale(folder.path)  # a server that outlived its command would be at work
        continued = go_on(folder, overrides)
    job = continued.job
    if continued.finished:
        console.print(_what_next(folder), soft_wrap=True)
        return folder
    where = f"goes on after round {continued.round} of {job.num_rounds}"
    if not continued.round:
        where = f"nothing is saved, begins again with round 1 of {job.num_rounds}"
    if continued.round == job.num_rounds:
        where, local = f"all {job.num_rounds} rounds are trained; making its results", True
    with _simulation(console, folder, job.config, local) as simulation:
        waits_for(console, "loading torch, checking the run's text")
        job.open_texts()
        (check_training if local else check_simulation)(job.config)
        if continued.note:
            console.print(continued.note, style="yellow", soft_wrap=True)
        console.print(f"{folder.path.name}: {where}", soft_wrap=True, highlight=False)
        _run(console, folder, job, simulation)
    return folder


def _what_next(folder: RunFolder) -> str:
    """Of a finished run: that it is finished, and what can be done with it."""
    results, run = read_json(folder.results_file, dict), shlex.quote(str(folder.path))
    return (
        f"{folder.path} is finished: {results['rounds']} rounds, {results_text(results)}. Next:\n"
        f"  twist-fl train --resume {run} train.rounds={2 * _budget(results)}   trains it longer\n"
        f"  twist-fl tickets {run}   draws other tickets\n"
        f"  twist-fl deploy {run}   ships some to devices\n"
        f"  twist-fl report {run}   shows all in one page"
    )


def _budget(results: dict[str, Any]) -> int:
    """Intervals trained, as train.rounds counts."""
    train = results["config"]["train"]
    return int(-(-results["rounds"] // (train["interval"] if results["config"]["algorithm"] == "ddp" else 1)))


def _run(console: Console, folder: RunFolder, job: Job, simulation: Simulation | None) -> None:
    """In `simulation`, or without one in this process."""
    console.print(f"run folder {folder.path}", soft_wrap=True)
    config = job.config
    try:
        doing = "starting Flower and the workers" if simulation else "starting to train in this process"
        if config.blueprint.rewire and not folder.checkpoints():
            doing += ", scoring neurons and heads"
        with RunProgress(console, folder, len(config.eval.sizes) * config.eval.tickets, doing) as progress:
            if simulation is None:
                from twist_fl.runs.local import train_here

                events = train_here(folder, progress.follow)
            else:
                simulation.begin()
                events = progress.follow(simulation)
    finally:
        if simulation:
            waits_for(console, "stopping Flower and the workers")
    _require(events, "done", folder)
    results = read_json(folder.results_file, dict)
    console.print(f"{results_text(results)}; results in {folder.results_file}", soft_wrap=True)


def _require(events: list[dict[str, Any]], last: str, folder: RunFolder) -> None:
    failed = [event["error"] for event in events if event["event"] == "failed"]
    if failed:
        raise LaunchError(f"the run failed: {failed[0]}. Flower's log: {folder.path / 'flower.log'}")
    if not any(event["event"] == last for event in events):
        log = folder.path / "flower.log"
        why = why_it_ended(log)
        raise LaunchError(f"the run ended before its time{f': {why}' if why else ''}. Flower's log: {log}")

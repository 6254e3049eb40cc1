"""The commands that start runs through Flower, and their tables; `cli/app.py` holds their words."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from twist_fl.cli.progress import RunProgress, waits_for
from twist_fl.config.finding import finished_runs
from twist_fl.config.schema import Config, load_config
from twist_fl.federation.simulation import Simulation, flower_run, why_it_ended
from twist_fl.report.cells import markdown, terminal_table
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.story import results_text
from twist_fl.runs.trackers import check_trackers
from twist_fl.system.children import clear_stale
from twist_fl.system.errors import LaunchError
from twist_fl.system.files import read_json, write_text
from twist_fl.tickets.device_limits import parse_devices
from twist_fl.tickets.measuring import measuring
from twist_fl.training.device import check_simulation, check_training

if TYPE_CHECKING:
    from twist_fl.training.job import Job

INTERRUPTED = 130


def train(console: Console, preset: str, overrides: list[str], strict: bool = True, local: bool = False) -> RunFolder:
    """A new run from preset and overrides, refused before anything starts if it cannot work.

    `strict`: also if an override changes nothing. Overrides that several runs share may be for one of them.
    """
    config = load_config(preset, overrides, strict)
    check_trackers(config)
    folder = RunFolder(Path(config.dir or f"runs/{config.name}"))
    folder.refuse_second_run()
    config.dir = str(folder.path)
    new = not folder.path.exists()
    try:
        with _simulation(folder, config, local) as simulation:
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


def _simulation(folder: RunFolder, config: Config, local: bool) -> AbstractContextManager[Simulation | None]:
    """It starts while this process loads torch and reads the text: begin it as soon as the run's folder is ready."""
    if local:
        return nullcontext()
    from twist_fl.training.job import clients

    return flower_run(folder, config, len(clients(config)), {"mode": "train"})


def demo(console: Console, directory: Path, overrides: list[str]) -> None:
    """TwIST and FedAvg on one budget, three deployed devices, one table, one report.

    What is already there is used: a finished run as it is, an interrupted one from its checkpoint.
    """
    load_config("demo", overrides)  # refused before a word is said
    console.print(
        "TwIST against FedAvg: the same model, text, batches and optimiser. Ctrl-C is safe: run it again to go on."
    )
    from twist_fl.report.compare import comparison_table
    from twist_fl.report.tables import device_tables, run_tables
    from twist_fl.runs.results import refuse_other_settings

    runs = []
    for algorithm in ("twist", "fedavg"):
        path = directory / algorithm
        wanted = [*overrides, f"algorithm={algorithm}", f"dir={path}"]
        if not RunFolder(path).job_file.is_file():
            runs.append(train(console, "demo", wanted, strict=False))
            continue
        refuse_other_settings(RunFolder(path), load_config("demo", wanted))
        runs.append(resume(console, path))
    rows = _deployed(runs[0]) or deploy(console, runs[0].path, [])
    for caption, cells in (run_tables(comparison_table(runs)) | device_tables(rows)).items():
        console.print(terminal_table(caption, cells))
    report(console, [run.path for run in runs], directory / "report.html")


def _deployed(folder: RunFolder) -> list[dict[str, Any]]:
    file = folder.path / "deployed.json"
    rows: list[dict[str, Any]] = read_json(file, list) if file.is_file() else []
    return rows


def report(console: Console, paths: list[Path], out: Path) -> None:
    """The HTML report of finished runs, with the devices of the first one that deployed any."""
    runs = [RunFolder(path) for path in finished_runs(paths)]
    from twist_fl.report.page import write_report

    deployed = next((rows for run in runs if (rows := _deployed(run))), [])
    write_report(runs, out, deployed)
    console.print(f"report: {out.resolve()}")


def publish(console: Console, paths: list[Path], target: Path) -> None:
    """The runs' results and logs, tables in Markdown and the figures: all that a document quotes, in one folder."""
    from twist_fl.report.compare import comparison_table
    from twist_fl.report.page import figures
    from twist_fl.report.tables import device_tables, run_tables

    runs = [RunFolder(path) for path in finished_runs(paths)]
    for run in runs:
        copy = RunFolder(target / run.path.name)
        for name in ("results.json", "events.jsonl", "deployed.json"):
            if (run.path / name).is_file():
                write_text((run.path / name).read_text(), copy.path / name)
    deployed = next((rows for run in runs if (rows := _deployed(run))), [])
    tables = run_tables(comparison_table(runs)) | (device_tables(deployed) if deployed else {})
    parts = (f"**{caption}**\n\n{markdown(cells)}" for caption, cells in tables.items())
    write_text("\n".join(parts), target / "table.md")
    figures(runs, target)
    console.print(f"results, table.md and figures: {target.resolve()}")


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
    with _simulation(folder, job.config, local) as simulation:
        waits_for(console, "loading torch, checking the run's text")
        job.text.open()
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
        with RunProgress(console, folder, len(config.eval.sizes) * config.eval.tickets, doing) as progress:
            if simulation is None:
                from twist_fl.runs.local import train_here

                events = train_here(folder, progress.follow)
            else:
                simulation.begin()
                events = progress.follow(simulation)
    except KeyboardInterrupt:
        words = f"twist-fl train {'--local ' * (simulation is None)}--resume {shlex.quote(str(folder.path))}"
        round_ = folder.saved_round
        saved = f"round {round_} is saved; go on after it" if round_ else "nothing is saved yet; begin again"
        console.print(f"\ninterrupted; {saved} with:  {words}", soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
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


def deploy(console: Console, path: Path, devices: list[str], places: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Ship tickets to edge clients that this machine plays, and show what they measured."""
    folder = RunFolder(path)
    folder.check_run()
    parse_devices(devices)
    measuring(1)  # loads torch for the measurements while this process loads it to plan
    waits_for(console, "loading torch and the run")
    from twist_fl.federation.shipping import deploy_here, devices_of, plan_device
    from twist_fl.runs.trained import load_final

    folder, job, _ = load_final(path, places)
    wanted = devices_of(job, devices)
    for device in wanted:
        plan_device(job, device)  # refuses an impossible one before anything is written
    first = len(folder.events("device"))
    try:
        deploy_here(folder, job, wanted, partial(waits_for, console))
    except RuntimeError as error:
        raise LaunchError(f"deploying failed: {error}") from error
    finally:
        rows = folder.events("device")[first:]
        if rows:
            from twist_fl.report.tables import device_tables

            for caption, cells in device_tables(rows).items():
                console.print(terminal_table(caption, cells))
            console.print(
                f"dense models, for AutoModelForCausalLM.from_pretrained, in {folder.path / 'deployed'}",
                soft_wrap=True,
            )
    return rows

"""The commands that start runs through Flower, and their tables; `cli.py` holds their words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Column, Table

from twist_fl.checkpoint import RunFolder
from twist_fl.checks import LaunchError
from twist_fl.config import Config, load_config
from twist_fl.files import read_json, write_text
from twist_fl.finding import finished_runs
from twist_fl.job import make_job
from twist_fl.launch import flower_run
from twist_fl.look import load_final
from twist_fl.machine import check_simulation
from twist_fl.progress import RunProgress
from twist_fl.results import refuse_other_settings
from twist_fl.story import results_text
from twist_fl.trackers import check_trackers

INTERRUPTED = 130
DEVICES = "deployed devices, as they measured it"


def train(console: Console, preset: str, overrides: list[str], strict: bool = True) -> RunFolder:
    """A new run from preset and overrides, refused before anything starts if it cannot work.

    `strict`: also if an override changes nothing. Overrides that several runs share may be for one of them.
    """
    config = load_config(preset, overrides, strict)
    check_simulation(config)
    check_trackers(config)
    folder = RunFolder(Path(config.dir or f"runs/{config.name}"))
    folder.refuse_second_run()
    config.dir = str(folder.path)
    with console.status("reading text and model configuration"):
        job = make_job(config)
    folder.create(job)
    _run(console, folder, config)
    return folder


def demo(console: Console, directory: Path, overrides: list[str]) -> None:
    """TwIST and FedAvg on one budget, three deployed devices, one table, one report.

    What is already there is used: a finished run as it is, an interrupted one from its checkpoint.
    """
    load_config("demo", overrides)  # refused before a word is said
    console.print(
        "TwIST against FedAvg: the same model, text, batches and optimiser. Ctrl-C is safe: run it again to go on."
    )
    from twist_fl.compare import comparison_table, table_cells

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
    lines = table_cells(comparison_table(runs))
    console.print(terminal_table("test perplexity, tickets without fine-tuning: mean ± std", lines))
    console.print(terminal_table(DEVICES, device_cells(rows)))
    report(console, [run.path for run in runs], directory / "report.html")


def _deployed(folder: RunFolder) -> list[dict[str, Any]]:
    file = folder.path / "deployed.json"
    rows: list[dict[str, Any]] = read_json(file) if file.is_file() else []
    return rows


def report(console: Console, paths: list[Path], out: Path) -> None:
    """The HTML report of finished runs, with the devices of the first one that deployed any."""
    from twist_fl.report import write_report

    runs = [RunFolder(path) for path in finished_runs(paths)]
    deployed = next((rows for run in runs if (rows := _deployed(run))), [])
    write_report(runs, out, deployed)
    console.print(f"report: {out.resolve()}")


def publish(console: Console, paths: list[Path], target: Path) -> None:
    """The runs' results and logs, the table in Markdown and the figures: all that a document quotes, in one folder."""
    from twist_fl.compare import comparison_table, table_cells
    from twist_fl.report import figures

    runs = [RunFolder(path) for path in finished_runs(paths)]
    for run in runs:
        copy = RunFolder(target / run.path.name)
        for name in ("results.json", "events.jsonl", "deployed.json"):
            if (run.path / name).is_file():
                write_text((run.path / name).read_text(), copy.path / name)
    tables = [markdown(table_cells(comparison_table(runs)))]
    deployed = next((rows for run in runs if (rows := _deployed(run))), [])
    if deployed:
        tables.append(markdown(device_cells(deployed)))
    write_text("\n".join(tables), target / "table.md")
    figures(runs, target)
    console.print(f"results, table.md and figures: {target.resolve()}")


def markdown(lines: list[list[str]]) -> str:
    """A header and lines of text as a Markdown table, numbers to the right."""
    header, *rest = lines
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join("| " + " | ".join(line) + " |\n" for line in (header, rule, *rest))


def terminal_table(title: str, lines: list[list[str]]) -> Table:
    """A header and lines of text turned on their side, which fits a narrow terminal: a column per run or device."""
    first, *rest = zip(*lines, strict=True)
    table = Table(*first[:1], *(Column(name, justify="right") for name in first[1:]), title=title)
    for row in rest:
        table.add_row(*row)
    return table


def resume(console: Console, path: Path) -> RunFolder:
    """Go on with an interrupted run from its newest checkpoint."""
    folder = RunFolder(path)
    config = folder.job().config
    check_simulation(config)
    check_trackers(config)
    if folder.events("done"):
        console.print(f"{folder.path} is finished; nothing to do")
        return folder
    _run(console, folder, config)
    return folder


def _run(console: Console, folder: RunFolder, config: Config) -> None:
    console.print(f"run folder {folder.path}", soft_wrap=True)
    num_tickets = len(config.eval.sizes) * config.eval.tickets
    try:
        with (
            flower_run(folder, config, len(folder.job().clients), {"mode": "train"}) as process,
            RunProgress(console, folder, num_tickets) as progress,
        ):
            events = progress.follow(process)
    except KeyboardInterrupt:
        done = len(folder.checkpoints()) and int(folder.checkpoints()[-1].name.rpartition("-")[2])
        console.print(
            f"\ninterrupted; {done} rounds are saved. Go on with:  twist-fl train --resume {folder.path}",
            soft_wrap=True,
        )
        raise typer.Exit(INTERRUPTED) from None
    _require(events, "done", folder)
    results = read_json(folder.results_file)
    console.print(f"{results_text(results)}; results in {folder.results_file}", soft_wrap=True)


def _require(events: list[dict[str, Any]], last: str, folder: RunFolder) -> None:
    failed = [event["error"] for event in events if event["event"] == "failed"]
    if failed:
        raise LaunchError(f"the run failed: {failed[0]}. Flower's log: {folder.path / 'flower.log'}")
    if not any(event["event"] == last for event in events):
        log = folder.path / "flower.log"
        lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
        errors = [line.strip() for line in lines if "Error: " in line]
        reason = f": {errors[-1]}" if errors else ""
        raise LaunchError(f"the run ended before its time{reason}. Flower's log: {log}")


def deploy(console: Console, path: Path, devices: list[str]) -> list[dict[str, Any]]:
    """Ship tickets to simulated edge clients and show what they measured."""
    from twist_fl.ship import devices_of, plan_device

    folder, job, _ = load_final(path)
    for device in devices_of(job, devices):
        plan_device(job, device)  # refuses an impossible one before Flower starts
    settings = {"mode": "deploy", "devices": " ".join("".join(word.split()) for word in devices)}
    with (
        console.status("shipping tickets to simulated edge clients"),
        flower_run(folder, job.config, 1, settings) as run,
    ):
        events = RunProgress(console, folder, 0).follow(run)
    rows = [event for event in events if event["event"] == "device"]
    if rows:
        console.print(terminal_table(DEVICES, device_cells(rows)))
        console.print(
            f"dense models, for AutoModelForCausalLM.from_pretrained, in {folder.path / 'deployed'}", soft_wrap=True
        )
    _require(events, "deployed", folder)
    return rows


def device_cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    """What the devices measured, as text: a header, then a line per device."""
    from twist_fl.compare import limits_text

    header = ["device", "limits", "ticket", "parameters", "received MB", "perplexity", "ms/token", "peak MB"]
    lines = [
        [
            row["name"],
            limits_text(row),
            f"{row['size']}/{row['of']}",
            f"{row['num_params']:,}",
            f"{row['bytes_received'] / 1e6:.2f}",
            f"{row['perplexity']:.2f}",
            f"{row['ms_per_token']:.2f}",
            f"{row['peak_mb']:.1f}",
        ]
        for row in rows
    ]
    return [header, *lines]

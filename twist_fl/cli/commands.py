"""Reports, and tickets for devices; `cli/app.py` holds the words of these commands."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

from rich.console import Console

from twist_fl.cli.progress import waits_for
from twist_fl.config.finding import finished_runs
from twist_fl.config.schema import load_config
from twist_fl.report.cells import markdown, terminal_table, uncut_table
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.start import find_start
from twist_fl.system.errors import ConfigError, LaunchError
from twist_fl.system.files import read_json, write_text
from twist_fl.tickets.device_limits import parse_devices
from twist_fl.tickets.measuring import measuring

DEPLOYED, AGAINST_PRUNING = "deployed.json", "against_pruning.json"
"""What else a run's folder may hold for its report: its devices, and how its tickets stand beside pruned models."""


def rows_in(runs: Sequence[RunFolder], name: str) -> list[dict[str, Any]]:
    """Of the first of `runs` that has the file; else none."""
    file = next((run.path / name for run in runs if (run.path / name).is_file()), None)
    rows: list[dict[str, Any]] = read_json(file, list) if file else []
    return rows


def report(console: Console, paths: list[Path], out: Path) -> None:
    """The HTML report of finished runs, with the devices of the first one that deployed any."""
    runs = [RunFolder(path) for path in finished_runs(paths)]
    from twist_fl.report.page import write_report

    write_report(runs, out, rows_in(runs, DEPLOYED), rows_in(runs, AGAINST_PRUNING))
    console.print(f"report: {out.resolve()}")


def publish(console: Console, paths: list[Path], target: Path) -> None:
    """The runs' results and logs, tables in Markdown and the figures: all that a document quotes, in one folder."""
    from twist_fl.report.compare import comparison_table
    from twist_fl.report.page import figures
    from twist_fl.report.tables import against_pruning_table, device_tables, run_tables

    runs = [RunFolder(path) for path in finished_runs(paths)]
    for run in runs:
        copy = RunFolder(target / run.path.name)
        for name in ("results.json", "events.jsonl", DEPLOYED, AGAINST_PRUNING):
            if (run.path / name).is_file():
                write_text((run.path / name).read_text(), copy.path / name)
    against, deployed = rows_in(runs, AGAINST_PRUNING), rows_in(runs, DEPLOYED)
    tables = against_pruning_table(against) | run_tables(comparison_table(runs)) | device_tables(deployed)
    parts = (f"**{caption}**\n\n{markdown(cells)}" for caption, cells in tables.items())
    write_text("\n".join(parts), target / "table.md")
    figures(runs, target)
    console.print(f"results, table.md and figures: {target.resolve()}")


def partition(console: Console, out: Path, workers: int, alpha: float | None, seed: int, words: Sequence[str]) -> None:
    """A corpus dealt out to workers, what each got, and how to train on it."""
    if wrong := [word for word in words if not word.startswith("data.") or word.startswith("data.private=")]:
        raise ConfigError(f"{wrong[0]} changes nothing here: only data.path and others of data.* say what is dealt out")
    config = load_config(None, words, strict=True).data
    from twist_fl.data.partition import partition, rows
    from twist_fl.data.progress import Meter

    shares = partition(config, out, workers, alpha, seed, Meter())
    console.print(uncut_table([("worker", "characters", "of all", "most of it is"), *rows(shares)]))
    words = [*words, f"data.private={out}", f"train.workers={workers}"]
    console.print(f"train on it: twist-fl train demo {' '.join(map(quote, words))}", soft_wrap=True, highlight=False)


def deploy(
    console: Console, start: str, devices: list[str], words: Sequence[str] = (), out: Path | None = None
) -> list[dict[str, Any]]:
    """Ship tickets to edge clients that this machine plays, and show what they measured; all of it is in `out`."""
    parse_devices(devices)
    found = find_start(start, words)
    folder = found.results(out)
    measuring(1)  # loads torch for the measurements while this process loads it to plan
    waits_for(console, f"loading torch and the {'run' if found.run else 'model'}")
    from twist_fl.federation.deploy import deploy_here, devices_of, plan_device
    from twist_fl.runs.trained import TrainedRun

    run = TrainedRun(found)
    job = run.job
    wanted = devices_of(job, devices)
    for device in wanted:
        plan_device(job, device)  # refuses an impossible one before anything is written
    first = len(folder.events("device"))
    try:
        deploy_here(folder, job, run.state, wanted, partial(waits_for, console))
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

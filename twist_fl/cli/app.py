"""The `twist-fl` command. What it does is imported when it is done: help and mistakes need no torch."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import click
import typer
from rich.console import Console

from twist_fl.cli import federation, options
from twist_fl.cli.usage import explain, listed_sizes, versions
from twist_fl.config.schema import load_config, presets
from twist_fl.system.errors import ConfigError, LaunchError

app = typer.Typer(
    help="TwIST on Flower: train a transformer whose random subnets work without fine-tuning.\n\n"
    "A first run:  twist-fl demo\n\nYour own text:  twist-fl train demo data.source=files data.path=FOLDER name=mine",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# No markup: names, paths and error texts may hold brackets.
console = Console(markup=False)


def _show_versions(wanted: bool) -> None:
    if wanted:
        typer.echo(versions())
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_versions, help="Show versions and stop.")
    ] = False,
) -> None:
    """Its help is the app's."""


@app.command()
def train(
    preset: Annotated[
        str | None, typer.Argument(help=f"A preset ({', '.join(presets())}) or a YAML file.", show_default="demo")
    ] = None,
    overrides: options.Overrides = None,
    resume: options.Resume = None,
    local: options.Local = False,
) -> None:
    """Train with TwIST, or with algorithm=fedavg or ddp, through a Flower simulation on this machine."""
    from twist_fl.cli import train as runs

    if resume and preset and "=" not in preset:
        raise ConfigError(f"a run that goes on keeps its preset: leave out {preset}")
    if resume:
        runs.resume(console, resume, [*filter(None, [preset]), *(overrides or [])], local)
    else:
        runs.train_new(console, load_config("demo" if preset is None else preset, overrides or [], strict=True), local)


@app.command()
def demo(
    directory: options.DemoFolder = None,
    model: options.OwnModel = None,
    prompt: Annotated[str, typer.Option(help="What the devices' tickets go on from.")] = "The module",
    overrides: options.Overrides = None,
) -> None:
    """Fine-tune a small model by TwIST and by FedAvg, compare tickets with pruning, deploy three, report. Minutes."""
    from twist_fl.cli.demo import demo as show

    show(console, directory, overrides or [], model, prompt)


@app.command()
def status(
    runs: options.Runs = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the runs end.")] = False,
) -> None:
    """Show where runs stand, while they train and afterwards: round, loss, bytes, lost replies, time left."""
    from twist_fl.runs import status as looks

    looks.show_status(console, runs or [Path("runs")], follow)


@app.command()
def tickets(
    start: options.Start,
    sizes: options.Sizes = None,
    draws: options.Draws = 20,
    windows: options.Windows = None,
    words: options.Words = None,
) -> None:
    """Draw random subnets from a run or a model and show the distribution of their perplexity."""
    counts = listed_sizes(sizes)
    from twist_fl.cli import tickets as of_run

    of_run.tickets(console, start, counts, draws, windows, words or [])


@app.command()
def export(
    start: options.Start,
    size: options.TicketSize = None,
    format: options.Format = "compact",
    dtype: options.Dtype = "float32",
    out: options.ExportFolder = None,
    draw: options.Draw = 0,
    seed: options.RunSeed = None,
    windows: options.CardWindows = None,
    words: options.Words = None,
) -> None:
    """Write a random ticket of a run or a model for transformers, llama.cpp or onnxruntime, and check it there."""
    from twist_fl.cli import tickets as of_run

    of_run.export(
        console, start, size, format, dtype, out, draw=draw, seed=seed, windows=windows, words=words or []
    )  # fmt: skip


@app.command()
def prune(
    start: options.Start,
    method: options.Method = "all",
    sizes: options.Sizes = None,
    windows: options.Windows = None,
    calibration: Annotated[int, typer.Option(min=1, help="Training windows to calibrate on.")] = 128,
    draws: options.Draws = 20,
    out: options.PrunedFile = None,
    save: options.Save = None,
    words: options.Words = None,
) -> None:
    """Prune a run after training, or a model, by the methods that TwIST is compared with, and show what each costs."""
    counts = listed_sizes(sizes)
    from twist_fl.cli.progress import loading
    from twist_fl.pruning.names import chosen_methods

    methods = chosen_methods(method)
    found = loading(console, start, words or [], counts)
    from twist_fl.cli.prune import prune_run

    prune_run(
        console, found, methods, counts,
        windows=windows, calibration=calibration, draws=draws, out=out, save=save,
    )  # fmt: skip


@app.command()
def deploy(
    start: options.Start, device: options.Devices = None, out: options.Out = None, words: options.Words = None
) -> None:
    """Ship to each device the largest ticket that meets its limits, as a small dense model, and measure it there."""
    from twist_fl.cli import commands

    commands.deploy(console, start, device or [], words or [], out)


@app.command()
def generate(
    start: options.Writer,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "The module",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 60,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.8,
    size: options.TicketSize = None,
    seed: options.Seed = 0,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python code in the model's folder: it can do anything.")
    ] = False,
    words: options.Words = None,
) -> None:
    """Continue a text with a deployed ticket, with a run, or with a model."""
    from twist_fl.cli import tickets as of_run

    of_run.generate(console, start, prompt, new_tokens, temperature, size, seed, trust_remote_code, words or [])


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Finished runs to compare, or a folder that holds some.")],
    out: Annotated[Path, options.new_file("The HTML file to write.")] = Path("report.html"),
    publish: Annotated[
        Path | None,
        options.new_folder("Also put results, table and PNG figures in this folder, to commit or to share."),
    ] = None,
) -> None:
    """Write a self-contained HTML report: table, training curves, perplexity against size, ticket distributions."""
    from twist_fl.cli import commands

    commands.report(console, runs, out)
    if publish:
        commands.publish(console, runs, publish)


@app.command()
def cost(
    preset: Annotated[
        str, typer.Argument(help="A preset, a YAML file, a run's folder, or a model: folder, org/name, GGUF.")
    ] = "gpt2-wikitext103",
    overrides: options.Overrides = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10**15,
            help="Optimiser steps of the run; default: the run's, as train.rounds says, or the paper's.",
        ),
    ] = None,
) -> None:
    """Parameters, bytes and memory on paper (Appendix C): every subnet size, and a setting's own workers.

    Of a run's folder, with what it measured beside.
    """
    from twist_fl.cli import cost_tables

    cost_tables.show_cost(console, preset, overrides or [], steps)


@app.command()
def reproduce(
    names: Annotated[list[str], typer.Argument(help="Experiments, or all; any key=value among them is a setting.")],
    scale: Annotated[str, typer.Option(help="tiny (CPU, minutes), small (WikiText-2) or paper (GPT-2 124M).")] = "tiny",
    directory: Annotated[
        Path | None,
        options.new_folder("The lab: runs and measurements. Default: runs/reproduce/SCALE.", "--dir"),
    ] = None,
    out: Annotated[Path | None, options.new_folder("Where tables and figures go. Default: the lab.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Tasks at a time. Default: one a core.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of what is repeated. Default: the scale's.")] = None,
    doc: options.Page = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
) -> None:
    """Make the paper's tables and figures, and ours, with the paper's numbers beside: table1, table2, fig2, fig4 ...

    Finished runs and measurements are used again, an interrupted command goes on where it was.
    """
    from twist_fl.cli.reproduce import reproduce as run

    wanted = [name for name in names if "=" not in name]
    overrides = [name for name in names if "=" in name]
    run(console, wanted, scale, overrides, folder=directory, out=out, jobs=jobs, seeds=seeds, dry_run=dry_run, doc=doc)


@app.command()
def partition(
    out: options.Parts,
    workers: Annotated[int, typer.Option(min=1, max=100_000, help="How many files to make.")],
    alpha: options.Alpha = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what goes where.")] = 0,
    words: options.CorpusWords = None,
) -> None:
    """Deal a corpus out by document, evenly or unevenly, to one file a worker: what data.private=FOLDER trains on."""
    from twist_fl.cli import commands

    commands.partition(console, out, workers, alpha, seed, words or [])


@app.command()
def keys(
    words: Annotated[list[str] | None, typer.Argument(help="Only settings with one of these in their names.")] = None,
) -> None:
    """List every setting with its default and what it means, as YAML to begin a preset from."""
    from twist_fl.cli import keys as settings

    settings.keys(console, words or [])


app.command()(federation.node)
app.add_typer(federation.federation, name="federation")


def _complain(error: Exception | str) -> None:
    Console(stderr=True, markup=False).print(f"error: {error}", style="red", soft_wrap=True, highlight=False)


def main() -> None:
    """Entry point: what the user can mend is one line and status 2, a failed run is 1, Ctrl-C is 130."""
    # Also when started in the background, where a shell has them ignored: nothing of a run must outlive it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # a closed terminal; nohup has it ignored
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        raise SystemExit(app(prog_name="twist-fl", standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        raise SystemExit(2) from None
    except (click.UsageError, ConfigError) as error:
        _complain(explain(error, sys.argv[1:]) if isinstance(error, click.UsageError) else error)
        raise SystemExit(2) from None
    except (LaunchError, OSError) as error:
        file = error.filename if isinstance(error, OSError) else None
        _complain(f"{file}: {error.strerror}" if isinstance(error, OSError) and file else error)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None

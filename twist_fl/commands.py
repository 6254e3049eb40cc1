"""What the `twist-fl` commands do; `cli.py` holds their words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from twist_fl.checkpoint import RunFolder
from twist_fl.config import Config, ConfigError, load_config
from twist_fl.job import make_job
from twist_fl.launch import LaunchError, flower_run
from twist_fl.progress import RunProgress, human_bytes

INTERRUPTED = 130


def train(console: Console, preset: str, overrides: list[str]) -> RunFolder:
    """A new run from preset and overrides, refused before anything starts if it cannot work."""
    config = load_config(preset, overrides)
    folder = RunFolder(Path(config.dir or f"runs/{config.name}"))
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
    console.print(
        "TwIST against FedAvg: the same model, text, batches and optimiser. Ctrl-C is safe: run it again to go on."
    )
    runs = []
    for algorithm in ("twist", "fedavg"):
        path = directory / algorithm
        if RunFolder(path).job_file.is_file():
            runs.append(resume(console, path))
        else:
            runs.append(train(console, "demo", [*overrides, f"algorithm={algorithm}", f"dir={path}"]))
    rows = _deployed(runs[0]) or deploy(console, runs[0].path, [])
    console.print(run_table(runs))
    console.print(device_table(rows))
    report(console, [run.path for run in runs], directory / "report.html")


def _deployed(folder: RunFolder) -> list[dict[str, Any]]:
    file = folder.path / "deployed.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else []
    return rows


def report(console: Console, paths: list[Path], out: Path) -> None:
    """The HTML report of finished runs, with the devices of the first one that deployed any."""
    from twist_fl.report import write_report

    runs = [RunFolder(path) for path in paths]
    deployed = next((rows for run in runs if (rows := _deployed(run))), [])
    write_report(runs, out, deployed)
    console.print(f"report: {out.resolve()}")


def run_table(runs: list[RunFolder]) -> Table:
    """Perplexity of the full model and of random tickets, a row per run."""
    results = [json.loads(run.results_file.read_text()) for run in runs]
    sizes = [f"{ticket['size']}/{ticket['of']}" for ticket in results[0]["tickets"]]
    draws = len(results[0]["tickets"][0]["perplexities"]) if sizes else 0
    table = Table(title=f"perplexity: full model, and random tickets (mean ± std of {draws} draws, no fine-tuning)")
    for column in ("", "full", *sizes, "weights sent"):
        table.add_column(column, justify="right" if column else "left")
    for run, result in zip(runs, results, strict=True):
        sent = sum(event[way]["weights"] for event in run.events("round") for way in ("bytes_down", "bytes_up"))
        tickets = [f"{ticket['mean']:.2f} ± {ticket['std']:.2f}" for ticket in result["tickets"]]
        table.add_row(result["config"]["algorithm"], f"{result['full']:.2f}", *tickets, human_bytes(sent))
    return table


def resume(console: Console, path: Path) -> RunFolder:
    """Go on with an interrupted run from its newest checkpoint."""
    folder = RunFolder(path)
    config = folder.job().config
    if folder.events("done"):
        console.print(f"{folder.path} is finished; nothing to do")
        return folder
    _run(console, folder, config)
    return folder


def _run(console: Console, folder: RunFolder, config: Config) -> None:
    console.print(f"run folder [bold]{folder.path}[/]")
    num_tickets = len(config.eval.sizes) * config.eval.tickets
    try:
        with (
            flower_run(folder, config, config.train.workers, {"mode": "train"}) as process,
            RunProgress(console, folder, num_tickets) as progress,
        ):
            events = progress.follow(process)
    except KeyboardInterrupt:
        done = len(folder.checkpoints()) and int(folder.checkpoints()[-1].name.rpartition("-")[2])
        console.print(f"\ninterrupted; {done} rounds are saved. Go on with:  twist-fl train --resume {folder.path}")
        raise typer.Exit(INTERRUPTED) from None
    _require(events, "done", folder)
    results = json.loads(folder.results_file.read_text())
    console.print(f"full model: perplexity {results['full']:.2f}; results in {folder.results_file}")


def _require(events: list[dict[str, Any]], last: str, folder: RunFolder) -> None:
    failed = [event["error"] for event in events if event["event"] == "failed"]
    if failed:
        raise LaunchError(f"the run failed: {failed[0]}. Flower's log: {folder.path / 'flower.log'}")
    if not any(event["event"] == last for event in events):
        raise LaunchError(f"the run ended before its time. Flower's log: {folder.path / 'flower.log'}")


def deploy(console: Console, path: Path, devices: list[str]) -> list[dict[str, Any]]:
    """Ship tickets to simulated edge clients and show what they measured."""
    folder, job, _ = load_final(path)
    for device in devices:
        if "=" not in device:
            raise ConfigError(f"device {device!r} is not NAME=MEMORY_IN_MB, for example phone=3.5")
    settings = {"mode": "deploy", "devices": " ".join(devices)}
    with (
        console.status("shipping tickets to simulated edge clients"),
        flower_run(folder, job.config, 1, settings) as run,
    ):
        events = RunProgress(console, folder, 0).follow(run)
    _require(events, "deployed", folder)
    rows: list[dict[str, Any]] = json.loads((folder.path / "deployed.json").read_text())
    console.print(device_table(rows))
    console.print(f"dense models, for AutoModelForCausalLM.from_pretrained, in {folder.path / 'deployed'}")
    return rows


def device_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="deployed devices")
    for column in (
        "device",
        "limit MB",
        "ticket",
        "parameters",
        "weights MB",
        "received MB",
        "perplexity",
        "ms/token",
        "peak MB",
    ):
        table.add_column(column, justify="left" if column == "device" else "right")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['memory_mb']:g}",
            f"{row['size']}/{row['of']}",
            f"{row['num_params']:,}",
            f"{row['weight_mb']:.2f}",
            f"{row['bytes_received'] / 1e6:.2f}",
            f"{row['perplexity']:.2f}",
            f"{row['ms_per_token']:.2f}",
            f"{row['peak_mb']:.1f}",
        )
    return table


def cost(console: Console, preset: str, overrides: list[str], steps: int) -> None:
    """Appendix C for every subnet size of a setting, both countings of communication."""
    from twist_fl.blocks import make_layout
    from twist_fl.blueprint import Division
    from twist_fl.cost import run_cost

    config = load_config(preset, overrides)
    blueprint = config.blueprint
    model = _model_dict(config)
    try:
        layout = make_layout(model, blueprint.ffn_blocks)
        table = Table(title=f"{preset}, {blueprint.setting}: one worker, {steps:,} optimiser steps")
        for column in ("blocks", "parameters", "memory GiB", "TB, exchange per step", "TB, exchange per interval"):
            table.add_column(column, justify="right")
        rounds = -(-steps // config.train.interval)
        heads, ffn_blocks = layout.num_blocks
        for size in range(heads, 0, -1):
            if size * ffn_blocks % heads:
                continue
            sub = (size, size * ffn_blocks // heads)
            division = Division(blueprint.setting, (sub,) * heads, blueprint.undivided_first, blueprint.undivided_last)
            division.check(layout)
            row = run_cost(layout, division, rounds, steps)
            table.add_row(
                f"{size}/{heads}",
                f"{row.subnet_params:,}",
                f"{row.memory_gib:.2f}",
                f"{row.tb_per_step:.2f}",
                f"{row.tb_per_interval:.3f}",
            )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    console.print(table)
    console.print(
        "exchange per step is how the paper's Table 2 counts, for TwIST and DDP alike; "
        f"TwIST exchanges once per interval of {config.train.interval} batches. "
        "train.optimizer_state=server adds twice the weights again.",
        highlight=False,
    )


def _model_dict(config: Config) -> dict[str, Any]:
    """The model's sizes without its weights; GPT-2's own for the hub's gpt2, which needs no network."""
    from transformers import AutoConfig, GPT2Config

    model = config.model
    if model.pretrained in ("gpt2", "openai-community/gpt2"):
        return GPT2Config().to_dict()
    if model.pretrained:
        loaded: dict[str, Any] = AutoConfig.from_pretrained(model.pretrained).to_dict()
        return loaded
    return GPT2Config(
        vocab_size=config.data.vocab_size,
        n_positions=model.n_positions,
        n_embd=model.n_embd,
        n_layer=model.n_layer,
        n_head=model.n_head,
    ).to_dict()


def keys(console: Console) -> None:
    """Every setting and its default, as YAML."""
    console.print(OmegaConf.to_yaml(OmegaConf.structured(Config)), highlight=False, markup=False)


def load_final(path: Path) -> tuple[RunFolder, Any, Any]:
    """A run's folder, job and newest state. Raises ConfigError if it has no checkpoint yet."""
    folder = RunFolder(path)
    job = folder.job()
    state = folder.load()
    if state is None:
        raise ConfigError(f"{folder.path} has no checkpoint yet: let it train for checkpoint_every rounds")
    return folder, job, state


def tickets(console: Console, path: Path, sizes: list[int], draws: int, windows: int | None) -> None:
    """Perplexity of random tickets of several sizes."""
    from twist_fl import evaluate

    _, job, state = load_final(path)
    config = job.config
    test = job.corpus.test[: windows or config.eval.max_windows]
    models = job.models()
    table = Table(title=f"{path}: round {state.round}, {draws} random tickets a size, {test.size:,} test tokens")
    for column in ("blocks", "parameters", "mean", "std", "min", "max"):
        table.add_column(column, justify="right")
    for size in sizes:
        try:
            num_sub = evaluate.ticket_sizes(job.layout, job.division, size)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        whole = num_sub == job.layout.num_blocks
        with console.status(f"tickets of {size} blocks"):
            row = evaluate.ticket_distribution(
                models, state.params, job.division, num_sub, test,
                tickets=1 if whole else draws, seed=config.seed, batch_size=config.eval.batch_size,
            ).summary()  # fmt: skip
        values = [f"{row[key]:.2f}" for key in ("mean", "std", "min", "max")]
        table.add_row(f"{size}/{job.layout.num_blocks[0]}", f"{row['num_params']:,}", *values)
    console.print(table)


def generate(
    console: Console, path: Path, prompt: str, new_tokens: int, temperature: float, size: int | None, seed: int
) -> None:
    """Continue `prompt` with an exported ticket's folder or with a run (a random ticket of `size`, or whole)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from twist_fl.blueprint import draw_ticket, full_blueprint
    from twist_fl.data import load_tokenizer
    from twist_fl.evaluate import ticket_sizes

    model: Any
    if (path / "job.json").is_file():
        _, job, state = load_final(path)
        try:
            blueprint = (
                full_blueprint(job.layout)
                if size is None
                else draw_ticket(job.layout, job.division, ticket_sizes(job.layout, job.division, size), seed, 0)
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        model = job.models().load_sliced(blueprint, state.params)
        tokenizer = load_tokenizer(str(job.corpus.tokenizer_folder))
    elif (path / "config.json").is_file():
        if size is not None:
            raise ConfigError("--size chooses a ticket of a run; a deployed folder already is one")
        model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(path)
    else:
        raise ConfigError(f"{path} is neither a run (job.json) nor a deployed ticket (config.json)")
    torch.manual_seed(seed)
    tokens = tokenizer(prompt, return_tensors="pt").to(model.device)
    room = model.config.n_positions - tokens["input_ids"].shape[1]
    if room < 1:
        raise ConfigError(f"the prompt fills the model's context of {model.config.n_positions} tokens: shorten it")
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    output = model.eval().generate(
        **tokens, max_new_tokens=min(new_tokens, room), pad_token_id=model.config.eos_token_id, **sampling
    )
    console.print(tokenizer.decode(output[0]), markup=False, highlight=False)

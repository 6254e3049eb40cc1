"""Tickets of a run or a model, and text that they write; no Flower here. `cli/app.py` holds the commands' words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from twist_fl.cli.progress import loading, waits_for
from twist_fl.config.hub import expanded
from twist_fl.config.shares import Size
from twist_fl.config.sizes import ticket_size
from twist_fl.config.suggest import choice
from twist_fl.report.cells import titled, uncut_table
from twist_fl.runs.start import find_start
from twist_fl.runs.trained import TrainedRun, chosen_sizes
from twist_fl.system.errors import ConfigError
from twist_fl.system.plugins import EXPORT_FORMAT
from twist_fl.system.units import human_bytes, perplexity_text, size_label

_COLDEST, _HOTTEST = 0.01, 100


def tickets(
    console: Console,
    start: str,
    sizes: Sequence[Size] | None,
    draws: int,
    windows: int | None,
    words: Sequence[str] = (),
) -> None:
    """Perplexity of random tickets of several sizes."""
    run = TrainedRun(loading(console, start, words, sizes))
    job = run.job
    test = job.corpus.test[: windows or job.config.eval.max_windows]
    cells = [["blocks", "parameters", "mean", "std", "min", "max"]]
    for size in chosen_sizes(job, sizes):
        with console.status(f"tickets of {size_label(size.row)}"):
            row: dict[str, Any] = run.tickets(size.row["size"], draws, test).summary()
        values = [perplexity_text(row[key]) for key in ("mean", "std", "min", "max")]
        cells.append([size_label(size.row), f"{row['num_params']:,}", *values])
    title = f"{run.title}: perplexity (lower is better) of {draws} random tickets a size, "
    console.print(titled(f"{title}on {test.size:,} test tokens", uncut_table(cells)))


def export(
    console: Console,
    start: str,
    size: str | None,
    format: str,
    dtype: str,
    out: Path | None,
    *,
    draw: int = 0,
    seed: int | None = None,
    windows: int | None = None,
    words: Sequence[str] = (),
) -> None:
    """One ticket as files for a device; the default folder is named after what is in it."""
    EXPORT_FORMAT.check(format, choice)
    EXPORT_FORMAT.find(format)
    found = loading(console, start, words, None)
    target = out or found.results().path / "exports"
    run = TrainedRun(found)
    row = ticket_size(run.job.layout, run.job.division, size or "1/1", "--size").row
    blueprint = run.blueprint(size, draw, seed)
    name = f"{row['size']}-of-{row['of']}-{format.rpartition(':')[2]}-{dtype}"
    text = run.job.corpus.test[:windows] if windows else None
    with console.status(f"{format}: writing and checking"):
        made = run.export(blueprint, out or target / name, format, dtype, text)
    checked = f"checked in {made.checked}" if made.checked else "the format checks nothing"
    console.print(f"{made.folder}: {human_bytes(made.num_bytes)}; {checked}", soft_wrap=True, highlight=False)


def generate(
    console: Console,
    start: str,
    prompt: str,
    new_tokens: int,
    temperature: float,
    size: Size | None,
    seed: int,
    trust_remote_code: bool = False,
    words: Sequence[str] = (),
) -> None:
    """Continue `prompt` with an exported ticket's folder, or a run or a model (a random ticket of `size`, or whole).

    No code of the folder is run unless it is trusted.
    """
    if not prompt:
        raise ConfigError("the prompt is empty: give --prompt at least one token to continue")
    if temperature and not _COLDEST <= temperature <= _HOTTEST:
        raise ConfigError(f"--temperature {temperature:g} must be 0 (the likeliest token), or {_COLDEST} to {_HOTTEST}")
    model, tokenizer = _model_and_tokenizer(console, start, size, seed, trust_remote_code, words)
    import torch

    from twist_fl.model.hf_config import padding_token

    torch.manual_seed(seed)
    tokens = tokenizer(prompt, return_tensors="pt").to(model.device)
    if not tokens["input_ids"].numel():
        raise ConfigError("the prompt is empty: give at least one token to continue")
    room = model.config.max_position_embeddings - tokens["input_ids"].shape[1]
    if room < 1:
        raise ConfigError(
            f"the prompt fills the model's context of {model.config.max_position_embeddings} tokens: shorten it"
        )
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    output = model.eval().generate(
        **tokens, max_new_tokens=min(new_tokens, room), pad_token_id=padding_token(model.config.to_dict()), **sampling
    )
    console.print(tokenizer.decode(output[0]), markup=False, highlight=False)


def _model_and_tokenizer(
    console: Console, start: str, size: Size | None, seed: int, trust_remote_code: bool, words: Sequence[str]
) -> tuple[Any, Any]:
    """Of a folder of transformers, whatever its architecture, what is in it; else a ticket of a run or a model."""
    path = expanded(start)
    if size is None and not words and (path / "config.json").is_file():
        waits_for(console, "loading torch and the model")
        from transformers import AutoTokenizer

        from twist_fl.model.saved import open_model

        model = open_model(path, trust_remote_code)
        return model, AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    found = find_start(start, words)
    ticket_size(found.job.layout, found.job.division, size or "1/1", "--size")
    waits_for(console, "loading torch and the model")
    run = TrainedRun(found)
    return run.model(run.blueprint(size, seed=seed)), run.tokenizer()

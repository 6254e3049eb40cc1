"""The commands that look at a setting or at a trained run; no Flower here. `cli/app.py` holds their words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from twist_fl.cli.progress import waits_for
from twist_fl.config.finding import no_run, runs_in
from twist_fl.config.shares import ShareError
from twist_fl.runs.trained import TrainedRun, chosen_sizes
from twist_fl.system.errors import ConfigError

_COLDEST, _HOTTEST = 0.01, 100


def tickets(
    console: Console,
    path: Path,
    sizes: Sequence[int] | ShareError | None,
    draws: int,
    windows: int | None,
    places: Sequence[str] = (),
) -> None:
    """Perplexity of random tickets of several sizes."""
    waits_for(console, "loading torch and the run")
    run = TrainedRun(path, places)
    from twist_fl.config.sizes import blocks_per_layer

    job = run.job
    test = job.corpus.test[: windows or job.config.eval.max_windows]
    table = Table(title=f"{path}: round {run.state.round}, {draws} random tickets a size, {test.size:,} test tokens")
    for column in ("blocks", "parameters", "mean", "std", "min", "max"):
        table.add_column(column, justify="right")
    for size in chosen_sizes(job, sizes):
        with console.status(f"tickets of {size} blocks"):
            row = run.tickets(size, draws, test).summary()
        values = [f"{row[key]:.2f}" for key in ("mean", "std", "min", "max")]
        table.add_row(f"{size}/{blocks_per_layer(job.layout, job.division)}", f"{row['num_params']:,}", *values)
    console.print(table)


def generate(
    console: Console,
    path: Path,
    prompt: str,
    new_tokens: int,
    temperature: float,
    size: int | None,
    seed: int,
    trust_remote_code: bool = False,
) -> None:
    """Continue `prompt` with an exported ticket's folder or with a run (a random ticket of `size`, or whole).

    No code of the folder is run unless it is trusted.
    """
    if not prompt:
        raise ConfigError("the prompt is empty: give --prompt at least one token to continue")
    if temperature and not _COLDEST <= temperature <= _HOTTEST:
        raise ConfigError(f"--temperature {temperature:g} must be 0 (the likeliest token), or {_COLDEST} to {_HOTTEST}")
    waits_for(console, "loading torch and the model")
    model, tokenizer = _model_and_tokenizer(path, size, seed, trust_remote_code)
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


def _model_and_tokenizer(path: Path, size: int | None, seed: int, trust_remote_code: bool) -> tuple[Any, Any]:
    if (path / "job.json").is_file():
        run = TrainedRun(path)
        return run.model(run.blueprint(size, seed=seed)), run.tokenizer()
    if not path.exists() or runs_in(path):
        raise no_run(path.resolve())
    if not ((path / "config.json").is_file() and (path / "tokenizer.json").is_file()):
        raise ConfigError(f"{path} is neither a run (job.json) nor a folder of a model (config.json, tokenizer.json)")
    if size is not None:
        raise ConfigError(f"--size chooses a ticket of a run, and {path} holds one model")
    from transformers import AutoTokenizer

    from twist_fl.model.saved import open_model

    model = open_model(path, trust_remote_code)
    return model, AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)

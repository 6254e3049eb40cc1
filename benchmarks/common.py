"""What the benchmarks share: a job of any size, this machine's limits, and a file for what was found."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config

from twist_fl.config.schema import load_config
from twist_fl.config.sizes import layout_of
from twist_fl.rounds import RoundMean, RunState
from twist_fl.system.files import write_text
from twist_fl.training.job import Job, make_job
from twist_fl.training.worker import Task

GPT2_SIZES = {
    "small": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "XL": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}
VOCABULARY, POSITIONS = 50_257, 1_024


def gpt2_config(**sizes: int) -> GPT2Config:
    """GPT-2's own configuration, small if no sizes are given."""
    given: dict[str, Any] = {"vocab_size": VOCABULARY, "n_positions": POSITIONS, **GPT2_SIZES["small"], **sizes}
    return GPT2Config(bos_token_id=0, eos_token_id=0, **given)


def job_without_text(model: GPT2Config, folder: Path, *overrides: str) -> Job:
    """A job for `model`. Its corpus, a few made-up sentences below `folder`, is there to be complete."""
    for part in ("train", "test"):
        text = "".join(random.Random(part).choices("abcdefgh ,.\n", k=40_000))
        write_text(text, folder / f"{part}.txt")
    sizes = (f"model.n_layer={model.n_layer}", f"model.n_head={model.n_head}", f"model.n_embd={model.n_head}")
    text_of = ("data.source=files", f"data.path={folder}", "data.vocab_size=300", "data.window=16")
    job = make_job(load_config(overrides=[*text_of, *sizes, "eval.sizes=[]", *overrides]))
    return replace(job, model_fields=model.to_dict(), layout=layout_of(job.config, model.to_dict()))


def round_mean(job: Job, state: RunState, tasks: list[Task]) -> RoundMean:
    """As the server makes it."""
    return RoundMean(job, state, tasks, in_place=True)


def seconds_of(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def copy_bandwidth(megabytes: int = 200) -> float:
    """Bytes a second that one thread's plain copy reads and writes: the best of five of `megabytes`."""
    source, target = torch.ones(megabytes * 250_000), torch.zeros(megabytes * 250_000)
    best = min(seconds_of(lambda: target.copy_(source)) for _ in range(5))
    return 2e6 * megabytes / best


def flops_per_second(size: int = 2048) -> float:
    """Of a float32 product of two (size, size) matrices on torch's threads: the best of five."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = min(seconds_of(lambda: a @ b) for _ in range(5))
    return float(2 * size**3 / best)


def save(found: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        write_text(json.dumps(found, indent=1) + "\n", out)


def show(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on the terminal: the first column to the left, numbers with four digits to the right."""
    lines = [list(header), *([_text(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells[1:]]), flush=True)


def _text(cell: object) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)

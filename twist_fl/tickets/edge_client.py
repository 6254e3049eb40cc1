"""What an edge client does with a ticket that has arrived: run it and measure it (spec, section 10).

`python -m twist_fl.tickets.edge_client FOLDER --windows FILE.npy --new-tokens N` measures an exported folder in
this process and prints one JSON object on the last line; `measure` does so in a fresh fork. No Flower anywhere.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from twist_fl.blueprint.blocks import make_layout
from twist_fl.blueprint.drawing import full_blueprint
from twist_fl.data.corpus import Windows
from twist_fl.model.saved import open_model
from twist_fl.model.subnet import get_state
from twist_fl.system.memory import peak_bytes, start_peak
from twist_fl.tickets.evaluate import perplexity
from twist_fl.tickets.export import export_ticket, make_ticket
from twist_fl.tickets.measuring import Request, measuring, serve

REPEATS = 3


@dataclass(frozen=True)
class Measurement:
    """What a device is asked to measure, and what it must keep within, in milliseconds."""

    new_tokens: int
    context: int | None = None
    """Tokens of prompt and answer together; None: as many as the model can."""
    latency_ms: float | None = None
    """A token."""
    prompt_ms: float | None = None
    """The whole prompt."""
    threads: int = 1

    def within(self, seconds_per_token: float, seconds_per_prompt: float) -> bool:
        limits = (self.latency_ms, self.prompt_ms)
        took = (seconds_per_token, seconds_per_prompt)
        return all(limit is None or 1000 * time <= limit for time, limit in zip(took, limits, strict=True))


@dataclass(frozen=True)
class EdgeReport:
    """What a device measured.

    Memory is the increase of the process's peak resident set over its resident set just before loading: weights,
    KV cache, activations, and what the allocator keeps of freed ones (GPT-2 124M, full context: 0.2 GB above the
    planner's figure, most of it such slack). Weights may be pages of the mapped file, resident once used. Python
    and the libraries, loaded and warmed up before, are not in it.
    """

    num_params: int
    weight_bytes: int
    perplexity: float | None
    """None if a token or the prompt took longer than it may: such a ticket does not stay."""
    seconds_per_token: float
    """Median decoding step: greedy, KV cache, batch 1, at the end of the longest context the prompt allows."""
    seconds_per_prompt: float
    """Reading that prompt in one pass (prefill), median; where there is enough to compute, smaller is faster."""
    prompt_tokens_per_second: float
    """The same as a rate."""
    context_tokens: int
    """Tokens in the KV cache after the last of those steps."""
    peak_memory_bytes: int
    """Loading, then generating: what the planner's limit is about."""
    perplexity_memory_bytes: int
    """The same once perplexity has been computed too: it needs the logits of a whole window."""
    threads: int


def measure(folder: Path, windows: Windows, asked: Measurement) -> EdgeReport:
    """Measure an exported ticket in a fresh fork. Raises RuntimeError with the end of its stderr if it fails."""
    with tempfile.TemporaryDirectory(prefix="twist-edge-") as scratch:
        file = Path(scratch) / "windows.npy"
        np.save(file, windows)
        request = {"folder": str(Path(folder).resolve()), "windows": str(file), "asked": asdict(asked)}
        return EdgeReport(**measuring(asked.threads).ask(request, Path(scratch)))


def _measured(request: Request) -> dict[str, Any]:
    """In the fork: what `measure` asks for."""
    asked = Measurement(**request["asked"])
    return asdict(measure_here(Path(request["folder"]), np.load(request["windows"]), asked))


def measure_here(folder: Path, windows: Windows, asked: Measurement) -> EdgeReport:
    """Load the dense model and measure it in this process, whose earlier life blurs the memory figures."""
    torch.set_num_threads(asked.threads)
    _warm_up()
    before = start_peak()
    model = open_model(folder)
    context = min(asked.context or inf, model.config.max_position_embeddings)
    prompt = _prompt(windows, int(context), asked.new_tokens)
    decode(model, prompt, min(2, asked.new_tokens))
    seconds = median(second for _ in range(REPEATS) for second in decode(model, prompt, asked.new_tokens)[1])
    reading = median(_seconds_to_read(model, prompt) for _ in range(3 * REPEATS))
    peak_memory_bytes = peak_bytes() - before
    return EdgeReport(
        num_params=sum(parameter.numel() for parameter in model.parameters()),
        weight_bytes=sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        perplexity=perplexity(model, windows, batch_size=1) if asked.within(seconds, reading) else None,
        seconds_per_token=seconds,
        seconds_per_prompt=reading,
        prompt_tokens_per_second=prompt.shape[1] / reading,
        context_tokens=prompt.shape[1] + asked.new_tokens,
        peak_memory_bytes=peak_memory_bytes,
        perplexity_memory_bytes=peak_bytes() - before,
        threads=asked.threads,
    )


def _prompt(windows: Windows, num_positions: int, new_tokens: int) -> torch.Tensor:
    """As much of the first window as leaves room for `new_tokens`, (1, T) int64."""
    if not 1 <= new_tokens < num_positions:
        raise ValueError(
            f"deploy.new_tokens={new_tokens} does not fit a context of {num_positions}: use 1 to {num_positions - 1}"
        )
    return torch.tensor(windows[:1, : num_positions - new_tokens], dtype=torch.int64)


@torch.inference_mode()
def decode(model: Any, prompt: torch.Tensor, new_tokens: int) -> tuple[list[int], list[float]]:
    """Greedy tokens after `prompt` (1, T) with a KV cache, and the seconds of each step.

    `new_tokens` steps are timed, each reads one token and yields the next; reading the prompt, which yields the
    first, is not.
    """
    output = model(prompt, use_cache=True, logits_to_keep=1)
    tokens, seconds = [int(output.logits[0, -1].argmax())], []
    for _ in range(new_tokens):
        start = time.perf_counter()
        output = model(torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True)
        tokens.append(int(output.logits[0, -1].argmax()))
        seconds.append(time.perf_counter() - start)
    return tokens, seconds


@torch.inference_mode()
def _seconds_to_read(model: Any, prompt: torch.Tensor) -> float:
    start = time.perf_counter()
    model(prompt, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start


def _warm_up() -> None:
    """Load and run a toy ticket, so that code which libraries load late is not counted as the ticket's memory."""
    config = GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    layout = make_layout(config.to_dict())
    state = get_state(GPT2LMHeadModel(config))
    toy = make_ticket(layout, state, config.to_dict(), full_blueprint(layout), "sqrt")
    with tempfile.TemporaryDirectory(prefix="twist-edge-") as folder:
        export_ticket(toy, Path(folder) / "toy", None)
        model = open_model(Path(folder) / "toy")
    windows = np.zeros((1, 8), dtype=np.int32)
    decode(model, _prompt(windows, 8, 2), 2)
    perplexity(model, windows, batch_size=1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m twist_fl.tickets.edge_client", description="Measure an exported ticket."
    )
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--windows", type=Path, help="(num_windows, window) token ids, .npy")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--context", type=int, help="tokens of prompt and answer together; default: the model's most")
    parser.add_argument("--latency-ms", type=float, help="milliseconds a token may take; if more, no perplexity")
    parser.add_argument("--prompt-ms", type=float, help="milliseconds the prompt may take; if more, no perplexity")
    parser.add_argument("--serve", action="store_true", help="measure what standard input asks for: see measuring.py")
    given = parser.parse_args(arguments)
    if given.serve:
        serve(_measured)
        return
    if given.folder is None or given.windows is None:
        parser.error("give FOLDER and --windows FILE.npy")
    asked = Measurement(given.new_tokens, given.context, given.latency_ms, given.prompt_ms, given.threads)
    report = measure_here(given.folder, np.load(given.windows), asked)
    print(json.dumps(asdict(report)))


if __name__ == "__main__":
    main()

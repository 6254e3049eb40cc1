"""How fast tickets of a real model are where people run models: torch, onnxruntime and llama.cpp.

A new token reads all weights; so does a prompt, less the vocabulary's where the engine computes the logits of the last
token only. What a ticket can gain is therefore the ratio of its parameters to the full model's, in bytes and in FLOPs
alike: the bound beside each speed-up. Each measurement is a process of its own, all take turns, and the best turn
counts, because other work on the machine only ever adds time.

    python benchmarks/ticket_speed.py --model MODEL.gguf [--sizes 2/3 1/3] [--keep FOLDER] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from common import save, show

from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.model.saved import open_model
from twist_fl.runs.trained import TrainedRun

FULL = "full"
ZEROS = "torch, half zeros"
"""The control: what pruning without structure leaves. Only the full model is measured so."""
ENGINES = {
    "torch": ("compact", "float32"),
    ZEROS: ("compact", "float32"),
    "onnxruntime": ("onnx", "float32"),
    "llama.cpp F16": ("gguf", "float16"),
    "llama.cpp Q8_0": ("gguf", "q8_0"),
}
"""The format and the numbers of what each is given."""
ALL_LOGITS = ("onnxruntime",)
"""Compute the logits of all tokens of a prompt."""
BATCHES = (1, 8)
BATCHED = ("torch", ZEROS, "onnxruntime")
"""llama.cpp is asked through its server, one text at a time."""


def measure(engine: str, folder: Path, args: argparse.Namespace, threads: int, batch: int) -> dict[str, float]:
    """Seconds to read a prompt, and of the middle one of the new tokens' steps; of all texts of the batch."""
    if engine.startswith("llama.cpp"):
        return llama_cpp(folder / "model.gguf", args, threads)
    if engine == "onnxruntime":
        times = list(onnxruntime(folder, args, threads, batch))
    else:
        times = list(pytorch(folder, args, threads, batch, zeros=engine == ZEROS))
    return {"prompt": times[0], "token": median(times[1:])}


def pytorch(folder: Path, args: argparse.Namespace, threads: int, batch: int, zeros: bool) -> Iterator[float]:
    torch.set_num_threads(threads)
    model = open_model(folder)
    for weight in model.parameters():
        weight.data = weight.data.clone()  # pages of the file are slower to read than memory of one's own
        if zeros and weight.ndim == 2:
            weight.data[weight.abs() < weight.abs().median()] = 0
    with torch.inference_mode():
        for _ in range(2):  # the first is not timed: libraries and memory come late
            cache, tokens, seconds = None, torch.ones(batch, args.prompt, dtype=torch.int64), list[float]()
            for _ in range(1 + args.new_tokens):
                begin = time.perf_counter()
                output = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, tokens = output.past_key_values, output.logits[:, -1:].argmax(-1)
                seconds.append(time.perf_counter() - begin)
    yield from seconds


def onnxruntime(folder: Path, args: argparse.Namespace, threads: int, batch: int) -> Iterator[float]:
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = threads
    session = InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    names = [each for each in session.get_inputs() if each.name.startswith("past_key_values")]
    for _ in range(2):
        cache = [np.zeros((batch, each.shape[1], 0, each.shape[3]), np.float32) for each in names]
        tokens, past, seconds = np.ones((batch, args.prompt), np.int64), 0, list[float]()
        for _ in range(1 + args.new_tokens):
            places = np.arange(past, past + tokens.shape[1])[None].repeat(batch, 0)
            past += tokens.shape[1]
            given = {each.name: value for each, value in zip(names, cache, strict=True)}
            begin = time.perf_counter()
            logits, *cache = session.run(None, {"input_ids": tokens, "position_ids": places, **given})
            tokens = logits[:, -1:].argmax(-1)
            seconds.append(time.perf_counter() - begin)
    yield from seconds


def llama_cpp(file: Path, args: argparse.Namespace, threads: int) -> dict[str, float]:
    """By its own clock."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 2 * (args.prompt + args.new_tokens), 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    asked = {"n_predict": 1 + args.new_tokens, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
    for first in (1, 2):  # another prompt: nothing is in its cache
        found = server.handle_completions({**asked, "prompt": [first] * args.prompt})
    timings = found["timings"]
    assert timings["prompt_n"] == args.prompt, timings
    return {"prompt": timings["prompt_ms"] / 1000, "token": timings["predicted_per_token_ms"] / 1000}


def export(run: TrainedRun, blueprint: Blueprint, folder: Path, format: str, dtype: str) -> Path:
    """What an earlier call has left there is used."""
    if not folder.is_dir():
        print(f"writing {folder.name}", flush=True)
        run.export(blueprint, folder, format, dtype)
    return folder


def num_params(run: TrainedRun, blueprint: Blueprint) -> dict[str, int]:
    """Those that a new token reads, and those that a prompt reads for the logits of one token."""
    own, held = run.job.layout.own_keys(blueprint)
    every, fields = own.num_params(held), run.job.model_config
    return {"token": every, "prompt": every - fields.vocab_size * fields.hidden_size}


def in_a_process(case: tuple[str, Path, int, int]) -> dict[str, float]:
    engine, folder, threads, batch = case
    only = ["--only", engine, str(folder), str(threads), str(batch)]
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], *only], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows_of(run: TrainedRun, args: argparse.Namespace, keep: Path) -> list[dict[str, Any]]:
    tickets = {FULL: run.blueprint(), **{size: run.blueprint(size) for size in args.sizes}}
    cases: dict[tuple[str, str, int, int], tuple[str, Path, int, int]] = {}
    for engine in args.engines:
        for size, blueprint in tickets.items():
            if engine == ZEROS and size != FULL:
                continue
            format, dtype = ENGINES[engine]
            name = "-".join((size.replace("/", "of"), format, dtype))
            folder = export(run, blueprint, keep / name, format, dtype)
            for threads in args.threads:
                for batch in BATCHES if engine in BATCHED else BATCHES[:1]:
                    cases[engine, size, threads, batch] = (engine, folder, threads, batch)
    times: dict[tuple[str, str, int, int], list[dict[str, float]]] = {key: [] for key in cases}
    for turn in range(args.turns):
        print(f"turn {turn + 1} of {args.turns}: {len(cases)} measurements", flush=True)
        for key, case in cases.items():
            times[key].append(in_a_process(case))
    params = {size: num_params(run, blueprint) for size, blueprint in tickets.items()}
    rows = []
    for (engine, size, threads, batch), found in times.items():
        row: dict[str, Any] = {"engine": engine, "ticket": size, "threads": threads, "batch": batch}
        row["bytes"] = sum(f.stat().st_size for f in cases[engine, size, threads, batch][1].glob("model*"))
        whole = times["torch" if engine == ZEROS else engine, FULL, threads, batch]
        for what in ("token", "prompt"):
            counted = "token" if engine in ALL_LOGITS else what
            best, full = (min(each[what] for each in every) for every in (found, whole))
            row[what] = {
                "seconds": best,
                "speed_up": full / best,
                "bound": params[FULL][counted] / params[size][counted],
            }
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder of a Llama model, or its GGUF file")
    parser.add_argument("--sizes", nargs="+", default=["2/3", "1/3"])
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument(
        "--keep", type=Path, help="folder for the tickets; what is there is used (default: none is kept)"
    )
    parser.add_argument("--out", type=Path, help="file for the results, JSON")
    parser.add_argument("--only", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        engine, folder, threads, batch = args.only
        print("\n" + json.dumps(measure(engine, Path(folder), args, int(threads), int(batch))))
        return
    words = ("blueprint.setting=both", "blueprint.ffn_blocks=12", "eval.sizes=[]")
    run = TrainedRun(args.model, words)
    with tempfile.TemporaryDirectory() as scratch:
        rows = rows_of(run, args, args.keep or Path(scratch))
    header = ("engine", "threads", "batch", "ticket", "ms a token", "faster", "bound", "ms a prompt", "faster", "bound")
    lines = []
    for row in rows:
        numbers = [
            n
            for each in (row["token"], row["prompt"])
            for n in (1000 * each["seconds"], each["speed_up"], each["bound"])
        ]
        lines.append([*(row[key] for key in ("engine", "threads", "batch", "ticket")), *numbers])
    show(header, lines)
    save({"model": Path(args.model).name, "prompt": args.prompt, "new_tokens": args.new_tokens, "rows": rows}, args.out)


if __name__ == "__main__":
    main()

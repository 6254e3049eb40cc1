"""One training step with the plain loss and with the chunked one, side by side: time and peak memory.

Each variant runs in a process of its own, so that its peak is its own; the variants take turns, and the best
of the turns counts, because other work on the machine only ever adds time.

    python benchmarks/step.py [--d-model 256] [--layers 4] [--window 512] [--batch 2] [--chunks 128 256 512]
        [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import save, show
from transformers import GPT2Config, GPT2LMHeadModel

from twist_fl.config.schema import TrainConfig
from twist_fl.training.interval import train_interval

PLAIN = 10**9
"""More tokens than any batch has: one chunk, the model's own loss."""


def measure(args: argparse.Namespace, chunk: int) -> dict[str, Any]:
    """Seconds of the best step, and the process's peak memory above what it held before the first, in MB."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=args.vocab, n_positions=args.window, n_embd=args.d_model, n_layer=args.layers, n_head=4
    )
    model = GPT2LMHeadModel(config)
    windows = torch.randint(args.vocab, (args.batch, args.window))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(args.steps):
        begin = time.perf_counter()
        interval = train_interval(model, [windows], TrainConfig(loss_chunk=chunk, precision=args.precision), 0)
        seconds.append(time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": min(seconds), "peak_mb": peak * 1024 / 1e6, "loss": interval.loss}


def in_a_process(args: argparse.Namespace, chunk: int) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--only", str(chunk)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--window", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--batch", type=int, default=2, help="sequences per step")
    parser.add_argument("--chunks", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file for the results, JSON")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args, args.only)))
        return
    found: dict[int, list[dict[str, Any]]] = {chunk: [] for chunk in (PLAIN, *args.chunks)}
    for _ in range(args.turns):
        for chunk, results in found.items():
            results.append(in_a_process(args, chunk))
    rows = [
        {
            "loss": "plain" if chunk == PLAIN else f"chunks of {chunk}",
            "seconds": min(result["seconds"] for result in results),
            "peak_mb": min(result["peak_mb"] for result in results),
            "first_loss": results[0]["loss"],
        }
        for chunk, results in found.items()
    ]
    plain_s, plain_mb = rows[0]["seconds"], rows[0]["peak_mb"]
    print(f"d={args.d_model} layers={args.layers} vocab={args.vocab} batch={args.batch}x{args.window}, "
          f"{args.precision}, {args.threads} threads, torch {torch.__version__}")  # fmt: skip
    show(
        ("loss", "s/step", "of plain", "peak MB", "of plain", "first loss"),
        [(r["loss"], r["seconds"], r["seconds"] / plain_s, r["peak_mb"], r["peak_mb"] / plain_mb, r["first_loss"])
         for r in rows],
    )  # fmt: skip
    save({"settings": {k: v for k, v in vars(args).items() if k not in ("out", "only")}, "rows": rows}, args.out)


if __name__ == "__main__":
    main()

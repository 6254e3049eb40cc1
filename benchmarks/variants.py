"""The true, masked and hybrid variant of one worker of GPT-2 (124 M): memory, time of a step, bytes of a round.

Each runs in a process of its own that holds the server's parameters already, so that its peak above them is what the
variant adds: the model's parameters (none in the hybrid, which looks at the server's), gradients, Adam's moments and
activations. The variants take turns, and the best of the turns counts.

    python benchmarks/variants.py [--num-sub 6] [--window 128] [--batch 1]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import psutil
import torch
from transformers import GPT2Config

from twist_fl.blueprint.blocks import make_layout
from twist_fl.blueprint.cost import BYTES_PER_PARAM, round_bytes
from twist_fl.blueprint.division import Division
from twist_fl.blueprint.drawing import draw_ticket, full_blueprint
from twist_fl.config.schema import TrainConfig
from twist_fl.model.masked import MaskedModel
from twist_fl.model.subnet import ModelCache, slice_state
from twist_fl.training.interval import train_interval

VARIANTS = ("true", "masked", "hybrid")
CONFIG = GPT2Config()
LAYOUT = make_layout(CONFIG.to_dict())


def measure(args: argparse.Namespace, variant: str) -> dict[str, float]:
    """Peak memory above the server's parameters, and a step's seconds in the better of two intervals."""
    torch.set_num_threads(args.threads)
    state = {param.name: torch.full(param.shape, 0.01) for param in LAYOUT.params}
    blueprint = draw_ticket(LAYOUT, Division(args.setting, ()), (args.num_sub, args.num_sub), 0, 0)
    windows = torch.randint(CONFIG.vocab_size, (args.batch, args.window), generator=torch.Generator().manual_seed(0))
    models = ModelCache(CONFIG, LAYOUT, "sqrt")
    before = psutil.Process().memory_info().rss
    if variant == "true":
        model = models.load(blueprint, slice_state(LAYOUT, state, blueprint))
    else:
        masked = MaskedModel(models)
        model = masked.load(blueprint, state, in_place=variant == "hybrid")
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        train_interval(model, [windows] * args.steps, TrainConfig(), 0)
        seconds.append((time.perf_counter() - begin) / args.steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    sent = [] if variant == "hybrid" else [blueprint if variant == "true" else full_blueprint(LAYOUT)]
    return {"seconds": min(seconds), "peak_mb": peak / 1e6, "round_mb": round_bytes(LAYOUT, sent) / 1e6}


def in_a_process(variant: str) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--only", variant]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=["attn", "ffn", "both"], default="both")
    parser.add_argument("--num-sub", type=int, default=6, help="blocks of 12")
    parser.add_argument("--window", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences per step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="batches of an interval")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--only", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args, args.only)))
        return
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(args.turns):
        for variant, results in found.items():
            results.append(in_a_process(variant))
    best = {name: {key: min(r[key] for r in results) for key in results[0]} for name, results in found.items()}
    blueprint = draw_ticket(LAYOUT, Division(args.setting, ()), (args.num_sub, args.num_sub), 0, 0)
    full, subnet = (4 * BYTES_PER_PARAM * LAYOUT.num_params(b) / 1e6 for b in (None, blueprint))
    print(f"GPT-2, {args.setting} {args.num_sub}/12, batch {args.batch}x{args.window}, {args.threads} threads, "
          f"torch {torch.__version__}; 16 bytes a parameter: full {full:.0f} MB, subnet {subnet:.0f} MB")  # fmt: skip
    print(f"{'variant':>8} {'peak MB':>8} {'of masked':>10} {'s/step':>8} {'of masked':>10} {'MB a round':>11}")
    for name, one in best.items():
        ratios = {key: one[key] / best["masked"][key] for key in ("peak_mb", "seconds")}
        print(f"{name:>8} {one['peak_mb']:8.0f} {ratios['peak_mb']:10.2f} {one['seconds']:8.3f} "
              f"{ratios['seconds']:10.2f} {one['round_mb']:11.1f}")  # fmt: skip


if __name__ == "__main__":
    main()

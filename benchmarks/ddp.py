"""TwIST against torch's DistributedDataParallel: the paper's Table 2 and Figure 6 as ratios.

GPT-2's proportions at a quarter of its width, vocabulary and context, which keeps the share of every product in the
FLOPs, and no dropout, which would take the fused attention kernel away on a CPU. Workers of one thread each; text and
batches the same. DDP runs under torchrun; the steps of the 12 settings run in as many processes side by side; some
settings run through Flower as `twist-fl train` does.

    python benchmarks/ddp.py [--flower 4 6] [--steps 6] [--turns 2] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import save, show
from steps import ddp_steps, random_model, subnet_steps
from torch import distributed

from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.blueprint.cost import state_bytes, step_flops
from twist_fl.blueprint.division import Division, Setting
from twist_fl.blueprint.drawing import draw_round
from twist_fl.config.schema import load_config
from twist_fl.federation.simulation import flower_run
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.memory import Peak
from twist_fl.training.job import Job, job_from_json, make_job

SETTINGS: tuple[Setting, ...] = ("attn", "ffn", "both")
SIZES = (10, 8, 6, 4)
PAPER_DDP = {"wall_clock": "4:35:42", "memory_gb": 1.88, "ms": 385}
# Table 2: wall clock and memory in GB; Figure 6: ms per batch.
PAPER: dict[tuple[str, int], dict[str, Any]] = {
    ("attn", 10): {"wall_clock": "4:19:06", "memory_gb": 1.87},
    ("attn", 8): {"wall_clock": "4:08:30", "memory_gb": 1.82},
    ("attn", 6): {"wall_clock": "3:52:27", "memory_gb": 1.79},
    ("attn", 4): {"wall_clock": "3:41:12", "memory_gb": 1.72, "ms": 317},
    ("ffn", 10): {"wall_clock": "4:30:31", "memory_gb": 1.82},
    ("ffn", 8): {"wall_clock": "4:14:19", "memory_gb": 1.73},
    ("ffn", 6): {"wall_clock": "4:06:53", "memory_gb": 1.63},
    ("ffn", 4): {"wall_clock": "3:54:19", "memory_gb": 1.53, "ms": 334},
    ("both", 10): {"wall_clock": "4:14:03", "memory_gb": 1.77},
    ("both", 8): {"wall_clock": "3:49:50", "memory_gb": 1.64},
    ("both", 6): {"wall_clock": "3:25:14", "memory_gb": 1.50},
    ("both", 4): {"wall_clock": "3:04:39", "memory_gb": 1.34, "ms": 263},
}


def overrides(args: argparse.Namespace) -> list[str]:
    return [
        *("model.n_layer=12", "model.n_head=12", f"model.n_embd={args.d_model}", f"model.n_positions={args.window}"),
        *(f"data.vocab_size={args.vocab}", f"data.window={args.window}", f"train.batch_size={args.batch}"),
        *(f"train.workers={args.workers}", f"train.interval={args.interval}", f"train.rounds={args.rounds}"),
        "train.optimizer_state=reset",  # DDP's moments do not travel either
        *(
            "model.dropout=0",
            "train.threads=1",
            "train.device=cpu",
            "eval.every=0",
            "eval.max_windows=8",
            "eval.sizes=[]",
        ),
        "checkpoint_every=1000000",
    ]


def draw(job: Job, setting: Setting, keep: int) -> list[Blueprint]:
    division = Division(setting, ((keep, keep),) * job.config.train.workers)
    division.check(job.layout)
    return draw_round(job.layout, division, job.config.seed, 1)


def batches(job: Job, worker: int, count: int) -> Iterator[torch.Tensor]:
    shard = job.shard(worker)
    for cursor in range(count):
        yield torch.tensor(job.corpus.train[shard.batch(cursor)], dtype=torch.int64)


# One process of DDP, under torchrun


def ddp_rank(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, job = distributed.get_rank(), job_from_json(args.job.read_text())
    peak = Peak()
    model = random_model(job)
    seconds = ddp_steps(model, batches(job, rank, args.warm_up + args.steps), job.config.train, args.warm_up)
    results: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(results, {"seconds": seconds, "peak_mb": peak.num_bytes() / 1e6})
    if rank == 0:
        save({"ranks": results}, args.out)
    distributed.destroy_process_group()


def ddp(args: argparse.Namespace, job_file: Path) -> dict[str, float]:
    out = job_file.with_name("ddp.json")
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.workers}", __file__]
    words = ["--rank-of", str(job_file), "--steps", str(args.steps), "--warm-up", str(args.warm_up), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launch, *words], check=True, env=environment)
    return worst(json.loads(out.read_text())["ranks"])


# Workers side by side, without a network


def subnet_worker(job_json: str, setting: Setting, keep: int, worker: int, args: Any, barrier: Any, found: Any) -> None:
    torch.set_num_threads(1)
    job = job_from_json(job_json)
    peak = Peak()
    model = random_model(job, draw(job, setting, keep)[worker])
    barrier.wait()
    handed_out = batches(job, worker, args.warm_up + args.steps)
    seconds = subnet_steps(model, handed_out, job.config.train, args.warm_up)
    barrier.wait()
    found.put({"seconds": seconds, "peak_mb": peak.num_bytes() / 1e6})


def subnets(args: argparse.Namespace, job: Job, setting: Setting, keep: int) -> dict[str, float]:
    # A fork of a process that has imported everything and computed nothing: its peak memory is its own.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ddp"])
    barrier, found = context.Barrier(args.workers), context.Queue()
    processes = [
        context.Process(target=subnet_worker, args=(job.to_json(), setting, keep, worker, args, barrier, found))
        for worker in range(args.workers)
    ]
    for process in processes:
        process.start()
    results = [found.get(timeout=args.timeout) for _ in processes]
    for process in processes:
        process.join()
    return worst(results)


def worst(results: list[dict[str, float]]) -> dict[str, float]:
    """A round waits for its slowest worker, and memory must be there for the largest."""
    return {key: max(result[key] for result in results) for key in results[0]}


# Rounds through Flower


def flower(args: argparse.Namespace, keep: int, scratch: Path) -> dict[str, Any]:
    """A round's seconds, Flower included, and its parts: medians after the first round."""
    config = load_config(overrides=[*overrides(args), f"blueprint.num_sub={keep}", f"dir={scratch / f'both-{keep}'}"])
    folder = RunFolder(Path(str(config.dir)))
    folder.create(make_job(config))
    with flower_run(folder, config, args.workers, {"mode": "train"}) as process:
        process.begin()
        process.wait(args.timeout)
    rounds = folder.events("round")[1:]
    if not folder.events("done"):
        raise SystemExit(f"the run failed: {(folder.path / 'flower.log').read_text()[-2000:]}")
    assert not any(event["dropped"] for event in rounds), rounds
    moved = [sum(event[way]["weights"] for way in ("bytes_down", "bytes_up")) for event in rounds]
    return {
        "keep": keep,
        "seconds": statistics.median(event["seconds"] for event in rounds),
        "training_seconds": statistics.median(event["training_seconds"] for event in rounds),
        "first_seconds": folder.events("round")[0]["seconds"],
        "mb_per_worker": statistics.median(moved) / args.workers / 1e6,
    }


# All of it


def best(turns: list[dict[str, float]]) -> dict[str, float]:
    """Other work on the machine only ever adds."""
    return {key: min(turn[key] for turn in turns) for key in turns[0]}


def seconds_of_clock(clock: str) -> int:
    hours, minutes, seconds = map(int, clock.split(":"))
    return 3600 * hours + 60 * minutes + seconds


def paper_ratios(setting: str, keep: int) -> dict[str, float]:
    """DDP over TwIST for time, TwIST over DDP for memory."""
    row = PAPER[setting, keep]
    found = {
        "paper_speed_up": seconds_of_clock(PAPER_DDP["wall_clock"]) / seconds_of_clock(row["wall_clock"]),  # type: ignore[arg-type]
        "paper_memory": row["memory_gb"] / PAPER_DDP["memory_gb"],
    }
    return found | ({"paper_step_speed_up": PAPER_DDP["ms"] / row["ms"]} if "ms" in row else {})


def compare(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    job = make_job(load_config(overrides=overrides(args)))
    job_file = scratch / "job.json"
    job_file.write_text(job.to_json())
    cases = [(setting, keep) for setting in args.setting for keep in SIZES]
    turns: dict[Any, list[dict[str, float]]] = {case: [] for case in ("ddp", *cases)}
    for turn in range(args.turns):
        print(f"turn {turn + 1} of {args.turns}: DDP under torchrun, then {len(cases)} settings …", flush=True)
        turns["ddp"].append(ddp(args, job_file))
        for setting, keep in cases:
            turns[setting, keep].append(subnets(args, job, setting, keep))
    whole, flops = best(turns["ddp"]), step_flops(job.layout, None, args.batch, args.window)
    rows = []
    for setting, keep in cases:
        blueprint = draw(job, setting, keep)[0]
        row = {"setting": setting, "keep": keep, "of": job.layout.num_blocks[0]} | best(turns[setting, keep])
        row["flop_ratio"] = flops / step_flops(job.layout, blueprint, args.batch, args.window)
        row["speed_up"] = whole["seconds"] / row["seconds"]
        row["memory"] = row["peak_mb"] / whole["peak_mb"]
        row["mb_per_interval"] = 2 * state_bytes(job.layout, blueprint) / 1e6
        rows.append(row | paper_ratios(setting, keep))
    through_flower = []
    for keep in args.flower:
        print(f"both {keep}/12 through Flower: {args.rounds} rounds of {args.interval} batches …", flush=True)
        found = flower(args, keep, scratch)
        found["ddp_seconds"] = args.interval * whole["seconds"]
        found["speed_up"] = found["ddp_seconds"] / found["seconds"]
        blueprint = draw(job, "both", keep)[0]
        found["flop_ratio"] = flops / step_flops(job.layout, blueprint, args.batch, args.window)
        through_flower.append(found)
    whole["mb_per_interval"] = args.interval * 2 * state_bytes(job.layout) / 1e6
    return {"num_params": job.layout.num_params(), "ddp": whole, "rows": rows, "flower": through_flower}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=192)
    parser.add_argument("--vocab", type=int, default=12_564)
    parser.add_argument("--window", type=int, default=256, help="tokens of a window")
    parser.add_argument(
        "--batch", type=int, default=8, help="windows of a batch: 2,048 tokens are the paper's 2 x 1024"
    )
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--interval", type=int, default=15, help="batches of a round")
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--flower", type=int, nargs="*", default=[4, 6], help="sizes of both to run through Flower")
    parser.add_argument("--rounds", type=int, default=6, help="of a run through Flower; the first is not counted")
    parser.add_argument("--steps", type=int, default=6, help="measured training steps, after --warm-up others")
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=600, help="seconds that one part may take")
    parser.add_argument("--out", type=Path, help="file for the results, JSON")
    parser.add_argument("--rank-of", type=Path, dest="job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        ddp_rank(args)
        return
    with tempfile.TemporaryDirectory() as scratch:
        found = compare(args, Path(scratch))
    whole = found["ddp"]
    print(f"DDP: {1e3 * whole['seconds']:.1f} ms a batch, peak {whole['peak_mb']:.0f} MB, "
          f"{whole['mb_per_interval']:.0f} MB a worker and {args.interval} batches")  # fmt: skip
    show(
        ("setting", "ms", "speed-up", "FLOPs", "share", "paper", "peak MB", "of DDP", "paper", "MB a round"),
        [
            (f"{r['setting']} {r['keep']}/{r['of']}", 1e3 * r["seconds"], r["speed_up"], r["flop_ratio"],
             r["speed_up"] / r["flop_ratio"], r["paper_speed_up"], r["peak_mb"], r["memory"], r["paper_memory"],
             r["mb_per_interval"])
            for r in found["rows"]
        ],
    )  # fmt: skip
    show(
        ("through Flower", "s a round", "training", "DDP s", "speed-up", "FLOPs", "share"),
        [
            (f"both {r['keep']}/12", r["seconds"], r["training_seconds"], r["ddp_seconds"], r["speed_up"],
             r["flop_ratio"], r["speed_up"] / r["flop_ratio"])
            for r in found["flower"]
        ],
    )  # fmt: skip
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "job", "timeout")}
    save({"settings": settings} | found, args.out)


if __name__ == "__main__":
    main()

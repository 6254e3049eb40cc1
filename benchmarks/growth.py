"""How a round's time and the server's memory grow with the number of workers and the size of the model.

Three parts: rounds of a tiny model through Flower with 1 to 64 simulated workers; the server's share of a round (send,
check, add, finish, by shared memory) for as many; and the same share for GPT-2 small to XL, four workers, one segment
at a time. A model that does not fit in --max-gb is measured with fewer layers and scaled by its parameters.

    python benchmarks/growth.py [--workers 1 4 16 64] [--sizes small medium large XL] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import GPT2_SIZES, gpt2_config, job_without_text, round_mean, save, show

from twist_fl.blueprint.blocks import make_layout
from twist_fl.blueprint.cost import state_bytes, step_flops, training_gib
from twist_fl.blueprint.division import Division
from twist_fl.blueprint.drawing import draw_round
from twist_fl.config.schema import load_config
from twist_fl.federation import transport, wire
from twist_fl.federation.packing import Packing
from twist_fl.federation.simulation import flower_run
from twist_fl.rounds import RunState, plan
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.memory import Peak
from twist_fl.training.job import Job, make_job
from twist_fl.training.worker import Reply, Task

TINY = """
    model.n_layer=5 model.n_head=12 model.n_embd=48 model.n_positions=32 data.vocab_size=512 data.window=32
    train.interval=2 train.batch_size=2 train.threads=1 train.device=cpu
    eval.every=0 eval.max_windows=4 eval.sizes=[] checkpoint_every=1000 flower.cpus_per_worker=1
"""
HALF = 6
"""Of 12 blocks; one worker alone must hold all."""


def through_flower(workers: int, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Seconds of a round, the median after the first, and of its slowest worker's part."""
    keep = f"blueprint.num_sub={HALF if workers > 1 else 12}"
    budget = (f"train.workers={workers}", f"train.rounds={args.rounds}", f"dir={scratch / f'flower-{workers}'}")
    config = load_config(overrides=[*TINY.split(), keep, *budget])
    folder = RunFolder(Path(str(config.dir)))
    folder.create(make_job(config))
    begin = time.perf_counter()
    with flower_run(folder, config, workers, {"mode": "train"}) as process:
        process.begin()
        process.wait(args.timeout)
    if not folder.events("done"):
        raise SystemExit(f"the run failed: {(folder.path / 'flower.log').read_text()[-2000:]}")
    rounds = folder.events("round")[1:]
    return {
        "workers": workers,
        "seconds": statistics.median(event["seconds"] for event in rounds),
        "training_seconds": statistics.median(event["training_seconds"] for event in rounds),
        "command_seconds": time.perf_counter() - begin,
    }


def server_share(job: Job, one_segment: bool) -> tuple[float, int]:
    """Seconds of the server's part of a round in which replies come back as they were sent; bytes of segments.

    With `one_segment` each task takes the memory of the one before, and every reply is the last task's tensors, which
    have the same shapes: so a machine holds one worker's where a run would hold all of them.
    """
    generator = torch.Generator().manual_seed(0)
    num_workers = job.config.train.workers
    state = RunState(
        {param.name: torch.randn(param.shape, generator=generator) for param in job.layout.params}, [0] * num_workers
    )
    segments, seconds = transport.Segments({"shm": partial(transport.create, job.run_id)}), 0.0
    for _ in range(2):  # in the first, memory is new
        begin, replying = time.perf_counter(), 0.0
        tasks = plan(job, state)
        mean = round_mean(job, state, tasks)
        of = {0 if one_segment else task.worker: Packing.of(job, task.blueprint).segment_bytes for task in tasks}
        segments.deal({worker: ("shm", size) for worker, size in of.items()})
        for task in tasks:
            segment = segments.take(0 if one_segment else task.worker)
            wire.task_to_records(job, "", task, state.params, None, segment)
        for task in tasks:
            memory = segments.get(0 if one_segment else task.worker)
            assert memory is not None
            replying -= time.perf_counter()
            content = wire.reply_to_records(job, task.blueprint, unchanged(job, task, memory), memory)
            replying += time.perf_counter()
            reply = wire.reply_from_records(job, task.blueprint, content, memory)
            mean.add(task, reply, lasts=not one_segment)
        assert not mean.report.dropped, mean.report.dropped
        state = mean.finish()
        state.cursors = [0] * num_workers
        seconds = time.perf_counter() - begin - replying
    num_segments = 1 if one_segment else num_workers
    return seconds, num_segments * Packing.of(job, tasks[0].blueprint).segment_bytes


def unchanged(job: Job, task: Task, memory: transport.Segment) -> Reply:
    """What was sent, read where it lies: takes no memory of its own."""
    params = Packing.of(job, task.blueprint).views_of_all(memory.memory)["params"]
    tokens = task.num_batches * job.shard(task.worker).batch_length(0) * (job.config.data.window - 1)
    return Reply(task.digest, params, 1.0, tokens, task.num_batches)


def server_of(workers: int, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """In a process of its own, whose peak is its own."""
    model = gpt2_config(n_embd=args.d_model, vocab_size=args.vocab)
    keep = f"blueprint.num_sub={HALF if workers > 1 else 12}"
    job = _job(model, scratch, keep, workers)
    peak, state = Peak(), state_bytes(job.layout)
    seconds, segments = server_share(job, one_segment=False)
    own = peak.num_bytes() - segments
    return {"workers": workers, "seconds": seconds, "state_mb": state / 1e6, "copies": own / state,
            "segment_mb": segments / 1e6}  # fmt: skip


def size_of(name: str, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """One size of GPT-2 by the cost model, and the server's share of a round with four workers."""
    sizes = GPT2_SIZES[name]
    keep = -(-sizes["n_head"] // 2)
    layout = make_layout(gpt2_config(**sizes).to_dict())
    blueprint = draw_round(layout, Division("both", ((keep, keep),) * 4), 0, 1)[0]
    layers = sizes["n_layer"]
    while layers > 5 and 5 * state_bytes(make_layout(gpt2_config(**sizes | {"n_layer": layers}).to_dict())) > (
        args.max_gb * 1e9
    ):
        layers -= 1
    job = _job(gpt2_config(**sizes | {"n_layer": layers}), scratch, f"blueprint.num_sub={keep}", 4)
    measured = job.layout.num_params(job.blueprints(1)[0])
    peak = Peak()
    seconds, segments = server_share(job, one_segment=True)
    copies = (peak.num_bytes() - segments) / state_bytes(job.layout)
    scale = layout.num_params(blueprint) / measured
    return {
        "size": name,
        "num_params": layout.num_params(),
        "keep": keep,
        "of": sizes["n_head"],
        "subnet_params": layout.num_params(blueprint),
        "mb_each_way": state_bytes(layout, blueprint) / 1e6,
        "tflop_step": step_flops(layout, blueprint, 2, 1024) / 1e12,
        "training_gib": training_gib(layout, blueprint),
        "layers": sizes["n_layer"],
        "layers_measured": layers,
        "server_seconds": scale * seconds,
        "server_gb": copies * state_bytes(layout) / 1e9,
        "copies": copies,
    }


def _job(model: Any, scratch: Path, keep: str, workers: int) -> Job:
    budget = (f"train.workers={workers}", "train.rounds=1", "train.interval=1", "train.batch_size=1")
    return job_without_text(model, scratch / "text", keep, *budget, "train.device=cpu")


def in_a_process(args: argparse.Namespace, *words: str) -> dict[str, Any]:
    given = ["--d-model", str(args.d_model), "--vocab", str(args.vocab), "--max-gb", str(args.max_gb)]
    command = [sys.executable, __file__, *given, *words]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--flower", type=int, nargs="*", default=[1, 4, 16, 64], help="workers of runs through Flower")
    parser.add_argument("--rounds", type=int, default=4, help="of a run through Flower; the first is not counted")
    parser.add_argument("--sizes", nargs="*", choices=list(GPT2_SIZES), default=list(GPT2_SIZES))
    parser.add_argument("--d-model", type=int, default=288, help="width of the model for --workers")
    parser.add_argument("--vocab", type=int, default=12_564, help="vocabulary of the model for --workers")
    parser.add_argument("--max-gb", type=float, default=5.0, help="memory that a measured size may take")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that one run through Flower may take")
    parser.add_argument("--out", type=Path, help="file for the results, JSON")
    parser.add_argument("--server-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--size-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in the server, where the workers have the cores
    with tempfile.TemporaryDirectory() as scratch:
        if args.server_of:
            print(json.dumps(server_of(args.server_of, args, Path(scratch))))
            return
        if args.size_of:
            print(json.dumps(size_of(args.size_of, args, Path(scratch))))
            return
        flower = []
        for workers in args.flower:
            print(f"{args.rounds} rounds through Flower, {workers} workers …", flush=True)
            flower.append(through_flower(workers, args, Path(scratch)))
    print("the server's share of a round …", flush=True)
    servers = [in_a_process(args, "--server-of", str(workers)) for workers in args.workers]
    sizes = [in_a_process(args, "--size-of", name) for name in args.sizes]
    show(
        ("S through Flower", "s a round", "training", "beside, per worker"),
        [(r["workers"], r["seconds"], r["training_seconds"], (r["seconds"] - r["training_seconds"]) / r["workers"])
         for r in flower],
    )  # fmt: skip
    show(
        ("S", "server s", "per worker", "copies of state", "segments MB"),
        [(r["workers"], r["seconds"], r["seconds"] / r["workers"], r["copies"], r["segment_mb"]) for r in servers],
    )
    show(
        ("size", "M params", "M subnet", "MB each way", "TFLOP/step", "GiB", "server s", "server GB", "layers"),
        [(r["size"], r["num_params"] / 1e6, r["subnet_params"] / 1e6, r["mb_each_way"], r["tflop_step"],
          r["training_gib"], r["server_seconds"], r["server_gb"], f"{r['layers_measured']} of {r['layers']}")
         for r in sizes],
    )  # fmt: skip
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "timeout", "server_of", "size_of")}
    save({"settings": settings, "flower": flower, "server": servers, "sizes": sizes}, args.out)


if __name__ == "__main__":
    main()

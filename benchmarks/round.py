"""A round of GPT-2 124M, phase by phase: what each phase must move and compute, its floor, and what it takes.

Slice, ship, load, return and aggregate run as in the app, by shared memory, but in one process and without Flower's own
messages (`transport.py` measures those). Training is one step of the real batch, times the interval. One thread
each: a phase of the workers is the seconds of one of them, a phase of the server the seconds for all. A floor is
the bytes at the rate of a plain copy, or the matrix products' FLOPs at that of a large float32 product, both
measured in the same run.

    python benchmarks/round.py [--keep 4 6] [--workers 4] [--turns 3] [--out FILE]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import copy_bandwidth, flops_per_second, gpt2_config, job_without_text, round_mean, save, seconds_of, show

from twist_fl.blueprint.cost import step_flops
from twist_fl.config.schema import TrainConfig
from twist_fl.federation import transport, wire
from twist_fl.federation.packing import Packing
from twist_fl.federation.tensors import handle_of
from twist_fl.model.subnet import get_state
from twist_fl.rounds import RunState, plan
from twist_fl.training.interval import train_interval
from twist_fl.training.job import Job
from twist_fl.training.worker import Reply, Task

SERVER, WORKER, BOTH = "server", "worker", "both"


def must_do(job: Job, tasks: list[Task], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Each phase's place, its bytes read and written, whole copies of the subnet, and FLOPs, at the least."""
    subnet, full = (job.layout.num_params(b) for b in (tasks[0].blueprint, None))
    flops = args.interval * step_flops(job.layout, tasks[0].blueprint, args.batch, args.window)
    all_ = len(tasks)
    return {
        "slice": {"at": SERVER, "bytes": 8 * subnet * all_, "copies": 1, "flops": 0},
        "ship": {"at": BOTH, "bytes": 0, "copies": 0, "flops": 0},
        # A worker's model computes where its task lies, and leaves its reply there.
        "load": {"at": WORKER, "bytes": 0, "copies": 0, "flops": 0},
        "train": {"at": WORKER, "bytes": 0, "copies": 0, "flops": flops},
        "return": {"at": WORKER, "bytes": 0, "copies": 0, "flops": 0},
        # All replies lie in their segments: each is read once, and the mean written.
        "aggregate": {"at": SERVER, "bytes": 4 * subnet * all_ + 4 * full, "copies": 0, "flops": 0},
    }


class Clock(dict[str, float]):
    """Seconds spent in each phase."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self[phase] = self.get(phase, 0.0) + time.perf_counter() - begin


class Round:
    """One round of untrained replies; the seconds of every phase, the best of all turns."""

    def __init__(self, job: Job) -> None:
        self.job, self.best = job, dict[str, float]()
        generator = torch.Generator().manual_seed(0)
        params = {p.name: 0.02 * torch.randn(p.shape, generator=generator) for p in job.layout.params}
        self.state = RunState(params, [0] * job.config.train.workers)
        self.tasks = plan(job, self.state)
        self.models = job.models("cpu")
        self.segments = transport.Segments({"shm": partial(transport.create, job.run_id)})

    def turn(self) -> None:
        job, clock = self.job, Clock()
        mean = round_mean(job, self.state, self.tasks)
        sent = []
        self.segments.deal({task.worker: ("shm", Packing.of(job, task.blueprint).segment_bytes) for task in self.tasks})
        for task in self.tasks:  # all before the first reply, which takes the place of the state
            segment = self.segments.take(task.worker)
            with clock("send"):
                content = wire.task_to_records(job, "", task, self.state.params, None, segment)
            with clock("checksum"):  # again, alone: sending is slicing into the segment, and this
                transport.checksum(segment.memory)
            sent.append((task, segment, content))
        for task, segment, content in sent:
            blueprint = task.blueprint
            with clock("receive"):
                parcel = wire.task_from_records(job, content)
            with clock("load"):
                model = self.models.load(parcel.task.blueprint, parcel.params, parcel.in_place)
            tokens = task.num_batches * job.shard(task.worker).batch_length(0) * (job.config.data.window - 1)
            reply = Reply(task.digest, get_state(model), 1.0, tokens, task.num_batches)
            with clock("return"):
                answer = wire.reply_to_records(job, blueprint, reply, parcel.segment)
            assert handle_of(answer), "the tensors did not go by shared memory"
            with clock("aggregate"):
                mean.add(task, wire.reply_from_records(job, blueprint, answer, segment), lasts=True)
        assert not mean.report.dropped, mean.report.dropped
        with clock("aggregate"):
            self.state = mean.finish()
        self.state.cursors = [0] * len(self.tasks)
        workers = len(self.tasks)
        seconds = {
            "slice": clock["send"] - clock["checksum"],
            "ship": clock["checksum"] + clock["receive"] / workers,
            "load": clock["load"] / workers,
            "return": clock["return"] / workers,
            "aggregate": clock["aggregate"],
        }
        self.best = {name: min(spent, self.best.get(name, spent)) for name, spent in seconds.items()}


def training_seconds(round_: Round, args: argparse.Namespace) -> float:
    """One interval: the best of a few steps of the whole batch, after one on few tokens, times the interval."""
    blueprint = round_.tasks[0].blueprint
    model = round_.models.load_sliced(blueprint, round_.state.params)
    config = TrainConfig()
    vocabulary = round_.job.model_config.vocab_size
    train_interval(model, [torch.randint(vocabulary, (1, min(64, args.window)))], config, 0)
    windows = torch.randint(vocabulary, (args.batch, args.window))
    step = min(seconds_of(lambda: train_interval(model, [windows], config, 0)) for _ in range(args.steps))
    return float(args.interval * step)


def measure(keep: int, args: argparse.Namespace, rates: dict[str, float], scratch: Path) -> dict[str, Any]:
    sizes = {"n_embd": args.d_model, "vocab_size": args.vocab, "n_positions": args.window}
    blueprint = (f"blueprint.num_sub={keep}", f"train.workers={args.workers}")
    budget = (f"train.interval={args.interval}", "train.rounds=1", "train.batch_size=1", "train.device=cpu")
    job = job_without_text(gpt2_config(**sizes), scratch / "text", *blueprint, *budget)
    round_ = Round(job)
    phases = must_do(job, round_.tasks, args)
    for _ in range(args.turns):
        round_.turn()
    round_.segments.close()
    print(f"both {keep}/12: one interval of training, {args.steps} step(s) of {args.batch} x {args.window} tokens …")
    seconds = {**round_.best, "train": training_seconds(round_, args)}
    for name, phase in phases.items():
        phase["floor_seconds"] = phase["bytes"] / rates["copy"] + phase["flops"] / rates["flops"]
        phase["seconds"] = seconds[name]
    subnet = job.layout.num_params(round_.tasks[0].blueprint)
    return {"keep": keep, "of": job.layout.num_blocks[0], "subnet_params": subnet, "phases": phases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=int, nargs="+", default=[4, 6], help="blocks of 12 that a worker holds")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--interval", type=int, default=15, help="batches of a round")
    parser.add_argument("--batch", type=int, default=2, help="windows of a batch")
    parser.add_argument("--window", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=50_257)
    parser.add_argument("--turns", type=int, default=3, help="rounds of which the best counts, training aside")
    parser.add_argument("--steps", type=int, default=1, help="training steps of which the best counts")
    parser.add_argument("--out", type=Path, help="file for the results, JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rates = {"copy": copy_bandwidth(), "flops": flops_per_second()}
    print(f"one thread: copy {rates['copy'] / 1e9:.2f} GB/s, float32 product {rates['flops'] / 1e9:.1f} GFLOP/s")
    with tempfile.TemporaryDirectory() as scratch:
        found = [measure(keep, args, rates, Path(scratch)) for keep in args.keep]
    for case in found:
        print(f"both {case['keep']}/{case['of']}, S={args.workers}: {case['subnet_params']:,} parameters a worker")
        show(
            ("phase", "at", "MB", "copies", "TFLOP", "floor s", "s", "s / floor"),
            [
                (name, p["at"], p["bytes"] / 1e6, p["copies"], p["flops"] / 1e12, p["floor_seconds"], p["seconds"],
                 p["seconds"] / p["floor_seconds"] if p["floor_seconds"] else "-")
                for name, p in case["phases"].items()
            ],
        )  # fmt: skip
    save({"settings": {k: v for k, v in vars(args).items() if k != "out"}, "rates": rates, "cases": found}, args.out)


if __name__ == "__main__":
    main()

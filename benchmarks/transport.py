"""Seconds a round of everything but training, by Flower's messages and by shared memory, beside a plain copy.

A real Flower simulation (Ray) with GPT-2's proportions and `both` 4/12. The workers load what they get into their model
(by shared memory, the model takes it where it lies) and return it untrained. The limit is one copy of the same bytes by
one thread, taken in the same process right after.

    python benchmarks/transport.py --mb 300 --workers 4 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "OMP_WAIT_POLICY": "PASSIVE"}
os.environ |= {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from transformers import GPT2Config

from twist_fl.blueprint.blocks import make_layout
from twist_fl.blueprint.cost import round_bytes
from twist_fl.config.schema import load_config
from twist_fl.federation import apps, wire
from twist_fl.federation.strategy import TwistStrategy
from twist_fl.model.subnet import get_state, take_back
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.files import write_text
from twist_fl.system.provenance import provenance
from twist_fl.training.job import Job, make_job
from twist_fl.training.worker import Reply

VOCAB, POSITIONS, LAYERS, HEADS, HELD = 50_257, 1_024, 12, 12, 4


def job_of_size(megabytes: float, workers: int, rounds: int, transport: str, folder: Path) -> Job:
    """GPT-2's layers, heads and vocabulary, as wide as a subnet of `megabytes` (10^6 bytes) allows."""
    (folder / "text").mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        text = "".join(random.Random(part).choices("abcdefgh ,.\n", k=40_000))
        (folder / "text" / f"{part}.txt").write_text(text)
    job = make_job(
        load_config(
            overrides=[
                *("data.source=files", f"data.path={folder / 'text'}", "data.vocab_size=300", "data.window=16"),
                *(f"model.n_layer={LAYERS}", f"model.n_head={HEADS}", f"model.n_embd={HEADS}"),
                *(f"blueprint.num_sub={HELD}", f"train.workers={workers}", f"train.rounds={rounds}"),
                *("train.interval=1", "train.device=cpu", "eval.every=0", "checkpoint_every=1000"),
                *(f"flower.transport={transport}", "flower.poll_interval=0.005"),
            ]
        )
    )
    width, best = HEADS, job
    while True:
        config = GPT2Config(
            vocab_size=VOCAB,
            n_positions=POSITIONS,
            n_layer=LAYERS,
            n_head=HEADS,
            n_embd=width,
            bos_token_id=0,
            eos_token_id=0,
        )
        sized = replace(job, model_fields=config.to_dict(), layout=make_layout(config.to_dict()))
        if round_bytes(sized.layout, sized.blueprints(1)) / (2 * workers) > 1e6 * megabytes:
            return best
        width, best = width + HEADS, sized


def client_app() -> ClientApp:
    app = ClientApp()

    @app.query()
    def connect(message: Message, context: Context) -> Message:
        worker = apps.worker_for(wire.job_of(message.content))
        partition = str(context.node_config["partition-id"])
        return Message(wire.answer(message.content, worker.job.run_id, partition), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        """All of a round but the training."""
        torch.set_num_threads(1)
        worker = apps.worker_for(wire.job_of(message.content))
        started = time.perf_counter()
        parcel = wire.task_from_records(worker.job, message.content)
        task = parcel.task
        model = worker.load(task, parcel.params, parcel.in_place)
        seconds = time.perf_counter() - started
        shard = worker.job.shard(task.worker)
        tokens = shard.batch_length(task.cursor) * (worker.job.config.data.window - 1)
        reply = Reply(task.digest, get_state(model), 1.0, tokens, task.num_batches, seconds)
        take_back(model)
        return Message(wire.reply_to_records(worker.job, task.blueprint, reply, parcel.segment), reply_to=message)

    return app


def server_app(job: Job, folder: RunFolder) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        TwistStrategy(job, folder).run(grid)

    return app


def seconds_per_copy(num_bytes: int) -> float:
    """One copy of `num_bytes`, in pieces that stay far larger than any cache: median of five."""
    piece = min(num_bytes, 200_000_000)
    source, target = torch.ones(piece // 4), torch.zeros(piece // 4)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(max(1, round(num_bytes / piece))):
            target.copy_(source)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(transport: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Median over the rounds after the first, which builds the models."""
    torch.set_num_threads(1)
    job = job_of_size(arguments.mb, arguments.workers, arguments.rounds + 1, transport, folder)
    run = RunFolder(folder / transport)
    run.create(job)
    backend = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": arguments.workers}}
    run_simulation(server_app(job, run), client_app(), num_supernodes=arguments.workers, backend_config=backend)
    rounds = run.events("round")[1:]
    assert len(rounds) == arguments.rounds, f"only {len(rounds)} rounds: {run.events()}"
    assert all(event["bytes_via"][transport] and not event["dropped"] for event in rounds)
    moved = sum(rounds[-1]["bytes_via"].values())
    return {
        "transport": transport,
        "mb_per_worker": moved / (2e6 * arguments.workers),
        "mb_moved": moved / 1e6,
        "first": run.events("round")[0]["seconds"],
        "seconds": statistics.median(event["seconds"] for event in rounds),
        "best": min(event["seconds"] for event in rounds),
        "receive_and_load": statistics.median(event["training_seconds"] for event in rounds),
        "copy": seconds_per_copy(moved),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=300.0, help="size of a worker's subnet, MB of 10^6 bytes")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds; one more comes before them")
    parser.add_argument("--out", type=Path, help="write the results here, with commit and hardware (JSON)")
    parser.add_argument("--transport", nargs="+", choices=["inline", "shm"], default=["inline", "shm"])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TWIST_FL_CACHE"] = str(Path(scratch) / "cache")
        rows = [measure(transport, arguments, Path(scratch)) for transport in arguments.transport]
    limit = min(row["copy"] for row in rows)
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{rows[-1]['mb_moved']:.0f} MB a round, {arguments.workers} workers, {os.cpu_count()} cores, load {load}")
    print(f"{'':10}{'s a round':>12}{'best':>10}{'x limit':>10}{'x last':>10}")
    for row in rows:
        seconds, to_last = row["seconds"], row["seconds"] / rows[-1]["seconds"]
        print(f"{row['transport']:10}{seconds:12.3f}{row['best']:10.3f}{seconds / limit:10.1f}{to_last:10.2f}")
    print(f"{'one copy':10}{limit:12.3f}{limit:10.3f}{1:10.1f}")
    if arguments.out:
        settings = {"workers": arguments.workers, "rounds": arguments.rounds, "load": os.getloadavg()}
        write_text(json.dumps(provenance() | settings | {"rows": rows}, indent=1), arguments.out)


if __name__ == "__main__":
    main()

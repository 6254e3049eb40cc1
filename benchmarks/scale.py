"""A simulation of many nodes of which few train a round, beside Flower's own FedAvg with as many bytes and no training.

python benchmarks/scale.py [--nodes 100 1000] [--round 16] [--rounds 10] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import Any

import numpy as np
import psutil
from common import save, show
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from twist_fl.runs.checkpoint import RunFolder

TINY = """
    model.n_layer=3 model.n_embd=24 model.n_positions=16 data.window=16 data.vocab_size=300 blueprint.undivided_first=1
    train.interval=2 train.batch_size=2 train.threads=1 train.device=cpu eval.tickets=1 eval.sizes=[6] eval.every=0
    eval.max_windows=8 checkpoint_every=1000
"""


def watched(command: list[str]) -> dict[str, float]:
    """Seconds that it ran, and the most memory that it and its children held at a time: their proportional set sizes,
    in which what they share counts once. Raises SystemExit if it fails."""
    found, ended = {"peak_bytes": 0.0}, Event()
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def watch() -> None:
        whole = psutil.Process(process.pid)
        while not ended.wait(1.0):
            held = 0
            for each in (whole, *whole.children(recursive=True)):
                try:
                    held += each.memory_full_info().pss
                except psutil.Error:  # it has just ended
                    continue
            found["peak_bytes"] = max(found["peak_bytes"], held)

    watching = Thread(target=watch)
    watching.start()
    status = process.wait()
    ended.set()
    watching.join()
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}")
    return found | {"whole_seconds": time.perf_counter() - begun}


def ours(nodes: int, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    folder = RunFolder(scratch / f"run-{nodes}")
    words = [*TINY.split(), f"train.workers={nodes}", f"train.fraction={args.round / nodes}"]
    words += [f"train.rounds={args.rounds}", f"dir={folder.path}"]
    found = watched([sys.executable, "-m", "twist_fl", "train", "demo", *words])
    rounds = folder.events("round")[1:]  # the first builds the models
    sent = [sum(each["bytes_down"].values()) for each in rounds]
    return found | {
        "seconds": median(each["seconds"] for each in rounds),
        "training": median(each["training_seconds"] for each in rounds),
        "bytes": round(median(sent) / args.round),
        "answered": min(len(each["answered"]) for each in rounds),
    }


def stock(nodes: int, args: argparse.Namespace, scratch: Path, num_bytes: int) -> dict[str, Any]:
    out = scratch / f"stock-{nodes}.json"
    given = [str(nodes), str(num_bytes), str(out)]
    found = watched([sys.executable, __file__, *sys.argv[1:], "--only", *given])
    times = json.loads(out.read_text())[1:]  # the first round waits for Ray
    return found | {"seconds": median(b - a for a, b in pairwise(times)), "bytes": num_bytes}


class Timed(FedAvg):
    """Notes when each round begins."""

    def __init__(self, *args: Any, **others: Any) -> None:
        super().__init__(*args, **others)
        self.times: list[float] = []

    def configure_train(self, *args: Any, **others: Any) -> Any:
        self.times.append(time.perf_counter())
        return super().configure_train(*args, **others)


def run_stock(nodes: int, num_bytes: int, out: Path, args: argparse.Namespace) -> None:
    client, server = ClientApp(), ServerApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = Timed(fraction_train=args.round / nodes, fraction_evaluate=0.0, min_train_nodes=args.round,
                         min_available_nodes=nodes)  # fmt: skip
        arrays = ArrayRecord([np.zeros(num_bytes // 4, np.float32)])
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=args.rounds)
        out.write_text(json.dumps([*strategy.times, time.perf_counter()]))

    run_simulation(server, client, num_supernodes=nodes, backend_config={"client_resources": {"num_cpus": 1}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--round", type=int, default=16, help="nodes that train a round")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, help="file for the results, JSON")
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        run_stock(int(args.only[0]), int(args.only[1]), Path(args.only[2]), args)
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for nodes in args.nodes:
            mine = ours(nodes, args, Path(scratch))
            rows.append({"nodes": nodes, "what": "twist_fl"} | mine)
            flower = stock(nodes, args, Path(scratch), mine["bytes"])
            rows.append({"nodes": nodes, "what": "Flower's FedAvg, no training"} | flower)
    header = ("", "nodes", "s a round", "longest training", "peak GB", "whole s")
    show(header, [
        (r["what"], r["nodes"], r["seconds"], r.get("training", 0.0), r["peak_bytes"] / 1e9, r["whole_seconds"])
        for r in rows
    ])  # fmt: skip
    save({"round": args.round, "rounds": args.rounds, "rows": rows}, args.out)


if __name__ == "__main__":
    main()

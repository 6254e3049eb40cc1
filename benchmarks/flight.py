"""What a round costs beside its training where nodes share no memory: Flower's messages against Arrow Flight over TLS.

A SuperLink and `twist-fl node`s on this machine's loopback, one job after the other. The limit is two plain copies of
the same bytes by one thread: one on each side.

    python benchmarks/flight.py [--nodes 4] [--mb 300] [--rounds 3] [--out FILE]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import save, seconds_of, show
from loopback import network, warm_node
from warm_nodes import JOB, TIMEOUT, width_of

from twist_fl.runs.checkpoint import RunFolder

BY_FLIGHT = "flower.transport=flight flower.flight=127.0.0.1:0"
WAYS = {
    "inline": "flower.transport=inline",
    "flight": BY_FLIGHT,
    "flight, bfloat16": f"{BY_FLIGHT} flower.wire_dtype=bfloat16",
}


def measure(home: Path, nodes: int, overrides: str) -> dict[str, Any]:
    """Seconds beside training of each round after the first, which builds the models."""
    folder = RunFolder(home / "run")
    with network(home / "flower", nodes, warm_node) as running:
        output = running.run({"preset": "demo", "overrides": overrides, "run-dir": str(folder.path)}, TIMEOUT)
        logs = [running.node_log(i).read_text() for i in range(nodes)]
    if not folder.events("done"):
        raise SystemExit(output + "".join(logs))
    rounds = folder.events("round")
    assert not any(event["dropped"] for event in rounds), rounds
    beside = [event["seconds"] - event["training_seconds"] for event in rounds]
    return {
        "mb_per_worker": rounds[-1]["bytes_down"]["weights"] / nodes / 1e6,
        "mb_moved": sum(rounds[-1]["bytes_via"].values()) / 1e6,
        "first": beside[0],
        "later": beside[1:],
        "seconds": statistics.median(beside[1:]),
        "two_copies": two_copies(sum(rounds[-1]["bytes_via"].values())),
        "load": os.getloadavg(),  # a ratio is worth what the machine's other jobs leave of it
    }


def two_copies(num_bytes: int) -> float:
    """Seconds, of the best of three."""
    source = torch.ones(50_000_000)
    target = torch.empty_like(source)
    best = min(seconds_of(lambda: target.copy_(source)) for _ in range(4))
    return 2 * best * num_bytes / (4 * len(source))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=4, help="and workers")
    parser.add_argument("--mb", type=float, default=300.0, help="size of a worker's subnet, MB of 10^6 bytes")
    parser.add_argument("--rounds", type=int, default=3, help="the first, which builds the models, is not counted")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--out", type=Path, help="file for the results, JSON")
    args = parser.parse_args()
    sizes = f"train.workers={args.nodes} model.n_embd={width_of(args.mb)} train.rounds={args.rounds}"
    rows = []
    for name in args.ways:
        with tempfile.TemporaryDirectory() as scratch:
            found = measure(Path(scratch), args.nodes, f"{' '.join(JOB.split())} {sizes} {WAYS[name]}")
        rows.append({"transport": name, **found})
        print(f"{name}: {found['seconds']:.2f} s a round beside training", flush=True)
        time.sleep(1)  # until the network's processes have left the cores
    first = rows[0]["seconds"]
    rows = [row | {"faster": first / row["seconds"]} for row in rows]
    save({"num_nodes": args.nodes, "rows": rows}, args.out)
    show(
        ("transport", "MB a worker", "first s", "later s", "times faster", "two copies s", "s / two copies"),
        [
            (
                row["transport"],
                f"{row['mb_per_worker']:.1f}",
                f"{row['first']:.2f}",
                f"{row['seconds']:.2f}",
                f"{row['faster']:.1f}",
                f"{row['two_copies']:.2f}",
                f"{row['seconds'] / row['two_copies']:.1f}",
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()

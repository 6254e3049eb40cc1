"""What a round costs beside its training where nodes share no memory: Flower's messages against Arrow Flight over TLS.

A SuperLink and `twist-fl node`s on this machine's loopback, one job after the other. The limit is two plain copies of
the same bytes by one thread: one on each side.

    python benchmarks/flight.py [--nodes 4] [--mb 300] [--rounds 3] [--out FILE]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from common import save, seconds_of, show
from loopback import warm_node
from warm_nodes import JOB, measure, width_of

BY_FLIGHT = "flower.transport=flight flower.flight=127.0.0.1:0"
WAYS = {
    "inline": "flower.transport=inline",
    "flight": BY_FLIGHT,
    "flight, bfloat16": f"{BY_FLIGHT} flower.wire_dtype=bfloat16",
}


def two_copies(num_bytes: float) -> float:
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
            words = f"{' '.join(JOB.split())} {sizes} {WAYS[name]}"
            found = measure(Path(scratch), words, warm_node, args.nodes)
        rows.append({"transport": name, **found, "two_copies": two_copies(1e6 * found["mb_moved"])})
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

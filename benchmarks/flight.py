"""What a round costs beside its training where nodes share no memory: Flower's messages against Arrow Flight over TLS.

A SuperLink and `twist-fl node`s on this machine's loopback, one job after the other. The limit is two plain copies of
the same bytes by one thread: one on each side. With --line the nodes are in a network namespace at the other end of a
line of so many Mbit/s and of so many ms there and back, which all share (as root): the limit is the line, with the
tasks' bytes one after the other, then the replies'.

    python benchmarks/flight.py [--nodes 4] [--mb 300] [--rounds 3] [--line 1000 20] [--out FILE]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from common import save, seconds_of, show
from line import HERE, line
from loopback import warm_node
from warm_nodes import JOB, measure, width_of

WAYS = {
    "inline": "flower.transport=inline",
    "flight": "flower.transport=flight flower.flight={host}:0",
    "flight, bfloat16": "flower.transport=flight flower.flight={host}:0 flower.wire_dtype=bfloat16",
}


def measure_over(shape: tuple[float, float] | None, home: Path, nodes: int, overrides: str) -> dict[str, Any]:
    """What `measure` finds, and the limit; `shape`: bits a second and seconds of delay, one way."""
    with ExitStack() as stack:
        prefix, host = (stack.enter_context(line(*shape)), HERE) if shape else ([], "127.0.0.1")

        def node(address: str, node_config: str) -> list[str]:
            return [*prefix, *warm_node(address, node_config)]

        found = measure(home, overrides.format(host=host), node, nodes, host)
    found["two_copies"] = two_copies(1e6 * found["mb_moved"])
    return found | ({"line_seconds": 8e6 * found["mb_moved"] / shape[0]} if shape else {})


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
    parser.add_argument("--line", nargs=2, type=float, metavar=("MBIT", "MS"), help="between nodes and server")
    parser.add_argument("--out", type=Path, help="file for the results, JSON")
    args = parser.parse_args()
    sizes = f"train.workers={args.nodes} model.n_embd={width_of(args.mb)} train.rounds={args.rounds}"
    shape = (1e6 * args.line[0], args.line[1] / 2000) if args.line else None
    rows = []
    for name in args.ways:
        with tempfile.TemporaryDirectory() as scratch:
            words = f"{' '.join(JOB.split())} {sizes} {WAYS[name]}"
            found = measure_over(shape, Path(scratch), args.nodes, words)
        rows.append({"transport": name, **found})
        print(f"{name}: {found['seconds']:.2f} s a round beside training", flush=True)
        time.sleep(1)  # until the network's processes have left the cores
    first = rows[0]["seconds"]
    rows = [row | {"faster": first / row["seconds"]} for row in rows]
    save({"num_nodes": args.nodes, "line": args.line, "rows": rows}, args.out)
    limit, key = ("line", "line_seconds") if shape else ("two copies", "two_copies")
    show(
        ("transport", "MB a worker", "first s", "later s", "times faster", f"{limit} s", f"s / {limit}"),
        [
            (
                row["transport"],
                f"{row['mb_per_worker']:.1f}",
                f"{row['first']:.2f}",
                f"{row['seconds']:.2f}",
                f"{row['faster']:.1f}",
                f"{row[key]:.2f}",
                f"{row['seconds'] / row[key]:.2f}",
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()

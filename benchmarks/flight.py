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
from contextlib import nullcontext
from pathlib import Path

import torch
from common import save, seconds_of, show
from line import HERE, line
from loopback import warm_node
from warm_nodes import JOB, measure, width_of

WAYS = {
    "inline": "flower.transport=inline",
    "flight": "flower.transport=flight",
    "flight, bfloat16": "flower.transport=flight flower.wire_dtype=bfloat16",
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
    parser.add_argument("--line", nargs=2, type=float, metavar=("MBIT", "MS"), help="between nodes and server")
    parser.add_argument("--out", type=Path, help="file for the results, JSON")
    args = parser.parse_args()
    sizes = f"train.workers={args.nodes} model.n_embd={width_of(args.mb)} train.rounds={args.rounds}"
    shape = (1e6 * args.line[0], args.line[1] / 2000) if args.line else None
    rows = []
    for name in args.ways:
        with tempfile.TemporaryDirectory() as scratch:
            words, host = f"{' '.join(JOB.split())} {sizes} {WAYS[name]}", HERE if shape else "127.0.0.1"
            with line(*shape) if shape else nullcontext(list[str]()) as inside:

                def node(address: str, node_config: str, inside: list[str] = inside) -> list[str]:
                    return [*inside, *warm_node(address, node_config)]

                found = measure(Path(scratch), f"{words} flower.flight={host}:0", node, args.nodes, host)
        found["two_copies"] = two_copies(1e6 * found["mb_moved"])
        if shape:
            found["line_seconds"] = 8e6 * found["mb_moved"] / shape[0]
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

"""What a round costs beside its training on a network of nodes: Flower's own SuperNodes against `twist-fl node`.

Each runs the same job, one after the other, on a SuperLink with two nodes on this machine. Tensors go inline, as
between machines; in the last row nodes may share the server's memory.

    python benchmarks/warm_nodes.py [--mb 300] [--out FILE] [key=value ...]
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import save, show
from loopback import NodeCommand, network, stock_node, warm_node

from twist_fl.blueprint.blocks import make_layout
from twist_fl.blueprint.cost import state_bytes
from twist_fl.blueprint.division import Division
from twist_fl.blueprint.drawing import draw_round
from twist_fl.runs.checkpoint import RunFolder

NUM_NODES = 2
TIMEOUT = 1800.0
HEADS, KEPT, LAYERS = 12, 10, 12
JOB = f"""
    train.interval=1 train.threads=1 train.device=cpu train.batch_size=2
    train.optimizer_state=reset model.n_layer={LAYERS} model.n_head={HEADS} model.n_positions=32 data.vocab_size=300
    data.window=16 blueprint.num_sub={KEPT} blueprint.undivided_first=1 blueprint.undivided_last=1
    eval.every=0 eval.max_windows=4 eval.sizes=[{KEPT}] eval.tickets=1 checkpoint_every=1000
"""


def width_of(megabytes: float) -> int:
    """The model's, whose subnet has as many megabytes (10^6 bytes) as possible, but no more."""
    division, width = Division("both", ((KEPT, KEPT),) * NUM_NODES, 1, 1), HEADS
    sizes = {"model_type": "gpt2", "n_layer": LAYERS, "n_head": HEADS, "n_positions": 32, "vocab_size": 300}
    while True:
        layout = make_layout(sizes | {"n_embd": width + HEADS})
        if state_bytes(layout, draw_round(layout, division, 0, 1)[0]) > 1e6 * megabytes:
            return width
        width += HEADS


def measure(
    home: Path,
    overrides: str,
    node_command: NodeCommand,
    num_nodes: int = NUM_NODES,
    host: str = "127.0.0.1",
) -> dict[str, Any]:
    """Seconds beside training of each round after the first, which builds the models, and what the nodes said of their
    start-up."""
    folder = RunFolder(home / "run")
    with network(home / "flower", num_nodes, node_command, host) as running:
        output = running.run({"preset": "demo", "overrides": overrides, "run-dir": str(folder.path)}, TIMEOUT)
        logs = [running.node_log(i).read_text() for i in range(num_nodes)]
    if not folder.events("done"):
        raise SystemExit(output + "".join(logs))
    rounds = folder.events("round")
    assert not any(event["dropped"] for event in rounds), rounds
    beside = [event["seconds"] - event["training_seconds"] for event in rounds]
    return {
        "mb_per_worker": rounds[-1]["bytes_down"]["weights"] / num_nodes / 1e6,
        "mb_moved": sum(rounds[-1]["bytes_via"].values()) / 1e6,
        "first": beside[0],
        "later": beside[1:],
        "seconds": statistics.median(beside[1:]),
        "start_up": start_up(logs),
        "load": os.getloadavg(),  # a ratio is worth what the machine's other jobs leave of it
    }


def start_up(logs: list[str]) -> list[float]:
    """Seconds before the app has a message, its transport aside: of every round from the second on."""
    return [float(found) for log in logs for found in re.findall(r"train message, start-up ([\d.]+) s", log)[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=300.0, help="size of a worker's subnet, MB of 10^6 bytes")
    parser.add_argument("--rounds", type=int, default=4, help="the first, which builds the models, is not counted")
    parser.add_argument("--out", type=Path, help="file for the results, JSON")
    parser.add_argument("settings", nargs="*", help="key=value settings over those of the job")
    args = parser.parse_args()
    job = [
        *JOB.split(),
        f"train.workers={NUM_NODES}",
        f"model.n_embd={width_of(args.mb)}",
        f"train.rounds={args.rounds}",
        *args.settings,
    ]
    ways = {
        "stock SuperNodes": (stock_node, "inline"),
        "twist-fl node": (warm_node, "inline"),
        "twist-fl node, shared memory": (warm_node, "auto"),
    }
    found = {}
    for name, (command, transport) in ways.items():
        with tempfile.TemporaryDirectory() as scratch:
            found[name] = measure(Path(scratch), " ".join([*job, f"flower.transport={transport}"]), command)
        print(f"{name}: {found[name]['seconds']:.2f} s a round beside training", flush=True)
    stock, *_ = found.values()
    rows = [{"nodes": name, "faster": stock["seconds"] / row["seconds"], **row} for name, row in found.items()]
    save({"job": job, "num_nodes": NUM_NODES, "rows": rows}, args.out)
    show(
        ("nodes", "MB a worker", "first s", "later s", "times faster", "start-up s"),
        [
            (
                row["nodes"],
                f"{row['mb_per_worker']:.1f}",
                f"{row['first']:.2f}",
                f"{row['seconds']:.2f}",
                f"{row['faster']:.1f}",
                f"{max(row['start_up']):.4f}" if row["start_up"] else "-",
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()

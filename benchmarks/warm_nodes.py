"""What a round costs beside its training on a network of nodes: Flower's own SuperNodes against `twist-fl node`.

Both run the same job, one after the other, on a SuperLink with two nodes on this machine:

    python benchmarks/warm_nodes.py [--out FILE] [key=value ...]
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import tempfile
from pathlib import Path

from common import save

from twist_fl.checkpoint import RunFolder
from twist_fl.loopback import NodeCommand, network, stock_node, warm_node

NUM_NODES = 2
TIMEOUT = 1800.0
TINY = """
    train.workers=2 train.rounds=12 train.interval=2 train.threads=1 train.device=cpu train.batch_size=2
    model.n_layer=3 model.n_head=4 model.n_embd=32 model.n_positions=32 data.vocab_size=300 data.window=16
    blueprint.num_sub=2 blueprint.undivided_first=1 blueprint.undivided_last=1
    eval.every=0 eval.max_windows=4 eval.sizes=[2] eval.tickets=1 train.optimizer_state=client
"""


def measure(home: Path, overrides: str, node_command: NodeCommand) -> dict[str, object]:
    """Seconds beside training of each round after the first, and what the nodes said of their start-up."""
    folder = RunFolder(home / "run")
    with network(home / "flower", NUM_NODES, node_command) as running:
        output = running.run({"preset": "demo", "overrides": overrides, "run-dir": str(folder.path)}, TIMEOUT)
        logs = [running.node_log(i).read_text() for i in range(NUM_NODES)]
    if not folder.events("done"):
        raise SystemExit(output + "".join(logs))
    rounds = folder.events("round")
    beside = [event["seconds"] - event["training_seconds"] for event in rounds]
    return {
        "first": beside[0],
        "later": beside[1:],
        "median": statistics.median(beside[1:]),
        "start_up": start_up(logs),
        "load": os.getloadavg(),  # a ratio is worth what the machine's other jobs leave of it
    }


def start_up(logs: list[str]) -> list[float]:
    """Seconds before the app has a message, its transport aside: of every round from the second on."""
    return [float(found) for log in logs for found in re.findall(r"train message, start-up ([\d.]+) s", log)[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the results, JSON")
    parser.add_argument("settings", nargs="*", help="key=value settings over those of the tiny job")
    args = parser.parse_args()
    overrides = " ".join([*TINY.split(), *args.settings])
    with tempfile.TemporaryDirectory() as scratch:
        stock = measure(Path(scratch) / "stock", overrides, stock_node)
        warm = measure(Path(scratch) / "warm", overrides, warm_node)
    save({"overrides": overrides, "stock": stock, "warm": warm}, args.out)
    for name, found in (("stock SuperNodes", stock), ("twist-fl node", warm)):
        print(
            f"{name:<17} first round {found['first']:6.2f} s, later {found['median']:6.2f} s (median) beside training"
        )
    print(f"ratio of the medians: {stock['median'] / warm['median']:.1f}")  # type: ignore[operator]
    print(f"start-up of a warm message: {max(warm['start_up']):.4f} s at most")  # type: ignore[call-overload]


if __name__ == "__main__":
    main()

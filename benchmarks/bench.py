"""Run the scripts of this folder, keep what they find, bring docs/performance.md up to it.

python benchmarks/bench.py                 all that need no data
python benchmarks/bench.py ddp --turns 3   one, with its own options: python benchmarks/ddp.py --help
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import performance
import performance_plots

from twist_fl.report.document_tables import fill
from twist_fl.system.files import write_text
from twist_fl.system.provenance import provenance

BENCHES = {
    "round": "a round of GPT-2 124M, phase by phase, beside its floors",
    "ddp": "time, memory and bytes against torch's DistributedDataParallel",
    "growth": "more workers, larger models",
    "server": "slice, check, add and finish against a plain copy",
    "transport": "rounds through Flower without their training, against a plain copy",
    "text": "tokenising 10 MB and 500 MB of text, beside datasets.map",
    "step": "the chunked loss against the plain one",
    "wire": "perplexity with 16 bits on the wire; needs --data FOLDER_OF_WIKITEXT_2",
    "scale": "a simulation of 100 and 1,000 nodes beside Flower's own FedAvg",
    "ticket_speed": "tickets of a real model in torch, onnxruntime and llama.cpp; needs --model FILE.gguf",
    "flight": "what a round costs on a network of nodes, by Flower's messages and by Arrow Flight",
    "flight_line": "the same over a line of 1 Gbit/s and 20 ms; as root",
    "chaos": "a run whose nodes, server, disk and network fail all the time; 15 minutes at a time",
    "start_up": "from a command to its first round, beside an earlier commit and without Flower",
    "run_memory": "peak memory of a run's server and workers beside the cost model's; with --model of a real one",
    "warm_nodes": "what a round costs on a network of nodes, stock and warm",
}
EVERY = ("round", "ddp", "growth", "server", "transport", "step")
"""Those that need no data and minutes at most: what is run by default."""
SCRIPTS = {"flight_line": ("flight", "--line", "1000", "20", "--ways", "flight", "flight, bfloat16")}
"""Benchmarks that are another's script with options."""


TREE = Path(__file__).resolve().parents[1]


def run_benches(name: str | None, options: Sequence[str], results: Path | None) -> None:
    """One benchmark with its own `options`, or all of EVERY, into NAME.json in `results` (default: the tree's).

    Raises SystemExit if a benchmark fails.
    """
    about = provenance()  # of before: each result changes the tree
    folder = results or TREE / "results" / "performance"
    for each in EVERY if name is None else (name,):
        print(f"{each}: {BENCHES[each]}", flush=True)
        measure(each, options, folder, about)
    if name is None:
        print("left out:", ", ".join(f"{other} ({what})" for other, what in BENCHES.items() if other not in EVERY))
    if results is None:
        publish()
    print(f"results: {folder.resolve()}")


def measure(name: str, options: Sequence[str], folder: Path, about: dict[str, Any]) -> None:
    """Raises SystemExit if the benchmark fails."""
    about = about | {"load_before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "found.json"
        script, *fixed = SCRIPTS.get(name, (name,))
        command = [sys.executable, str(TREE / "benchmarks" / f"{script}.py"), *fixed, *options, "--out", str(out)]
        status = subprocess.run(command, check=False).returncode
        if status or not out.is_file():
            raise SystemExit(f"benchmarks/{name}.py ended with status {status}, nothing is kept")
        found = json.loads(out.read_text())
    write_text(json.dumps(found | about, indent=1) + "\n", folder / f"{name}.json")


def publish() -> None:
    """docs/performance.md's tables and figures from results/performance."""
    folder, page = TREE / "results" / "performance", TREE / "docs" / "performance.md"
    found = performance.read(folder)
    performance_plots.draw(found, folder)
    write_text(fill(page.read_text(), performance.tables(found)), page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=list(BENCHES), help="default: all that need no data")
    parser.add_argument("--results", type=Path, help="default: results/performance, for docs/performance.md")
    given, options = parser.parse_known_args()
    run_benches(given.name, options, given.results)


if __name__ == "__main__":
    main()

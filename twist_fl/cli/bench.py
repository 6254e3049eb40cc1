"""`twist-fl bench`: run the scripts of `benchmarks/`, keep what they found, bring docs/performance.md up to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from twist_fl.config.schema import conf_dir
from twist_fl.config.suggest import nearest
from twist_fl.system.errors import ConfigError, LaunchError

BENCHES = {
    "round": "a round of GPT-2 124M, phase by phase, beside its floors",
    "ddp": "time, memory and bytes against torch's DistributedDataParallel",
    "growth": "more workers, larger models",
    "server": "slice, check, add and finish against a plain copy",
    "transport": "rounds through Flower without their training, against a plain copy",
    "text": "tokenising 10 MB and 500 MB of text, beside datasets.map",
    "step": "the chunked loss against the plain one",
    "wire": "perplexity with 16 bits on the wire; needs --data FOLDER_OF_WIKITEXT_2",
    "warm_nodes": "what a round costs on a network of nodes, stock and warm",
}
EVERY = ("round", "ddp", "growth", "server", "transport", "step")
"""Those that need no data and minutes at most: what `twist-fl bench` runs."""


def source_tree() -> Path:
    """Raises ConfigError where twist_fl is installed without one."""
    tree = conf_dir().parent
    if not (tree / "benchmarks").is_dir():
        raise ConfigError(
            f"twist-fl bench runs benchmarks/NAME.py of the source tree, and {tree} has none: "
            "clone the repository and install it with pip install --editable"
        )
    return tree


def run_benches(console: Console, name: str | None, options: Sequence[str], results: Path | None) -> None:
    """One benchmark with its own `options`, or all of EVERY, into NAME.json in `results` (default: the tree's).

    Raises ConfigError for an unknown name, LaunchError if a benchmark fails.
    """
    tree = source_tree()
    if name is not None and name not in BENCHES:
        raise ConfigError(f"no benchmark {name!r}{nearest(name, BENCHES)}; there are {', '.join(BENCHES)}")
    from twist_fl.system.provenance import provenance

    about = provenance()  # of before: each result changes the tree
    folder = results or tree / "results" / "performance"
    for each in EVERY if name is None else (name,):
        console.print(f"{each}: {BENCHES[each]}")
        measure(tree, each, options, folder, about)
    if name is None:
        left_out = ", ".join(f"{other} ({what})" for other, what in BENCHES.items() if other not in EVERY)
        console.print(f"left out: {left_out}")
    if results is None:
        publish(tree)
    console.print(f"results: {folder.resolve()}")


def measure(tree: Path, name: str, options: Sequence[str], folder: Path, about: dict[str, Any]) -> None:
    """Raises LaunchError if the benchmark fails."""
    from twist_fl.system.files import write_text

    about = about | {"load_before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "found.json"
        command = [sys.executable, str(tree / "benchmarks" / f"{name}.py"), *options, "--out", str(out)]
        status = subprocess.run(command, check=False).returncode
        if status or not out.is_file():
            raise LaunchError(f"benchmarks/{name}.py ended with status {status}, nothing is kept")
        found = json.loads(out.read_text())
    write_text(json.dumps(found | about, indent=1) + "\n", folder / f"{name}.json")


def publish(tree: Path) -> None:
    """docs/performance.md's tables and figures from results/performance."""
    from twist_fl.report import performance, performance_plots
    from twist_fl.system.files import write_text

    folder, page = tree / "results" / "performance", tree / "docs" / "performance.md"
    found = performance.read(folder)
    performance_plots.draw(found, folder)
    write_text(performance.fill(page.read_text(), performance.tables(found)), page)

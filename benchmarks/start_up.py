"""From a command to the end of its first round: this tree, an earlier one, and without Flower.

Each way trains the demo's model (`twist-fl train demo`, four workers), in turn; the first turn fills caches and does
not count. A way is over when its log has the first round. Processor time and memory are those of the command and of all
that it has started, by then; memory that several hold together counts once (the proportional set size).

    python benchmarks/start_up.py [--against COMMIT] [--turns 5] [--out FILE]
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from common import save, show

from twist_fl.runs.checkpoint import RunFolder

TREE = Path(__file__).resolve().parents[1]
BEFORE = "449e64b"
"""When a shorter start was asked for: every process of a run loaded all by itself."""
COMMAND = """
import importlib, sys
sys.argv[0] = "twist-fl"
try:
    main = importlib.import_module("twist_fl.cli.app").main
except ModuleNotFoundError:  # as it was once
    main = importlib.import_module("twist_fl.cli").main
sys.exit(main())
"""
_LOOK_SECONDS = 0.05
_PATIENCE = 300


def first_round(tree: Path, folder: Path, *words: str) -> dict[str, float]:
    """Raises SystemExit if the command ends without one."""
    command = [sys.executable, "-c", COMMAND, "train", "demo", "train.rounds=100", f"dir={folder}", *words]
    began = time.perf_counter()
    with (folder.parent / "output").open("w+") as output:
        process = subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": str(tree)}, stdout=output, stderr=output, start_new_session=True
        )
        try:
            while not (folder.is_dir() and RunFolder(folder).events("round")):
                if process.poll() is not None or time.perf_counter() - began > _PATIENCE:
                    raise SystemExit((folder.parent / "output").read_text())
                time.sleep(_LOOK_SECONDS)
            seconds = time.perf_counter() - began
            return {"seconds": seconds, **_taken(psutil.Process(process.pid))}
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


def _taken(command: psutil.Process) -> dict[str, float]:
    cpu = memory = 0.0
    for process in (command, *command.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            cpu += times.user + times.system
            memory += process.memory_full_info().pss / 1e6
    return {"cpu_seconds": cpu, "mb": memory}


def run(against: str, turns: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        before = Path(scratch) / "before"
        subprocess.run(["git", "-C", TREE, "worktree", "add", "--quiet", "--detach", before, against], check=True)
        ways: dict[str, tuple[Path, list[str]]] = {
            f"at {against}": (before, []),
            "now": (TREE, []),
            "now, --local": (TREE, ["--local"]),
        }
        found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        try:
            for turn in range(turns + 1):
                for way, (tree, words) in ways.items():
                    taken = first_round(tree, Path(scratch) / f"{turn}-{len(words)}-{tree.name}", *words)
                    print(f"turn {turn}, {way}: {taken['seconds']:.1f} s", flush=True)
                    found[way] += [taken] if turn else []
        finally:
            subprocess.run(["git", "-C", TREE, "worktree", "remove", "--force", before], check=True)
    rows: list[dict[str, Any]] = []
    for way, each in found.items():
        row = {key: median(one[key] for one in each) for key in each[0]}
        rows.append({"way": way, **row, "all_seconds": [one["seconds"] for one in each]})
    for row in rows:
        row["of_before"] = row["seconds"] / rows[0]["seconds"]
    return {"settings": {"turns": turns, "against": against}, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default=BEFORE, help="a commit of this repository")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = run(given.against, given.turns)
    show(["way", "s", "of before", "s of a core", "MB"],
         [[r["way"], f"{r['seconds']:.1f}", f"{r['of_before']:.2f}", f"{r['cpu_seconds']:.1f}", f"{r['mb']:.0f}"]
          for r in found["rows"]])  # fmt: skip
    save(found, given.out)


if __name__ == "__main__":
    main()

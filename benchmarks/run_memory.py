"""Peak memory of a run's server and workers beside what the cost model counts (`twist-fl cost`).

Each way is a simulation of four workers and three rounds of one batch, its moments on the server; the log says what was
held, above what the process held before it had a model. Without --model a GPT-2 of 28 M parameters from scratch.

    python benchmarks/run_memory.py [--model FILE_OR_FOLDER --data FOLDER_OF_WIKITEXT_2] [--out FILE]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import save, show

from twist_fl.runs.checkpoint import RunFolder

SCRATCH = ("demo", "model.n_layer=10", "model.n_embd=480", "data.window=32", "blueprint.undivided_first=1")
PRETRAINED = (
    *("wikitext2", "data.window=512", "blueprint.setting=ffn", "blueprint.ffn_blocks=12"),
    *("blueprint.undivided_first=2", "blueprint.undivided_last=2"),
)
SETTINGS = (
    *("train.rounds=3", "train.interval=1", "train.batch_size=1", "train.threads=1", "train.device=cpu"),
    *("train.optimizer_state=server", "eval.every=0", "eval.sizes=[6]", "eval.tickets=1"),
    *("eval.max_windows=1", "checkpoint_every=100"),
)
PLAIN = ("blueprint.scale=sqrt", "aggregate.optimizer=mean", "blueprint.common=0", "blueprint.num_sub=6")
SHUFFLED = (
    *("blueprint.num_sub=[12,6,4,3]", "blueprint.assign=shuffled", "blueprint.common=3", "blueprint.scale=none"),
    *("aggregate.optimizer=momentum", "aggregate.momentum=0.3", "eval.every=1", "eval.watch_windows=1"),
)
WAYS = {
    "half of the blocks each": PLAIN,
    "12, 6, 4, 3 shuffled, outer momentum, evaluated": SHUFFLED,
    "FedAvg": ("algorithm=fedavg", "aggregate.optimizer=mean"),
    "DDP": ("algorithm=ddp", "aggregate.optimizer=mean", "train.optimizer_state=reset"),
}
PAIRS = {"server": ("server_bytes", "predicted_server_bytes"), "worker": ("peak_bytes", "predicted_peak_bytes")}


def measure(folder: Path, words: list[str]) -> dict[str, Any]:
    """The largest of any round, for server and worker: bytes, and as the cost model counts them."""
    command = [sys.executable, "-m", "twist_fl", "train", *words, f"dir={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    (start,), rounds = RunFolder(folder).events("start"), RunFolder(folder).events("round")
    found: dict[str, Any] = {"params": start["num_params"]}
    for who, keys in PAIRS.items():
        held, counted = (max(each[key] for each in rounds) for key in keys)
        found[who] = {"bytes": held, "counted": counted, "ratio": held / counted}
    return found


def run(model: str | None, data: str | None) -> dict[str, Any]:
    own = [*PRETRAINED, f"model.pretrained={model}", f"data.path={data}"] if model else list(SCRATCH)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, (way, words) in enumerate(WAYS.items()):
            rows.append({"way": way} | measure(Path(scratch) / str(number), [*own, *SETTINGS, *words]))
            print(f"{way}: {rows[-1]}", flush=True)
    return {"settings": {"model": Path(model).name if model else "from scratch"}, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a GGUF file, or a Hugging Face folder")
    parser.add_argument("--data")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if (given.model is None) != (given.data is None):
        parser.error("--model needs --data, and the other way round")
    found = run(given.model, given.data)
    show(["way", "server GB", "of counted", "worker GB", "of counted"],
         [[r["way"], *(text for who in PAIRS for text in (f"{r[who]['bytes'] / 1e9:.2f}", f"{r[who]['ratio']:.2f}"))]
          for r in found["rows"]])  # fmt: skip
    save(found, given.out)


if __name__ == "__main__":
    main()

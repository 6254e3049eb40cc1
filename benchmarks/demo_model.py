"""Make the trained model that `twist-fl demo` starts from, in 10 minutes: python benchmarks/demo_model.py [RUN].

A tiny GPT-2 from scratch by DDP on the text that this Python carries; kept in the tree in 16 bits, 1 MB.
"""

from __future__ import annotations

import shutil
import sys
from importlib.resources import as_file
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import twist_fl
from twist_fl.cli.demo import MODEL
from twist_fl.runs.checkpoint import RunFolder

SETTINGS = ("algorithm=ddp", "train.rounds=100", "train.threads=1", "train.beta2=0.95", "eval.every=50")


def main(run: Path) -> None:
    trained = twist_fl.train(twist_fl.load_config("demo", [*SETTINGS, "name=demo-model", f"dir={run}"]))
    newest = RunFolder(run).checkpoints()[-1]
    with as_file(MODEL) as folder:
        shutil.rmtree(folder, ignore_errors=True)
        AutoModelForCausalLM.from_pretrained(newest, dtype="float16").save_pretrained(folder)
        AutoTokenizer.from_pretrained(newest).save_pretrained(folder)
        print(f"{folder}: perplexity {trained.perplexity():.2f} on {trained.test.size:,} test tokens")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo-model"))

"""Tokenising text of any size: bytes a second and peak memory, beside datasets.map with the same tokenizer.

The text is that of the Python documentation again and again, every tenth word of it another one each time, in one file
of paragraphs. Both begin with the file and end with tokens on the disk, and use all cores. Seconds are without imports;
memory is what a process and its children have for themselves (their proportional set size) above what the process had
after its imports.

    python benchmarks/text.py [--megabytes 10 500] [--vocab 8192] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from common import save, show

from twist_fl.data.builtin_text import documents
from twist_fl.data.tokenizer import train_tokenizer
from twist_fl.system.cores import usable_cores

OURS = """
from twist_fl.config.schema import DataConfig
from twist_fl.data.corpus import load_corpus
from twist_fl.data.tokenizer import load_tokenizer
load_tokenizer(folder)
begin()
corpus = load_corpus(DataConfig(source="files", path=file, tokenizer=folder, window=128))
end(128 * (len(corpus.train) + len(corpus.test)))
"""
RIVAL = """
import datasets
from twist_fl.data.tokenizer import load_tokenizer
tokenizer = load_tokenizer(folder)
datasets.disable_progress_bars()
begin()
text = datasets.load_dataset("text", data_files=file, split="train", sample_by="paragraph")
def tokens(batch):
    ids = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return {"ids": ids, "length": [len(each) for each in ids]}
mapped = text.map(tokens, batched=True, num_proc=cores, remove_columns=["text"])
end(sum(mapped["length"]))
"""
ABOUT = """
import json, sys, time, transformers
file, folder, cores = sys.argv[1], sys.argv[2], int(sys.argv[3])
def begin():
    global began
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
def end(num_tokens):
    print(json.dumps({"seconds": time.perf_counter() - began, "tokens": num_tokens}), flush=True)
"""
_LOOK_SECONDS = 0.2


def write_text(file: Path, megabytes: int) -> None:
    """Paragraphs, of `megabytes` million bytes."""
    rng, size = random.Random(0), 0
    with file.open("w", encoding="utf-8") as out:
        while True:
            for document in documents():
                words = document.split(" ")
                for i in range(rng.randrange(10), len(words), 10):
                    words[i] = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(1, 9)))
                text = " ".join(words) + "\n\n"
                size += len(text.encode())
                out.write(text)
                if size >= 1e6 * megabytes:
                    return


def memory(process: psutil.Process) -> int:
    """Bytes of a process and its children, each shared page counted once."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += each.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def measure(code: str, file: Path, tokenizer: Path, scratch: Path) -> dict[str, Any]:
    """Raises RuntimeError if it fails."""
    caches = {"TWIST_FL_CACHE": str(scratch / "ours"), "HF_DATASETS_CACHE": str(scratch / "theirs")}
    command = [sys.executable, "-c", ABOUT + code, str(file), str(tokenizer), str(usable_cores())]
    environment = os.environ | caches | {"HF_HUB_OFFLINE": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True) as child:
        assert child.stdin
        assert child.stdout
        if child.stdout.readline() != "ready\n":
            raise RuntimeError(f"ended with status {child.wait()} before it was ready")
        process = psutil.Process(child.pid)
        before = peak = memory(process)
        child.stdin.write("\n")
        child.stdin.flush()
        while child.poll() is None:
            peak = max(peak, memory(process))
            time.sleep(_LOOK_SECONDS)
        if child.returncode:
            raise RuntimeError(f"ended with status {child.returncode}")
        found: dict[str, Any] = json.loads(child.stdout.readline())
    return found | {"peak_mb": (peak - before) / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 500])
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer"
        train_tokenizer(documents(), options.vocab).save_pretrained(tokenizer)
        for megabytes in options.megabytes:
            file = Path(folder) / f"{megabytes}.txt"
            write_text(file, megabytes)
            for how, code in (("twist_fl", OURS), ("datasets.map", RIVAL)):
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    found = measure(code, file, tokenizer, Path(scratch))
                size = file.stat().st_size / 1e6
                rows.append({"mb": size, "how": how, "mb_per_second": size / found["seconds"]} | found)
                print(f"{how}: {size:.0f} MB in {found['seconds']:.1f} s, {found['peak_mb']:.0f} MB", flush=True)
            file.unlink()
    columns = ("how", "mb", "seconds", "mb_per_second", "peak_mb", "tokens")
    show(columns, [[row[column] for column in columns] for row in rows])
    save({"settings": {"vocab": options.vocab, "cores": usable_cores()}, "rows": rows}, options.out)


if __name__ == "__main__":
    main()

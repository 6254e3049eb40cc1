"""Peak memory: what a worker held while it trained, in every round anew."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from twist_fl.system.memory import Peak
from twist_fl.training.job import Job

WORKER = """
import json, sys
from pathlib import Path
import torch
from twist_fl.training.job import job_from_json
from twist_fl.rounds import dispatch, plan, start
from twist_fl.training.worker import Worker
from twist_fl.training.client_state import MomentShelf
job = job_from_json(Path(sys.argv[1]).read_text())
state, worker = start(job), Worker(job, MomentShelf(Path(sys.argv[1]).parent))
whole, half = plan(job, state)
peaks = []
for task in (half, half, whole, half):
    peaks.append(worker.train(task, *dispatch(job, state, task)).peak_bytes)
    torch.ones(75_000_000)  # 300 MB, between two tasks
print(json.dumps([job.layout.num_params(half.blueprint), job.layout.num_params(), *peaks]))
"""
TOKENISER = """
import resource, sys
from twist_fl.config.schema import DataConfig
from twist_fl.data.corpus import load_corpus
from twist_fl.data.tokenizer import load_tokenizer
file, folder = sys.argv[1:]
load_tokenizer(folder)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
corpus = load_corpus(DataConfig(source="files", path=file, tokenizer=folder, window=128))
print(len(corpus.train), peak() - before)
"""


@pytest.mark.parametrize("end", [" ", "\n", "\n\n"], ids=["one line", "lines", "paragraphs"])
def test_tokenising_takes_bounded_memory_whatever_the_text(end: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    """8 MB of it, of which 143 bytes a byte would be 1.1 GB. The file's own pages and buffers are tens of MB."""
    sentence = "the cat sat on the mat and the dog sat on the log, " * 20
    numbered = (f"{number} {sentence}{end}" for number in range(8_000))  # equal documents would go to one split
    (tmp_path / "text.txt").write_text("".join(numbered))
    command = [sys.executable, "-c", TOKENISER, str(tmp_path / "text.txt"), str(tokenizer_folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    windows, kilobytes = map(int, done.stdout.split())
    assert windows > 10_000
    assert kilobytes < 250_000


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="a peak starts anew on Linux only")
def test_a_worker_reports_the_peak_of_its_task_and_of_nothing_else(
    tiny_job: Callable[..., Job], tmp_path: Path
) -> None:
    """In a process of its own: at least weights, gradients and two moments of all that it holds, and not 300 MB."""
    job = tiny_job("model.n_embd=512", "train.workers=2", "blueprint.num_sub=[4,2]", "blueprint.undivided_last=1")
    (tmp_path / "job.json").write_text(job.to_json())
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(tmp_path / "job.json")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    half, whole, first, again, both, last = json.loads(done.stdout)
    assert 16 * half < first < 16 * half + 150e6
    assert 16 * half < again < 16 * half + 150e6
    assert both > again + 16 * (whole - half)  # two models stay warm
    assert 4 * whole + 16 * half < last < both + 50e6  # freed memory may stay resident


def test_on_a_gpu_it_is_what_torch_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"now": 1000, "most": 9000}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: held["most"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: held.update(most=held["now"]))
    peak = Peak("cuda:0")
    assert peak.num_bytes() == 0
    held.update(now=3000, most=5000)
    assert peak.num_bytes() == 4000
    peak.restart()
    assert peak.num_bytes() == 2000
    held.update(now=500)
    Peak("cuda:0")  # another of this process, with which the device forgets its peak
    assert peak.num_bytes() == 2000
    peak.restart()
    assert peak.num_bytes() == 0

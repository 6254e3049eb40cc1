"""The `twist-fl` command in processes of its own, and what it leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from local_grid import assert_same_run

from twist_fl.rounds import run, start
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system import children
from twist_fl.system.cores import usable_cores

PATIENCE = 300.0
"""Seconds after which a command counts as stuck: a busy machine is slow."""

ONE_PROCESS = f"flower.cpus_per_worker={usable_cores()}"
"""One process for all workers: each takes seconds to load torch."""


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "twist_fl", *map(str, words)]


def twist_fl(*words: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in `folder`, to its end."""
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(
        command(*words), cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


@contextmanager
def started(*words: object) -> Iterator[subprocess.Popen[str]]:
    """The command, running; it is stopped with all its processes if the test fails."""
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    process = subprocess.Popen(
        command(*words), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        children.stop_tree(process)  # type: ignore[arg-type]
        if process.stdout:
            process.stdout.close()


def processes_of(folder: RunFolder) -> list[psutil.Process]:
    """Whatever runs for this run: its folder is in FLWR_HOME, which every process inherits, Ray's too."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *process.environ().values()]
        except psutil.Error:
            continue
        if process.pid != os.getpid() and any(str(folder.path) in word for word in words):
            found.append(process)
    return found


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ready():
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def saved_rounds(folder: RunFolder) -> int:
    found = folder.checkpoints()
    return int(found[-1].name.rpartition("-")[2]) if found else 0


def assert_is_rounds_run(folder: RunFolder, scratch: Path) -> None:
    """The final checkpoint is what `rounds.run` gives, bit for bit."""
    job, ended = folder.job(), folder.load()
    assert ended is not None
    assert_same_run(ended, run(job, start(job), scratch))

"""What a command loads: help, mistakes and what only reads plain files need none of the large libraries."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from twist_fl.federation.simulation import LOADED
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.local import train_local
from twist_fl.training.job import Job

LARGE = ("torch", "transformers", "flwr", "datasets", "ray", "matplotlib", "pandas", "pyarrow")
SPY = f"""
import json, sys
from twist_fl.cli import app as cli
found = []
for words in json.loads(sys.argv.pop()):
    sys.argv = ["twist-fl", *words.split()]
    try:
        cli.main()
    except SystemExit as end:
        found.append([words, end.code or 0, sorted(set({LARGE!r}) & sys.modules.keys())])
print("\\n" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def finished(tiny_job: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = RunFolder(tmp_path_factory.mktemp("start-up") / "run")
    folder.create(tiny_job("eval.max_windows=2", "eval.tickets=1"))
    train_local(folder)
    return folder.path


def loaded(lines: list[str], finished: Path, folder: Path) -> list[list[object]]:
    """Each command line, one after the other in one process: its status, and what is loaded of LARGE by then."""
    given = json.dumps([line.replace("RUN", str(finished)) for line in lines])
    done = subprocess.run([sys.executable, "-c", SPY, given], cwd=folder, capture_output=True, text=True, check=False)
    found: list[list[object]] = json.loads(done.stdout.splitlines()[-1])
    return [[line, *rest] for line, (_, *rest) in zip(lines, found, strict=True)]


READING = [
    "--help",
    "--version",
    "keys",
    "train --help",
    "cost",
    "cost demo train.lr=1",
    "cost demo model.architecture=llama",
    "cost RUN",
    "status RUN",
    "train --resume RUN",
]
MISTAKES = [
    "trian",
    "train --lr 1e-3",
    "train demoo",
    "train demo train.lrr=1",
    "train demo train.lr=fast",
    "train demo train.workers=0",
    "train demo seed",
    "train --resume nowhere",
    "train --resume RUN seed=1",
    "train demo dir=RUN",
    "tickets ./nowhere",
    "tickets RUN --sizes two",
    "prune ./nowhere",
    "deploy ./nowhere",
    "deploy RUN --device phone=big",
    "generate ./nowhere",
    "report nowhere",
    "cost demoo",
    "demo train.lrr=1",
]


def test_help_and_what_only_reads_load_nothing_large(finished: Path, tmp_path: Path) -> None:
    assert loaded(READING, finished, tmp_path) == [[line, 0, []] for line in READING]


def test_a_mistake_loads_nothing_large(finished: Path, tmp_path: Path) -> None:
    assert loaded(MISTAKES, finished, tmp_path) == [[line, 2, []] for line in MISTAKES]


def test_a_report_loads_what_draws_and_no_more(finished: Path, tmp_path: Path) -> None:
    assert loaded(["report RUN"], finished, tmp_path) == [["report RUN", 0, ["matplotlib"]]]


FORKED = f"""
import importlib, json, sys
import torch

def asked(*_):
    raise SystemExit("a GPU was asked, and a process that is forked after that cannot use it")

for name in ("is_available", "device_count", "init", "_lazy_init", "current_device", "get_device_properties"):
    setattr(torch.cuda, name, asked)
for name in {LOADED!r}:
    importlib.import_module(name)
before = set(sys.modules)
from twist_fl.federation import apps, client, deploy
client.warm()
print(json.dumps([name for name in set(sys.modules) - before if name.partition(".")[0] in {LARGE!r}]))
"""


def test_server_and_workers_of_a_simulation_find_the_large_libraries_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    later = json.loads(done.stdout)
    assert {name.partition(".")[0] for name in later} <= {"transformers"}
    assert len(later) < 50  # of its thousands: the config and the model's class, which depend on the run

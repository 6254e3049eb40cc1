"""What a command loads: help, mistakes and what only reads plain files need none of the large libraries."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.local import train_local
from twist_fl.training.job import Job

LARGE = ("torch", "transformers", "flwr", "datasets", "ray", "matplotlib", "pandas", "pyarrow")
SPY = f"""
import json, sys
from twist_fl.cli import app as cli
sys.argv = ["twist-fl", *sys.argv[1:]]
try:
    cli.main()
finally:
    print("\\n" + json.dumps(sorted(set({LARGE!r}) & sys.modules.keys())))
"""


@pytest.fixture(scope="module")
def finished(tiny_job: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = RunFolder(tmp_path_factory.mktemp("start-up") / "run")
    folder.create(tiny_job("eval.max_windows=2", "eval.tickets=1"))
    train_local(folder)
    return folder.path


def loaded(words: list[str], folder: Path) -> tuple[int, list[str]]:
    """The command's status, and what it has loaded of LARGE."""
    done = subprocess.run([sys.executable, "-c", SPY, *words], cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "words",
    [
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
    ],
)
def test_what_only_reads_loads_nothing_large(words: str, finished: Path, tmp_path: Path) -> None:
    status, found = loaded([str(finished) if word == "RUN" else word for word in words.split()], tmp_path)
    assert (status, found) == (0, [])


@pytest.mark.parametrize(
    "words",
    [
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
    ],
)
def test_a_mistake_loads_nothing_large(words: str, finished: Path, tmp_path: Path) -> None:
    status, found = loaded([word.replace("RUN", str(finished)) for word in words.split()], tmp_path)
    assert (status, found) == (2, [])


def test_a_report_loads_what_draws_and_no_more(finished: Path, tmp_path: Path) -> None:
    assert loaded(["report", str(finished)], tmp_path) == (0, ["matplotlib"])

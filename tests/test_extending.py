"""docs/extending.md: what its examples do in a run."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from test_docs import ROOT, commands

from twist_fl import RunFolder, TrainedRun

PAGE = (ROOT / "docs" / "extending.md").read_text()


def test_its_commands_do_what_its_examples_say(
    run: Run, tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    Path("mine.py").write_text("\n\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)))
    train, tickets = (line.split()[1:] for line in commands(PAGE))
    more = ["eval.every=0", "eval.max_windows=4", "train.rounds=2", "--local"]
    status, _, error = run("train", "demo", *tiny, *train[2:], *more)
    assert (status, error) == (0, error)
    status, _, error = run(*(word.replace("6", "2") for word in tickets), "--draws", "1")
    assert (status, error) == (0, error)

    trained, folder = TrainedRun("runs/mine"), RunFolder(Path("runs/mine"))
    held = [blueprint.held("attn", 1) for blueprint in trained.job.blueprints(1)]
    assert held == [(1, 2), (2, 3), (0, 3)]
    tokens = trained.tokenizer().decode(trained.job.corpus.train.ravel()[:2000].tolist())
    assert re.search(r"(\d+) times \1 is \d+\.\n", tokens)
    heard = [line.split() for line in Path("runs/mine/losses.txt").read_text().splitlines()]
    assert [(int(round_), float(loss)) for round_, loss in heard] == [
        (event["round"], event["loss"]) for event in folder.events("round")
    ]
    saved = np.load("tickets/2/weights.npz")
    assert sum(value.size for value in saved.values()) == trained.tickets(2, 1).num_params

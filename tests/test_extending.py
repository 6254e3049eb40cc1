"""docs/extending.md: what its examples do in a run."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run
from test_docs import ROOT, commands
from transformers import AutoModelForCausalLM

from twist_fl import RunFolder, TrainedRun
from twist_fl.blueprint import architectures
from twist_fl.model.masked import MaskedModel

PAGE = (ROOT / "docs" / "extending.md").read_text()


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's examples, as the module `mine` in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.setattr(architectures, "_KNOWN", {})
    code = "\n\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    Path("mine.py").write_text(code + "\nWITHOUT_NORM = replace(STARCODER2, rows=STARCODER2.rows[:-2])\n")
    Path("mine.py").write_text("from dataclasses import replace\n" + Path("mine.py").read_text())


def test_its_commands_do_what_its_examples_say(run: Run, tiny: tuple[str, ...], mine: None) -> None:
    train, export = (line.split()[1:] for line in commands(PAGE))
    more = ["eval.every=0", "eval.max_windows=4", "train.rounds=2", "--local"]
    status, _, error = run("train", "demo", *tiny, *train[2:], *more)
    assert (status, error) == (0, error)
    status, _, error = run(*(word.replace("6", "2") for word in export))
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
    saved = np.load("numbers/weights.npz")
    assert sum(value.size for value in saved.values()) == trained.tickets(2, 1).num_params
    assert "| checked | not by its format |" in Path("numbers/README.md").read_text()


def test_an_architecture_of_ones_own(run: Run, tiny: tuple[str, ...], mine: None) -> None:
    """Its subnets are the whole model masked; its tickets open in transformers, without this package's table."""
    words = ["model.architecture=mine:STARCODER2", "model.n_kv_head=2", "train.rounds=2", "eval.every=0", "name=coder"]
    status, _, error = run("train", "demo", *tiny, *words, "eval.max_windows=4", "eval.sizes=1", "--local")
    assert (status, error) == (0, error)
    trained = TrainedRun("runs/coder")
    assert trained.job.model_fields["model_type"] == "starcoder2"
    ticket, tokens = trained.blueprint(1, draw=3), torch.arange(12)[None]
    with torch.inference_mode():
        physical = trained.model(ticket)(tokens).logits
        masked = MaskedModel(trained.job.models()).load(ticket, trained.state.params)(tokens).logits
        opened = AutoModelForCausalLM.from_pretrained(trained.export(ticket, "ticket").folder, trust_remote_code=True)
        exported = opened(tokens).logits
    torch.testing.assert_close(physical, masked)
    torch.testing.assert_close(physical, exported)
    assert sum(each.numel() for each in opened.parameters()) < trained.job.layout.num_params()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("linear", "must be an Architecture, found a function"),
        ("WITHOUT_NORM", "the block table of 'starcoder2' does not fit its model: "),
        ("STARCODER", "the module mine has no STARCODER"),
    ],
)
def test_an_architecture_that_cannot_be(name: str, reason: str, run: Run, tiny: tuple[str, ...], mine: None) -> None:
    status, _, error = run("train", "demo", *tiny, f"model.architecture=mine:{name}", "--local")
    assert status == 2
    assert reason in error

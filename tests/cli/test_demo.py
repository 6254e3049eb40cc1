"""The demo from end to end, on little text and without Flower, which only carries what is trained."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from conftest import Run

from twist_fl.cli import demo, train
from twist_fl.cli.demo import PRUNERS

LITTLE = ("train.rounds=2", "train.interval=2", "eval.every=0", "eval.max_windows=4", "eval.tickets=2")


def test_the_demo_says_why_one_does_not_just_prune(
    run: Run, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "train_or_go_on", partial(train.train_or_go_on, local=True))
    words = ("demo", "--dir", tmp_path / "demo", "data.source=files", f"data.path={text_folder}", *LITTLE)
    status, output, error = run(*words)
    assert status == 0, error
    folder = tmp_path / "demo"
    rows = json.loads((folder / "twist" / "against_pruning.json").read_text())
    assert [(row["label"], row["size"]) for row in rows] == [
        ("FedAvg", 12), *((label, size) for label in PRUNERS.values() for size in (6, 3)),
        ("TwIST", 12), ("TwIST's tickets", 6), ("TwIST's tickets", 3),
    ]  # fmt: skip
    full, *_ = rows
    for row in rows:
        method, bytes_of = row["method"], 4 * row["num_params"]  # in 32 bits, though the model came in 16
        assert (row["num_params"] < full["num_params"]) == (method == "se")
        assert bytes_of < row["file_bytes"] < bytes_of + 20_000
        assert (row["seconds"] > 0) == (method != "full")
        assert row["draws"] == (10 if method == "se" else 1)
    results = [json.loads((folder / name / "results.json").read_text()) for name in ("fedavg", "twist")]
    assert [row["perplexity"] for row in rows if row["method"] == "full"] == pytest.approx(
        [each["full"] for each in results], rel=1e-4
    )
    assert {each["config"]["model"]["pretrained"] for each in results} == {"demo_model"}
    devices = json.loads((folder / "twist" / "deployed.json").read_text())
    assert len(devices) == 3
    for device in devices:
        assert f"{device['name']} writes: The module" in output
    page = (folder / "report.html").read_text()
    assert "Why not just prune?" in page and "FedAvg, then SparseGPT" in page
    before = {file: file.read_bytes() for file in folder.rglob("*.json")}
    status, again, _ = run(*words)
    assert status == 0
    assert {file: file.read_bytes() for file in folder.rglob("*.json")} == before
    assert output[output.index("of smaller models") :] == again[again.index("of smaller models") :]

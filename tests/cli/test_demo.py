"""The demo from end to end, on little text and without Flower, which only carries what is trained."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from small_tickets import fields
from transformers import AutoModelForCausalLM

from twist_fl.cli import demo, train
from twist_fl.cli.demo import PRUNERS
from twist_fl.data.tokenizer import train_tokenizer
from twist_fl.model.hf_config import config_from_dict

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


def test_a_model_of_the_users_takes_our_models_place(
    run: Run, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Llama of three key/value groups: sizes, common blocks and the devices' limits are shares of it."""
    monkeypatch.setattr(demo, "train_or_go_on", partial(train.train_or_go_on, local=True))
    folder = tmp_path / "my-llama"
    train_tokenizer([(text_folder / "train.txt").read_text()], 300).save_pretrained(folder)
    auto: Any = AutoModelForCausalLM
    auto.from_config(
        config_from_dict(fields("llama", num_attention_heads=6, num_key_value_heads=3, hidden_size=48))
    ).save_pretrained(folder)
    words = (
        "demo",
        "--model",
        folder,
        "--prompt",
        "the worker",
        f"data.path={text_folder}",
        "data.window=32",
        "blueprint.undivided_first=1",
        "blueprint.undivided_last=1",
        *LITTLE,
    )
    status, output, error = run(*words)
    assert status == 0, error
    twist = tmp_path / "runs" / "demo-my-llama" / "twist"
    results = json.loads((twist / "results.json").read_text())
    assert results["config"]["model"]["pretrained"] == "my-llama"
    devices = json.loads((twist / "deployed.json").read_text())
    whole = sum(value.numel() for value in auto.from_pretrained(folder).parameters())
    assert devices[0]["num_params"] == whole
    assert [(row["size"], row["of"]) for row in devices] == [(3, 3), (1, 3), (1, 3)]
    for device in devices:
        assert device["planned_mb"] <= device["memory_mb"] < 1.1 * device["planned_mb"]
        assert f"{device['name']} writes: the worker" in output
    assert "Why not just prune?" in (twist.parent / "report.html").read_text()

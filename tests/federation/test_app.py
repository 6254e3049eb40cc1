"""The real thing, a few times: Flower's simulation; real networks are in test_node.py and test_network.py."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from math import ceil
from pathlib import Path

import pytest
from app_runs import ONE_PROCESS, assert_is_rounds_run, processes_of, twist_fl
from conftest import Run
from transformers import AutoModelForCausalLM

from twist_fl.blueprint.drawing import draw_ticket, full_blueprint
from twist_fl.config.devices import DeviceConfig
from twist_fl.federation import deploy
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.files import cache_dir
from twist_fl.system.provenance import commit
from twist_fl.tickets.evaluate import perplexity
from twist_fl.tickets.export import make_ticket, ticket_memory_bytes
from twist_fl.training.job import Job

# A simulation


@pytest.fixture(scope="module")
def finished(small: tuple[str, ...], text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of two rounds by the command line, on text beside it and in the usual folder, as the README has it."""
    here = tmp_path_factory.mktemp("app")
    (here / "my_texts").symlink_to(text_folder)
    words = (*small, "train.optimizer_state=server", "data.path=my_texts", "name=mine")
    done = twist_fl("train", "demo", *words, folder=here)
    folder = RunFolder(here / "runs" / "mine")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^twist: 2 rounds; each worker \(of 2\) trains [\d,]+ of [\d,]+ parameters$", done.stdout, re.M)
    assert re.search(
        r"^perplexity: full model [\d.,]+; random tickets, mean: 2/4 [\d.,]+; results in ", done.stdout, re.M
    )
    assert f"results in {folder.results_file}" in done.stdout
    return folder


def test_a_simulation_is_rounds_run(finished: RunFolder, tmp_path: Path) -> None:
    assert_is_rounds_run(finished, tmp_path)
    assert [(event["answered"], event["dropped"]) for event in finished.events("round")] == [([0, 1], {})] * 2
    assert all(event["bytes_via"]["shm"] and not event["bytes_via"]["inline"] for event in finished.events("round"))
    assert [event["event"] for event in finished.events()][-1] == "done"
    results = json.loads(finished.results_file.read_text())
    job, ended = finished.job(), finished.load()
    assert ended is not None
    full = job.models().load_sliced(full_blueprint(job.layout), ended.params)
    assert results["full"] == pytest.approx(perplexity(full, job.corpus.test[:4], 4), rel=1e-6)
    assert results["rounds"] == 2
    assert results["commit"] == commit()


def test_status_shows_a_finished_run(finished: RunFolder) -> None:
    done = twist_fl("status", finished.path.parent)
    assert done.returncode == 0, done.stderr
    first, *facts = done.stdout.splitlines()
    assert first == f"{finished.path}: finished"
    assert "  rounds     2 of 2" in facts
    assert any(re.match("  results    perplexity: full model ", fact) for fact in facts)


def test_nothing_of_a_finished_run_is_left(finished: RunFolder) -> None:
    assert processes_of(finished) == []
    assert not (finished.path / "flower").exists()  # Flower's own state
    assert (finished.path / "flower.log").stat().st_size > 0


def device_for(job: Job, name: str, size: int, latency_ms: float | None = None) -> DeviceConfig:
    """A device whose memory a ticket of this size just fits."""
    blueprint = draw_ticket(job.layout, job.division, (size, size), 0, 0)
    needed = ticket_memory_bytes(job.layout, blueprint)
    return DeviceConfig(name, ceil(needed / 1e3) / 1e3, latency_ms)


def test_tickets_are_shipped_to_two_devices(
    finished: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    job, ended = finished.job(), finished.load()
    assert ended is not None
    devices = [device_for(job, "phone", 2, latency_ms=60_000), DeviceConfig("watch", kappa=1 / 3)]
    limits = [f"phone={devices[0].memory_mb}MB,60000ms", "watch=1/3"]
    status, out, err = run("deploy", finished.path, *(word for limit in limits for word in ("--device", limit)))
    assert status == 0, out + err
    rows = json.loads((finished.path / "deployed.json").read_text())
    assert [(row["name"], row["size"], row["of"]) for row in rows] == [("phone", 2, 4), ("watch", 1, 4)]
    assert [{key: row[key] for key in asdict(device)} for row, device in zip(rows, devices, strict=True)] == [
        asdict(device) for device in devices
    ]
    assert [row["tried"] for row in rows] == [[{key: row[key] for key in ("size", "ms_per_token")}] for row in rows]
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    for place, (row, device) in enumerate(zip(rows, devices, strict=True)):
        blueprint = next(iter(deploy.plan_device(job, device).values()))
        ticket = make_ticket(job.layout, ended.params, job.model_config.to_dict(), blueprint, "sqrt")
        kept, arrived = finished.path / "deployed" / device.name, cache_dir() / "tickets" / job.run_id / device.name
        for folder in (kept, arrived):
            assert json.loads((folder / "twist.json").read_text())["digest"] == row["digest"] == ticket.digest
        assert (arrived / "model.safetensors").read_bytes() == (kept / "model.safetensors").read_bytes()
        windows = job.corpus.test[place::2][:64]  # the device's own text
        dense = AutoModelForCausalLM.from_pretrained(arrived, trust_remote_code=True)
        assert row["perplexity"] == pytest.approx(perplexity(dense, windows, 1), rel=1e-6)
        subnet = job.models().load_sliced(blueprint, ended.params)
        assert row["perplexity"] == pytest.approx(perplexity(subnet, windows, 4), rel=1e-5)
        assert row["num_params"] == job.layout.num_params(blueprint)
        assert 0 <= row["bytes_received"] - row["weight_bytes"] < 16_384
        assert f"{row['perplexity']:.2f}" in out
    assert processes_of(finished) == []


def test_a_run_whose_workers_fail_says_why(small: tuple[str, ...], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    done = twist_fl("train", "demo", *small, ONE_PROCESS, "train.lr=1e38", f"dir={folder.path}")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "error: the run failed: NoWorkersError: round 1: no worker answered" in done.stderr
    assert "training loss is nan" in done.stderr
    assert f"Flower's log: {folder.path / 'flower.log'}" in done.stderr
    assert not folder.results_file.exists()
    assert processes_of(folder) == []

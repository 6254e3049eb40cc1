"""`benchmarks/bench.py`: what it keeps, and that docs/performance.md is what it has found."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import bench
import performance
import performance_plots
import pytest
import run as gpu
import scale
import ticket_speed
import torch
from common import copy_bandwidth, flops_per_second
from ddp import PAPER, paper_ratios
from growth import server_share
from legible import assert_legible
from small_tickets import ticket
from steps import ddp_steps, random_model
from torch import distributed
from wire import round_by_wire

from twist_fl.blueprint.cost import state_bytes
from twist_fl.blueprint.drawing import full_blueprint
from twist_fl.federation.packing import Packing
from twist_fl.model.subnet import get_state
from twist_fl.report.document_tables import fill
from twist_fl.report.plots import styled
from twist_fl.rounds import start, twist_round
from twist_fl.tickets import hf_formats
from twist_fl.training.client_state import MomentShelf
from twist_fl.training.interval import train_interval
from twist_fl.training.job import Job
from twist_fl.training.worker import Worker

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "performance.md").read_text()
MakeJob = Callable[..., Job]


# The page


def test_the_tables_are_the_published_results() -> None:
    found = performance.read(ROOT / "results" / "performance")
    assert fill(PAGE, performance.tables(found)) == PAGE


def test_every_table_has_a_place_and_every_place_a_table() -> None:
    names = {name for makers in performance.TABLES.values() for name in makers}
    assert set(re.findall(r"<!-- table: (.*?) -->", PAGE)) == names


def test_a_table_without_a_place() -> None:
    with pytest.raises(KeyError, match="no place for table 'b'"):
        fill("<!-- table: a -->\n<!-- /table -->", {"b": "| 1 |\n"})


def test_files_the_page_names_exist() -> None:
    for name in re.findall(r"\]\(([^):]+)\)", PAGE):
        assert (ROOT / "docs" / name).exists(), name


def test_figures_of_the_published_results(tmp_path: Path) -> None:
    found = performance.read(ROOT / "results" / "performance")
    performance_plots.draw(found, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"ddp.png", "growth.png", "chaos.png"}
    for draw in (
        partial(performance_plots.draw_ddp, found["ddp"]),
        partial(performance_plots.draw_growth, found["growth"]),
        partial(performance_plots.draw_chaos, found["chaos"]),
    ):
        with styled():
            assert_legible(draw())
    labels = [axes.get_ylabel() for axes in performance_plots.draw_growth(found["growth"]).axes]
    assert labels == ["seconds a round", "memory (GB)"] * 2


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.00001234, "0.000012"), (0.0123456, "0.0123"), (1.5, "1.5"), (12345.6, "12,346")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert performance.number(value) == text


# The command


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree with one benchmark, which writes the options it was given."""
    script = "import json, sys\n*options, _, out = sys.argv[1:]\nif 'fail' in options: sys.exit(3)\n"
    script += "open(out, 'w').write(json.dumps({'options': options}))\n"
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "round.py").write_text(script)
    monkeypatch.setattr(bench, "TREE", tmp_path)
    return tmp_path


def test_a_result_has_its_provenance(tree: Path) -> None:
    bench.run_benches("round", ["--keep", "4"], tree / "results")
    found = json.loads((tree / "results" / "round.json").read_text())
    assert found["options"] == ["--keep", "4"]
    assert {"commit", "torch", "hardware"} <= found.keys()


def test_of_a_benchmark_that_fails_nothing_is_kept(tree: Path) -> None:
    with pytest.raises(SystemExit, match=r"benchmarks/round.py ended with status 3"):
        bench.run_benches("round", ["fail"], tree / "results")
    assert not (tree / "results").exists()


def test_every_benchmark_is_there() -> None:
    for name in bench.BENCHES:
        assert (ROOT / "benchmarks" / f"{bench.SCRIPTS.get(name, (name,))[0]}.py").is_file()
    assert set(bench.EVERY) < set(bench.BENCHES)


# What they measure


def test_the_paper_s_own_ratios() -> None:
    best = paper_ratios("both", 4)
    assert (round(best["paper_speed_up"], 2), round(best["paper_memory"], 2)) == (1.49, 0.71)
    assert best["paper_step_speed_up"] == 385 / 263
    assert len(PAPER) == 12


def test_ddp_of_one_process_trains_as_an_interval_does(tiny_job: MakeJob, tmp_path: Path) -> None:
    job = tiny_job()
    windows = [torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    states = []
    distributed.init_process_group("gloo", f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        for train in (lambda model: ddp_steps(model, windows, job.config.train, 1),
                      lambda model: train_interval(model, windows, job.config.train, 0)):  # fmt: skip
            torch.manual_seed(0)
            model = random_model(job)
            train(model)
            states.append({name: tensor.clone() for name, tensor in get_state(model).items()})
    finally:
        distributed.destroy_process_group()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_a_round_through_the_records_is_a_round(tiny_job: MakeJob, tmp_path: Path) -> None:
    job = tiny_job("train.optimizer_state=server", "train.lr=1e-6")
    worker = Worker(job, MomentShelf(tmp_path))
    by_wire = round_by_wire(job, start(job), worker)
    plain, _ = twist_round(job, start(job), [worker] * job.config.train.workers)
    assert all(torch.equal(by_wire.params[name], plain.params[name]) for name in plain.params)
    rounding = tiny_job("train.optimizer_state=server", "train.lr=1e-6", "flower.wire_dtype=bfloat16")
    ours, rival = (round_by_wire(rounding, start(job), worker, rival=rival) for rival in (False, True))
    off = [
        sum((r.params[n] - t).abs().sum().item() for n, t in plain.params.items()) for r in (start(job), ours, rival)
    ]
    assert 0 < off[1] < 0.1 * off[0] < off[2]  # the rival loses more than was trained


def test_segments_are_one_per_worker_or_one(tiny_job: MakeJob) -> None:
    job = tiny_job()
    size = Packing.of(job, job.blueprints(1)[0]).segment_bytes
    assert size < state_bytes(job.layout, full_blueprint(job.layout))
    assert [server_share(job, one)[1] for one in (True, False)] == [size, 3 * size]


def test_rates_of_the_machine_are_rates() -> None:
    assert copy_bandwidth(1) > 0
    assert flops_per_second(64) > 0


def test_the_pieces_for_a_gpu_run_dry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tiny", "--out", str(tmp_path), "step-float32", "step-tf32", "loss", "rounds", "perplexity"]
    gpu.main(words)
    said = capsys.readouterr().out
    if not torch.cuda.is_available():
        assert "step-tf32: left out, train.precision=tf32 needs a CUDA GPU" in said
    assert "perplexity: left out, needs --weights" in said
    rows = json.loads((tmp_path / "step-float32.json").read_text())["rows"]
    assert rows[1]["flop_ratio"] > rows[0]["flop_ratio"] == 1
    gpu.main(words[:4])
    assert f"step-float32: there already, {tmp_path / 'step-float32.json'}" in capsys.readouterr().out


@pytest.mark.parametrize("engine", ["torch", ticket_speed.ZEROS])
def test_a_ticket_reads_a_prompt_and_writes_tokens(engine: str, tmp_path: Path) -> None:
    hf_formats.compact(ticket(), tmp_path, None, "float32")
    args = argparse.Namespace(prompt=5, new_tokens=3)
    threads = torch.get_num_threads()
    seconds = list(ticket_speed.pytorch(tmp_path, args, threads, 2, engine == ticket_speed.ZEROS))
    assert len(seconds) == 4 and min(seconds) > 0
    assert ticket_speed.measure(engine, tmp_path, args, threads, 1).keys() == {"prompt", "token"}


def test_memory_of_a_command_is_that_of_its_children_too() -> None:
    hold = "import time; held = bytearray(b'x' * 200_000_000); time.sleep(3)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}], check=True)"
    found = scale.watched([sys.executable, "-c", child])
    assert found["peak_bytes"] > 2e8
    assert found["whole_seconds"] > 3
    with pytest.raises(SystemExit, match="ended with status 3"):
        scale.watched([sys.executable, "-c", "raise SystemExit(3)"])

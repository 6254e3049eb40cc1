"""The command line: every command explains itself, and what cannot work is refused before anything starts."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from local_grid import LocalGrid
from typer.testing import CliRunner

from twist_fl.blueprint.blocks import make_layout
from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.blueprint.cost import state_bytes
from twist_fl.blueprint.drawing import draw_ticket, full_blueprint
from twist_fl.blueprint.moments import moment_layouts
from twist_fl.cli import app, train
from twist_fl.config.devices import DeviceConfig
from twist_fl.config.schema import Config, from_yaml, load_config
from twist_fl.config.sizes import make_division
from twist_fl.experiments.lab import ALIKE
from twist_fl.federation import apps, deploy
from twist_fl.federation.connecting import NoWorkersError
from twist_fl.model.hf_config import scratch_fields
from twist_fl.model.subnet import ModelCache
from twist_fl.report.tables import device_cells
from twist_fl.rounds import start
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.story import held_text
from twist_fl.runs.trained import chosen_sizes
from twist_fl.system.errors import ConfigError
from twist_fl.system.units import human_bytes
from twist_fl.tickets.device_limits import parse_devices
from twist_fl.tickets.edge_client import EdgeReport, Measurement
from twist_fl.tickets.evaluate import ticket_distribution
from twist_fl.tickets.export import export_ticket, make_ticket, ticket_memory_bytes
from twist_fl.training.job import Job

MakeJob = Callable[..., Job]

COMMANDS = {
    "train": ("preset", "overrides", "--resume", "--local"),
    "demo": ("overrides", "--dir"),
    "tickets": ("run", "--sizes", "--draws", "--windows"),
    "export": ("run", "--size", "--format", "--dtype", "--out", "--draw", "--seed", "--windows"),
    "prune": ("run", "--method", "--sizes", "--windows", "--calibration", "--draws", "--out", "--save"),
    "deploy": ("run", "--device"),
    "generate": ("model", "--prompt", "--new-tokens", "--temperature", "--size", "--seed"),
    "report": ("runs", "--out", "--publish"),
    "cost": ("preset", "overrides", "--steps"),
    "status": ("runs", "--follow"),
    "partition": ("folder", "--workers", "--alpha", "--seed"),
    "keys": (),
    "node": ("--superlink", "--insecure", "--root-certificates", "--auth-supernode-private-key", "--node-config"),
    "reproduce": ("names", "--scale", "--dir", "--out", "--jobs", "--seeds", "--doc", "--dry-run"),
}


@pytest.fixture(scope="module")
def trained(tiny_job: MakeJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny run."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "tiny")
    job = tiny_job("eval.max_windows=8", "deploy.new_tokens=4", "name=tiny")
    folder.create(job)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.sched_getaffinity", lambda process: {0})
        apps.train_run(LocalGrid(), folder, job)
    return folder.path


@pytest.fixture(scope="module")
def untrained(tiny_job: MakeJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed before its first checkpoint."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "untrained")
    folder.create(tiny_job())
    return folder.path


# Help


def test_help_names_every_command() -> None:
    result = CliRunner().invoke(app.app, ["--help"])
    assert result.exit_code == 0
    assert COMMANDS.keys() == {command.callback.__name__ for command in app.app.registered_commands if command.callback}
    assert all(name in result.output for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_what_a_command_takes(command: str) -> None:
    result = CliRunner().invoke(app.app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0, result.output
    assert all(name in result.output.lower() for name in COMMANDS[command])


def test_a_command_that_does_not_exist(run: Run) -> None:
    status, _, error = run("trian")
    assert status == 2
    assert "No such command 'trian'" in error


# Refusals

TEXT = (
    *("demo", "data.source=files", "data.path=TEXT", "data.vocab_size=300", "data.window=16"),
    *("train.workers=4", "model.n_head=12", "model.n_positions=128"),
)
IMPOSSIBLE: dict[str, tuple[tuple[str, ...], str]] = {
    "preset": (("demoo",), r"no preset 'demoo', did you mean 'demo'\?; presets: .*wikitext2"),
    "no preset": (
        ("name=mine",),
        r"'name=mine' stands where a preset or file is expected: demo name=mine, for example",
    ),
    "file": (("mine.yaml",), r"no file 'mine\.yaml'; give an existing YAML file, or a preset: demo, "),
    "key": (("demo", "train.interva=3"), r"unknown key 'train\.interva', did you mean 'train\.interval'\?"),
    "section": (("demo", "trian.lr=3"), r"unknown key 'trian\.lr', did you mean 'train\.lr'\?"),
    "form": (("demo", "train.lr"), r"override 'train\.lr' is not of the form key=value"),
    "type": (("demo", "train.lr=fast"), r"train\.lr='fast' must be a number, for example 0\.0001"),
    "choice": (
        ("demo", "blueprint.setting=heads"),
        r"blueprint\.setting='heads' must be one of attn, ffn, both, did you mean 'attn'\?",
    ),
    "range": (("demo", "train.workers=0"), r"train\.workers=0 must be more than 0"),
    "num_sub too small": (
        (*TEXT, "blueprint.common=0", "blueprint.num_sub=2"),
        r"the smallest legal N_sub for all is 3",
    ),
    "num_sub too large": (
        (*TEXT, "blueprint.num_sub=13"),
        r"num_sub=13 of a layer's 12 blocks is impossible: choose 1 to 12",
    ),
    "layers": (
        (*TEXT, "model.n_layer=4", "blueprint.undivided_first=2", "blueprint.undivided_last=2"),
        r"leave none of the 4 layers to divide",
    ),
    "window longer than the model": ((*TEXT, "data.window=129"), r"data\.window=129 .*use at most 128"),
    "windows longer than the text": (
        (*TEXT, "data.window=100000", "model.n_positions=100000"),
        r"the training text gives 0 windows of data\.window=100000 tokens, fewer than 4: use a smaller",
    ),
    "arithmetic": (("demo", "train.device=cpu", "train.precision=tf32"), r"train\.precision=tf32 needs a CUDA GPU"),
    "missing path": (("demo", "data.source=files", "data.path=/no/such/text"), r"'/no/such/text' does not exist"),
    "no path": (("demo", "data.source=files"), r"data\.source=files needs data\.path"),
    "missing model": ((*TEXT, "model.pretrained=/no/model"), r"model\.pretrained='/no/model' does not exist"),
}


@pytest.mark.usefixtures("no_flower")
@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_an_impossible_run_is_refused_before_anything_starts(
    case: str, run: Run, text_folder: Path, tmp_path: Path
) -> None:
    given, reason = IMPOSSIBLE[case]
    status, _, error = run("train", *(word.replace("TEXT", str(text_folder)) for word in given), "dir=run")
    assert status == 2
    assert re.search(reason, error), error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_flower")
@pytest.mark.parametrize("command", ["demo", "cost"])
def test_overrides_of_other_commands_are_checked_as_well(command: str, run: Run, tmp_path: Path) -> None:
    preset = ["demo"] if command == "cost" else []
    status, _, error = run(command, *preset, "blueprint.numsub=3")
    assert status == 2
    assert "unknown key 'blueprint.numsub', did you mean 'blueprint.num_sub'?" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_flower")
def test_a_folder_with_a_run_is_refused(run: Run, untrained: Path, tiny: tuple[str, ...]) -> None:
    before = sorted(untrained.iterdir())
    status, _, error = run("train", "demo", *tiny, f"dir={untrained}")
    assert status == 2
    assert f"{untrained} already holds a run: resume it with `twist-fl train --resume {untrained}`" in error
    assert sorted(untrained.iterdir()) == before


@pytest.mark.usefixtures("no_flower")
@pytest.mark.parametrize(
    "given",
    [("train", "--resume"), ("report",), ("tickets",), ("deploy",)],
    ids=" ".join,
)
def test_a_folder_without_a_run(given: tuple[str, ...], run: Run, tmp_path: Path) -> None:
    for path in ("absent", "./absent"):
        status, _, error = run(*given, path)
        assert status == 2
        model = (
            "no run 'absent', and as a model it is neither here nor among what was downloaded before, and the hub ca"
        )
        assert (model if given[0] in ("tickets", "deploy") and path == "absent" else str(tmp_path / "absent")) in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_flower")
@pytest.mark.parametrize("command", ["tickets", "deploy", "generate"])
def test_a_run_without_a_checkpoint(command: str, run: Run, untrained: Path) -> None:
    status, _, error = run(command, untrained)
    assert status == 2
    assert f"{untrained} has no checkpoint yet" in error


@pytest.mark.usefixtures("no_flower")
@pytest.mark.parametrize(
    ("devices", "reason"),
    [
        (["phone"], "device 'phone' is not NAME=LIMIT, for example phone=3.5MB,20ms: limits are memory as 3.5MB"),
        (["phone=big"], "device 'phone=big': 'big' is no limit; limits are memory as 3.5MB, 500kB or 2GiB"),
        (["phone=nan"], "device 'phone=nan': 'nan' is no limit"),
        (["phone=3.5GHz"], "device 'phone=3.5GHz': '3.5GHz' is no limit"),
        (["phone=3.5MB,"], "device 'phone=3.5MB,': '' is no limit"),
        (["phone=1/0"], "device 'phone=1/0': '1/0' is no limit"),
        (["phone=0.5"], "device 'phone=0.5': is 0.5 memory or a share of the blocks? Write 0.5MB or 50%"),
        (["phone=150%"], "deploy.devices 'phone': kappa=1.5 must be in (0, 1]"),
        (["=3.5"], "device '=3.5' is not NAME=LIMIT"),
        (["../phone=3.5"], "device: '../phone' is no name for a folder: use letters, digits"),
        (
            ["my phone=3.5"],
            "device: 'my phone' is no name for a folder: use letters, digits, '.', '_', '+' and '-', for",
        ),
        (["phone=3.5,4MB"], "device 'phone=3.5,4MB' has two limits of one kind: give the lower"),
        (["phone=0ms"], "deploy.devices 'phone': latency_ms=0 must be more than 0"),
        (["phone=5/4"], "deploy.devices 'phone': kappa=1.25 must be in (0, 1]"),
        (
            ["phone=1/5"],
            "kappa=0.2 is too little; the smallest possible ticket holds 1/4 of a layer: use at least kappa",
        ),
        (["phone=3.5", "phone=4"], "device 'phone' is given twice"),
        (["laptop=99", "watch=0.01MB"], "deploy.devices 'watch': memory_mb=0.01 is too little"),
    ],
)
def test_an_impossible_device_is_refused_before_anything_starts(
    devices: list[str], reason: str, run: Run, trained: Path
) -> None:
    before = sorted(trained.iterdir())
    status, _, error = run("deploy", trained, *(word for device in devices for word in ("--device", device)))
    assert status == 2
    assert reason in error
    assert sorted(trained.iterdir()) == before


@pytest.mark.usefixtures("no_flower")
def test_a_latency_that_cannot_be_measured_is_refused_before_anything_starts(
    run: Run, tiny_job: MakeJob, tmp_path: Path
) -> None:
    job, folder = tiny_job("deploy.new_tokens=32"), RunFolder(tmp_path / "run")
    folder.create(job)
    folder.save(start(job), job.model_config)
    status, _, error = run("deploy", folder.path)
    assert status == 2
    assert "deploy.new_tokens=32 does not fit a context of 32: use at most 31" in error


@pytest.mark.usefixtures("no_flower")
@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (("demo",), "a run that goes on keeps its preset: leave out demo"),
        (("seed=1", "train.rounds=9"), "seed=1 would make it another run: this one has 0. What may change: data.path,"),
        (("flower.wire_dtype=float16",), "flower.wire_dtype=float16 would make it another run"),
        (("train.rouds=9",), "unknown key 'train.rouds', did you mean 'train.rounds'?"),
        (("eval.sizes=9",), "eval.sizes=9 of a layer's 4 blocks is impossible"),
    ],
)
def test_a_run_that_goes_on_is_the_same_run(given: tuple[str, ...], reason: str, run: Run, untrained: Path) -> None:
    before = (untrained / "job.json").read_text()
    status, _, error = run("train", "--resume", untrained, *given)
    assert status == 2
    assert reason in error
    assert (untrained / "job.json").read_text() == before


def test_a_folder_that_cannot_be_made_is_named(run: Run, tiny: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, _, error = run("train", "demo", *tiny, f"dir={tmp_path / 'file' / 'run'}")
    assert status == 2
    assert error.startswith("error: ")
    assert str(tmp_path / "file") in error
    assert error.count("\n") == 1


def test_a_finished_run_is_not_run_again(run: Run, trained: Path, no_flower: None) -> None:
    status, output, _ = run("train", "--resume", trained)
    assert status == 0
    assert f"{trained} is finished: 2 rounds, perplexity: full model " in output
    assert f"twist-fl train --resume {trained} train.rounds=4   trains it longer" in output


# What a run that goes wrong comes to


def test_a_run_that_fails_exits_with_1_and_the_reason(
    run: Run, untrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended:
        def begin(self) -> None:
            pass

        def poll(self) -> int:
            if words:
                RunFolder(untrained).log("failed", error=words)
            return 1

    @contextmanager
    def flower_run(*given: Any) -> Iterator[Ended]:
        yield Ended()

    monkeypatch.setattr(train, "flower_run", flower_run)
    words = "NoWorkersError: all are away"
    status, _, error = run("train", "--resume", untrained)
    assert status == 1
    assert f"error: the run failed: {words}. Flower's log: {untrained / 'flower.log'}" in error
    words = ""
    status, _, error = run("train", "--resume", untrained)
    assert status == 1
    assert f"the run ended before its time. Flower's log: {untrained / 'flower.log'}" in error


@pytest.mark.parametrize("nohup", [False, True])
def test_signals_that_end_a_command_let_it_clean_up(nohup: bool, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignored SIGINT, as in a shell's background, is taken all the same; an ignored SIGHUP is what nohup wants."""
    handlers: dict[int, Any] = {}
    monkeypatch.setattr("signal.signal", handlers.__setitem__)
    monkeypatch.setattr("signal.getsignal", lambda number: signal.SIG_IGN if nohup else signal.SIG_DFL)
    run("keys")
    taken = {signal.SIGINT, signal.SIGTERM} | (set() if nohup else {signal.SIGHUP})
    assert handlers == dict.fromkeys(taken, signal.default_int_handler)


# Looking


@pytest.mark.parametrize(
    ("held", "part"),
    [([9999, 9999], "all 9,999"), ([500], "500 of 9,999"), ([9999, 300, 500], "300 to 9,999 of 9,999")],
)
def test_a_run_begins_by_saying_what_workers_hold(held: list[int], part: str) -> None:
    """So that a setting that the algorithm has no use for is seen."""
    start = {"num_params": 9999, "subnet_params": held}
    assert held_text(start) == f"each worker (of {len(held)}) trains {part} parameters"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("│")[1:-1]]


def rows(output: str) -> list[list[str]]:
    return [cells(line) for line in output.splitlines() if line.startswith("│")]


def terabytes(cell: str) -> float:
    number, unit = cell.split()
    return float(number) * {"TB": 1, "GB": 1e-3, "MB": 1e-6}[unit]


def test_cost_reproduces_table_2(run: Run) -> None:
    """GPT-2, half of both: 31.68 TB as the paper counts (its Table 2: 31.70); the whole model as DDP: 45.5."""
    status, output, _ = run("cost")
    assert status == 0
    found = {row[0]: row for row in rows(output)}
    assert found["12/12"][1] == "124,439,808"
    assert terabytes(found["12/12"][3]) == pytest.approx(45.5, abs=0.02)
    assert terabytes(found["4/12"][3]) == pytest.approx(31.68, abs=0.03)
    assert terabytes(found["4/12"][4]) == pytest.approx(31.68 / 15, abs=0.01)


def test_cost_of_other_settings(run: Run) -> None:
    for setting in ("attn", "ffn"):
        _, output, _ = run("cost", "gpt2-wikitext103", f"blueprint.setting={setting}", "--steps", 1000)
        found = {row[0]: row for row in rows(output)}
        assert terabytes(found["12/12"][3]) == pytest.approx(1000 * 8 * 124_439_808 / 1e12, abs=0.01)
        assert terabytes(found["4/12"][3]) < terabytes(found["6/12"][3]) < terabytes(found["12/12"][3])


def test_cost_counts_key_value_groups(run: Run) -> None:
    _, output, _ = run("cost", "demo", *ALIKE, "model.architecture=llama", "model.n_kv_head=4", "model.n_inner=240")
    # Vocabulary 512 twice, and in 4 layers: q and o 96 x 96, k and v 96 x 32, three of 96 x 240, two norms; one norm.
    full = 2 * 512 * 96 + 4 * (2 * 96 * 96 + 2 * 96 * 32 + 3 * 96 * 240 + 2 * 96) + 96
    group = 96 * (2 * 24 + 2 * 8 + 3 * 60)
    sizes = [[f"{n}/4", f"{full - 3 * (4 - n) * group:,}"] for n in (4, 3, 2, 1)]
    assert [row[:2] for row in rows(output)] == [*sizes, ["4 x 4/4", f"{full:,}"], ["all 4", ""]]
    words = (
        "demo",
        "model.architecture=llama",
        "model.n_kv_head=4",
        "model.n_inner=240",
        "blueprint.attn_blocks=heads",
    )
    head = 96 * (2 * 8 + 3 * 20)
    expected = [[f"{n}/12", f"{full - 3 * (12 - n) * head:,}"] for n in range(12, 0, -1)]
    assert [row[:2] for row in rows(run("cost", *words)[1])][:12] == expected


def test_cost_of_unequal_workers_with_moments_apart(run: Run) -> None:
    _, output, _ = run("cost", "demo", "blueprint.num_sub=[12,6,4,3]", "blueprint.assign=fixed", "--steps", 1500)
    found = {row[0]: row[1:] for row in rows(output)}
    each = [found[f"1 x {size}/12"] for size in (12, 6, 4, 3)]
    assert each == [found[f"{size}/12"] for size in (12, 6, 4, 3)]
    for params, _, *sent in each:
        weights = 8 * int(params.replace(",", "")) / 1e12
        expected = [1500 * weights, 100 * weights, 3000 * weights, 200 * weights]
        assert [terabytes(cell) for cell in sent] == pytest.approx(expected, rel=0.05)  # of two digits at least

    together = [sum(terabytes(row[i]) for row in each) for i in range(2, 6)]
    assert [terabytes(cell) for cell in found["all 4"][2:]] == pytest.approx(together, rel=0.05)


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        (["blueprint.num_sub=[6,6,3,3]"], "2 x 3/12"),
        (["blueprint.num_sub=6+4"], "4 x 6/12; FFN 4/12"),
        (["blueprint.num_sub=6", "blueprint.setting=ffn"], "4 x 6/12"),
        (["blueprint.num_sub=[12,3]", "blueprint.assign=drawn"], "4 x 3-12/12, mean 7.4"),
        (["algorithm=fedavg"], "4 x 12/12"),
        (["train.variant=masked"], "4 x 12/12"),
        (["train.variant=hybrid"], "3 x 4/12"),
    ],
)
def test_cost_names_what_the_workers_hold(overrides: list[str], label: str, run: Run) -> None:
    status, output, _ = run("cost", "demo", *ALIKE, *overrides, "--steps", 45_700)
    assert status == 0
    assert label in [row[0] for row in rows(output)]


def test_cost_is_of_the_budget_of_the_setting_where_it_says_rounds(run: Run) -> None:
    assert "one worker, 1,500 optimiser steps" in run("cost", "demo")[1]
    assert "one worker, 45,700 optimiser steps" in run("cost", "demo", "train.epochs=3")[1]


def test_moments_are_shown_only_where_they_travel(run: Run) -> None:
    columns = {}
    for overrides in ("train.optimizer_state=reset", "algorithm=ddp", "train.optimizer_state=server"):
        columns[overrides] = len(rows(run("cost", "demo", overrides)[1])[0])
    assert list(columns.values()) == [5, 5, 7]


def test_factored_moments_cost_what_a_run_would_send(run: Run) -> None:
    output = run("cost", "demo", "train.optimizer_state=factored", "--steps", 1500)[1]
    config = load_config("demo")
    layout = make_layout(scratch_fields(config.model, config.data.vocab_size))
    (part,) = moment_layouts("factored", layout).values()
    blueprint = draw_ticket(layout, make_division(config, layout), (4, 4), 0, 0)
    found = {row[0]: row[1:] for row in rows(output)}
    assert found["4/12"][-1] == human_bytes(100 * 2 * state_bytes(part, blueprint))


def test_cost_of_an_impossible_run(run: Run) -> None:
    status, _, error = run("cost", "demo", *ALIKE, "blueprint.num_sub=2")
    assert status == 2
    assert "4 workers with 0 common blocks cannot cover all 12 blocks; the smallest legal N_sub for all is 3" in error


def test_cost_of_a_run_has_what_it_measured_beside(run: Run, trained: Path) -> None:
    folder = RunFolder(trained)
    status, output, _ = run("cost", trained)
    assert status == 0
    found = {row[0]: row[1:] for row in rows(output)}
    assert found["3 x 2/4"] == found["2/4"]
    sent = human_bytes(folder.events("start")[0]["predicted_round_bytes"] * 2)
    assert found["weights sent"] == [sent, sent]
    assert found["moments sent"] == ["0 B", "0 B"]
    assert "2 rounds so far" in output
    for who, *keys in (
        ("worker", "predicted_peak_bytes", "peak_bytes"),
        ("server", "predicted_server_bytes", "server_bytes"),
    ):
        peaks = [max(event.get(key, 0) for event in folder.events("round")) for key in keys]
        assert found[f"{who}'s peak memory"] == [human_bytes(peak) if peak else "" for peak in peaks]
    ready = human_bytes(folder.events("round")[0]["predicted_bytes"] / 2)
    needed = human_bytes(folder.events("round")[0]["predicted_server_bytes"])
    assert f"The server needs {needed} beside its libraries, {ready} of it for what lies" in " ".join(output.split())
    status, _, error = run("cost", trained, "train.lr=1")
    assert status == 2
    assert "is a run, which keeps its settings: leave out train.lr=1" in error


def test_keys_lists_and_explains_every_setting(run: Run) -> None:
    status, output, _ = run("keys")
    assert status == 0
    assert from_yaml(output) == Config()
    assert "  # Batches between two aggregations; ddp aggregates after every batch.\n  interval: 15\n" in output
    assert "  # One of attn, ffn, both.\n  setting: both\n" in output


def test_keys_with_a_word_lists_what_has_it_in_its_name(run: Run) -> None:
    status, output, _ = run("keys", "train.lr", "momentum")
    assert status == 0
    assert [line.split(":")[0] for line in output.splitlines() if "#" not in line] == [
        *("train", "  lr", "aggregate", "  momentum")
    ]
    assert "  lr: 0.0001\n" in output
    status, _, error = run("keys", "learning-rate")
    assert status == 2
    assert "no setting has learning-rate in its name" in error


def test_tickets_are_those_of_ticket_distribution(run: Run, trained: Path) -> None:
    status, output, _ = run("tickets", trained, "--sizes", "4,2,1", "--draws", 3, "--windows", 6)
    assert status == 0
    found = rows(output)
    folder = RunFolder(trained)
    job, state = folder.job(), folder.load()
    assert state is not None
    assert [row[0] for row in found] == ["4/4", "2/4", "1/4"]
    for row, size in zip(found, (4, 2, 1), strict=True):
        summary = ticket_distribution(
            job.models(), state.params, job.division, (size, size), job.corpus.test[:6], tickets=3, seed=0, batch_size=4
        ).summary()
        assert row[1] == f"{summary['num_params']:,}"
        assert row[2:] == [f"{summary[key]:.2f}" for key in ("mean", "std", "min", "max")]


def test_tickets_of_the_sizes_of_the_run(run: Run, trained: Path) -> None:
    status, output, _ = run("tickets", trained, "--draws", 2, "--windows", 2)
    assert status == 0
    assert [row[0] for row in rows(output)] == ["2/4"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (("--sizes", "9"), "--sizes 9 of a layer's 4 blocks is impossible: choose 1 to 4"),
        (("--sizes", "two"), "--sizes two must be a number of blocks (6), a share of a layer (1/2, 50%), or both"),
        (("--sizes", ""), "--sizes is empty: give sizes, for example 8,6,4 or 1/2,1/4"),
        (("--draws", "0"), "--draws"),
        (("--windows", "0"), "--windows"),
    ],
)
def test_tickets_that_cannot_be(given: tuple[str, ...], reason: str, run: Run, trained: Path) -> None:
    status, _, error = run("tickets", trained, *given)
    assert status == 2
    assert reason in error


def test_a_run_without_ticket_sizes_needs_some(tiny_job: MakeJob) -> None:
    job = tiny_job("eval.sizes=[]")
    with pytest.raises(ConfigError, match=r"the run has eval\.sizes=\[\]: give sizes, for example --sizes 8,6,4"):
        chosen_sizes(job, None)
    assert [size.num_sub for size in chosen_sizes(job, [2, "50%", "1+3"])] == [(2, 2), (1, 3)]


def test_generate_from_a_run(run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Blueprint] = []

    def load_sliced(models: ModelCache, blueprint: Blueprint, *given: Any) -> Any:
        used.append(blueprint)
        return load(models, blueprint, *given)

    load = ModelCache.load_sliced
    monkeypatch.setattr(ModelCache, "load_sliced", load_sliced)
    texts = []
    for given in (("--size", 2), ("--size", 2), (), ("--seed", 1), ("--temperature", 0)):
        status, output, _ = run("generate", trained, "--prompt", "the worker", "--new-tokens", 12, *given)
        assert status == 0
        assert output.startswith("the worker")
        texts.append(output)
    assert texts[0] == texts[1]  # the same seed, the same text
    assert texts[2] != texts[3]
    assert [len(blueprint.attn[1]) for blueprint in used] == [2, 2, 4, 4, 4]


def test_generate_from_a_deployed_ticket(
    run: Run, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's ticket and the same one shipped say the same."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    folder = RunFolder(trained)
    job, state = folder.job(), folder.load()
    assert state is not None
    blueprint = draw_ticket(job.layout, job.division, (2, 2), 0, 0)
    ticket = make_ticket(job.layout, state.params, job.model_config.to_dict(), blueprint, "sqrt")
    export_ticket(ticket, tmp_path / "phone", job.corpus.tokenizer_folder)
    given = ("--prompt", "the worker", "--temperature", 0, "--new-tokens", 12)
    status, shipped, _ = run("generate", tmp_path / "phone", *given)
    assert status == 0
    assert shipped == run("generate", trained, "--size", 2, *given)[1]
    status, _, error = run("generate", tmp_path / "phone", "--size", 2)
    assert status == 2
    assert f"{tmp_path / 'phone'} is a ticket, whose layers differ in size: give the run it was drawn from" in error


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (("--size", "5"), "--size 5 of a layer's 4 blocks is impossible: choose 1 to 4"),
        (("--prompt", "of the " * 40), "the prompt fills the model's context of 32 tokens: shorten it"),
        (("--prompt", ""), "the prompt is empty"),
        (("--new-tokens", "0"), "--new-tokens"),
        (("--temperature", "-1"), "--temperature"),
    ],
)
def test_a_text_that_cannot_be_generated(given: tuple[str, ...], reason: str, run: Run, trained: Path) -> None:
    status, _, error = run("generate", trained, *given)
    assert status == 2
    assert reason in error


def test_generate_from_something_else(run: Run, trained: Path, tmp_path: Path) -> None:
    status, _, error = run("generate", tmp_path)
    assert status == 2
    assert f"{tmp_path} holds no model (no config.json): give a run that has a checkpoint" in error


def test_a_checkpoint_generates_as_its_run_does(run: Run, trained: Path) -> None:
    given = ("--prompt", "the worker", "--new-tokens", 12, "--temperature", 0)
    (text,) = {run("generate", path, *given)[1] for path in (trained, RunFolder(trained).checkpoints()[-1])}
    assert text.startswith("the worker")


def test_report_of_a_run(run: Run, trained: Path, tmp_path: Path) -> None:
    status, output, _ = run("report", trained, "--out", "here/report.html")
    assert status == 0
    assert str(tmp_path / "here" / "report.html") in output
    page = (tmp_path / "here" / "report.html").read_text()
    assert "<html" in page
    assert "tiny" in page


def test_report_of_a_run_that_is_not_finished(run: Run, untrained: Path, tmp_path: Path) -> None:
    status, _, error = run("report", untrained)
    assert status == 2
    assert str(untrained) in error
    assert list(tmp_path.iterdir()) == []


# Shipping, without Flower's transport (tests/federation/test_app.py has it)


def test_deploying_a_run_without_a_checkpoint(untrained: Path) -> None:
    folder = RunFolder(untrained)
    with pytest.raises(ConfigError, match="has no checkpoint yet: train first"):
        deploy.deploy_run(LocalGrid(1), folder, folder.job())


def test_deploying_where_nobody_is(trained: Path) -> None:
    folder = RunFolder(trained)
    with pytest.raises(NoWorkersError, match="no edge client is connected"):
        deploy.deploy_run(LocalGrid(0), folder, folder.job())


def test_a_device_that_fails_is_named(trained: Path) -> None:
    folder = RunFolder(trained)
    with pytest.raises(NoWorkersError, match="device phone failed: ValueError: no room on this node"):
        deploy.deploy_run(LocalGrid(1, broken=[0]), folder, folder.job(), "phone=3.5")
    assert not (trained / "deployed.json").exists()
    assert not (trained / "deployed").exists()


def test_the_three_default_devices_hold_the_whole_a_half_and_a_quarter(trained: Path) -> None:
    job = RunFolder(trained).job()
    sizes = {}
    for device in deploy.default_devices(job):
        blueprint = next(iter(deploy.plan_device(job, device).values()))
        sizes[device.name] = len(blueprint.attn[1])
        assert ticket_memory_bytes(job.layout, blueprint) <= (device.memory_mb or 0) * 1e6
    assert sizes == {"laptop": 4, "phone": 2, "watch": 1}


def test_limits_are_told_by_their_units() -> None:
    given = ["laptop=3.5", "phone=3.5MB,20ms", "watch=.5ms,1/3", "tag=3/12,1.25MB,2.ms"]
    assert parse_devices(given) == [
        DeviceConfig("laptop", 3.5),
        DeviceConfig("phone", 3.5, 20),
        DeviceConfig("watch", None, 0.5, 1 / 3),
        DeviceConfig("tag", 1.25, 2, 0.25),
    ]
    assert parse_devices(["phone=2MB,20ms/token,0.3s/prompt,16tokens,BFloat16"]) == [
        DeviceConfig("phone", 2, 20, None, 300, 16, "bfloat16")
    ]


def fake_device(monkeypatch: pytest.MonkeyPatch, ms_per_block: float) -> None:
    """Devices that take a constant time a token and one for each block of the first divided layer; ten times as long
    for a prompt."""

    def measure(folder: Path, windows: Any, asked: Measurement) -> EdgeReport:
        about = json.loads((folder / "twist.json").read_text())
        ms = 1 + ms_per_block * len(about["blueprint"]["attn"][1])
        perplexity = 50.0 if asked.within(ms / 1000, ms / 100) else None
        num = about["num_params"]
        return EdgeReport(num, 4 * num, perplexity, ms / 1000, ms / 100, 1e3, asked.context or 0, 10**6, 10**6, 1)

    monkeypatch.setattr("twist_fl.tickets.edge_client.measure", measure)


def test_a_device_that_is_too_slow_gets_a_smaller_ticket(
    trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_device(monkeypatch, ms_per_block=1)
    shutil.copytree(trained, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    deploy.deploy_run(LocalGrid(2), folder, folder.job(), "laptop=99MB,5ms phone=3ms,1/1 watch=2.5ms,3/4")
    rows = json.loads((folder.path / "deployed.json").read_text())
    assert [(row["name"], row["memory_mb"], row["latency_ms"], row["kappa"]) for row in rows] == [
        ("laptop", 99, 5, None),
        ("phone", None, 3, 1),
        ("watch", None, 2.5, 0.75),
    ]
    tried = [[(each["size"], each["ms_per_token"]) for each in row["tried"]] for row in rows]
    assert [sizes[0] for sizes in tried] == [(4, 5), (4, 5), (3, 4)]
    assert [sizes[-1] for sizes in tried] == [(4, 5), (2, 3), (1, 2)]
    assert [(row["size"], row["ms_per_token"], row["perplexity"]) for row in rows] == [
        (4, 5, 50),
        (2, 3, 50),
        (1, 2, 50),
    ]
    for row in rows:
        kept = json.loads((folder.path / "deployed" / row["name"] / "twist.json").read_text())
        assert kept["digest"] == row["digest"]
        assert len(kept["blueprint"]["attn"][1]) == row["size"]
    assert device_cells(rows)[1][:3] == ["laptop", "99 MB, 5 ms", "4/4"]
    assert [row["limited_by"] for row in rows] == [None, "latency", "latency"]
    assert device_cells(rows)[2][1] == "3 ms, κ 1: latency decides"
    assert [event["size"] for event in folder.events("device")] == [4, 2, 1]


def test_a_prompt_and_a_token_have_a_limit_each(trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_device(monkeypatch, ms_per_block=1)
    shutil.copytree(trained, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    deploy.deploy_run(LocalGrid(1), folder, folder.job(), "phone=5ms,31ms/prompt,12tok watch=20ms/prompt")
    phone, watch = json.loads((folder.path / "deployed.json").read_text())
    assert [(row["size"], row["ms_per_prompt"], row["limited_by"]) for row in (phone, watch)] == [
        (2, pytest.approx(30), "prompt"),
        (1, pytest.approx(20), "prompt"),
    ]
    assert (phone["context_tokens"], watch["context_tokens"]) == (12, 32)
    with pytest.raises(ConfigError, match=r"prompt_ms=19 is too little; .* 1/4, the prompt took 20 ms: use a higher"):
        deploy.deploy_run(LocalGrid(1), folder, folder.job(), "watch=19ms/prompt")
    with pytest.raises(ConfigError, match=r"'watch': context=33 is more than the model has seen: use 32 at most"):
        deploy.deploy_run(LocalGrid(1), folder, folder.job(), "watch=19ms,33tok")


def test_a_device_gets_weights_of_its_own_precision_and_room_for_its_own_context(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    job = folder.job()
    whole = ticket_memory_bytes(job.layout, full_blueprint(job.layout), 8, "bfloat16")
    assert whole * 2 == ticket_memory_bytes(job.layout, full_blueprint(job.layout), 8)
    devices = f"phone={whole / 1e6}MB,8tok,bfloat16 watch={1.9 * whole / 1e6}MB,8tok"
    deploy.deploy_run(LocalGrid(1), folder, job, devices)
    phone, watch = json.loads((folder.path / "deployed.json").read_text())
    assert (phone["size"], phone["limited_by"], phone["context_tokens"]) == (4, None, 8)
    assert phone["weight_bytes"] == 2 * phone["num_params"]
    assert watch["size"] < 4
    assert watch["limited_by"] == "memory"
    assert abs(phone["perplexity"] / json.loads(folder.results_file.read_text())["full"] - 1) < 0.5
    kept = json.loads((folder.path / "deployed" / "phone" / "config.json").read_text())
    assert kept["dtype"] == "bfloat16"


def test_a_device_that_is_too_slow_with_every_ticket_is_told_how_slow(
    trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_device(monkeypatch, ms_per_block=1)
    shutil.copytree(trained, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    reason = r"'watch': latency_ms=1\.5 is too little; .* 1/4, a token took 2 ms: use a higher limit"
    with pytest.raises(ConfigError, match=reason):
        deploy.deploy_run(LocalGrid(1), folder, folder.job(), "watch=1.5ms")
    assert not (folder.path / "deployed.json").exists()
    with pytest.raises(ConfigError, match=reason):  # the others are served all the same
        deploy.deploy_run(LocalGrid(1), folder, folder.job(), "phone=3ms watch=1.5ms laptop=99MB")
    assert [row["name"] for row in json.loads((folder.path / "deployed.json").read_text())] == ["phone", "laptop"]
    assert {path.name for path in (folder.path / "deployed").iterdir()} == {"phone", "laptop"}
    assert not folder.events("deployed")
    assert "latency_ms=1.5 is too little" in folder.events("failed")[-1]["error"]

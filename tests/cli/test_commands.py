"""Commands on runs, in this process: without Flower, interrupted, longer, and on another machine."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from local_grid import LocalGrid, assert_same_run
from test_cli import fake_device

from twist_fl import rounds
from twist_fl.cli.progress import waits_for
from twist_fl.federation import apps, deploy
from twist_fl.runs import local
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.local import train_local
from twist_fl.training.job import Job

MakeJob = Callable[..., Job]
LITTLE = ("eval.every=0", "eval.max_windows=2", "eval.tickets=1", "deploy.new_tokens=4")

pytestmark = pytest.mark.usefixtures("no_flower")


def assert_is_oracle(folder: RunFolder, scratch: Path) -> None:
    job, state = folder.job(), folder.load()
    assert state is not None
    assert_same_run(state, rounds.run(job, rounds.start(job), scratch))


def test_a_run_without_flower_is_the_same_run(run: Run, tiny: tuple[str, ...], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    words = ("demo", *tiny, *LITTLE, "train.optimizer_state=client", f"dir={folder.path}")
    status, output, _ = run("train", "--local", *words)
    assert status == 0
    assert re.search(r"^twist: 2 rounds; each worker \(of 3\) trains [\d,]+ of [\d,]+ parameters$", output, re.M)
    assert re.search(rf"^perplexity: full model .*; results in {folder.results_file}$", output, re.M)
    assert_is_oracle(folder, tmp_path / "oracle")
    assert folder.finished(2)
    status, output, _ = run("train", "--local", "--resume", folder.path, "train.rounds=4")
    assert status == 0
    assert "run: goes on after round 2 of 4" in output
    assert_is_oracle(folder, tmp_path / "longer")


def test_a_run_without_flower_that_fails_says_why(run: Run, tiny: tuple[str, ...], tmp_path: Path) -> None:
    status, _, error = run("train", "--local", "demo", *tiny, *LITTLE, "train.lr=1e38", f"dir={tmp_path / 'run'}")
    assert status == 1
    assert error.startswith("error: the run failed: round 1: no worker's reply counted: {0: 'training loss is nan'")
    assert error.count("\n") == 1


def test_an_interrupted_run_is_gone_on_with_as_it_says(
    run: Run, tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words that it prints are pasted, though the folder's name has spaces and brackets."""
    folder = RunFolder(tmp_path / "my [first] run's")
    words = ("train.rounds=4", "checkpoint_every=1", "train.optimizer_state=client", f"dir={folder.path}")

    def interrupted(job: Job, state: rounds.RunState, *given: Any) -> Any:
        if state.round == 2:
            raise KeyboardInterrupt
        return rounds.twist_round(job, state, *given)

    monkeypatch.setattr(local, "twist_round", interrupted)
    status, output, _ = run("train", "--local", "demo", *tiny, *LITTLE, *words)
    assert status == 130
    said = re.search(r"interrupted; round 2 is saved; go on after it with:  twist-fl (.*)$", output, re.M)
    assert said is not None
    assert not folder.finished(4)
    monkeypatch.setattr(local, "twist_round", rounds.twist_round)
    status, output, _ = run(*shlex.split(said[1]))
    assert status == 0
    assert f"{folder.path.name}: goes on after round 2 of 4" in output
    assert_is_oracle(folder, tmp_path / "oracle")


def test_a_run_of_which_nothing_is_saved_says_that_it_begins_again(
    run: Run, tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(local, "twist_round", interrupted)
        _, output, _ = run("train", "--local", "demo", *tiny, *LITTLE, "train.rounds=1", f"dir={tmp_path / 'run'}")
    assert "interrupted; nothing is saved yet; begin again with:  twist-fl train --local --resume " in output
    status, output, _ = run("train", "--local", "--resume", tmp_path / "run")
    assert status == 0
    assert "run: nothing is saved, begins again with round 1 of 1" in output
    assert run("cost", tmp_path / "run")[1].count("0 B") == 0  # nothing was sent, which is no measurement of bytes
    (trained,) = RunFolder(tmp_path / "run").events("round")
    assert trained["peak_bytes"] == 0 < trained["predicted_peak_bytes"]  # the process holds the server's state, too


def test_what_a_finished_run_suggests_can_be_pasted(run: Run, tiny_job: MakeJob, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "two words")
    folder.create(tiny_job(*LITTLE, "algorithm=ddp", "train.rounds=2"))
    train_local(folder)
    status, output, _ = run("train", "--resume", folder.path)
    assert status == 0
    assert f"{folder.path} is finished: 4 rounds, perplexity: full model " in output
    suggested = [shlex.split(line.partition("   ")[0]) for line in re.findall(r"^  twist-fl (.*)$", output, re.M)]
    assert suggested[0] == ["train", "--resume", str(folder.path), "train.rounds=4"]
    assert [words[0] for words in suggested] == ["train", "tickets", "deploy", "report"]
    assert all(words[1 + (words[0] == "train")] == str(folder.path) for words in suggested)
    assert run(*suggested[0], "--local")[0] == 0
    assert folder.finished(8)


def test_a_folder_that_holds_a_run_says_words_to_paste(run: Run, tiny_job: MakeJob, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "two words")
    folder.create(tiny_job(*LITTLE))
    for words in (("train", "demo", f"dir={folder.path}"), ("train", folder.path), ("report", folder.path)):
        error = run(*words)[2]
        assert f"`twist-fl train --resume {shlex.quote(str(folder.path))}`" in error


def test_results_alone_need_no_flower(run: Run, tiny_job: MakeJob, tmp_path: Path) -> None:
    """All rounds are trained, and then it was killed."""
    folder = RunFolder(tmp_path / "run")
    folder.create(tiny_job(*LITTLE))
    train_local(folder)
    folder.results_file.unlink()
    status, output, _ = run("train", "--resume", folder.path)
    assert status == 0
    assert "run: all 2 rounds are trained; making its results" in output
    assert folder.results_file.is_file()


# Devices that this machine plays


def test_devices_here_measure_what_devices_behind_flower_do(
    run: Run, tiny_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_device(monkeypatch, ms_per_block=1)
    folder = RunFolder(tmp_path / "run")
    folder.create(tiny_job(*LITTLE))
    train_local(folder)
    shutil.copytree(folder.path, tmp_path / "flower")
    behind = RunFolder(tmp_path / "flower")
    devices = ["laptop=99MB,5ms", "phone=3ms,1/1", "watch=2.5ms,3/4"]
    deploy.deploy_run(LocalGrid(2), behind, behind.job(), " ".join(devices))
    status, output, _ = run("deploy", folder.path, *(word for each in devices for word in ("--device", each)))
    assert status == 0
    assert "laptop" in output
    here, there = (json.loads((each.path / "deployed.json").read_text()) for each in (folder, behind))
    again = [row.pop("bytes_received") for row in here]  # the same devices, which have it all
    assert all(sent < 40_000 < row.pop("bytes_received") for sent, row in zip(again, there, strict=True))
    assert here == there
    for name in ("laptop", "phone", "watch"):
        for file in ("model.safetensors", "twist.json", "config.json"):
            kept = [each.path / "deployed" / name / file for each in (folder, behind)]
            assert kept[0].read_bytes() == kept[1].read_bytes()


def test_a_device_here_that_is_too_slow_is_told_after_the_others(
    run: Run, tiny_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_device(monkeypatch, ms_per_block=1)
    folder = RunFolder(tmp_path / "run")
    folder.create(tiny_job(*LITTLE))
    train_local(folder)
    status, output, error = run("deploy", folder.path, "--device", "watch=1.5ms", "--device", "phone=3ms")
    assert status == 2
    assert "latency_ms=1.5 is too little" in error
    assert "phone" in output
    assert [row["name"] for row in json.loads((folder.path / "deployed.json").read_text())] == ["phone"]


def test_a_measurement_that_fails_is_one_line(
    run: Run, tiny_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: object, **more: object) -> None:
        raise RuntimeError("measuring phone failed with exit status -9: ")

    monkeypatch.setattr("twist_fl.tickets.edge_client.measure", broken)
    folder = RunFolder(tmp_path / "run")
    folder.create(tiny_job(*LITTLE))
    train_local(folder)
    status, _, error = run("deploy", folder.path, "--device", "phone=1/2")
    assert (status, error.count("\n")) == (1, 1)
    assert error.startswith("error: deploying failed: measuring phone failed with exit status -9")


# On another machine


@pytest.fixture
def moved(tiny_job: MakeJob, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A trained run whose text is at another place, where nothing is in the cache."""
    old, new, folder = tmp_path / "text", tmp_path / "new text", RunFolder(tmp_path / "run")
    shutil.copytree(text_folder, old)
    folder.create(tiny_job(*LITTLE, f"data.path={old}"))
    train_local(folder)
    old.rename(new)
    monkeypatch.setenv("TWIST_FL_CACHE", str(tmp_path / "cache"))
    apps.worker_for.cache_clear()
    return folder.path, new


@pytest.mark.parametrize("words", [("generate", "RUN", "--new-tokens", "3"), ("cost", "RUN"), ("report", "RUN")])
def test_commands_that_need_no_text(words: tuple[str, ...], run: Run, moved: tuple[Path, Path], tmp_path: Path) -> None:
    status, output, _ = run(*(str(moved[0]) if word == "RUN" else word for word in words))
    assert status == 0
    assert output
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("tickets", "RUN", "--draws", "1"),
        ("prune", "RUN", "--method", "magnitude", "--calibration", "2"),
        ("deploy", "RUN", "--device", "phone=1/2"),
        ("train", "--local", "--resume", "RUN", "train.rounds=3"),
    ],
)
def test_commands_that_need_text_take_its_new_place(
    words: tuple[str, ...], run: Run, moved: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_device(monkeypatch, ms_per_block=1)
    path, new = moved
    given = [str(path) if word == "RUN" else word for word in words]
    status, _, error = run(*given)
    assert status == 2
    assert "the run's text is not in this machine's cache, and data.path=" in error
    assert "data.path=..." in error
    assert error.count("\n") == 1
    assert run(*given, f"data.path={new}")[0] == 0
    assert run(*given)[0] == 0  # it is in the cache now


def test_waiting_is_said_on_a_terminal_and_nowhere_else(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    for terminal in (True, False):
        waits_for(Console(force_terminal=terminal, color_system=None), "loading torch")
    assert capsys.readouterr().out == "loading torch ...\n"

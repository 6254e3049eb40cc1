"""What is said to a mistake in the words of a command: paths and names, runs, options, addresses, limits."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest
from conftest import Run
from huggingface_hub import constants
from test_cli import trained

from twist_fl.config.devices import DeviceConfig
from twist_fl.config.finding import finished_runs, no_run
from twist_fl.config.hub import is_path, local_path, prepare_hub
from twist_fl.system.errors import ConfigError
from twist_fl.tickets.device_limits import parse_devices

__all__ = ["trained"]  # a fixture

# A path, or a name on the hub


def test_a_path_is_told_from_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for name in ("./x", "../x", "~/x", "/x", "runs/x", "runs", "a/b/c", "x/", "my texts", "texts.txt", "x.safetensors"):
        assert is_path(name), name
    for name in ("gpt2", "openai-community/gpt2", "Qwen/Qwen2.5-0.5B", "EleutherAI/pythia-1.4b-deduped", "x_y"):
        assert not is_path(name), name


def test_a_path_that_is_not_there_is_refused_with_what_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/mine").mkdir(parents=True)
    assert local_path("key", "runs/mine") == Path("runs/mine")
    for value, reason in {
        "runs/min": "key='runs/min' does not exist, did you mean 'runs/mine'?",
        "runs/xyz": "key='runs/xyz' does not exist; in runs: mine",
        "./other": "key='./other' does not exist; here: runs",
        "./no/such": "key='./no/such' does not exist; nor does no",
        "https://huggingface.co/openai-community/gpt2": "is a URL: give the name on the hub, openai-community/gpt2",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(reason)):
            local_path("key", value)


@pytest.mark.usefixtures("no_flower")
@pytest.mark.parametrize("key", ["model.pretrained", "data.tokenizer"])
def test_a_hub_that_cannot_be_reached_says_what_to_do(key: str, run: Run) -> None:
    status, _, error = run("train", "demo", f"{key}=no-such-org/no-such-model")
    assert status == 2
    assert f"{key}='no-such-org/no-such-model' is neither here nor among what was downloaded before, and" in error


@pytest.mark.parametrize("answers", [True, False])
def test_a_hub_that_does_not_answer_is_asked_once(answers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After that, this process and its children go on as offline ones."""
    asked: list[str] = []

    def head(address: str, timeout: float) -> None:
        asked.append(address)
        if not answers:
            raise httpx.ConnectError("no route")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(httpx, "head", head)
    assert prepare_hub.__wrapped__() is answers
    assert len(asked) == 1
    assert constants.HF_HUB_OFFLINE is not answers
    assert os.environ.get("HF_HUB_OFFLINE") == (None if answers else "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # of the other tests


# Runs and folders of runs


def test_a_folder_of_runs_stands_for_those_that_are_finished(tmp_path: Path) -> None:
    for name in ("a", "b", "c/d"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "job.json").touch()
        if name != "b":
            (tmp_path / name / "results.json").touch()
    assert finished_runs([tmp_path]) == [tmp_path / "a", tmp_path / "c" / "d"]
    assert finished_runs([tmp_path / "b", tmp_path / "a"]) == [tmp_path / "b", tmp_path / "a"]
    (tmp_path / "a" / "results.json").unlink()
    (tmp_path / "c" / "d" / "results.json").unlink()
    with pytest.raises(ConfigError, match=r"holds 3 runs and none is finished: go on with `twist-fl train --resume "):
        finished_runs([tmp_path])


def test_where_no_run_is_the_runs_around_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "job.json").touch()
    for path, reason in {
        "runs": "holds no run itself (no job.json), but runs: give runs/mine",
        "mine": "give the folder of a run that was started, did you mean runs/mine?",
        "runs/mime": f"did you mean '{tmp_path}/runs/mine'?",
        "runs/mine/checkpoints": f"is a part of a run: give the run, {tmp_path}/runs/mine",
    }.items():
        assert reason in str(no_run(tmp_path / path)), path


@pytest.mark.usefixtures("no_flower")
@pytest.mark.parametrize("command", ["train --resume", "tickets", "prune", "deploy", "generate"])
def test_a_folder_of_runs_is_answered_with_its_runs(command: str, run: Run, trained: Path) -> None:
    status, _, error = run(*command.split(), trained.parent)
    assert status == 2
    assert f"{trained.parent} holds no run itself (no job.json), but runs: give {trained}" in error


# Options


ASKED = {
    ("train", "--lr", "1e-3"): "twist-fl train has no option --lr; settings are key=value: did you mean train.lr=1e-3?",
    ("train", "demo", "--workers", "4"): "did you mean train.workers=4?",
    ("train", "--train.lr=1e-3"): "no option --train.lr; settings are key=value: did you mean train.lr=1e-3?",
    ("train", "--rounds=10"): "did you mean train.rounds=10?",
    ("train", "--seed", "1"): "did you mean seed=1?",
    ("train", "-lr", "3"): "no option -lr; settings are key=value: did you mean train.lr=3?",
    ("train", "--learning-rate", "1"): "did you mean train.lr=1?",
    ("demo", "--num-clients", "8"): "did you mean train.workers=8?",
    ("cost", "--lr"): "did you mean train.lr=...?",
    ("train", "--resum", "x"): "did you mean --resume?",
    ("train", "--resume"): "Option '--resume' requires an argument; see twist-fl train --help",
    ("train", "--preset", "demo"): "no option --preset: its first word is that, twist-fl train demo",
    ("train", "demo", "--foo"): "twist-fl train has no option --foo; it has --resume",
    ("tickets", "x", "--seed", "3"): "seed is a setting, for `twist-fl train ... seed=3`",
    ("tickets",): "Missing argument 'RUN_OR_MODEL': twist-fl tickets [OPTIONS] RUN_OR_MODEL [KEY=VALUE]...; see",
    ("tickets", "x", "--draws", "0"): "--draws 0 must be 1 to 100000",
    ("tickets", "x", "--draws", "ten"): "--draws 'ten' must be a whole number",
    ("tickets", "x", "--windows", "0"): "--windows 0 must be 1 or more",
    ("tickets", "x", "--sizes", "6,,3"): "--sizes 6,,3 has an empty place: write 6,3",
    ("generate", "x", "--sizes", "3"): "did you mean --size?",
    ("generate", "x", "--temperature", "nan"): "--temperature nan must be 0 (the likeliest token), or 0.01 to 100",
    ("generate", "x", "--seed", "-1"): "--seed -1 must be 0 to 9223372036854775807",
    ("generate", "x", "--prompt", ""): "the prompt is empty: give --prompt at least one token to continue",
    ("report", "x", "--out", "."): "--out: File '.' is a directory",
    ("reproduce", "tabel1"): "no experiment 'tabel1', did you mean 'table1'?; there are fig2, table1",
    ("reproduce", "train.lr"): "'train.lr' is no experiment but a setting, which has a value: train.lr=...",
    ("cost", "first"): "no preset 'first'; presets: demo",
    ("trian",): "No such command 'trian', did you mean 'train'? There are train, ",
    ("name=x",): "No such command 'name=x': settings go behind a command, for example train demo name=x",
    ("node",): "Missing option '--superlink'",
    (
        "node",
        "--superlink",
        "localhost",
    ): "--superlink localhost has no port: give HOST:PORT, for example localhost:8000",
    ("node", "--superlink", "http://lab:9000"): "http://lab:9000 is a URL: give HOST:PORT alone, lab:9000",
    ("node", "--superlink", "https://lab/"): "is a URL: give HOST:PORT alone, lab:8000",
    ("node", "--superlink", "lab:99999"): "lab:99999 is not HOST:PORT with a port of 1 to 65535, for example lab:8000",
    ("node", "--superlink", "::1:8000"): "::1:8000: an IPv6 address stands in brackets, as [::1]:8000",
    ("node", "--superlink", "a:1", "--root-certificates", "ca"): "--root-certificates 'ca' does not exist",
    ("node", "--superlink", "a:1", "--trusted-entities", "."): "--trusted-entities '.' is a folder: give the file",
    (
        "node",
        "--superlink",
        "a:1",
        "--node-config",
        "partition-id 0",
    ): "--node-config 'partition-id 0' is not KEY=VALUE",
    ("node", "--superlink", "a:1", "--node-config", "id=zero"): "--node-config 'id=zero' is not KEY=VALUE",
}


@pytest.mark.usefixtures("no_flower")
@pytest.mark.parametrize("words", ASKED, ids=" ".join)
def test_a_mistake_in_the_words_of_a_command(words: tuple[str, ...], run: Run, tmp_path: Path) -> None:
    status, output, error = run(*words)
    assert status == 2
    assert ASKED[words] in error
    assert error.startswith("error: ")
    assert (output, error.count("\n")) == ("", 1)
    assert list(tmp_path.iterdir()) == []


def test_what_the_system_refuses_is_named(run: Run, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, _, error = run("report", trained, "--out", "file/report.html")
    assert status == 1
    assert error == "error: file: File exists\n"


def test_a_status_of_no_folder_is_of_those_that_train_makes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, error = run("status")
    assert (status, error) == (2, "error: runs does not exist: give a run's folder, or a folder of runs\n")
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "job.json").touch()
    status, output, _ = run("status")
    assert status == 0
    assert output.startswith("runs/mine: ")


def test_versions(run: Run) -> None:
    status, output, _ = run("--version")
    assert status == 0
    for name in ("flwr", "torch", "transformers"):
        assert f"{name} {version(name)}" in output
    assert output.startswith(f"twist_fl {version('twist-fl')}, ")


# Limits of devices


def test_limits_in_every_unit() -> None:
    given_ = ["a=2GB", "b=2MiB,20 ms", "c=500kb,.5s", "d=25%", "e=3.5", "f=1GiB , 1/4", "g=1024KiB"]
    assert parse_devices(given_) == [
        DeviceConfig("a", 2000),
        DeviceConfig("b", 2.097152, 20),
        DeviceConfig("c", 0.5, 500),
        DeviceConfig("d", None, None, 0.25),
        DeviceConfig("e", 3.5),
        DeviceConfig("f", 1073.741824, None, 0.25),
        DeviceConfig("g", 1.048576),
    ]


# What only the model and the text know


def test_a_batch_that_no_worker_has_windows_for(tiny_job: Callable[..., object]) -> None:
    with pytest.raises(
        ConfigError, match=r"train\.batch_size=9999 is more than the \d+ windows .* of 3 workers has: use"
    ):
        tiny_job("train.batch_size=9999")


def test_a_model_that_no_machine_holds_is_refused_before_its_text_is_read(tiny_job: Callable[..., object]) -> None:
    with pytest.raises(
        ConfigError, match=r"the model has [\d,]+ parameters, [\d,.]+ GB in float32, and this machine has"
    ):
        tiny_job("model.n_embd=8000000", "data.path=/not/read")

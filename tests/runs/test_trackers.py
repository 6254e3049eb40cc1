"""Who else hears a run's events: TensorBoard, and functions of the user's."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from twist_fl.config.schema import Config, load_config
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.local import train_local
from twist_fl.runs.story import warnings
from twist_fl.runs.trackers import check_trackers, listen
from twist_fl.system.errors import ConfigError
from twist_fl.training.job import Job

MODULE = """
heard = []
times = 0

def start(config, folder):
    heard.append((config["name"], folder))
    return heard.append

def broken(config, folder):
    def hear(event):
        global times
        times += 1
        raise ConnectionError("the tracker's server is away")
    return hear

def never(config, folder):
    raise PermissionError("log in first")

number = 5

def bare(event):
    pass
"""


@pytest.fixture
def tracker_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the user's, `my_tracker`."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "my_tracker.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    import my_tracker  # type: ignore[import-not-found]

    yield my_tracker
    del sys.modules["my_tracker"]


def config(**log: Any) -> Config:
    return load_config(overrides=[f"log.{key}={value}" for key, value in log.items()])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("my_tracker", "'my_tracker' must be one of tensorboard, or module:name of your own"),
        (":start", "':start' is not of the form module:name, for example my_module:mine"),
        ("no_such_module:start", "'no_such_module:start': No module named 'no_such_module': install it where the "
         "server runs, or name its folder in PYTHONPATH"),
        ("my_tracker:stop", "'my_tracker:stop': the module my_tracker has no stop"),
        ("my_tracker:number", "'my_tracker:number' must be a function (config, folder) -> function of an event, found "
         "a int"),
        ("my_tracker:bare", "'my_tracker:bare' must be a function (config, folder) -> function of an event, found "
         "bare(event): too many positional arguments"),
    ],
)  # fmt: skip
def test_a_tracker_that_cannot_be_had_is_refused(name: str, reason: str, tracker_module: Any) -> None:
    with pytest.raises(ConfigError, match=r"^log\.tracker=") as caught:
        check_trackers(config(tracker=f"'{name}'"))
    assert str(caught.value).startswith(f"log.tracker={reason}")


@pytest.mark.parametrize("private", [True, False])
def test_a_tracker_may_lie_in_the_folder_where_the_command_was_given(
    private: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`private`: as the server of a private simulation, which Flower may run elsewhere."""
    (tmp_path / f"lies_here_{private}.py").write_text(MODULE)
    monkeypatch.chdir("/" if private else tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    if private:
        monkeypatch.setenv("TWIST_FL_WORKING_FOLDER", str(tmp_path))
    ((name, _),) = check_trackers(config(tracker=f"'lies_here_{private}:start'"))
    assert name == f"lies_here_{private}:start"


@pytest.mark.parametrize(
    ("code", "reason"), [("def start(:", "invalid syntax"), ("import no_such_thing", "No module named 'no_such_thing'")]
)
def test_a_tracker_whose_module_is_broken_is_refused(
    code: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_module.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=rf"^log\.tracker='broken_module:start': {reason}"):
        check_trackers(config(tracker="'broken_module:start'"))


def test_tensorboard_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twist_fl.runs.trackers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^log.tensorboard=true .* pip install 'twist-fl\[tensorboard\]'$"):
        check_trackers(config(tensorboard="true"))
    assert check_trackers(config()) == []


def test_a_tracker_hears_every_event(tracker_module: Any, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    listen(config(tracker="my_tracker:start"), folder)
    folder.rewind(0, "note")
    folder.log("note", text="a")
    assert tracker_module.heard == [("run", folder.path), *folder.events()]


@pytest.mark.parametrize(
    ("name", "error"),
    [("broken", "ConnectionError: the tracker's server is away"), ("never", "PermissionError: log in first")],
)
def test_an_error_in_a_tracker_ends_nothing_and_is_said_once(
    name: str, error: str, tracker_module: Any, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    listen(config(tracker=f"my_tracker:{name}"), folder)
    for _ in range(3):
        folder.log("note")
    assert [event["event"] for event in folder.events()] == ["note", "tracker", "note", "note"]
    (event,) = folder.events("tracker")
    assert list(warnings(event)) == [f"log.tracker='my_tracker:{name}' failed, the run goes on without: {error}"]
    assert tracker_module.times == (3 if name == "broken" else 0)


def read(folder: RunFolder) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(folder.path / "tensorboard"))
    found.Reload()
    return {tag: [(each.step, each.value) for each in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def assert_points(found: list[tuple[int, float]], events: list[dict[str, Any]], key: str) -> None:
    assert [step for step, _ in found] == [event["round"] for event in events]
    assert [value for _, value in found] == pytest.approx([event[key] for event in events])


def test_tensorboard_has_what_the_log_says_and_no_point_twice_after_a_resume(
    tiny_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny_job("log.tensorboard=true", "train.rounds=4", "checkpoint_every=2", "eval.every=2", "eval.max_windows=4")
    folder = RunFolder(tmp_path / "run")
    folder.create(job)

    log = RunFolder.log

    def die(self: RunFolder, event: str, **fields: Any) -> None:
        log(self, event, **fields)
        if (event, fields["round"]) == ("round", 3):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # three rounds are in the log, of which two are saved
        patch.setattr(RunFolder, "log", die)
        with pytest.raises(KeyboardInterrupt):
            train_local(folder)
    assert len(read(folder)["loss"]) == 3
    train_local(RunFolder(folder.path))
    found = read(folder)
    rounds, evaluations = folder.events("round"), folder.events("eval")
    (results,) = folder.events("results")
    assert_points(found["loss"], rounds, "loss")
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4]
    assert found["replies lost"] == [(round_, 0) for round_ in (1, 2, 3, 4)]
    assert_points(found["perplexity/full"], evaluations, "full")
    assert [step for step, _ in found["perplexity/subnets"]] == [2, 4]
    assert_points(found["results/full model"], [results], "full")
    assert_points(found["results/tickets of 2/4"], [results | results["tickets"][0]], "mean")
    assert all(math.isfinite(value) for name in ("seconds/round", "seconds/training") for _, value in found[name])

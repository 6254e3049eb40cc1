"""What is said of a run: lines of its events, where it stands, and `twist-fl status`, from logs that are made up."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import nullcontext
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from twist_fl.cli import progress
from twist_fl.cli.progress import RunProgress
from twist_fl.federation.apps import speaker
from twist_fl.runs import status
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.events import EventLog, EventReader
from twist_fl.runs.story import Follower, Story, lines, round_text, warnings
from twist_fl.system.errors import ConfigError
from twist_fl.system.locks import is_locked, locked

START: dict[str, Any] = {"algorithm": "twist", "num_rounds": 10, "num_params": 9999, "subnet_params": [500, 700]}


def event(kind: str, second: float = 0, **fields: Any) -> dict[str, Any]:
    return {"event": kind, "time": f"2026-11-25T23:00:{second:06.3f}Z", **fields}


def round_event(round_: int, second: float = 0, **fields: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {"bytes_down": {"weights": 1000, "other": 500}, "bytes_up": {"weights": 1_000_000}}
    whole = {"round": round_, "loss": 4.0, "seconds": 1.5, "dropped": {}, "notes": {}, **sizes, **fields}
    return event("round", second, **whole)


def told(*events: dict[str, Any]) -> Story:
    story = Story()
    for each in events:
        story.add(each)
    return story


def said(*events: dict[str, Any]) -> list[str]:
    """What the last of `events` says."""
    return [*warnings(events[-1]), *lines(events[-1], told(*events))]


BEGUN = event("start", round=0, **START)
NODES = event("nodes", round=0, nodes=2, shared_memory=1, failed=[])


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([BEGUN], ["twist: 10 rounds; each worker (of 2) trains 500 to 700 of 9,999 parameters"]),
        (
            [BEGUN, event("federated", round=3, of="full", answered=[0, 2], dropped={"1": "no room"}, perplexity=7.5,
                          loss=2.0, bytes_down={}, bytes_up={})],
            [
                "round 3: worker 1 was asked to evaluate, and did not count: no room",
                "round 3: perplexity of the full model, as 2 of 3 workers find it: 7.50",
            ],
        ),
        (
            [BEGUN, event("federated", round=3, of="subnet", answered=[], dropped={}, bytes_down={}, bytes_up={})],
            ["round 3: perplexity of their subnets, as 0 of 0 workers find it: unknown, nobody answered"],
        ),
        ([event("start", round=4, **START)], [
            "twist: 10 rounds; each worker (of 2) trains 500 to 700 of 9,999 parameters", "going on after round 4"]),
        ([event("waiting", nodes=1, wanted=2)], ["waiting for 1 node: 1 of 2 here"]),
        ([event("waiting", nodes=0, wanted=2)], ["waiting for 2 nodes: 0 of 2 here"]),
        ([event("asked", nodes=2, wanted=2)],
         ["2 nodes here, waiting until each has read the text and built its model"]),
        ([event("asked", nodes=1, wanted=2)],
         ["1 node here, waiting until each has read the text and built its model; 2 were wanted, those here share the "
          "workers"]),
        ([NODES], ["2 nodes ready, 1 of them on the server's machine"]),
        ([event("nodes", nodes=1, failed=["the text differs"])],
         ["a node is not ready: the text differs", "1 node ready"]),
        ([BEGUN, round_event(1)],
         ["round 1 of 10  loss 4.000  sent 1.5 kB, received 1.0 MB  1.50 s  13.5 s left"]),
        ([BEGUN, round_event(1, bytes_via={"shm": 1000, "inline": 5}, dropped={"3": "late"}, notes={"1": "small"})],
         ["round 1: worker 3 did not count: late", "round 1: worker 1: small",
          "round 1 of 10  loss 4.000  sent 1.5 kB, received 1.0 MB (1.0 kB of both in shared memory)  1.50 s  "
          "1 reply lost  13.5 s left"]),
        ([event("eval", round=2, full=1234.5, subnets=61.234)], ["round 2: perplexity 1,234 (subnets 61.23)"]),
        ([BEGUN, event("eval", round=1, full=60.0), round_event(1)],
         ["round 1 of 10  loss 4.000  perplexity 60.00  sent 1.5 kB, received 1.0 MB  1.50 s  13.5 s left"]),
        ([BEGUN, event("eval", round=1, full=60.0), round_event(2)],
         ["round 2 of 10  loss 4.000  perplexity 60.00 after round 1  sent 1.5 kB, received 1.0 MB  1.50 s  "
          "12.0 s left"]),
        ([event("saved", round=2)], ["round 2: checkpoint saved"]),
        ([event("ticket", size=3)], ["evaluating tickets of size 3"]),
        ([event("ticket", size=3), event("ticket", size=3)], []),
        ([event("results", full=20.0, tickets=[{"size": 2, "of": 4, "mean": 25.5}])],
         ["perplexity: full model 20.00; random tickets, mean: 2/4 25.50"]),
        ([event("failed", error="NoWorkersError: all are gone")], ["failed: NoWorkersError: all are gone"]),
        ([event("done")], []),
    ],
)  # fmt: skip
def test_every_event_in_words(events: list[dict[str, Any]], expected: list[str]) -> None:
    assert said(*events) == expected


def test_time_left_is_at_the_pace_of_the_rounds_with_what_is_between_them() -> None:
    story = told(BEGUN, *(round_event(i, second=3 * i) for i in range(1, 5)))
    assert (story.round_seconds, story.seconds_left) == (1.5, 18.0)
    again = event("start", 50, round=4, **START)  # the time that the run stood still does not count
    assert (
        told(BEGUN, *(round_event(i, second=3 * i) for i in range(1, 5)), again, round_event(5, 55)).seconds_left == 7.5
    )
    assert told(BEGUN, *(round_event(i) for i in range(1, 11))).seconds_left == 0
    timeless = {key: value for key, value in round_event(1).items() if key != "time"}
    assert told(BEGUN, timeless).seconds_left == 13.5


def test_lost_replies_are_counted_by_worker_with_the_last_reason() -> None:
    story = told(BEGUN, round_event(1, dropped={"0": "late", "2": "nan"}), round_event(2, dropped={"2": "gone"}))
    assert story.lost == {"0": (1, "late"), "2": (2, "gone")}
    assert "3 replies lost" in round_text(story)


def write(log: EventLog, *events: dict[str, Any]) -> None:
    log.file.parent.mkdir(parents=True, exist_ok=True)
    with log.file.open("a") as file:
        file.writelines(json.dumps(each) + "\n" for each in events)


def test_after_a_rewinding_the_story_is_told_anew_and_only_what_is_new_is_news(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    follower = Follower(log.file)
    write(log, BEGUN, *(round_event(i) for i in (1, 2, 3)))
    assert len(list(follower.look())) == 4
    log.rewind(2, "start", **START)
    write(log, round_event(3))
    assert [(each["event"], each["round"]) for each in follower.look()] == [("start", 2), ("round", 3)]
    assert follower.story.down == 4500
    assert list(follower.look()) == []


def test_the_server_says_what_it_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    write(log, BEGUN, round_event(1))
    log.listeners.append(speaker(log.file))
    log.rewind(1, "start", **START)
    log.write(**round_event(2))
    first, again, last = capsys.readouterr().out.splitlines()
    assert first.startswith("twist: 10 rounds; ")
    assert again == "going on after round 1"
    assert last.startswith("round 2 of 10  loss 4.000  sent 3.0 kB, received 2.0 MB  1.50 s  ")


# Status


def show(*paths: Path, follow: bool = False) -> list[str]:
    out = StringIO()
    status.show_status(Console(file=out, width=40), list(paths), follow)
    return out.getvalue().splitlines()


def made(folder: Path, *events: dict[str, Any], saved: int | None = None) -> Path:
    write(EventLog(folder / "events.jsonl"), *events)
    if saved:
        (folder / "checkpoints" / f"round-{saved:06d}").mkdir(parents=True)
    return folder


FAILED = event("failed", error="NoWorkersError: all are gone")


@pytest.mark.parametrize(
    ("events", "saved", "busy", "expected"),
    [
        ([], None, None, "not at work, and has not begun; go on with: twist-fl train --resume RUN"),
        ([], None, "command", "starting"),
        ([BEGUN, event("waiting", nodes=1, wanted=2)], None, "server", "waiting for 1 node: 1 of 2 here"),
        ([BEGUN, NODES], None, "server", "training round 1 of 10"),
        ([BEGUN, NODES, round_event(3)], None, "server", "training round 4 of 10"),
        ([BEGUN], None, "server", "starting round 1 of 10"),
        ([BEGUN, round_event(3), event("evaluating", round=3)], None, "server", "evaluating after round 3 of 10"),
        ([BEGUN, round_event(3), event("evaluating", round=3), event("eval", round=3, full=5.0)], None, "server",
         "training round 4 of 10"),
        ([BEGUN, round_event(10)], None, "server", "evaluating the model"),
        ([BEGUN, round_event(10), event("ticket", size=2)], None, "server", "evaluating tickets of size 2"),
        ([BEGUN, round_event(3)], 2, None,
         "stopped at round 3 of 10; round 2 is saved; go on with: twist-fl train --resume RUN"),
        ([BEGUN, round_event(3)], None, None,
         "stopped at round 3 of 10; nothing is saved; go on with: twist-fl train --resume RUN"),
        ([BEGUN, FAILED], 2, None, "failed: NoWorkersError: all are gone; round 2 is saved; "
         "go on with: twist-fl train --resume RUN"),
        ([BEGUN, round_event(3), FAILED], 2, "command", "starting again after round 3"),
        ([BEGUN, round_event(10), event("done")], 10, None, "finished"),
        ([BEGUN, round_event(10), event("done")], 10, "command", "finished; a command is at work in its folder"),
    ],
)  # fmt: skip
def test_status_says_where_a_run_stands(
    events: list[dict[str, Any]], saved: int | None, busy: str | None, expected: str, tmp_path: Path
) -> None:
    folder = made(tmp_path / "my run", *events, saved=saved)
    with locked(folder / f".{busy}.lock") if busy else nullcontext():
        first = show(folder)[0]
    assert first == f"{folder}: " + expected.replace("RUN", f"'{folder}'")


def test_status_of_one_run_is_all_that_is_known(tmp_path: Path) -> None:
    folder = made(tmp_path / "run", BEGUN, event("nodes", nodes=1, failed=["the text differs"]),
                  round_event(1, dropped={"2": "late"}))  # fmt: skip
    facts = {line[2:13].strip(): line[13:] for line in show(folder)[1:]}
    age = facts.pop("last event")
    assert facts == {
        "workers": "each worker (of 2) trains 500 to 700 of 9,999 parameters",
        "nodes": "1 node ready",
        "not ready": "the text differs",
        "rounds": "1 of 10",
        "training": "loss 4.000  sent 1.5 kB, received 1.0 MB  1.50 s  1 reply lost  13.5 s left",
        "pace": "1.50 s a round, the median of the last",
        "lost": "1 reply of worker 2, the last: late",
    }
    assert age.startswith("2026-11-25 23:00:00 UTC, ")


def test_status_of_a_folder_of_runs_is_a_line_each(tmp_path: Path) -> None:
    made(tmp_path / "b" / "deep", BEGUN, event("done"))
    made(tmp_path / "a", BEGUN, round_event(2))
    first, second = show(tmp_path)
    assert first.startswith(f"{tmp_path / 'a'}: stopped at round 2 of 10; ")
    assert "  loss 4.000  sent" in first
    assert second == f"{tmp_path / 'b' / 'deep'}: finished"


def test_status_of_what_is_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(tmp_path))} holds no run"):
        show(tmp_path)


def test_a_run_that_has_ended_is_shown_once_however_it_is_followed(tmp_path: Path) -> None:
    folder = made(tmp_path / "run", BEGUN, event("done"))
    assert sum(line.startswith("  rounds ") for line in show(folder, follow=True)) == 1


def test_status_follows_until_nobody_is_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path / "run", BEGUN)
    more = iter([[NODES], [round_event(9)], [round_event(10), event("done")]])
    looks = iter([True, True, True, True, False, False])
    monkeypatch.setattr(status, "is_locked", lambda file: file.name == ".command.lock" and next(looks, False))
    monkeypatch.setattr(
        "twist_fl.runs.status.time.sleep", lambda seconds: write(EventLog(folder / "events.jsonl"), *next(more))
    )
    shown = show(folder, follow=True)
    assert "2 nodes ready, 1 of them on the server's machine" in shown
    assert [line[:13] for line in shown if line.startswith("round ")] == ["round 9 of 10", "round 10 of 1"]
    assert f"{folder}: finished" in shown


def test_a_lock_is_seen_from_another_process_and_dies_with_it(tmp_path: Path) -> None:
    file = tmp_path / ".server.lock"
    imports = "from pathlib import Path\nfrom twist_fl.system.locks import locked"
    lines = (imports, f"with locked(Path({str(file)!r})):")
    code = "\n".join((*lines, " print(flush=True); input()"))
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        assert is_locked(file)
        with pytest.raises(BlockingIOError), locked(file):
            pass
        process.kill()
        process.wait()
        assert not is_locked(file)
    with locked(file):
        assert is_locked(file)


# The terminal, or a pipe


class Process:
    """Ends after as many looks as there are batches of events, each written before one."""

    def __init__(self, log: EventLog, *batches: list[dict[str, Any]]) -> None:
        self.log, self.batches = log, list(batches)

    def poll(self) -> int | None:
        write(self.log, *(self.batches.pop(0) if self.batches else []))
        return None if self.batches else 0


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_shows_the_first_and_last_round_every_evaluation_and_all_losses(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LOOK_SECONDS", 0)
    folder = RunFolder(tmp_path)
    out = StringIO()
    console = Console(file=out, force_terminal=terminal, width=200, color_system=None)
    rounds = [round_event(i, dropped={"1": "late"} if i == 3 else {}) for i in range(1, 11)]
    rounds.insert(5, event("eval", round=5, full=61.0))
    process = Process(EventLog(folder.events_file), [BEGUN], [NODES], rounds, [event("done", round=10)], [])
    with RunProgress(console, folder, 3, "starting Flower") as shown:
        ends = shown.follow(process)
    assert [each["event"] for each in ends] == ["done"]
    text = out.getvalue()
    assert "starting Flower" in text
    assert "twist: 10 rounds; each worker (of 2) trains" in text
    assert "round 3: worker 1 did not count: late" in text
    if not terminal:
        assert re.findall(r"^round (\d+)(?: of 10|: perp)", text, re.M) == ["1", "5", "10"]


def test_a_follower_keeps_no_events() -> None:
    assert not [name for name, value in vars(EventReader(Path("none"))).items() if isinstance(value, (list, dict))]

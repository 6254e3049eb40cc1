"""A run's event log: what comes back, what is passed over, and how it is followed."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from math import inf, isnan, nan
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from twist_fl.runs.events import FIELDS, EventLog, EventReader
from twist_fl.system import files


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    return EventLog(tmp_path / "events.jsonl")


def round_fields(round_: int, **fields: Any) -> dict[str, Any]:
    """Of a "round" event, the least that it must have."""
    empty = {"loss": 0.5, "seconds": 1.0, "dropped": {}, "bytes_down": {}, "bytes_up": {}}
    return {"round": round_, **empty, **fields}


def log_round(log: EventLog, round_: int, **fields: Any) -> None:
    log.write("round", **round_fields(round_, **fields))


def timeless(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in event.items() if key != "time"} for event in events]


def test_events_come_back_in_order(log: EventLog) -> None:
    log.write("note", round=0, text="a\nb — c")
    log.write("eval", round=1, full=0.1)
    assert timeless(log.events()) == [
        {"event": "note", "round": 0, "text": "a\nb — c"},
        {"event": "eval", "round": 1, "full": 0.1},
    ]
    assert [event["event"] for event in log.events("eval")] == ["eval"]


def test_every_event_says_when_in_utc(log: EventLog) -> None:
    before = datetime.now(UTC)
    log.write("note")
    log.rewind(0, "note")
    times = [event["time"] for event in log.events()]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time) for time in times)
    first, second = (datetime.fromisoformat(time) for time in times)
    assert before - timedelta(milliseconds=1) <= first <= second <= datetime.now(UTC)


VALUES = st.floats() | st.text() | st.integers() | st.none() | st.booleans()


@given(st.recursive(VALUES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=9))
def test_json_is_valid_for_all_readers_and_comes_back(value: object) -> None:
    """Infinities and not-a-number too, which are no JSON numbers; texts that are their names become them."""
    event = {"event": value}
    assume(not re.search("Infinity|NaN", repr(event)))
    text = files.to_json(event)
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert repr(files.from_json(text)) == repr(event)


def test_what_is_not_finite_comes_back_from_the_log(log: EventLog) -> None:
    log.write("eval", round=1, full=inf, loss=nan, each=[1.5, -inf])
    assert '"full": "Infinity", "loss": "NaN", "each": [1.5, "-Infinity"]' in log.file.read_text()
    (event,) = log.events()
    assert (event["full"], event["each"]) == (inf, [1.5, -inf])
    assert isnan(event["loss"])


def test_a_last_line_that_was_cut_off_is_left_out(log: EventLog) -> None:
    log_round(log, 1)
    first = log.file.stat().st_size
    log_round(log, 2)
    whole = log.file.read_bytes()
    for length in range(first + 1, len(whole) - 1):
        log.file.write_bytes(whole[:length])
        assert [event["round"] for event in log.events()] == [1]
        log.write("failed", error="cut")  # what is written next does not join it
        assert [event["event"] for event in log.events()] == ["round", "failed"]


NO_EVENTS = (b"", b"5", b"null", b"[]", b"{}", b'{"event": 3}', b'"event"', b"\xff\xfe", b"[" * 100_000,
             b'{"event": "x", "round": "1"}', b'{"event": "round", "round": 1}',
             b'{"event": "x", "round": ' + b"9" * 5000 + b"}",
             b'{"event": "x", "a": ' + b'{"a": ' * 100_000)  # fmt: skip


@pytest.mark.parametrize("line", NO_EVENTS, ids=lambda line: repr(line[:32]))
def test_what_is_no_event_is_passed_over(log: EventLog, line: bytes) -> None:
    log_round(log, 1)
    with log.file.open("ab") as file:
        file.write(line + b"\n")
    log_round(log, 2)
    assert [event["round"] for event in log.events()] == [1, 2]
    log.rewind(2, "note")
    assert log.file.read_bytes().count(b"\n") == 3


VALUES_OF = {int: 3, float: 2.5, str: "x", list[int]: [3], list[str]: ["x"], dict[str, str]: {"0": "x"},
             dict[str, int]: {"x": 3}, int | str: "2+6",
             list[dict[str, int | float | str]]: [{"mean": 2.5}]}  # fmt: skip


@pytest.mark.parametrize(("kind", "field"), [(kind, field) for kind, fields in FIELDS.items() for field in fields])
def test_an_event_without_one_of_its_fields_or_with_another_type_is_none(log: EventLog, kind: str, field: str) -> None:
    name, type_ = field.removesuffix("?"), FIELDS[kind][field]
    whole = {key.removesuffix("?"): VALUES_OF[each] for key, each in FIELDS[kind].items()}
    less = {key: value for key, value in whole.items() if key != name}
    log.write(kind, **whole)
    log.write(kind, **less)
    for wrong in (None, {"x": None}, [None], {"x": "y"} if type_ == dict[str, int] else [["x"]]):
        log.write(kind, **whole | {name: wrong})
    assert timeless(log.events()) == [{"event": kind, **each} for each in ([whole, less] if name != field else [whole])]


@pytest.mark.parametrize("time", ["yesterday", 5, None, "2026-11-25T23:28:35"])
def test_a_time_that_is_none_makes_no_event(log: EventLog, time: object) -> None:
    log.file.write_text(json.dumps({"event": "note", "time": time}) + "\n")
    assert log.events() == []


def test_a_listener_hears_every_event_when_it_is_written(log: EventLog) -> None:
    heard: list[dict[str, Any]] = []

    def listener(event: dict[str, Any]) -> None:
        assert log.events()[-1] == event
        heard.append(event)

    log.listeners.append(listener)
    log.write("note", text="a")
    log.rewind(3, "note")
    assert timeless(heard) == [{"event": "note", "text": "a"}, {"event": "note", "round": 3}]


def test_a_reader_follows_the_log_through_half_lines_and_a_rewinding(
    log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, parse = EventReader(log.file), Mock(wraps=json.loads)
    monkeypatch.setattr("twist_fl.system.files.json.loads", parse)
    assert reader.read() == []
    for round_ in (1, 2, 3):
        log_round(log, round_)
        assert [event["round"] for event in reader.read()] == [round_]
    assert parse.call_count == 3  # each line once
    half = json.dumps({"event": "round", **round_fields(4)})
    with log.file.open("a") as file:
        file.write(half[:20])
    assert reader.read() == []
    with log.file.open("a") as file:
        file.write(half[20:] + "\n")
    assert [event["round"] for event in reader.read()] == [4]
    assert not reader.rewound
    log.rewind(2, "note")
    log_round(log, 3, loss=1.5)
    assert reader.read() == log.events()
    assert reader.rewound
    assert reader.read() == []
    assert not reader.rewound


def test_a_reader_begins_anew_where_the_log_was_emptied(log: EventLog) -> None:
    reader = EventReader(log.file)
    log_round(log, 1)
    log_round(log, 2)
    reader.read()
    log.file.write_bytes(b"")
    log_round(log, 1)
    assert [event["round"] for event in reader.read()] == [1]
    assert reader.rewound


def test_rewinding_forgets_what_will_be_written_again(log: EventLog) -> None:
    for round_ in (1, 2, 3):
        log_round(log, round_)
    log.write("failed", error="NoWorkersError: all are gone")
    log.write("ticket", round=2, size=4)
    log.write("done", round=2)
    kept = log.events()[:2]
    log.rewind(2, "note", text="again")
    assert log.events()[:2] == kept  # with their times
    assert timeless(log.events())[2:] == [{"event": "note", "round": 2, "text": "again"}]
    log.rewind(1, "note")
    assert [event["round"] for event in log.events()] == [1, 1]

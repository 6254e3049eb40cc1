"""A run's event log, `events.jsonl`: a line of JSON for each thing that happened, with its time.

Every event has `event` (its kind) and `time` (UTC, ISO 8601, as 2026-11-25T23:28:35.123Z). Whoever shows a run reads
it, while the run goes on and afterwards; nothing here needs torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args, get_origin

from twist_fl.files import from_json, to_json, write_text

Event = dict[str, Any]

_SIZES = dict[str, int]
FIELDS: Mapping[str, Mapping[str, Any]] = {
    "start": {"round": int, "algorithm": str, "num_rounds": int, "num_params": int, "subnet_params": list[int]},
    "nodes": {"nodes": int, "failed": list[str]},
    "round": {"round": int, "loss": float, "seconds": float, "dropped": dict[str, str],
              "bytes_down": _SIZES, "bytes_up": _SIZES},
    "eval": {"round": int, "full": float},
    "ticket": {"size": int},
    "failed": {"error": str},
    "device": {"name": str},
}  # fmt: skip
"""What an event of a kind has at least: a line without it is none. A float may be written as an integer."""
_LAST = ("ticket", "done", "failed")


class EventLog:
    def __init__(self, file: Path) -> None:
        self.file = file

    def write(self, event: str, **fields: Any) -> None:
        """Append one line. A line that a crash cut off before is ended first."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a+b") as file:
            if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) is not None and file.read(1) != b"\n":
                file.write(b"\n")
            file.write(_line(_stamped(event, fields)))

    def events(self, event: str | None = None) -> list[Event]:
        """Events in order; lines cut off by a crash are left out."""
        return [entry for entry in EventReader(self.file).read() if event is None or entry["event"] == event]

    def rewind(self, round_: int, event: str, **fields: Any) -> None:
        """Forget the events after `round_` and how the run ended, which a resumed run writes again; append one, of
        `round_`.

        Both at once: whoever follows the log knows that what stands before the new line is known already.
        """
        kept = [entry for entry in self.events() if entry.get("round", 0) <= round_ and entry["event"] not in _LAST]
        text = b"".join(_line(entry) for entry in (*kept, _stamped(event, {"round": round_, **fields})))
        write_text(text.decode(), self.file)


def _stamped(event: str, fields: Mapping[str, Any]) -> Event:
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {"event": event, "time": now, **fields}


def _line(event: Event) -> bytes:
    return to_json(event).encode() + b"\n"


class EventReader:
    """The events of a run that goes on: a look costs what was added since the one before, and nothing is kept."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._inode = self._offset = 0
        self.rewound = False
        """Whether the last look found another log than the one before: a resumed run's, read from its start."""

    def read(self) -> list[Event]:
        """Whole events that the look before has not seen, in order."""
        self.rewound = False
        if not self._file.exists():
            return []
        with self._file.open("rb") as file:
            about = os.fstat(file.fileno())
            if about.st_ino != self._inode or about.st_size < self._offset:
                self.rewound = self._inode != 0
                self._inode, self._offset = about.st_ino, 0
            file.seek(self._offset)
            whole, end, _ = file.read().rpartition(b"\n")  # the last line may be half written
        self._offset += len(whole) + len(end)
        return [event for line in whole.split(b"\n") if (event := _parse(line)) is not None]


def _parse(line: bytes) -> Event | None:
    """The event of a line; None for what is none: cut off by a crash, or written by somebody else."""
    with suppress(ValueError, RecursionError):  # no UTF-8, no JSON, a number of 5,000 digits; nested too deep
        entry = from_json(line)
        if isinstance(entry, dict) and isinstance(kind := entry.get("event"), str):
            wanted = {"round": int} if "round" in entry else {}
            wanted |= FIELDS.get(kind, {})
            return entry if all(_is(entry.get(key), type_) for key, type_ in wanted.items()) else None
    return None


def _is(value: Any, wanted: Any) -> bool:
    """Whether `value` is a `wanted`: int, float, str, or a list or dictionary of one of them."""
    if (container := get_origin(wanted)) is None:
        return isinstance(value, (int, float) if wanted is float else wanted)
    inner = get_args(wanted)[-1]
    return isinstance(value, container) and all(
        _is(each, inner) for each in (value.values() if container is dict else value)
    )

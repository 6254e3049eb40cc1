"""A run's event log, `events.jsonl`: a line of JSON for each thing that happened, with its time.

Every event has `event` (its kind) and `time` (UTC, ISO 8601, as 2026-11-25T23:28:35.123Z). Whoever shows a run reads
it, while the run goes on and afterwards; nothing here needs torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from twist_fl.system.files import from_json, new_file, to_json

Event = dict[str, Any]

_SIZES = dict[str, int]
FIELDS: Mapping[str, Mapping[str, Any]] = {
    "start": {"round": int, "algorithm": str, "num_rounds": int, "num_params": int, "subnet_params": list[int],
              "workers?": int},
    "waiting": {"nodes": int, "wanted": int},
    "asked": {"nodes": int, "wanted": int},
    "nodes": {"nodes": int, "failed": list[str], "gone?": list[int], "new?": list[int], "shared_memory?": int,
              "flight?": int, "fallbacks?": list[str], "windows?": _SIZES, "texts?": dict[str, str],
              "notes?": dict[str, str]},
    "round": {"round": int, "loss": float, "seconds": float, "dropped": dict[str, str], "notes?": dict[str, str],
              "bytes_down": _SIZES, "bytes_up": _SIZES, "bytes_via?": _SIZES},
    "evaluating": {"round": int},
    "eval": {"round": int, "full": float, "subnets?": float},
    "federated": {"round": int, "of": str, "answered": list[int], "dropped": dict[str, str], "loss?": float,
                  "perplexity?": float, "bytes_down": _SIZES, "bytes_up": _SIZES},
    "ticket": {"size": int | str},
    "results": {"full?": float, "tickets": list[dict[str, int | float | str]], "lost_replies?": int,
                "federated?": float},
    "failed": {"error": str},
    "device": {"name": str},
    "tracker": {"name": str, "error": str},
}  # fmt: skip
"""What an event of a kind has, or with a question mark may have, if a line is to be one. A float may be an integer."""
_LAST = ("ticket", "results", "done", "failed")


class EventLog:
    def __init__(self, file: Path) -> None:
        self.file = file
        self.listeners: list[Callable[[Event], None]] = []
        """Each is called with every event, once it has been written."""

    def write(self, event: str, **fields: Any) -> None:
        """Append one line. A line that a crash cut off before is ended first."""
        new = _stamped(event, fields)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a+b") as file:
            if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) is not None and file.read(1) != b"\n":
                file.write(b"\n")
            file.write(_line(new))
        self._tell(new)

    def events(self, event: str | None = None) -> list[Event]:
        """Events in order; lines cut off by a crash are left out."""
        return [entry for entry in self._each() if event is None or entry["event"] == event]

    def _each(self) -> Iterator[Event]:
        """One at a time: the log of a long run is longer than what a server should hold."""
        if self.file.exists():
            with self.file.open("rb") as lines:
                yield from (found for line in lines if line.endswith(b"\n") and (found := _parse(line)) is not None)

    def rewind(self, round_: int, event: str, **fields: Any) -> None:
        """Forget the events after `round_` and how the run ended, which a resumed run writes again; append one, of
        `round_`.

        Both at once: whoever follows the log knows that what stands before the new line is known already.
        """
        new = _stamped(event, {"round": round_, **fields})
        with new_file(self.file) as making, making.open("wb") as file:
            for entry in self._each():
                if entry.get("round", 0) <= round_ and entry["event"] not in _LAST:
                    file.write(_line(entry))
            file.write(_line(new))
        self._tell(new)

    def _tell(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)


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
        if isinstance(entry, dict) and _is(entry.get("event"), str):
            wanted = {"round?": int, "time?": str, **FIELDS.get(entry["event"], {})}
            timed = "time" not in entry or datetime.fromisoformat(str(entry["time"])).tzinfo
            return entry if timed and all(_has(entry, *field) for field in wanted.items()) else None
    return None


def _has(entry: Event, field: str, wanted: Any) -> bool:
    name = field.removesuffix("?")
    return (name != field and name not in entry) or _is(entry.get(name), wanted)


def _is(value: Any, wanted: Any) -> bool:
    """Whether `value` is a `wanted`: int, float, str, or a list or dictionary of one of them."""
    if (container := get_origin(wanted)) in (None, UnionType):
        return isinstance(value, (int, float) if wanted is float else wanted)
    inner = get_args(wanted)[-1]
    return isinstance(value, container) and all(
        _is(each, inner) for each in (value.values() if container is dict else value)
    )

"""Reading what other machines and files say: it is as expected, or a ValueError names what is not."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

MOST_CHARACTERS = 2**24
"""Of a text with JSON; the longest honest one, a job with a model's config, has a hundredth of it."""
_MOST_INT = 2**63
_MOST_SHOWN = 300


@dataclass(frozen=True)
class Field:
    """What a field of a message must be. A number with a least value is finite, too; no int has more than 64 bits."""

    kind: type[Any]
    least: float | None = None
    or_null: bool = False

    def holds(self, value: Any) -> bool:
        if value is None and self.or_null:
            return True
        if type(value) is not self.kind:  # true is no number
            return False
        if self.kind is int and abs(value) >= _MOST_INT:
            return False
        return self.least is None or (value >= self.least and isfinite(value))

    def __str__(self) -> str:
        least = "" if self.least is None else f" of at least {self.least}"
        return f"{self.kind.__name__}{least}{' or null' * self.or_null}"


def read_json(text: str | bytes) -> Any:
    """Raises ValueError for whatever is not JSON of a length and depth that a message may have."""
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{len(text)} characters of JSON: more than {MOST_CHARACTERS}")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def read_fields(text: str | bytes, fields: Mapping[str, Field]) -> dict[str, Any]:
    """The object in `text`, which has these fields. Raises ValueError."""
    found = read_json(text)
    if not isinstance(found, dict):
        raise ValueError(f"{shown(found)} is no JSON object")
    for name, field in fields.items():
        if name not in found:
            raise ValueError(f"{name} is missing")
        if not field.holds(found[name]):
            raise ValueError(f"{name}={shown(found[name])} is no {field}")
    return found


def read_exactly(text: str | bytes, fields: Mapping[str, Field]) -> dict[str, Any]:
    """As `read_fields`, and no others."""
    found = read_fields(text, fields)
    if unknown := sorted(found.keys() - fields.keys()):
        raise ValueError(f"unknown field {shown(unknown[0])}")
    return found


def shown(value: Any) -> str:
    """Any value from outside in a few characters."""
    return reprlib.repr(value)


def plain(text: str, most: int = _MOST_SHOWN) -> str:
    """Words from outside in one line for a log or a terminal: no control characters, and not too long."""
    line = "".join(letter if letter.isprintable() else " " for letter in text[: most + 1])
    return line if len(line) <= most else line[: most - 3] + "..."

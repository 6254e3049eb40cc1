"""A setting's value from what a person wrote: by the setting's type, not by YAML's rules for words.

So `name=1` and `name=on` are names, `seed=010` is ten, `6.0` and `1e3` are whole numbers, and a minus sign pasted from
a PDF is one.
"""

from __future__ import annotations

import re
import types
from dataclasses import is_dataclass
from math import inf, isfinite
from typing import Any, Literal, Union, get_args, get_origin

from twist_fl.config.checks import shown
from twist_fl.config.shares import DASHES, Size, normal_size
from twist_fl.config.suggest import choice
from twist_fl.system.errors import ConfigError

_BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NULLS = ("null", "none", "~")


def plain_hint(hint: Any) -> tuple[Any, bool]:
    """The type without its `| None`, and whether it had one."""
    if hint != Size and get_origin(hint) in (Union, types.UnionType):
        return next(arm for arm in get_args(hint) if arm is not type(None)), True
    return hint, False


def item_schema(hint: Any) -> Any:
    """The dataclass of a list's items, if they are any."""
    inner = get_args(plain_hint(hint)[0])
    return inner[0] if inner and is_dataclass(inner[0]) else None


def convert(key: str, value: Any, hint: Any, default: Any) -> Any:
    """`value`, text or already of a type, as the setting `key` of type `hint` holds it. Raises ConfigError."""
    kind, optional = plain_hint(hint)
    if isinstance(value, str) and "${" in value:
        return value  # another setting's value: filled in when all are known
    if get_origin(kind) is Literal and value in get_args(kind):
        return value
    if value is None or (isinstance(value, str) and value.strip().lower() in _NULLS):
        if optional:
            return None
        raise ConfigError(f"{key}={value or 'null'} must be {_words(kind)}{_example(default)}")
    if isinstance(value, str) and not value.strip():
        hole = "null for none" if optional else f"{_words(kind)}{_example(default)}"
        raise ConfigError(f"{key}= has no value: write {hole}, or leave it out")
    if get_origin(kind) is Literal:
        return _one_of(key, value, list(get_args(kind)))
    if get_origin(kind) is list:
        return _list(key, value)
    return {bool: _bool, int: _int, float: _float, str: _str, Size: _size}[kind](key, value, _example(default))


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is list:
        return "a size, or several as 6,3"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", Size: "a size"}
    return words[kind]


def _example(default: Any) -> str:
    return "" if default is None or isinstance(default, (bool, list)) else f", for example {default}"


def _one_of(key: str, value: Any, choices: list[str]) -> str:
    word = str(value).lower() if isinstance(value, bool) else str(value)  # train.variant: true is YAML's for yes
    if word not in choices:
        raise ConfigError(f"{key}={word!r} must be one of {', '.join(choices)}{choice(word, choices)}")
    return word


def _bool(key: str, value: Any, example: str) -> bool:
    found = value if isinstance(value, bool) else _BOOLS.get(str(value).strip().lower())
    if found is None:
        raise ConfigError(f"{key}={shown(value)} must be true or false")
    return found


def _number(value: Any) -> float | None:
    """Whole numbers exactly, of any size."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if not isinstance(value, str):
        return value
    text = value.strip().translate(DASHES)
    for read in (int, float):
        try:
            return read(text)
        except ValueError:  # of int, also for more than 4,300 digits: it is infinite as a float
            continue
    return None


def _float(key: str, value: Any, example: str) -> float:
    number = _number(value)
    if number is None:
        point = str(value).replace(",", ".")
        hint = f": use {point}" if "," in str(value) and _number(point) is not None else example
        raise ConfigError(f"{key}={shown(value)} must be a number{hint}")
    try:
        return float(number)
    except OverflowError:
        return inf if number > 0 else -inf


def _int(key: str, value: Any, example: str) -> int:
    number = _number(value)
    if number is None:
        thousands = re.sub(r"[,_ ]", "", str(value))
        hint = f": use {thousands}" if thousands.isdecimal() else example
        raise ConfigError(f"{key}={shown(value)} must be a whole number{hint}")
    if isinstance(number, float):
        if not isfinite(number):
            raise ConfigError(f"{key}={value} must be a whole number{example}")
        if number != int(number):
            near = f": use {int(number)} or {int(number) + 1}" if number > 0 else example
            raise ConfigError(f"{key}={value} must be a whole number{near}")
    return int(number)


def _str(key: str, value: Any, example: str) -> str:
    if isinstance(value, (bool, dict, list)):
        raise ConfigError(f"{key}={value} must be text: YAML reads on, yes, [ and {{ as its own, put it in quotes")
    text = str(value)
    if control := next((letter for letter in text if ord(letter) < 32), None):
        raise ConfigError(f"{key}={text!r} holds {control!r}, which is no letter of a name or path: take it out")
    return text


def _size(key: str, value: Any, example: str) -> Size:
    return normal_size(key, value)


def _list(key: str, value: Any) -> list[Size]:
    """Of 6, "6,3", "[6, 3]" or a list."""
    items = split_list(key, value) if isinstance(value, str) else value if isinstance(value, list) else [value]
    return [normal_size(f"{key}[{i}]" if len(items) > 1 else key, item) for i, item in enumerate(items)]


def split_list(key: str, text: str) -> list[str]:
    """The items of 6,3 or [6, 3]; one comma at the end is none. Raises ConfigError for a hole."""
    bare, sign = text.strip(), " " if key.startswith("--") else "="
    if (bare[:1], bare[-1:]) in (("[", "]"), ("(", ")")):
        bare = bare[1:-1].strip()
    elif bare.startswith(("[", "(")) or bare.endswith(("]", ")")):
        raise ConfigError(f"{key}{sign}{text} has one bracket of two: write 6 or 6,3")
    if not bare:
        return []
    items = re.split(r"\s*[,;]\s*|\s+", bare.removesuffix(",").strip())
    if "" in items:
        raise ConfigError(f"{key}{sign}{text} has an empty place: write {','.join(filter(None, items)) or '6,3'}")
    return items

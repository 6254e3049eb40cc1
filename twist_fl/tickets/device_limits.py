"""What an edge device allows, as it is typed: phone=3.5MB,20ms,1/4,512tokens,bfloat16."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, get_args

from twist_fl.config.checks import check_device, check_name, shown
from twist_fl.config.devices import DeviceConfig, TicketDtype
from twist_fl.config.shares import amount_of
from twist_fl.system.errors import ConfigError

_NUMBER = r"(?P<number>\d+\.?\d*|\.\d+)"
_MEMORY = re.compile(rf"{_NUMBER}\s*(?P<unit>[kmgt]?i?b)", re.IGNORECASE)
_TIME = re.compile(rf"{_NUMBER}\s*(?P<unit>ms|s)(?:/(?P<of>token|prompt))?", re.IGNORECASE)
_CONTEXT = re.compile(r"(\d+)\s*tok(?:en)?s?", re.IGNORECASE)
_PREFIXES = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_FORMS = (
    "limits are memory as 3.5MB, 500kB or 2GiB, time a token as 20ms or 0.5s, to read a prompt as 300ms/prompt, and a "
    "share of the blocks as 1/4 or 25%; beside them its context as 512tokens, and float32, bfloat16 or float16"
)


def parse_devices(words: Iterable[str]) -> list[DeviceConfig]:
    """`NAME=LIMIT[,LIMIT...]`; a number of 1 or more without a unit is MB, of 10^6 bytes.

    A name becomes the name of a folder. Raises ConfigError.
    """
    devices: list[DeviceConfig] = []
    for word in words:
        name, equals, limits = word.partition("=")
        if not equals or not name.strip() or not limits.strip():
            raise ConfigError(f"device {shown(word)} is not NAME=LIMIT, for example phone=3.5MB,20ms: {_FORMS}")
        check_name("device", name.strip())
        given = [_limit(word, limit.strip()) for limit in limits.split(",")]
        if len(dict(given)) < len(given):
            raise ConfigError(f"device {shown(word)} has two limits of one kind: give the lower")
        if name.strip() in {device.name for device in devices}:
            raise ConfigError(f"device {name.strip()!r} is given twice: give each its own name")
        devices.append(DeviceConfig(name.strip(), **dict(given)))
        check_device(devices[-1])
    return devices


def _limit(word: str, limit: str) -> tuple[str, Any]:
    """The setting of DeviceConfig that a limit is, and its value."""
    if found := _MEMORY.fullmatch(limit):
        unit = found["unit"].lower().removesuffix("b")
        base = 1024 if unit.endswith("i") else 1000
        return "memory_mb", float(found["number"]) * base ** _PREFIXES[unit.removesuffix("i")] / 1e6
    if found := _TIME.fullmatch(limit):
        key = "prompt_ms" if (found["of"] or "").lower() == "prompt" else "latency_ms"
        return key, float(found["number"]) * (1 if found["unit"].lower() == "ms" else 1000)
    if found := _CONTEXT.fullmatch(limit):
        return "context", int(found[1])
    if limit.lower() in get_args(TicketDtype):
        return "dtype", limit.lower()
    if ("/" in limit or limit.endswith("%")) and (amount := amount_of(limit)) is not None:
        return "kappa", float(amount.number)
    if re.fullmatch(_NUMBER, limit):
        if float(limit) < 1:
            raise ConfigError(
                f"device {shown(word)}: is {limit} memory or a share of the blocks? Write {limit}MB or "
                f"{100 * float(limit):g}%"
            )
        return "memory_mb", float(limit)
    raise ConfigError(f"device {shown(word)}: {limit!r} is no limit; {_FORMS}")

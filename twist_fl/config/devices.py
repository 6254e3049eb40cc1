"""Settings of deployment: the devices that tickets are shipped to, and what they measure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

TicketDtype = Literal["float32", "bfloat16", "float16"]


@dataclass
class DeviceConfig:
    """An edge device, which gets the largest ticket that meets all limits given: of memory, of time, or of blocks."""

    name: str = "device"
    memory_mb: float | None = None
    """Memory for the model, in MB of 10^6 bytes: weights, and the KV cache of `context`."""
    latency_ms: float | None = None
    """Milliseconds a token, as the device itself measures them with the ticket."""
    kappa: float | None = None
    """At most this share of a divided layer's blocks, in (0, 1]."""
    prompt_ms: float | None = None
    """Milliseconds to read a prompt that, with `deploy.new_tokens`, fills `context`, as the device itself measures."""
    context: int | None = None
    """Tokens that it will ever hold at a time; null: as many as the model can."""
    dtype: TicketDtype = "float32"
    """Of the weights that it gets and of its KV cache."""


@dataclass
class DeployConfig:
    devices: list[DeviceConfig] = field(default_factory=list)
    """What `twist-fl deploy` serves if it is given none: [{name: phone, memory_mb: 2, latency_ms: 20}]."""
    at_once: int = 1
    """Devices that are served at a time: more than one where each is a machine of its own, for else they slow each
    other down while they measure."""
    new_tokens: int = 32
    """Tokens generated to measure latency."""
    windows: int = 64
    """Windows of its own test text that a device measures perplexity on, at most."""

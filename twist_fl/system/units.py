"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def human_bytes(size: float) -> str:
    """Bytes in decimal units: 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def duration_text(seconds: float) -> str:
    """12.3 s, 4 min 5 s or 3 h 7 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def perplexity_text(value: float) -> str:
    """Two decimals, and none from 1000 on."""
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def size_label(ticket: Mapping[str, Any]) -> str:
    """6/12, or where attention and the FFN differ, 2/3+6/12."""
    held, of = (str(ticket[key]).split("+") for key in ("size", "of"))
    return "+".join(map("/".join, zip(held, of, strict=True)))


def count(number: int, what: str) -> str:
    """1 node, 2 nodes; 1 reply, 2 replies."""
    return f"{number:,} {what if number == 1 else what[:-1] + 'ies' if what.endswith('y') else what + 's'}"

"""A size as a person writes it: 6 blocks, a share (1/2, 50%, 0.5), or attention and the FFN apart (3+6, 1/3+1/2)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from twist_fl.system.errors import ConfigError

DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d", "-"))
"""A minus sign is often a dash in what is pasted from a page."""
Size = int | str
"""As a configuration holds it: a number of blocks, or text that `read_size` takes."""


@dataclass(frozen=True)
class Amount:
    """Of the blocks of one layer: a number of them, or a share of all."""

    number: Fraction
    is_share: bool

    def share(self, blocks: int) -> Fraction:
        return self.number if self.is_share else self.number / blocks


def read_size(key: str, item: Any) -> tuple[Amount, ...]:
    """One amount for all kinds of blocks, or two, attention's and the FFN's. Raises ConfigError for what is no size."""
    parts = str(item).split("+")
    amounts = [] if isinstance(item, bool) else [found for part in parts if (found := amount_of(part)) is not None]
    if len(amounts) != len(parts) or len(parts) > 2:
        joined = " " if key.startswith("--") else "="
        raise ConfigError(
            f"{key}{joined}{item} must be a number of blocks (6), a share of a layer (1/2, 50%), or both for "
            "attention+FFN (3+6, 1/3+1/2); several as 6,3"
        )
    return tuple(amounts)


def normal_size(key: str, item: Any) -> Size:
    """The size as a configuration holds it. Raises ConfigError."""
    amounts = read_size(key, item)
    if len(amounts) == 1 and not amounts[0].is_share:
        return int(amounts[0].number)
    return "+".join(str(amount.number) if not amount.is_share else _share_text(amount.number) for amount in amounts)


def _share_text(share: Fraction) -> str:
    """1 is 1/1, which the number of blocks is not."""
    return f"{share.numerator}/{share.denominator}"


def amount_of(text: str) -> Amount | None:
    """6 as a number; 0.5, .5, 50% and 1/2 as shares; None for what is neither."""
    text = text.strip().translate(DASHES)
    percent = text.endswith("%")
    try:
        number = Fraction(text.removesuffix("%").strip())
    except (ValueError, ZeroDivisionError):
        return None
    number = number / 100 if percent else number
    is_share = percent or "/" in text or 0 < number < 1
    return Amount(number, is_share) if is_share or number.denominator == 1 else None

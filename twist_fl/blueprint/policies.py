"""Which blocks each worker holds in one layer of one round: Algorithm 1 (paper, section 3.1), and what others do.

A policy is a function of a `Deal` that gives one row of sorted block ids per worker; `plugins.POLICY` names them all.
What is random in a row comes from the deal's generator alone. numpy only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from operator import index
from typing import Any

import numpy as np

from twist_fl.system.errors import ConfigError
from twist_fl.system.plugins import POLICY

Row = tuple[int, ...]


@dataclass(frozen=True)
class Deal:
    """One kind of blocks in one layer of one round: worker s gets `num_sub[s]` of `num_full`, `common` among them."""

    num_full: int
    num_sub: Sequence[int]
    common: Sequence[int]
    round: int
    rng: np.random.Generator
    owed: Sequence[int] = ()
    """Blocks whose holders all failed in the round before."""

    @property
    def order(self) -> list[int]:
        """All blocks in a fixed order, the common ones first."""
        return [*self.common, *(block for block in range(self.num_full) if block not in set(self.common))]


def algorithm_1(
    num_full: int,
    num_sub: Sequence[int],
    common: Sequence[int],
    rng: np.random.Generator,
    first: Iterable[int] = (),
) -> list[Row]:
    """Draw each worker's blocks of one layer: sorted, distinct, N_sub_s of them, every block held by someone.

    As Algorithm 1, with the remaining blocks shuffled before they are dealt round-robin (otherwise block b
    would always go to worker b mod S), from a random worker on (otherwise what is owed would always go to the
    first), and with N_sub_s of each worker's own. The blocks in `first` (coverage debt) lead both the deal and
    the top-up, so that they go out twice where there is room.
    """
    owed = set(first) - set(common)
    shuffled = [int(block) for block in rng.permutation(num_full) if block not in set(common)]
    shuffled.sort(key=lambda block: block not in owed)
    rows = [list(common) for _ in num_sub]
    worker = int(rng.integers(len(rows)))
    for block in shuffled:
        while len(rows[worker]) >= num_sub[worker]:  # unequal workers: the deal passes over the full ones
            worker = (worker + 1) % len(rows)
        rows[worker].append(block)
        worker = (worker + 1) % len(rows)
    for row, size in zip(rows, num_sub, strict=True):
        others = [int(block) for block in rng.permutation(num_full) if block not in row]
        others.sort(key=lambda block: block not in owed)
        row.extend(others[: size - len(row)])
    return [tuple(sorted(row)) for row in rows]


def random_rows(deal: Deal) -> list[Row]:
    """TwIST: Algorithm 1, drawn anew every round."""
    return algorithm_1(deal.num_full, deal.num_sub, deal.common, deal.rng, deal.owed)


def rolling_rows(deal: Deal) -> list[Row]:
    """FedRolex (arXiv 2212.01548): a window over the blocks that moves on by one every round and wraps.

    Worker s's window begins where that of worker s - 1 ends, so that a round covers all blocks if it has the places.
    Over `num_full` rounds, each worker holds each block equally often.
    """
    ring = deal.order[len(deal.common) :]
    start, rows = deal.round - 1, []
    for size in deal.num_sub:
        width = size - len(deal.common)
        rows.append(tuple(sorted([*deal.common, *(ring[(start + i) % len(ring)] for i in range(width))])))
        start += width
    return rows


def ordered_rows(deal: Deal) -> list[Row]:
    """HeteroFL, FjORD, Matryoshka: nested subnets, each worker the first N_sub blocks. What is beyond the largest
    worker is never trained."""
    return [tuple(sorted(deal.order[:size])) for size in deal.num_sub]


@dataclass(frozen=True)
class Policy:
    """What `blueprint.policy` names. A function of a deal alone is one that promises nothing."""

    rows: Callable[[Deal], Sequence[Sequence[int]]]
    covers: bool = False
    """It needs places for all blocks in every round: the constraint of section 3.1."""
    still: bool = False
    """The first round's draw, for good."""

    def __call__(self, deal: Deal) -> list[Row]:
        """Raises ConfigError for rows that are none: see `_checked`."""
        return _checked(deal, self.rows(deal), self.rows)


RANDOM = Policy(random_rows, covers=True)
STATIC = Policy(random_rows, covers=True, still=True)
ROLLING = Policy(rolling_rows)
ORDERED = Policy(ordered_rows)


@cache
def policy_of(name: str) -> Policy:
    """Raises ConfigError if it cannot be had here."""
    found = POLICY.find(name)
    return found if isinstance(found, Policy) else Policy(found)


def _checked(deal: Deal, rows: Any, function: Callable[..., Any]) -> list[Row]:
    """Raises ConfigError unless there is a row of num_sub[s] sorted block ids for each worker, the common in it."""
    name, workers = getattr(function, "__name__", str(function)), len(deal.num_sub)
    try:
        found = [tuple(map(index, row)) for row in rows]
    except TypeError as error:
        raise ConfigError(f"the policy {name} must give a row of block ids for each worker: {error}") from error
    if len(found) != workers:
        raise ConfigError(f"the policy {name} gave {len(found)} rows for {workers} workers")
    for worker, (row, size) in enumerate(zip(found, deal.num_sub, strict=True)):
        what = f"the policy {name} gave worker {worker} the blocks {list(row)}"
        if len(row) != size:
            raise ConfigError(f"{what}, and its num_sub is {size}")
        if list(row) != sorted(set(row) & set(range(deal.num_full))):
            raise ConfigError(f"{what}: they must be distinct, ascending, and from 0 to {deal.num_full - 1}")
        if left := sorted(set(deal.common) - set(row)):
            raise ConfigError(f"{what}: the common blocks {left} must be among them")
    return found

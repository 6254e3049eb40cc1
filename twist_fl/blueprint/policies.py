"""Which blocks each worker holds in one layer of one round: Algorithm 1 (paper, section 3.1), and what others do.

A policy is a function of a `Deal` that gives one row of sorted block ids per worker; `POLICIES` names them all.
What is random in a row comes from the deal's generator alone. numpy only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

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


POLICIES: dict[str, Callable[[Deal], list[Row]]] = {
    "random": random_rows,
    "static": random_rows,  # the first round's draw, for good
    "importance": random_rows,  # with common blocks chosen by their score
    "rolling": rolling_rows,
    "ordered": ordered_rows,
}
EVERY_BLOCK_EVERY_ROUND = frozenset({"random", "static", "importance"})
"""Policies that need places for all blocks in every round: the constraint of section 3.1."""

"""Blueprints: the blocks one worker holds, and how they are drawn (paper, section 3.1, Algorithm 1).

Randomness is a pure function of its coordinates (seed, purpose, round, layer, kind): the same blueprint
can be derived again anywhere, in any process, after any restart. numpy only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Literal

import numpy as np

from twist_fl.blocks import KINDS, Kind, Layout

Setting = Literal["attn", "ffn", "both"]
Scale = Literal["sqrt", "linear", "none"]
Debt = frozenset[tuple[Kind, int, int]]
"""Blocks (kind, layer, id) whose holders all failed: they are dealt first in the next round."""

_TRAIN, _TICKET = 0, 1


@dataclass(frozen=True)
class Blueprint:
    """The sorted block ids held per layer, of `num_blocks` = (heads, FFN blocks) in a full layer."""

    num_blocks: tuple[int, int]
    attn: tuple[tuple[int, ...], ...]
    ffn: tuple[tuple[int, ...], ...]

    def held(self, kind: Kind, layer: int) -> tuple[int, ...]:
        return (self.attn if kind == "attn" else self.ffn)[layer]

    def factor(self, kind: Kind, layer: int, scale: Scale) -> float:
        """What the sum over the held blocks is multiplied by (Theorems A.6 and A.10)."""
        ratio = self.num_blocks[KINDS.index(kind)] / len(self.held(kind, layer))
        return {"sqrt": sqrt(ratio), "linear": ratio, "none": 1.0}[scale]

    @cached_property
    def shape(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Blocks held per layer, (heads, FFN blocks): equal shapes can share one physical model."""
        return tuple(map(len, self.attn)), tuple(map(len, self.ffn))

    @cached_property
    def is_full(self) -> bool:
        return all(set(self.shape[kind]) == {self.num_blocks[kind]} for kind in range(len(KINDS)))

    def to_json(self) -> str:
        fields = {"num_blocks": self.num_blocks, "attn": self.attn, "ffn": self.ffn}
        return json.dumps(fields, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Blueprint:
        fields = json.loads(text)
        heads, ffn_blocks = fields["num_blocks"]
        return Blueprint(
            (heads, ffn_blocks),
            tuple(tuple(held) for held in fields["attn"]),
            tuple(tuple(held) for held in fields["ffn"]),
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the blueprint: equal-sized slices of different blocks are told apart by it alone."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def full_blueprint(layout: Layout) -> Blueprint:
    """Every block of every layer: FedAvg is TwIST with this blueprint for all."""
    heads, ffn_blocks = layout.num_blocks
    return Blueprint(
        layout.num_blocks,
        (tuple(range(heads)),) * layout.num_layers,
        (tuple(range(ffn_blocks)),) * layout.num_layers,
    )


@dataclass(frozen=True)
class Division:
    """What is divided and how much each worker holds.

    `num_sub[s]` is worker s's (heads, FFN blocks) per divided layer; a kind that `setting` leaves out is
    held whole, and so are the first `undivided_first` and the last `undivided_last` layers. `common` (C)
    are block ids that every worker holds.
    """

    setting: Setting
    num_sub: tuple[tuple[int, int], ...]
    undivided_first: int = 2
    undivided_last: int = 2
    common: tuple[int, ...] = ()

    def divides(self, kind: Kind) -> bool:
        return self.setting in (kind, "both")

    def layers(self, num_layers: int) -> range:
        return range(self.undivided_first, num_layers - self.undivided_last)

    def check(self, layout: Layout, coverage: bool = True) -> None:
        """Raises ValueError for layers or common blocks that do not exist, and as `_check_coverage` if asked to."""
        if not self.layers(layout.num_layers):
            raise ValueError(
                f"blueprint.undivided_first={self.undivided_first} and undivided_last={self.undivided_last} leave "
                f"none of the {layout.num_layers} layers to divide: make their sum at most {layout.num_layers - 1}"
            )
        common = len(self.common)
        for i, kind in enumerate(KINDS):
            num_full = layout.num_blocks[i]
            if not self.divides(kind):
                continue
            if len(set(self.common)) != common or any(not 0 <= block < num_full for block in self.common):
                raise ValueError(
                    f"blueprint.common={list(self.common)} must be distinct block ids from 0 to {num_full - 1}"
                )
            if coverage:
                self._check_coverage(kind, num_full, [worker[i] for worker in self.num_sub])

    def _check_coverage(self, kind: Kind, num_full: int, num_sub: list[int]) -> None:
        """Raises ValueError, naming the smallest legal N_sub, if some block could go untrained (section 3.1)."""
        num_workers, common = len(num_sub), len(self.common)
        smallest = max(common, 1, -(-(num_full + (num_workers - 1) * common) // num_workers))
        key = "num_sub" if kind == "attn" else "num_sub_ffn or num_sub"
        what = f"blueprint.{key}={num_sub if len(set(num_sub)) > 1 else num_sub[0]} ({kind})"
        if max(num_sub) > num_full:
            raise ValueError(f"{what} is more than the {num_full} blocks of a layer: use at most {num_full}")
        if min(num_sub) < max(common, 1):
            raise ValueError(f"{what} is below {max(common, 1)}, the blocks every worker must hold")
        if sum(n - common for n in num_sub) < num_full - common:
            raise ValueError(
                f"{what}: {num_workers} workers with {common} common blocks cannot cover all {num_full} blocks; "
                f"the smallest legal N_sub for all is {smallest}"
            )


def _generator(*coordinates: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(coordinates)))


def algorithm_1(
    num_full: int,
    num_sub: Sequence[int],
    common: Sequence[int],
    rng: np.random.Generator,
    first: Iterable[int] = (),
) -> list[tuple[int, ...]]:
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


def draw_round(layout: Layout, division: Division, seed: int, round_: int, debt: Debt = frozenset()) -> list[Blueprint]:
    """One blueprint per worker for a training round; layers and kinds are drawn independently."""
    full = full_blueprint(layout)
    rows = {kind: [list(full.attn if kind == "attn" else full.ffn) for _ in division.num_sub] for kind in KINDS}
    for i, kind in enumerate(KINDS):
        if not division.divides(kind):
            continue
        for layer in division.layers(layout.num_layers):
            owed = sorted(block for k, la, block in debt if (k, la) == (kind, layer))
            rng = _generator(seed, _TRAIN, round_, layer, i)
            num_sub = [worker[i] for worker in division.num_sub]
            drawn = algorithm_1(layout.num_blocks[i], num_sub, division.common, rng, owed)
            for worker, held in enumerate(drawn):
                rows[kind][worker][layer] = held
    return [
        Blueprint(layout.num_blocks, tuple(attn), tuple(ffn))
        for attn, ffn in zip(rows["attn"], rows["ffn"], strict=True)
    ]


def draw_ticket(layout: Layout, division: Division, num_sub: tuple[int, int], seed: int, draw: int) -> Blueprint:
    """A random subnet for deployment, `num_sub` = (heads, FFN blocks) per divided layer: no coverage constraint.

    As in training, the common blocks are in it (of a ticket smaller than C, a random part of C is all).

    Raises ValueError if a size is not between 1 and the blocks of a layer.
    """
    full = full_blueprint(layout)
    rows = {"attn": list(full.attn), "ffn": list(full.ffn)}
    for i, kind in enumerate(KINDS):
        num_full = layout.num_blocks[i]
        if not 1 <= num_sub[i] <= num_full:
            raise ValueError(f"a ticket of {num_sub[i]} {kind} blocks is impossible: choose 1 to {num_full}")
        if not division.divides(kind):
            continue
        for layer in division.layers(layout.num_layers):
            rng = _generator(seed, _TICKET, draw, layer, i)
            blocks = [int(block) for block in rng.permutation(num_full)]
            blocks.sort(key=lambda block: block not in division.common)
            rows[kind][layer] = tuple(sorted(blocks[: num_sub[i]]))
    return Blueprint(layout.num_blocks, tuple(rows["attn"]), tuple(rows["ffn"]))

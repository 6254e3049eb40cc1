"""Blueprints: the blocks one worker holds, and how they are drawn (paper, section 3.1; `policies.py`).

Randomness is a pure function of its coordinates (seed, purpose, round, layer, kind): the same blueprint
can be derived again anywhere, in any process, after any restart. numpy only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Literal

import numpy as np

from twist_fl.blocks import KINDS, Kind, Layout, Param
from twist_fl.outside import Field, read_exactly, shown
from twist_fl.policies import EVERY_BLOCK_EVERY_ROUND, POLICIES, Deal

Setting = Literal["attn", "ffn", "both"]
Scale = Literal["sqrt", "linear", "none"]
Policy = Literal["random", "rolling", "ordered", "static", "importance"]
TicketPolicy = Literal["random", "ordered", "importance"]
Assign = Literal["fixed", "shuffled", "drawn"]
Sizes = tuple[tuple[int, int], ...]
"""(heads, FFN blocks) per divided layer, of each worker."""
Scores = Mapping[tuple[Kind, int], tuple[float, ...]]
"""The importance of each block of a (kind, layer): higher is more."""
Debt = frozenset[tuple[Kind, int, int]]
"""Blocks (kind, layer, id) whose holders all failed: they are dealt first in the next round."""

_TRAIN, _TICKET, _SIZES = 0, 1, 2
_BLOCKS = Field(int, 1)


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
        """Raises ValueError unless `text` is a blueprint: in every layer some of its blocks, each once, in order."""
        fields = read_exactly(text, dict.fromkeys(("num_blocks", *KINDS), Field(list)))
        num_blocks = fields["num_blocks"]
        if len(num_blocks) != len(KINDS) or not all(_BLOCKS.holds(num) for num in num_blocks):
            raise ValueError(f"num_blocks={shown(num_blocks)} is no pair of numbers of blocks")
        if len(fields["attn"]) != len(fields["ffn"]):
            raise ValueError(f"{len(fields['attn'])} layers with heads and {len(fields['ffn'])} with FFN blocks")
        for kind, num in zip(KINDS, num_blocks, strict=True):
            for layer, held in enumerate(fields[kind]):
                ids = held if isinstance(held, list) and all(type(block) is int for block in held) else []
                if not ids or ids != sorted(set(ids)) or ids[0] < 0 or ids[-1] >= num:
                    raise ValueError(f"{kind} blocks {shown(held)} of layer {layer} are no ids from 0 to {num - 1}")
        attn, ffn = (tuple(map(tuple, fields[kind])) for kind in KINDS)
        return Blueprint((num_blocks[0], num_blocks[1]), attn, ffn)

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
    """What is divided, how much each worker holds, and by which policy its blocks are chosen.

    `num_sub` holds sizes, (heads, FFN blocks) per divided layer: one per worker, or with `assign="drawn"` those that
    may be drawn. A kind that `setting` leaves out is held whole, and so are the first `undivided_first` and the last
    `undivided_last` layers. Every worker holds the common blocks (C): the ids in `common`, or with
    `policy="importance"` the `num_common` that lead the layer's `scores`.
    """

    setting: Setting
    num_sub: Sizes
    undivided_first: int = 2
    undivided_last: int = 2
    common: tuple[int, ...] = ()
    policy: Policy = "random"
    assign: Assign = "fixed"
    drawn_workers: int = 0
    """Workers that sizes are drawn for."""
    num_common: int = 0
    scores: Scores | None = None
    ticket_policy: TicketPolicy = "random"

    def divides(self, kind: Kind) -> bool:
        return self.setting in (kind, "both")

    def layers(self, num_layers: int) -> range:
        return range(self.undivided_first, num_layers - self.undivided_last)

    def params(self, layout: Layout) -> list[Param]:
        """The parameters that are divided, in the model's order."""
        layers = self.layers(layout.num_layers)
        return [p for p in layout.params if p.kind is not None and self.divides(p.kind) and p.layer in layers]

    @property
    def common_size(self) -> int:
        return self.num_common if self.policy == "importance" else len(self.common)

    def common_blocks(self, kind: Kind, layer: int) -> tuple[int, ...]:
        """C of one layer."""
        return self.by_score(kind, layer)[: self.num_common] if self.policy == "importance" else self.common

    def by_score(self, kind: Kind, layer: int) -> tuple[int, ...]:
        """The layer's blocks, most important first; equal ones by id. Raises ValueError without scores."""
        if self.scores is None:
            raise ValueError("blocks are to be chosen by importance, but none was scored yet")
        scores = self.scores[kind, layer]
        return tuple(sorted(range(len(scores)), key=lambda block: (-scores[block], block)))

    def sizes(self, layout: Layout, seed: int, round_: int) -> Sizes:
        """Each worker's (heads, FFN blocks) in a round.

        Sizes that are drawn are drawn uniformly; where they have too few places for all blocks, workers in random
        order get a size that would do for all instead, until there are enough.
        """
        if self.assign == "fixed":
            return self.num_sub
        rng = _generator(seed, _SIZES, round_, 0, 0)
        if self.assign == "shuffled":
            return tuple(self.num_sub[i] for i in rng.permutation(len(self.num_sub)))
        sizes = [self.num_sub[i] for i in rng.integers(len(self.num_sub), size=self.drawn_workers)]
        for worker in rng.permutation(self.drawn_workers):
            if self._covers(layout, sizes):
                break
            sizes[worker] = self._enough(layout)[0]
        return tuple(sizes)

    def _enough(self, layout: Layout) -> list[tuple[int, int]]:
        """Sizes to draw from that have places for all blocks if every worker gets them, the largest first."""
        largest_first = sorted(self.num_sub, key=sum, reverse=True)
        return [size for size in largest_first if self._covers(layout, [size] * self.drawn_workers)]

    def _covers(self, layout: Layout, sizes: Sequence[tuple[int, int]]) -> bool:
        """Whether `sizes` have the places that the policy needs: N_full - |C| <= sum of (N_sub - |C|)."""
        common = self.common_size
        return self.policy not in EVERY_BLOCK_EVERY_ROUND or all(
            layout.num_blocks[i] - common <= sum(size[i] - common for size in sizes)
            for i, kind in enumerate(KINDS)
            if self.divides(kind)
        )

    def check(self, layout: Layout, coverage: bool = True) -> None:
        """Raises ValueError for layers or common blocks that do not exist, and as `_check_sizes` if asked to."""
        if not self.layers(layout.num_layers):
            raise ValueError(
                f"blueprint.undivided_first={self.undivided_first} and undivided_last={self.undivided_last} leave "
                f"none of the {layout.num_layers} layers to divide: make their sum at most {layout.num_layers - 1}"
            )
        for i, kind in enumerate(KINDS):
            num_full = layout.num_blocks[i]
            if not self.divides(kind):
                continue
            if len(set(self.common)) != len(self.common) or any(not 0 <= block < num_full for block in self.common):
                raise ValueError(
                    f"blueprint.common={list(self.common)} must be distinct block ids from 0 to {num_full - 1}"
                )
            if coverage:
                self._check_sizes(kind, num_full, [size[i] for size in self.num_sub])
        if coverage and self.assign == "drawn" and not self._enough(layout):
            raise ValueError(
                f"blueprint.num_sub: of the sizes {list(self.num_sub)} (heads, FFN blocks) none, if all "
                f"{self.drawn_workers} workers draw it, covers all {layout.num_blocks} blocks with {self.common_size} "
                "common ones: add a larger size"
            )

    def _check_sizes(self, kind: Kind, num_full: int, num_sub: list[int]) -> None:
        """Raises ValueError, naming the smallest legal N_sub, if some block could go untrained (section 3.1)."""
        num_workers, common = len(num_sub), self.common_size
        smallest = max(common, 1, -(-(num_full + (num_workers - 1) * common) // num_workers))
        key = "num_sub" if kind == "attn" else "num_sub_ffn or num_sub"
        what = f"blueprint.{key}={num_sub if len(set(num_sub)) > 1 else num_sub[0]} ({kind})"
        if max(num_sub) > num_full:
            raise ValueError(f"{what} is more than the {num_full} blocks of a layer: use at most {num_full}")
        if min(num_sub) < max(common, 1):
            raise ValueError(f"{what} is below {max(common, 1)}, the blocks every worker must hold")
        if self.policy == "rolling" and max(num_sub) == common < num_full:
            raise ValueError(f"{what}: the {common} common blocks fill it and leave no window to roll: use more")
        everywhere = self.policy in EVERY_BLOCK_EVERY_ROUND and self.assign != "drawn"
        if everywhere and sum(n - common for n in num_sub) < num_full - common:
            raise ValueError(
                f"{what}: {num_workers} workers with {common} common blocks cannot cover all {num_full} blocks; "
                f"the smallest legal N_sub for all is {smallest}"
            )


def _generator(*coordinates: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(coordinates)))


def draw_round(layout: Layout, division: Division, seed: int, round_: int, debt: Debt = frozenset()) -> list[Blueprint]:
    """One blueprint per worker for a training round; layers and kinds are drawn independently."""
    if division.policy == "static":
        round_, debt = 1, frozenset()
    sizes = division.sizes(layout, seed, round_)
    full = full_blueprint(layout)
    rows = {kind: [list(full.attn if kind == "attn" else full.ffn) for _ in sizes] for kind in KINDS}
    for i, kind in enumerate(KINDS):
        if not division.divides(kind):
            continue
        for layer in division.layers(layout.num_layers):
            owed = sorted(block for k, la, block in debt if (k, la) == (kind, layer))
            rng = _generator(seed, _TRAIN, round_, layer, i)
            num_sub = [size[i] for size in sizes]
            common = division.common_blocks(kind, layer)
            deal = Deal(layout.num_blocks[i], num_sub, common, round_, rng, owed)
            for worker, held in enumerate(POLICIES[division.policy](deal)):
                rows[kind][worker][layer] = held
    return [
        Blueprint(layout.num_blocks, tuple(attn), tuple(ffn))
        for attn, ffn in zip(rows["attn"], rows["ffn"], strict=True)
    ]


def draw_ticket(layout: Layout, division: Division, num_sub: tuple[int, int], seed: int, draw: int) -> Blueprint:
    """A subnet for deployment, `num_sub` = (heads, FFN blocks) per divided layer: no coverage constraint.

    By the division's ticket policy its blocks are random ones, the first ones, or those that lead the scores. As in
    training, the common blocks are in it (of a ticket smaller than C, a part of C is all).

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
            order = _ticket_order(division, kind, layer, num_full, _generator(seed, _TICKET, draw, layer, i))
            rows[kind][layer] = tuple(sorted(order[: num_sub[i]]))
    return Blueprint(layout.num_blocks, tuple(rows["attn"]), tuple(rows["ffn"]))


def _ticket_order(division: Division, kind: Kind, layer: int, num_full: int, rng: np.random.Generator) -> list[int]:
    """A layer's blocks, first those that a ticket takes first."""
    order = {
        "random": lambda: [int(block) for block in rng.permutation(num_full)],
        "ordered": lambda: list(range(num_full)),
        "importance": lambda: list(division.by_score(kind, layer)),
    }[division.ticket_policy]()
    common = division.common_blocks(kind, layer)
    return sorted(order, key=lambda block: block not in common)

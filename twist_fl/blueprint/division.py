"""What is divided, how much each worker holds, and by which policy its blocks are chosen (paper, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np

from twist_fl.blueprint.architectures import KINDS, Kind
from twist_fl.blueprint.blocks import Layout, Param
from twist_fl.blueprint.policies import policy_of

Setting = Literal["attn", "ffn", "both"]
TicketPolicy = Literal["random", "ordered", "importance"]
Assign = Literal["fixed", "shuffled", "drawn"]
Sizes = tuple[tuple[int, int], ...]
"""(heads, FFN blocks) per divided layer, of each worker."""
Scores = Mapping[tuple[Kind, int], tuple[float, ...]]
"""The importance of each block of a (kind, layer): higher is more."""
Debt = frozenset[tuple[Kind, int, int]]
"""Blocks (kind, layer, id) whose holders all failed: they are dealt first in the next round."""


@dataclass(frozen=True)
class Division:
    """What is divided, how much each worker holds, and by which policy its blocks are chosen.

    `num_sub` holds sizes, (heads, FFN blocks) per divided layer: one per worker, or with `assign="drawn"` those that
    may be drawn. A kind that `setting` leaves out is held whole, and so are the first `undivided_first` and the last
    `undivided_last` layers. Every worker holds `common` blocks (C) of each kind: the first, or by the policy
    "importance" those that lead the layer's `scores`.
    """

    setting: Setting
    num_sub: Sizes
    undivided_first: int = 2
    undivided_last: int = 2
    common: tuple[int, int] = (0, 0)
    policy: str = "random"
    """Which chooses the blocks: `policies.policy_of`."""
    assign: Assign = "fixed"
    drawn_workers: int = 0
    """Workers that sizes are drawn for."""
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
    def by_importance(self) -> bool:
        """Whether the common blocks are chosen by scores."""
        return self.policy == "importance"

    def common_blocks(self, kind: Kind, layer: int) -> tuple[int, ...]:
        """C of one layer."""
        number = self.common[KINDS.index(kind)]
        return self.by_score(kind, layer)[:number] if self.by_importance else tuple(range(number))

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
        rng = generator(seed, Purpose.SIZES, round_, 0, 0)
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
        common = self.common
        return not policy_of(self.policy).covers or all(
            layout.num_blocks[i] - common[i] <= sum(size[i] - common[i] for size in sizes)
            for i, kind in enumerate(KINDS)
            if self.divides(kind)
        )

    def check(self, layout: Layout, coverage: bool = True) -> None:
        """Raises ValueError for layers that do not exist, and as `_check_sizes` if asked to."""
        if not self.layers(layout.num_layers):
            raise ValueError(
                f"blueprint.undivided_first={self.undivided_first} and undivided_last={self.undivided_last} leave "
                f"none of the {layout.num_layers} layers to divide: make their sum at most {layout.num_layers - 1}"
            )
        for i, kind in enumerate(KINDS):
            if coverage and self.divides(kind):
                self._check_sizes(kind, layout.num_blocks[i], [size[i] for size in self.num_sub], self.common[i])
        if coverage and self.assign == "drawn" and not self._enough(layout):
            raise ValueError(
                f"blueprint.num_sub: of the sizes {list(self.num_sub)} (heads, FFN blocks) none, if all "
                f"{self.drawn_workers} workers draw it, covers all {layout.num_blocks} blocks with {self.common} "
                "common ones: add a larger size"
            )

    def _check_sizes(self, kind: Kind, num_full: int, num_sub: list[int], common: int) -> None:
        """Raises ValueError, naming the smallest legal N_sub, if some block could go untrained (section 3.1)."""
        num_workers = len(num_sub)
        smallest = max(common, 1, -(-(num_full + (num_workers - 1) * common) // num_workers))
        what = f"blueprint.num_sub={num_sub if len(set(num_sub)) > 1 else num_sub[0]} ({kind})"
        if max(num_sub) > num_full:
            raise ValueError(f"{what} is more than the {num_full} blocks of a layer: use at most {num_full}")
        if min(num_sub) < max(common, 1):
            raise ValueError(f"{what} is below {max(common, 1)}, the blocks every worker must hold")
        if self.policy == "rolling" and max(num_sub) == common < num_full:
            raise ValueError(f"{what}: the {common} common blocks fill it and leave no window to roll: use more")
        everywhere = policy_of(self.policy).covers and self.assign != "drawn"
        if everywhere and sum(n - common for n in num_sub) < num_full - common:
            raise ValueError(
                f"{what}: {num_workers} workers with {common} common blocks cannot cover all {num_full} blocks; "
                f"the smallest legal N_sub for all is {smallest}"
            )


class Purpose(IntEnum):
    """What random numbers are for: one of the coordinates of a run's randomness, so that none is drawn twice."""

    BLOCKS = 0
    TICKET = 1
    SIZES = 2
    SCORE = 3
    WORKERS = 4


def generator(*coordinates: int) -> np.random.Generator:
    """Randomness as a pure function of its coordinates: drawn again anywhere, after any restart, it is the same."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(coordinates)))

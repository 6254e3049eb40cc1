"""What a configuration divides, and the sizes of workers and tickets; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import cycle, islice
from math import floor
from typing import Any

from twist_fl.blueprint.architectures import KINDS, Kind, ModelDict
from twist_fl.blueprint.blocks import Layout, make_layout
from twist_fl.blueprint.division import Division, Setting, Sizes
from twist_fl.blueprint.moments import MOMENTS, OUTER
from twist_fl.config.schema import BlueprintConfig, Config
from twist_fl.config.shares import Size, read_size
from twist_fl.system.errors import ConfigError


def layout_of(config: Config, model: ModelDict) -> Layout:
    """Of a model's Hugging Face config, as `config.blueprint` divides it. Raises ValueError as `make_layout`."""
    return make_layout(model, config.blueprint.ffn_blocks, config.blueprint.attn_blocks)


def make_division(config: Config, layout: Layout) -> Division:
    """What `config.blueprint` says of a model, not checked. Raises ConfigError for a size that none can be."""
    blueprint, workers = config.blueprint, config.train.workers
    return Division(
        blueprint.setting,
        _sizes(blueprint, layout, workers),
        blueprint.undivided_first,
        blueprint.undivided_last,
        held_of(layout, blueprint.setting, "blueprint.common", blueprint.common, least=0),
        blueprint.policy,
        blueprint.assign,
        drawn_workers=workers,
        ticket_policy=config.eval.ticket_policy,
    )


def workers_per_round(config: Config) -> int:
    """Of train.workers, those that train in a round: the hybrid variant's server needs a client."""
    train = config.train
    return min(train.workers, max(2 if train.variant == "hybrid" else 1, round(train.fraction * train.workers)))


def server_copies(config: Config) -> int:
    """How often the server holds what is as large as the model's parameters: they themselves, what they were before
    the round where the outer optimiser asks for it, and what that keeps; of DDP gradients and Adam's two moments; where
    the server trains (hybrid), all that training takes."""
    if config.algorithm == "ddp":
        return 2 + len(MOMENTS)
    kept = OUTER[config.aggregate.optimizer]
    trained = 2 + len(MOMENTS) if config.train.variant == "hybrid" else 0
    return 1 + len(kept) + bool(kept) + trained


def of_workers(division: Division, workers: Sequence[int]) -> Division:
    """What is divided among a round's `workers`; a list that is shuffled is dealt out to them."""
    if division.assign == "drawn":
        return replace(division, drawn_workers=len(workers))
    if division.assign == "shuffled":
        return replace(division, num_sub=division.num_sub[: len(workers)])
    return replace(division, num_sub=tuple(division.num_sub[worker] for worker in workers))


def smallest_share(config: Config, division: Division) -> Division:
    """The division with the fewest places for blocks, of each kind, that `train.fraction` may leave a round."""
    number, always = workers_per_round(config), division.num_sub[: config.train.variant == "hybrid"]
    if division.assign != "fixed":
        return of_workers(division, range(number))
    others = division.num_sub[len(always) :]
    heads, ffn = (sorted(size[i] for size in others)[: number - len(always)] for i in range(2))
    return replace(division, num_sub=(*always, *zip(heads, ffn, strict=True)))


def _sizes(blueprint: BlueprintConfig, layout: Layout, workers: int) -> Sizes:
    """(heads, FFN blocks) of each worker, or those to draw from; a list that is too short for all goes round."""
    sizes = [held_of(layout, blueprint.setting, "blueprint.num_sub", size) for size in blueprint.num_sub]
    return tuple(sizes) if blueprint.assign == "drawn" else tuple(islice(cycle(sizes), workers))


def divided_kinds(setting: Setting) -> list[int]:
    """Places in KINDS of what a setting divides."""
    return [i for i, kind in enumerate(KINDS) if setting in (kind, "both")]


def blocks_per_layer(layout: Layout, setting: Setting) -> int:
    """What a size without a kind counts: the blocks of the divided kind that has most."""
    return max(layout.num_blocks[i] for i in divided_kinds(setting))


def held_of(layout: Layout, setting: Setting, key: str, size: Any, least: int = 1) -> tuple[int, int]:
    """(heads, FFN blocks) of a size: each kind's share to the nearest block, at least `least`; a kind that is not
    divided is whole. Raises ConfigError for more than a layer has."""
    amounts, kinds = read_size(key, size), divided_kinds(setting)
    joined = " " if key.startswith("--") else "="
    if len(amounts) == 2 and len(kinds) == 1:
        raise ConfigError(
            f"{key}{joined}{size} is a size for attention+FFN, and blueprint.setting={setting} divides one of them: "
            "give one number"
        )
    held = list(layout.num_blocks)
    for i in kinds:
        of = blocks_per_layer(layout, setting) if len(amounts) == 1 else layout.num_blocks[i]
        share = amounts[i if len(amounts) == 2 else 0].share(of)
        if share > 1 or share < 0 or (least and not share):
            raise ConfigError(f"{key}{joined}{size} of a layer's {of} blocks is impossible: choose {least} to {of}")
        held[i] = max(least, floor(share * layout.num_blocks[i] + Fraction(1, 2)))
    return held[0], held[1]


@dataclass(frozen=True)
class TicketSize:
    """Blocks of each divided layer that a ticket holds, of how many, (heads, FFN blocks)."""

    num_sub: tuple[int, int]
    num_blocks: tuple[int, int]
    setting: Setting

    @cached_property
    def _shares(self) -> list[Fraction]:
        return [self.share_of(KINDS[i]) for i in divided_kinds(self.setting)]

    @property
    def is_whole(self) -> bool:
        return self.num_sub == self.num_blocks

    def share_of(self, kind: Kind | None) -> Fraction:
        """kappa of one kind of blocks; a parameter of none is held whole."""
        if kind is None:
            return Fraction(1)
        i = KINDS.index(kind)
        return Fraction(self.num_sub[i], self.num_blocks[i])

    @property
    def share(self) -> Fraction:
        """kappa, of the kind of which more is held."""
        return max(self._shares)

    @property
    def row(self) -> dict[str, Size]:
        """As results have it: 6 of 12, or where the shares of attention and FFN differ, 2+6 of 3+12."""
        if len(set(self._shares)) == 1:
            of = max(self.num_blocks[i] for i in divided_kinds(self.setting))
            return {"size": int(self.share * of), "of": of}
        return {"size": "+".join(map(str, self.num_sub)), "of": "+".join(map(str, self.num_blocks))}


def ticket_size(layout: Layout, division: Division, size: Any, key: str = "size") -> TicketSize:
    """Raises ConfigError for a size that cannot be."""
    return TicketSize(held_of(layout, division.setting, key, size), layout.num_blocks, division.setting)


def ticket_sizes(layout: Layout, division: Division) -> list[TicketSize]:
    """One for each number of blocks, ascending; the last is the full model."""
    of = blocks_per_layer(layout, division.setting)
    return list(dict.fromkeys(ticket_size(layout, division, size) for size in range(1, of + 1)))

"""What a configuration divides, and the sizes that a ticket can have; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from twist_fl.blueprint.blocks import Layout
from twist_fl.blueprint.division import Division, Sizes
from twist_fl.config.schema import BlueprintConfig, Config


def make_division(config: Config) -> Division:
    """What `config.blueprint` says, not checked."""
    blueprint, workers = config.blueprint, config.train.workers
    return Division(
        blueprint.setting,
        _sizes(blueprint, workers),
        blueprint.undivided_first,
        blueprint.undivided_last,
        tuple(blueprint.common),
        blueprint.policy,
        blueprint.assign,
        drawn_workers=workers,
        num_common=blueprint.num_common,
        ticket_policy=config.eval.ticket_policy,
    )


def workers_per_round(config: Config) -> int:
    """Of train.workers, those that train in a round: the hybrid variant's server needs a client."""
    train = config.train
    return min(train.workers, max(2 if train.variant == "hybrid" else 1, round(train.fraction * train.workers)))


def of_workers(division: Division, workers: Sequence[int]) -> Division:
    """What is divided among a round's `workers`."""
    if division.assign == "drawn":
        return replace(division, drawn_workers=len(workers))
    return replace(division, num_sub=tuple(division.num_sub[worker] for worker in workers))


def smallest_share(config: Config, division: Division) -> Division:
    """The division with the fewest places for blocks, of each kind, that `train.fraction` may leave a round."""
    number, always = workers_per_round(config), division.num_sub[: config.train.variant == "hybrid"]
    if division.assign == "drawn":
        return replace(division, drawn_workers=number)
    others = division.num_sub[len(always) :]
    heads, ffn = (sorted(size[i] for size in others)[: number - len(always)] for i in range(2))
    return replace(division, num_sub=(*always, *zip(heads, ffn, strict=True)))


def _sizes(blueprint: BlueprintConfig, workers: int) -> Sizes:
    """(heads, FFN blocks) of each worker, or those to draw from; a single number stands for all."""
    heads, ffn = blueprint.num_sub, blueprint.num_sub_ffn or blueprint.num_sub
    length = max(len(heads), len(ffn)) if blueprint.assign == "drawn" else workers
    heads, ffn = (sizes * length if len(sizes) == 1 else sizes for sizes in (heads, ffn))
    return tuple(zip(heads, ffn, strict=True))


def blocks_per_layer(layout: Layout, division: Division) -> int:
    """What a ticket's size counts: heads, or FFN blocks where only those are divided."""
    return layout.num_blocks[0 if division.divides("attn") else 1]


def ticket_sizes(layout: Layout, division: Division, size: int) -> tuple[int, int]:
    """(heads, FFN blocks) of a ticket of `size` blocks: the same share of both kinds.

    A kind that the setting does not divide is whole. Raises ValueError if the share is not a whole block.
    """
    heads, ffn_blocks = layout.num_blocks
    of = blocks_per_layer(layout, division)
    if not 1 <= size <= of:
        raise ValueError(f"a ticket size of {size} (eval.sizes, --sizes) is impossible: choose 1 to {of}")
    ffn = size * ffn_blocks / of
    if division.divides("ffn") and ffn != int(ffn):
        legal = [n for n in range(1, of + 1) if n * ffn_blocks % of == 0]
        raise ValueError(
            f"a ticket size of {size} (eval.sizes, --sizes) of {of} blocks is no whole number of the "
            f"{ffn_blocks} FFN blocks: choose one of {legal}"
        )
    return (size if division.divides("attn") else heads, int(ffn) if division.divides("ffn") else ffn_blocks)


def legal_sizes(layout: Layout, division: Division) -> list[int]:
    """Ticket sizes that `ticket_sizes` accepts, ascending; the last is the full model."""
    ffn_blocks = layout.num_blocks[1]
    of = blocks_per_layer(layout, division)
    return [size for size in range(1, of + 1) if division.setting != "both" or size * ffn_blocks % of == 0]

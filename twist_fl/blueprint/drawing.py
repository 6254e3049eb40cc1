"""Blueprints are drawn: a round's, one a worker, and tickets (paper, section 3.1; `policies.py`).

Randomness is a pure function of its coordinates (seed, purpose, round, layer, kind): the same blueprint
can be derived again anywhere, in any process, after any restart. numpy only.
"""

from __future__ import annotations

import numpy as np

from twist_fl.blueprint.architectures import KINDS, Kind
from twist_fl.blueprint.blocks import Layout
from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.blueprint.division import Debt, Division, Purpose, generator
from twist_fl.blueprint.policies import Deal, policy_of


def full_blueprint(layout: Layout) -> Blueprint:
    """Every block of every layer: FedAvg is TwIST with this blueprint for all."""
    heads, ffn_blocks = layout.num_blocks
    return Blueprint(
        layout.num_blocks,
        (tuple(range(heads)),) * layout.num_layers,
        (tuple(range(ffn_blocks)),) * layout.num_layers,
    )


def draw_round(layout: Layout, division: Division, seed: int, round_: int, debt: Debt = frozenset()) -> list[Blueprint]:
    """One blueprint per worker for a training round; layers and kinds are drawn independently."""
    policy = policy_of(division.policy)
    if policy.still:
        round_, debt = 1, frozenset()
    sizes = division.sizes(layout, seed, round_)
    full = full_blueprint(layout)
    rows = {kind: [list(full.attn if kind == "attn" else full.ffn) for _ in sizes] for kind in KINDS}
    for i, kind in enumerate(KINDS):
        if not division.divides(kind):
            continue
        for layer in division.layers(layout.num_layers):
            owed = sorted(block for k, la, block in debt if (k, la) == (kind, layer))
            rng = generator(seed, Purpose.BLOCKS, round_, layer, i)
            num_sub = [size[i] for size in sizes]
            common = division.common_blocks(kind, layer)
            deal = Deal(layout.num_blocks[i], num_sub, common, round_, rng, owed)
            for worker, held in enumerate(policy(deal)):
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
            order = _ticket_order(division, kind, layer, num_full, generator(seed, Purpose.TICKET, draw, layer, i))
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

"""Appendix C: parameters, bytes and memory, exactly, without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from twist_fl.blueprint.architectures import KINDS
from twist_fl.blueprint.blocks import Layout
from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.blueprint.division import Division
from twist_fl.blueprint.drawing import draw_round, draw_ticket, full_blueprint
from twist_fl.blueprint.policies import policy_of

BYTES_PER_PARAM = 4
TRAINING_BYTES_PER_PARAM = 16
"""Weight, gradient and Adam's two moments in float32: the memory column of Table 2, less about 0.06 GiB."""
RUNTIME_GIB = 0.06
PAPER_EXCHANGES = 45_700
"""Optimiser steps of the paper's runs: Table 2 counts one exchange a step, for TwIST and DDP alike."""


def state_bytes(layout: Layout, blueprint: Blueprint | None = None) -> int:
    """Bytes of a subnet's parameters in float32, one direction; of the full model if no blueprint is given."""
    return BYTES_PER_PARAM * layout.num_params(blueprint)


def round_bytes(layout: Layout, blueprints: Iterable[Blueprint]) -> int:
    """Bytes of weights that one round moves, both directions, all workers."""
    return sum(2 * state_bytes(layout, blueprint) for blueprint in blueprints)


def moment_bytes(layouts: Mapping[str, Layout], blueprints: Sequence[Blueprint]) -> int:
    """What moments that travel, each made of its layout, add to a round: both directions, all workers."""
    return sum(round_bytes(layout, blueprints) for layout in layouts.values())


def server_bytes(copies: int, layout: Layout, moments: Iterable[Layout], ready: float) -> int:
    """Memory of the server beside its libraries: what it keeps as large as the model's parameters, `copies` of it; the
    moments that travel; and the bytes of weights and moments that lie ready for a round's workers, in whose place their
    replies come."""
    return copies * state_bytes(layout) + sum(map(state_bytes, moments)) + round(ready)


def training_bytes(layout: Layout, blueprint: Blueprint | None = None) -> int:
    """Memory to train: weights, gradients and moments plus the runtime's constant; no activations."""
    return TRAINING_BYTES_PER_PARAM * layout.num_params(blueprint) + round(RUNTIME_GIB * 2**30)


def training_gib(layout: Layout, blueprint: Blueprint | None = None) -> float:
    """Memory column of Table 2, in GiB."""
    return training_bytes(layout, blueprint) / 2**30


def step_flops(layout: Layout, blueprint: Blueprint | None, batch_size: int, window: int) -> int:
    """Floating-point operations of the matrix products in one training step on (batch_size, window) tokens.

    6 a weight and token (2 forward, 4 backward) for the projections of all layers and the head, and 12 x window a
    token and attention channel for the two products of attention, counted whole as if nothing were masked.
    """
    weights = prod(layout.params[0].shape)  # the head's: as many as the token embedding's, tied or not
    channels = 0
    attention = {layout.outputs["attn"].format(layer=layer) + ".weight" for layer in range(layout.num_layers)}
    for param in layout.params:
        shape = layout.shape(param, blueprint)
        if param.layer is not None and len(shape) == 2:
            weights += prod(shape)
        if param.name in attention:
            channels += shape[param.dim]
    return batch_size * window * (6 * weights + 12 * window * channels)


@dataclass(frozen=True)
class RunCost:
    """What a whole run costs a worker, on paper. `exchange` = sending a subnet out and back once."""

    num_params: int
    subnet_params: float
    """The mean over rounds, where they differ."""
    rounds: int
    steps: int
    tb_per_interval: float
    tb_per_step: float
    memory_gib: float
    """Of the largest subnet."""
    moments: float = 0.0
    """Bytes of moments that travel with each of weights."""


def run_cost(
    layout: Layout, division: Division | None, rounds: int, steps: int, moments: Collection[Layout] = ()
) -> RunCost:
    """Cost per worker of `rounds` intervals, `steps` optimiser steps in all; `division` None is FedAvg or DDP.

    `moments`: of those that travel, what each is made of.

    `tb_per_step` is Table 2's counting (one exchange per optimiser step), `tb_per_interval` what TwIST moves. Of
    workers that differ it is the first one's: see `groups`.
    """
    blueprint = draw_round(layout, division, 0, 0)[0] if division else full_blueprint(layout)
    return _run_cost(layout, {blueprint: 1}, rounds, steps, moments)


def _run_cost(
    layout: Layout, held: Mapping[Blueprint, int], rounds: int, steps: int, moments: Collection[Layout]
) -> RunCost:
    """Of a worker that holds subnets as often as `held` says."""

    def mean(of: Layout) -> float:
        return sum(times * of.num_params(blueprint) for blueprint, times in held.items()) / sum(held.values())

    params = mean(layout)
    exchange = 2 * BYTES_PER_PARAM * params / 1e12
    return RunCost(
        num_params=layout.num_params(),
        subnet_params=params,
        rounds=rounds,
        steps=steps,
        tb_per_interval=rounds * exchange,
        tb_per_step=steps * exchange,
        memory_gib=max(training_gib(layout, blueprint) for blueprint in held),
        moments=sum(map(mean, moments)) / params,
    )


@dataclass(frozen=True)
class Group:
    """Workers that hold alike: how many, how often each (heads, FFN blocks) is held, and what a worker costs."""

    workers: int
    held: Mapping[tuple[int, int], int]
    cost: RunCost


def groups(
    layout: Layout,
    division: Division,
    seed: int,
    rounds: int,
    steps: int,
    first: int = 0,
    moments: Collection[Layout] = (),
) -> list[Group]:
    """Workers `first`, `first` + 1, ... by what they hold in a run of `rounds` intervals, `steps` steps in all.

    Of fixed sizes each is a group, in the order of the workers. Where sizes are dealt out or drawn anew every round,
    all workers are one group: sizes are a function of seed and round, so every round is counted, not estimated.
    """
    static = division.assign == "fixed" or policy_of(division.policy).still
    drawn = [division.sizes(layout, seed, round_ + 1)[first:] for round_ in range(1 if static else rounds)]
    if division.assign == "fixed":
        found = [(workers, {size: workers}) for size, workers in Counter(drawn[0]).items()]
    else:
        found = [(len(drawn[0]), Counter(size for sizes in drawn for size in sizes))]
    return [
        Group(workers, held, _run_cost(layout, _subnets(layout, division, held), rounds, steps, moments))
        for workers, held in found
    ]


def _subnets(layout: Layout, division: Division, held: Mapping[tuple[int, int], int]) -> dict[Blueprint, int]:
    """A subnet for each size: which blocks it holds does not matter, only how many."""
    plain = Division(division.setting, (), division.undivided_first, division.undivided_last)
    subnets: Counter[Blueprint] = Counter()
    for size, times in held.items():
        heads, ffn = (
            n if division.divides(kind) else of for n, kind, of in zip(size, KINDS, layout.num_blocks, strict=True)
        )
        subnets[draw_ticket(layout, plain, (heads, ffn), 0, 0)] += times
    return subnets

"""Outer optimisers (FedOpt, arXiv 2003.00295; DiLoCo, arXiv 2311.08105): what a round has changed is their gradient.

The mean of a round's replies minus what was there before is one step of all workers together; momentum or Adam takes
it further. Each block has a state of its own, which moves only in rounds in which somebody held it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from twist_fl.blueprint.blocks import Layout, runs
from twist_fl.blueprint.moments import OUTER
from twist_fl.config.schema import AggregateConfig
from twist_fl.model.subnet import State

Held = Mapping[str, npt.NDArray[np.bool_]]
"""For each parameter, which of its blocks somebody held in the round; a parameter held whole has one."""


@dataclass
class OuterState:
    """Averages of the changes so far, shaped as the parameters, and the rounds in which each block has changed."""

    values: dict[str, State] = field(default_factory=dict)
    rounds: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)


def new_outer(config: AggregateConfig, layout: Layout, params: State) -> OuterState | None:
    """Of a run that has not begun; None where the mean is all."""
    names = OUTER[config.optimizer]
    if not names:
        return None
    return OuterState(
        {each: {name: torch.zeros_like(value) for name, value in params.items()} for each in names},
        {param.name: np.zeros(param.num_blocks, np.int64) for param in layout.params},
    )


def outer_step(
    config: AggregateConfig, layout: Layout, before: State, mean: State, held: Held, outer: OuterState
) -> None:
    """Turn `mean` into the next parameters, in place; `outer` moves along.

    momentum with aggregate.server_lr=1 and aggregate.momentum=0 leaves the mean as it is, bit for bit.
    """
    for param in layout.params:
        rounds = outer.rounds[param.name]
        rounds += held[param.name]
        tags = list(zip(held[param.name].tolist(), rounds.tolist(), strict=True))
        for blocks, _ in runs(range(param.num_blocks), tags):
            if held[param.name][blocks.start]:
                shape = param.blocked(param.num_blocks)
                old, new = (state[param.name].view(shape)[:, :, blocks] for state in (before, mean))
                own = {each: value[param.name].view(shape)[:, :, blocks] for each, value in outer.values.items()}
                _step(config, old, new, own, int(rounds[blocks.start]))


def _step(config: AggregateConfig, old: torch.Tensor, new: torch.Tensor, own: State, rounds: int) -> None:
    """Of blocks that have changed `rounds` times, this one counted; as Flower's FedAvgM and FedAdam."""
    change = new - old
    if config.optimizer == "adam":
        first = own["exp_avg"].mul_(config.momentum).add_(change, alpha=1 - config.momentum)
        second = own["exp_avg_sq"].mul_(config.beta2).addcmul_(change, change, value=1 - config.beta2)
        # Flower counts one round more than there were.
        unbiased = (1 - config.beta2 ** (rounds + 1)) ** 0.5 / (1 - config.momentum ** (rounds + 1))
        new.copy_(old + config.server_lr * unbiased * first / (second.sqrt() + config.tau))
        return
    step = own["momentum"].mul_(config.momentum).add_(change)
    if config.optimizer == "nesterov":
        step = change + config.momentum * step
    new.add_(config.server_lr * step - change)  # and not old + ...: a step that is the change itself adds 0

"""The streaming mean over holders, with checks and coverage debt (paper, section 3.3).

The law: the new value of an element is the weighted mean over the replies that held it; an element that
nobody held keeps the server's value. One formula covers the paper's two cases (shared: mean of S; disjoint
block: copy). Sums are float64: identical replies are a fixed point bit for bit, and a reply's arrival time
does not matter as long as an element's values lie within 2^29 of one another (float64's 53 bits against
float32's 24), which weights of one model do. Memory does not grow with the number of replies.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from twist_fl.blocks import KINDS, Layout, Param
from twist_fl.blueprint import Blueprint, Debt, Division
from twist_fl.subnet import State


class ReplyError(ValueError):
    """A reply that must not be averaged: it is named and dropped, and the round goes on."""


class StreamingMean:
    """Sum and weight of each block, one reply at a time."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._sums: State = {}
        self._weights: dict[str, torch.Tensor] = {}

    def add(self, blueprint: Blueprint, state: Mapping[str, torch.Tensor], weight: int = 1) -> None:
        """Add one subnet's state. `state` must have passed `check_state`."""
        for param in self._layout.params:
            if param.name not in self._sums:
                self._sums[param.name] = torch.zeros(param.shape, dtype=torch.float64)
                num_weights = param.shape[param.dim] if param.kind else 1
                self._weights[param.name] = torch.zeros(num_weights, dtype=torch.float64)
            total, weights = self._sums[param.name], self._weights[param.name]
            value = state[param.name]
            held = self._layout.held(param, blueprint)
            if held is None:
                total.add_(value, alpha=weight)
                weights.add_(weight)
            else:
                index = torch.tensor(param.index(held))
                total.index_add_(param.dim, index, value.to(torch.float64), alpha=weight)
                weights[index] += weight

    def finish(self, state: Mapping[str, torch.Tensor]) -> State:
        """The new state: means where somebody held the element, `state`'s own value elsewhere."""
        return {param.name: self._mean(param, state[param.name]) for param in self._layout.params}

    def _mean(self, param: Param, old: torch.Tensor) -> torch.Tensor:
        if param.name not in self._sums:
            return old
        along = [1] * len(param.shape)
        along[param.dim] = -1
        weights = self._weights[param.name].view(along)
        mean = (self._sums[param.name] / weights.clamp_min(1)).to(old.dtype)
        return mean if bool((weights > 0).all()) else torch.where(weights > 0, mean, old)


def check_state(layout: Layout, blueprint: Blueprint, state: Mapping[str, torch.Tensor]) -> None:
    """Raises ReplyError unless names, shapes, dtypes and values are those of the blueprint's subnet."""
    try:
        layout.check_names({name: tuple(tensor.shape) for name, tensor in state.items()}, blueprint)
    except ValueError as error:
        raise ReplyError(str(error)) from error
    for name, tensor in state.items():
        if tensor.dtype != torch.float32:
            raise ReplyError(f"{name} is {tensor.dtype}, expected torch.float32")
        # A finite sum has finite terms, and is 15 times as fast to find; large terms may overflow it, hence the rest.
        if not bool(tensor.sum().isfinite()) and not bool(tensor.isfinite().all()):
            raise ReplyError(f"{name} has values that are not finite")


def coverage_debt(layout: Layout, division: Division, answered: list[Blueprint]) -> Debt:
    """The divided blocks that no blueprint in `answered` holds."""
    debt = set()
    for i, kind in enumerate(KINDS):
        if division.divides(kind):
            for layer in division.layers(layout.num_layers):
                held = {block for blueprint in answered for block in blueprint.held(kind, layer)}
                debt |= {(kind, layer, int(block)) for block in np.setdiff1d(range(layout.num_blocks[i]), list(held))}
    return frozenset(debt)

"""Rules of aggregation beside the mean: what replaces a block, of the replies that held it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch

from twist_fl.blueprint.blocks import Layout, Param, runs
from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.model.subnet import State
from twist_fl.system.errors import ConfigError
from twist_fl.training.aggregate import Array, HeldReply, Memory, Rule, blocked

ROBUST = ("median", "trimmed_mean")
"""Of the names of aggregate.rule. Moments that travel are made by these too: one lie in them would last for long."""
Function = Callable[[Array, list[int]], Array]


def per_block(function: Function) -> Rule:
    """The rule that keeps all replies until the end of a round, and then calls `function` for blocks of equal holders.

    function(values, weights) gets what the holders say, float32 (holders, ...), in the order of their replies, and
    gives what replaces it, without the first axis. The weights are train.weighting's. Nobody calls it for blocks that
    nobody held: they stay as they are.
    """
    return partial(_PerBlock, function)


class _PerBlock:
    def __init__(self, function: Function, layout: Layout, state: State, memory: Memory) -> None:
        self._function, self._layout, self._state = function, layout, state
        self._replies: list[HeldReply] = []

    def add(
        self,
        blueprint: Blueprint,
        state: Mapping[str, torch.Tensor],
        weight: int = 1,
        given: Blueprint | None = None,
        lasts: bool = False,
    ) -> None:
        kept = state if lasts else {name: tensor.clone() for name, tensor in state.items()}
        self._replies.append(HeldReply(blueprint, given or blueprint, kept, weight))

    def held(self) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.bool_]]]:
        return {param.name: np.array([bool(of) for of in self._holders(param)]) for param in self._layout.params}

    def finish(self) -> State:
        for param in self._layout.params:
            place = blocked(param, self._state[param.name], param.num_blocks)
            replies = [reply.of(self._layout, param) for reply in self._replies]
            holders = self._holders(param)
            for blocks, _ in runs(range(param.num_blocks), holders):
                if of := holders[blocks.start]:
                    shifts = [replies[i][1][blocks.start] for i in of]
                    parts = [
                        replies[i][0][:, :, blocks.start + shift : blocks.stop + shift]
                        for i, shift in zip(of, shifts, strict=True)
                    ]
                    place[:, :, blocks] = self._called(np.stack(parts), [self._replies[i].weight for i in of])
        return self._state

    def _holders(self, param: Param) -> list[tuple[int, ...]]:
        """For each block, the replies that held it."""
        every = range(param.num_blocks)
        held = [set(self._layout.held(param, reply.blueprint) or every) for reply in self._replies]
        return [tuple(i for i, blocks in enumerate(held) if block in blocks) for block in every]

    def _called(self, values: Array, weights: list[int]) -> Array:
        """Raises ConfigError for what cannot replace a block."""
        found = np.asarray(self._function(values, weights))
        what = f"the rule's function {getattr(self._function, '__name__', self._function)}"
        if found.shape != values.shape[1:]:
            raise ConfigError(f"{what} gave an array of shape {found.shape}, expected {values.shape[1:]}")
        if not np.isfinite(found).all():
            raise ConfigError(f"{what} gave values that are not finite")
        return found


def _median(values: Array, weights: list[int]) -> Array:
    return np.median(values, axis=0)


median = per_block(_median)
"""FedMedian (arXiv 1803.01498): of each number, over the workers that held it. Weights do not count."""


def _trimmed_mean(values: Array, weights: list[int]) -> Array:
    """At least the largest and the smallest go where three or more hold a number."""
    num = len(values)
    cut = max(1, num // 4) if num > 2 else 0
    kept = np.partition(values, (cut, num - 1 - cut), axis=0)[cut : num - cut]
    mean: Array = kept.mean(axis=0, dtype=np.float64)
    return mean


trimmed_mean = per_block(_trimmed_mean)
"""Of each number, over the workers that held it, without the quarter at either end (arXiv 1803.01498). Weights do not
count."""

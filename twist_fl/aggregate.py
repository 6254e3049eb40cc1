"""The streaming mean over holders, with checks and coverage debt (paper, section 3.3).

The law: the new value of an element is the weighted mean over the replies that held it; an element that
nobody held keeps the server's value. One formula covers the paper's two cases (shared: mean of S; disjoint
block: copy). Sums are float64: identical replies are a fixed point bit for bit, and a reply's arrival time
does not matter as long as an element's values lie within 2^29 of one another (float64's 53 bits against
float32's 24), which weights of one model do. Memory does not grow with the number of replies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from twist_fl.blocks import KINDS, Layout, Param, runs
from twist_fl.blueprint import Blueprint, Debt, Division
from twist_fl.subnet import State


class ReplyError(ValueError):
    """A reply that must not be averaged: it is named and dropped, and the round goes on."""


class StreamingMean:
    """Sum and weight of each block, one reply at a time.

    Memory: the float64 sums, 8 bytes a parameter, whatever the number of replies. NumPy does the arithmetic,
    because it converts between float32 and float64 in the processor's cache; torch writes a float64 copy first.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._sums: State = {}
        self._weights = {param.name: torch.zeros(param.num_blocks, dtype=torch.int64) for param in layout.params}

    def add(self, blueprint: Blueprint, state: Mapping[str, torch.Tensor], weight: int = 1) -> None:
        """Add one subnet's state. `state` must have passed `check_state`."""
        for param in self._layout.params:
            if param.name not in self._sums:
                self._sums[param.name] = torch.empty(param.shape, dtype=torch.float64)
            weights = self._weights[param.name]
            held = self._layout.held(param, blueprint) or range(param.num_blocks)
            total = _blocked(param, self._sums[param.name], param.num_blocks)
            value = _blocked(param, state[param.name], len(held))
            is_new = (weights == 0).tolist()
            for blocks, positions in runs(held, is_new):
                _accumulate(total[:, :, blocks], value[:, :, positions], weight, is_new[blocks.start])
                weights[blocks] += weight

    def finish(self, state: Mapping[str, torch.Tensor]) -> State:
        """The new state: means where somebody held the element, `state`'s own value elsewhere."""
        return {param.name: self._mean(param, state[param.name]) for param in self._layout.params}

    def emptied(self) -> StreamingMean:
        """This object, without its replies but with its memory."""
        for weights in self._weights.values():
            weights.zero_()
        return self

    def _mean(self, param: Param, old: torch.Tensor) -> torch.Tensor:
        weights = self._weights[param.name].tolist()
        if not any(weights):
            return old
        new = torch.empty(param.shape, dtype=old.dtype)
        total, before, after = (_blocked(param, t, param.num_blocks) for t in (self._sums[param.name], old, new))
        for blocks, _ in runs(range(param.num_blocks), weights):
            weight = weights[blocks.start]
            if weight:
                np.divide(total[:, :, blocks], weight, out=after[:, :, blocks], casting="same_kind")
            else:
                after[:, :, blocks] = before[:, :, blocks]
        return new


Array = npt.NDArray[Any]
PIECE = 2**16
"""Elements of a temporary: 0.5 MB in float64, which stays in the cache."""


def _blocked(param: Param, tensor: torch.Tensor, num_held: int) -> Array:
    """The tensor's own memory as (outer, sections, num_held, inner)."""
    array: Array = tensor.contiguous().numpy().reshape(param.blocked(num_held))
    return array


def _accumulate(total: Array, value: Array, weight: int, is_new: bool) -> None:
    """total += weight * value in float64, in place; a new total has no value yet."""
    if is_new:
        np.multiply(value, weight, out=total, dtype=np.float64)
    elif weight == 1:
        np.add(total, value, out=total)
    else:
        for part, of in zip(_pieces(total), _pieces(value), strict=True):
            np.add(part, np.multiply(of, weight, dtype=np.float64), out=part)


def _pieces(array: Array) -> Iterator[Array]:
    """Views of about PIECE elements, cut along the outer axis or, where that is 1, the inner one."""
    axis = 0 if array.shape[0] > 1 else array.ndim - 1
    step = max(1, PIECE * array.shape[axis] // array.size)
    for start in range(0, array.shape[axis], step):
        yield array[start : start + step] if axis == 0 else array[..., start : start + step]


def check_state(layout: Layout, blueprint: Blueprint, state: Mapping[str, torch.Tensor]) -> None:
    """Raises ReplyError unless names, shapes, dtypes and values are those of the blueprint's subnet."""
    try:
        layout.check_names({name: tuple(tensor.shape) for name, tensor in state.items()}, blueprint)
    except ValueError as error:
        raise ReplyError(str(error)) from error
    for name, tensor in state.items():
        if tensor.dtype != torch.float32:
            raise ReplyError(f"{name} is {tensor.dtype}, expected torch.float32")
        # A sum of finite values is finite or, rarely, overflows; testing each value takes 30 times longer.
        if not isfinite(tensor.sum()) and not bool(torch.isfinite(tensor).all()):
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

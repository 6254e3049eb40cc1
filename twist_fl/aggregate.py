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
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from twist_fl.blocks import KINDS, Layout, Param, runs
from twist_fl.blueprint import Blueprint, Debt, Division
from twist_fl.subnet import State
from twist_fl.threads import for_each, pieces

Array = npt.NDArray[Any]
Memory = dict[str, Array]
"""Half of the float64 sums of each parameter: 4 bytes an element, as the float32 parameter itself."""


SUMMED = 2**18
"""Elements summed at once: enough for several threads not to wait for each other in Python. Even."""


class ReplyError(ValueError):
    """A reply that must not be averaged: it is named and dropped, and the round goes on."""


class StreamingMean:
    """The mean of each block over its replies, in the place of the value that it replaces.

    With one reply a block holds that reply's value, its mean. From the second on, its place in `state` holds half of
    its sums, and `memory`, which may come from another round, the other half: all together take two copies of the
    state, whatever the number of replies. NumPy does the arithmetic, because it converts between float32 and float64
    in the processor's cache; torch writes a float64 copy first.
    """

    def __init__(self, layout: Layout, state: State, memory: Memory | None = None) -> None:
        self.memory: Memory = {} if memory is None else memory
        self._layout, self._state = layout, state
        self._weights = {param.name: np.zeros(param.num_blocks, np.int64) for param in layout.params}
        self._nums = {param.name: np.zeros(param.num_blocks, np.int64) for param in layout.params}

    def add(self, blueprint: Blueprint, state: Mapping[str, torch.Tensor], weight: int = 1) -> None:
        """Add one subnet's state. `state` must have passed `check_state`."""
        work = []
        for param in self._layout.params:
            weights, nums = self._weights[param.name], self._nums[param.name]
            held = self._layout.held(param, blueprint) or range(param.num_blocks)
            values = _blocked(param, state[param.name].contiguous(), len(held))
            holds = np.where(nums > 1, SUMS, weights).tolist()
            for blocks, positions in runs(held, holds):
                value = values[:, :, positions]
                work += [(sums, holds[blocks.start], value[at], weight) for at, sums in self._sums(param, blocks)]
                weights[blocks] += weight
                nums[blocks] += 1
        for_each(_accumulate, work)

    def finish(self) -> State:
        """The new state, where the old one was: means of what somebody held, the old values elsewhere."""
        work = []
        for param in self._layout.params:
            divisors = np.where(self._nums[param.name] > 1, self._weights[param.name], 1).tolist()
            for blocks, _ in runs(range(param.num_blocks), divisors):
                if divisors[blocks.start] > 1:
                    work += [(sums, divisors[blocks.start]) for _, sums in self._sums(param, blocks)]
        for_each(_divide, work)
        return self._state

    def _sums(self, param: Param, blocks: slice) -> Iterator[tuple[tuple[slice, ...], _Sums]]:
        """The blocks' sums in pieces, each with its place in an array of (outer, sections, blocks, inner)."""
        places = _blocked(param, self._state[param.name], param.num_blocks)
        *outer, inner = places.shape
        if param.name not in self.memory:
            self.memory[param.name] = np.empty((*outer, inner - inner // 2))
        places, seconds = places[:, :, blocks], self.memory[param.name][:, :, blocks]
        for at in pieces(places.shape, SUMMED):
            # A piece's inner run starts at the same element whatever the blocks, and at an even one.
            place, start = places[at], at[-1].start // 2
            half = place.shape[-1] // 2
            second = seconds[(*at[:-1], slice(start, start + place.shape[-1] - half))]
            yield at, _Sums(place, place[..., : 2 * half].view(np.float64), second)


class _Sums(NamedTuple):
    """Float64 sums of a piece: the first half in the memory of the float32 `place`, the second elsewhere."""

    place: Array
    first: Array
    second: Array

    def halves(self, of: Array) -> Iterator[tuple[Array, Array]]:
        """Both with the elements of `of` that they belong to."""
        half = self.first.shape[-1]
        yield self.first, of[..., :half]
        yield self.second, of[..., half:]


def _blocked(param: Param, tensor: torch.Tensor, num_held: int) -> Array:
    """The tensor's own memory as (outer, sections, num_held, inner)."""
    array: Array = tensor.view(param.blocked(num_held)).numpy()
    return array


SUMS = -1
"""What a block holds from its second reply on."""


def _accumulate(work: tuple[_Sums, int, Array, int]) -> None:
    """Add weight * value in float64 to what is there.

    `holds` says what that is: SUMS, the value of one reply of that weight, or with 0 nothing that counts.
    """
    sums, holds, value, weight = work
    if holds == 0:
        sums.place[...] = value
        return
    if weight > 1:
        value = np.multiply(value, weight, dtype=np.float64)
    if holds == SUMS:
        for half, part in sums.halves(value):
            np.add(half, part, out=half)
    else:
        for half, part in sums.halves(np.multiply(sums.place, holds, dtype=np.float64) + value):
            half[...] = part


def _divide(work: tuple[_Sums, int]) -> None:
    """The mean, in place of the sums. A factor costs less than a division and changes at most float64's last bits."""
    sums, weight = work
    half = sums.first.shape[-1]
    first, second = sums.first * (1 / weight), sums.second * (1 / weight)
    sums.place[..., :half] = first
    sums.place[..., half:] = second


def check_state(layout: Layout, blueprint: Blueprint, state: Mapping[str, torch.Tensor]) -> None:
    """Raises ReplyError unless names, shapes, dtypes and values are those of the blueprint's subnet."""
    try:
        layout.check_names({name: tuple(tensor.shape) for name, tensor in state.items()}, blueprint)
    except ValueError as error:
        raise ReplyError(str(error)) from error
    for name, tensor in state.items():
        if tensor.dtype != torch.float32:
            raise ReplyError(f"{name} is {tensor.dtype}, expected torch.float32")
    wrong: set[str] = set()

    def check(work: tuple[str, torch.Tensor]) -> None:
        name, part = work
        # A sum of finite values is finite or, rarely, overflows; testing each value takes 30 times longer.
        if not isfinite(part.sum()) and not bool(torch.isfinite(part).all()):
            wrong.add(name)

    for_each(check, [(name, tensor[at]) for name, tensor in state.items() for at in pieces(tensor.shape)])
    if wrong:
        raise ReplyError(f"{next(name for name in state if name in wrong)} has values that are not finite")


def coverage_debt(layout: Layout, division: Division, answered: list[Blueprint]) -> Debt:
    """The divided blocks that no blueprint in `answered` holds."""
    debt = set()
    for i, kind in enumerate(KINDS):
        if division.divides(kind):
            for layer in division.layers(layout.num_layers):
                held = {block for blueprint in answered for block in blueprint.held(kind, layer)}
                debt |= {(kind, layer, int(block)) for block in np.setdiff1d(range(layout.num_blocks[i]), list(held))}
    return frozenset(debt)

"""The streaming mean over holders, with checks and coverage debt (paper, section 3.3).

The law: the new value of an element is the weighted mean over the replies that held it; an element that
nobody held keeps the server's value. One formula covers the paper's two cases (shared: mean of S; disjoint
block: copy). Sums are float64: identical replies are a fixed point bit for bit, and a reply's arrival time
does not matter as long as an element's values lie within 2^29 of one another (float64's 53 bits against
float32's 24), which weights of one model do. Memory does not grow with the number of replies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from twist_fl.blueprint.architectures import KINDS
from twist_fl.blueprint.blocks import Layout, Param, runs
from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.blueprint.division import Debt, Division
from twist_fl.model.subnet import State
from twist_fl.system.errors import ConfigError
from twist_fl.system.plugins import RULE
from twist_fl.system.threads import PIECE, for_each, pieces, ranges

Array = npt.NDArray[Any]
Memory = dict[str, Array]
"""Half of the float64 sums of each parameter: 4 bytes an element, as the float32 parameter itself."""


class ReplyError(ValueError):
    """A reply that must not be averaged: it is named and dropped, and the round goes on."""


@runtime_checkable
class Aggregator(Protocol):
    """What a rule makes for one round."""

    def add(
        self,
        blueprint: Blueprint,
        state: Mapping[str, torch.Tensor],
        weight: int,
        given: Blueprint | None,
        lasts: bool,
    ) -> None:
        """Count in the blocks of `blueprint`; see `StreamingMean.add`."""

    def held(self) -> Mapping[str, npt.NDArray[np.bool_]]:
        """For each parameter, the blocks that some reply held; asked after `finish`."""

    def finish(self) -> State:
        """The new state."""


Rule = Callable[[Layout, State, Memory], Aggregator]
"""Of the model's layout, the server's values, which are the rule's to change, and a dictionary for large arrays, which
the next round's aggregator is given as this one leaves it. It is in no checkpoint: what is in it must not matter."""


def new_aggregator(rule: str, layout: Layout, state: State, memory: Memory) -> Aggregator:
    """What the rule of that name makes. Raises ConfigError for what cannot aggregate."""
    begun = RULE.find(rule)(layout, state, memory)
    if not isinstance(begun, Aggregator):
        raise ConfigError(f"aggregate.rule={rule!r} gave {begun!r}, expected an object with add, held and finish")
    return begun


class StreamingMean:
    """The mean of each block over its replies, in the place of the value that it replaces.

    A reply goes into the sums at once, or waits for `finish` if its own memory lasts until then: one pass over all
    that wait moves a third of the bytes and keeps no sums. From the second reply on that does not wait, a block's
    place in `state` holds half of its sums, and `memory`, which may come from another round, the other half: all
    together take two copies of the state, whatever the number of replies.
    """

    def __init__(self, layout: Layout, state: State, memory: Memory | None = None) -> None:
        self.memory: Memory = {} if memory is None else memory
        self._layout, self._state = layout, state
        self._waiting: list[HeldReply] = []
        self._weights = {param.name: np.zeros(param.num_blocks, np.int64) for param in layout.params}
        self._nums = {param.name: np.zeros(param.num_blocks, np.int64) for param in layout.params}

    def add(
        self,
        blueprint: Blueprint,
        state: Mapping[str, torch.Tensor],
        weight: int = 1,
        given: Blueprint | None = None,
        lasts: bool = False,
    ) -> None:
        """Count in the blocks of `blueprint`. `state` must have passed `check_state`.

        `given` is what `state` holds, if that is more. With `lasts`, nobody changes `state` before `finish`.
        """
        self._waiting.append(HeldReply(blueprint, given or blueprint, state, weight))
        if not lasts:
            self._sum_up(last=False)

    def held(self) -> dict[str, npt.NDArray[np.bool_]]:
        """For each parameter, the blocks that some reply held; complete after `finish`."""
        return {name: nums > 0 for name, nums in self._nums.items()}

    def finish(self) -> State:
        """The new state, where the old one was: means of what somebody held, the old values elsewhere."""
        self._sum_up(last=True)
        return self._state

    def _sum_up(self, last: bool) -> None:
        """Bring the replies that wait into the sums; with `last`, write the means."""
        for_each(_Work.do, [work for param in self._layout.params for work in self._work(param, last)])
        self._waiting = []

    def _work(self, param: Param, last: bool) -> Iterator[_Work]:
        """For each run of blocks that are in the like sums and in the same replies that wait."""
        weights, nums, every = self._weights[param.name], self._nums[param.name], range(param.num_blocks)
        waiting = [(reply.weight, *reply.of(self._layout, param)) for reply in self._waiting]
        tags = [(int(weights[b]), int(nums[b]), *(shifts.get(b) for *_, shifts in waiting)) for b in every]
        for blocks, _ in runs(every, tags):
            weight, num, *found = tags[blocks.start]
            parts = [
                (values[:, :, blocks.start + shift : blocks.stop + shift], part_weight)
                for (part_weight, values, _), shift in zip(waiting, found, strict=True)
                if shift is not None
            ]
            nums[blocks] += len(parts)
            weights[blocks] += sum(part_weight for _, part_weight in parts)
            summed, divisor = num > 1, int(weights[blocks.start]) if last else None
            if parts or (last and summed):
                for at, place, sums in self._places(param, blocks, summed or (not last and num + len(parts) > 1)):
                    yield _Work(place, sums, SUMS if summed else weight, [(v[at], w) for v, w in parts], divisor)

    def _places(
        self, param: Param, blocks: slice, with_sums: bool
    ) -> Iterator[tuple[tuple[slice, ...], Array, list[tuple[Array, slice]]]]:
        """The blocks in pieces: where in an array of (outer, sections, blocks, inner), their values, their sums."""
        places = blocked(param, self._state[param.name], param.num_blocks)
        *outer, inner = places.shape
        if with_sums and param.name not in self.memory:
            self.memory[param.name] = np.empty((*outer, inner - inner // 2))
        for at in pieces(places[:, :, blocks].shape, PIECE):
            # A piece's inner run starts at the same element whatever the blocks, and at an even one, as PIECE is even.
            place, start, sums = places[:, :, blocks][at], at[-1].start // 2, []
            if with_sums:
                half = place.shape[-1] // 2
                second = self.memory[param.name][:, :, blocks][*at[:-1], start : start + place.shape[-1] - half]
                sums = [(place[..., : 2 * half].view(np.float64), slice(half)), (second, slice(half, None))]
            yield at, place, sums


@dataclass(frozen=True)
class HeldReply:
    blueprint: Blueprint
    given: Blueprint
    state: Mapping[str, torch.Tensor]
    weight: int

    def of(self, layout: Layout, param: Param) -> tuple[Array, dict[int, int]]:
        """The parameter by blocks, and how far each that counts lies from its place in the full model."""
        every = range(param.num_blocks)
        given, counts = layout.held(param, self.given) or every, layout.held(param, self.blueprint) or every
        values = blocked(param, self.state[param.name].contiguous(), len(given))
        return values, _shifts(tuple(given), tuple(counts))


@lru_cache(maxsize=4096)  # the parameters of a layer have the same
def _shifts(given: tuple[int, ...], counts: tuple[int, ...]) -> dict[int, int]:
    return {block: position - block for position, block in enumerate(given) if block in counts}


SUMS = -1
"""What a block holds from its second reply on."""


class _Work(NamedTuple):
    """A piece of some blocks, and the pieces of replies that go into it."""

    place: Array
    sums: list[tuple[Array, slice]]
    """In float64, with the part of the last axis that each is of: the first half in the memory of `place`."""
    holds: int
    """SUMS; or `place` has the value of one reply of this weight, or with 0 nothing that counts."""
    parts: list[tuple[Array, int]]
    divisor: int | None
    """The weight of all, if it is the mean that is wanted, and not sums."""

    def do(self) -> None:
        if not self.holds and len(self.parts) == 1:
            self.place[...] = self.parts[0][0]  # its mean
            return
        if self.holds == SUMS:
            totals = self.sums
            for half, at in totals:
                for value, weight in self.parts:
                    np.add(half, _weighted(value[..., at], weight), out=half)
        else:
            values = [(self.place, self.holds)] * bool(self.holds) + self.parts
            (one, other), rest = (_weighted(*value) for value in values[:2]), values[2:]
            total = np.add(one, other, dtype=np.float64)
            for more in rest:
                np.add(total, _weighted(*more), out=total)
            totals = [(total, slice(None))]
            if self.divisor is None:
                for half, at in self.sums:
                    half[...] = total[..., at]
        if self.divisor is not None:
            for half, at in totals:
                # A factor costs less than a division, and changes at most float64's last bits.
                np.multiply(half, 1 / self.divisor, out=self.place[..., at], casting="same_kind")


def _weighted(value: Array, weight: int) -> Array:
    """Exact, in float64 if that is needed."""
    return value if weight == 1 else np.multiply(value, weight, dtype=np.float64)


def blocked(param: Param, tensor: torch.Tensor, num_held: int) -> Array:
    """The tensor's own memory as (outer, sections, num_held, inner)."""
    array: Array = tensor.view(param.blocked(num_held)).numpy()
    return array


LARGEST = 1e9
"""Magnitude of a parameter, gradient or moment that still counts: far above what training reaches, and far below what
overflows float32 in the next worker's forward pass."""


def check_state(
    layout: Layout,
    blueprint: Blueprint,
    state: Mapping[str, torch.Tensor],
    least: float = -LARGEST,
    reach: Mapping[str, float] | None = None,
) -> None:
    """Raises ReplyError unless names, shapes, dtypes and values are those of the blueprint's subnet.

    `least`: 0 for a mean of squares. `reach`: for each name the largest magnitude that counts, if below LARGEST.
    """
    try:
        layout.check_names({name: tuple(tensor.shape) for name, tensor in state.items()}, blueprint)
    except ValueError as error:
        raise ReplyError(str(error)) from error
    for name, tensor in state.items():
        if tensor.dtype != torch.float32:
            raise ReplyError(f"{name} is {tensor.dtype}, expected torch.float32")
    for name, extremes in ranges(state).items():
        if not all(map(isfinite, extremes)):
            raise ReplyError(f"{name} has values that are not finite")
        most = min(LARGEST, (reach or {}).get(name, LARGEST))
        for value in extremes:
            if not (low := max(least, -most)) <= value <= most:
                raise ReplyError(f"{name} has a value of {value:g}, expected {low:g} to {most:g}")


def coverage_debt(layout: Layout, division: Division, answered: list[Blueprint]) -> Debt:
    """The divided blocks that no blueprint in `answered` holds."""
    debt = set()
    for i, kind in enumerate(KINDS):
        if division.divides(kind):
            for layer in division.layers(layout.num_layers):
                held = {block for blueprint in answered for block in blueprint.held(kind, layer)}
                debt |= {(kind, layer, int(block)) for block in np.setdiff1d(range(layout.num_blocks[i]), list(held))}
    return frozenset(debt)

"""Passes over large arrays by several threads: NumPy and torch let go of the interpreter while they copy and add.

No barrier within a pass: whoever is free takes the next piece, so a core that others keep busy delays one piece. (A
torch operation with threads of its own waits for its slowest thread, each time.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from itertools import product
from math import prod
from typing import TypeVar

import numpy as np
import torch

from twist_fl.system.cores import usable_cores

Item = TypeVar("Item")

PIECE = 2**18
"""Elements of a piece: Python spends some microseconds on each, one thread at a time, and memory 50. Four threads sum
smaller pieces more slowly, and a thread by itself no faster."""

_num_threads: ContextVar[int] = ContextVar("num_threads", default=1)
_pool: list[ThreadPoolExecutor] = []


@contextmanager
def threads(num: int) -> Iterator[None]:
    """`for_each` takes up to `num` threads (at least one, at most the usable cores) within this block."""
    before = _num_threads.set(max(1, min(num, usable_cores())))
    try:
        yield
    finally:
        _num_threads.reset(before)


def for_each(work: Callable[[Item], object], items: Iterable[Item]) -> None:
    """work(item) for every item, in any order, by the caller and helpers. Raises what `work` raised first."""
    left = iter(list(items))  # a list's iterator gives each item to one thread only

    def take() -> None:
        for item in left:
            work(item)

    helpers: list[Future[None]] = [_helpers().submit(take) for _ in range(_num_threads.get() - 1)]
    try:
        take()
    finally:
        for helper in helpers:
            helper.result()


def _helpers() -> ThreadPoolExecutor:
    if not _pool:
        # One torch thread in each: it is the pieces that are spread over the cores.
        _pool.append(ThreadPoolExecutor(usable_cores(), "twist_fl", initializer=torch.set_num_threads, initargs=(1,)))
    return _pool[0]


@lru_cache(maxsize=4096)  # a model has few shapes, and each round asks for them many times
def pieces(shape: tuple[int, ...], size: int = PIECE) -> tuple[tuple[slice, ...], ...]:
    """Indices that cut an array of `shape` into pieces of at most `size` elements, the last axis last.

    That axis is cut at multiples of `size`, whatever the other axes are.
    """
    steps: list[int] = []
    for length in reversed(shape):
        steps.insert(0, max(1, min(length, size // prod(steps))))
    axes = zip(shape, steps, strict=True)
    return tuple(product(*([slice(i, min(i + step, length)) for i in range(0, length, step)] for length, step in axes)))


def ranges(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """The least and the largest value of each tensor, both NaN if one of its values is; at the speed of memory."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in tensors}

    def look(work: tuple[str, torch.Tensor]) -> None:
        name, part = work
        least, most = part.aminmax()
        found[name].append((float(least), float(most)))

    for_each(look, [(name, tensor[at]) for name, tensor in tensors.items() for at in pieces(tuple(tensor.shape))])
    # NumPy's, other than Python's, give NaN wherever it stands.
    return {name: (float(np.min(pairs)), float(np.max(pairs))) for name, pairs in found.items()}

"""What the divided matrices see: calibration windows passed through the model layer by layer.

A layer's inputs come from layers that are pruned already; within a layer, all matrices see those of the layer before
its own pruning. Both as in the published code of SparseGPT, Wanda and Z-Pruner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby, product
from typing import Any

import numpy as np
import torch
from torch import nn

from twist_fl.blueprint.blocks import Layout, Param
from twist_fl.blueprint.division import Division
from twist_fl.data.corpus import Windows
from twist_fl.system.errors import ConfigError

Statistic = Callable[[torch.Tensor], torch.Tensor]
"""Of the inputs (N, in) of a matrix over N tokens; additive over tokens."""
Say = Callable[[str], None]
_CALIBRATION = 2
"""Purpose of the random numbers. That of `Purpose.SIZES` is 2 as well, with a round beside it."""


@dataclass(frozen=True)
class Inputs:
    """A statistic of a matrix's inputs, summed in float64 over all tokens of `num_windows` windows."""

    total: torch.Tensor
    num_windows: int


@dataclass(frozen=True)
class Matrix:
    """A linear map that is pruned by itself: a divided weight, or the q, k or v of a fused one."""

    param: Param
    input_dim: int
    num_parts: int = 1
    """Matrices that are fused within each block, as GPT-NeoX's; those of GPT-2 are the parameter's sections."""
    section: int = 0
    part: int = 0

    @property
    def name(self) -> str:
        fused = self.param.sections * self.num_parts
        return self.param.name + (f"[{self.section * self.num_parts + self.part}]" if fused > 1 else "")

    @property
    def module(self) -> str:
        return self.param.name.removesuffix(".weight")

    def take(self, weight: torch.Tensor) -> torch.Tensor:
        """This matrix, (out, in), of the full parameter `weight`."""
        found = self._view(weight).flatten(self.param.dim, self.param.dim + 1)
        return found.T if self.input_dim == 0 else found

    def put(self, matrix: torch.Tensor, weight: torch.Tensor) -> None:
        """Write `matrix` (out, in) to its place in `weight`."""
        view = self._view(weight)
        view.copy_((matrix.T if self.input_dim == 0 else matrix).reshape(view.shape))

    def _view(self, weight: torch.Tensor) -> torch.Tensor:
        """Its entries in `weight`: blocks along the divided dimension, entries of a block along the next."""
        dim, shape = self.param.dim, weight.shape
        pieces = weight.view(
            *shape[:dim], self.param.sections, self.param.num_blocks, self.num_parts, -1, *shape[dim + 1 :]
        )
        return pieces.select(dim + 2, self.part).select(dim, self.section)


def divided_matrices(layout: Layout, division: Division) -> list[Matrix]:
    """All matrices that pruning is about; biases are not.

    Blocks are the outputs of every divided matrix but the one that ends the kind, whose inputs they are: that says
    which dimension is the input's, for Conv1D (in, out) and nn.Linear (out, in) alike. A block with several times the
    outputs that the last matrix takes in is so many matrices fused.
    """
    found = []
    for param in division.params(layout):
        if param.kind is None or len(param.shape) != 2:
            continue
        last = layout.by_name[layout.outputs[param.kind].format(layer=param.layer) + ".weight"]
        if param == last:
            found.append(Matrix(param, param.dim))
            continue
        num_parts = max(1, param.width // last.width)
        parts = product(range(param.sections), range(num_parts))
        found += [Matrix(param, 1 - param.dim, num_parts, section, part) for section, part in parts]
    return found


def draw_windows(windows: Windows, num: int, seed: int) -> Windows:
    """`num` different windows, drawn by `seed`. Raises ConfigError if there are not as many."""
    if not 1 <= num <= len(windows):
        raise ConfigError(
            f"{num} calibration windows are asked for: the training split has {len(windows)}, choose 1 to that many"
        )
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, _CALIBRATION))))
    return np.asarray(windows[np.sort(rng.choice(len(windows), num, replace=False))])


@torch.no_grad()
def layer_inputs(
    model: nn.Module,
    matrices: Sequence[Matrix],
    windows: Windows,
    batch_size: int,
    statistic: Statistic,
) -> Iterator[tuple[list[Matrix], dict[str, Inputs]]]:
    """Each divided layer's matrices in turn, with the inputs of each by its module's name.

    The next layer's inputs are computed only when it is asked for: what was done to this layer's weights meanwhile is
    in them. The hidden states of all windows are kept, once; batches of `batch_size` windows bound the rest.
    """
    model.eval()
    by_layer = [(layer, list(group)) for layer, group in groupby(matrices, lambda matrix: matrix.param.layer)]
    calls: list[_Call] = []
    for layer, group in by_layer:
        stack = group[0].module.partition(f".{layer}.")[0]
        module = model.get_submodule(f"{stack}.{layer}")
        if calls:
            for call in calls:
                call.pass_on()
                call.module = module
        else:
            calls = _calls_of(model, module, windows, batch_size)
        names = {matrix.module for matrix in group}
        yield group, _gather(model, names, calls, statistic)


@dataclass
class _Call:
    """One batch on its way: the next layer, and what the model calls it with."""

    module: nn.Module
    hidden: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def output(self) -> torch.Tensor:
        out = self.module(self.hidden, *self.args, **self.kwargs)
        hidden: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return hidden

    def pass_on(self) -> None:
        self.hidden = self.output()


class _ReachedError(Exception):
    """The layer that calibration starts at has been called: the rest of the model need not run."""


def _calls_of(model: nn.Module, module: nn.Module, windows: Windows, batch_size: int) -> list[_Call]:
    """How the model calls `module`, for every batch of the windows."""
    calls: list[_Call] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(_Call(module, args[0], args[1:], kwargs))
        raise _ReachedError

    device = next(model.parameters()).device
    with module.register_forward_pre_hook(keep, with_kwargs=True):
        for start in range(0, len(windows), batch_size):
            batch = torch.tensor(windows[start : start + batch_size], dtype=torch.int64, device=device)  # (B, T)
            try:
                model(batch, use_cache=False)
            except _ReachedError:
                continue
    return calls


def _gather(model: nn.Module, names: set[str], calls: Sequence[_Call], statistic: Statistic) -> dict[str, Inputs]:
    totals: dict[str, torch.Tensor] = {}

    def add(name: str, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        found = statistic(args[0].flatten(0, -2)).double()
        totals[name] = totals[name].add_(found) if name in totals else found

    with ExitStack() as hooks:
        for name in sorted(names):
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(partial(add, name)))
        for call in calls:
            call.output()
    for name, total in totals.items():
        if not total.isfinite().all():
            raise ConfigError(f"the inputs of {name} are not finite: the model has diverged, nothing can be calibrated")
    num_windows = sum(len(call.hidden) for call in calls)
    return {name: Inputs(total, num_windows) for name, total in totals.items()}

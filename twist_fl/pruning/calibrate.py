"""What the divided matrices see: calibration windows passed through the model layer by layer.

A layer's inputs come from layers that are pruned already; within a layer, all matrices see those of the layer before
its own pruning. Both as in the published code of SparseGPT, Wanda and Z-Pruner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import nn

from twist_fl.blocks import Layout, Param
from twist_fl.blueprint import Division
from twist_fl.config import ConfigError
from twist_fl.data import Windows

Statistic = Callable[[torch.Tensor], torch.Tensor]
"""Of the inputs (N, in) of a matrix over N tokens; additive over tokens."""
Say = Callable[[str], None]
_CALIBRATION = 2
"""Purpose of the random numbers; 0 and 1 are the blueprints'."""


@dataclass(frozen=True)
class Inputs:
    """A statistic of a matrix's inputs, summed in float64 over all tokens of `num_windows` windows."""

    total: torch.Tensor
    num_windows: int


@dataclass(frozen=True)
class Matrix:
    """A linear map that is pruned by itself: a divided weight, or one section (q, k or v) of a fused one."""

    param: Param
    section: int
    input_dim: int

    @property
    def name(self) -> str:
        return self.param.name + (f"[{self.section}]" if self.param.sections > 1 else "")

    @property
    def module(self) -> str:
        return self.param.name.removesuffix(".weight")

    def view(self, weight: torch.Tensor) -> torch.Tensor:
        """The part of the full parameter `weight` that is this matrix, (out, in), without a copy."""
        length = weight.shape[self.param.dim] // self.param.sections
        part = weight.narrow(self.param.dim, self.section * length, length)
        return part.T if self.input_dim == 0 else part


def divided_params(layout: Layout, division: Division) -> list[Param]:
    """The parameters that the division divides, in the model's order."""
    layers = division.layers(layout.num_layers)
    return [p for p in layout.params if p.kind is not None and division.divides(p.kind) and p.layer in layers]


def divided_matrices(layout: Layout, division: Division) -> list[Matrix]:
    """All matrices that pruning is about; biases are not.

    Blocks are the outputs of every divided matrix but the one that ends the kind, whose inputs they are: that says
    which dimension is the input's, for Conv1D (in, out) and nn.Linear (out, in) alike.
    """
    found = []
    for param in divided_params(layout, division):
        if param.kind is None or len(param.shape) != 2:
            continue
        ends = param.name == layout.outputs[param.kind].format(layer=param.layer) + ".weight"
        assert not (ends and param.sections > 1), f"{param.name}: sections along the inputs are not known"
        input_dim = param.dim if ends else 1 - param.dim
        found += [Matrix(param, section, input_dim) for section in range(param.sections)]
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

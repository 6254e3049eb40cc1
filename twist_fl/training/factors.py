"""Adam's second moments as the means of their rows and columns, and back (train.optimizer_state=factored).

Of a subnet or the whole model, as each block has its own: how many there are, a tensor's size says. Exact, to rounding,
where a block's moments are the product of a column and a row, and so if they are all equal or all zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from twist_fl.blueprint.blocks import Layout, Param
from twist_fl.blueprint.moments import SQUARES, block_width, factors_of
from twist_fl.training.interval import Moments


def to_factors(layout: Layout, moments: Moments) -> Moments:
    squares = moments.values[SQUARES]
    factors = {name: value for param in layout.params for name, value in _factor(param, squares[param.name])}
    return Moments(moments.step, {SQUARES: factors})


def from_factors(layout: Layout, moments: Moments, device: str) -> Moments:
    """Second moments on `device`, and no first ones."""
    factors = {name: value.to(device) for name, value in moments.values[SQUARES].items()}
    return Moments(moments.step, {SQUARES: {param.name: _product(param, factors) for param in layout.params}})


def _factor(param: Param, squares: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    names = [factor.name for factor in factors_of(param)]
    if len(names) == 1:
        return [(param.name, squares)]
    moved = squares.movedim(param.dim, 0)
    blocks = moved.reshape(-1, block_width(param), moved.shape[1])
    return list(zip(names, (blocks.mean(2).flatten(), blocks.mean(1)), strict=True))


def _product(param: Param, factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Along x across / their mean; zeros where that is zero."""
    parts = [factors[factor.name] for factor in factors_of(param)]
    if len(parts) == 1:
        return parts[0].clone()
    along, across = parts[0].view(-1, block_width(param), 1), parts[1].unsqueeze(1)
    mean = along.mean(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (along / mean * across).flatten(0, 1).movedim(0, param.dim).contiguous()

"""Which of Adam's two moments travel with a subnet, and how: as its parameters lie, or as factors.

Factors of a matrix of squares are the means of its rows and of its columns, of each block apart (Adafactor, arXiv
1804.04235). They are made of the same blocks as the parameter, so what slices, averages, checks and counts parameters
does so with them; and as means are linear, the mean of the workers' factors is the factors of the mean.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from twist_fl.blueprint.blocks import Layout, Param

MOMENTS = FIRST, SQUARES = "exp_avg", "exp_avg_sq"
"""As torch calls them. The second is never negative."""
OUTER = {"mean": (), "momentum": ("momentum",), "nesterov": ("momentum",), "adam": MOMENTS}
"""By aggregate.optimizer, what the server keeps for it, each as large as the model."""


def moment_layouts(optimizer_state: str, layout: Layout) -> dict[str, Layout]:
    """The moments that train.optimizer_state lets travel, and what each is made of in a message and on the server."""
    match optimizer_state:
        case "server":
            return dict.fromkeys(MOMENTS, layout)
        case "factored":
            return {SQUARES: factor_layout(layout)}
        case _:
            return {}


def factor_layout(layout: Layout) -> Layout:
    return replace(layout, params=tuple(factor for param in layout.params for factor in factors_of(param)))


def factors_of(param: Param) -> tuple[Param, ...]:
    """Of a matrix: a mean for each place along the divided dimension, and of every block those across it; an undivided
    one is a block. Anything else stays as it is."""
    if len(param.shape) != 2:
        return (param,)
    size, num_parts = param.shape[param.dim], param.shape[param.dim] // block_width(param)
    along = replace(param, name=f"{param.name}/along", shape=(size,), dim=0)
    across = (num_parts, prod(param.shape) // size)
    return along, replace(param, name=f"{param.name}/across", shape=across, dim=0, width=1 if param.kind else 0)


def block_width(param: Param) -> int:
    """Places along the divided dimension that a block has in one section."""
    return param.width if param.kind else param.shape[param.dim]

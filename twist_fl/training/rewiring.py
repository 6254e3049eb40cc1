"""Network rewiring (DynaBERT, arXiv 2004.04037, section 2.1): what matters most goes into the common blocks.

A layer's neurons, or its heads, can be permuted without a change of what the model computes. So before training those
that matter most go into the blocks that every worker and every ticket holds, and the others are dealt to the other
blocks in turn, that these be alike.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from twist_fl.blueprint.architectures import KINDS
from twist_fl.blueprint.blocks import make_layout
from twist_fl.model.subnet import State
from twist_fl.training.importance import score_blocks
from twist_fl.training.job import Job


def rewire(job: Job, params: State) -> State:
    """The same function, its divided layers permuted: shapes as `params`.

    What moves is a neuron of the FFN, and of attention a key/value head with its queries. Query heads that are blocks
    while they share keys stay where they are.
    """
    layout, division = job.layout, job.division
    units = make_layout(job.model_fields, layout.sizes["d_inner"])
    scores = score_blocks(replace(job, layout=units), params, 0)
    moved = dict(params)
    for param in division.params(units):
        assert param.kind is not None and param.layer is not None and param.dim is not None
        num_blocks, num_units = (of.num_blocks[KINDS.index(param.kind)] for of in (layout, units))
        if num_units % num_blocks == 0:  # else query heads are blocks
            importance = torch.tensor(scores[param.kind, param.layer])
            order = rewired(importance, num_blocks, len(division.common_blocks(param.kind, param.layer)))
            moved[param.name] = params[param.name].index_select(param.dim, torch.tensor(param.index(order)))
    return moved


def rewired(importance: torch.Tensor, num_blocks: int, num_common: int) -> list[int]:
    """The units of a layer, `importance` (U,), in their new order: U / num_blocks of them a block.

    The first `num_common` blocks hold the most important, the others share the rest evenly.
    """
    order = importance.argsort(descending=True, stable=True).tolist()
    first, others = len(order) // num_blocks * num_common, num_blocks - num_common
    rest = order[first:]
    return [*order[:first], *(unit for block in range(others) for unit in rest[block::others])]

"""Blocks that are query heads: keys and values are shared, and every head that is held reads those of its KV head.

In training the projections of keys and values stay whole, and what they give is gathered for the heads held: plain
attention with as many KV heads. On a device each head has a copy (`Layout.own_keys`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import skip_init

from twist_fl.blueprint.blocks import Layout
from twist_fl.blueprint.blueprint import Blueprint


class SharedKeys(nn.Linear):
    """The keys, or the values, of all KV heads, gathered for the query heads held: (B, T, held x d_head)."""

    def __init__(self, inputs: int, outputs: int, bias: bool, held: int, d_head: int, device: str) -> None:
        super().__init__(inputs, outputs, bias, device=device)
        self.d_head = d_head
        self.register_buffer("read", torch.zeros(held, dtype=torch.int64, device=device), persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        every = super().forward(hidden)
        heads = every.view(*every.shape[:-1], -1, self.d_head)  # (B, T, KV heads, d_head)
        return heads.index_select(-2, self.get_buffer("read")).flatten(-2)


def share_keys(model: nn.Module, layout: Layout, device: str) -> None:
    """Make the keys and values of a model whose heads all have their own shared ones, not initialised."""
    make: Any = skip_init  # untyped in torch
    for param in layout.params:
        if param.is_shared and param.name.endswith(".weight"):
            name = param.name.removesuffix(".weight")
            own, (outputs, inputs) = model.get_submodule(name), param.shape
            assert isinstance(own, nn.Linear)
            held, bias = own.out_features // param.width, own.bias is not None
            model.set_submodule(name, make(SharedKeys, inputs, outputs, bias, held, param.width, device=device))


def read_keys(model: nn.Module, layout: Layout, blueprint: Blueprint) -> None:
    """Let the heads of `blueprint` read their own. A compiled model knows the tensor that is written to."""
    queries = layout.sizes["heads"] // layout.sizes["kv_heads"]
    for param in layout.params if queries > 1 else ():
        module = model.get_submodule(param.name.rpartition(".")[0])
        if isinstance(module, SharedKeys) and param.layer is not None:
            module.get_buffer("read").copy_(torch.tensor(blueprint.held("attn", param.layer)) // queries)


def with_copies(layout: Layout, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` in the shapes of `layout`, where each query head has its own keys and values: those it read, copied."""
    copied = dict(state)
    for param in layout.params:
        shared = state[param.name]
        if (times := param.shape[param.dim] // shared.shape[param.dim]) > 1:
            heads = shared.reshape(-1, param.width, *param.shape[1:])
            copied[param.name] = heads.repeat_interleave(times, 0).flatten(0, 1)
    return copied

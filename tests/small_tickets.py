"""Tickets small enough to export in a moment, of layers of different sizes."""

from __future__ import annotations

import re
from typing import Any

import torch

from twist_fl.blueprint.blocks import Layout, make_layout
from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.model.hf_config import config_from_dict
from twist_fl.tickets.export import Ticket, make_ticket

UNEVEN = Blueprint((4, 6), ((0, 1, 2, 3), (1, 3), (2,)), ((0, 5), (0, 1, 2, 3, 4, 5), (1, 2, 4)))
ALIKE = Blueprint((4, 6), ((0, 1), (1, 3), (2, 3)), ((0, 2, 5),) * 3)
HEADS = Blueprint((8, 6), ((0, 1, 2, 3, 4, 5, 6, 7), (1, 2, 3, 7), (5,)), UNEVEN.ffn)
"""Blocks of attention are query heads."""
VOCAB = 320
"""Some more than the tokenizer's, as checkpoints have."""


def fields(model_type: str, **others: Any) -> dict[str, Any]:
    """Three layers of 4 attention blocks and 6 FFN blocks of 8 neurons."""
    ends = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": VOCAB}
    if model_type == "gpt2":
        sizes = {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_inner": 48, "n_positions": 64}
        return config_from_dict({"model_type": "gpt2", **sizes, **ends, **others}).to_dict()
    sizes = {"num_hidden_layers": 3, "hidden_size": 32, "max_position_embeddings": 64, "intermediate_size": 48}
    if model_type == "gpt_neox":
        sizes |= {"num_attention_heads": 4}
    else:
        sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    return config_from_dict({"model_type": model_type, **sizes, **ends, **others}).to_dict()


def ticket(model_type: str = "llama", blueprint: Blueprint = UNEVEN, **others: Any) -> Ticket:
    """Large random values, so that no mistake is small; the scale is folded in."""
    config = fields(model_type, **others)
    layout = make_layout(config, 6, "heads" if blueprint.num_blocks[0] == 8 else "kv_groups")
    return make_ticket(layout, _state(layout), config, blueprint, "sqrt")


def _state(layout: Layout) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    is_norm = re.compile(r"(\.ln_|norm).*weight$")
    return {
        param.name: 0.3 * torch.randn(param.shape, generator=generator) + bool(is_norm.search(param.name))
        for param in layout.params
    }

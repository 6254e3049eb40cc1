"""What transformers must know of an architecture, from its block table."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from twist_fl.blueprint.architectures import ARCHITECTURES, KINDS, Blocks
from twist_fl.model import modeling_subnet
from twist_fl.model.modeling_subnet import Family

_LAYER = ".{layer}."


@cache
def family_of(model_type: str) -> Family:
    architecture, config = ARCHITECTURES[model_type], CONFIG_MAPPING[model_type]
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config]
    layers, found = "", {kind: dict[str, None]() for kind in KINDS}
    for row in architecture.rows:
        for blocks in row.dims:
            if isinstance(blocks, Blocks):
                layers, _, name = row.name.partition(_LAYER)
                found[blocks.kind][name.rpartition(".")[0]] = None
    for kind in KINDS:  # the output's last
        output = architecture.outputs[kind].partition(_LAYER)[2]
        found[kind] = {**{name: None for name in found[kind] if name != output}, output: None}
    return Family(
        model_type,
        model.__name__,
        config.__name__,
        layers,
        tuple(found["attn"]),
        tuple(found["ffn"]),
        architecture.since,
    )


def model_class(model_type: str) -> Any:
    """The class of its subnets."""
    return modeling_subnet.model_class(family_of(model_type))


def shipped_code(model_type: str) -> str:
    """The file that a ticket carries: the class of its own architecture, and no other."""
    code = Path(modeling_subnet.__file__).read_text(encoding="utf-8")
    return f"{code}\n\nFAMILY = {family_of(model_type)!r}\n"

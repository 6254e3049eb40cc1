"""What transformers must know of an architecture, from its block table."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from twist_fl.blueprint.architectures import KINDS, Blocks, architecture_of
from twist_fl.blueprint.blocks import Layout
from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.model import modeling_subnet
from twist_fl.model.modeling_subnet import Family
from twist_fl.system.errors import ConfigError

_LAYER = ".{layer}."


@cache
def family_of(model_type: str) -> Family:
    architecture, config = architecture_of({"model_type": model_type}), CONFIG_MAPPING[model_type]
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


def check_architecture(config: PreTrainedConfig, layout: Layout, ticket: Blueprint) -> None:
    """Raises ConfigError unless the model of `config`, and its subnet `ticket`, have the block table's parameters."""
    own, held = layout.own_keys(ticket)
    sized = type(config)(**subnet_fields(config.to_dict(), own, held))
    try:
        with torch.device("meta"):
            whole: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
            subnet = model_class(config.model_type)(sized)
        layout.check_names({name: tuple(each.shape) for name, each in whole.named_parameters()})
        own.check_names({name: tuple(each.shape) for name, each in subnet.named_parameters()}, held)
    except (AttributeError, KeyError, ValueError) as error:
        raise ConfigError(f"the block table of {config.model_type!r} does not fit its model: {error}") from error


def subnet_fields(fields: Mapping[str, Any], layout: Layout, blueprint: Blueprint) -> dict[str, Any]:
    """The config of a subnet in the classes of `modeling_subnet.py`, of blocks with `Layout.own_keys`."""
    heads, ffn_blocks = blueprint.shape
    sizes = {key: layout.sizes["kv_heads"] for key in ("num_key_value_heads",) if key in fields}
    neurons = [blocks * layout.sizes["ffn_width"] for blocks in ffn_blocks]
    return {**fields, **sizes, "heads_per_layer": list(heads), "neurons_per_layer": neurons}


def shipped_code(model_type: str) -> str:
    """The file that a ticket carries: the class of its own architecture, and no other."""
    code = Path(modeling_subnet.__file__).read_text(encoding="utf-8")
    return f"{code}\n\nFAMILY = {family_of(model_type)!r}\n"

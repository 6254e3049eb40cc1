"""A ticket for transformers: as small as it is, with the class it needs beside it, or for a class that all have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM

from twist_fl.blueprint.architectures import architecture_of
from twist_fl.blueprint.blocks import Layout, make_layout
from twist_fl.model.hf_config import config_from_dict
from twist_fl.model.saved import open_model
from twist_fl.model.subnet import State, copy_all, take_blocks
from twist_fl.tickets.checking import Probe, answers, check_dtype, distributions
from twist_fl.tickets.export import Ticket, in_dtype, saved_config, write_json, write_shared, write_ticket

DTYPES = ("float32", "bfloat16", "float16")
_SIZES = ("heads_per_layer", "neurons_per_layer")


def compact(ticket: Ticket, folder: Path, tokenizer_folder: Path | None, dtype: str) -> str:
    """AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) opens it, at its own size."""
    check_dtype("compact", dtype, DTYPES)
    write_ticket(in_dtype(ticket, dtype), folder, tokenizer_folder)
    return f"transformers: {_checked(ticket, folder, dtype)}"


def plain(ticket: Ticket, folder: Path, tokenizer_folder: Path | None, dtype: str) -> str:
    """AutoModelForCausalLM.from_pretrained(folder) opens it, and whatever else reads models of its architecture.

    Of the ticket's size where that class can be: all layers alike, and heads not tied to the width of the model. Else
    the full model with zeros where the ticket has no blocks: the same function, but no smaller and no faster.
    """
    check_dtype("hf", dtype, DTYPES)
    layout = make_layout(ticket.model_config, ticket.blueprint.num_blocks[1])
    fields = _narrow_config(ticket, layout)
    fits = fields is not None
    if fields is None:
        fields = {key: value for key, value in ticket.model_config.items() if key not in _SIZES}
    params = {
        name: tensor.to(getattr(torch, dtype))
        for name, tensor in (ticket.params if fits else _with_zeros(ticket, layout)).items()
    }
    config = saved_config(fields, params)
    write_json(config, folder / "config.json")
    write_shared(fields, params, folder, tokenizer_folder)
    words = f"transformers' {config['architectures'][0]}: {_checked(ticket, folder, dtype)}"
    if fits:
        return words
    full, small = (sum(each.numel() for each in state.values()) for state in (params, ticket.params))
    return (
        f"{words}; of full size, with zeros for the blocks left out, since that class has no layers as the ticket's: "
        f"{full:,} numbers for {small:,}, no faster than the full model"
    )


def _narrow_config(ticket: Ticket, layout: Layout) -> dict[str, Any] | None:
    """Of a stock model with just the ticket's parameters; None if there is none."""
    (heads, *others), (neurons, *more) = (ticket.model_config[name] for name in _SIZES)
    if {*others} - {heads} or {*more} - {neurons}:
        return None
    keys, sizes = architecture_of(ticket.model_config).keys, layout.sizes
    fields = {key: value for key, value in ticket.model_config.items() if key not in _SIZES}
    narrow = {
        "n_head": heads * (sizes["d_query"] // sizes["d_head"]),
        "n_kv_head": heads,
        "n_inner": neurons,
        "d_head": sizes["d_head"],
    }
    fields |= {keys[name]: size for name, size in narrow.items() if name in keys}
    if "n_kv_head" in keys:  # a family whose heads need not fill the width, even where its config does not name theirs
        fields |= {"head_dim": sizes["d_head"]}
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config_from_dict(fields))  # type: ignore[no-untyped-call]
    except (ValueError, StrictDataclassError):  # its heads must divide its width
        return None
    shapes = {name: each.shape for name, each in model.named_parameters()}
    return fields if shapes == {name: each.shape for name, each in ticket.params.items()} else None


def _with_zeros(ticket: Ticket, layout: Layout) -> State:
    full = dict(ticket.params)
    for param in layout.params:
        if (held := layout.held(param, ticket.blueprint)) is not None:
            full[param.name] = torch.zeros(param.shape, dtype=ticket.params[param.name].dtype)
            places = take_blocks(param, held, full[param.name], ticket.params[param.name])
            copy_all((small, whole) for whole, small in places)
    return full


def _checked(ticket: Ticket, folder: Path, dtype: str) -> str:
    probe = Probe(ticket)
    return probe.compare(
        answers(distributions(open_model(folder), probe.tokens), probe.tokens), exact=dtype == "float32"
    )

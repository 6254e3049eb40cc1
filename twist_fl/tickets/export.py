"""Device limits -> plan -> ticket -> a folder that `transformers` loads by itself (spec, section 10)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf
from pathlib import Path
from typing import Any

import torch

from twist_fl.blueprint.architectures import KINDS, architecture_of
from twist_fl.blueprint.blocks import Layout
from twist_fl.blueprint.blueprint import Blueprint, Scale
from twist_fl.blueprint.division import Division
from twist_fl.blueprint.drawing import draw_ticket
from twist_fl.config.devices import DeviceConfig, TicketDtype
from twist_fl.config.sizes import TicketSize, ticket_sizes
from twist_fl.data.tokenizer import copy_tokenizer
from twist_fl.model.hf_config import padding_token
from twist_fl.model.shared_keys import with_copies
from twist_fl.model.subnet import State, fold_into, slice_state
from twist_fl.model.subnet_classes import family_of, shipped_code, subnet_fields
from twist_fl.system.errors import ConfigError
from twist_fl.system.files import new_folder, save_tensors
from twist_fl.system.units import size_label

MODEL_CODE = "modeling_subnet.py"


def ticket_memory_bytes(
    layout: Layout, blueprint: Blueprint, context: int | None = None, dtype: TicketDtype = "float32"
) -> int:
    """Bytes a device needs to generate with this subnet: weights, and the KV cache of `context` tokens (the model's).

    Bytes a number x (num_params + sum over layers of context x 2 (key, value) x held attention blocks x d_head). Not
    counted: the runtime (Python, torch), activations and the allocator's slack; `edge_client.EdgeReport` has the
    measured peak.
    """
    layout, blueprint = layout.own_keys(blueprint)
    kv_values = 2 * layout.sizes["d_head"] * sum(len(held) for held in blueprint.attn)
    numbers = layout.num_params(blueprint) + (context or layout.sizes["positions"]) * kv_values
    width: int = getattr(torch, dtype).itemsize
    return numbers * width


def plan_tickets(
    layout: Layout, division: Division, device: DeviceConfig, seed: int, draw: int = 0
) -> dict[TicketSize, Blueprint]:
    """A random ticket of every size that meets the device's `memory_mb` and `kappa`, by size, the largest first.

    The full blueprint leads if the full model does. Its latency only the device can tell: see `next_sizes`. Raises
    ConfigError if not even the smallest size meets both.
    """
    sizes = ticket_sizes(layout, division)
    memory_mb = inf if device.memory_mb is None else device.memory_mb
    kappa = 1.0 if device.kappa is None else device.kappa
    if float(sizes[0].share) > kappa:
        raise ConfigError(
            f"deploy.devices {device.name!r}: kappa={kappa:g} is too little; the smallest possible ticket holds "
            f"{size_label(sizes[0].row)} of a layer: use at least kappa={_rounded_up(float(sizes[0].share))}"
        )
    tickets = {
        size: draw_ticket(layout, division, size.num_sub, seed, draw)
        for size in reversed(sizes)
        if float(size.share) <= kappa
    }
    needed = {
        size: ticket_memory_bytes(layout, ticket, device.context, device.dtype) for size, ticket in tickets.items()
    }
    fitting = {size: ticket for size, ticket in tickets.items() if needed[size] <= memory_mb * 1e6}
    if not fitting:
        least_mb = _rounded_up(needed[sizes[0]] / 1e6)
        raise ConfigError(
            f"deploy.devices {device.name!r}: memory_mb={memory_mb:g} is too little; the smallest possible ticket, "
            f"{size_label(sizes[0].row)}, needs {least_mb} MB with its KV cache: use at least memory_mb={least_mb}"
        )
    return fitting


def limit_of_size(layout: Layout, division: Division, device: DeviceConfig, size: TicketSize) -> str | None:
    """Which limit keeps the device from a ticket one size larger than `size`, the plan's largest; None of the whole."""
    larger = [other for other in ticket_sizes(layout, division) if sum(other.num_sub) > sum(size.num_sub)]
    if not larger:
        return None
    return "kappa" if device.kappa is not None and float(larger[0].share) > device.kappa else "memory"


def _rounded_up(value: float) -> float:
    """To three decimals, so that the number named is enough."""
    return ceil(value * 1e3) / 1e3


def next_sizes(sizes: Sequence[TicketSize], took: float, limit: float) -> list[TicketSize]:
    """Sizes left to try when the first of `sizes`, largest first, `took` longer a token than `limit`.

    Those at most limit / took of it; the smallest if there is none; none if that was it. Where a token takes a constant
    time and one in proportion to the size, nothing left out would be fast enough: the first that is, is the largest.
    """
    largest, *smaller = sizes
    return [size for size in smaller if size.share * took <= largest.share * limit] or smaller[-1:]


@dataclass(frozen=True, eq=False)
class Ticket:
    """A subnet ready to ship: dense weights with the scale folded in, and the config of its model class."""

    blueprint: Blueprint
    params: State
    model_config: dict[str, Any]
    """Plain JSON: what its class in MODEL_CODE needs, `heads_per_layer` and `neurons_per_layer` included."""
    digest: str

    @property
    def config_json(self) -> str:
        return json.dumps(self.model_config, sort_keys=True)

    @property
    def num_params(self) -> int:
        return sum(tensor.numel() for tensor in self.params.values())


def make_ticket(
    layout: Layout,
    state: Mapping[str, torch.Tensor],
    model_config: Mapping[str, Any],
    blueprint: Blueprint,
    scale: Scale,
) -> Ticket:
    """Slice `state` (full) by `blueprint`, fold the scale in, and hash the result.

    Of blocks that are query heads it is a ticket of `Layout.own_keys`: with KV groups, or a copy for each head.
    """
    own, held = layout.own_keys(blueprint)
    return fold_ticket(own, slice_state(own, with_copies(own, state), held), model_config, held, scale)


def fold_ticket(
    own: Layout,
    sliced: Mapping[str, torch.Tensor],
    model_config: Mapping[str, Any],
    held: Blueprint,
    scale: Scale,
) -> Ticket:
    """A ticket of the blocks `sliced`, which are those that `held` names in a layout of `Layout.own_keys`."""
    config = json.loads(json.dumps(subnet_fields(model_config, own, held)))
    return _hashed(held, fold_into(own, sliced, held, scale), config)


def in_dtype(ticket: Ticket, dtype: str) -> Ticket:
    """The ticket with rounded numbers, which is another one: it has a hash of its own."""
    params = {name: tensor.to(getattr(torch, dtype)) for name, tensor in ticket.params.items()}
    return _hashed(ticket.blueprint, params, ticket.model_config)


def _hashed(blueprint: Blueprint, params: State, config: dict[str, Any]) -> Ticket:
    digest = ticket_digest(blueprint.to_json(), json.dumps(config, sort_keys=True), params)
    return Ticket(blueprint, params, config, digest)


def ticket_digest(blueprint_json: str, config_json: str, params: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over both texts and, sorted by name, every tensor's name, dtype, shape and bytes."""
    content = hashlib.sha256(json.dumps([blueprint_json, config_json]).encode())
    for name, tensor in sorted(params.items()):
        content.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        content.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


def keep(blueprint: Blueprint) -> dict[str, float]:
    """kappa: blocks held / blocks in the layer, of the layer that holds fewest, for each kind."""
    return {kind: min(blueprint.shape[i]) / blueprint.num_blocks[i] for i, kind in enumerate(KINDS)}


def export_ticket(ticket: Ticket, folder: Path, tokenizer_folder: Path | None) -> None:
    """Write `folder`, whole or not at all: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).

    The model code in it is this package's own, and the config names no other: nothing received is executed.
    """
    with new_folder(folder, sealed=True) as making:
        write_ticket(ticket, making, tokenizer_folder)


def write_ticket(ticket: Ticket, folder: Path, tokenizer_folder: Path | None) -> None:
    """The files of `export_ticket`, into a folder that is there."""
    family = family_of(ticket.model_config["model_type"])
    write_json(_export_config(ticket), folder / "config.json")
    write_json(_about(ticket), folder / "twist.json")
    (folder / "requirements.txt").write_text(f"torch\ntransformers>={family.since},<6\n")
    (folder / MODEL_CODE).write_text(shipped_code(family.model_type), encoding="utf-8")
    write_shared(ticket.model_config, ticket.params, folder, tokenizer_folder)


def write_shared(fields: Mapping[str, Any], params: State, folder: Path, tokenizer_folder: Path | None) -> None:
    """What every folder of a model has: weights, special tokens, and a tokenizer that knows the longest context."""
    write_json(_generation_config(fields), folder / "generation_config.json")
    save_tensors({name: tensor.detach() for name, tensor in params.items()}, folder / "model.safetensors")
    if tokenizer_folder:
        copy_tokenizer(tokenizer_folder, folder, fields[architecture_of(fields).keys["n_positions"]])


def write_json(fields: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(fields, indent=1, sort_keys=True) + "\n")


def _export_config(ticket: Ticket) -> dict[str, Any]:
    family, code = family_of(ticket.model_config["model_type"]), Path(MODEL_CODE).stem
    return saved_config(ticket.model_config, ticket.params) | {
        "architectures": [f"Subnet{family.model}"],
        "auto_map": {
            "AutoConfig": f"{code}.Subnet{family.config}",
            "AutoModelForCausalLM": f"{code}.Subnet{family.model}",
        },
    }


def saved_config(fields: Mapping[str, Any], params: State) -> dict[str, Any]:
    """For the model class of the architecture, in every version of transformers."""
    return {
        **fields,
        "architectures": [family_of(fields["model_type"]).model],
        "dtype": str(next(iter(params.values())).dtype).removeprefix("torch."),
        **_rotations_of_version_4(fields.get("rope_parameters") or {}),
    }


def _rotations_of_version_4(rope: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers 4 calls `rope_parameters`, which it does not know: it would rotate by its defaults instead."""
    if not rope:
        return {}
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    old = {"rope_theta": rope["rope_theta"], "rope_scaling": None if rope["rope_type"] == "default" else scaling}
    if "partial_rotary_factor" in rope:
        old |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope["partial_rotary_factor"]}
    return old


def _generation_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens. Without a padding token of its own, a model pads with its end of text."""
    tokens = {name: fields.get(name) for name in ("bos_token_id", "eos_token_id")}
    return tokens | {"pad_token_id": padding_token(fields)}


def _about(ticket: Ticket) -> dict[str, Any]:
    return {
        "blueprint": json.loads(ticket.blueprint.to_json()),
        "digest": ticket.digest,
        "keep": keep(ticket.blueprint),
        "num_params": ticket.num_params,
    }

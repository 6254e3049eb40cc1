"""What a block table says of an architecture: its parameters, and which of their dimensions are blocks (section 3.1).

`block_tables.py` has ours; a user's come in in the same way. Pure Python: neither torch nor Flower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from twist_fl.system.errors import ConfigError
from twist_fl.system.plugins import ARCHITECTURE
from twist_fl.system.untrusted import Field, shown

Kind = Literal["attn", "ffn"]
KINDS: tuple[Kind, Kind] = ("attn", "ffn")
AttnBlocks = Literal["kv_groups", "heads"]
"""What an attention block is where several query heads read the keys and values of one: all of them, or one head."""
ModelDict = Mapping[str, Any]
"""A Hugging Face config as a dict."""
When = Callable[[ModelDict], bool]


@dataclass(frozen=True)
class Blocks:
    """Tags a dimension: `sections` consecutive runs, each of all the layer's blocks, `width` entries a block.

    GPT-2's fused `c_attn` has three sections (q, k, v), each holding every head once; in GPT-NeoX's `query_key_value`
    each head's q, k and v lie together: one section, three times as wide.
    """

    kind: Kind
    width: str
    sections: int = 1


QUERIES, KEYS = Blocks("attn", "d_query"), Blocks("attn", "d_head")
"""How queries, and keys and values, are tagged where they are projections of their own."""


@dataclass(frozen=True)
class Row:
    """A parameter of one architecture. A dimension is the name of one of `sizes_of`, or `Blocks`."""

    name: str
    dims: tuple[str | Blocks, ...]
    when: When | None = None
    """Which models of the family have it; None: all."""


@dataclass(frozen=True)
class Architecture:
    """How one family of Hugging Face models is divided, and what its config calls things.

    `outputs` names the projection that ends each kind: its input carries the scale, its bias is shared. `rows` stand
    in the model's own order.
    """

    model_type: str
    """Hugging Face's."""
    rows: tuple[Row, ...]
    outputs: Mapping[Kind, str]
    keys: Mapping[str, str]
    """Config keys of n_layer, n_head, n_embd, n_inner, n_positions; of n_kv_head and d_head where it has them."""
    dropout: tuple[str, ...] = ()
    """Config keys that `model.dropout` sets."""
    scratch: ModelDict = field(default_factory=dict)
    """What else a model from scratch has otherwise than the family's defaults."""
    refuse: tuple[Callable[[ModelDict], str | None], ...] = ()
    """Each says why a model cannot be divided exactly, or None."""
    since: str = "4.46"
    """The first version of transformers that has it, or the first that was tried."""


def sizes_of(architecture: Architecture, config: ModelDict, attn_blocks: AttnBlocks = "kv_groups") -> dict[str, int]:
    """The sizes that dimensions are named after. `heads` counts attention blocks: as many as `kv_heads` or, where a
    block is a query head, more.

    Raises ValueError for a config that cannot be divided.
    """
    check_sizes(architecture, config, whole=True)
    keys = architecture.keys
    d_model, query_heads = config[keys["n_embd"]], config[keys["n_head"]]
    kv_heads = config.get(keys.get("n_kv_head", "")) or query_heads
    if query_heads % kv_heads:
        legal = [n for n in range(1, query_heads + 1) if query_heads % n == 0]
        raise ValueError(
            f"{kv_heads} key/value heads (model.n_kv_head) do not divide {query_heads} heads: use one of {legal}"
        )
    for reason in filter(None, (refuse(config) for refuse in architecture.refuse)):
        raise ValueError(f"a {config['model_type']!r} model with {reason}")
    heads = query_heads if attn_blocks == "heads" else kv_heads
    if heads != kv_heads:
        _check_queries_apart(architecture)
    d_head = config.get(keys.get("d_head", "")) or d_model // query_heads
    return {
        "layers": config[keys["n_layer"]],
        "heads": heads,
        "kv_heads": kv_heads,
        "d_model": d_model,
        "d_embed": config.get("word_embed_proj_dim") or d_model,
        "d_head": d_head,
        "d_query": d_head * query_heads // heads,
        "d_qkv": 3 * d_head,
        "d_inner": config.get(keys["n_inner"]) or 4 * d_model,
        "vocab": config["vocab_size"],
        "positions": config[keys["n_positions"]],
        "positions_and_2": config[keys["n_positions"]] + 2,
    }


def check_sizes(architecture: Architecture, config: ModelDict, whole: bool) -> None:
    """Raises ValueError for a size that is none, or larger than any model's.

    One that is left out has the family's default; with `whole` it is refused, too.
    """
    for name, key in {"vocab_size": "vocab_size", **architecture.keys}.items():
        size, found = Field(int, 1, or_null=not whole or name in ("n_kv_head", "n_inner", "d_head")), config.get(key)
        if not size.holds(found):
            raise ValueError(f"{key}={shown(found)} is no {size}")
        if found is not None and found > _MOST.get(name, 2**26):
            raise ValueError(f"{key}={found} is more than any model has")


def _check_queries_apart(architecture: Architecture) -> None:
    """Raises ValueError where a query head cannot be told from the keys and values that others read, too."""
    for row in architecture.rows:
        for dim, size in enumerate(row.dims):
            known = size == QUERIES or (size == KEYS and dim == 0)
            if isinstance(size, Blocks) and size.kind == "attn" and not known:
                raise ValueError(
                    f"blueprint.attn_blocks=heads: {row.name} of {architecture.model_type!r} does not have queries "
                    "apart from keys and values: use kv_groups"
                )


_MOST = {"n_layer": 2**12, "n_head": 2**16, "n_kv_head": 2**16}
"""Of what makes a table of parameters longer; other sizes only make its numbers larger."""
_KNOWN: dict[str, Architecture] = {}
"""What `use_architecture` has found, by Hugging Face's model_type."""


def use_architecture(name: str) -> Architecture:
    """What `model.architecture` names, known by its model_type from now on. Raises ConfigError if it cannot be had."""
    found = ARCHITECTURE.find(name)
    if not isinstance(found, Architecture):
        raise ConfigError(f"model.architecture={name!r} must be an Architecture, found a {type(found).__name__}")
    if _KNOWN.setdefault(found.model_type, found) != found:
        raise ConfigError(f"model.architecture={name!r}: the model_type {found.model_type!r} has another table already")
    return found


def known_architecture(model_type: object) -> Architecture | None:
    """Ours, an installed package's, or one that `model.architecture` has named here."""
    name = str(model_type)
    if name not in _KNOWN and ARCHITECTURE.knows(name):
        use_architecture(name)
    return _KNOWN.get(name)


def architecture_of(config: ModelDict) -> Architecture:
    """Raises ValueError for a model_type without a table."""
    model_type = config.get("model_type")
    found = known_architecture(model_type)
    if found is None:
        raise ValueError(
            f"model_type {model_type!r} has no block table; known: {', '.join(ARCHITECTURE.names)}, or give your own: "
            "model.architecture=module:name"
        )
    return found

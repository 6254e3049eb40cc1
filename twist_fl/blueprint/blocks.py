"""Which dimension of which parameter of one model is made of which blocks (paper, section 3.1).

The table of an architecture, resolved for a model's sizes, drives everything that knows about parameters: slicing,
aggregation, counting, bytes and export. Pure Python: neither torch nor Flower.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from twist_fl.blueprint.architectures import (
    KEYS,
    KINDS,
    AttnBlocks,
    Blocks,
    Kind,
    ModelDict,
    Row,
    architecture_of,
    sizes_of,
)
from twist_fl.blueprint.blueprint import Blueprint


@dataclass(frozen=True)
class Param:
    """A parameter of one model: its full shape and, if it is divided, where its blocks lie."""

    name: str
    shape: tuple[int, ...]
    layer: int | None = None
    kind: Kind | None = None
    dim: int = 0
    sections: int = 1
    width: int = 0

    @property
    def is_shared(self) -> bool:
        """Whether it is keys or values that several blocks read: held whole, `width` entries a head."""
        return self.kind is None and self.width > 0

    def index(self, held: Sequence[int]) -> list[int]:
        """Positions along `dim` of the blocks `held`, in the order in which a subnet stores them."""
        run = self.shape[self.dim] // self.sections
        return [
            section * run + block * self.width + offset
            for section in range(self.sections)
            for block in held
            for offset in range(self.width)
        ]

    @property
    def num_blocks(self) -> int:
        """Blocks along `dim`; a parameter that is not divided is one block."""
        return self.shape[self.dim] // (self.sections * self.width) if self.kind else 1

    def blocked(self, num_held: int) -> tuple[int, int, int, int]:
        """(outer, sections, num_held, inner): the shape as which a subnet's parameter shows its blocks as axis 2."""
        if self.kind is None:
            return 1, 1, 1, prod(self.shape)
        return prod(self.shape[: self.dim]), self.sections, num_held, self.width * prod(self.shape[self.dim + 1 :])

    def shape_with(self, num_held: int) -> tuple[int, ...]:
        """Shape of this parameter in a subnet that holds `num_held` of the layer's blocks."""
        if self.kind is None:
            return self.shape
        size = self.sections * num_held * self.width
        return (*self.shape[: self.dim], size, *self.shape[self.dim + 1 :])


def runs(held: Sequence[int], tags: Sequence[object] | None = None) -> Iterator[tuple[slice, slice]]:
    """Consecutive block ids as (slice of the full parameter's blocks, slice of positions in `held`).

    With `tags`, one for each block of the layer, a run's blocks have equal tags.
    """
    first = 0
    for end in range(1, len(held) + 1):
        before = held[end - 1]
        if end < len(held) and held[end] == before + 1 and (tags is None or tags[before] == tags[before + 1]):
            continue
        yield slice(held[first], before + 1), slice(first, end)
        first = end


@dataclass(frozen=True)
class Layout:
    """Every stored parameter of one model, in the model's own order."""

    params: tuple[Param, ...]
    num_blocks: tuple[int, int]
    """(attention blocks, FFN blocks) of a layer."""
    outputs: Mapping[Kind, str]
    sizes: Mapping[str, int]
    """By the names of `architectures.sizes_of`, and `ffn_width`: neurons of an FFN block."""

    @property
    def num_layers(self) -> int:
        return self.sizes["layers"]

    @cached_property
    def by_name(self) -> dict[str, Param]:
        return {param.name: param for param in self.params}

    def held(self, param: Param, blueprint: Blueprint | None) -> tuple[int, ...] | None:
        """Block ids of `param` that `blueprint` names; None if it holds the parameter whole."""
        if param.kind is None or param.layer is None or blueprint is None:
            return None
        held = blueprint.held(param.kind, param.layer)
        return None if len(held) == self.num_blocks[KINDS.index(param.kind)] else held

    def shape(self, param: Param, blueprint: Blueprint | None) -> tuple[int, ...]:
        held = self.held(param, blueprint)
        return param.shape if held is None else param.shape_with(len(held))

    def num_params(self, blueprint: Blueprint | None = None) -> int:
        """Parameters of the subnet, or of the full model; a tied head is counted once (Appendix C)."""
        return sum(prod(self.shape(param, blueprint)) for param in self.params)

    def own_keys(self, blueprint: Blueprint) -> tuple[Layout, Blueprint]:
        """The same subnet in blocks that share no keys and values: as devices have it.

        Where blocks are query heads of which several read the same: KV groups if all are held in every layer, else each
        head with a copy.
        """
        heads, kv_heads = self.sizes["heads"], self.sizes["kv_heads"]
        if heads == kv_heads:
            return self, blueprint
        if set(blueprint.shape[0]) == {heads}:
            groups = (tuple(range(kv_heads)),) * self.num_layers
            return self._of_groups(kv_heads), Blueprint((kv_heads, self.num_blocks[1]), groups, blueprint.ffn)
        return self._of_groups(heads), blueprint

    def _of_groups(self, number: int) -> Layout:
        """Attention blocks of as many KV heads, each with the queries that read it."""
        d_head = self.sizes["d_head"]
        d_query = d_head * self.sizes["heads"] // number

        def own(param: Param) -> Param:
            if param.is_shared:
                return replace(param, kind="attn", shape=(number * d_head, *param.shape[1:]))
            return replace(param, width=d_query) if param.kind == "attn" else param

        sizes = {**self.sizes, "heads": number, "kv_heads": number, "d_query": d_query}
        return replace(self, params=tuple(map(own, self.params)), num_blocks=(number, self.num_blocks[1]), sizes=sizes)

    def check_blueprint(self, blueprint: Blueprint) -> None:
        """Raises ValueError unless `blueprint` is of a model of these sizes."""
        found = blueprint.num_blocks, len(blueprint.attn)
        if found != (self.num_blocks, self.num_layers):
            raise ValueError(
                f"a blueprint of {found[1]} layers of {found[0]} blocks, where the model has {self.num_layers} of "
                f"{self.num_blocks} (heads, FFN blocks)"
            )

    def check_names(self, shapes: Mapping[str, tuple[int, ...]], blueprint: Blueprint | None = None) -> None:
        """Raises ValueError unless `shapes` has exactly the parameters of the subnet, in their shapes."""
        if unknown := sorted(set(shapes) - set(self.by_name)):
            raise ValueError(f"parameter {unknown[0]!r} is not in the block table: add a row to it")
        if missing := sorted(set(self.by_name) - set(shapes)):
            raise ValueError(f"parameter {missing[0]!r} is missing ({len(missing)} in all)")
        for param in self.params:
            expected = self.shape(param, blueprint)
            if tuple(shapes[param.name]) != expected:
                raise ValueError(f"{param.name} has shape {tuple(shapes[param.name])}, expected {expected}")


def make_layout(
    model_config: ModelDict, ffn_blocks: int | None = None, attn_blocks: AttnBlocks = "kv_groups"
) -> Layout:
    """Layout of the model that a Hugging Face config (as a dict) describes.

    `ffn_blocks` (R) defaults to the number of attention blocks, as in the paper's experiments. With
    `attn_blocks="heads"` a block is a query head, and keys and values that several read are not divided. Raises
    ValueError for an architecture that has no table, a model that cannot be divided, or an R that does not divide
    d_inner.
    """
    architecture = architecture_of(model_config)
    sizes = _with_ffn_blocks(sizes_of(architecture, model_config, attn_blocks), ffn_blocks)
    num_blocks = {"attn": sizes["heads"], "ffn": sizes["ffn_blocks"]}
    shares = sizes["heads"] != sizes["kv_heads"]

    def resolve(row: Row, layer: int | None) -> Param:
        shape: list[int] = []
        tag: tuple[int, Blocks] | None = None
        for dim, size in enumerate(row.dims):
            if isinstance(size, Blocks):
                tag = dim, size
                number = sizes["kv_heads"] if size == KEYS else num_blocks[size.kind]
                shape.append(size.sections * number * sizes[size.width])
            else:
                shape.append(sizes[size])
        name = row.name.format(layer=layer)
        if tag is None:
            return Param(name, tuple(shape), layer)
        dim, blocks = tag
        kind = None if shares and blocks == KEYS else blocks.kind
        return Param(name, tuple(shape), layer, kind, dim, blocks.sections, sizes[blocks.width])

    params: list[Param] = []
    rows = [row for row in architecture.rows if row.when is None or row.when(model_config)]
    per_layer = [row for row in rows if "{layer}" in row.name]
    for row in rows:
        if "{layer}" not in row.name:
            params.append(resolve(row, None))
        elif row is per_layer[0]:
            params += [resolve(inner, layer) for layer in range(sizes["layers"]) for inner in per_layer]
    return Layout(tuple(params), (num_blocks["attn"], num_blocks["ffn"]), architecture.outputs, sizes)


def _with_ffn_blocks(sizes: dict[str, int], ffn_blocks: int | None) -> dict[str, int]:
    blocks = sizes["heads"] if ffn_blocks is None else ffn_blocks
    inner = sizes["d_inner"]
    if blocks < 1 or inner % blocks:
        legal = [n for n in range(1, inner + 1) if inner % n == 0]
        nearest = min(legal, key=lambda n: abs(n - blocks))
        raise ValueError(f"blueprint.ffn_blocks={blocks} does not divide the {inner} FFN neurons: use {nearest}")
    return sizes | {"ffn_blocks": blocks, "ffn_width": inner // blocks}

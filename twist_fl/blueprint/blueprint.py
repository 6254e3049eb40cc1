"""A blueprint: the blocks one worker or ticket holds, as plain data (paper, section 3.1)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Literal

from twist_fl.blueprint.architectures import KINDS, Kind
from twist_fl.system.untrusted import Field, read_exactly, shown

Scale = Literal["sqrt", "linear", "none"]

_BLOCKS = Field(int, 1)


@dataclass(frozen=True)
class Blueprint:
    """The sorted block ids held per layer, of `num_blocks` = (heads, FFN blocks) in a full layer."""

    num_blocks: tuple[int, int]
    attn: tuple[tuple[int, ...], ...]
    ffn: tuple[tuple[int, ...], ...]

    def held(self, kind: Kind, layer: int) -> tuple[int, ...]:
        return (self.attn if kind == "attn" else self.ffn)[layer]

    def factor(self, kind: Kind, layer: int, scale: Scale) -> float:
        """What the sum over the held blocks is multiplied by (Theorems A.6 and A.10)."""
        ratio = self.num_blocks[KINDS.index(kind)] / len(self.held(kind, layer))
        return {"sqrt": sqrt(ratio), "linear": ratio, "none": 1.0}[scale]

    @cached_property
    def shape(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Blocks held per layer, (heads, FFN blocks): equal shapes can share one physical model."""
        return tuple(map(len, self.attn)), tuple(map(len, self.ffn))

    @cached_property
    def is_full(self) -> bool:
        return all(set(self.shape[kind]) == {self.num_blocks[kind]} for kind in range(len(KINDS)))

    def to_json(self) -> str:
        fields = {"num_blocks": self.num_blocks, "attn": self.attn, "ffn": self.ffn}
        return json.dumps(fields, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Blueprint:
        """Raises ValueError unless `text` is a blueprint: in every layer some of its blocks, each once, in order."""
        fields = read_exactly(text, dict.fromkeys(("num_blocks", *KINDS), Field(list)))
        num_blocks = fields["num_blocks"]
        if len(num_blocks) != len(KINDS) or not all(_BLOCKS.holds(num) for num in num_blocks):
            raise ValueError(f"num_blocks={shown(num_blocks)} is no pair of numbers of blocks")
        if len(fields["attn"]) != len(fields["ffn"]):
            raise ValueError(f"{len(fields['attn'])} layers with heads and {len(fields['ffn'])} with FFN blocks")
        for kind, num in zip(KINDS, num_blocks, strict=True):
            for layer, held in enumerate(fields[kind]):
                ids = held if isinstance(held, list) and all(type(block) is int for block in held) else []
                if not ids or ids != sorted(set(ids)) or ids[0] < 0 or ids[-1] >= num:
                    raise ValueError(f"{kind} blocks {shown(held)} of layer {layer} are no ids from 0 to {num - 1}")
        attn, ffn = (tuple(map(tuple, fields[kind])) for kind in KINDS)
        return Blueprint((num_blocks[0], num_blocks[1]), attn, ffn)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the blueprint: equal-sized slices of different blocks are told apart by it alone."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

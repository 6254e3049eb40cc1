"""Where each tensor of a message lies: a function of the block table, the blueprint and the job, never sent along.

Tensors lie in the table's order: in a message's array one behind another, in a segment each at a multiple of 64 bytes,
as torch's own, so that a model computes with them where they lie. Weights may travel in 16 bits, rounded to nearest:
out to the worker as they are, back as what training has changed, which the server adds to the float32 weights that it
kept. So what rounding takes away is not lost, but goes out again in the next round. Moments are always float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch

from twist_fl.blueprint.blocks import Layout, Param
from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.model.subnet import ALIGNMENT, State
from twist_fl.training.job import Job

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Packing:
    """The tensors of one subnet's messages, in records: `params`, and one for each moment that travels."""

    layouts: Mapping[str, Layout]
    """What each record is made of."""
    blueprint: Blueprint
    wire_dtype: str = "float32"
    differences: bool = False
    """Whether replies carry what training has changed. (DDP's are gradients, rounded as they are.)"""

    @classmethod
    def of(cls, job: Job, blueprint: Blueprint, trains: bool = True) -> Packing:
        """Of the messages to and from a client that trains `blueprint`, or else only evaluates it."""
        given, dtype = job.given(job.clients[0], blueprint), job.config.flower.wire_dtype
        differences = dtype != "float32" and job.config.algorithm != "ddp"
        return cls({"params": job.layout} | (job.moment_layouts if trains else {}), given, dtype, differences)

    def shared(self, record: str) -> tuple[Param, ...]:
        """What is held whole: equal for all workers that hold it so."""
        layout = self.layouts[record]
        return tuple(p for p in layout.params if layout.held(p, self.blueprint) is None)

    def blocks(self, record: str) -> tuple[Param, ...]:
        """That of which the blueprint names some blocks: the worker's own."""
        layout = self.layouts[record]
        return tuple(p for p in layout.params if layout.held(p, self.blueprint) is not None)

    def dtype(self, record: str) -> str:
        """The dtype on the wire, by name."""
        return self.wire_dtype if record == "params" else "float32"

    @cached_property
    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        return {
            record: {param.name: layout.shape(param, self.blueprint) for param in layout.params}
            for record, layout in self.layouts.items()
        }

    def num_elements(self, record: str, params: Sequence[Param]) -> int:
        return sum(prod(self.shapes[record][param.name]) for param in params)

    def num_bytes(self, record: str) -> int:
        return DTYPES[self.dtype(record)].itemsize * self.num_elements(record, self.layouts[record].params)

    @cached_property
    def places(self) -> dict[tuple[str, str], slice]:
        """Where each record's tensors lie in a segment, in bytes."""
        places, start = {}, 0
        for record, shapes in self.shapes.items():
            for name, shape in shapes.items():
                size = DTYPES[self.dtype(record)].itemsize * prod(shape)
                places[record, name] = slice(start, start + size)
                start += -(-size // ALIGNMENT) * ALIGNMENT
        return places

    @property
    def segment_bytes(self) -> int:
        """Of a segment that holds all tensors; a few more than are sent."""
        return max(int(place.stop) for place in self.places.values())

    def views(self, record: str, params: Sequence[Param], buffer: torch.Tensor) -> State:
        """`params` as consecutive parts of `buffer`, a vector of as many elements as they have."""
        shapes = {param.name: self.shapes[record][param.name] for param in params}
        parts = torch.split(buffer, [prod(shape) for shape in shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def views_of_all(self, memory: torch.Tensor) -> dict[str, State]:
        """Every tensor of every record, in a segment's memory (uint8)."""
        views: dict[str, State] = {record: {} for record in self.layouts}
        for (record, name), place in self.places.items():
            views[record][name] = memory[place].view(DTYPES[self.dtype(record)]).view(self.shapes[record][name])
        return views

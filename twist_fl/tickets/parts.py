"""A ticket in parts, one a block and one a shared parameter: a device is sent those that it does not have yet.

Tickets of one run, drawn alike, are nested: a larger one has every block of a smaller one. What is sent has no scale
in it, for that depends on how many blocks there are; it is folded in where the parts are put together.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from twist_fl.blueprint.blocks import Layout
from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.model.subnet import State
from twist_fl.system.files import save_tensors
from twist_fl.system.untrusted import shown

_BLOCK = ":"
"""Stands between the name of a parameter and that of its block."""


def parts_of(layout: Layout, blueprint: Blueprint) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each part, (outer, sections, inner) of a block: see `Param.blocked`."""
    for param in layout.params:
        if param.kind is None or param.layer is None:
            yield param.name, param.shape
            continue
        outer, sections, _, inner = param.blocked(1)
        for block in blueprint.held(param.kind, param.layer):
            yield f"{param.name}{_BLOCK}{block}", (outer, sections, inner)


def take_parts(layout: Layout, state: Mapping[str, torch.Tensor], names: Iterable[str]) -> State:
    """The parts of these names, of the full model's `state`; views."""
    found = {}
    for each in names:
        name, _, block = each.partition(_BLOCK)
        param, tensor = layout.by_name[name], state[name]
        found[each] = tensor.reshape(param.blocked(param.num_blocks))[:, :, int(block)] if block else tensor
    return found


def put_together(layout: Layout, blueprint: Blueprint, parts: Mapping[str, torch.Tensor]) -> State:
    """What `slice_state` gives."""
    state = {}
    for param in layout.params:
        if param.kind is None or param.layer is None:
            state[param.name] = parts[param.name]
            continue
        held = blueprint.held(param.kind, param.layer)
        blocks = torch.stack([parts[f"{param.name}{_BLOCK}{block}"] for block in held], 2)
        state[param.name] = blocks.reshape(param.shape_with(len(held)))
    return state


class Shelf:
    """The parts of one model's state that a device has, each message's in a file of its own."""

    def __init__(self, folder: Path, state: str) -> None:
        """Parts of any other state than `state`, a name, are removed from `folder`."""
        self._folder = folder / state
        for other in folder.iterdir() if folder.is_dir() else ():
            if other != self._folder:
                shutil.rmtree(other)

    def put(self, layout: Layout, blueprint: Blueprint, parts: Mapping[str, torch.Tensor]) -> None:
        """Raises ValueError for what is no part of the ticket."""
        wanted = dict(parts_of(layout, blueprint))
        for name, part in parts.items():
            if wanted.get(name) != tuple(part.shape):
                raise ValueError(f"part {shown(name)} of shape {tuple(part.shape)} is none of the ticket's")
        file = next(file for i in count() if not (file := self._folder / f"{i:06d}.safetensors").exists())
        save_tensors(parts, file)

    def missing(self, layout: Layout, blueprint: Blueprint) -> list[str]:
        """Names of the ticket's parts that are not here."""
        here = {name for _, names in self._files() for name in names}
        return [name for name, _ in parts_of(layout, blueprint) if name not in here]

    def parts(self, layout: Layout, blueprint: Blueprint) -> State:
        """The ticket's, none of which is `missing`."""
        wanted, found = {name for name, _ in parts_of(layout, blueprint)}, State()
        for file, names in self._files():
            with safe_open(file, "pt") as content:
                found |= {name: content.get_tensor(name) for name in names if name in wanted}
        return found

    def clear(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _files(self) -> Iterator[tuple[Path, list[str]]]:
        """With what is in them; one that is damaged is as good as none."""
        for file in sorted(self._folder.glob("*.safetensors")):
            try:
                with safe_open(file, "pt") as content:
                    yield file, list(content.keys())
            except SafetensorError:
                file.unlink()

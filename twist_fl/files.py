"""Files that are either whole or absent: written to a temporary name and renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def write_text(text: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    making = path.with_name(f".{path.name}.{os.getpid()}")
    making.write_text(text)
    making.replace(path)


_NOT_FINITE = {"Infinity": inf, "-Infinity": -inf, "NaN": nan}


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: infinities and not-a-number are strings, as in protobuf's JSON."""
    return json.dumps(_named(value), indent=indent, allow_nan=False)


def _named(value: Any) -> Any:
    if isinstance(value, float) and not isfinite(value):
        return json.dumps(value)
    if isinstance(value, Mapping):
        return {key: _named(each) for key, each in value.items()}
    return [_named(each) for each in value] if isinstance(value, (list, tuple)) else value


def from_json(text: str | bytes) -> Any:
    """The inverse of `to_json`."""
    return json.loads(text, object_hook=lambda fields: {key: _number(value) for key, value in fields.items()})


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(each) for each in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def write_json(value: Any, path: Path) -> None:
    write_text(to_json(value, indent=1), path)


def read_json(path: Path) -> Any:
    return from_json(path.read_text())


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    making = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, making, {"format": "pt"})
    making.replace(path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `path` only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    making = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    try:
        yield making
        if path.exists():
            shutil.rmtree(path)
        making.replace(path)
    finally:
        shutil.rmtree(making, ignore_errors=True)

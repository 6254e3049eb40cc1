"""The weights of a pretrained model: exactly the parameters that its config says. Nothing is left random.

Read are `model.safetensors` and `pytorch_model.bin`, whole or in shards, from a folder or from the hub, and GGUF files.
"""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from twist_fl.blueprint.blocks import Layout
from twist_fl.config.checks import check_name
from twist_fl.data.gguf_folder import as_folder
from twist_fl.model.subnet import State
from twist_fl.system.errors import ConfigError
from twist_fl.system.files import SEAL, check_seal
from twist_fl.system.threads import ranges
from twist_fl.system.untrusted import Field, read_fields

_FORMS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What transformers looks for, in its order."""
_POINTER = b"version https://git-lfs"
_BUFFERS = re.compile(r"(^|\.)(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$|position_ids$|decoder\.version$")
"""No parameters: what older versions of transformers kept beside them."""
_HEAD = "lm_head.weight"
_WRAPPERS = {
    "_orig_mod.": "what torch.compile puts before them: save the model inside it, model._orig_mod",
    "module.": "what DataParallel and DDP put before them: save the model inside it, model.module",
}
_UNREADABLE = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    EOFError,
    OSError,
    UnpicklingError,
    struct.error,
)
"""What torch.load raises for bytes that are no checkpoint."""


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def load_pretrained(name: str, layout: Layout) -> State:
    """All parameters of `layout` in float32, in memory of their own. Raises ConfigError as `check_pretrained`."""
    return {param: value.clone() for param, value in _values(name, layout)}


def check_pretrained(name: str, layout: Layout) -> None:
    """Read all of it once, and keep nothing.

    Raises ConfigError if a file cannot be read, if parameters are missing, unknown, of another shape or not finite, or
    if the head differs from the embedding that the config says it is.
    """
    for _ in _values(name, layout):
        pass


def _values(name: str, layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters by the layout's names; each may be a view of its file."""
    what = f"model.pretrained={name!r}"
    stored = _fitted(what, layout, {key: each for file in _files(what, name) for key, each in _read(file).items()})
    head = stored.pop(_HEAD) if _HEAD not in layout.by_name and _HEAD in stored else None
    for param in layout.params:
        value = stored[param.name].read()
        if not value.is_floating_point():
            raise ConfigError(f"{what}: {param.name} is {value.dtype}: give weights that are not quantised")
        value = value.float()
        if not all(map(isfinite, ranges({param.name: value})[param.name])):
            raise ConfigError(
                f"{what}: {param.name} has values that are not finite: give a checkpoint from before that"
            )
        if head is not None and param is layout.params[0] and not torch.equal(head.read().float(), value):
            raise ConfigError(
                f"{what}: {_HEAD} differs from {param.name}, and its config ties them: set "
                "tie_word_embeddings=false in its config.json"
            )
        yield param.name, value


# Names


def _fitted(what: str, layout: Layout, found: Mapping[str, _Tensor]) -> dict[str, _Tensor]:
    """`found` by the layout's names, a tied head with it. Raises ConfigError for what does not fit."""
    shapes = {param.name: param.shape for param in layout.params}
    embedding = layout.params[0].name
    shapes.setdefault(_HEAD, shapes[embedding])
    base = embedding.partition(".")[0] + "."
    ours: dict[str, _Tensor] = {}
    unknown = []
    for name, tensor in sorted(found.items(), key=lambda item: item[0] not in shapes):
        known = next((each for each in (name, base + name, _renamed(name)) if each in shapes), None)
        if known is not None and known not in ours:
            ours[known] = tensor
        elif not _BUFFERS.search(name):
            unknown.append(name)
    if _HEAD not in layout.by_name and embedding not in ours and _HEAD in ours:
        ours[embedding] = ours[_HEAD]  # tied: whichever was saved
    missing = sorted(layout.by_name.keys() - ours.keys())
    if (prefix := _prefix(unknown, missing, base)) is not None:
        why = _WRAPPERS.get(prefix, "which no model of this kind has: save the model itself, not what it is wrapped in")
        raise ConfigError(f"{what}: its {len(unknown)} names begin with {prefix!r}, {why}")
    if missing == [_HEAD] and not unknown:
        raise ConfigError(
            f"{what}: {_HEAD} is missing, and its config does not tie it to {embedding}: give a checkpoint with its "
            "head, or set tie_word_embeddings=true in its config.json if the two are one"
        )
    other = [name for name in sorted(ours) if ours[name].shape != shapes[name]]
    wrong = [_some(missing, "missing"), _some(unknown, "unknown"), _some(other, "of another shape")]
    if any(wrong):
        shape = f" ({other[0]} is {ours[other[0]].shape}, expected {shapes[other[0]]})" if other else ""
        raise ConfigError(
            f"{what} does not fit its config.json: {'; '.join(filter(None, wrong))}{shape}: give the whole model, with "
            "the config.json it was saved with"
        )
    return ours


def _renamed(name: str) -> str:
    """GPT-NeoX's head has another name in files than in the model."""
    return _HEAD if name == "embed_out.weight" else name


def _prefix(unknown: list[str], missing: list[str], base: str) -> str | None:
    """What stands before every unknown name, if that is all that is wrong with them."""
    if not unknown or not missing:
        return None
    wanted = {*missing, *(name.removeprefix(base) for name in missing), _HEAD, "embed_out.weight"}
    for end in sorted((name for name in wanted if unknown[0].endswith("." + name)), key=len, reverse=True):
        prefix = unknown[0].removesuffix(end)
        rest = [name.removeprefix(prefix) for name in unknown if name.startswith(prefix)]
        if len(rest) == len(unknown) and all(name in wanted or _BUFFERS.search(name) for name in rest):
            return prefix
    return None


def _some(names: list[str], how: str) -> str:
    return f"{len(names)} {how} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""


# Files


def _files(what: str, name: str) -> list[Path]:
    """The model's files of weights."""
    folder = as_folder(Path(name).expanduser())
    if folder.is_dir() and (folder / SEAL).exists():
        check_seal(folder, others=True)

    def find(file: str) -> Path | None:
        if folder.is_dir():
            return folder / file if (folder / file).is_file() else None
        from transformers.utils.hub import cached_file

        try:
            path = cached_file(name, file)
        except OSError:  # not there, or not within reach
            return None
        return Path(path) if path else None

    form = next((file for file in map(find, _FORMS) if file is not None), None)
    if form is None:
        raise ConfigError(f"{what} has no weights: of {', '.join(_FORMS)} none is there")
    if form.suffix != ".json":
        return [form]
    try:
        parts = sorted(set(read_fields(form.read_bytes(), {"weight_map": Field(dict)})["weight_map"].values()))
        for part in parts:
            check_name("weight_map", part)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{what}: {form.name} is no index of weights: {error}") from error
    paths = {part: find(part) for part in parts}
    if lacking := [part for part, path in paths.items() if path is None]:
        raise ConfigError(f"{what} is incomplete: {_some(lacking, 'missing')} of {len(parts)} files of weights")
    return [path for path in paths.values() if path is not None]


def _read(file: Path) -> dict[str, _Tensor]:
    with file.open("rb") as stream:
        start = stream.read(len(_POINTER))
    if start == _POINTER:
        raise ConfigError(f"{file} is a Git LFS pointer, not weights: run `git lfs pull` where it came from")
    with _readable(file):
        return _from_safetensors(file) if file.suffix == ".safetensors" else _from_pickle(file)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, *_UNREADABLE) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ConfigError(f"{file} holds no weights that can be read: {reason}: copy or download it again") from error


def _from_safetensors(file: Path) -> dict[str, _Tensor]:
    tensors: Any = safe_open(file, framework="pt")
    return {
        name: _Tensor(tuple(tensors.get_slice(name).get_shape()), partial(tensors.get_tensor, name))
        for name in tensors.keys()  # noqa: SIM118 (no mapping)
    }


def _from_pickle(file: Path) -> dict[str, _Tensor]:
    """Tensors only: pickled code is not run."""
    tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    if not isinstance(tensors, dict):
        raise TypeError(f"a {type(tensors).__name__}, and no mapping of names to tensors")
    return {
        str(name): _Tensor(tuple(value.shape), value.detach)
        for name, value in tensors.items()
        if isinstance(value, torch.Tensor)
    }

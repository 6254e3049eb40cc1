"""A GGUF file as a Hugging Face folder, which is made once, in the cache; config and tokenizer by transformers.

Read are files of `llama` (also Mistral's), `qwen2` and `qwen3`, of any numbers that the package gguf knows. Weights
come out in float32, as they are multiplied in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twist_fl.blueprint.blocks import make_layout
from twist_fl.data.progress import Meter
from twist_fl.system.errors import ConfigError
from twist_fl.system.files import cache_dir, new_folder, save_tensors, write_text
from twist_fl.system.plugins import needs
from twist_fl.system.untrusted import plain

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from transformers import PreTrainedConfig

SUFFIX = ".gguf"
_FAMILIES = ("llama", "qwen2", "qwen3")
_PAIRED = "llama"
"""Whose rows of queries and keys stand as llama.cpp rotates them: neighbours, where transformers pairs the halves."""
_LETTERS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS: dict[tuple[str, ...], str] = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_LETTERS % "{1,3}", "ByteLevel without words"): "llama-bpe",
    (_LETTERS % "", "ByteLevel without words"): "qwen2",
}
"""How text is cut before it is merged, by llama.cpp's names; it knows no rules but its own."""
WHOLE_WORDS = "llama-bpe"
"""Here llama.cpp takes a word that is a token as it is, whatever the merges."""


def as_folder(path: Path) -> Path:
    """`path`, or of a GGUF file the folder that it is. Raises ConfigError if the file is no model that can be read."""
    if path.suffix != SUFFIX or not path.is_file():
        return path
    found = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {found.st_size} {found.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_dir() / "gguf" / f"{path.stem}-{key}"
    if not folder.is_dir():
        needs("gguf", extra="gguf")
        Meter().say(f"{path.name} becomes a Hugging Face folder, once: {folder}")
        with _readable(path):
            _make(path, folder)
    return folder


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, LookupError, TypeError, ArithmeticError, NotImplementedError, OSError) as error:
        reason = plain(" ".join(str(error).split()) or repr(error))
        raise ConfigError(f"{file} is no GGUF model that can be read: {reason}: get it again") from error


def _make(file: Path, folder: Path) -> None:
    from gguf import GGUFReader
    from transformers import AutoConfig

    reader = GGUFReader(file)
    _check(file, reader)
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    with new_folder(folder, sealed=True) as making:
        save_tensors(_weights(reader, config), making / "model.safetensors")
        write_text(json.dumps(config.to_dict() | {"dtype": "float32"}, indent=1), making / "config.json")
        _tokenizer(file, reader).save_pretrained(making)


def _field(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _check(file: Path, reader: GGUFReader) -> None:
    """Raises ConfigError for what would be read as another model than it is."""
    family = _field(reader, "general.architecture")
    if family == "deci":
        raise ConfigError(f"{file} is a ticket, whose layers differ in size: give the model that it was drawn from")
    if family not in _FAMILIES:
        raise ConfigError(
            f"{file} is a GGUF file of the architecture {plain(str(family))}, and read are {', '.join(_FAMILIES)}: "
            "give the Hugging Face folder that it was made from"
        )
    if reader.get_field("tokenizer.ggml.tokens") is None or not reader.tensors:
        raise ConfigError(f"{file} has no weights or no tokenizer: give the file of the whole model")
    scaled = _field(reader, f"{family}.rope.scaling.type") not in (None, "none")
    if scaled or any(tensor.name.startswith("rope_") for tensor in reader.tensors):
        raise ConfigError(
            f"{file} scales its rotations for long texts, which a GGUF file says in part only: give the Hugging Face "
            "folder that it was made from"
        )


def _weights(reader: GGUFReader, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """By transformers' names; a tensor that the family does not have keeps its own, and is refused by it."""
    import torch
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from gguf.quants import dequantize

    family = _field(reader, "general.architecture")
    layout = make_layout(config.to_dict())
    (arch,) = (arch for arch, name in MODEL_ARCH_NAMES.items() if name == family)
    names = get_tensor_name_map(arch, layout.num_layers)
    ours = {names.get_name(param.name, try_suffixes=(".weight", ".bias")): param.name for param in layout.params}
    found = {}
    for tensor in reader.tensors:
        name = ours.get(tensor.name, tensor.name)
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        paired = family == _PAIRED and (".q_proj." in name or ".k_proj." in name)
        found[name] = in_halves(values, layout.sizes["d_head"]) if paired else values
    return found


def in_pairs(rows: torch.Tensor, d_head: int) -> torch.Tensor:
    """Each head's rows 0, half, 1, half + 1, ...: what transformers rotates together, side by side."""
    heads = rows.reshape(-1, 2, d_head // 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


def in_halves(rows: torch.Tensor, d_head: int) -> torch.Tensor:
    """The inverse of `in_pairs`."""
    heads = rows.reshape(-1, d_head // 2, 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape).contiguous()


def _tokenizer(file: Path, reader: GGUFReader) -> Any:
    """transformers' of it, with the rules by which llama.cpp would cut a text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if _field(reader, "tokenizer.ggml.model") == "gpt2":  # a byte-level BPE
        name = _field(reader, "tokenizer.ggml.pre")
        steps = next((steps for steps, known in CUTS.items() if known == name), None)
        if steps is None:
            raise ConfigError(
                f"{file} cuts text by the rules {plain(str(name))}, and known are {', '.join(CUTS.values())}: give the "
                "Hugging Face folder that it was made from"
            )
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = _cut(steps)
        backend.model.ignore_merges = name == WHOLE_WORDS
    return tokenizer


def _cut(steps: Sequence[str]) -> Any:
    from tokenizers import Regex, pre_tokenizers

    known = {
        "ByteLevel": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        "ByteLevel without words": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        "Digits": pre_tokenizers.Digits(individual_digits=True),
    }
    made = [known.get(step) or pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
    return made[0] if len(made) == 1 else pre_tokenizers.Sequence(made)

"""A byte-level BPE of tokenizer.json as GGUF has it: tokens, their types, merges, and a name for how text is cut."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from twist_fl.data.gguf_folder import CUTS, WHOLE_WORDS
from twist_fl.data.tokenizer import load_tokenizer
from twist_fl.system.errors import ConfigError

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


class Vocabulary(NamedTuple):
    tokens: list[str]
    types: list[int]
    merges: list[str]
    cut: str
    special: dict[str, int]
    """bos, eos, pad, unk: those it has."""
    begins: bool
    """The begin of text stands before every text."""
    ends: bool
    chat_template: str | None


def read_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """Raises ConfigError for a tokenizer that llama.cpp would cut text otherwise with."""
    tokenizer = load_tokenizer(str(folder))
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    model, cut = fields["model"], _cut(fields)
    if model.get("type") != "BPE" or cut is None or not model["merges"]:
        known = ", ".join(CUTS.values())
        raise ConfigError(
            "--format gguf: llama.cpp would cut text otherwise than this tokenizer.json does: of byte-level BPE it has "
            f"the rules of {known}; use --format compact, hf or onnx"
        )
    vocabulary, added = model["vocab"], {each["id"]: each for each in fields["added_tokens"]}
    names = {number: name for name, number in vocabulary.items()} | {i: each["content"] for i, each in added.items()}
    if (largest := max(names)) >= vocab_size:
        raise ConfigError(f"--format gguf: the tokenizer has a token {largest}, the model only {vocab_size} tokens")
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")}
    encoded = tokenizer("a")["input_ids"]
    return Vocabulary(
        [names.get(number, f"[PAD{number}]") for number in range(vocab_size)],
        [_type(number, names, added) for number in range(vocab_size)],
        [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
        cut,
        {name: number for name, number in special.items() if number is not None},
        encoded[0] == special["bos"],
        encoded[-1] == special["eos"],
        tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def _type(number: int, names: Mapping[int, str], added: Mapping[int, Mapping[str, Any]]) -> int:
    if number not in names:
        return _UNUSED
    if number not in added:
        return _NORMAL
    return _CONTROL if added[number]["special"] else _USER_DEFINED


def _cut(fields: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for how the tokenizer cuts text; None if it has none."""
    cut = fields["pre_tokenizer"] or {}
    steps = tuple(map(_step, cut.get("pretokenizers", [cut])))
    name = CUTS.get(steps)
    normal = fields["normalizer"] is None or fields["normalizer"]["type"] == "NFC"
    whole = bool(fields["model"].get("ignore_merges")) == (name == WHOLE_WORDS)
    return name if name and normal and whole else None


def _step(step: Mapping[str, Any]) -> str:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}:
            return "ByteLevel" if regex else "ByteLevel without words"
        case {"type": "Digits", "individual_digits": True}:
            return "Digits"
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return str(pattern)
    return "unknown"

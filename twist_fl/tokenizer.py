"""Tokenizers: from a folder, from the hub, or a byte-level BPE trained here."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from twist_fl.checks import ConfigError
from twist_fl.hub import local_path, reachable

END_OF_TEXT = "<|endoftext|>"
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def load_tokenizer(name: str) -> Any:
    """A fast tokenizer from a folder (`tokenizer.json` alone is enough) or from the hub by name."""
    from transformers import AutoTokenizer, GPT2TokenizerFast  # type: ignore[attr-defined]

    folder = local_path("data.tokenizer", name)
    if folder is None:
        with reachable(f"data.tokenizer={name!r}"):
            return AutoTokenizer.from_pretrained(name)
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(
            f"data.tokenizer={name!r} has no tokenizer.json: give a folder that has one, or a name on the hub"
        )
    if not (folder / "tokenizer_config.json").is_file() and not (folder / "config.json").is_file():
        return GPT2TokenizerFast.from_pretrained(str(folder))
    with reachable(f"data.tokenizer={name!r}"):
        return AutoTokenizer.from_pretrained(str(folder))


def copy_tokenizer(folder: Path, target: Path) -> None:
    """Its files, for AutoTokenizer.from_pretrained(target)."""
    for name in _FILES:
        if (file := folder / name).is_file():
            shutil.copyfile(file, target / name)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE, as GPT-2's, trained on `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 257:
        raise ConfigError(f"data.vocab_size={vocab_size} must be at least 257: 256 bytes and the end of text")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    make: Any = PreTrainedTokenizerFast  # untyped in transformers
    return make(tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT)

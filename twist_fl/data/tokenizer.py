"""Tokenizers: from a folder, from the hub, or a byte-level BPE trained here."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from twist_fl.config.hub import local_path, reachable
from twist_fl.data.gguf_folder import as_folder
from twist_fl.system.errors import ConfigError
from twist_fl.system.files import cache_dir, new_folder

END_OF_TEXT = "<|endoftext|>"
_CLASS = "PreTrainedTokenizerFast"
"""All of tokenizer.json and nothing else, in every version of transformers: some classes of version 5 version 4 does
not know, and others build some of it anew."""
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""All that a saved tokenizer may consist of."""
_ONE_OF = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")
_SUFFIXES = (".json", ".txt", ".jinja", ".model")
_OF_A_CALL = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "pad_token_type_id")
"""What tokenizer_config.json keeps of a call that truncated or padded."""


def load_tokenizer(name: str) -> Any:
    """A fast tokenizer from a folder (`tokenizer.json` alone is enough), a GGUF file, or from the hub by name.

    Truncation, padding and BPE-dropout that its files ask for are left out, here and in what it saves: text is encoded
    whole, and always the same.
    """
    folder = local_path("data.tokenizer", name)
    if folder is None:
        with reachable(f"data.tokenizer={name!r}"):
            folder = _downloaded(name)
    folder = as_folder(folder)
    if not any((folder / file).is_file() for file in _ONE_OF):
        raise ConfigError(
            f"data.tokenizer={name!r} has no tokenizer.json: give a folder that has one, or a name on the hub"
        )
    with tempfile.TemporaryDirectory() as scratch:
        _copy_plain(folder, Path(scratch))
        with reachable(f"data.tokenizer={name!r}"):
            loaded = _from_folder(scratch)
    if not loaded.is_fast:
        raise ConfigError(f"data.tokenizer={name!r} has no fast tokenizer (tokenizer.json): choose one that has")
    return loaded


def saved_tokenizer(name: str) -> Path:
    """A folder of the cache with `load_tokenizer` of that name, in its fast form, for `copy_tokenizer`."""
    loaded = load_tokenizer(name)
    folder = cache_dir() / "saved_tokenizers" / identity(loaded)[:32]
    if not folder.is_dir():
        with new_folder(folder) as making:
            loaded.save_pretrained(making)
    return folder


def _downloaded(name: str) -> Path:
    """The folder of what the hub has of it."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=[f"*{suffix}" for suffix in _SUFFIXES]))


def _copy_plain(folder: Path, target: Path) -> None:
    """The files of a tokenizer, without what they say of truncation, padding and dropout."""
    for file in folder.iterdir():
        if file.is_file() and file.suffix in _SUFFIXES:
            (target / file.name).symlink_to(file.resolve())
    if (file := target / "tokenizer.json").is_file():
        fields = _read(file)
        fields["truncation"] = fields["padding"] = None
        if fields["model"].get("dropout"):
            fields["model"]["dropout"] = None
        _replace(file, fields)
    if (file := target / "tokenizer_config.json").is_file():
        _replace(file, {key: value for key, value in _read(file).items() if key not in _OF_A_CALL})


def _read(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file.resolve()} is not JSON ({error}): get it again") from error
    if not isinstance(fields, dict) or (file.name == "tokenizer.json" and not isinstance(fields.get("model"), dict)):
        raise ConfigError(f"{file.resolve()} holds no tokenizer: get it again")
    return fields


def _replace(link: Path, fields: dict[str, Any]) -> None:
    link.unlink()
    link.write_text(json.dumps(fields), encoding="utf-8")


def _from_folder(folder: str) -> Any:
    from transformers import AutoTokenizer, GPT2TokenizerFast  # type: ignore[attr-defined]

    known = any((Path(folder) / name).is_file() for name in ("tokenizer_config.json", "config.json"))
    return (AutoTokenizer if known else GPT2TokenizerFast).from_pretrained(folder)


def identity(tokenizer: Any) -> str:
    """A hash of all that its tokens depend on."""
    parts = (tokenizer.backend_tokenizer.to_str(), tokenizer.split_special_tokens, tokenizer.eos_token_id)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def copy_tokenizer(folder: Path, target: Path, context: int | None = None) -> None:
    """Its files, for AutoTokenizer.from_pretrained(target) of any version of transformers.

    With `context`, the model's longest, it also pads (with its end of text, if it has no padding token of its own) and
    truncates to that.
    """
    for name in FILES:
        if (file := folder / name).is_file():
            shutil.copyfile(file, target / name)
    settings = target / "tokenizer_config.json"
    fields = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    if (target / "tokenizer.json").is_file():
        fields["tokenizer_class"] = _CLASS
    if isinstance(fields.get("extra_special_tokens"), list):  # version 4 wants a dict there
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    # As version 5 has it; in version 4 token types are a third input of a model, and decoding loses spaces.
    fields = {"model_input_names": ["input_ids", "attention_mask"], "clean_up_tokenization_spaces": False} | fields
    if context is not None:
        fields["model_max_length"] = context
        end = fields.get("eos_token", END_OF_TEXT if not settings.is_file() else None)
        if fields.get("pad_token") is None and end is not None:
            fields |= {"eos_token": end, "pad_token": end}
    settings.write_text(json.dumps(fields, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def check_vocab_size(vocab_size: int) -> None:
    if vocab_size < 257:
        raise ConfigError(f"data.vocab_size={vocab_size} must be at least 257: 256 bytes and the end of text")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE, as GPT-2's, trained on `texts`, of which it keeps the different words with their counts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    check_vocab_size(vocab_size)
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

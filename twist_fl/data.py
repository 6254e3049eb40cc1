"""Corpora -> tokens -> windows -> i.i.d. shards with a cursor.

A tokenised corpus is a folder of the cache, named by the hash of its text and tokenizer, memory-mapped and
shared by all workers of a machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twist_fl import builtin_text
from twist_fl.config import ConfigError, DataConfig
from twist_fl.hub import beside, expanded, local_path, reachable
from twist_fl.tokenizer import load_tokenizer, train_tokenizer

Windows = npt.NDArray[np.int32]
WIKITEXTS = ("wikitext-2-raw-v1", "wikitext-103-raw-v1", "wikitext-2-v1", "wikitext-103-v1")
_FORMAT = 2


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus in the cache. `train` and `test` are memory-mapped (num_windows, window) int32."""

    folder: Path
    digest: str
    vocab_size: int
    end_token: int | None
    """Id of the tokenizer's end-of-text token."""
    train: Windows
    test: Windows

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder / "tokenizer"


def cache_dir() -> Path:
    """`TWIST_FL_CACHE`, or ~/.cache/twist_fl."""
    return Path(os.environ.get("TWIST_FL_CACHE", "~/.cache/twist_fl")).expanduser()


def load_corpus(config: DataConfig, num_workers: int = 1) -> Corpus:
    """Tokenise what `config` names, or find it in the cache.

    Raises ConfigError if a path is missing or there is less than one window per worker.
    """
    documents = _read_documents(config)
    folder = _tokenise(config, documents)
    corpus = open_corpus(folder.name, config.window)
    for split, windows, least in (("training", corpus.train, num_workers), ("test", corpus.test, 1)):
        if len(windows) < least:
            raise ConfigError(
                f"the {split} text gives {len(windows)} windows of data.window={config.window} tokens, "
                f"fewer than {least}: use a smaller data.window or more text"
            )
    return corpus


def open_corpus(digest: str, window: int) -> Corpus:
    """The corpus of that hash from this machine's cache. Raises FileNotFoundError if it is not there."""
    folder = cache_dir() / "tokens" / digest
    meta = json.loads((folder / "meta.json").read_text())

    def windows(split: str) -> Windows:
        tokens = np.load(folder / f"{split}.npy", mmap_mode="r")
        whole = len(tokens) // window
        return tokens[: whole * window].reshape(whole, window)  # type: ignore[no-any-return]

    return Corpus(folder, digest, meta["vocab_size"], meta["end_token"], windows("train"), windows("test"))


class Documents:
    """Training and test texts and a hash of their content; texts are read when they are iterated."""

    def __init__(self, train: Iterable[str], test: Iterable[str], digest: str) -> None:
        self.train, self.test, self.digest = train, test, digest


def _read_documents(config: DataConfig) -> Documents:
    if config.source == "builtin":
        return _split(builtin_text.documents(), config.test_fraction)
    if config.source == "files":
        return _files(config)
    return _wikitext(config)


def _split(texts: Iterable[str], test_fraction: float) -> Documents:
    """Documents go to the test split by the hash of their own text: stable when others come or go."""
    train: list[str] = []
    test: list[str] = []
    content = hashlib.sha256(f"{test_fraction}".encode())
    for text in texts:
        digest = hashlib.sha256(text.encode()).digest()
        content.update(digest)
        (test if int.from_bytes(digest[:8], "big") < test_fraction * 2**64 else train).append(text)
    return Documents(train, test, content.hexdigest())


def _files(config: DataConfig) -> Documents:
    path = expanded(config.path or "")
    if not path.exists():
        raise ConfigError(f"data.path={str(path)!r} does not exist{beside(path)}")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and not _is_hidden(p, path))
    if not any(file.stat().st_size for file in files):
        raise ConfigError(f"data.path={str(path)!r} holds no text")
    train, test = ([f for f in files if f.match(glob)] for glob in (config.train_glob, config.test_glob))
    chosen = (config.train_glob, config.test_glob) != (DataConfig.train_glob, DataConfig.test_glob)
    if path.is_dir() and chosen and not (train and test):
        raise ConfigError(
            f"of the {len(files)} files of data.path={str(path)!r}, data.train_glob={config.train_glob!r} matches "
            f"{len(train)} and data.test_glob={config.test_glob!r} {len(test)}: give both so that each matches, or none"
        )
    if path.is_file() or not (train and test):
        return _split((text for file in files for text in _paragraphs(_read(file))), config.test_fraction)
    if both := [file for file in train if file in test]:
        raise ConfigError(
            f"{both[0].name!r} matches data.train_glob={config.train_glob!r} and data.test_glob={config.test_glob!r}: "
            "text that is trained on tests nothing, change one of them"
        )
    content = hashlib.sha256(f"{len(train)} training files".encode())
    for file in [*train, *test]:
        content.update(hashlib.sha256(file.read_bytes()).digest())
    return Documents([_read(f) for f in train], [_read(f) for f in test], content.hexdigest())


def _is_hidden(file: Path, below: Path) -> bool:
    """A repository's .git holds no text to train on."""
    return any(part.startswith(".") for part in file.relative_to(below).parts)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{str(file)!r} is not UTF-8 text ({error.reason} at byte {error.start}): convert it, or move it away"
        ) from error


def _paragraphs(text: str, least: int = 2000) -> Iterator[str]:
    """Pieces of at least `least` characters that end at blank lines, so that a single file can be split."""
    piece = ""
    for paragraph in text.split("\n\n"):
        piece += paragraph + "\n\n"
        if len(piece) >= least:
            yield piece
            piece = ""
    if piece.strip():
        yield piece


def _wikitext(config: DataConfig) -> Documents:
    from datasets import load_dataset

    if not config.path and config.name not in WIKITEXTS:
        raise ConfigError(f"data.name={config.name!r} is no WikiText: choose one of {', '.join(WIKITEXTS)}")
    local_path("data.path", config.path or "Salesforce/wikitext")
    with reachable(f"data set {config.path or 'Salesforce/wikitext'} ({config.name})"):
        dataset: Any = load_dataset(config.path or "Salesforce/wikitext", config.name)
    digest = hashlib.sha256()
    # Not the data set's own fingerprint: of a local copy, that is a hash of its path.
    for split in ("train", "test"):
        digest.update(f"{split} {len(dataset[split])}".encode())
        for batch in dataset[split].iter(10_000):
            digest.update("\0".join(batch["text"]).encode())
    # One row is one line with its newline; empty rows carry nothing.
    train, test = ((row["text"] for row in dataset[split] if row["text"]) for split in ("train", "test"))
    return Documents(train, test, digest.hexdigest())


def _tokenise(config: DataConfig, documents: Documents) -> Path:
    tokenizer = None if config.tokenizer is None else load_tokenizer(config.tokenizer)
    identity = (
        f"bpe {config.vocab_size}"
        if tokenizer is None
        else hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    )
    # wikitext rows are lines of running text: only separate documents get an end-of-text token between them.
    separate = config.source != "wikitext"
    key = json.dumps([_FORMAT, documents.digest, identity, separate])
    folder = cache_dir() / "tokens" / hashlib.sha256(key.encode()).hexdigest()[:32]
    if (folder / "meta.json").is_file():
        return folder
    if tokenizer is None:
        documents.train = list(documents.train)
        tokenizer = train_tokenizer(documents.train, config.vocab_size)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="making-") as scratch:
        making = Path(scratch) / "corpus"
        making.mkdir()
        sizes = {}
        for split, texts in (("train", documents.train), ("test", documents.test)):
            tokens = _encode(tokenizer, texts, separate)
            np.save(making / f"{split}.npy", tokens)
            sizes[split] = len(tokens)
        tokenizer.save_pretrained(making / "tokenizer")
        meta = {
            "vocab_size": len(tokenizer),
            "end_token": tokenizer.eos_token_id,
            "tokens": sizes,
            "data": asdict(config),
        }
        (making / "meta.json").write_text(json.dumps(meta, indent=1))
        try:
            making.rename(folder)
        except OSError:
            # Another process made the same corpus first: its content is the same by construction.
            if not (folder / "meta.json").is_file():
                raise
    return folder


def _encode(tokenizer: Any, texts: Iterable[str], separate: bool) -> npt.NDArray[np.int32]:
    end = tokenizer.eos_token_id
    tail = [end] if separate and end is not None else []
    parts: list[npt.NDArray[np.int32]] = []
    for batch in _batches(texts, 1000):
        for encoding in tokenizer.backend_tokenizer.encode_batch(batch, add_special_tokens=False):
            parts.append(np.array(encoding.ids + tail, dtype=np.int32))
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


@dataclass(frozen=True)
class Shard:
    """One worker's part of one i.i.d. permutation of the training windows, fixed for the run.

    All shards have the same size; the last `num_windows % num_workers` windows of the permutation are left out.
    """

    seed: int
    worker: int
    num_workers: int
    num_windows: int
    batch_size: int

    @property
    def size(self) -> int:
        return self.num_windows // self.num_workers

    @property
    def batches_per_epoch(self) -> int:
        return -(-self.size // self.batch_size)

    def batch_length(self, cursor: int) -> int:
        """Windows in batch number `cursor`: the last one of an epoch may be shorter."""
        position = cursor % self.batches_per_epoch
        return min(self.batch_size, self.size - position * self.batch_size)

    def batch(self, cursor: int) -> npt.NDArray[np.int64]:
        """Window ids of batch number `cursor`, counted from the run's start; reshuffled every epoch."""
        epoch, position = divmod(cursor, self.batches_per_epoch)
        mine = _permutation(self.num_windows, self.seed, 0)[: self.size * self.num_workers][
            self.worker :: self.num_workers
        ]
        order = _permutation(self.size, self.seed, 1, self.worker, epoch)
        return mine[order[position * self.batch_size : (position + 1) * self.batch_size]]


@lru_cache(maxsize=16)
def _permutation(size: int, *coordinates: int) -> npt.NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(coordinates))).permutation(size)

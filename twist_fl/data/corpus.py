"""Corpora -> tokens -> windows -> i.i.d. shards with a cursor.

A tokenised corpus is a sealed folder of the cache, named by the hash of its text and tokenizer, memory-mapped and
shared by all workers of a machine.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from twist_fl.config.schema import DataConfig
from twist_fl.data.documents import Source
from twist_fl.data.encode import SPLITS, tokenise
from twist_fl.data.progress import Meter
from twist_fl.data.sources import find_source
from twist_fl.data.tokenizer import check_vocab_size, identity, load_tokenizer, train_tokenizer
from twist_fl.system.errors import ConfigError, DamagedError
from twist_fl.system.files import cache_dir, check_seal, new_folder, read_json, write_json

Windows = npt.NDArray[np.int32]
_FORMAT = 3
_KEPT_SECONDS = 7 * 86_400
"""An unfinished corpus that nobody has gone on with for so long is removed."""


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


def load_corpus(config: DataConfig, num_workers: int = 1, num_test: int = 1) -> Corpus:
    """Tokenise what `config` names, or find it in the cache; one that is damaged there is made anew.

    Raises ConfigError if there is no such text or tokenizer, less than one window per worker, or fewer than `num_test`.
    """
    meter = Meter()
    check_vocab_size(config.vocab_size)
    tokenizer = None if config.tokenizer is None else load_tokenizer(config.tokenizer)
    text = find_source(config, meter)
    key = json.dumps([_FORMAT, text.digest, identity(tokenizer) if tokenizer else f"bpe {config.vocab_size}"])
    digest = hashlib.sha256(key.encode()).hexdigest()[:32]
    try:
        corpus = open_corpus(digest, config.window)
    except (FileNotFoundError, DamagedError) as error:
        if isinstance(error, DamagedError):
            meter.say(f"cache: {error}; it is made anew")
        with _alone(digest, meter) as unfinished:
            if not _is_whole(digest):
                _make(digest, text, tokenizer, config, unfinished, meter)
        corpus = open_corpus(digest, config.window)
    for split, windows, least in (("training", corpus.train, num_workers), ("test", corpus.test, num_test)):
        if len(windows) < least:
            raise ConfigError(
                f"the {split} text gives {len(windows)} windows of data.window={config.window} tokens, "
                f"fewer than {least}: use a smaller data.window or more text"
            )
    return corpus


def find_corpus(digest: str, window: int, read: Callable[[], Corpus]) -> Corpus:
    """The corpus of that hash from the cache; where it is not there or damaged, what `read` finds now.

    Raises DamagedError if it is damaged and its text cannot be read.
    """
    try:
        return open_corpus(digest, window)
    except FileNotFoundError:
        return read()
    except DamagedError as damage:
        try:
            return read()
        except ConfigError as error:
            raise DamagedError(f"{damage}; it cannot be made anew here: {error}") from damage


def open_corpus(digest: str, window: int) -> Corpus:
    """The corpus of that hash from this machine's cache.

    Raises FileNotFoundError if it is not there, DamagedError if a byte of it is not as it was written.
    """
    folder = _folder(digest)
    if not folder.is_dir():
        raise FileNotFoundError(f"no corpus {digest} in {folder.parent}")
    check_seal(folder)
    meta = read_json(folder / "meta.json")

    def windows(split: str) -> Windows:
        tokens = np.load(folder / f"{split}.npy", mmap_mode="r")
        whole = len(tokens) // window
        return tokens[: whole * window].reshape(whole, window)  # type: ignore[no-any-return]

    return Corpus(folder, digest, meta["vocab_size"], meta["end_token"], windows("train"), windows("test"))


def _folder(digest: str) -> Path:
    return cache_dir() / "tokens" / digest


def _is_whole(digest: str) -> bool:
    try:
        open_corpus(digest, 1)
    except (FileNotFoundError, DamagedError):
        return False
    return True


def _make(digest: str, text: Source, tokenizer: Any, config: DataConfig, unfinished: Path, meter: Meter) -> None:
    """All that takes long goes to `unfinished`, where the next process finds it if this one ends."""
    if tokenizer is None:
        tokenizer = _trained(text, config.vocab_size, unfinished / "tokenizer", meter)
    sizes = tokenise(text, tokenizer, unfinished, meter)
    with new_folder(_folder(digest), sealed=True) as making:
        for split in SPLITS:
            shutil.copyfile(unfinished / f"{split}.npy", making / f"{split}.npy")
        tokenizer.save_pretrained(making / "tokenizer")
        about = {"vocab_size": len(tokenizer), "end_token": tokenizer.eos_token_id, "tokens": sizes}
        write_json(about | {"data": asdict(config)}, making / "meta.json")


def _trained(text: Source, vocab_size: int, folder: Path, meter: Meter) -> Any:
    """A tokenizer of the training text, or what is left of an interrupted run that had one."""
    if not folder.is_dir():
        with meter.task("training the tokenizer", text.num_bytes) as advance:

            def training_text() -> Iterator[str]:
                for piece in text.pieces():
                    advance(len(piece.text.encode()))
                    if piece.train:
                        yield piece.text

            made = train_tokenizer(training_text(), vocab_size)
        with new_folder(folder) as making:
            made.save_pretrained(making)
    return load_tokenizer(str(folder))


@contextmanager
def _alone(digest: str, meter: Meter) -> Iterator[Path]:
    """A folder for an unfinished corpus, for one process at a time; it goes when all went well."""
    folder = cache_dir() / "unfinished" / digest
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=1)
    except Timeout:
        meter.say("another process is tokenising this text: waiting for it")
        lock.acquire()
    try:
        _sweep(folder)
        folder.mkdir(exist_ok=True)
        yield folder
        shutil.rmtree(folder)
        Path(lock.lock_file).unlink(missing_ok=True)
    finally:
        lock.release()


def _sweep(mine: Path) -> None:
    """What killed processes left of this corpus, and unfinished ones that are old."""
    for path in (cache_dir() / "tokens").glob(f".{mine.name}.*"):
        shutil.rmtree(path)
    for path in mine.parent.iterdir():
        if path.is_dir() and path != mine and time.time() - path.stat().st_mtime > _KEPT_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class Shard:
    """One worker's part of one i.i.d. permutation of the training windows, fixed for the run.

    All shards of `num_workers` have the same size; the last `num_windows % num_workers` windows of the permutation are
    left out. Where a worker has all windows for itself, whichever it is, `num_workers` is 1.
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
            self.worker % self.num_workers :: self.num_workers
        ]
        order = _permutation(self.size, self.seed, 1, self.worker, epoch)
        return mine[order[position * self.batch_size : (position + 1) * self.batch_size]]


@lru_cache(maxsize=16)
def _permutation(size: int, *coordinates: int) -> npt.NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(coordinates))).permutation(size)

"""Text of a worker's own (data.private): read where it lies, with the run's tokenizer; elsewhere a hash and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from twist_fl.config.checks import NODES, check_name
from twist_fl.config.hub import beside, expanded
from twist_fl.config.schema import Config, DataConfig
from twist_fl.data.corpus import Corpus, load_corpus
from twist_fl.data.run_text import RunText
from twist_fl.system.errors import ConfigError
from twist_fl.system.untrusted import Field, shown

Own = dict[int, RunText]


def read_texts(config: Config) -> tuple[RunText, Own | None]:
    """The run's text and, where each worker has its own, that of each. Raises ConfigError."""
    run = RunText.read(config.data, config.train.workers)
    own = own_texts(config, run)
    for worker, text in (own or {}).items():
        if text is not run:
            text.read_again()
        check_batch(text, config.train.batch_size, f"worker {worker}")
    return run, own


def own_texts(config: Config, run: RunText, known: Sequence[Sequence[Any]] = ()) -> Own | None:
    """Those of the workers, not looked for before they are needed; `known` says what `facts` told of them.

    With data.private=nodes, only that of the server's own worker, if it has one: the others are added as nodes come.
    """
    if config.data.private is None:
        return None
    if config.data.private == NODES:
        return {0: run} if config.train.variant == "hybrid" else {}
    return {
        worker: FolderText(run, worker, *(known[worker] if known else ())) for worker in range(config.train.workers)
    }


def facts(text: RunText) -> tuple[str, int, int]:
    """What a job says of a text."""
    return text.digest, text.num_windows, text.num_test


def digests(run: RunText, own: Own | None) -> list[str]:
    """The hashes of all texts of a run."""
    return [text.digest for text in (run, *(own or {}).values())]


def known_facts(rows: Any, num_workers: int) -> list[list[Any]]:
    """The `facts` of all workers as a job has them; none if it has none. Raises ValueError."""
    if rows is None:
        return []
    kinds = (Field(str), Field(int, 0), Field(int, 0))
    if not isinstance(rows, list) or len(rows) != num_workers:
        raise ValueError(f"own={shown(rows)} is no list of the texts of {num_workers} workers")
    for row in rows:
        if not isinstance(row, list) or len(row) != 3 or not all(map(Field.holds, kinds, row)):
            raise ValueError(f"own: {shown(row)} is no hash and two numbers of windows")
        check_name("own", row[0])
    return rows


def load_own(config: DataConfig, path: str, tokenizer: Path) -> Corpus:
    """The text in `path`, read as the server's is, of whatever source that be. Raises ConfigError."""
    own = replace(config, source="files", path=path, name=None, tokenizer=str(tokenizer))
    return load_corpus(own, 0, 0)


def check_batch(text: RunText, batch_size: int, whose: str) -> None:
    """Raises ConfigError if the text is less than one batch."""
    if text.num_windows < batch_size:
        raise ConfigError(
            f"{whose} has {text.num_windows} windows of data.window={text.config.window} tokens to train on, fewer "
            f"than train.batch_size={batch_size}: give it more text, or make either smaller"
        )


class FolderText(RunText):
    """Worker `worker`'s: the part of that place in the folder data.private. `run` has the tokenizer."""

    place = "data.private"

    def __init__(
        self, run: RunText, worker: int, digest: str = "", num_windows: int | None = None, num_test: int | None = None
    ) -> None:
        super().__init__(run.config, run.num_workers, digest, num_windows, num_test)
        self._run, self._worker, self.whose = run, worker, f"worker {worker}'s text"

    def _read(self) -> Corpus:
        assert self.config.private
        path = parts_of(self.config.private, self.num_workers)[self._worker]
        try:
            return load_own(self.config, str(path), self._run.open().tokenizer_folder)
        except ConfigError as error:
            raise ConfigError(f"worker {self._worker}: {error}") from error

    def check(self, digest: str) -> None:
        if digest != self.digest:
            raise ConfigError(
                f"{self.whose} or its tokenizer is not what the run began with (hash {digest}, expected "
                f"{self.digest}): give it that (data.private=..., data.tokenizer=...)"
            )


def parts_of(folder: str, num_workers: int) -> list[Path]:
    """The files and folders in `folder`, one for each worker, in the order of their names. Raises ConfigError."""
    base = expanded(folder)
    if not base.is_dir():
        state = "is a file" if base.exists() else f"does not exist{beside(base)}"
        raise ConfigError(f"data.private={folder!r} {state}: give a folder that holds a folder or a file a worker")
    found = sorted(path for path in base.iterdir() if not path.name.startswith("."))
    if len(found) != num_workers:
        raise ConfigError(
            f"data.private={folder!r} holds {len(found)} files and folders, and train.workers={num_workers}: one of "
            "them is each worker's own text"
        )
    return found

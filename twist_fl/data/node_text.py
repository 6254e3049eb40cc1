"""A node's own text (data.private=nodes): it is read and tokenised on the node, and stays there.

The tokenizer comes in a message, and is known by its hash. What is told of the text is how many windows it has, and a
hash by which the server notices that it has changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from twist_fl.config.checks import check_name
from twist_fl.config.schema import DataConfig
from twist_fl.data.corpus import Corpus
from twist_fl.data.own_text import load_own
from twist_fl.data.run_text import RunText
from twist_fl.data.tokenizer import FILES
from twist_fl.system.errors import ConfigError, DamagedError
from twist_fl.system.files import cache_dir, check_seal, new_folder, read_json, write_json, write_text
from twist_fl.system.untrusted import read_fields

_MOST_CHARACTERS = 2**27
"""Of a tokenizer's files; the largest known have an eighth of it."""


@dataclass(frozen=True)
class Place:
    """Where a node's text lies, and its hash when this node last read it for the run."""

    path: str
    digest: str = ""


class NodeText(RunText):
    """On the node: the text in `place`, read with the tokenizer of that hash."""

    whose, place = "this node's own text", "data in its node config"

    def __init__(self, config: DataConfig, tokenizer: str, where: Place) -> None:
        super().__init__(config, 1, where.digest)
        self._tokenizer, self._path = tokenizer, where.path

    def _read(self) -> Corpus:
        return load_own(self.config, self._path, kept_tokenizer(self._tokenizer))

    def check(self, digest: str) -> None:
        if digest != self.digest:
            raise ConfigError("this node's own text has changed since the run asked for it")


class ToldText(RunText):
    """At the server: what a node has told of its text."""

    here = False

    def __init__(self, config: DataConfig, worker: int, digest: str, num_windows: int, num_test: int) -> None:
        super().__init__(config, 1, digest, num_windows, num_test)
        self.whose = f"worker {worker}'s text"

    def open(self) -> Corpus:
        raise ConfigError(f"{self.whose} is on its node, and nowhere else")


def told_digest(run_id: str, text: RunText) -> str:
    """The hash that the server is told: of no use to look the text up by, or to compare it with another run's."""
    return hashlib.sha256(f"{run_id} {text.digest}".encode()).hexdigest()[:32]


# What a node has read for a run: a stock SuperNode starts a new process for every message


def remember(run_id: str, where: Place) -> None:
    write_json({"digest": where.digest}, _memory(run_id, where.path))


def recall(run_id: str, path: str) -> Place:
    """The text as it was when the run asked for it. Raises ConfigError if the node does not know any more."""
    file = _memory(run_id, path)
    if not file.is_file():
        raise ConfigError("what this node has read for the run is not in its cache any more: the next round asks again")
    return Place(path, str(read_json(file, dict).get("digest")))


def _memory(run_id: str, path: str) -> Path:
    return cache_dir() / "nodes" / run_id / f"{hashlib.sha256(path.encode()).hexdigest()[:32]}.json"


# The tokenizer on its way


def tokenizer_files(folder: Path) -> dict[str, str]:
    """What a node needs to read text as the server does."""
    return {name: (folder / name).read_bytes().decode() for name in FILES if (folder / name).is_file()}


def tokenizer_digest(files: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:32]


def keep_tokenizer(files: Mapping[str, str], digest: str) -> None:
    """Into this machine's cache. Raises ValueError unless it is a tokenizer of that hash."""
    if unknown := sorted(files.keys() - set(FILES)):
        raise ValueError(f"tokenizer: {unknown[0]!r} is none of its files")
    if sum(map(len, files.values())) > _MOST_CHARACTERS or tokenizer_digest(files) != digest:
        raise ValueError(f"tokenizer: what came is not of the hash {digest}")
    try:
        kept_tokenizer(digest)
    except (ConfigError, DamagedError):
        with new_folder(_tokenizer(digest), sealed=True) as making:
            for name, text in files.items():
                write_text(text, making / name)


def kept_tokenizer(digest: str) -> Path:
    """Its folder in this machine's cache. Raises ConfigError if it has not come, DamagedError if it has changed."""
    folder = _tokenizer(digest)
    if not folder.is_dir():
        raise ConfigError("the run's tokenizer is not in this node's cache any more: the next round sends it again")
    check_seal(folder)
    return folder


def _tokenizer(digest: str) -> Path:
    return cache_dir() / "tokenizers" / digest


def tokenizer_named(text: str) -> str:
    """In the job of a message: the hash of the tokenizer for a node's own text, or "" if the run's text is another.

    Raises ValueError."""
    digest = read_fields(text, {}).get("tokenizer", "")
    if digest:
        check_name("tokenizer", str(digest))
    return str(digest)

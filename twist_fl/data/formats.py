"""How text is read from one file or one split of a data set: a stream of strings, whatever its size.

Rows of json, csv, parquet and arrow files are read by `datasets`. Plain text is read here, because a line of it
may be of any length, and a document too.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from twist_fl.config.suggest import nearest
from twist_fl.system.errors import ConfigError

_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
"""Builders of `datasets` by a file's ending. A cell that holds NA is text."""
_PLAIN = (".txt", ".text", ".md", ".rst", ".tokens", ".raw")
_NO_TEXT = (
    *(b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"ID3", b"OggS", b"%PDF", b"PK\x03\x04", b"\x1f\x8b", b"BZh"),
    *(b"\xfd7zXZ", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd"),
)
"""First bytes of pictures, sounds, PDF and archives. All other files that are no text have a zero byte early on."""
_CHUNK = 1 << 20
_ROWS = 256


@dataclass(frozen=True)
class Part:
    """A file or a split of a data set."""

    name: str
    """What data.train_glob and data.test_glob are matched with."""
    texts: Callable[[], Iterator[str]]
    running: bool = False
    """The texts are one after the other of one document, and not a document each."""
    lines: bool = False
    """The texts are lines of running text, as WikiText's: nothing says where a document ends."""
    num_bytes: int | None = None
    """Of all texts, where that is known before they are read."""


def kind(file: Path) -> str:
    """ "rows", "text", or "other", which holds no text."""
    ending = _ending(file)
    if ending in _BUILDERS:
        return "rows"
    if ending in _PLAIN:
        return "text"
    with _open(file) as stream, _readable(file, "text"):
        head = stream.read(8192)
    return "other" if b"\0" in head or head.startswith(_NO_TEXT) else "text"


def file_part(file: Path, name: str, column: str | None) -> Part:
    if kind(file) == "rows":
        return Part(name, partial(_rows_of_file, file, column))
    size = None if file.suffix.lower() == ".gz" else file.stat().st_size
    return Part(name, partial(_chunks, file), running=True, num_bytes=size)


def dataset_part(dataset: Any, name: str, column: str | None, where: str) -> Part:
    """A split that is here already."""
    chosen = text_column(dataset.features.arrow_schema, column, where)
    return Part(name, partial(_strings, dataset.select_columns([chosen]).with_format("arrow"), chosen, where))


def text_column(schema: Any, column: str | None, where: str) -> str:
    """The one that is asked for, else "text", else the only one of strings. Raises ConfigError."""
    from pyarrow import types

    kinds = {field.name: str(field.type) for field in schema}
    strings = [field.name for field in schema if types.is_string(field.type) or types.is_large_string(field.type)]
    listed = some([f"{name[:40]} ({kind[:40]})" for name, kind in kinds.items()], 12)
    if column is not None and column not in kinds:
        raise ConfigError(f"data.column={column!r} is not in {where}{nearest(column, kinds)}; columns: {listed}")
    if column is not None and column not in strings:
        raise ConfigError(f"data.column={column!r} of {where} holds no strings; columns: {listed}")
    found = column or ("text" if "text" in strings else strings[0] if len(strings) == 1 else None)
    if found is None:
        raise ConfigError(
            f"which column of {where} is the text? Give data.column; columns: {listed}"
            if strings
            else f"{where} has no column of strings; columns: {listed}"
        )
    return found


def some(names: Sequence[str], most: int = 5) -> str:
    """Listed, the first of them."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def one_line(error: BaseException) -> str:
    """What an error says, in a line that is not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]}..."


def _ending(file: Path) -> str:
    """Without .gz, in small letters."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def _open(file: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(file)) if file.suffix.lower() == ".gz" else file.open("rb")


@contextmanager
def _readable(file: Path, kind: str) -> Iterator[None]:
    """Turns what a library says of a file that it cannot read into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise ConfigError(
            f"{str(file)!r} cannot be read as {kind} ({one_line(error)}): mend it, or move it away"
        ) from error


def _chunks(file: Path) -> Iterator[str]:
    """Its text, all line ends as \\n, without a byte order mark."""
    with _open(file) as stream, _readable(file, "text"):
        text = io.TextIOWrapper(stream, encoding="utf-8-sig")
        try:
            while chunk := text.read(_CHUNK):
                yield chunk
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{str(file)!r} is not UTF-8 text ({error.reason} at byte {_first_bad_byte(file)}): convert it, or "
                "move it away"
            ) from error


def _first_bad_byte(file: Path) -> int:
    decoder, before = codecs.getincrementaldecoder("utf-8")(), 0
    with _open(file) as stream:
        while True:
            chunk = stream.read(_CHUNK)
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return before - held + error.start
            before += len(chunk)


def _rows_of_file(file: Path, column: str | None) -> Iterator[str]:
    from datasets import load_dataset

    builder, options = _BUILDERS[_ending(file)]
    with _quiet_datasets(), _readable(file, builder), _plainly_named(file) as plain:
        load = partial(load_dataset, builder, data_files={"train": [plain]}, split="train")
        try:
            dataset = load(streaming=True, **options)
            if builder == "parquet":
                chosen = text_column(dataset.features.arrow_schema, column, repr(str(file)))
                dataset = load(streaming=True, columns=[chosen], batch_size=_ROWS)
        except StopIteration:  # a file without rows
            return
        yield from _strings(dataset.with_format("arrow"), column, repr(str(file)))


def _strings(dataset: Any, column: str | None, where: str) -> Iterator[str]:
    for table in dataset.iter(_ROWS):
        column = text_column(table.schema, column, where)
        yield from (text for text in table.column(column).to_pylist() if text)


@contextmanager
def _plainly_named(file: Path) -> Iterator[str]:
    """The file under a name without anything that stands for a pattern or an address; parquet and arrow, which are read
    from any place of a file, unpacked."""
    with tempfile.TemporaryDirectory() as folder:
        packed = file.suffix.lower() == ".gz"
        if packed and _ending(file) in (".parquet", ".arrow"):
            plain = Path(folder) / f"rows{_ending(file)}"
            with _open(file) as stream, plain.open("wb") as unpacked:
                shutil.copyfileobj(stream, unpacked)
        else:
            plain = Path(folder) / f"rows{_ending(file)}{'.gz' * packed}"
            plain.symlink_to(file.resolve())
        yield glob.escape(str(plain))


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Its log repeats what its errors say."""
    from datasets.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)

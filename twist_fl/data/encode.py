"""Text -> tokens on the disk, by all cores, in memory that does not grow with the text; an interrupted one goes on.

`train.npy` and `test.npy` grow together. A journal says how far both are: what is beyond it is cut off and made again,
so whoever goes on, on any number of cores, gets the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from twist_fl.data.documents import Piece, Source
from twist_fl.data.progress import Meter
from twist_fl.system.cores import usable_cores
from twist_fl.system.files import read_json, write_json

SPLITS = ("train", "test")
_JOURNAL = "journal.json"
_START = {"pieces": 0, "bytes": 0, "train": 0, "test": 0}
_BATCH_CHARS = 1 << 18
"""Text that a core gets at a time; the tokenizer takes some 140 bytes a character of it."""
_BATCH_PIECES = 1000
_STRIDE = 1 << 24
"""Bytes of text between two entries of the journal: what an interruption costs at most."""
_HEADER = 128
"""Bytes of an .npy file before its numbers."""


def tokenise(text: Source, tokenizer: Any, folder: Path, meter: Meter) -> dict[str, int]:
    """`folder` gets train.npy and test.npy, int32, or what is missing of them; returns their numbers of tokens."""
    at = _progress(folder)
    with ExitStack() as stack, meter.task("tokenising", text.num_bytes, at["bytes"]) as advance:
        files = {split: stack.enter_context(_reopen(folder / f"{split}.npy", at[split])) for split in SPLITS}
        pieces = text.pieces()
        next(islice(pieces, at["pieces"], at["pieces"]), None)
        journalled = at["bytes"]
        for batch in _ahead(_batches(pieces)):
            size = sum(len(piece.text.encode()) for piece in batch)
            at["pieces"] += len(batch)
            at["bytes"] += size
            for split, tokens in _encode(tokenizer, batch).items():
                files[split].write(tokens.tobytes())
                at[split] += len(tokens)
            if at["bytes"] - journalled >= _STRIDE:
                _note(at, files.values(), folder)
                journalled = at["bytes"]
            advance(size)
        for split, file in files.items():
            _write_header(file, at[split])
        _note(at, files.values(), folder)
    return {split: at[split] for split in SPLITS}


def _progress(folder: Path) -> dict[str, int]:
    if not (folder / _JOURNAL).is_file():
        return dict(_START)
    return {key: int(value) for key, value in read_json(folder / _JOURNAL).items()}


def _note(at: dict[str, int], files: Iterable[BinaryIO], folder: Path) -> None:
    for file in files:
        file.flush()
        os.fsync(file.fileno())
    write_json(at, folder / _JOURNAL)


def _reopen(path: Path, num_tokens: int) -> BinaryIO:
    """At the end of its first `num_tokens`."""
    path.touch()
    file = path.open("r+b")
    file.truncate(_HEADER + 4 * num_tokens)
    file.seek(_HEADER + 4 * num_tokens)
    return file


def _write_header(file: BinaryIO, num_tokens: int) -> None:
    file.seek(0)
    about = {"descr": "<i4", "fortran_order": False, "shape": (num_tokens,)}
    np.lib.format.write_array_header_1_0(file, about)
    assert file.tell() == _HEADER


def _encode(tokenizer: Any, batch: list[Piece]) -> dict[str, np.ndarray[Any, np.dtype[np.int32]]]:
    """Tokens of a batch's training and test text. The backend takes all cores and lets other threads run."""
    end = tokenizer.eos_token_id
    found: dict[str, list[np.ndarray[Any, Any]]] = {split: [np.zeros(0, "<i4")] for split in SPLITS}
    encodings = tokenizer.backend_tokenizer.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
    for piece, encoding in zip(batch, encodings, strict=True):
        tail = [end] if piece.ends and end is not None else []
        found["train" if piece.train else "test"].append(np.array(encoding.ids + tail, dtype="<i4"))
    return {split: np.concatenate(parts) for split, parts in found.items()}


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, chars, most = list[Piece](), 0, _BATCH_CHARS * max(4, usable_cores())
    for piece in pieces:
        batch.append(piece)
        chars += len(piece.text)
        if chars >= most or len(batch) == _BATCH_PIECES * usable_cores():
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _ahead(batches: Iterator[list[Piece]]) -> Iterator[list[Piece]]:
    """The same, each read while the one before it is worked on."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, batches, None)
        while batch := waiting.result():
            waiting = pool.submit(next, batches, None)
            yield batch

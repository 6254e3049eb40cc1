"""A corpus divided among workers, document by document: a file for each, as data.private takes them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from math import isfinite
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from twist_fl.config.schema import DataConfig
from twist_fl.data.documents import Piece
from twist_fl.data.progress import Meter
from twist_fl.data.sources import find_source
from twist_fl.system.errors import ConfigError
from twist_fl.system.files import new_folder

_LEAST = 2000
"""Characters of running text that stay together: where nothing says that a document ends."""
Share = Counter[str]
"""A worker's text: by source, characters."""


def partition(
    config: DataConfig, out: Path, num_workers: int, alpha: float | None, seed: int, meter: Meter
) -> list[Share]:
    """Deal the training documents out to `num_workers` files in the new folder `out`; what each worker got.

    Without `alpha` each document goes to any worker. With it a source, that is a folder of the corpus or, if there is
    only one, a file, is spread by odds drawn from a Dirichlet distribution: 0.1 leaves most sources to one or two of
    the workers, 100 is nearly even (arXiv 1909.06335, with sources in the place of classes). Test text goes to nobody.

    Raises ConfigError for a folder that exists, an alpha that is not positive, or a worker that would get nothing.
    """
    if alpha is not None and not (isfinite(alpha) and alpha > 0):
        raise ConfigError(f"alpha={alpha:g} must be a positive number: 0.1 is uneven, 100 nearly even")
    if out.exists():
        raise ConfigError(f"{out} exists: give a folder that is to be made")
    text = find_source(config, meter)
    label = _labels({piece.part for piece in text.pieces() if piece.train})
    rng = np.random.default_rng([seed, num_workers])
    odds = {source: _odds(source, num_workers, alpha, seed) for source in label.values()}
    shares = [Share() for _ in range(num_workers)]
    with new_folder(out) as making, meter.task("dealing documents out", text.num_bytes) as advance:
        files = [making / f"{worker:0{len(str(num_workers - 1))}}.jsonl" for worker in range(num_workers)]
        for part, document in _whole(piece for piece in text.pieces() if piece.train):
            worker = int(rng.choice(num_workers, p=odds[label[part]]))
            with files[worker].open("a", encoding="utf-8") as file:  # there may be more workers than files may be open
                file.write(json.dumps({config.column or "text": document}, ensure_ascii=False) + "\n")
            shares[worker][label[part]] += len(document)
            advance(len(document.encode()))
        if empty := [worker for worker, share in enumerate(shares) if not share]:
            raise ConfigError(
                f"of {num_workers} workers {len(empty)} would have no text (worker {empty[0]} first): use fewer, or "
                + ("more text" if alpha is None else f"a larger alpha than {alpha:g}, or another seed")
            )
    return shares


def _labels(parts: Iterable[str]) -> dict[str, str]:
    """Each part's source: its folder, or where all lie in one the file."""
    folders = {part: str(PurePosixPath(part).parent) for part in parts}
    return folders if len(set(folders.values())) > 1 else {part: PurePosixPath(part).name for part in folders}


def _odds(source: str, num_workers: int, alpha: float | None, seed: int) -> npt.NDArray[np.float64]:
    """Each worker's share of the source: of its name and the seed alone."""
    if alpha is None:
        return np.full(num_workers, 1 / num_workers)
    rng = np.random.default_rng([seed, int.from_bytes(sha256(source.encode()).digest()[:8], "big")])
    return rng.dirichlet([alpha] * num_workers)


def _whole(pieces: Iterable[Piece]) -> Iterator[tuple[str, str]]:
    """Documents with their parts; of running text and of very long ones, as much as stays together."""
    held: list[str] = []
    last = ""
    for piece in pieces:
        if held and piece.part != last:
            yield last, "".join(held)
            held = []
        held.append(piece.text)
        last = piece.part
        if piece.ends or sum(map(len, held)) >= _LEAST:
            yield last, "".join(held)
            held = []
    if held:
        yield last, "".join(held)


def rows(shares: Sequence[Share]) -> Iterator[tuple[str, str, str, str]]:
    """For a table: the worker, its characters, its share of all, and its largest source."""
    total = sum(share.total() for share in shares)
    for worker, share in enumerate(shares):
        ((source, size),) = share.most_common(1)
        largest = f"{source} ({size / share.total():.0%})"
        yield str(worker), f"{share.total():,}", f"{share.total() / total:.1%}", largest

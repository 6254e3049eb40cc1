"""Text in pieces: cut where that changes no token, divided into training and test text, hashed. Nothing here holds more
than a document that is a row of a data set, or a piece of a longer one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from twist_fl.data.progress import Meter
from twist_fl.system.errors import ConfigError

LONGEST = 1 << 16
"""Characters of a piece."""
_LEAST = 2000
"""Characters of a document of running text."""
_FINER = (LONGEST, 8192, 1024)
"""Longest documents of text that gives too few of them for two splits."""
_LONGEST_LINE = 1 << 20
_BLANK = re.compile(r"\n[^\S\n]*\n")
"""The end of a paragraph; a blank line may hold spaces."""


class Piece(NamedTuple):
    text: str
    ends: bool
    """A document ends here."""
    train: bool
    """Training text, else test text."""
    part: str = ""
    """The file or split that it is of."""


@dataclass(frozen=True)
class Source:
    """All of a corpus, as often as it is asked for; `digest` is of its content and how it is divided."""

    read: Callable[[], Iterator[Piece]]
    digest: str
    num_bytes: int
    both: bool
    """There is training and test text."""

    def pieces(self) -> Iterator[Piece]:
        """Raises ConfigError at the end if the text is not what it was when it was hashed."""
        digest = hashlib.sha256()
        for piece in self.read():
            _hash(piece, digest)
            yield piece
        if digest.hexdigest() != self.digest:
            raise ConfigError("the text was changed while it was read: start again when nothing writes to it")


def survey(read: Callable[[], Iterator[Piece]], meter: Meter, total: int | None = None) -> Source:
    """Reads all of it once, `total` bytes if that is known."""
    digest, num_bytes = hashlib.sha256(), {True: 0, False: 0}
    with meter.task("reading text", total) as advance:
        for piece in read():
            size = _hash(piece, digest)
            num_bytes[piece.train] += size
            advance(size)
    return Source(read, digest.hexdigest(), sum(num_bytes.values()), all(num_bytes.values()))


def _hash(piece: Piece, digest: hashlib._Hash) -> int:
    """The bytes of the text."""
    content = piece.text.encode()
    digest.update(b"%d %d %d " % (piece.train, piece.ends, len(content)))
    digest.update(content)
    return len(content)


def held_out(
    documents: Callable[[int | None], Iterator[tuple[str, str]]],
    fraction: float,
    meter: Meter,
    total: int | None = None,
) -> Source:
    """A share of `documents(longest)`, each with its part's name, is test text: those whose own hash says so, whatever
    others come or go.

    Text of so few documents that one split would be empty is divided into shorter ones; at least one of two is then
    test text, and one training text.
    """
    bound = int(fraction * 2**64)
    for longest in (None, *_FINER):
        text = survey(lambda: _by_rank(documents(longest), bound), meter, total)  # noqa: B023 (read in this turn)
        if text.both or not text.num_bytes:
            return text
    ranks = [_rank(document) for _, document in documents(_FINER[-1])]
    bound = min(max(bound, min(ranks) + 1), max(ranks))
    return survey(lambda: _by_rank(documents(_FINER[-1]), bound), meter)


def _rank(document: str) -> int:
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big")


def _by_rank(documents: Iterator[tuple[str, str]], bound: int) -> Iterator[Piece]:
    for part, document in documents:
        train = _rank(document) >= bound
        for text, ends in pieces([document]):
            yield Piece(text, ends, train, part)


def pieces(chunks: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """One document in pieces of at most LONGEST characters, each with whether it is the last.

    They depend on the text alone, not on its chunks. A cut before a single space between two other characters changes
    no token of a byte-level BPE, with or without a prefix space, of Metaspace or of BERT's WordPiece: a word begins
    there, whatever comes before. Text without such a space is cut after a line, as good for the first, or anywhere.
    """
    rest = ""
    for chunk in chunks:
        rest += chunk
        start = 0
        while len(rest) - start > LONGEST:
            end = _cut(rest, start, start + LONGEST)
            yield rest[start:end], False
            start = end
        rest = rest[start:]
    if rest:
        yield rest, True


def _cut(text: str, start: int, end: int) -> int:
    """Where to cut `text[start:]`, at most at `end`, which is inside the text."""
    for mark, before in ((" ", 0), ("\n", 1)):
        place = text.rfind(mark, start + 1, end)
        while place > 0:
            if not text[place - 1].isspace() and not text[place + 1].isspace():
                return place + before
            place = text.rfind(mark, start + 1, place)
    return end


def running_documents(chunks: Iterable[str], longest: int = LONGEST) -> Iterator[str]:
    """Running text as documents that end at blank lines, at least 2,000 characters long (or half of `longest`).

    Where no blank line comes within `longest` characters they end with a line, else before a space, else anywhere.
    Nothing is lost but documents of white space alone.
    """
    rest = ""
    for chunk in chunks:
        rest += chunk
        start = 0
        while len(rest) - start > longest:
            end = _document_end(rest, start, longest)
            yield from _unless_blank(rest[start:end])
            start = end
        rest = rest[start:]
    while rest:
        end = _paragraph_end(rest, 0, longest) or len(rest)
        yield from _unless_blank(rest[:end])
        rest = rest[end:]


def _document_end(text: str, start: int, longest: int) -> int:
    least = start + _least(longest)
    line = text.rfind("\n", least, start + longest) + 1
    return _paragraph_end(text, start, longest) or line or _cut(text, start, start + longest)


def _paragraph_end(text: str, start: int, longest: int) -> int | None:
    blanks = _BLANK.finditer(text, start, start + longest)
    return next((blank.end() for blank in blanks if blank.end() - start >= _least(longest)), None)


def _least(longest: int) -> int:
    return min(_LEAST, longest // 2)


def _unless_blank(document: str) -> Iterator[str]:
    if document.strip():
        yield document


def lines(chunks: Iterable[str]) -> Iterator[str]:
    """Each with its newline, without those that are blank; one of more than a million characters in several."""
    rest = ""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split("\n")
        yield from (line + "\n" for line in whole if line.strip())
        if len(rest) > _LONGEST_LINE:
            yield rest
            rest = ""
    if rest.strip():
        yield rest

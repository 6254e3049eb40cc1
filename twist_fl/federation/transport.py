"""Memory beside Flower's messages: one segment per worker, which its task and then its reply fill in turn.

On one machine they share it: an anonymous memory file of the server (Linux `memfd`). A worker opens it through the
server's entry in /proc, which only works on the same machine, for the same user. It has no place in any folder, so
there is nothing to clean up: the kernel frees it when the server has closed it, or died, and no worker maps it any
more. On two machines (`flight.py`) each has its own.
"""

from __future__ import annotations

import mmap
import os
import secrets
import sys
import zlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import ClassVar, TypeVar

import torch

from twist_fl.system.threads import for_each, pieces

AVAILABLE = sys.platform == "linux"
"""Whether this system has memory files."""
_PIECE = 4096
"""Bytes summed into one number of a checksum."""
TOKEN_BYTES = 32
KINDS = ("shm", "flight")
"""Transports that need no room in Flower's messages, the better one first."""


class SegmentError(ValueError):
    """A handle that does not name, or no longer names, the memory that this message needs."""


class ChangedError(SegmentError):
    """Somebody has written into the memory since its handle was sent."""


@dataclass(frozen=True)
class Handle:
    """What a message carries instead of its tensors: where they are, and what they add up to."""

    name: str
    num_bytes: int
    checksum: int


@dataclass(frozen=True)
class SharedHandle(Handle):
    """Of memory that is open in the server's process: both numbers are the server's."""

    pid: int
    fd: int


@dataclass(frozen=True)
class FlightHandle(Handle):
    """Of memory to be had over the network, and to be written back there."""

    location: str
    """grpc+tls://HOST:PORT"""
    certificate: str
    """The only one that the server may show, PEM."""
    down: str
    up: str
    """Tokens: who has it may fetch the task, and once send the reply."""


class Segment(ABC):
    """One worker's tensors in one piece of memory, as a process sees it."""

    kind: ClassVar[str]
    """The transport's name."""
    damage: ClassVar[type[SegmentError]] = SegmentError
    """What it means that the memory does not add up."""
    name: str
    memory: torch.Tensor
    """uint8, one entry per byte; the memory stays mapped as long as a tensor looks into it."""

    @abstractmethod
    def handle(self) -> Handle:
        """To be sent once the memory is written."""

    def check(self, handle: Handle) -> None:
        """Raises SegmentError unless `handle` is of this segment and of what is in it now."""
        if handle.name != self.name:
            raise SegmentError(f"handle of segment {handle.name!r}, expected {self.name!r}")
        if handle.num_bytes != len(self.memory):
            raise SegmentError(f"segment {self.name} has {len(self.memory)} bytes, its handle says {handle.num_bytes}")
        if (found := checksum(self.memory)) != handle.checksum:
            raise self.damage(f"segment {self.name} has checksum {found:#x}, its handle says {handle.checksum:#x}")

    @abstractmethod
    def close(self) -> None:
        """On the server: no worker can open it any more; those that have it keep it to themselves."""


@dataclass(frozen=True)
class SharedSegment(Segment):
    """Shared memory, mapped into this process. `pid` and `fd` are the server's."""

    kind = "shm"
    damage = ChangedError
    name: str
    pid: int
    fd: int
    memory: torch.Tensor

    def handle(self) -> SharedHandle:
        return SharedHandle(self.name, len(self.memory), checksum(self.memory), self.pid, self.fd)

    def close(self) -> None:
        os.close(self.fd)


def checksum(memory: torch.Tensor) -> int:
    """CRC-32 of the 64-bit sums of pieces of 4 KiB: at the speed of memory, 7 times as fast as a CRC of all bytes.

    Any one changed word shows, and any piece that is old, zero or elsewhere; words exchanged within a piece do not.
    """
    end = len(memory) // _PIECE * _PIECE
    words = memory[:end].view(torch.int64).view(-1, _PIECE // 8)
    sums = words.new_empty(len(words))
    for_each(lambda at: torch.sum(words[at], 1, out=sums[at[0]]), pieces(tuple(words.shape)))  # modulo 2^64
    return zlib.crc32(memory[end:].numpy().data, zlib.crc32(sums.numpy().data))


def create(run_id: str, num_bytes: int) -> SharedSegment:
    """A segment of the run in this process, zeroed. Raises OSError if there is no memory for it."""
    import fcntl  # not on every system

    name = new_name(run_id)
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, num_bytes)
        # Nobody can cut it short: reading what is not there would kill the reader.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return SharedSegment(name, os.getpid(), fd, _map(fd, num_bytes))
    except OSError:
        os.close(fd)
        raise


def attach(handle: SharedHandle, run_id: str) -> SharedSegment:
    """The server's segment in a worker. Raises SegmentError if it is not this run's, gone or of another size."""
    if not AVAILABLE:
        raise SegmentError("this system has no memory files")
    check_run(handle, run_id)
    place = f"/proc/{handle.pid:d}/fd/{handle.fd:d}"
    try:
        _check_link(handle, place)  # opening another file, a device's say, may do something
        fd = os.open(place, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise SegmentError(f"segment {handle.name} is gone, or on another machine: {error.strerror}") from error
    try:
        _check_link(handle, f"/proc/self/fd/{fd}")  # the number may since have been given to another file
        if (size := os.fstat(fd).st_size) != handle.num_bytes:
            raise SegmentError(f"segment {handle.name} has {size} bytes, its handle says {handle.num_bytes}")
        return SharedSegment(handle.name, handle.pid, handle.fd, _map(fd, size))
    finally:
        os.close(fd)


def _check_link(handle: SharedHandle, place: str) -> None:
    if (found := str(Path(place).readlink())) != f"/memfd:{handle.name} (deleted)":
        raise SegmentError(f"segment {handle.name} is gone: in its place is {found}")


def _prefix(run_id: str) -> str:
    return f"twist_fl-{run_id}-"


def new_name(run_id: str) -> str:
    return f"{_prefix(run_id)}{secrets.token_hex(8)}"


def check_run(handle: Handle, run_id: str) -> None:
    """Raises SegmentError if it is another run's."""
    if not handle.name.startswith(_prefix(run_id)):
        raise SegmentError(f"segment {handle.name!r} is not of this run ({run_id})")


def _map(fd: int, num_bytes: int) -> torch.Tensor:
    memory = mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    return torch.frombuffer(memory, dtype=torch.uint8)


Maker = Callable[[int], Segment]
"""Makes a segment of so many bytes."""
AnySegment = TypeVar("AnySegment", bound=Segment)


def make_token(make: Callable[[int], AnySegment]) -> AnySegment:
    """A segment of random bytes: a node that can name them can reach the server's memory."""
    segment = make(TOKEN_BYTES)
    segment.memory.copy_(torch.frombuffer(bytearray(secrets.token_bytes(TOKEN_BYTES)), dtype=torch.uint8))
    return segment


def token_text(segment: Segment) -> str:
    return segment.memory.numpy().tobytes().hex()


class Segments:
    """The server's segments, one per worker, reused from round to round: fresh memory costs more than the copy."""

    def __init__(self, makers: Mapping[str, Maker]) -> None:
        self.makers = makers
        self._wanted: Mapping[int, tuple[str, int]] = {}
        self._of: dict[int, Segment] = {}

    def deal(self, wanted: Mapping[int, tuple[str, int]]) -> None:
        """Before messages to workers that need these kinds and numbers of bytes: what one has and another needs goes
        over, and what nobody needs is given up, so that no old segment is there beside a new one."""
        self._wanted, spare = wanted, defaultdict[tuple[str, int], list[Segment]](list)
        for worker, segment in list(self._of.items()):
            if (fits := (segment.kind, len(segment.memory))) != wanted.get(worker):
                spare[fits].append(self._of.pop(worker))
        for worker in wanted.keys() - self._of.keys():
            if others := spare[wanted[worker]]:
                self._of[worker] = others.pop()
        for segment in chain(*spare.values()):
            segment.close()

    def get(self, worker: int) -> Segment | None:
        return self._of.get(worker)

    def take(self, worker: int) -> Segment:
        """The segment that the worker needs. Raises OSError if there is no memory for it."""
        if worker not in self._of:
            kind, num_bytes = self._wanted[worker]
            self._of[worker] = self.makers[kind](num_bytes)
        return self._of[worker]

    def drop(self, worker: int) -> None:
        """Give the segment up: a worker that is late writes where nobody reads."""
        if worker in self._of:
            self._of.pop(worker).close()

    def close(self) -> None:
        for worker in list(self._of):
            self.drop(worker)

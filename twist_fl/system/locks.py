"""A lock that dies with the process that holds it, and that others can see."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TRIES, _SECONDS = 20, 0.01


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock of `file`. Raises BlockingIOError if another process does."""
    with file.open("a+") as stream:
        for left in reversed(range(_TRIES)):
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not left:
                    raise
                time.sleep(_SECONDS)  # `is_locked` may have it for a moment
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield


def holder(file: Path) -> str:
    """Who holds the lock of `file`, in words that follow its name; nothing if that is not known."""
    pid = file.read_text().strip()
    return f" (process {pid})" if pid else ""


def is_locked(file: Path) -> bool:
    """Whether a process holds the lock of `file`."""
    if not file.is_file():
        return False
    with file.open() as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False

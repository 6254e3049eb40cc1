"""A private Flower ends with the command that started it, however that ends.

What belongs to one is told by its environment: FLWR_HOME, which every process below inherits, Ray's daemons and
workers too. A guard, a small process in a session of its own, waits for the command's end of a pipe to close, which
the system does for one that was killed; then it stops all that was started in the home, and removes the home.

As a script (`python system/children.py HOME`), this file is the guard.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

_STOP_SECONDS = 3
_TRIES = 5
_PREFIX = "flower-"
_SHORT = 24
"""Longest temporary folder in which the paths of Ray's sockets fit into the 107 bytes that a system allows."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def flower_home(folder: Path) -> Iterator[Path]:
    """A FLWR_HOME in `folder`; leaving the block, or the end of this process, stops and removes all of it."""
    home = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
    guard = None
    try:
        guard = subprocess.Popen(
            [sys.executable, "-P", __file__, str(home)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        yield home
    finally:
        with undisturbed():
            _clear(home)
            if guard is not None:
                guard.communicate()


def ray_folder(home: Path) -> Path:
    """Ray's temporary folder for this FLWR_HOME, gone with it: elsewhere, because its path must be short."""
    link = home / "ray"
    if not link.exists():
        usual = tempfile.gettempdir()
        link.symlink_to(tempfile.mkdtemp(prefix="twist-fl-", dir=usual if len(usual) <= _SHORT else "/tmp"))
    return link.readlink()


def clear_stale(folder: Path) -> None:
    """Stop and remove what runs that were killed have left in `folder`. No live one may be at work there."""
    _stop_all(lambda home: home.parent == folder and home.name.startswith(_PREFIX))
    for home in folder.glob(_PREFIX + "*"):
        if home.is_dir():
            _clear(home)


def _clear(home: Path) -> None:
    _stop_all(lambda other: other == home)
    if (home / "ray").is_symlink():
        shutil.rmtree((home / "ray").readlink(), ignore_errors=True)
    shutil.rmtree(home, ignore_errors=True)


def _stop_all(theirs: Callable[[Path], bool]) -> None:
    """More than once: a process may start another while it is asked to end."""
    for _ in range(_TRIES):
        if not (found := processes_of(theirs)):
            return
        stop(found)


def processes_of(theirs: Callable[[Path], bool]) -> list[psutil.Process]:
    """Processes that were started with such a FLWR_HOME, also those whose parent has died, but this one."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            home = process.environ().get("FLWR_HOME")
            if home and theirs(Path(home)) and process.pid != os.getpid():
                found.append(process)
    return found


def stop_tree(process: subprocess.Popen[bytes]) -> None:
    """Stop `process` and every process below it: politely, then for good."""
    with suppress(psutil.NoSuchProcess):
        tree = psutil.Process(process.pid)
        stop([*tree.children(recursive=True), tree])
    process.wait()


def stop(processes: list[psutil.Process]) -> None:
    """Ask `processes` to end, and kill those that have not after a few seconds."""
    for ask in (psutil.Process.terminate, psutil.Process.kill):
        for member in processes:
            with suppress(psutil.NoSuchProcess):
                ask(member)
        deadline = time.monotonic() + _STOP_SECONDS
        while (processes := [member for member in processes if not ended(member)]) and time.monotonic() < deadline:
            time.sleep(0.02)


def ended(process: psutil.Process) -> bool:
    """Whether it is gone, or a zombie whose parent has not asked for its status."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextmanager
def undisturbed() -> Iterator[None]:
    """An impatient second Ctrl-C must not leave processes behind."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    with undisturbed():
        sys.stdin.buffer.read()
        _clear(Path(sys.argv[1]))


if __name__ == "__main__":
    main()

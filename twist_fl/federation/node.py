"""`twist-fl node`: a Flower SuperNode whose messages one process answers, kept warm from round to round.

Three processes: this one, which takes tasks from the SuperNode with a secret that only the two know; the
SuperNode; and the executor, which gets one task's token at a time and runs the app. Whichever ends first, the
others end with it.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from multiprocessing import Pipe
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

import httpx
import psutil

from twist_fl.federation.refusals import refusal, waiting
from twist_fl.federation.simulation import free_port
from twist_fl.system.children import stop_tree
from twist_fl.system.errors import ConfigError, LaunchError

if TYPE_CHECKING:
    from twist_fl.federation.executor import TaskSource

FLOWER = ("1.41", "1.42")
"""The versions whose internals `executor.py` was run with."""
_START_SECONDS = 120
_LOOK_SECONDS = 0.2
_LET_IN_SECONDS = 60
"""How long a SuperLink that was started anew may take to let the node's key in."""
_HOST = "127.0.0.1"
_SCRIPT = Path(__file__).with_name("executor.py")


class ForgottenError(LaunchError):
    """The SuperLink does not know the node any more."""


def run_node(arguments: list[str]) -> None:
    """Serve a SuperNode started with `arguments` of `flower-supernode` until it ends or a signal comes.

    A SuperLink that is started anew knows no nodes: then the SuperNode ends, and another joins. Raises ConfigError if
    Flower is not the version whose internals `executor.py` uses, LaunchError if the SuperNode ends by itself.
    """
    check_flower()
    for name in ("NO_PROXY", "no_proxy"):  # no proxy stands between the three processes
        os.environ[name] = ",".join(filter(None, [_HOST, os.environ.get(name)]))
    patient_until = 0.0
    while True:
        try:
            _run_supernode(arguments)
        except ForgottenError as error:
            print(f"twist_fl: {error}", file=sys.stderr, flush=True)
            patient_until = time.monotonic() + _LET_IN_SECONDS
        except LaunchError:
            if time.monotonic() > patient_until:
                raise
            time.sleep(_LOOK_SECONDS)  # its key is not let in yet


def _run_supernode(arguments: list[str]) -> NoReturn:
    from twist_fl.federation.executor import TaskSource

    with supernode(arguments) as (process, address, secret):
        source = TaskSource(address, secret)
        try:
            _serve(source, process.popen, address)
        finally:
            source.close()
        raise process.ended()


def check_flower() -> None:
    """Raises ConfigError if the installed Flower is not one that `executor.py` was written for."""
    if (found := version("flwr")).rpartition(".")[0] not in FLOWER:
        raise ConfigError(
            f"twist-fl node is built from internals of Flower {' and '.join(FLOWER)}, installed is {found}: install "
            f"'flwr=={FLOWER[-1]}.*', or start the stock node with flower-supernode and the same options"
        )


def _script(role: str, *words: str) -> list[str]:
    """A command for executor.py. With -P: the files beside it are not top-level modules of the app's process."""
    return [sys.executable, "-P", str(_SCRIPT), role, str(os.getpid()), *words]


@contextmanager
def supernode(arguments: list[str]) -> Iterator[tuple[Listened, str, bytes]]:
    """A SuperNode that leaves its messages to others: its process, its loopback address, the secret for tasks."""
    port, secret = free_port(), secrets.token_bytes(32)
    with TemporaryDirectory(prefix="twist-fl-node-") as folder:  # 0700
        file = Path(folder) / "secret"
        file.write_bytes(secret)
        words = [*arguments, "--isolation", "process", "--host", _HOST, "--port", str(port)]
        command = _script("supernode", *words, "--superexec-auth-secret-file", str(file))
        process = Listened(command, arguments)
        try:
            _wait_until_listening(process, port)
            file.unlink()
            yield process, f"{_HOST}:{port}", secret
        finally:
            stop_tree(process.popen)
            process.heard()


class Listened:
    """A SuperNode's process. What it prints is printed on; plain words follow where that says why it cannot join."""

    def __init__(self, command: list[str], arguments: list[str]) -> None:
        self._arguments, self._refusal, self._said = arguments, "", False
        self.popen = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        self._listener = Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self.popen.stdout
        with self.popen.stdout as lines:
            for line in lines:
                text = line.decode(errors="replace")
                print(text, end="", file=sys.stderr, flush=True)
                self._refusal = refusal(text, self._arguments, version("flwr")) or self._refusal
                said = waiting(text, self._arguments)
                if said and not self._said:
                    self._said = True
                    print(f"twist_fl: {said}", file=sys.stderr, flush=True)

    def heard(self) -> None:
        """Wait until all that the process has said is printed."""
        self._listener.join()

    def ended(self) -> LaunchError:
        """Why it did, once it has."""
        status = self.popen.wait()
        self.heard()
        if not status and not self._refusal:
            return ForgottenError("the SuperLink was started anew and does not know this node: joining again")
        return LaunchError(self._refusal or f"the SuperNode ended with status {status}; its own words are above")


def _wait_until_listening(process: Listened, port: int) -> None:
    """Until this very process, and not another that took the port, listens. Raises LaunchError."""
    deadline = time.monotonic() + _START_SECONDS
    while process.popen.poll() is None and time.monotonic() < deadline:
        with suppress(psutil.NoSuchProcess):
            sockets = psutil.Process(process.popen.pid).net_connections("tcp")
            if any(socket.status == psutil.CONN_LISTEN and socket.laddr.port == port for socket in sockets):
                return
        time.sleep(_LOOK_SECONDS / 2)
    if process.popen.poll() is None:
        raise LaunchError(f"the SuperNode did not listen on {_HOST}:{port} within {_START_SECONDS} s")
    raise process.ended()


class Executor:
    """The process that answers messages for one app bundle, as the one who feeds it sees it."""

    def __init__(self, fab_hash: str, address: str) -> None:
        self.fab_hash = fab_hash
        self._line, theirs = Pipe()
        with theirs:
            descriptor = theirs.fileno()
            command = _script("executor", address, str(descriptor))
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[descriptor], start_new_session=True
            )

    @property
    def alive(self) -> bool:
        return not self._line.closed and self._process.poll() is None

    def serve(self, token: str, wanted: Callable[[], bool]) -> None:
        """Have the token's message answered; returns early when the process ends or is no longer `wanted`."""
        with suppress(EOFError, OSError):  # the line of a process that has ended
            self._line.send_bytes(token.encode())
            while not self._line.poll(_LOOK_SECONDS):
                if not wanted():
                    return
            self._line.recv_bytes()
            return
        self._line.close()

    def __enter__(self) -> Executor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stop_tree(self._process)
        self._line.close()


def _serve(source: TaskSource, process: subprocess.Popen[bytes], address: str) -> None:
    """Feed tasks to an executor, and to a new one for another bundle or after a crash, while the SuperNode lives."""
    task = _next_task(source, process)
    while task is not None:
        fab_hash, _ = task
        with Executor(fab_hash, address) as executor:
            while task is not None and task[0] == fab_hash and executor.alive:
                executor.serve(task[1], lambda: process.poll() is None)
                task = _next_task(source, process)


def _next_task(source: TaskSource, process: subprocess.Popen[bytes]) -> tuple[str, str] | None:
    """The next task's bundle and token; None when the SuperNode has ended."""
    from twist_fl.federation.executor import Pace

    pace = Pace(longest=1.0)
    while process.poll() is None:
        try:
            if task := source.acquire():
                return task
        except httpx.TransportError:  # it is ending, or too busy to answer
            pass
        pace.wait()
    return None

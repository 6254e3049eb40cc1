"""Nodes that start in a moment: forked from a process that has loaded their libraries, but none of twist_fl.

A node is three processes that load torch, transformers and Flower, 15 s of processor time. Where nodes are killed all
the time that is all one would measure. Here they are the same three processes, of the same code; only what they import
from other packages is there already.

As a script, this file is the nursery: it reads a command and a log a line, JSON, and prints the pid of each node.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import psutil

_OURS = ("twist_fl", "client_app", "server_app")
_PRELOADED = (
    "twist_fl.federation.client",
    "twist_fl.federation.executor",
    "twist_fl.model.subnet",
    "twist_fl.training.interval",
)


class Nursery:
    """The process, as the one who asks it for nodes sees it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        words = [sys.executable, __file__]
        self.popen = subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def start(self, log: Path, python: str, *words: str) -> psutil.Process:
        """A node of `python words...`, whose output goes to `log`."""
        assert python == sys.executable
        assert self.popen.stdin
        assert self.popen.stdout
        self.popen.stdin.write(json.dumps([words, str(log)]).encode() + b"\n")
        self.popen.stdin.flush()
        return psutil.Process(int(self.popen.stdout.readline()))


class Forked:
    """`subprocess.Popen` for a Python script that runs in a fork of this process: what node.py needs of it."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        pass_fds: Sequence[int] = (),
        start_new_session: bool = False,
    ) -> None:
        piped = stdout == subprocess.PIPE
        ours, theirs = os.pipe() if piped else (-1, -1)
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            output = [(theirs, 1), (theirs, 2)] if piped else []
            _become(command[command.index("-P") + 1 :], [(os.open(os.devnull, os.O_RDONLY), 0), *output])
        self.stdout: IO[bytes] | None = None
        if piped:
            os.close(theirs)
            self.stdout = os.fdopen(ours, "rb")

    def poll(self) -> int | None:
        return self._look(os.WNOHANG)

    def wait(self) -> int | None:
        return self._look(0)

    def _look(self, how: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _become(words: Sequence[str], descriptors: Sequence[tuple[int, int]]) -> None:
    """Run `python words...` in this process, to its end. The descriptors that its parent had open stay open."""
    status: Any = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for ours, theirs in descriptors:
            os.dup2(ours, theirs)
        if words[0] == "-m":
            sys.argv = list(words[1:])
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            runpy.run_path(words[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    for name in _PRELOADED:
        importlib.import_module(name)
    for name in list(sys.modules):
        if name.partition(".")[0] in _OURS:
            del sys.modules[name]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks for a node's status here
    for line in sys.stdin:
        words, log = json.loads(line)
        if not (pid := os.fork()):
            importlib.import_module("twist_fl.federation.node").__dict__["subprocess"] = SimpleNamespace(
                Popen=Forked, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT, DEVNULL=subprocess.DEVNULL
            )
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            _become(words, [(os.open(os.devnull, os.O_RDONLY), 0), (file, 1), (file, 2)])
        print(pid, flush=True)


if __name__ == "__main__":
    main()

"""Programs that start in a moment: forked from a process that has loaded their libraries.

Torch and transformers take a process five seconds of a core to load, and 300 MB. A private simulation loads them once,
in a process that does nothing else, and its server and workers are forks of it: they share that memory, too.

As a script, `python forking.py serve SOCKET MODULE...` is that process, and `python forking.py SCRIPT WORD...` has it
run `python SCRIPT WORD...`, in a fork that ends by itself, and waits for its end. What the script sees is the second's:
words, environment, folder, input and output. Only Python's own library, to start at once.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
from pathlib import Path
from typing import Any

SOCKET = "TWIST_FL_FORKING"
"""Names the socket in the environment of who asks."""
_RAYS_SETUP = "--language=PYTHON"
"""What Ray says to its own set-up of a worker, in whose place this script stands, and not to the worker."""
_STANDARD = (0, 1, 2)
_LENGTH = 8
_SECONDS = 10
"""Longest that a request may take to arrive whole."""


def serve(path: str, *modules: str) -> list[str]:
    """Load `modules`, then fork for each request. Returns in the fork only: its words."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who asked sees the end, nobody here asks for its status
        gc.disable()  # of the million objects that this makes none is garbage
        before = dict(os.environ)
        for name in modules:
            importlib.import_module(name)
        gc.freeze()
        theirs = {name: value for name, value in os.environ.items() if before.get(name) != value}
        while True:
            asking, _ = listening.accept()
            asking.settimeout(_SECONDS)
            try:
                request, descriptors = _received(asking)
            except (OSError, ValueError) as error:
                print(f"twist_fl: a request to fork was not understood: {error}", file=sys.stderr, flush=True)
                asking.close()
                continue
            if not os.fork():
                break
            for each in (*descriptors, asking.detach()):
                os.close(each)
    asking.detach()  # stays open until this fork ends
    return _settle(request, descriptors, theirs)


def _received(asking: socket.socket) -> tuple[dict[str, Any], list[int]]:
    head, descriptors, *_ = socket.recv_fds(asking, _LENGTH, len(_STANDARD))
    with asking.makefile("rb") as file:
        request = json.loads(file.read(int.from_bytes(head, "big")))
    return request, descriptors


def _settle(request: dict[str, Any], descriptors: list[int], theirs: dict[str, str]) -> list[str]:
    """Make this process what the one that asked is; `theirs` is what libraries have set in the environment."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    gc.enable()
    for given, standard in zip(descriptors, _STANDARD, strict=True):
        os.dup2(given, standard)
        os.close(given)
    os.chdir(request["folder"])
    wanted = request["environment"] | theirs
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    # What is as it was stays where it lies: beside the first is the room for a process' title.
    os.environ.update({name: value for name, value in wanted.items() if os.environ.get(name) != value})
    words: list[str] = request["words"]
    modules = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = dict.fromkeys([str(Path(words[0]).parent), *filter(None, modules), *sys.path])
    return words


def ask(path: str, words: list[str]) -> bool:
    """Have `python words...` run, and wait for its end. False if nobody serves there."""
    request = {"words": words, "environment": dict(os.environ), "folder": str(Path.cwd())}
    body = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as asking:
        try:
            asking.connect(path)
            socket.send_fds(asking, [len(body).to_bytes(_LENGTH, "big")], _STANDARD)
            asking.sendall(body)
        except OSError as error:
            print(f"twist_fl: {path} forks nothing ({error}): {words[0]} loads all by itself", file=sys.stderr)
            return False
        asking.recv(1)
    return True


def main(*words: str) -> None:
    if words[0] == "serve":
        sys.argv = serve(*words[1:])
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        program = [word for word in words if word != _RAYS_SETUP]
        if not ask(os.environ[SOCKET], program):
            os.execv(sys.executable, [sys.executable, *program])


if __name__ == "__main__":
    main(*sys.argv[1:])

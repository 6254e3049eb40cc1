"""A whole Flower network on this machine, SuperLink and SuperNodes as on many, for benchmarks and tests."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
from nursery import Nursery

from twist_fl.federation import simulation
from twist_fl.system.children import stop_tree
from twist_fl.system.environment import private_environment

NodeCommand = Callable[[str, str], list[str]]
"""From the SuperLink's address and the node's configuration to the command that starts a node."""


def stock_node(address: str, node_config: str) -> list[str]:
    """Flower's own: a new process for every message."""
    words = ["flower-supernode", "--insecure", "--superlink", address, "--port", str(simulation.free_port())]
    return [*words, "--node-config", node_config]


def warm_node(address: str, node_config: str) -> list[str]:
    """Ours: one process for all messages."""
    words = ["-m", "twist_fl", "node", "--insecure", "--superlink", address]
    return [sys.executable, *words, "--node-config", node_config]


class Network:
    """A running network: its nodes' processes and logs, and `run`, which has `flwr run` run our app on it."""

    def __init__(self, home: Path, address: str) -> None:
        self.home, self.address = home, address
        self.environment = private_environment(home)
        self.nodes: list[psutil.Process] = []
        self.start_node: Callable[[int], None]
        """Start the node of that place, or another in the place of one that has ended."""
        self.link: subprocess.Popen[bytes]
        self.start_link: Callable[[], None]
        """Start the SuperLink, or another in the place of one that has ended."""

    def node_log(self, node: int) -> Path:
        return self.home / f"node-{node}.log"

    @property
    def run_log(self) -> Path:
        """What each `begin_run` has said."""
        return self.home / "run.log"

    def processes(self) -> list[psutil.Process]:
        """All that belong to it, but this one, which knows its home, too."""

        def environment(process: psutil.Process) -> str:
            try:
                return " ".join(process.environ().values())
            except psutil.Error:
                return ""

        found = (each for each in psutil.process_iter() if each.pid != os.getpid())
        return [each for each in found if str(self.home) in environment(each)]

    def _words(self, settings: Mapping[str, str], app: Path | None = None) -> list[str]:
        file = simulation.write_settings(settings, self.home / "settings.toml")
        words = ["flwr", "run", str(app or simulation.stage_app(self.home / "app")), simulation.CONNECTION, "--stream"]
        return [*words, "--run-config", str(file)] if settings else words

    def begin_run(self, settings: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """`flwr run`, which goes on."""
        with self.run_log.open("a") as log:
            return subprocess.Popen(
                self._words(settings), env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def run(self, settings: Mapping[str, str], timeout: float, app: Path | None = None) -> str:
        """`flwr run` to its end; its output."""
        done = subprocess.run(
            self._words(settings, app),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return done.stdout + done.stderr


class Relay:
    """Passes bytes on to an address that is told later, until it is cut."""

    def __init__(self) -> None:
        self.target = ""
        self._door = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._door.getsockname()[1]}"
        self._open: set[socket.socket] = set()
        self._cut_until = 0.0
        threading.Thread(target=self._serve, daemon=True).start()

    def cut(self, seconds: float) -> None:
        """Every connection breaks, and none is made for so long."""
        self._cut_until = time.monotonic() + seconds
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        while True:
            client, _ = self._door.accept()
            threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        host, port = self.target.split(":")
        with client, suppress(OSError):
            if time.monotonic() < self._cut_until:
                return
            with socket.create_connection((host, int(port))) as server:
                ends = {client: server, server: client}
                self._open |= ends.keys()
                while True:
                    for ready in select.select(list(ends), [], [])[0]:
                        if not (content := ready.recv(2**16)):
                            self._open -= ends.keys()
                            return
                        ends[ready].sendall(content)


@contextmanager
def network(
    home: Path,
    num_nodes: int,
    node_command: NodeCommand,
    host: str = "127.0.0.1",
    forked: bool = False,
    begin_with: int | None = None,
) -> Iterator[Network]:
    """`num_nodes` nodes with the partition ids 0, 1, ..., a SuperLink on `host`; leaving the block stops everything.

    `forked`: a nursery starts the nodes, whose command must be `warm_node`'s. `begin_with`: so many of them are
    started (default: all), the others by whoever calls `start_node`."""
    home.mkdir(parents=True)
    started = Network(home, f"{host}:{simulation.free_port()}")
    simulation.write_connection(home, started.address)
    with ExitStack() as stack:

        def begin(log: Path, *words: str) -> subprocess.Popen[bytes]:
            output = stack.enter_context(log.open("a"))
            process = subprocess.Popen(
                words, env=started.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
            stack.callback(stop_tree, process)
            return process

        def start_link() -> None:
            host, port = started.address.split(":")
            log = home / "superlink.log"
            started.link = begin(log, "flower-superlink", "--insecure", "--host", host, "--port", port)
            simulation.wait_until_healthy(started.address, started.link, log)

        def start_node(place: int) -> None:
            words = node_command(started.address, f"partition-id={place} num-partitions={num_nodes}")
            started.nodes[place : place + 1] = [start(started.node_log(place), *words)]

        nursery = Nursery(started.environment) if forked else None
        if nursery:
            stack.enter_context(nursery.popen)
            stack.callback(stop_tree, nursery.popen)

        def start(log: Path, *words: str) -> psutil.Process:
            return nursery.start(log, *words) if nursery else psutil.Process(begin(log, *words).pid)

        started.start_link, started.start_node = start_link, start_node
        start_link()
        for i in range(num_nodes if begin_with is None else begin_with):
            start_node(i)
        yield started

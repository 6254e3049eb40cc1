"""Which of Flower's nodes serve a run's workers, and by which transport each of them can be reached."""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from twist_fl.config.checks import NODES
from twist_fl.federation import transport, wire
from twist_fl.federation.actors import RESTARTS
from twist_fl.federation.exchange import exchange
from twist_fl.federation.owners import Owners
from twist_fl.federation.transport import Maker, Segments
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.errors import ConfigError
from twist_fl.system.untrusted import plain
from twist_fl.training.job import Job


class NoWorkersError(RuntimeError):
    """No worker can go on: the run stops, resumable from its last checkpoint."""


class DeadWorkerError(NoWorkersError):
    """A simulated worker's process died too often."""


def died(reason: str) -> DeadWorkerError:
    what = f"a worker's process died {RESTARTS + 1} times: see whether this machine's memory is enough"
    return DeadWorkerError(f"{what}, or let fewer workers train at once (flower.cpus_per_worker). {reason}")


class Nodes:
    """Those that have built their workers: node i serves the clients i, i + nodes, ..."""

    def __init__(self, job: Job, job_json: str, folder: RunFolder) -> None:
        self.ready: list[int] = []
        self.transports: dict[int, str] = {}
        """How each node's tensors travel: shm, flight or inline."""
        self.sure = False
        """Whether nothing has been lost since they were asked: else the next round looks again for who is there."""
        self._job, self._job_json, self._folder = job, job_json, folder
        self.segments = Segments({})
        self._open = ExitStack()  # what `close` ends
        self._owners = Owners(job, folder) if job.config.data.private == NODES else None
        self._asked: set[int] = set()
        self._fallbacks: list[str] = []  # why a node's tensors go inline, where they need not

    def serves(self, worker: int) -> bool:
        """Whether a node of the worker is there; where each has its own text, no other takes its place."""
        return self._owners is None or worker in self._owners.nodes

    def of(self, worker: int) -> int:
        if self._owners is not None:
            return self._owners.nodes[worker]
        return self.ready[self._job.clients.index(worker) % len(self.ready)]

    def to_ask(self, grid: Grid) -> bool:
        """Whether to look for who is there: something was lost, or whom nobody can stand in for may have come back."""
        if self.sure and not all(map(self.serves, self._job.clients)):
            here = set(grid.get_node_ids())
            self._asked &= here
            return bool(here - self._asked)
        return not self.sure

    def connect(self, grid: Grid, round_: int) -> None:
        """Find the nodes and have each build its worker; a node's partition id, where it has one, decides its place.

        Raises NoWorkersError, naming the reasons.
        """
        flower, workers = self._job.config.flower, len(self._job.clients)
        if not self.segments.makers:
            self._open_segments()
        found = self._wait(grid, round_, workers)
        if found:
            self._folder.log("asked", round=round_, nodes=len(found[:workers]), wanted=workers)
        ready, failed = self._ask(grid, found if self._owners else found[:workers])
        self.ready, self._asked = [node for _, node in sorted(ready)], set(found)
        ways = list(self.transports.values())
        self._folder.log(
            "nodes",
            round=round_,
            nodes=len(self.ready),
            shared_memory=ways.count("shm"),
            flight=ways.count("flight"),
            failed=list(failed.values()),
            fallbacks=self._fallbacks,
            **(self._owners.report() if self._owners else {}),
        )
        if not self.ready:
            reasons = "; ".join(sorted(set(failed.values()))) or f"none connected within {flower.wait_for_nodes:g} s"
            raise NoWorkersError(f"no node is ready for the run: {reasons}")
        self.sure = True

    def _wait(self, grid: Grid, round_: int, wanted: int) -> list[int]:
        """The nodes that are there, when there are enough or flower.wait_for_nodes is over."""
        flower, told = self._job.config.flower, -1
        deadline = time.monotonic() + flower.wait_for_nodes
        while True:
            found = sorted(grid.get_node_ids())
            if len(found) >= wanted or time.monotonic() >= deadline:
                return found
            if len(found) != told:
                told = len(found)
                self._folder.log("waiting", round=round_, nodes=told, wanted=wanted)
            time.sleep(flower.poll_interval)

    def _ask(self, grid: Grid, nodes: list[int]) -> tuple[list[tuple[int, int]], dict[int, str]]:
        """Which nodes are ready, with their partitions, and why the others are not. Notes each one's transport."""
        flower = self._job.config.flower
        tokens = {kind: transport.make_token(make) for kind, make in self.segments.makers.items()}
        content = wire.question(self._job_json, tokens.values(), self._owners.tokenizer() if self._owners else None)
        asked = [Message(content, dst_node_id=node, message_type=MessageType.QUERY) for node in nodes]
        ready: list[tuple[int, int]] = []
        failed: dict[int, str] = {}
        self.transports, self._fallbacks = {}, []
        if self._owners:
            self._owners.nodes.clear()
        for reply in exchange(grid, asked, flower, flower.connect_timeout):
            node = reply.metadata.src_node_id
            if wire.has_died(reply):
                raise died(wire.error_of(reply))
            if reply.has_error():
                failed[node] = wire.error_of(reply)
                continue
            read = [kind for kind in tokens if wire.token_of(reply.content, kind) == transport.token_text(tokens[kind])]
            if not read and flower.transport == "shm":
                failed[node] = "flower.transport=shm, but the node cannot read the server's memory: use auto or inline"
                continue
            place = wire.partition_of(reply.content)
            try:
                if self._owners:
                    self._owners.add(place, node, wire.told_text(reply.content))
            except ValueError as error:
                failed[node] = plain(str(error))
                continue
            ready.append((place, node))
            self.transports[node] = next(iter(read), "inline")
            if not read and "flight" in tokens:
                self._fallbacks.append(wire.why_not(reply.content, "flight"))
        for token in tokens.values():
            token.close()
        return ready, failed

    def _open_segments(self) -> None:
        """Where tensors can go beside Flower's messages. Raises ConfigError if they cannot."""
        flower, run_id, makers = self._job.config.flower, self._job.run_id, dict[str, Maker]()
        if flower.transport in ("auto", "shm") and transport.AVAILABLE:
            makers["shm"] = partial(transport.create, run_id)
        elif flower.transport == "shm":
            raise ConfigError("flower.transport=shm needs Linux: use auto or inline")
        if flower.transport in ("auto", "flight") and flower.flight:
            from twist_fl.federation import flight  # loads Arrow Flight, which few runs need

            server = flight.Server(run_id, flower.flight, flower.flight_certificate, flower.flight_key)
            self._open.callback(server.end)
            makers["flight"] = server.make
        self.segments = Segments(makers)
        self._open.callback(self.segments.close)

    def close(self) -> None:
        """Give up all memory that was kept from round to round, and the port."""
        self._open.close()
        self.segments, self.sure = Segments({}), False

"""Which of Flower's nodes serve a run's workers, and by which transport each of them can be reached."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial

from flwr.app import Message, MessageType, RecordDict
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

_ASK_AGAIN = 30.0
"""Seconds after which a node that has not answered is asked again for the first time."""


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
        self.places: dict[int, int] = {}
        """Their partition ids, by Flower's ids."""
        self.transports: dict[int, str] = {}
        """How each node's tensors travel: shm, flight or inline."""
        self._connected = False
        self._lost: set[int] = set()  # which of them have failed since they were asked
        self._job, self._job_json, self._folder = job, job_json, folder
        self.segments = Segments({})
        self._open = ExitStack()  # what `close` ends
        self._owners = Owners(job, folder) if job.config.data.private == NODES else None
        self._asked: set[int] = set()  # of those that are there
        self._fallbacks: list[str] = []  # why a node's tensors go inline, where they need not

    def serves(self, worker: int) -> bool:
        """Whether a node of the worker is there; where each has its own text, no other takes its place."""
        return self._owners is None or worker in self._owners.nodes

    def of(self, worker: int) -> int:
        if self._owners is not None:
            return self._owners.nodes[worker]
        return self.ready[self._job.clients.index(worker) % len(self.ready)]

    def place_of(self, worker: int) -> int:
        """The partition id of the node that serves it."""
        return self.places[self.of(worker)]

    def lose(self, worker: int) -> None:
        """Its node has failed: before the next round it is asked again, after all others."""
        self._lost.add(self.of(worker))

    def to_ask(self, grid: Grid) -> bool:
        """Whether to look for who is there: something was lost, or there is room for nodes that have come."""
        if self._connected and not self._lost and len(self.ready) < len(self._job.clients):
            here = set(grid.get_node_ids())
            self._asked &= here
            return bool(here - self._asked)
        return bool(self._lost) or not self._connected

    def connect(self, grid: Grid, round_: int) -> None:
        """Find the nodes and have each build its worker; a node's partition id, where it has one, decides its place.

        Those that are known and have not failed are not asked again. Raises NoWorkersError, naming the reasons.
        """
        flower, workers, before = self._job.config.flower, len(self._job.clients), self.places
        if not self.segments.makers:
            self._open_segments()
        found = self._wait(grid, round_)
        asked = self._asked & set(found) if self._connected else set[int]()
        kept = asked & before.keys() - self._lost
        self.places = {node: place for node, place in before.items() if node in kept}
        self.transports = {node: way for node, way in self.transports.items() if node in kept}
        self._fallbacks = []
        if self._owners:
            self._owners.keep(kept)
        if kept < set(found):
            self._folder.log("asked", round=round_, nodes=min(len(found), workers), wanted=workers)
        room = len(found) if self._owners else workers - len(kept)
        new = [node for node in found if node not in asked][:room]
        self._asked = asked | set(new)
        failed = self._ask(grid, dict.fromkeys(new, "it"), flower.connect_timeout)
        # Who has failed may still train, for a round that is over: it does not hold the run up for longer than a round.
        taken = set(self.places.values())
        again = [node for node in found if node in asked - kept and before.get(node) not in taken]
        again = again[: max(0, workers - len(self.places))]
        names = {node: f"node {before[node]}" if node in before else "it" for node in again}
        failed += self._ask(grid, names, min(flower.connect_timeout, flower.round_timeout))
        self.ready = sorted(self.places, key=lambda node: (self.places[node], node))
        ways = list(self.transports.values())
        self._folder.log(
            "nodes",
            round=round_,
            nodes=len(self.ready),
            gone=sorted(place for node, place in before.items() if node not in self.places),
            new=sorted(place for node, place in self.places.items() if self._connected and node not in before),
            shared_memory=ways.count("shm"),
            flight=ways.count("flight"),
            failed=failed,
            fallbacks=self._fallbacks,
            **(self._owners.report() if self._owners else {}),
        )
        if not self.ready:
            none = f"none connected within {flower.wait_for_nodes:g} s"
            raise NoWorkersError(f"no node is ready for the run: {'; '.join(sorted(set(failed))) or none}")
        self._connected, self._lost = True, set()

    def _wait(self, grid: Grid, round_: int) -> list[int]:
        """The nodes that are there, when there are enough or flower.wait_for_nodes is over.

        At first one for each worker; where some were lost, as many as train in a round; for one that has come, none.
        """
        flower, told, wanted = self._job.config.flower, -1, set(self._job.clients)
        if self._connected:
            wanted &= set(self._job.sampled(round_ + 1))
        deadline = time.monotonic() + (flower.wait_for_nodes if self._lost or not self._connected else 0)
        while True:
            found = sorted(grid.get_node_ids())
            if len(found) >= len(wanted) or time.monotonic() >= deadline:
                return found
            if len(found) != told:
                told = len(found)
                self._folder.log("waiting", round=round_, nodes=told, wanted=len(wanted))
            time.sleep(flower.poll_interval)

    def _ask(self, grid: Grid, nodes: Mapping[int, str], patience: float) -> list[str]:
        """Notes which of the nodes, given with their names, are ready, each one's place and transport. Why others are
        not; `patience` is in seconds."""
        if not nodes:
            return []
        transports = self._job.config.flower.transport
        tokens = {kind: transport.make_token(make) for kind, make in self.segments.makers.items()}
        content = wire.question(self._job_json, tokens.values(), self._owners.tokenizer() if self._owners else None)
        failed = {node: f"{name} did not answer within {patience:g} s" for node, name in nodes.items()}
        for reply in self._answers(grid, content, nodes, patience):
            node = reply.metadata.src_node_id
            if wire.has_died(reply):
                raise died(wire.error_of(reply))
            if reply.has_error():
                failed[node] = wire.error_of(reply)
                continue
            read = [kind for kind in tokens if wire.token_of(reply.content, kind) == transport.token_text(tokens[kind])]
            if not read and transports == "shm":
                failed[node] = "flower.transport=shm, but the node cannot read the server's memory: use auto or inline"
                continue
            place = wire.partition_of(reply.content)
            try:
                if self._owners:
                    self._owners.add(place, node, wire.told_text(reply.content))
            except ValueError as error:
                failed[node] = plain(str(error))
                continue
            del failed[node]
            self.places[node] = place
            self.transports[node] = next(iter(read), "inline")
            if not read and "flight" in tokens:
                self._fallbacks.append(wire.why_not(reply.content, "flight"))
        for token in tokens.values():
            token.close()
        return list(failed.values())

    def _answers(self, grid: Grid, content: RecordDict, nodes: Iterable[int], patience: float) -> Iterator[Message]:
        """One of each node that answers. Flower hands a message out once: one that a cut line has lost is lost, and who
        has not answered is asked again, after a longer wait each time."""
        left, pending, deadline, wait = set(nodes), dict[str, Message](), time.monotonic() + patience, _ASK_AGAIN
        while left and (seconds := min(wait, deadline - time.monotonic())) > 0:
            asked = [Message(content, dst_node_id=node, message_type=MessageType.QUERY) for node in sorted(left)]
            for reply in exchange(grid, asked, self._job.config.flower, seconds, pending, patience):
                node = reply.metadata.src_node_id
                if node not in left:
                    continue
                left.remove(node)
                for other in [key for key, message in pending.items() if message.metadata.dst_node_id == node]:
                    del pending[other]
                yield reply
            wait *= 2

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
        self.segments, self._connected = Segments({}), False

"""TwIST as a Flower strategy with a round loop of its own; FedAvg and DDP are the same code with full blueprints.

Flower's stock loop cannot resume, gathers all replies before it aggregates and, on a network, looks for
them every 3 s. Here messages are pushed, replies are pulled at a short interval and aggregated as they
arrive, and a round ends at its deadline with whoever has answered.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from twist_fl.federation import tensors, transport, wire
from twist_fl.federation.actors import RESTARTS
from twist_fl.federation.exchange import exchange
from twist_fl.federation.packing import Packing
from twist_fl.federation.tensors import KnownArrays
from twist_fl.model.subnet import State
from twist_fl.rounds import RoundMean, RunState, dispatch, plan, start
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.recorder import Keeper
from twist_fl.system.cores import usable_cores
from twist_fl.system.errors import ConfigError
from twist_fl.system.threads import threads
from twist_fl.training.aggregate import ReplyError
from twist_fl.training.client_state import MomentShelf, moment_folder
from twist_fl.training.job import Job
from twist_fl.training.worker import Task, Worker

BYTE_KINDS = ("weights", "moments", "other")
TRANSPORTS = ("shm", "inline")


class NoWorkersError(RuntimeError):
    """No worker can go on: the run stops, resumable from its last checkpoint."""


class DeadWorkerError(NoWorkersError):
    """A simulated worker's process died too often."""

    def __init__(self, reason: str) -> None:
        what = f"a worker's process died {RESTARTS + 1} times: see whether this machine's memory is enough"
        super().__init__(f"{what}, or let fewer workers train at once (flower.cpus_per_worker). {reason}")


class TwistStrategy(Strategy):
    """Runs `job` from `folder`'s newest checkpoint (or from the start) to its end with `run`.

    The hooks of Flower's `Strategy` are the steps of a round; the model is the strategy's own state, so the
    `arrays` that Flower hands around stay empty.
    """

    def __init__(self, job: Job, folder: RunFolder) -> None:
        self.job, self.folder = job, folder
        self.job_json = job.to_json()
        self.state: RunState = folder.load() or start(job)
        self.nodes: list[int] = []
        self._neighbours: set[int] = set()  # nodes that share this machine
        self._segments = transport.Segments(job.run_id)
        self._planned: list[Task] = []
        self._mean: RoundMean | None = None  # of the round that is going on
        self._kept: State | None = None  # the round's parameters, where replies say only what has changed
        self._pending: dict[str, Message] = {}  # messages of the round that nobody has answered yet
        self._down: dict[str, int] = {}
        self._via: dict[str, int] = {}
        self._keeper = Keeper(job, folder)
        self._worker: Worker | None = None
        self._dead: str | None = None  # why a simulated worker's process died for good

    # -- Flower's hooks: the steps of a round

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message per client: its blueprint, and exactly the parameters the blueprint names."""
        if not self.nodes:
            self.connect(grid)
        self._planned = plan(self.job, self.state, keep_from=self._keeper.keep_from)
        self._mean = RoundMean(self.job, self.state, self._planned, in_place=True)
        if Packing.of(self.job, self._planned[0].blueprint).differences:
            self._kept = {name: tensor.clone() for name, tensor in self.state.params.items()}
        self._down = dict.fromkeys(BYTE_KINDS, 0)
        self._via = dict.fromkeys(TRANSPORTS, 0)
        return self._messages()

    def _messages(self) -> Iterator[Message]:
        known: KnownArrays = {}
        for task in self._planned:
            if task.worker not in self.job.clients:
                continue
            node, group = self.node_of(task.worker), str(task.worker)
            segment = None
            if node in self._neighbours:
                size = Packing.of(self.job, task.blueprint).segment_bytes
                segment = self._segments.take(task.worker, size)
            params, moments = self.state.params, self.state.moments if self.job.moments_travel else None
            with threads(usable_cores()):  # until the last worker has its part, the round waits for it
                content = wire.task_to_records(self.job, self.job_json, task, params, moments, segment, known)
            self._count(content, self._down)
            yield Message(content, dst_node_id=node, message_type=MessageType.TRAIN, group_id=group)
        # All messages are made, and hold copies: now the parameters may change.
        self._train_own()

    def _train_own(self) -> None:
        """The hybrid variant's worker 0: a masked view of the server's own parameters, trained in place.

        It counts at once, before any reply: nobody else looks at what it has trained.
        """
        for task in self._planned:
            if task.worker not in self.job.clients:
                self._worker = self._worker or Worker(self.job, MomentShelf(moment_folder(self.job.run_id)))
                reply = self._worker.train(task, *dispatch(self.job, self.state, task), in_place=True)
                torch.set_num_threads(1)
                assert self._mean is not None
                self._mean.add(task, reply)

    def _count(self, content: RecordDict, sizes: dict[str, int]) -> None:
        found = tensors.num_bytes(content)
        for kind, size in found.items():
            sizes[kind] += size
        self._via[tensors.transport_of(content)] += found["weights"] + found["moments"]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Stream `replies` into the mean; bad and failed ones are named in the log and dropped."""
        started = time.perf_counter()
        mean = self._mean
        assert mean is not None, "configure_train begins a round"
        tasks = {task.worker: task for task in self._planned}
        up = dict.fromkeys(BYTE_KINDS, 0)
        for message in replies:
            worker = int(message.metadata.group_id)
            if message.has_error():
                mean.drop(worker, wire.error_of(message))
                if wire.has_died(message):
                    self._dead = wire.error_of(message)
                self.nodes = []  # the next round looks again for who is there
                continue
            self._count(message.content, up)
            try:
                blueprint, segment = tasks[worker].blueprint, self._segments.get(worker)
                with threads(self._idle_cores()):
                    reply = wire.reply_from_records(self.job, blueprint, message.content, segment, self._kept)
                    # What lies in a segment stays there until the next task is written.
                    mean.add(tasks[worker], reply, lasts=segment is not None and self._kept is None)
            except ReplyError as error:
                mean.drop(worker, str(error))
        with threads(usable_cores()):
            after, self._mean = mean.finish(), None
        report = mean.report
        self.state = after if report.answered else self.state  # of the round before: it can be saved as that
        for worker in tasks.keys() - set(report.answered):
            self._segments.drop(worker)
        for worker in tasks.keys() - set(report.answered) - set(report.dropped):
            self.nodes = []
            report.dropped[worker] = f"no reply within flower.round_timeout={self.job.config.flower.round_timeout:g} s"
        self.folder.log(
            "round",
            **asdict(report),
            seconds=time.perf_counter() - started,
            predicted_bytes=self._keeper.predicted_bytes(self._planned),
            predicted_peak_bytes=self._keeper.predicted_peak_bytes(self._planned),
            bytes_down=self._down,
            bytes_up=up,
            bytes_via=self._via,
        )
        if not set(report.answered) & set(self.job.clients):
            raise NoWorkersError(self._ending(f"round {report.round}: no worker answered: {report.dropped}"))
        return None, MetricRecord({"loss": report.loss})

    def _idle_cores(self) -> int:
        """Cores that no worker on this machine trains on. Only `auto` tells which nodes are elsewhere."""
        config = self.job.config
        pending = [message.metadata.dst_node_id for message in self._pending.values()]
        busy = [node for node in pending if config.flower.transport != "auto" or node in self._neighbours]
        return usable_cores() - len(busy) * (config.train.threads or 1)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: the server evaluates, on the shared test split."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing, see `configure_evaluate`."""
        return None

    def summary(self) -> None:
        """Write the run's plan to its log."""
        self._keeper.begin(self.state)

    # -- our own loop

    def run(self, grid: Grid) -> RunState:
        """All remaining rounds, with evaluation and checkpoints on the way. Raises NoWorkersError."""
        # While workers train on this machine, a parallel region of many threads waits for the slowest of busy cores:
        # with the default, checking and adding 4 replies of 2 M parameters took 8 s a round instead of 0.1.
        torch.set_num_threads(1)
        self.summary()
        try:
            while self.state.round < self.job.num_rounds:
                self._round(grid)
        finally:
            self._segments.close()
        return self.state

    def _round(self, grid: Grid) -> None:
        flower, round_ = self.job.config.flower, self.state.round + 1
        messages = self.configure_train(round_, ArrayRecord(), ConfigRecord(), grid)
        self._pending = {}
        replies = exchange(grid, messages, flower, flower.round_timeout, self._pending)
        self.aggregate_train(round_, replies)
        torch.set_num_threads(usable_cores())  # the workers are idle
        self._keeper.end_of_round(self.state, self._planned, save=self._dead is not None)
        torch.set_num_threads(1)
        if self._dead:
            raise DeadWorkerError(self._ending(self._dead))

    def _ending(self, reason: str) -> str:
        """Why the run cannot go on, and from where it can; what it has come to is saved."""
        self._keeper.keep(self.state)
        return f'{reason}; {self.folder.way_on} (under `flwr run`: run-dir="{self.folder.path}")'

    def connect(self, grid: Grid) -> None:
        """Find the nodes and have each build its worker; node i serves the clients i, i + nodes, ...

        A node's partition id, where it has one, decides its place. Raises NoWorkersError, naming the reasons.
        """
        flower, workers = self.job.config.flower, len(self.job.clients)
        found = self._wait(grid, workers)
        if found:
            self.folder.log("asked", round=self.state.round, nodes=len(found[:workers]), wanted=workers)
        ready, failed = self._ask(grid, found[:workers])
        self.nodes = [node for _, node in sorted(ready)]
        self.folder.log(
            "nodes",
            round=self.state.round,
            nodes=len(self.nodes),
            shared_memory=len(self._neighbours),
            failed=list(failed.values()),
        )
        if not self.nodes:
            reasons = "; ".join(sorted(set(failed.values()))) or f"none connected within {flower.wait_for_nodes:g} s"
            raise NoWorkersError(self._ending(f"no node is ready for the run: {reasons}"))

    def _wait(self, grid: Grid, wanted: int) -> list[int]:
        """The nodes that are there, when there are enough or flower.wait_for_nodes is over."""
        flower, told = self.job.config.flower, -1
        deadline = time.monotonic() + flower.wait_for_nodes
        while True:
            found = sorted(grid.get_node_ids())
            if len(found) >= wanted or time.monotonic() >= deadline:
                return found
            if len(found) != told:
                told = len(found)
                self.folder.log("waiting", round=self.state.round, nodes=told, wanted=wanted)
            time.sleep(flower.poll_interval)

    def _ask(self, grid: Grid, nodes: list[int]) -> tuple[list[tuple[int, int]], dict[int, str]]:
        """Which nodes are ready, with their partitions, and why the others are not. Notes who shares this machine."""
        flower, token = self.job.config.flower, self._make_token()
        content = wire.question(self.job_json, token)
        asked = [Message(content, dst_node_id=node, message_type=MessageType.QUERY) for node in nodes]
        ready: list[tuple[int, int]] = []
        failed: dict[int, str] = {}
        self._neighbours = set()
        for reply in exchange(grid, asked, flower, flower.connect_timeout):
            node = reply.metadata.src_node_id
            if wire.has_died(reply):
                raise DeadWorkerError(self._ending(wire.error_of(reply)))
            if reply.has_error():
                failed[node] = wire.error_of(reply)
                continue
            if token is not None and wire.token_of(reply.content) == transport.token_text(token):
                self._neighbours.add(node)
            elif flower.transport == "shm":
                failed[node] = "flower.transport=shm, but the node cannot read the server's memory: use auto or inline"
                continue
            ready.append((wire.partition_of(reply.content), node))
        if token is not None:
            transport.close(token)
        return ready, failed

    def _make_token(self) -> transport.Segment | None:
        """What a node must read to get its tensors by shared memory; None if no node shall."""
        chosen = self.job.config.flower.transport
        if chosen == "shm" and not transport.AVAILABLE:
            raise ConfigError("flower.transport=shm needs Linux: use auto or inline")
        return transport.make_token(self.job.run_id) if chosen != "inline" and transport.AVAILABLE else None

    def node_of(self, worker: int) -> int:
        return self.nodes[self.job.clients.index(worker) % len(self.nodes)]

"""TwIST as a Flower strategy: the steps of a round. FedAvg and DDP are the same code with full blueprints.

The hooks are those of Flower's `Strategy`; a subclass may override one and leave the rest. `loop.py` calls them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from twist_fl.federation import tensors, transport, wire
from twist_fl.federation.connecting import Nodes, NoWorkersError
from twist_fl.federation.loop import RoundLoop
from twist_fl.federation.packing import Packing
from twist_fl.federation.tensors import KnownArrays
from twist_fl.model.subnet import State
from twist_fl.rounds import RoundMean, dispatch, plan
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.cores import usable_cores
from twist_fl.system.threads import threads
from twist_fl.training.aggregate import ReplyError
from twist_fl.training.client_state import MomentShelf, moment_folder
from twist_fl.training.job import Job
from twist_fl.training.worker import Task, Worker

BYTE_KINDS = ("weights", "moments", "other")
TRANSPORTS = ("shm", "inline")


class TwistStrategy(RoundLoop):
    """The model is the strategy's own state, so the `arrays` that hooks hand around stay empty: `arrays()` copies it.

    A message to worker s has `group_id` s, and so has its reply; `wire.reply_fields` reads what a reply says.
    """

    def __init__(self, job: Job, folder: RunFolder) -> None:
        super().__init__(job, folder)
        self.job_json = job.to_json()
        self.nodes = Nodes(job, self.job_json, folder)
        self._segments = transport.Segments(job.run_id)
        self._mean: RoundMean | None = None  # of the round that is going on
        self._kept: State | None = None  # the round's parameters, where replies say only what has changed
        self._began = 0.0
        self._sent: set[int] = set()  # workers of the round that a message went to
        self._down: dict[str, int] = {}
        self._via: dict[str, int] = {}
        self._worker: Worker | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message per client: its blueprint, and exactly the parameters the blueprint names.

        `config` goes along, where it says something: a subclass's client app finds it in the record "config".
        """
        if not self.nodes.sure:
            self.nodes.connect(grid, self.state.round)
        self._planned = plan(self.job, self.state, keep_from=self._keeper.keep_from)
        self._mean = RoundMean(self.job, self.state, self._planned, in_place=True)
        if Packing.of(self.job, self._planned[0].blueprint).differences:
            self._kept = {name: tensor.clone() for name, tensor in self.state.params.items()}
        return self._messages(config)

    def _messages(self, config: ConfigRecord) -> Iterator[Message]:
        known: KnownArrays = {}
        for task in self._planned:
            if task.worker not in self.job.clients:
                continue
            node, group = self.nodes.of(task.worker), str(task.worker)
            segment = None
            if node in self.nodes.neighbours:
                size = Packing.of(self.job, task.blueprint).segment_bytes
                segment = self._segments.take(task.worker, size)
            params, moments = self.state.params, self.state.moments if self.job.moments_travel else None
            with threads(usable_cores()):  # until the last worker has its part, the round waits for it
                content = wire.task_to_records(self.job, self.job_json, task, params, moments, segment, known)
            if config:
                content["config"] = config
            yield Message(content, dst_node_id=node, message_type=MessageType.TRAIN, group_id=group)

    def sending(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Each message, counted as it goes out; then the server trains what is its own."""
        self._began = time.perf_counter()
        self._sent = set()
        self._down = dict.fromkeys(BYTE_KINDS, 0)
        self._via = dict.fromkeys(TRANSPORTS, 0)
        for message in messages:
            self._sent.add(self._task_of(message).worker)
            self._count(message.content, self._down)
            yield message
        # All messages are out, and hold copies: now the parameters may change.
        self._train_own()

    def _task_of(self, message: Message) -> Task:
        """The task that a message, or the reply to it, belongs to. Raises ValueError if it is none of the round's."""
        group = message.metadata.group_id
        for task in self._planned:
            if str(task.worker) == group and task.worker in self.job.clients:
                return task
        known = [task.worker for task in self._planned if task.worker in self.job.clients]
        raise ValueError(f"group_id={group!r} is no worker of the round: a message's or reply's is one of {known}")

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
        if (mean := self._mean) is None:
            raise self.unfinished("configure_train")
        up = dict.fromkeys(BYTE_KINDS, 0)
        for message in replies:
            task = self._task_of(message)
            worker = task.worker
            if message.has_error():
                mean.drop(worker, wire.error_of(message))
                if wire.has_died(message):
                    self._dead = wire.error_of(message)
                self.nodes.sure = False
                continue
            self._count(message.content, up)
            try:
                blueprint, segment = task.blueprint, self._segments.get(worker)
                with threads(self._idle_cores()):
                    reply = wire.reply_from_records(self.job, blueprint, message.content, segment, self._kept)
                    # What lies in a segment stays there until the next task is written.
                    mean.add(task, reply, lasts=segment is not None and self._kept is None)
            except ReplyError as error:
                mean.drop(worker, str(error))
        with threads(usable_cores()):
            after, self._mean = mean.finish(), None
        report = mean.report
        self.state = after if report.answered else self.state  # of the round before: it can be saved as that
        for worker in {task.worker for task in self._planned} - set(report.answered):
            self._segments.drop(worker)  # who is late writes where nobody reads
            if worker not in report.dropped:
                report.dropped[worker] = self._why_missing(worker)
        self.folder.log(
            "round",
            **asdict(report),
            seconds=time.perf_counter() - self._began,
            predicted_bytes=self._keeper.predicted_bytes(self._planned),
            predicted_peak_bytes=self._keeper.predicted_peak_bytes(self._planned),
            bytes_down=self._down,
            bytes_up=up,
            bytes_via=self._via,
        )
        if not set(report.answered) & set(self.job.clients):
            raise NoWorkersError(f"round {report.round}: no worker answered: {report.dropped}")
        return None, MetricRecord({"loss": report.loss})

    def _why_missing(self, worker: int) -> str:
        """Of a worker that `aggregate_train` was given no reply of."""
        if worker not in self._sent:
            return f"{type(self).__name__}.configure_train sent it no message"
        if all(message.metadata.group_id != str(worker) for message in self._pending.values()):
            return f"{type(self).__name__}.aggregate_train left its reply out"
        if time.perf_counter() - self._began < self.timeout:
            return f"{type(self).__name__}.aggregate_train did not wait for its reply"
        self.nodes.sure = False
        return f"no reply within flower.round_timeout={self.timeout:g} s"

    def _idle_cores(self) -> int:
        """Cores that no worker on this machine trains on. Only `auto` tells which nodes are elsewhere."""
        config = self.job.config
        pending = [message.metadata.dst_node_id for message in self._pending.values()]
        busy = [node for node in pending if config.flower.transport != "auto" or node in self.nodes.neighbours]
        return usable_cores() - len(busy) * (config.train.threads or 1)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: the server evaluates, on the shared test split."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing, see `configure_evaluate`."""
        return None

    def close(self) -> None:
        self._segments.close()

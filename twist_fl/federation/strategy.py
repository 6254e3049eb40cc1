"""TwIST as a Flower strategy: the steps of a round. FedAvg and DDP are the same code with full blueprints.

The hooks are those of Flower's `Strategy`; a subclass may override one and leave the rest. `loop.py` calls them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from twist_fl.federation import tensors, wire
from twist_fl.federation.connecting import Nodes, NoWorkersError
from twist_fl.federation.evaluating import Evaluation
from twist_fl.federation.loop import RoundLoop
from twist_fl.federation.packing import Packing
from twist_fl.federation.tensors import KnownArrays
from twist_fl.model.subnet import State
from twist_fl.rounds import RoundMean, RoundReport, dispatch, plan
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.cores import usable_cores
from twist_fl.system.threads import threads
from twist_fl.training.aggregate import ReplyError
from twist_fl.training.client_state import MomentShelf, moment_folder
from twist_fl.training.interval import Moments
from twist_fl.training.job import Job
from twist_fl.training.worker import Task, Worker

BYTE_KINDS = ("weights", "moments", "other")
TRANSPORTS = ("shm", "flight", "inline")


class TwistStrategy(RoundLoop):
    """The model is the strategy's own state, so the `arrays` that hooks hand around stay empty: `arrays()` copies it.

    A message to worker s has `group_id` s, and so has its reply; `wire.reply_fields` reads what a reply says.
    """

    def __init__(self, job: Job, folder: RunFolder) -> None:
        super().__init__(job, folder)
        self.job_json = job.to_json()
        self.nodes = Nodes(job, self.job_json, folder)
        self._mean: RoundMean | None = None  # of the round that is going on
        self._kept: State | None = None  # the round's parameters, where replies say only what has changed
        self._began = 0.0
        self._report: RoundReport | None = None
        self._evaluation: Evaluation | None = None
        self._sent: set[str] = set()  # group ids of what went out last
        self._down: dict[str, int] = {}
        self._via: dict[str, int] = {}
        self._worker: Worker | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message per client: its blueprint, and exactly the parameters the blueprint names.

        `config` goes along, where it says something: a subclass's client app finds it in the record "config".
        """
        if self.nodes.to_ask(grid):
            self.nodes.connect(grid, self.state.round)
        self._planned = plan(self.job, self.state, keep_from=self._keeper.keep_from)
        self._mean = RoundMean(self.job, self.state, self._planned, in_place=True)
        if Packing.of(self.job, self._planned[0].blueprint).differences:
            self._kept = {name: tensor.clone() for name, tensor in self.state.params.items()}
        moments = self.state.moments if self.job.moment_layouts else None
        here = [task for task in self._clients() if self.nodes.serves(task.worker)]
        for task in self._clients():
            if task not in here:
                self._mean.drop(task.worker, "the node that has its text is not here")
        return self._messages(MessageType.TRAIN, here, moments, config)

    def _clients(self) -> list[Task]:
        return [task for task in self._planned if task.worker in self.job.clients]

    def _messages(
        self, kind: str, tasks: Sequence[Task], moments: Moments | None, config: ConfigRecord
    ) -> Iterator[Message]:
        known: KnownArrays = {}
        params, segments, trains = self.state.params, self.nodes.segments, kind == MessageType.TRAIN
        nodes = {task.worker: self.nodes.of(task.worker) for task in tasks}
        beside = {
            task.worker: (way, Packing.of(self.job, task.blueprint, trains).segment_bytes)
            for task in tasks
            if (way := self.nodes.transports[nodes[task.worker]]) != "inline"
        }
        segments.deal(beside)
        for task in tasks:
            node, group = nodes[task.worker], str(task.worker)
            segment = segments.take(task.worker) if task.worker in beside else None
            with threads(usable_cores()):  # until the last worker has its part, the round waits for it
                content = wire.task_to_records(self.job, self.job_json, task, params, moments, segment, known)
            if config:
                content["config"] = config
            yield Message(content, dst_node_id=node, message_type=kind, group_id=group)

    def sending(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Each message, counted as it goes out; in training, the server then trains what is its own."""
        self._began = time.perf_counter()
        self._sent = set()
        self._down = dict.fromkeys(BYTE_KINDS, 0)
        self._via = dict.fromkeys(TRANSPORTS, 0)
        for message in messages:
            self._sent.add(message.metadata.group_id)
            self._count(message.content, self._down)
            yield message
        # All messages are out, and hold copies: now the parameters may change.
        if self._mean is not None:
            self._train_own(self._mean)

    @staticmethod
    def _task_of(message: Message, tasks: Iterable[Task]) -> Task:
        """The one of `tasks` that a message, or the reply to it, belongs to. Raises ValueError if it is none."""
        known = {str(task.worker): task for task in tasks}
        if (group := message.metadata.group_id) not in known:
            raise ValueError(
                f"group_id={group!r} is no worker of the round: a message's or reply's is one of {', '.join(known)}"
            )
        return known[group]

    def _train_own(self, mean: RoundMean) -> None:
        """The hybrid variant's worker 0: a masked view of the server's own parameters, trained in place.

        It counts at once, before any reply: nobody else looks at what it has trained.
        """
        for task in self._planned:
            if task.worker not in self.job.clients:
                self._memory.num_bytes()  # the worker's own peak starts anew
                self._worker = self._worker or Worker(self.job, MomentShelf(moment_folder(self.job.run_id)))
                reply = self._worker.train(task, *dispatch(self.job, self.state, task), in_place=True)
                torch.set_num_threads(1)
                mean.add(task, reply)

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
            task = self._task_of(message, self._clients())
            worker = task.worker
            if message.has_error():
                mean.drop(worker, self._error_of(message, worker))
                continue
            self._count(message.content, up)
            try:
                blueprint, segment = task.blueprint, self.nodes.segments.get(worker)
                with threads(self._idle_cores()):
                    reply = wire.reply_from_records(self.job, blueprint, message.content, segment, self._kept)
                    # What lies in a segment stays there until the next task is written.
                    mean.add(task, reply, lasts=segment is not None and self._kept is None)
            except ReplyError as error:
                mean.drop(worker, str(error))
        with threads(usable_cores()):
            after, self._mean = mean.finish(), None
        report = self._report = mean.report
        self.state = after if report.answered else self.state  # of the round before: it can be saved as that
        for worker in {task.worker for task in self._planned} - set(report.answered):
            self.nodes.segments.drop(worker)  # who is late writes where nobody reads
            if worker not in report.dropped:
                report.dropped[worker] = self._why_missing(worker, "train")
        self.folder.log(
            "round",
            **asdict(report),
            seconds=time.perf_counter() - self._began,
            server_bytes=self._memory.num_bytes(),
            **self._keeper.predicted(self._planned),
            bytes_down=self._down,
            bytes_up=up,
            bytes_via=self._via,
        )
        if not set(report.answered) & set(self.job.clients):
            raise NoWorkersError(f"round {report.round}: no worker answered: {report.dropped}")
        return None, MetricRecord({"loss": report.loss})

    def _error_of(self, message: Message, worker: int) -> str:
        """Why a worker failed; the next round looks again for who is there."""
        self.nodes.lose(worker)
        if wire.has_died(message):
            self._dead = wire.error_of(message)
        return wire.error_of(message)

    def _why_missing(self, worker: int, step: str) -> str:
        """Of a worker of whom the hook that aggregates was given no reply."""
        if str(worker) not in self._sent:
            return f"{type(self).__name__}.configure_{step} sent it no message"
        if all(message.metadata.group_id != str(worker) for message in self._pending.values()):
            return f"{type(self).__name__}.aggregate_{step} left its reply out"
        if time.perf_counter() - self._began < self.timeout:
            return f"{type(self).__name__}.aggregate_{step} did not wait for its reply"
        self.nodes.lose(worker)
        return f"no reply within flower.round_timeout={self.timeout:g} s, of node {self.nodes.place_of(worker)}"

    def _idle_cores(self) -> int:
        """Cores that no worker on this machine trains on. Only `auto` tells which nodes are elsewhere."""
        config = self.job.config
        pending = [message.metadata.dst_node_id for message in self._pending.values()]
        busy = [node for node in pending if config.flower.transport != "auto" or self.nodes.transports[node] == "shm"]
        return usable_cores() - len(busy) * (config.train.threads or 1)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """With eval.federated, after a round in which the server evaluates: to each worker whose reply counted, the
        model and which part of the test text it takes. Else nothing."""
        self._evaluation = None
        if self.job.config.eval.federated == "off" or not self._keeper.evaluates(self.state):
            return []
        assert self._report is not None
        trained = [task for task in self._clients() if task.worker in self._report.answered]
        self._evaluation = Evaluation(self.job, trained)
        return self._questions(self._evaluation, config)

    def _questions(self, evaluation: Evaluation, config: ConfigRecord) -> Iterator[Message]:
        messages = self._messages(MessageType.EVALUATE, evaluation.tasks, None, config)
        for task, message in zip(evaluation.tasks, messages, strict=True):
            evaluation.ask(task, message.content)
            yield message

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The mean over all tokens that `replies` speak of; None if there are none."""
        if (evaluation := self._evaluation) is None:
            return None
        up = dict.fromkeys(BYTE_KINDS, 0)
        for message in replies:
            task = self._task_of(message, evaluation.tasks)
            if message.has_error():
                evaluation.drop(task, self._error_of(message, task.worker))
                continue
            self._count(message.content, up)
            evaluation.add(task, message.content)
        for task in evaluation.missing():
            self.nodes.segments.drop(task.worker)
            evaluation.drop(task, self._why_missing(task.worker, "evaluate"))
        self.folder.log("federated", round=self.state.round, **evaluation.result(), bytes_down=self._down, bytes_up=up)
        metrics = evaluation.metrics()
        return MetricRecord(metrics) if metrics else None

    def close(self) -> None:
        self.nodes.close()

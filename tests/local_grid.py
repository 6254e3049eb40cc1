"""Flower's grid without Flower's transport: `client_app` answers in this process, and a test bends its answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.server.superlink.linkstate.utils import NODE_UNAVAILABLE_ERROR_REASON
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

import client_app
from twist_fl.federation import apps, tensors, wire
from twist_fl.model.subnet import State
from twist_fl.rounds import RoundMean, RunState, dispatch, plan, start
from twist_fl.training.client_state import MomentShelf
from twist_fl.training.job import Job
from twist_fl.training.worker import Reply, Task, Worker

# Every message names the task that made it; Flower sets this when it starts an app.
TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1

Answer = Callable[[], Message]
Bend = Callable[[Task, Message, Answer], Sequence[Message]]
"""What a node sends back for a task: `answer()` is what an honest one would."""


def honest(task: Task, message: Message, answer: Answer) -> list[Message]:
    return [answer()]


def bent(round_: int, workers: Sequence[int], bend: Bend) -> Bend:
    """`bend` for some workers of one round, honesty otherwise."""
    return lambda *given: (bend if given[0].round == round_ and given[0].worker in workers else honest)(*given)


def failing(reason: str) -> Callable[[Message], Message]:
    """An error reply, worded as Flower does."""
    return lambda message: Message(Error(code=2, reason=f"<class 'ValueError'>:<'{reason}'>"), reply_to=message)


@dataclass(frozen=True)
class Served:
    """A task as a node got it."""

    node: int
    task: Task
    params: State
    transport: str


class LocalGrid(Grid):
    """Nodes with random ids whose order has nothing to do with that of their partitions."""

    def __init__(
        self,
        num_nodes: int = 3,
        bend: Bend = honest,
        *,
        last_first: bool = False,
        one_at_a_time: bool = False,
        broken: Sequence[int] = (),
        far: Sequence[int] = (),
        data: Sequence[object] = (),
    ) -> None:
        ids = random.Random(11).sample(range(2**62, 2**63), num_nodes)
        self.partitions = dict(zip(ids, range(num_nodes), strict=True))
        self.bend, self.last_first, self.one_at_a_time, self.broken = bend, last_first, one_at_a_time, broken
        self.far = far
        self.settings: list[dict[str, int | str]] = [{"partition-id": place} for place in range(num_nodes)]
        """Of each partition's node."""
        for place, path in enumerate(data):
            self.settings[place]["data"] = str(path)
        self.away: set[int] = set()
        """Partitions whose node is not there; what it is sent, Flower answers."""
        self.served: list[Served] = []
        self._replies: list[Message] = []

    def get_node_ids(self) -> Iterable[int]:
        return [node for node, place in self.partitions.items() if place not in self.away]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        found = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            found.append(message.metadata.message_id)
            self._replies += self._serve(message)
        return found

    def _serve(self, message: Message) -> Sequence[Message]:
        node = message.metadata.dst_node_id
        partition = self.partitions[node]
        if partition in self.away:
            return [Message(Error(code=5, reason=NODE_UNAVAILABLE_ERROR_REASON), reply_to=message)]
        context = Context(1, node, {**self.settings[partition]}, RecordDict(), {})

        def answer() -> Message:
            return client_app.app(message, context)

        if message.metadata.message_type != "train":
            if partition in self.broken:
                return [failing("no room on this node")(message)]
            return [self._from_afar(message, answer) if partition in self.far else answer()]
        parcel = wire.task_from_records(job_of(message), message.content)
        # The reply will be written where the task is read.
        params = {name: tensor.clone() for name, tensor in parcel.params.items()}
        self.served.append(Served(node, task := parcel.task, params, tensors.transport_of(message.content)))
        return self.bend(task, message, answer)

    @staticmethod
    def _from_afar(message: Message, answer: Answer) -> Message:
        """The answer of another machine, where the server's process and files do not exist."""
        handle = message.content.config_records["shm"]
        here, handle["fd"] = handle["fd"], 99_999
        found = answer()
        handle["fd"] = here
        return found

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        found = [reply for reply in self._replies if reply.metadata.reply_to_message_id in wanted]
        found = found[::-1] if self.last_first else found
        found = found[:1] if self.one_at_a_time else found
        self._replies = [reply for reply in self._replies if all(reply is not other for other in found)]
        return found

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    # Not used by the app.

    def set_run(self, run: object) -> None:
        raise NotImplementedError

    @property
    def run(self) -> None:  # type: ignore[override]
        raise NotImplementedError

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        raise NotImplementedError


def changed(task: Task, message: Message, answer: Message, change: Callable[[Reply], Reply]) -> Message:
    """An answer with another reply inside, which travels as the honest one."""
    job, handle = job_of(message), tensors.handle_of(answer.content)
    segment = None if handle is None else tensors.open_segment(handle, job.run_id, handle.num_bytes)
    reply = change(wire.reply_from_records(job, task.blueprint, answer.content, segment))
    content = wire.reply_to_records(job, task.blueprint, reply, segment)
    return Message(content=content, metadata=answer.metadata)  # type: ignore[call-overload,no-any-return]


def job_of(message: Message) -> Job:
    """The job a message to a node belongs to."""
    return apps.worker_for(wire.job_of(message.content)).job


def with_nan(reply: Reply) -> Reply:
    name = next(iter(reply.params))
    value = reply.params[name].clone()
    value.view(-1)[0] = torch.nan
    return replace(reply, params={**reply.params, name: value})


def same(ours: State, theirs: State) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_same_run(ours: RunState, theirs: RunState) -> None:
    """Bit for bit: parameters, moments, cursors, debt."""
    assert (ours.round, ours.cursors, ours.debt) == (theirs.round, theirs.cursors, theirs.debt)
    assert same(ours.params, theirs.params)
    assert (ours.moments is None) == (theirs.moments is None)
    if ours.moments is not None and theirs.moments is not None:
        assert ours.moments.step == theirs.moments.step
        assert ours.moments.values.keys() == theirs.moments.values.keys()
        assert all(same(values, theirs.moments.values[name]) for name, values in ours.moments.values.items())


def run_without(job: Job, num_rounds: int, folder: Path, missing: Callable[[Task], bool]) -> tuple[RunState, list[int]]:
    """`rounds.run` where some do not answer; and how many blocks were owed after each round."""
    worker, state, owed = Worker(job, MomentShelf(folder)), start(job), []
    while state.round < num_rounds:
        mean = RoundMean(job, state, tasks := plan(job, state))
        for task in tasks:
            if not missing(task):
                mean.add(task, worker.train(task, *dispatch(job, state, task)))
        state = mean.finish()
        owed.append(len(state.debt))
    return state, owed

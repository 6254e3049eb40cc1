"""A whole TwIST round in one process: the map for readers, and the oracle of the Flower app.

blueprint -> slice -> train -> aggregate. The app runs the same `plan`, `Worker.train` and `RoundMean`, with a
network in between (`wire.task_to_records` sends what `dispatch` gives); on CPU it gives the same weights bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path

import numpy as np
import torch

from twist_fl.aggregate import Memory, ReplyError, StreamingMean, check_state, coverage_debt
from twist_fl.blueprint import Blueprint, Debt
from twist_fl.data import Windows
from twist_fl.job import Job
from twist_fl.precision import check_precision
from twist_fl.shelf import MomentShelf
from twist_fl.subnet import State, get_state, slice_state
from twist_fl.train import MOMENTS, Moments, train_interval


@dataclass
class RunState:
    """All that a run needs to go on: `round` rounds are done, `cursors[s]` batches by worker s."""

    params: State
    cursors: list[int]
    round: int = 0
    debt: Debt = frozenset()
    moments: Moments | None = None
    """The server's, with train.optimizer_state=server."""
    spare: list[Memory] = field(default_factory=list, repr=False, compare=False)
    """Where the sums of the round before were: the next round takes this memory."""


@dataclass(frozen=True)
class Task:
    """One worker's part of a round: everything but the tensors."""

    round: int
    worker: int
    blueprint: Blueprint
    cursor: int
    num_batches: int
    keep_from: int = 0
    """Oldest round whose client-side moments a resumed run could still need."""


@dataclass(frozen=True)
class Reply:
    digest: str
    params: State
    loss: float
    num_tokens: int
    num_batches: int
    seconds: float = 0.0
    moments: Moments | None = None
    note: str = ""
    """What the run's log should say of this worker."""


@dataclass
class RoundReport:
    """What a round did, for people and for the run's log."""

    round: int
    loss: float = float("nan")
    """Mean training loss over the tokens of all replies, nats per token."""
    num_tokens: int = 0
    answered: list[int] = field(default_factory=list)
    dropped: dict[int, str] = field(default_factory=dict)
    """Workers whose reply did not count, and why."""
    notes: dict[int, str] = field(default_factory=dict)
    """What workers whose reply counted had to say."""


def start(job: Job) -> RunState:
    params = job.initial_state()
    moments = None
    if job.config.train.optimizer_state == "server":
        zeros = {name: {key: torch.zeros_like(value) for key, value in params.items()} for name in MOMENTS}
        moments = Moments(0, zeros)
    return RunState(params, [0] * job.config.train.workers, moments=moments)


def plan(job: Job, state: RunState, keep_from: int = 0) -> list[Task]:
    """The next round's tasks."""
    round_ = state.round + 1
    blueprints = job.blueprints(round_, state.debt)
    left = [job.total_batches - cursor for cursor in state.cursors]
    return [
        Task(round_, worker, blueprint, state.cursors[worker], min(job.config.train.interval, left[worker]), keep_from)
        for worker, blueprint in enumerate(blueprints)
    ]


def dispatch(job: Job, state: RunState, task: Task) -> tuple[State, Moments | None]:
    """The parameters, and with optimizer_state=server the moments, that the task's blueprint names."""
    params = slice_state(job.layout, state.params, task.blueprint)
    if state.moments is None:
        return params, None
    sliced = {name: slice_state(job.layout, state.moments.values[name], task.blueprint) for name in MOMENTS}
    return params, Moments(state.moments.step, sliced)


class Worker:
    """A training client. Data and one model per shape stay warm; all else comes with the task."""

    def __init__(self, job: Job, shelf: MomentShelf) -> None:
        self.job, self.shelf = job, shelf
        self.device = job.device()
        check_precision(job.config.train.precision, self.device)
        self.models = job.models(compile=job.config.train.compile)

    def batches(self, task: Task) -> Iterator[torch.Tensor]:
        """The task's batches, each read when it is asked for: a GPU is still busy with the one before."""
        windows: Windows = self.job.corpus.train
        shard = self.job.shard(task.worker)
        for cursor in range(task.cursor, task.cursor + task.num_batches):
            batch = torch.tensor(windows[shard.batch(cursor)], dtype=torch.int64)  # (B, T)
            if self.device.startswith("cuda"):
                batch = batch.pin_memory()
            yield batch.to(self.device, non_blocking=True)

    def train(self, task: Task, params: State, moments: Moments | None) -> Reply:
        """Train the subnet for one interval; the reply's tensors are on the CPU."""
        config = self.job.config
        torch.set_num_threads(config.train.threads or 1)
        model = self.models.load(task.blueprint, params)
        note = ""
        if config.train.optimizer_state == "client":
            moments = self.shelf.load(task.worker, task.round)
            if moments is None and task.cursor > 0:
                note = "its optimiser state is not on this machine: started anew"
        seed = int(np.random.SeedSequence((config.seed, task.round, task.worker)).generate_state(1)[0])
        interval = train_interval(model, self.batches(task), config.train, seed, moments)
        if config.train.optimizer_state == "client":
            shared = {p.name for p in self.job.layout.params if self.job.layout.held(p, task.blueprint) is None}
            self.shelf.save(task.worker, task.round, interval.moments, shared, task.keep_from)
        travels = config.train.optimizer_state == "server"
        return Reply(
            task.blueprint.digest,
            _on_cpu(get_state(model)),
            interval.loss,
            interval.num_tokens,
            interval.num_batches,
            moments=Moments(interval.moments.step, {m: _on_cpu(v) for m, v in interval.moments.values.items()})
            if travels
            else None,
            note=note,
        )


def _on_cpu(state: State) -> State:
    return {name: tensor.cpu() for name, tensor in state.items()}


class RoundMean:
    """Aggregates the replies of one round as they arrive, and then gives the next state.

    With `in_place` the next state takes the memory of `state`, which must not be read after the first reply.
    """

    def __init__(self, job: Job, state: RunState, tasks: list[Task], in_place: bool = False) -> None:
        self.job, self.state, self.tasks, self._in_place = job, state, tasks, in_place
        self.report = RoundReport(state.round + 1)
        self._params = self._mean_for(state.params)
        moments = state.moments.values if state.moments else {}
        self._moments = {name: self._mean_for(values) for name, values in moments.items()}
        self._loss_sum = 0.0
        self._cursors = list(state.cursors)

    def _mean_for(self, values: State) -> StreamingMean:
        """Memory that another round has given back is taken; nobody else gets it."""
        memory = self.state.spare.pop() if self.state.spare else None
        own = values if self._in_place else {name: tensor.clone() for name, tensor in values.items()}
        return StreamingMean(self.job.layout, own, memory)

    def add(self, task: Task, reply: Reply) -> None:
        """Count the reply in; a bad one is named in the report and dropped."""
        try:
            self._check(task, reply)
        except ReplyError as error:
            self.report.dropped[task.worker] = str(error)
            return
        weight = reply.num_tokens if self.job.config.train.weighting == "tokens" else 1
        self._params.add(task.blueprint, reply.params, weight)
        if reply.moments is not None:
            for name in MOMENTS:
                self._moments[name].add(task.blueprint, reply.moments.values[name], weight)
        self._loss_sum += reply.loss * reply.num_tokens
        self._cursors[task.worker] += reply.num_batches
        self.report.num_tokens += reply.num_tokens
        self.report.answered.append(task.worker)
        if reply.note:
            self.report.notes[task.worker] = reply.note

    def _check(self, task: Task, reply: Reply) -> None:
        layout, blueprint = self.job.layout, task.blueprint
        if task.worker in self.report.answered:
            raise ReplyError("answered twice")
        if reply.digest != blueprint.digest:
            raise ReplyError(f"reply is for blueprint {reply.digest[:12]}, sent was {blueprint.digest[:12]}")
        if reply.num_batches != task.num_batches:
            raise ReplyError(f"trained {reply.num_batches} batches, asked were {task.num_batches}")
        windows = sum(self.job.shard(task.worker).batch_length(task.cursor + i) for i in range(task.num_batches))
        if reply.num_tokens != (expected := windows * (self.job.config.data.window - 1)):
            raise ReplyError(f"trained on {reply.num_tokens} tokens, asked were {expected}")
        if not isfinite(reply.loss):
            raise ReplyError(f"training loss is {reply.loss}")
        check_state(layout, blueprint, reply.params)
        if (reply.moments is None) != (self.state.moments is None):
            raise ReplyError("optimiser moments are missing or were not asked for")
        if reply.moments is not None:
            for name in MOMENTS:
                check_state(layout, blueprint, reply.moments.values[name])

    def finish(self) -> RunState:
        """The next state. What nobody answered for keeps the server's value and is owed in the next round."""
        state, answered = self.state, sorted(self.report.answered)
        self.report.answered = answered
        if self.report.num_tokens:
            self.report.loss = self._loss_sum / self.report.num_tokens
        moments = state.moments
        if moments is not None and answered:
            longest = max(task.num_batches for task in self.tasks if task.worker in answered)
            moments = Moments(moments.step + longest, {name: self._moments[name].finish() for name in MOMENTS})
        blueprints = [task.blueprint for task in self.tasks if task.worker in answered]
        debt = coverage_debt(self.job.layout, self.job.division, blueprints)
        spare = [mean.memory for mean in (self._params, *self._moments.values())]
        return RunState(self._params.finish(), self._cursors, state.round + 1, debt, moments, spare)


def twist_round(job: Job, state: RunState, workers: list[Worker]) -> tuple[RunState, RoundReport]:
    """Draw, slice, train, aggregate: the whole of TwIST."""
    tasks = plan(job, state)
    mean = RoundMean(job, state, tasks)
    for task, worker in zip(tasks, workers, strict=True):
        mean.add(task, worker.train(task, *dispatch(job, state, task)))
    return mean.finish(), mean.report


def run(job: Job, state: RunState, folder: Path, num_rounds: int | None = None) -> RunState:
    """`num_rounds` more rounds (default: to the end) in this process; `folder` keeps client-side moments."""
    worker = Worker(job, MomentShelf(folder))
    last = job.num_rounds if num_rounds is None else state.round + num_rounds
    while state.round < last:
        state, _ = twist_round(job, state, [worker] * job.config.train.workers)
    return state

"""A whole TwIST round in one process: the map for readers, and the oracle of the Flower app.

blueprint -> slice -> train -> aggregate. The app runs the same `plan`, `Worker.train` and `RoundMean`, with a
network in between (`wire.task_to_records` sends what `dispatch` gives); on CPU it gives the same weights bit for bit.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path

from twist_fl.blueprint.blocks import Layout
from twist_fl.blueprint.division import Debt, Scores
from twist_fl.blueprint.moments import MOMENTS, SQUARES
from twist_fl.model.subnet import State, mask_state, slice_state
from twist_fl.training.aggregate import (
    LARGEST,
    Aggregator,
    Memory,
    ReplyError,
    check_state,
    coverage_debt,
    new_aggregator,
)
from twist_fl.training.bounds import check_moments, magnitudes, reach
from twist_fl.training.client_state import MomentShelf
from twist_fl.training.importance import score_blocks
from twist_fl.training.interval import Moments, adam_step, zero_moments
from twist_fl.training.job import Job
from twist_fl.training.outer_optimizer import OuterState, new_outer, outer_step
from twist_fl.training.rewiring import rewire
from twist_fl.training.rules import ROBUST
from twist_fl.training.schedule import learning_rate
from twist_fl.training.worker import Reply, Task, Worker, rates


@dataclass
class RunState:
    """All that a run needs to go on: `round` rounds are done, `cursors[s]` batches by worker s."""

    params: State
    cursors: list[int]
    round: int = 0
    debt: Debt = frozenset()
    moments: Moments | None = None
    """The server's: those that travel, or DDP's."""
    outer: OuterState | None = None
    """With aggregate.optimizer other than mean; DDP's one step needs none."""
    scores: Scores | None = None
    """Of the blocks, with blueprint.policy=importance."""
    spare: list[Memory] = field(default_factory=list, repr=False, compare=False)
    """Where the sums of the round before were: the next round takes this memory."""


@dataclass
class RoundReport:
    """What a round did, for people and for the run's log."""

    round: int
    loss: float = float("nan")
    """Mean training loss over the tokens of all replies, nats per token."""
    num_tokens: int = 0
    training_seconds: float = 0.0
    """The slowest worker's."""
    peak_bytes: int = 0
    """The largest of any worker."""
    answered: list[int] = field(default_factory=list)
    dropped: dict[int, str] = field(default_factory=dict)
    """Workers whose reply did not count, and why."""
    notes: dict[int, str] = field(default_factory=dict)
    """What workers whose reply counted had to say."""


def start(job: Job) -> RunState:
    params = job.initial_state()
    if job.config.blueprint.rewire:
        params = rewire(job, params)
    by_gradient = job.config.algorithm == "ddp"
    kept = dict.fromkeys(MOMENTS, job.layout) if by_gradient else job.moment_layouts
    scores = score_blocks(job, params, 0) if job.division.by_importance else None
    moments = zero_moments(kept) if kept else None
    outer = None if by_gradient else new_outer(job.config.aggregate, job.layout, params)
    return RunState(params, [0] * job.config.train.workers, moments=moments, outer=outer, scores=scores)


def plan(job: Job, state: RunState, keep_from: int = 0) -> list[Task]:
    """The next round's tasks."""
    round_ = state.round + 1
    blueprints = job.scored(state.scores).blueprints(round_, state.debt)
    left = [job.total_batches - cursor for cursor in state.cursors]
    workers = job.sampled(round_)
    return [
        Task(round_, worker, blueprint, state.cursors[worker], min(job.batches_per_round, left[worker]), keep_from)
        for worker, blueprint in zip(workers, blueprints, strict=True)
    ]


def dispatch(job: Job, state: RunState, task: Task) -> tuple[State, Moments | None]:
    """The parameters, and of the moments that travel what the task's blueprint names.

    A worker that masks is given them whole. The server's own keep momentum only where they may move.
    """
    given = job.given(task.worker, task.blueprint)
    params = slice_state(job.layout, state.params, given)
    if state.moments is None or not job.moment_layouts:
        return params, None
    values = {}
    for name, layout in job.moment_layouts.items():
        values[name] = slice_state(layout, state.moments.values[name], given)
        if task.worker not in job.clients:
            values[name] = mask_state(layout, values[name], task.blueprint)
    return params, Moments(state.moments.step, values)


class RoundMean:
    """Aggregates the replies of one round as they arrive, and then gives the next state.

    With `in_place` the next state takes the memory of `state`, which must not be read after the first reply.
    """

    def __init__(self, job: Job, state: RunState, tasks: list[Task], in_place: bool = False) -> None:
        self.job, self.state, self.tasks = job, state, tasks
        self.report = RoundReport(state.round + 1)
        self._in_place = in_place
        # The hybrid variant's own worker trains the server's parameters where they are, in_place or not.
        self._before = {name: value.clone() for name, value in state.params.items()} if state.outer else {}
        self._spare: list[Memory] = []
        gradients, rule = job.config.algorithm == "ddp", job.config.aggregate.rule
        self._sent = {} if gradients else magnitudes(state.params)
        self._params = self._begin(rule, job.layout, state.params, in_place and not gradients)
        moments, rule = state.moments.values if state.moments else {}, rule if rule in ROBUST else "mean"
        self._moments = {
            name: self._begin(rule, layout, moments[name], in_place) for name, layout in job.moment_layouts.items()
        }
        self._loss_sum = 0.0
        self._cursors = list(state.cursors)

    def _begin(self, rule: str, layout: Layout, values: State, in_place: bool) -> Aggregator:
        """Memory that another round has given back is taken; nobody else gets it."""
        self._spare.append(self.state.spare.pop(0) if self.state.spare else {})
        own = values if in_place else {name: tensor.clone() for name, tensor in values.items()}
        return new_aggregator(rule, layout, own, self._spare[-1])

    def add(self, task: Task, reply: Reply, lasts: bool = False) -> None:
        """Count the reply in; a bad one is named in the report and dropped, one more from the same worker is not read.

        With `lasts`, nobody changes the reply's tensors before `finish`, which then reads them where they lie.
        Raises ReplyError if that is the server's own: it has trained the server's parameters in place.
        """
        if task.worker in self.report.answered:
            self.report.notes[task.worker] = "answered more than once: the first counts"
            return
        try:
            self._check(task, reply)
        except ReplyError as error:
            if task.worker not in self.job.clients:
                raise ReplyError(
                    f"the server's own training failed, resume from the last checkpoint: {error}"
                ) from error
            self.drop(task.worker, str(error))
            return
        self.report.dropped.pop(task.worker, None)
        weight = reply.num_tokens if self.job.config.train.weighting == "tokens" else 1
        given = self.job.given(task.worker, task.blueprint)  # of a worker that masks, the other blocks do not count
        self._params.add(task.blueprint, reply.params, weight, given, lasts)
        if reply.moments is not None:
            for name, mean in self._moments.items():
                mean.add(task.blueprint, reply.moments.values[name], weight, given, lasts)
        self._loss_sum += reply.loss * reply.num_tokens
        self._cursors[task.worker] += reply.num_batches
        self.report.num_tokens += reply.num_tokens
        self.report.training_seconds = max(self.report.training_seconds, reply.seconds)
        self.report.peak_bytes = max(self.report.peak_bytes, reply.peak_bytes)
        self.report.answered.append(task.worker)
        if reply.note:
            self.report.notes[task.worker] = reply.note

    def drop(self, worker: int, reason: str) -> None:
        """Name a worker whose reply is not to count, unless one of its replies has counted."""
        if worker not in self.report.answered:
            self.report.dropped[worker] = reason

    def _check(self, task: Task, reply: Reply) -> None:
        layout, blueprint = self.job.layout, task.blueprint
        given = self.job.given(task.worker, blueprint)
        if reply.digest != task.digest:
            raise ReplyError("the reply is to another task: its round, worker or blueprint differs")
        if reply.num_batches != task.num_batches:
            raise ReplyError(f"trained {reply.num_batches} batches, asked were {task.num_batches}")
        windows = sum(self.job.shard(task.worker).batch_length(task.cursor + i) for i in range(task.num_batches))
        if reply.num_tokens != (expected := windows * (self.job.config.data.window - 1)):
            raise ReplyError(f"trained on {reply.num_tokens} tokens, asked were {expected}")
        if not isfinite(reply.loss):
            raise ReplyError(f"training loss is {reply.loss}")
        train = self.job.config.train
        check_state(layout, given, reply.params, reach=reach(self._sent, train, rates(self.job, task)))
        if (reply.moments is None) == bool(self.job.moment_layouts):
            raise ReplyError("optimiser moments are missing or were not asked for")
        if reply.moments is not None:
            assert self.state.moments is not None
            if reply.moments.step != (after := self.state.moments.step + task.num_batches):
                raise ReplyError(f"moment_step is {reply.moments.step}, expected {after}")
            for name, of in self.job.moment_layouts.items():
                check_state(of, given, reply.moments.values[name], 0 if name == SQUARES else -LARGEST)
            check_moments(reply.moments.values, train)

    def finish(self) -> RunState:
        """The next state. What nobody answered for keeps the server's value and is owed in the next round."""
        state, answered = self.state, sorted(self.report.answered)
        self.report.answered = answered
        if self.report.num_tokens:
            self.report.loss = self._loss_sum / self.report.num_tokens
        params, moments, outer = self._next() if answered else (state.params, state.moments, state.outer)
        blueprints = [task.blueprint for task in self.tasks if task.worker in answered]
        debt = coverage_debt(self.job.layout, self.job.division, blueprints)
        round_, every, scores = state.round + 1, self.job.config.blueprint.score_every, state.scores
        if scores is not None and every and round_ % every == 0:
            scores = score_blocks(self.job, params, round_)
        return RunState(params, self._cursors, round_, debt, moments, outer, scores, self._spare)

    def _next(self) -> tuple[State, Moments | None, OuterState | None]:
        """The next parameters and moments: the means of what was trained, or DDP's step by the mean gradient."""
        state, moments, outer = self.state, self.state.moments, self.state.outer
        if self.job.config.algorithm == "ddp":
            rate = learning_rate(self.job.config.train, state.round, self.job.total_batches)
            own = state if self._in_place else deepcopy(state)
            assert own.moments is not None
            return *adam_step(own.params, self._params.finish(), own.moments, self.job.config.train, rate), None
        if moments is not None:
            longest = max(task.num_batches for task in self.tasks if task.worker in self.report.answered)
            moments = Moments(moments.step + longest, {name: mean.finish() for name, mean in self._moments.items()})
        params = self._params.finish()
        if outer is not None:
            outer = outer if self._in_place else deepcopy(outer)
            outer_step(self.job.config.aggregate, self.job.layout, self._before, params, self._params.held(), outer)
        return params, moments, outer


def twist_round(job: Job, state: RunState, workers: list[Worker], keep_from: int = 0) -> tuple[RunState, RoundReport]:
    """Draw, slice, train, aggregate: the whole of TwIST."""
    tasks = plan(job, state, keep_from)
    mean = RoundMean(job, state, tasks)
    for task, worker in own_last(job, tasks, workers):
        in_place = task.worker not in job.clients
        mean.add(task, worker.train(task, *dispatch(job, state, task), in_place))
    return mean.finish(), mean.report


def own_last(job: Job, tasks: list[Task], workers: list[Worker]) -> list[tuple[Task, Worker]]:
    """Each task with its one of all `workers`; the server's own, which changes its parameters in place, comes last."""
    return sorted(((task, workers[task.worker]) for task in tasks), key=lambda pair: pair[0].worker not in job.clients)


def run(job: Job, state: RunState, folder: Path, num_rounds: int | None = None) -> RunState:
    """`num_rounds` more rounds (default: to the end) in this process; `folder` keeps client-side moments."""
    worker = Worker(job, MomentShelf(folder))
    last = job.num_rounds if num_rounds is None else state.round + num_rounds
    while state.round < last:
        state, _ = twist_round(job, state, [worker] * job.config.train.workers)
    return state

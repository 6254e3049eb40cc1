"""Federated evaluation: each worker evaluates its share of the test text, and the server takes the mean over tokens.

The shards that workers train on are no test. Each node has the whole text, so of n workers that are asked, the i-th
takes the test windows i, i + n, ...: with the full model, the result is the server's own over the same windows. Where
each worker has its own text, it takes what is held out of that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import isfinite
from typing import Any

import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from twist_fl.blueprint.drawing import full_blueprint
from twist_fl.data.corpus import Windows
from twist_fl.federation import wire
from twist_fl.model.subnet import take_back
from twist_fl.system.untrusted import Field, plain, read_exactly
from twist_fl.tickets.evaluate import perplexity_of, sum_nll
from twist_fl.training.aggregate import ReplyError
from twist_fl.training.job import Job
from twist_fl.training.worker import Task, Worker

_PART = {"part": Field(int, 0), "parts": Field(int, 1)}
_REPLY = "evaluation"


def _windows(job: Job, worker: int, part: int, parts: int) -> Windows:
    return job.text_of(worker).open().test[: job.config.eval.watch_windows][part::parts]


def _num_windows(job: Job, worker: int, part: int, parts: int) -> int:
    """The same's, without the text where its size is known."""
    return len(range(min(job.text_of(worker).num_test, job.config.eval.watch_windows))[part::parts])


# A worker's side


def answer(worker: Worker, content: RecordDict) -> RecordDict:
    """The summed loss of the message's model over the worker's share of the test text, and how many tokens that is."""
    job = worker.job
    parcel = wire.task_from_records(job, content, trains=False)
    part = read_exactly(str(content.config_records["part"]["json"]), _PART)
    windows = _windows(job, parcel.task.worker, **part)
    torch.set_num_threads(job.config.train.threads or 1)
    model = worker.load(parcel.task, parcel.params, parcel.in_place)
    try:
        loss_sum = sum_nll(model, windows, job.config.eval.batch_size)
    finally:
        if parcel.in_place:
            take_back(model)
    found = {"loss-sum": loss_sum, "num-tokens": len(windows) * (windows.shape[1] - 1)}
    return RecordDict({_REPLY: MetricRecord(found)})


# The server's


class Evaluation:
    """What the workers that trained in a round say of its outcome: of their subnets, or each of the full model."""

    def __init__(self, job: Job, trained: Sequence[Task]) -> None:
        """`trained`: the tasks of clients whose replies counted; nobody is asked for whom there is no window."""
        self._job = job
        asked = [task for task in trained if _num_windows(job, task.worker, 0, 1)]
        if job.own is None:
            asked = asked[: _num_windows(job, 0, 0, 1)]
        full = full_blueprint(job.layout) if job.config.eval.federated == "full" else None
        self.tasks = [Task(task.round, task.worker, full or task.blueprint, 0, 0) for task in asked]
        self.answered: list[int] = []
        self.dropped: dict[int, str] = {}
        self._loss_sum, self._num_tokens = 0.0, 0

    def _part(self, task: Task) -> dict[str, int]:
        shared = self._job.own is None
        return {"part": self.tasks.index(task), "parts": len(self.tasks)} if shared else {"part": 0, "parts": 1}

    def ask(self, task: Task, content: RecordDict) -> None:
        """Add to a task's message what it is to be evaluated on."""
        content["part"] = ConfigRecord({"json": json.dumps(self._part(task))})

    def add(self, task: Task, content: RecordDict) -> None:
        """Count a reply in; a bad one is named and dropped, a second one of a worker is not read."""
        if task.worker in self.answered:
            return
        try:
            loss_sum = self._read(task, content)
        except ReplyError as error:
            self.drop(task, str(error))
            return
        self.dropped.pop(task.worker, None)
        self.answered.append(task.worker)
        self._loss_sum += loss_sum
        self._num_tokens += self._tokens(task)

    def drop(self, task: Task, reason: str) -> None:
        if task.worker not in self.answered:
            self.dropped[task.worker] = reason

    def missing(self) -> list[Task]:
        return [task for task in self.tasks if task.worker not in {*self.answered, *self.dropped}]

    def _tokens(self, task: Task) -> int:
        return _num_windows(self._job, task.worker, **self._part(task)) * (self._job.config.data.window - 1)

    def _read(self, task: Task, content: RecordDict) -> float:
        found = content.metric_records.get(_REPLY, MetricRecord())
        loss_sum, num_tokens = found.get("loss-sum"), found.get("num-tokens")
        if num_tokens != (expected := self._tokens(task)):
            raise ReplyError(f"evaluated {plain(str(num_tokens))} tokens, asked were {expected}")
        if not isinstance(loss_sum, float) or not isfinite(loss_sum):
            raise ReplyError(f"summed test loss is {plain(str(loss_sum))}")
        return loss_sum

    def result(self) -> dict[str, Any]:
        """For the run's log. Loss and perplexity only if anybody has answered."""
        found = {"of": self._job.config.eval.federated, "answered": sorted(self.answered), "dropped": self.dropped}
        return found | self.metrics()

    def metrics(self) -> dict[str, Any]:
        """Nothing if nobody has answered."""
        if not self._num_tokens:
            return {}
        loss = self._loss_sum / self._num_tokens
        return {"loss": loss, "perplexity": perplexity_of(loss), "num_tokens": self._num_tokens}

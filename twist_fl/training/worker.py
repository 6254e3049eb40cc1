"""A training client: one worker's part of a round, the same in the app and in `rounds.py`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.data.run_text import RunText
from twist_fl.model.masked import MaskedModel
from twist_fl.model.subnet import State, take_back
from twist_fl.system.errors import DamagedError
from twist_fl.system.memory import Peak
from twist_fl.training.client_state import MomentShelf
from twist_fl.training.factors import from_factors, to_factors
from twist_fl.training.interval import Interval, Moments, batch_gradient, train_interval
from twist_fl.training.job import Job
from twist_fl.training.loss import SoftTargets
from twist_fl.training.precision import check_precision
from twist_fl.training.schedule import learning_rates
from twist_fl.training.teacher import Teacher, open_teacher


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

    @property
    def digest(self) -> str:
        """SHA-256 of what a reply answers: of blueprints that come again, an earlier round's is told apart by it."""
        return hashlib.sha256(f"{self.round} {self.worker} {self.blueprint.digest}".encode()).hexdigest()


@dataclass(frozen=True)
class Reply:
    digest: str
    """The task's."""
    params: State
    """As trained; of DDP, their gradient."""
    loss: float
    num_tokens: int
    num_batches: int
    seconds: float = 0.0
    moments: Moments | None = None
    peak_bytes: int = 0
    """Most memory held while training, above what was held before there was a model: see `memory.Peak`."""
    note: str = ""
    """What the run's log should say of this worker."""


class Worker:
    """A training client. Data and one model per shape stay warm; all else comes with the task."""

    def __init__(self, job: Job, shelf: MomentShelf) -> None:
        self.job, self.shelf = job, shelf
        self.device = job.device()
        job.open_texts()  # what is wrong with them shows before the first round
        check_precision(job.config.train.precision, self.device)
        self.models = job.models(compile=job.config.train.compile)
        self.masked = MaskedModel(job.models(compile=job.config.train.compile))
        self.teachers: dict[RunText, Teacher] = {}
        self.peak = Peak(self.device)  # no model is built yet

    def load(self, task: Task, params: State, in_place: bool = False) -> PreTrainedModel:
        """The task's subnet: a smaller model, or the whole one masked. With `in_place` until `subnet.take_back`."""
        models = self.masked if self.job.masks(task.worker) else self.models
        return models.load(task.blueprint, params, in_place)

    @cached_property
    def teacher(self) -> Any:
        """One model for all texts here."""
        return open_teacher(self.job.config, self.job.teacher, self.device)

    def soft_targets(self, task: Task) -> Iterator[SoftTargets | None]:
        """For each of the task's batches what the run's teacher makes of it, if it has one."""
        train = self.job.config.train
        if not train.distill:
            yield from repeat(None, task.num_batches)
            return
        text, shard = self.job.text_of(task.worker), self.job.shard(task.worker)
        if text not in self.teachers:
            windows, vocabulary = self.job.windows(task.worker), self.job.layout.sizes["vocab"]
            self.teachers[text] = Teacher(self.teacher, train.distill, vocabulary, windows)
        for cursor in range(task.cursor, task.cursor + task.num_batches):
            yield self.teachers[text].targets(shard.batch(cursor))

    def batches(self, task: Task) -> Iterator[torch.Tensor]:
        """The task's batches, each read when it is asked for: a GPU is still busy with the one before."""
        shard, windows = self.job.shard(task.worker), self.job.windows(task.worker)
        for cursor in range(task.cursor, task.cursor + task.num_batches):
            batch = torch.tensor(windows[shard.batch(cursor)], dtype=torch.int64)  # (B, T)
            if self.device.startswith("cuda"):
                batch = batch.pin_memory()
            yield batch.to(self.device, non_blocking=True)

    def train(self, task: Task, params: State, moments: Moments | None, in_place: bool = False) -> Reply:
        """Train the subnet for one interval, or for DDP take a batch's gradient; the reply's tensors are on the CPU.

        With `in_place` they are those given, where they are not gradients; else those given stay as they are.
        """
        started = time.perf_counter()
        self.peak.restart()
        config = self.job.config
        torch.set_num_threads(config.train.threads or 1)
        model = self.load(task, params, in_place)
        try:
            own = moments.clone() if moments and not in_place else moments
            interval, note = self._interval(model, task, own)
        finally:
            if in_place:
                take_back(model)
        trained_in_place = in_place and config.algorithm != "ddp"
        return Reply(
            task.digest,
            _back(interval.result, params if trained_in_place else {}),
            interval.loss,
            interval.num_tokens,
            interval.num_batches,
            time.perf_counter() - started,
            moments=self._moments(interval.moments, moments.values if moments and in_place else {}),
            peak_bytes=self.peak.num_bytes(),
            note=note,
        )

    def _interval(self, model: PreTrainedModel, task: Task, moments: Moments | None) -> tuple[Interval, str]:
        """What the job's algorithm does in a round, and what the run's log should say of it."""
        config = self.job.config
        seed = int(np.random.SeedSequence((config.seed, task.round, task.worker)).generate_state(1)[0])
        if config.algorithm == "ddp":
            ((batch, soft),) = zip(self.batches(task), self.soft_targets(task), strict=True)
            return batch_gradient(model, batch, config.train, seed, soft), ""
        if config.train.optimizer_state == "client":
            return self._continue(model, task, seed)
        return self._train(model, task, seed, moments), ""

    def _train(self, model: PreTrainedModel, task: Task, seed: int, moments: Moments | None) -> Interval:
        config = self.job.config.train
        if moments is not None and config.optimizer_state == "factored":
            moments = from_factors(self.job.layout, moments, self.device)
        soft = self.soft_targets(task)
        return train_interval(model, self.batches(task), config, seed, moments, rates(self.job, task), soft)

    def _moments(self, after: Moments, places: Mapping[str, State]) -> Moments | None:
        """Those that travel."""
        if not self.job.moment_layouts:
            return None
        if self.job.config.train.optimizer_state == "factored":
            after = to_factors(self.job.layout, after)
        return Moments(after.step, {name: _back(value, places.get(name, {})) for name, value in after.values.items()})

    def _continue(self, model: PreTrainedModel, task: Task, seed: int) -> tuple[Interval, str]:
        """An interval with the client's own optimiser state of what it always holds, and a note if that is lost."""
        moments, damage = self._kept(task)
        lost = moments is None and task.cursor > 0
        interval = self._train(model, task, seed, moments)
        kept = self.job.always_whole(task.worker)
        self.shelf.save(task.worker, task.round, interval.moments, kept, task.keep_from)
        return interval, f"its optimiser state {damage or 'is not on this machine'}: started anew" if lost else ""

    def _kept(self, task: Task) -> tuple[Moments | None, str]:
        """What the client has kept of its optimiser's state; one that is damaged is not used, but said."""
        try:
            return self.shelf.load(task.worker, task.round), ""
        except DamagedError:
            return None, "on this machine is damaged"


def rates(job: Job, task: Task) -> Iterator[float]:
    """The learning rate of each of the task's batches."""
    first = (task.round - 1) * job.batches_per_round  # of the run: a worker may have missed rounds
    return learning_rates(job.config.train, first, task.num_batches, job.total_batches)


def _back(state: State, places: Mapping[str, torch.Tensor]) -> State:
    """`state` on the CPU; from a GPU it goes to its place, where it has one."""

    def back(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "cpu" or name not in places:
            return tensor.cpu()
        return places[name].copy_(tensor)

    return {name: back(name, tensor) for name, tensor in state.items()}

"""What a run leaves behind as it goes, however it is trained: its plan, evaluations and checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.blueprint.cost import moment_bytes, round_bytes, server_bytes, training_bytes
from twist_fl.blueprint.drawing import full_blueprint
from twist_fl.config.sizes import server_copies
from twist_fl.rounds import RunState, plan
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.trackers import listen
from twist_fl.tickets import evaluate
from twist_fl.training.job import Job
from twist_fl.training.worker import Task


class Keeper:
    """Logs `job`'s plan to `folder`, and evaluates and saves its state whenever that is due."""

    def __init__(self, job: Job, folder: RunFolder) -> None:
        self.job, self.folder = job, folder
        self._models = job.models()
        self._corpus = job.corpus  # what is wrong with it shows before the first round

    @property
    def keep_from(self) -> int:
        """The oldest round that the run may go on from: clients keep their state of it."""
        return min(self.folder.saved_rounds, default=0)

    def begin(self, state: RunState) -> None:
        """Forget what the log says beyond `state`, and write the run's plan."""
        job, tasks = self.job, plan(self.job, state)
        predicted = self.predicted(tasks)
        listen(job.config, self.folder)
        self.folder.rewind(
            state.round,
            "start",
            algorithm=job.config.algorithm,
            workers=job.config.train.workers,
            num_rounds=job.num_rounds,
            num_params=job.layout.num_params(),
            subnet_params=[job.layout.num_params(task.blueprint) for task in tasks],
            predicted_round_bytes=predicted["predicted_bytes"],
            predicted_moment_bytes=predicted["predicted_moment_bytes"],
        )

    def predicted(self, tasks: Sequence[Task]) -> dict[str, int]:
        """A round's cost by Appendix C: bytes of weights and of moments moved, and the memory to train of the worker
        that holds most; and the server's."""
        job = self.job
        given = {task.worker: job.given(task.worker, task.blueprint) for task in tasks}
        sent = [blueprint for worker, blueprint in given.items() if worker in job.clients]
        weights, moments = round_bytes(job.layout, sent), moment_bytes(job.moment_layouts, sent)
        ready = (weights + moments) / 2
        return {
            "predicted_bytes": weights,
            "predicted_moment_bytes": moments,
            "predicted_server_bytes": server_bytes(
                server_copies(job.config), job.layout, job.moment_layouts.values(), ready
            ),
            "predicted_peak_bytes": max(training_bytes(job.layout, blueprint) for blueprint in given.values()),
        }

    def is_due(self, state: RunState, every: int) -> bool:
        """After every `every` intervals, and at the end."""
        return state.round == self.job.num_rounds or state.round % (every * self.job.rounds_per_interval) == 0

    def evaluates(self, state: RunState) -> bool:
        every = self.job.config.eval.every
        return every > 0 and self.is_due(state, every)

    def end_of_round(self, state: RunState, tasks: Sequence[Task], save: bool = False) -> None:
        """Evaluate, then save, so that a run killed in between repeats both. `save`: even if it is not due."""
        if self.evaluates(state):
            self._evaluate(state, [task.blueprint for task in tasks])
        if save or self.is_due(state, self.job.config.checkpoint_every) or self._before_the_short(state):
            self._save(state)

    def keep(self, state: RunState) -> None:
        """Save what a run that cannot go on has come to, if it is not saved."""
        if state.round > self.folder.saved_round:
            self._save(state)

    def _save(self, state: RunState) -> None:
        self.folder.save(state, self.job.model_config, self._corpus.tokenizer_folder)
        self.folder.log("saved", round=state.round)

    def _before_the_short(self, state: RunState) -> bool:
        """Before a last interval that is shorter than the others: from there the run can be trained longer."""
        return self.job.ends_short and state.round == self.job.num_rounds - 1

    def _evaluate(self, state: RunState, blueprints: Sequence[Blueprint]) -> None:
        """Perplexity of the full model and of the round's subnets, on the server's test text if it has any."""
        if not len(self._corpus.test):
            return
        self.folder.log("evaluating", round=state.round)
        config = self.job.config.eval
        windows = self._corpus.test[: config.watch_windows]
        looked_at = {"full": [full_blueprint(self.job.layout)]}
        if not all(blueprint.is_full for blueprint in blueprints):
            looked_at["subnets"] = list(blueprints)
        fields = {
            name: evaluate.subnet_perplexity(self._models, state.params, subnets, windows, config.batch_size)
            for name, subnets in looked_at.items()
        }
        self.folder.log("eval", round=state.round, windows=len(windows), **fields)

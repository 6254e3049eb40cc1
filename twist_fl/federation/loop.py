"""A round loop in the place of Flower's: what it asks of a strategy are the hooks of Flower's `Strategy`.

Flower's own cannot resume, gathers all replies before it aggregates and, on a network, looks for them every 3 s.
Here messages are pushed, replies are pulled at a short interval and aggregated as they arrive, and a round ends at its
deadline with whoever has answered.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from twist_fl.federation.connecting import NoWorkersError, died
from twist_fl.federation.exchange import exchange
from twist_fl.rounds import RunState, start
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.recorder import Keeper
from twist_fl.system.cores import usable_cores
from twist_fl.system.errors import ConfigError
from twist_fl.system.memory import Peak
from twist_fl.training.job import Job
from twist_fl.training.worker import Task

Metrics = dict[int, MetricRecord]
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class RoundLoop(Strategy):
    """Runs `job` from `folder`'s newest checkpoint (or from the start) to its end, with `start` or `run`."""

    def __init__(self, job: Job, folder: RunFolder) -> None:
        self.job, self.folder = job, folder
        self._memory = Peak()
        self.state: RunState = folder.load() or start(job)
        self.timeout = job.config.flower.round_timeout
        """Seconds that replies are waited for."""
        self._keeper = Keeper(job, folder)
        self._pending: dict[str, Message] = {}  # messages of the round that nobody has answered yet
        self._planned: list[Task] = []  # the round's
        self._dead: str | None = None  # why a simulated worker's process died for good

    def sending(self, messages: Iterable[Message]) -> Iterable[Message]:
        """What a hook has given, each message before it goes out."""
        raise NotImplementedError

    def close(self) -> None:
        """Give up what was kept from round to round."""
        raise NotImplementedError

    def summary(self) -> None:
        """Write the run's plan to its log."""
        self._keeper.begin(self.state)

    def run(self, grid: Grid) -> RunState:
        """All remaining rounds, with evaluation and checkpoints on the way. Raises NoWorkersError."""
        self._run(grid, Result())
        return self.state

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """As `run`, called and answered as any strategy of Flower: the final arrays and the metrics of each round.

        `timeout` is used instead of flower.round_timeout. `evaluate_fn` is called with the number of rounds that are
        done, before the first that is left and after each. Raises ConfigError for what only the run's configuration
        can say, NoWorkersError.
        """
        if initial_arrays:
            raise ConfigError(
                f"initial_arrays (of {len(initial_arrays)} arrays) would be another run: its model is made by its "
                "configuration, leave them out and set model.pretrained to a checkpoint"
            )
        if num_rounds not in (None, self.job.num_rounds):
            raise ConfigError(
                f"num_rounds={num_rounds}, and the run has {self.job.num_rounds} rounds: leave it out, or set "
                "train.rounds (intervals)"
            )
        self.timeout = self.timeout if timeout is None else timeout
        result = Result()
        self._run(grid, result, train_config, evaluate_config, evaluate_fn)
        result.arrays = self.arrays()
        return result

    def arrays(self) -> ArrayRecord:
        """The whole model, a copy, as `ArrayRecord.to_torch_state_dict` reads it."""
        return ArrayRecord(OrderedDict(self.state.params))

    def _run(
        self,
        grid: Grid,
        result: Result,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> None:
        # While workers train on this machine, a parallel region of many threads waits for the slowest of busy cores:
        # with the default, checking and adding 4 replies of 2 M parameters took 8 s a round instead of 0.1.
        torch.set_num_threads(1)
        self.summary()
        try:
            self._evaluate(result, evaluate_fn)
            while self.state.round < self.job.num_rounds:
                trained, evaluated = self._round(grid, train_config, evaluate_config)
                result.train_metrics_clientapp |= trained
                result.evaluate_metrics_clientapp |= evaluated
                self._evaluate(result, evaluate_fn)
        except NoWorkersError as error:
            self._keeper.keep(self.state)
            way_on = f'{self.folder.way_on} (under `flwr run`: run-dir="{self.folder.path}")'
            raise type(error)(f"{error}; {way_on}") from error
        finally:
            self.close()

    def _evaluate(self, result: Result, evaluate_fn: EvaluateFn | None) -> None:
        if evaluate_fn and (metrics := evaluate_fn(self.state.round, self.arrays())) is not None:
            result.evaluate_metrics_serverapp[self.state.round] = metrics

    def _round(
        self, grid: Grid, train_config: ConfigRecord | None = None, evaluate_config: ConfigRecord | None = None
    ) -> tuple[Metrics, Metrics]:
        """What the workers said of training, and of evaluation, by the round's number if they said anything."""
        round_ = self.state.round + 1
        messages = self.sending(self.configure_train(round_, ArrayRecord(), train_config or ConfigRecord(), grid))
        _, trained = self.aggregate_train(round_, self._replies(grid, messages))
        if self.state.round != round_:
            raise self.unfinished("aggregate_train")
        messages = self.sending(self.configure_evaluate(round_, ArrayRecord(), evaluate_config or ConfigRecord(), grid))
        evaluated = self.aggregate_evaluate(round_, self._replies(grid, messages))
        torch.set_num_threads(usable_cores())  # the workers are idle
        self._keeper.end_of_round(self.state, self._planned, save=self._dead is not None)
        torch.set_num_threads(1)
        if self._dead:
            raise died(self._dead)
        return {round_: trained} if trained else {}, {round_: evaluated} if evaluated else {}

    def unfinished(self, hook: str) -> RuntimeError:
        """Of a subclass whose `hook` does not call the one that it overrides."""
        return RuntimeError(f"{type(self).__name__}.{hook} must call super().{hook}, which makes the round's next step")

    def _replies(self, grid: Grid, messages: Iterable[Message]) -> Iterable[Message]:
        self._pending = {}
        return exchange(grid, messages, self.job.config.flower, self.timeout, self._pending)

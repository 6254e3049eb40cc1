"""`TwistStrategy` as a strategy of Flower: called as any, and its hooks overridden one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from local_grid import LocalGrid, assert_same_run, failing, same

from twist_fl.federation import wire
from twist_fl.federation.connecting import NoWorkersError
from twist_fl.federation.strategy import TwistStrategy
from twist_fl.rounds import RoundMean, RunState, dispatch, own_last, plan, start
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.errors import ConfigError
from twist_fl.tickets.evaluate import mean_nll
from twist_fl.training.client_state import MomentShelf
from twist_fl.training.job import Job
from twist_fl.training.worker import Worker

Make = Callable[..., TwistStrategy]
Replies = Iterable[Message]


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """As everything that is compared bit for bit."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})


@pytest.fixture
def make(tiny_job: Callable[..., Job], tmp_path: Path) -> Make:
    """A strategy of the tiny job with overrides, of a class."""

    def made(kind: type[TwistStrategy], *overrides: str) -> TwistStrategy:
        job = tiny_job("flower.wait_for_nodes=0.05", "flower.round_timeout=30", "eval.every=0", *overrides)
        folder = RunFolder(tmp_path / f"run-{job.run_id}")
        folder.create(job)
        return kind(job, folder)

    return made


def oracle(job: Job, folder: Path, missing: int | None = None) -> RunState:
    """`rounds.run`, where the worker `missing` does not count in round 1."""
    worker, state = Worker(job, MomentShelf(folder)), start(job)
    while state.round < job.num_rounds:
        tasks = plan(job, state)
        mean = RoundMean(job, state, tasks)
        for task, _ in own_last(job, tasks, [worker] * len(tasks)):
            if (task.round, task.worker) != (1, missing):
                in_place = task.worker not in job.clients
                mean.add(task, worker.train(task, *dispatch(job, state, task), in_place))
        state = mean.finish()
    return state


# start


def test_start_is_run_answered_as_flower_does(make: Make, tmp_path: Path) -> None:
    strategy = make(TwistStrategy, "train.optimizer_state=server")
    begun = {name: tensor.clone() for name, tensor in strategy.state.params.items()}
    seen: list[tuple[int, bool]] = []

    def evaluate(round_: int, arrays: ArrayRecord) -> MetricRecord | None:
        seen.append((round_, same(arrays.to_torch_state_dict(), begun)))
        return MetricRecord({"round": round_}) if round_ else None

    result = strategy.start(LocalGrid(), ArrayRecord(), num_rounds=2, timeout=60, evaluate_fn=evaluate)
    assert_same_run(strategy.state, oracle(strategy.job, tmp_path / "oracle"))
    assert same(result.arrays.to_torch_state_dict(), strategy.state.params)
    assert seen == [(0, True), (1, False), (2, False)]
    assert result.evaluate_metrics_serverapp == {1: MetricRecord({"round": 1}), 2: MetricRecord({"round": 2})}
    losses = {event["round"]: event["loss"] for event in strategy.folder.events("round")}
    assert {round_: metrics["loss"] for round_, metrics in result.train_metrics_clientapp.items()} == losses
    assert strategy.folder.saved_round == 2


def test_start_goes_on_where_the_run_was_left(make: Make) -> None:
    strategy = make(TwistStrategy, "checkpoint_every=1")
    strategy._round(LocalGrid())
    again = TwistStrategy(strategy.job, strategy.folder)
    result = again.start(LocalGrid())
    assert list(result.train_metrics_clientapp) == [2]


def test_the_timeout_of_start_is_that_of_its_rounds(make: Make) -> None:
    grid = LocalGrid(bend=lambda task, message, answer: [answer()] if task.worker else [])
    strategy = make(TwistStrategy, "train.rounds=1")
    strategy.start(grid, timeout=0.2)
    (event,) = strategy.folder.events("round")
    assert event["dropped"] == {"0": "no reply within flower.round_timeout=0.2 s, of node 0"}


def test_the_config_of_start_goes_to_the_workers(make: Make) -> None:
    found: list[Any] = []

    class Looking(LocalGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            messages = list(messages)
            found.extend(m.content["config"]["lr"] for m in messages if m.metadata.message_type == "train")
            return super().push_messages(messages)

    make(TwistStrategy, "train.rounds=1").start(Looking(), train_config=ConfigRecord({"lr": 0.5}))
    assert found == [0.5] * 3


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"num_rounds": 3}, r"^num_rounds=3, and the run has 2 rounds: leave it out, or set train\.rounds"),
        (
            {"initial_arrays": ArrayRecord({"a": torch.zeros(1)})},
            r"^initial_arrays \(of 1 arrays\) .* set model\.pretrained",
        ),
    ],
)
def test_start_refuses_what_only_the_configuration_can_say(given: dict[str, Any], says: str, make: Make) -> None:
    with pytest.raises(ConfigError, match=says):
        make(TwistStrategy).start(LocalGrid(), **given)


# Hooks


class Listing(TwistStrategy):
    """Leaves worker 1 out of round 1, of a list."""

    def aggregate_train(self, server_round: int, replies: Replies) -> Any:
        left = [reply for reply in replies if (server_round, reply.metadata.group_id) != (1, "1")]
        found = super().aggregate_train(server_round, left)
        if server_round == 1:
            assert self.nodes.segments.get(1) is None
        return found


class Generating(TwistStrategy):
    """The same, while replies come in."""

    def aggregate_train(self, server_round: int, replies: Replies) -> Any:
        def left() -> Iterator[Message]:
            for reply in replies:
                if (server_round, reply.metadata.group_id) != (1, "1"):
                    assert wire.reply_fields(reply.content)["loss"] > 0
                    yield reply

        return super().aggregate_train(server_round, left())


class Sparing(TwistStrategy):
    """Sends worker 1 nothing in round 1, and changes what the others are sent."""

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Replies:
        for message in super().configure_train(server_round, arrays, config, grid):
            if (server_round, message.metadata.group_id) != (1, "1"):
                message.content["mine"] = ConfigRecord({"word": "hello"})
                yield message


LEFT_OUT = {
    Listing: "Listing.aggregate_train left its reply out",
    Generating: "Generating.aggregate_train left its reply out",
    Sparing: "Sparing.configure_train sent it no message",
}


@pytest.mark.parametrize(("by", "variant"), [("shm", "true"), ("inline", "hybrid")])
@pytest.mark.parametrize("kind", LEFT_OUT)
def test_who_is_left_out_by_a_subclass_has_not_replied(
    kind: type[TwistStrategy], by: str, variant: str, make: Make, tmp_path: Path
) -> None:
    strategy = make(kind, f"flower.transport={by}", f"train.variant={variant}", "train.optimizer_state=server")
    assert_same_run(strategy.run(LocalGrid()), oracle(strategy.job, tmp_path / "oracle", missing=1))
    first, second = strategy.folder.events("round")
    assert (first["answered"], first["dropped"]) == ([0, 2], {"1": LEFT_OUT[kind]})
    assert (second["answered"], second["dropped"]) == ([0, 1, 2], {})
    assert len(strategy.folder.events("nodes")) == 1  # nobody was lost: they are not looked for again


def test_who_stops_listening_ends_the_round(make: Make) -> None:
    class Hasty(TwistStrategy):
        def aggregate_train(self, server_round: int, replies: Replies) -> Any:
            return super().aggregate_train(server_round, [next(iter(replies))])

    strategy = make(Hasty)
    strategy.run(LocalGrid(one_at_a_time=True))
    assert [event["answered"] for event in strategy.folder.events("round")] == [[0], [0]]


def test_a_generator_hears_of_a_reply_before_the_next_is_made(make: Make) -> None:
    seen: list[str] = []

    class Listening(TwistStrategy):
        def aggregate_train(self, server_round: int, replies: Replies) -> Any:
            def heard() -> Iterator[Message]:
                for reply in replies:
                    seen.append(reply.metadata.group_id)
                    yield reply
                    seen.append("added")

            return super().aggregate_train(server_round, heard())

    class Looking(LocalGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            seen.append("pull")
            return super().pull_messages(message_ids)

    strategy, grid = make(Listening, "train.rounds=1"), Looking(one_at_a_time=True)
    strategy.nodes.connect(grid, 0)
    seen.clear()
    strategy.run(grid)
    assert seen == [word for worker in "012" for word in ("pull", worker, "added")]


def test_nobody_left_ends_the_run(make: Make) -> None:
    class Deaf(TwistStrategy):
        def aggregate_train(self, server_round: int, replies: Replies) -> Any:
            return super().aggregate_train(server_round, [])

    with pytest.raises(NoWorkersError, match=r"^round 1: no worker answered: .*Deaf\.aggregate_train did not wait"):
        make(Deaf).run(LocalGrid())


def test_a_hook_that_forgets_its_step_is_named(make: Make) -> None:
    class NoAggregate(TwistStrategy):
        def aggregate_train(self, server_round: int, replies: Replies) -> Any:
            return None, None

    class NoConfigure(TwistStrategy):
        def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Replies:
            return []

    class Stranger(TwistStrategy):
        def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Replies:
            for message in super().configure_train(server_round, arrays, config, grid):
                yield Message(message.content, dst_node_id=message.metadata.dst_node_id, message_type="train")

    with pytest.raises(RuntimeError, match=r"^NoAggregate\.aggregate_train must call super\(\)\.aggregate_train"):
        make(NoAggregate).run(LocalGrid())
    with pytest.raises(RuntimeError, match=r"^NoConfigure\.configure_train must call super\(\)\.configure_train"):
        make(NoConfigure).run(LocalGrid())
    with pytest.raises(ValueError, match=r"^group_id='' is no worker of the round: .* one of 0, 1, 2$"):
        make(Stranger).run(LocalGrid())


# Federated evaluation

EVALUATED = ("eval.every=1", "eval.watch_windows=20")


@pytest.mark.parametrize(("variant", "by"), [("true", "inline"), ("masked", "shm"), ("hybrid", "inline")])
def test_of_the_full_model_the_workers_find_what_the_server_finds(
    variant: str, by: str, make: Make, tmp_path: Path
) -> None:
    """Whatever their number, and with moments that travel in training only."""
    settings = (f"train.variant={variant}", f"flower.transport={by}", "train.optimizer_state=server")
    strategy, grid = make(TwistStrategy, "eval.federated=full", *EVALUATED, *settings), LocalGrid()
    result = strategy.start(grid)
    assert_same_run(strategy.state, oracle(strategy.job, tmp_path / "oracle"))
    tokens = 20 * (strategy.job.config.data.window - 1)
    found = strategy.folder.events("federated")
    assert [event["round"] for event in found] == [1, 2]
    for event, own in zip(found, strategy.folder.events("eval"), strict=True):
        assert event["perplexity"] == pytest.approx(own["full"], rel=1e-6)
        assert (event["answered"], event["dropped"]) == (list(strategy.job.clients), {})
        assert event["bytes_down"]["weights"] == len(strategy.job.clients) * 4 * strategy.job.layout.num_params()
        metrics = result.evaluate_metrics_clientapp[event["round"]]
        assert dict(metrics) == {key: event[key] for key in ("loss", "perplexity")} | {"num_tokens": tokens}


def test_of_subnets_each_worker_evaluates_its_own(make: Make) -> None:
    strategy = make(TwistStrategy, "eval.federated=subnet", *EVALUATED, "blueprint.num_sub=[1,3,2]", "train.rounds=1")
    strategy.run(LocalGrid())
    (event,) = strategy.folder.events("federated")
    job, models, total = strategy.job, strategy.job.models(), 0.0
    for worker, blueprint in enumerate(job.blueprints(1)):
        share = job.corpus.test[:20][worker::3]
        total += mean_nll(models.load_sliced(blueprint, strategy.state.params), share, 4) * len(share)
    assert event["loss"] == pytest.approx(total / 20, rel=1e-6)
    assert event["of"] == "subnet"


def test_no_more_workers_are_asked_than_there_are_windows(make: Make) -> None:
    settings = ("eval.every=1", "eval.watch_windows=2", "train.rounds=1")
    strategy = make(TwistStrategy, "eval.federated=full", *settings)
    strategy.run(LocalGrid())
    (event,), (own,) = (strategy.folder.events(kind) for kind in ("federated", "eval"))
    assert event["answered"] == [0, 1]
    assert event["perplexity"] == pytest.approx(own["full"], rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "rounds"), [(("eval.every=2",), [2, 3]), (("eval.every=1", "eval.federated=off"), [])]
)
def test_workers_evaluate_when_the_server_does_and_only_if_asked_to(
    settings: tuple[str, ...], rounds: list[int], make: Make
) -> None:
    strategy = make(TwistStrategy, "eval.federated=subnet", "train.rounds=3", "eval.watch_windows=4", *settings)
    strategy.run(LocalGrid())
    assert [event["round"] for event in strategy.folder.events("federated")] == rounds


class Bent(LocalGrid):
    """Worker 1's evaluation goes wrong."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def _serve(self, message: Message) -> Sequence[Message]:
        replies = super()._serve(message)
        if message.metadata.message_type != "evaluate" or message.metadata.group_id != "1":
            return replies
        if self.how == "silence":
            return []
        if self.how == "error":
            return [failing("no room")(message)]
        for reply in replies:
            reply.content["evaluation"] = MetricRecord(
                {"loss-sum": float("nan") if self.how == "NaN" else 0.5, "num-tokens": 105 if self.how == "NaN" else 9}
            )
        return replies


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("silence", "no reply within flower.round_timeout=0.5 s, of node 1"),
        ("error", "ValueError: no room"),
        ("NaN", "summed test loss is nan"),
        ("fewer tokens", "evaluated 9 tokens, asked were 105"),
    ],
)
def test_who_fails_to_evaluate_is_named_and_the_run_goes_on(how: str, reason: str, make: Make, tmp_path: Path) -> None:
    settings = ("eval.federated=full", *EVALUATED, "flower.round_timeout=0.5")
    strategy = make(TwistStrategy, *settings)
    ours = strategy.run(Bent(how))
    assert_same_run(ours, oracle(strategy.job, tmp_path / "oracle"))
    events = strategy.folder.events("federated")
    assert [(event["answered"], event["dropped"]) for event in events] == [([0, 2], {"1": reason})] * 2
    assert all(0 < event["loss"] < 10 for event in events)


def test_hooks_of_evaluation_can_be_ones_own(make: Make) -> None:
    class Asking(TwistStrategy):
        def configure_evaluate(
            self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
        ) -> Replies:
            messages = super().configure_evaluate(server_round, arrays, config, grid)
            return [message for message in messages if message.metadata.group_id != "0"]

        def aggregate_evaluate(self, server_round: int, replies: Replies) -> MetricRecord | None:
            left = [reply for reply in replies if reply.metadata.group_id != "1"]
            found = super().aggregate_evaluate(server_round, left)
            return MetricRecord({"twice": 2 * found["loss"]}) if found else None

    strategy = make(Asking, "eval.federated=full", *EVALUATED, "train.rounds=1")
    result = strategy.start(LocalGrid())
    (event,) = strategy.folder.events("federated")
    assert event["answered"] == [2]
    assert event["dropped"] == {
        "0": "Asking.configure_evaluate sent it no message",
        "1": "Asking.aggregate_evaluate left its reply out",
    }
    assert result.evaluate_metrics_clientapp[1]["twice"] == 2 * event["loss"]

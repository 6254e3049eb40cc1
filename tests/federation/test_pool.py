"""Machines that come and go: more nodes than a round has workers, nodes that leave, come back, join and are slow."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message
from local_grid import Answer, LocalGrid, assert_same_run, bent, run_without

from twist_fl.federation.exchange import exchange
from twist_fl.federation.strategy import TwistStrategy
from twist_fl.rounds import run, start
from twist_fl.runs.story import nodes_text
from twist_fl.training.worker import Task

MakeStrategy = Callable[..., TwistStrategy]


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """As everything that is compared bit for bit."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})


class Leaving(LocalGrid):
    """Nodes that come and go when a round begins: `when` says who is away from which round on."""

    def __init__(self, num_nodes: int, when: dict[int, set[int]]) -> None:
        super().__init__(num_nodes, self._bend)
        self.when = when
        self.away = when.get(1, set())

    def _bend(self, task: Task, message: Message, answer: Answer) -> Sequence[Message]:
        if task.worker == max(self.workers):  # the round's last message: who goes now is missed in the next
            self.away = self.when.get(task.round + 1, self.away)
        return [answer()]

    workers: Sequence[int] = ()
    """The round's; set by the test."""


@pytest.mark.parametrize("share", ["0.04", "0.16"])
def test_of_a_pool_of_a_hundred_nodes_those_drawn_are_asked(
    share: str, make_strategy: MakeStrategy, tmp_path: Path
) -> None:
    words = ("train.workers=100", f"train.fraction={share}", "train.batch_size=2", "train.interval=1", "train.rounds=2")
    strategy, grid = make_strategy(*words), LocalGrid(100)
    ours = strategy.run(grid)
    job, number = strategy.job, round(100 * float(share))
    drawn = [(round_, worker) for round_ in (1, 2) for worker in job.sampled(round_)]
    assert [(served.task.round, grid.partitions[served.node]) for served in grid.served] == drawn
    assert len(drawn) == 2 * number
    assert_same_run(ours, run(job, start(job), tmp_path / "oracle"))


def test_half_of_the_nodes_are_gone_for_ten_rounds(make_strategy: MakeStrategy, tmp_path: Path) -> None:
    """Those that stay serve the others' workers; what the lost had held alone is paid, and nobody is waited for when
    they come back."""
    strategy = make_strategy("train.workers=4", "train.rounds=14", "train.interval=1", "train.optimizer_state=server")
    grid = Leaving(4, {3: {1, 2}, 13: set()})
    grid.workers = range(4)
    ours = strategy.run(grid)
    state, owed = run_without(strategy.job, 14, tmp_path, lambda task: task.round == 3 and task.worker in (1, 2))
    assert_same_run(ours, state)
    assert owed[2] > 0 and not any(owed[:2] + owed[3:])
    rounds = strategy.folder.events("round")
    assert [event["round"] for event in rounds if event["dropped"]] == [3]
    assert rounds[2]["dropped"].keys() == {"1", "2"}
    served = [{grid.partitions[s.node] for s in grid.served if s.task.round == round_} for round_ in range(1, 15)]
    assert served == [{0, 1, 2, 3}] * 2 + [{0, 3}] * 10 + [{0, 1, 2, 3}] * 2
    found = [(event["round"], event["nodes"], event["gone"], event["new"]) for event in strategy.folder.events("nodes")]
    assert found == [(0, 4, [], []), (3, 2, [1, 2], []), (12, 4, [], [1, 2])]


def test_a_node_that_joins_has_a_part_from_the_next_round_on(make_strategy: MakeStrategy, tmp_path: Path) -> None:
    """Though nothing was lost; those that are there are not asked again."""
    strategy = make_strategy("train.rounds=4", "train.interval=1")
    grid = Leaving(3, {1: {2}, 3: set()})
    grid.workers = range(3)
    asked: list[int] = []
    serve = grid._serve

    def heard(message: Message) -> Sequence[Message]:
        if message.metadata.message_type == "query":
            asked.append(grid.partitions[message.metadata.dst_node_id])
        return serve(message)

    grid._serve = heard  # type: ignore[method-assign]
    ours = strategy.run(grid)
    assert sorted(asked[:2]) + asked[2:] == [0, 1, 2]
    assert [grid.partitions[s.node] for s in grid.served if s.task.worker == 2] == [0, 0, 2, 2]
    first, second = strategy.folder.events("nodes")
    assert (first["nodes"], second["nodes"], second["round"]) == (2, 3, 2)
    assert nodes_text(second).startswith("3 nodes ready, new: node 2")
    assert_same_run(ours, run(strategy.job, start(strategy.job), tmp_path / "oracle"))


def test_a_pool_that_has_lost_a_node_does_not_wait_for_it(make_strategy: MakeStrategy) -> None:
    """There are enough for a round."""
    pool = ("train.workers=8", "train.fraction=0.25", "train.rounds=5", "train.interval=1")
    strategy = make_strategy(*pool, "flower.wait_for_nodes=600")
    lost, stays = strategy.job.sampled(2)
    others = [node for node in range(8) if node not in (lost, stays)]
    grid = Leaving(8, {2: {lost, *others[:4]}})
    grid.workers = strategy.job.sampled(1)
    strategy.run(grid)
    assert strategy.folder.events("nodes")[-1]["nodes"] == 3
    assert not strategy.folder.events("waiting")
    dropped = [list(event["dropped"]) for event in strategy.folder.events("round")]
    assert dropped == [[], [str(lost)], [], [], []]


def test_a_slow_node_costs_its_round_and_gives_its_place_to_another(make_strategy: MakeStrategy) -> None:
    """Its late task holds up neither the round after nor, later, Flower: both messages have an end."""
    ends: list[float] = []

    class Busy(LocalGrid):
        def _serve(self, message: Message) -> Sequence[Message]:
            ends.append(message.metadata.ttl)
            slow = (
                any(served.task.round == 1 for served in self.served)
                and self.partitions[message.metadata.dst_node_id] == 1
            )
            return [] if slow and message.metadata.message_type == "query" else super()._serve(message)

    grid = Busy(3, bent(1, [1], lambda task, message, answer: []))
    strategy = make_strategy("flower.round_timeout=0.3", "train.rounds=3", "flower.connect_timeout=600")
    strategy.run(grid)
    first, *others = strategy.folder.events("round")
    assert first["dropped"] == {"1": "no reply within flower.round_timeout=0.3 s, of node 1"}
    assert [event["answered"] for event in others] == [[0, 1, 2]] * 2
    nodes = strategy.folder.events("nodes")[-1]
    assert (nodes["nodes"], nodes["gone"], nodes["failed"]) == (2, [1], ["node 1 did not answer within 0.3 s"])
    assert {round(end, 3) for end in ends} == {60.6, 1260}


def test_a_message_that_flower_does_not_take_is_lost_at_once(make_strategy: MakeStrategy) -> None:
    """Of each of two nodes that have left for good: Flower gives both messages the same name, or none."""

    class Gone(LocalGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            (message,) = messages
            place = self.partitions[message.metadata.dst_node_id]
            return [] if place == 0 else [""] if place == 1 else super().push_messages([message])

    strategy, grid = make_strategy("train.interval=1"), LocalGrid()
    strategy.nodes.connect(grid, 0)
    messages = strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid)
    gone = Gone()
    replies = list(exchange(gone, messages, strategy.job.config.flower, timeout=60))
    assert [reply.metadata.group_id for reply in replies] == ["0", "1", "2"]
    assert [reply.error.reason for reply in replies[:2]] == ["the node has left"] * 2
    assert replies[2].has_content()


def test_a_question_that_a_cut_line_has_lost_is_asked_again(
    make_strategy: MakeStrategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower hands each message out once. Who answers both is one node all the same."""
    monkeypatch.setattr("twist_fl.federation.connecting._ASK_AGAIN", 0.05)

    class Cut(LocalGrid):
        def _serve(self, message: Message) -> Sequence[Message]:
            place, answers = self.partitions[message.metadata.dst_node_id], list(super()._serve(message))
            asked[place] += 1
            if message.metadata.message_type != "query" or place == 0:
                return answers
            made[place] += answers
            return [] if asked[place] < 3 else made[place][-1:] if place == 1 else made[place]

    asked, made = Counter[int](), defaultdict[int, list[Message]](list)
    strategy = make_strategy("train.rounds=1")
    strategy.run(Cut())
    nodes, round_ = (event for event in strategy.folder.events() if event["event"] in ("nodes", "round"))
    assert (nodes["failed"], round_["answered"]) == ([], [0, 1, 2])
    assert asked == {0: 2, 1: 4, 2: 4}, "a task, and one question or three"

"""The Flower app is `rounds.run` with a network in between: the same weights bit for bit, whoever fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from local_grid import Answer, Bend, LocalGrid, assert_same_run, bent, changed, failing, honest, job_of, same, with_nan

from twist_fl.blueprint.cost import moment_bytes, round_bytes, state_bytes
from twist_fl.blueprint.drawing import full_blueprint
from twist_fl.federation import tensors, transport, wire
from twist_fl.federation.connecting import DeadWorkerError, NoWorkersError
from twist_fl.federation.exchange import exchange
from twist_fl.federation.strategy import TwistStrategy
from twist_fl.federation.transport import SegmentError
from twist_fl.rounds import RoundMean, RunState, dispatch, plan, run, start
from twist_fl.system.errors import ConfigError
from twist_fl.tickets.evaluate import perplexity, subnet_perplexity
from twist_fl.training.aggregate import coverage_debt
from twist_fl.training.client_state import MomentShelf
from twist_fl.training.job import Job
from twist_fl.training.worker import Task, Worker


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation takes all cores; here it takes one, as everything that is compared bit for bit."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})


def oracle(job: Job, folder: Path, missing: Sequence[tuple[int, int]] = ()) -> RunState:
    """`rounds.run`, where the pairs (round, worker) in `missing` do not answer."""
    if not missing:
        return run(job, start(job), folder)
    worker, state = Worker(job, MomentShelf(folder)), start(job)
    while state.round < job.num_rounds:
        tasks = plan(job, state)
        mean = RoundMean(job, state, tasks)
        for task in tasks:
            if (task.round, task.worker) not in missing:
                mean.add(task, worker.train(task, *dispatch(job, state, task)))
        state = mean.finish()
    return state


def events(strategy: TwistStrategy, kind: str) -> list[dict[str, Any]]:
    return strategy.folder.events(kind)


# The same weights


@pytest.mark.parametrize(
    ("algorithm", "optimizer_state", "by"),
    [
        *(("twist", state, by) for state in ("client", "server") for by in ("shm", "inline")),
        *(("twist", "reset", "inline"), ("twist", "factored", "shm"), ("fedavg", "server", "inline")),
        *(("fedavg", "client", "shm"),),
    ],
)
def test_the_app_is_rounds_run(
    algorithm: str, optimizer_state: str, by: str, make_strategy: Callable[..., TwistStrategy], tmp_path: Path
) -> None:
    strategy = make_strategy(
        f"algorithm={algorithm}", f"train.optimizer_state={optimizer_state}", f"flower.transport={by}"
    )
    ours = strategy.run(grid := LocalGrid())
    assert ours.round == 2
    assert {served.transport for served in grid.served} == {by}
    assert_same_run(ours, oracle(strategy.job, tmp_path / "oracle"))
    assert not same(ours.params, strategy.job.initial_state())
    assert [(event["answered"], event["dropped"]) for event in events(strategy, "round")] == [([0, 1, 2], {})] * 2


@pytest.mark.parametrize(
    "overrides",
    [
        ("blueprint.num_sub=[1,2,4]", "train.weighting=tokens"),
        ("blueprint.setting=attn", "blueprint.scale=linear"),
        ("train.rounds=null", "train.epochs=1", "train.batch_size=64", "train.interval=3"),  # a shorter last interval
    ],
)
def test_other_jobs_are_the_same_too(
    overrides: tuple[str, ...], make_strategy: Callable[..., TwistStrategy], tmp_path: Path
) -> None:
    strategy = make_strategy(*overrides)
    assert_same_run(strategy.run(LocalGrid()), oracle(strategy.job, tmp_path / "oracle"))


@pytest.mark.parametrize(
    "grid",
    [LocalGrid(1), LocalGrid(2), LocalGrid(5), LocalGrid(last_first=True), LocalGrid(one_at_a_time=True)],
    ids=["one node", "two nodes", "five nodes", "last first", "one at a time"],
)
@pytest.mark.parametrize("weighting", ["workers", "tokens"])
def test_neither_nodes_nor_order_matter(
    grid: LocalGrid, weighting: str, make_strategy: Callable[..., TwistStrategy], tmp_path: Path
) -> None:
    strategy = make_strategy(f"train.weighting={weighting}", "train.optimizer_state=server")
    assert_same_run(strategy.run(grid), oracle(strategy.job, tmp_path / "oracle"))


def test_workers_are_sent_what_dispatch_gives(make_strategy: Callable[..., TwistStrategy]) -> None:
    strategy, grid = make_strategy("train.rounds=1"), LocalGrid()
    state = deepcopy(strategy.state)  # the round is averaged in place
    strategy.run(grid)
    assert [served.task for served in grid.served] == plan(strategy.job, state)
    for served in grid.served:
        assert same(served.params, dispatch(strategy.job, state, served.task)[0])


# Nodes


@pytest.mark.parametrize("num_nodes", [1, 2, 3])
def test_nodes_serve_workers_in_the_order_of_their_partitions(
    num_nodes: int, make_strategy: Callable[..., TwistStrategy]
) -> None:
    strategy, grid = make_strategy(), LocalGrid(num_nodes)
    strategy.run(grid)
    assert strategy.nodes.ready != sorted(strategy.nodes.ready) or num_nodes == 1  # ids and partitions disagree
    assert [grid.partitions[node] for node in strategy.nodes.ready] == list(range(num_nodes))
    assert {(grid.partitions[s.node], s.task.worker) for s in grid.served} == {(w % num_nodes, w) for w in range(3)}
    assert [(event["nodes"], event["failed"]) for event in events(strategy, "nodes")] == [(num_nodes, [])]


def test_a_node_that_cannot_build_its_worker_is_left_out(
    make_strategy: Callable[..., TwistStrategy], tmp_path: Path
) -> None:
    strategy, grid = make_strategy(), LocalGrid(broken=[1])
    ours = strategy.run(grid)
    assert [grid.partitions[node] for node in strategy.nodes.ready] == [0, 2]
    assert events(strategy, "nodes")[0]["failed"] == ["ValueError: no room on this node"]
    assert_same_run(ours, oracle(strategy.job, tmp_path / "oracle"))


def test_no_node_is_ready(make_strategy: Callable[..., TwistStrategy]) -> None:
    with pytest.raises(
        NoWorkersError,
        match=r"^no node is ready for the run: ValueError: no room on this node; nothing ",
    ):
        make_strategy().run(LocalGrid(2, broken=[0, 1]))


def test_no_node_connects(make_strategy: Callable[..., TwistStrategy]) -> None:
    with pytest.raises(NoWorkersError, match=r"none connected within 0\.05 s"):
        make_strategy().run(LocalGrid(0))


def test_late_nodes_are_waited_for(make_strategy: Callable[..., TwistStrategy]) -> None:
    class Slow(LocalGrid):
        looks = 0

        def get_node_ids(self) -> list[int]:
            self.looks += 1
            return list(self.partitions)[: self.looks]

    strategy = make_strategy("flower.wait_for_nodes=30", "flower.poll_interval=0.01", "train.rounds=1")
    strategy.run(Slow())
    assert len(strategy.nodes.ready) == 3


# How tensors travel


def test_nodes_on_this_machine_share_its_memory_and_others_do_not(
    make_strategy: Callable[..., TwistStrategy], tmp_path: Path
) -> None:
    strategy, grid = make_strategy("train.optimizer_state=server"), LocalGrid(far=[1])
    ours = strategy.run(grid)
    assert [served.transport for served in grid.served] == ["shm", "inline", "shm"] * 2
    assert events(strategy, "nodes")[0]["shared_memory"] == 2
    for event in events(strategy, "round"):
        sizes = [
            2 * 3 * state_bytes(strategy.job.layout, blueprint) for blueprint in strategy.job.blueprints(event["round"])
        ]
        assert event["bytes_via"] == {"shm": sizes[0] + sizes[2], "flight": 0, "inline": sizes[1]}
        assert sum(event["bytes_via"].values()) == sum(
            event[way][kind] for way in ("bytes_down", "bytes_up") for kind in ("weights", "moments")
        )
    assert_same_run(ours, oracle(strategy.job, tmp_path / "oracle"))


def test_shared_memory_on_request_leaves_out_nodes_that_cannot(make_strategy: Callable[..., TwistStrategy]) -> None:
    strategy, grid = make_strategy("flower.transport=shm"), LocalGrid(far=[1])
    strategy.run(grid)
    assert [grid.partitions[node] for node in strategy.nodes.ready] == [0, 2]
    (failed,) = events(strategy, "nodes")[0]["failed"]
    assert failed == "flower.transport=shm, but the node cannot read the server's memory: use auto or inline"


def test_where_there_is_no_shared_memory(
    make_strategy: Callable[..., TwistStrategy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "AVAILABLE", False)
    make_strategy().run(grid := LocalGrid())
    assert {served.transport for served in grid.served} == {"inline"}
    with pytest.raises(ConfigError, match=r"^flower\.transport=shm needs Linux: use auto or inline$"):
        make_strategy("flower.transport=shm").run(LocalGrid())


def assert_no_memory_is_left(strategy: TwistStrategy) -> None:
    name = f"twist_fl-{strategy.job.run_id}"
    assert name not in Path("/proc/self/maps").read_text()
    assert not [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink() and name in str(link.readlink())]


@pytest.mark.parametrize("how", ["done", "failed", "interrupted"])
def test_a_run_leaves_no_memory_behind(how: str, make_strategy: Callable[..., TwistStrategy]) -> None:
    def stop(task: Task, message: Message, answer: Answer) -> list[Message]:
        if how == "interrupted":
            raise KeyboardInterrupt
        return [answer()] if how == "done" else crashed(task, message, answer)

    strategy = make_strategy("train.optimizer_state=server", "flower.transport=shm")
    with ExitStack() as stack:
        if how != "done":
            stack.enter_context(pytest.raises(NoWorkersError if how == "failed" else KeyboardInterrupt))
        strategy.run(LocalGrid(bend=bent(2, [0, 1, 2], stop)))
    assert_no_memory_is_left(strategy)


def test_a_worker_that_is_late_does_not_write_into_the_next_round(
    make_strategy: Callable[..., TwistStrategy], tmp_path: Path
) -> None:
    waiting: list[Answer] = []

    def late(task: Task, message: Message, answer: Answer) -> list[Message]:
        if (task.round, task.worker) == (1, 1):
            waiting.append(answer)
            return []
        if task.round == 2:
            while waiting:
                with pytest.raises(SegmentError, match="is gone"):
                    waiting.pop()()
        return [answer()]

    strategy = make_strategy("flower.round_timeout=0.3", "flower.transport=shm")
    ours = strategy.run(LocalGrid(bend=late))
    assert_same_run(ours, oracle(strategy.job, tmp_path / "oracle", missing=[(1, 1)]))


@pytest.mark.parametrize("by", ["shm", "inline"])
def test_sixteen_bits_on_the_way_halve_the_bytes_of_weights(
    by: str, make_strategy: Callable[..., TwistStrategy], tmp_path: Path
) -> None:
    settings = ("flower.wire_dtype=bfloat16", "train.optimizer_state=server", "train.lr=1e-6")
    strategy = make_strategy(*settings, f"flower.transport={by}")
    begun = {name: tensor.clone() for name, tensor in strategy.state.params.items()}
    ours, plain = strategy.run(LocalGrid()), oracle(strategy.job, tmp_path / "oracle")
    for name, tensor in ours.params.items():
        assert tensor.dtype == torch.float32
        # What training changes is far below the steps of bfloat16: kept all the same.
        off, moved = ((tensor - other[name]).abs().sum() for other in (plain.params, begun))
        assert off < 0.1 * moved
    (start_,) = events(strategy, "start")
    for event in events(strategy, "round"):
        assert event["answered"] == [0, 1, 2]
        down, up = event["bytes_down"], event["bytes_up"]
        assert 2 * (down["weights"] + up["weights"]) == start_["predicted_round_bytes"]
        assert down["moments"] + up["moments"] == start_["predicted_moment_bytes"]
        assert event["bytes_via"][by] == sum(way[kind] for way in (down, up) for kind in ("weights", "moments"))


# Nodes that fail


def silent(task: Task, message: Message, answer: Answer) -> list[Message]:
    return []


def crashed(task: Task, message: Message, answer: Answer) -> list[Message]:
    return [failing("the disk is full")(message)]


def unexplained(task: Task, message: Message, answer: Answer) -> list[Message]:
    return [Message(Error(code=3), reply_to=message)]


def empty(task: Task, message: Message, answer: Answer) -> list[Message]:
    return [Message(RecordDict(), reply_to=message)]


def of_another(task: Task, message: Message, answer: Answer) -> list[Message]:
    """Same names, same shapes, other blocks: only the digest tells."""
    other = replace(task.blueprint, attn=task.blueprint.ffn, ffn=task.blueprint.attn)
    assert other.shape == task.blueprint.shape
    digest = replace(task, blueprint=other).digest
    return [changed(task, message, answer(), lambda reply: replace(reply, digest=digest))]


def not_finite(task: Task, message: Message, answer: Answer) -> list[Message]:
    return [changed(task, message, answer(), with_nan)]


def lazy(task: Task, message: Message, answer: Answer) -> list[Message]:
    return [changed(task, message, answer(), lambda reply: replace(reply, num_batches=1))]


def headless(task: Task, message: Message, answer: Answer) -> list[Message]:
    """Without the embedding: sent inline, for in a segment every parameter has its place."""
    job, reply = job_of(message), answer()
    handle = tensors.handle_of(reply.content)
    segment = None if handle is None else tensors.open_segment(handle, job.run_id, handle.num_bytes)
    content = wire.reply_to_records(
        job, task.blueprint, wire.reply_from_records(job, task.blueprint, reply.content, segment)
    )
    content.array_records["params"].pop("transformer.wte.weight")
    return [Message(content=content, metadata=reply.metadata)]  # type: ignore[call-overload]


FAILURES: dict[str, tuple[Bend, str]] = {
    "error": (crashed, "ValueError: the disk is full"),
    "error without a word": (unexplained, "Flower error 3"),
    "silence": (silent, "no reply within flower.round_timeout=0.3 s"),
    "nothing in it": (empty, "malformed reply: KeyError"),
    "another blueprint": (of_another, "the reply is to another task"),
    "NaN": (not_finite, "transformer.wte.weight has values that are not finite"),
    "fewer batches": (lazy, "trained 1 batches, asked were 2"),
    "a parameter missing": (headless, "transformer.wte.weight"),
}


@pytest.mark.parametrize(("optimizer_state", "by"), [("reset", "inline"), ("server", "shm")])
@pytest.mark.parametrize("case", FAILURES)
def test_a_failing_worker_is_named_and_dropped_and_the_round_goes_on(
    case: str, optimizer_state: str, by: str, make_strategy: Callable[..., TwistStrategy], tmp_path: Path
) -> None:
    bend, reason = FAILURES[case]
    strategy = make_strategy(
        "flower.round_timeout=0.3", f"train.optimizer_state={optimizer_state}", f"flower.transport={by}"
    )
    ours = strategy.run(LocalGrid(bend=bent(1, [1], bend)))
    first, second = events(strategy, "round")
    assert (first["answered"], list(first["dropped"])) == ([0, 2], ["1"])
    assert reason in first["dropped"]["1"]
    assert (second["answered"], second["dropped"]) == ([0, 1, 2], {})
    assert ours.cursors == [4, 2, 4]  # the batches it missed are still to come
    assert_same_run(ours, oracle(strategy.job, tmp_path / "oracle", missing=[(1, 1)]))


def test_sizes_that_are_no_numbers_do_not_end_the_run(make_strategy: Callable[..., TwistStrategy]) -> None:
    """They are only counted: the tensors themselves are whole."""

    def talkative(task: Task, message: Message, answer: Answer) -> list[Message]:
        reply = answer()
        reply.content.config_records["shm"].update({"weights": "many", "moments": [0.5]})
        return [reply]

    strategy = make_strategy("flower.transport=shm", "train.rounds=1")
    strategy.run(LocalGrid(bend=bent(1, [1], talkative)))
    (event,) = events(strategy, "round")
    assert (event["answered"], event["dropped"]) == ([0, 1, 2], {})
    assert 0 < event["bytes_up"]["weights"] < event["bytes_down"]["weights"]


def test_an_answer_counts_once(make_strategy: Callable[..., TwistStrategy], tmp_path: Path) -> None:
    def twice(task: Task, message: Message, answer: Answer) -> list[Message]:
        return [answer()] * 2

    strategy = make_strategy("train.optimizer_state=server")
    ours = strategy.run(LocalGrid(bend=bent(1, [1], twice)))
    first = events(strategy, "round")[0]
    assert (first["answered"], first["dropped"]) == ([0, 1, 2], {})
    assert_same_run(ours, oracle(strategy.job, tmp_path / "oracle"))


def test_an_answer_that_comes_after_the_deadline_is_not_counted_later(
    make_strategy: Callable[..., TwistStrategy], tmp_path: Path
) -> None:
    held_back: list[Message] = []

    def late(task: Task, message: Message, answer: Answer) -> list[Message]:
        if (task.round, task.worker) == (1, 1):
            held_back.append(answer())
            return []
        return [answer(), *held_back] if task.round == 2 else [answer()]

    strategy = make_strategy("flower.round_timeout=0.3")
    ours = strategy.run(LocalGrid(bend=late))
    assert held_back
    assert_same_run(ours, oracle(strategy.job, tmp_path / "oracle", missing=[(1, 1)]))


def test_what_a_failed_worker_held_alone_is_dealt_first(make_strategy: Callable[..., TwistStrategy]) -> None:
    strategy = make_strategy("blueprint.num_sub=2")
    grid = LocalGrid(bend=bent(1, [1, 2], crashed))
    before = strategy.state
    strategy.run(grid)
    job, tasks = strategy.job, [served.task for served in grid.served]
    debt = coverage_debt(job.layout, job.division, [tasks[0].blueprint])
    assert len(debt) == 2 * 2 * 2  # of two kinds in two layers, the two blocks that worker 0 lacks
    for kind, layer in {(kind, layer) for kind, layer, _ in debt}:
        owed = {block for *place, block in debt if place == [kind, layer]}
        dealt = [block for task in tasks[3:] for block in task.blueprint.held(kind, layer)]
        # Of 6 places, the 2 blocks that are not owed get one each; both places left for a second copy go to the owed.
        assert all(dealt.count(block) == 1 for block in {0, 1, 2, 3} - owed)
    assert [task.blueprint for task in tasks[3:]] == job.blueprints(2, debt)
    assert job.blueprints(2, debt) != job.blueprints(2)
    assert strategy.state.debt == frozenset()
    assert before.debt == frozenset()


def test_owed_blocks_stay_owed_until_somebody_trains_them(make_strategy: Callable[..., TwistStrategy]) -> None:
    strategy = make_strategy("train.workers=2", "checkpoint_every=1")
    ours = strategy.run(LocalGrid(2, bend=lambda *given: (honest if given[0].worker == 0 else crashed)(*given)))
    job = strategy.job
    owed = coverage_debt(job.layout, job.division, [job.blueprints(1)[0]])
    assert ours.debt == coverage_debt(job.layout, job.division, [job.blueprints(2, owed)[0]])
    assert ours.debt
    again = strategy.folder.load()
    assert again is not None
    assert again.debt == ours.debt


def test_when_all_workers_fail_the_run_stops(make_strategy: Callable[..., TwistStrategy]) -> None:
    strategy = make_strategy("checkpoint_every=1", "train.rounds=3")
    with pytest.raises(NoWorkersError, match=r"^round 2: no worker answered: .*1: 'ValueError: the disk is full'"):
        strategy.run(LocalGrid(bend=bent(2, [0, 1, 2], crashed)))
    assert [event["answered"] for event in events(strategy, "round")] == [[0, 1, 2], []]
    saved = strategy.folder.load()
    assert saved is not None
    assert saved.round == 1


def test_a_worker_whose_process_is_replaced_no_more_ends_the_run_after_the_round_is_saved(
    make_strategy: Callable[..., TwistStrategy],
) -> None:
    """In Flower's pool it would fail every message it is given."""

    def dead(task: Task, message: Message, answer: Answer) -> list[Message]:
        reason = "<class 'ray.exceptions.ActorDiedError'>:<'The actor died.\n\tclass_name: Actor'>"
        return [Message(Error(code=0, reason=reason), reply_to=message)]

    strategy = make_strategy("checkpoint_every=9", "train.rounds=3")
    with pytest.raises(DeadWorkerError, match=r"died 4 times: .*flower\.cpus_per_worker.*; round 2 is saved; go on"):
        strategy.run(LocalGrid(bend=bent(2, [1], dead)))
    assert [event["answered"] for event in events(strategy, "round")] == [[0, 1, 2], [0, 2]]
    saved = strategy.folder.load()
    assert saved is not None
    assert saved.round == 2


# What the log says


def test_evaluation_every_k_rounds(make_strategy: Callable[..., TwistStrategy], tmp_path: Path) -> None:
    strategy = make_strategy("train.rounds=5", "eval.every=2", "eval.watch_windows=20")
    job = strategy.job
    strategy.run(LocalGrid())
    found = events(strategy, "eval")
    assert [event["round"] for event in found] == [2, 4, 5]  # and after the last round
    models, windows, worker = job.models(), job.corpus.test[:20], tmp_path / "oracle"
    state = start(job)
    for event in found:
        state = run(job, state, worker, num_rounds=event["round"] - state.round)
        full = models.load_sliced(full_blueprint(job.layout), state.params)
        assert event["full"] == perplexity(full, windows, 4)
        drawn = job.blueprints(state.round)
        assert event["subnets"] == subnet_perplexity(models, state.params, drawn, windows, 4)


@pytest.mark.parametrize(
    "overrides",
    [("eval.every=0",), ("eval.every=1", "eval.watch_windows=9", "algorithm=fedavg")],
    ids=["never", "fedavg"],
)
def test_evaluation_only_as_asked(overrides: tuple[str, ...], make_strategy: Callable[..., TwistStrategy]) -> None:
    strategy = make_strategy(*overrides)
    strategy.run(LocalGrid())
    found = events(strategy, "eval")
    assert [(event["round"], event["windows"]) for event in found] == (
        [(1, 9), (2, 9)] if "eval.every=1" in overrides else []
    )
    assert not any("subnets" in event for event in found)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.optimizer_state=server", "blueprint.num_sub=[1,2,4]"),
        ("train.optimizer_state=factored",),
        ("algorithm=fedavg",),
    ],
)
def test_the_bytes_logged_are_those_of_the_cost_model(
    overrides: tuple[str, ...], make_strategy: Callable[..., TwistStrategy]
) -> None:
    strategy = make_strategy(*overrides)
    job = strategy.job
    strategy.run(LocalGrid())
    (plan_,) = events(strategy, "start")
    for event in events(strategy, "round"):
        blueprints, down, up = job.blueprints(event["round"]), event["bytes_down"], event["bytes_up"]
        assert down["weights"] == up["weights"]
        assert down["weights"] + up["weights"] == round_bytes(job.layout, blueprints) == plan_["predicted_round_bytes"]
        moments = moment_bytes(job.moment_layouts, blueprints)
        assert down["moments"] + up["moments"] == moments == plan_["predicted_moment_bytes"]
        assert 0 < up["other"] < down["other"] < 3 * 5_000
    assert plan_["subnet_params"] == [job.layout.num_params(blueprint) for blueprint in job.blueprints(1)]


def test_bytes_of_a_reply_that_did_not_count_were_sent_all_the_same(
    make_strategy: Callable[..., TwistStrategy],
) -> None:
    strategy = make_strategy("train.rounds=1")
    strategy.run(LocalGrid(bend=bent(1, [1], not_finite)))
    (event,) = events(strategy, "round")
    assert event["bytes_up"]["weights"] == event["bytes_down"]["weights"]


def test_the_largest_peak_of_those_that_counted_is_logged_beside_the_cost_models(
    make_strategy: Callable[..., TwistStrategy],
) -> None:
    def bend(task: Task, message: Message, answer: Answer) -> list[Message]:
        spoil = with_nan if task.worker == 1 else lambda reply: reply
        return [changed(task, message, answer(), lambda reply: spoil(replace(reply, peak_bytes=peaks[task.worker])))]

    peaks = [5_000, 9_000, 7_000]
    strategy = make_strategy("train.rounds=1", "blueprint.num_sub=[1,2,3]")
    strategy.run(LocalGrid(bend=bend))
    (event,) = events(strategy, "round")
    largest = strategy.job.blueprints(1)[2]
    assert event["peak_bytes"] == 7_000
    assert event["predicted_peak_bytes"] == 16 * strategy.job.layout.num_params(largest) + round(0.06 * 2**30)


@pytest.mark.parametrize("overrides", [
    ("train.optimizer_state=server", "blueprint.num_sub=[1,2,3]"),
    ("train.optimizer_state=factored",),
    *((f"aggregate.optimizer={name}",) for name in ("momentum", "nesterov", "adam")),
    ("algorithm=ddp",),
    ("train.variant=hybrid",),
])  # fmt: skip
def test_the_memory_that_the_cost_model_gives_a_server_is_what_lies_there(
    overrides: tuple[str, ...], make_strategy: Callable[..., TwistStrategy]
) -> None:
    strategy = make_strategy("train.rounds=1", *overrides)
    state, job = strategy.state, strategy.job
    held = [state.params, *(state.outer.values.values() if state.outer else ())]
    held += [state.params] * bool(state.outer or job.config.algorithm == "ddp")  # as it was before; gradients
    held += [state.params] * 4 * (job.config.train.variant == "hybrid")  # weights, gradients and moments of its worker
    held += state.moments.values.values() if state.moments else []
    kept = sum(value.nbytes for each in held for value in each.values())
    strategy.run(LocalGrid())
    event = events(strategy, "round")[0]
    assert event["predicted_server_bytes"] == kept + sum(event["bytes_down"][kind] for kind in ("weights", "moments"))
    assert event["server_bytes"] > 0


# exchange


def test_replies_are_handed_on_as_they_arrive(make_strategy: Callable[..., TwistStrategy]) -> None:
    """The second reply is not even made before the first has been worked on."""
    strategy = make_strategy()
    seen: list[str] = []

    class Lazy(LocalGrid):
        def pull_messages(self, message_ids: Any) -> Any:
            seen.append("pull")
            return super().pull_messages(message_ids)

    grid = Lazy(one_at_a_time=True)
    strategy.nodes.connect(grid, 0)
    seen.clear()
    messages = strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid)
    for reply in exchange(grid, messages, strategy.job.config.flower, timeout=60):
        seen.append(f"worker {reply.metadata.group_id}")
    assert seen == ["pull", "worker 0", "pull", "worker 1", "pull", "worker 2"]


@pytest.mark.parametrize("length", [0.02, 3.0, 1000.0])
def test_looks_for_replies_are_few_in_a_long_round_and_none_finds_one_late(
    length: float, make_strategy: Callable[..., TwistStrategy], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

        def sleep(self, seconds: float) -> None:
            self.now += seconds

    clock, looks = Clock(), list[float]()
    monkeypatch.setattr("twist_fl.federation.exchange.time", clock)

    class Slow(LocalGrid):
        def pull_messages(self, message_ids: Any) -> Any:
            looks.append(clock.now)
            return super().pull_messages(message_ids) if clock.now >= length else []

    strategy, grid = make_strategy(), Slow()
    strategy.nodes.connect(LocalGrid(), 0)
    messages = strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid)
    assert len(list(exchange(grid, messages, strategy.job.config.flower, timeout=2000))) == 3
    assert length <= clock.now <= 1.005 * length + strategy.job.config.flower.poll_interval
    assert len(looks) < 1200, "every 0.05 s they would be 20,000"


@pytest.mark.parametrize(
    ("by", "far", "idle"),
    [("auto", [], [2, 4, 6]), ("inline", [], [2, 4, 6]), ("shm", [], [2, 4, 6]), ("auto", [0, 2], [4, 6, 6])],
)
def test_cores_that_no_worker_here_trains_on_are_the_servers(
    by: str,
    far: list[int],
    idle: list[int],
    make_strategy: Callable[..., TwistStrategy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Six cores, three workers with two threads each, of which the first answers first."""
    strategy = make_strategy("train.rounds=1", f"flower.transport={by}", "train.threads=2")
    monkeypatch.setattr("twist_fl.federation.strategy.usable_cores", lambda: 6)
    seen: list[int] = []
    monkeypatch.setattr(RoundMean, "add", lambda *_, lasts: seen.append(strategy._idle_cores()))
    with pytest.raises(NoWorkersError):  # nobody is counted
        strategy.run(LocalGrid(far=far, one_at_a_time=True))
    assert seen == idle
    assert strategy._pending == {}

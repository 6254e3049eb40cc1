"""Blueprint policies, mixed sizes and the blocks they must reach (spec, section 2)."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from local_grid import LocalGrid, assert_same_run, same

from twist_fl.blueprint.architectures import KINDS
from twist_fl.blueprint.blocks import Layout, make_layout
from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.blueprint.division import Division, Purpose, Scores, generator
from twist_fl.blueprint.drawing import draw_round, draw_ticket
from twist_fl.blueprint.policies import Deal, algorithm_1, policy_of
from twist_fl.federation.strategy import TwistStrategy
from twist_fl.model.subnet import State
from twist_fl.rounds import plan, run, start
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.results import final_results
from twist_fl.runs.resume import go_on
from twist_fl.system.errors import ConfigError
from twist_fl.system.plugins import POLICY
from twist_fl.tickets.evaluate import ticket_distribution
from twist_fl.training.importance import block_scores, score_blocks
from twist_fl.training.interval import next_token_loss
from twist_fl.training.job import Job, job_from_json

MakeJob = Callable[..., Job]
LAYERS = range(1, 4)


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation takes all cores; here it takes one, as everything that is compared bit for bit."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})


def layout_of(blocks: int = 12) -> Layout:
    sizes = {"n_embd": blocks, "n_head": blocks, "n_inner": blocks, "n_layer": 6}
    return make_layout({"model_type": "gpt2", "vocab_size": 2, "n_positions": 2, **sizes}, blocks)


def division(*num_sub: int, policy: str = "random", common: int = 0) -> Division:
    return Division("both", tuple((n, n) for n in num_sub), 1, 2, (common, common), policy)


def deal(num_full: int, num_sub: list[int], common: list[int], round_: int, seed: int = 0) -> Deal:
    return Deal(num_full, num_sub, common, round_, np.random.default_rng(seed))


@st.composite
def places(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    """(num_full, num_sub of each worker, common) with places for all blocks."""
    num_full = draw(st.integers(1, 12))
    common = draw(st.lists(st.integers(0, num_full - 1), unique=True, max_size=num_full // 2))
    num_sub = draw(st.lists(st.integers(max(len(common), 1), num_full), min_size=1, max_size=6))
    while sum(n - len(common) for n in num_sub) < num_full - len(common):
        num_sub.append(num_full)
    return num_full, num_sub, common


@pytest.mark.parametrize("policy", POLICY.own)
@given(places(), st.integers(1, 99), st.integers(0, 9))
def test_rows_are_sorted_distinct_of_their_size_and_hold_the_common_blocks(
    policy: str, given_: tuple[int, list[int], list[int]], round_: int, seed: int
) -> None:
    num_full, num_sub, common = given_
    rows = policy_of(policy)(deal(num_full, num_sub, common, round_, seed))
    assert [len(row) for row in rows] == num_sub
    for row in rows:
        assert row == tuple(sorted(set(row)))
        assert set(common) <= set(row) <= set(range(num_full))
    if policy != "ordered":
        assert set().union(*rows) == set(range(num_full))


# Rolling


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 40))
def test_one_rolling_worker_is_fedrolex(num_full: int, num_sub: int, round_: int) -> None:
    """Algorithm 1 of FedRolex: with the offset j mod n, the blocks {j mod n, ..., (j + size - 1) mod n}."""
    num_sub = min(num_sub, num_full)
    offset = (round_ - 1) % num_full
    theirs = (
        range(offset, offset + num_sub)
        if offset + num_sub <= num_full
        else [*range(offset, num_full), *range(offset + num_sub - num_full)]
    )
    (ours,) = policy_of("rolling")(deal(num_full, [num_sub], [], round_))
    assert ours == tuple(sorted(theirs))


@given(places(), st.integers(1, 99))
def test_in_as_many_rounds_as_blocks_a_rolling_worker_holds_all_equally_often(
    given_: tuple[int, list[int], list[int]], first: int
) -> None:
    num_full, num_sub, common = given_
    rest = num_full - len(common)
    for worker, size in enumerate(num_sub):
        rounds = range(first, first + rest)
        held = [policy_of("rolling")(deal(num_full, num_sub, common, round_))[worker] for round_ in rounds]
        counts = {block: sum(block in row for row in held) for block in range(num_full)}
        assert all(counts[block] == (rest if block in common else size - len(common)) for block in counts)


def test_rolling_moves_by_one_a_round_in_every_layer_and_needs_no_places_for_all() -> None:
    layout, few = layout_of(), division(2, 3, policy="rolling")
    few.check(layout)
    drawn = [draw_round(layout, few, 0, round_) for round_ in range(1, 13)]
    for one, next_ in pairwise(drawn):
        for worker in range(2):
            held = [{tuple(b[worker].held(kind, layer)) for kind in KINDS for layer in LAYERS} for b in (one, next_)]
            assert [len(rows) for rows in held] == [1, 1]
            assert {(block + 1) % 12 for block in held[0].pop()} == set(held[1].pop())


# Ordered, static


@given(places(), st.integers(1, 99))
def test_ordered_subnets_are_nested_the_common_blocks_first(
    given_: tuple[int, list[int], list[int]], round_: int
) -> None:
    num_full, num_sub, common = given_
    rows = sorted(policy_of("ordered")(deal(num_full, num_sub, common, round_)), key=len)
    assert all(set(small) <= set(large) for small, large in pairwise(rows))
    rest = [block for block in range(num_full) if block not in common]
    assert all(set(row) == {*common, *rest[: len(row) - len(common)]} for row in rows)


def test_static_is_the_first_rounds_draw_for_good() -> None:
    layout, owed = layout_of(), frozenset({("ffn", 2, 5)})
    static, random = division(4, 4, 4, policy="static"), division(4, 4, 4)
    first = draw_round(layout, random, 3, 1)
    assert all(draw_round(layout, static, 3, round_, owed) == first for round_ in (1, 2, 50))  # type: ignore[arg-type]
    assert draw_round(layout, random, 3, 2) != first
    drawn = replace(static, assign="drawn", drawn_workers=3)
    assert len({tuple(draw_round(layout, drawn, 3, round_)) for round_ in range(1, 9)}) == 1


# Importance


def scores_of(layout: Layout) -> Scores:
    """Block b of layer l scores (7 b + l) mod 12: every layer has another order."""
    return {
        (kind, layer): tuple(float((7 * b + layer) % layout.num_blocks[0]) for b in range(layout.num_blocks[0]))
        for kind in KINDS
        for layer in LAYERS
    }


def test_importance_is_algorithm_1_with_the_highest_scores_common() -> None:
    layout, random = layout_of(), division(5, 5, 5, 5)
    scored = replace(random, policy="importance", common=(2, 2), scores=scores_of(layout))
    scored.check(layout)
    drawn = draw_round(layout, scored, 0, 1)
    for kind in KINDS:
        for layer in LAYERS:
            scores = scored.scores[kind, layer]  # type: ignore[index]
            best = tuple(sorted(range(12), key=lambda block: -scores[block])[:2])
            assert set.intersection(*(set(b.held(kind, layer)) for b in drawn)) >= set(best)
            rng = generator(0, Purpose.BLOCKS, 1, layer, KINDS.index(kind))
            assert [b.held(kind, layer) for b in drawn] == algorithm_1(12, [5] * 4, best, rng)


def test_equal_scores_go_by_id_and_missing_ones_are_an_error() -> None:
    equal = {(kind, layer): (1.0, 2.0, 1.0, 2.0) for kind in KINDS for layer in LAYERS}
    scored = replace(division(3, 3, policy="importance", common=1), scores=equal)
    assert scored.by_score("ffn", 1) == (1, 3, 0, 2)
    with pytest.raises(ValueError, match="blocks are to be chosen by importance, but none was scored yet"):
        draw_round(layout_of(4), replace(scored, scores=None), 0, 1)


@pytest.mark.parametrize("score", ["fisher", "taylor"])
def test_scores_against_a_gradient_per_window_in_float64(score: str, tiny_job: MakeJob, random_state: object) -> None:
    job = tiny_job("blueprint.setting=both", "model.dropout=0.1")
    state: State = random_state(job.layout)  # type: ignore[operator]
    windows = job.corpus.train[:3]
    model = job.models().load_sliced(job.blueprints(1)[0], state)  # a warm one of another shape is not touched
    ours = block_scores(job, state, windows, score)
    assert model.training
    full = job.models().load(draw_ticket(job.layout, job.division, (4, 4), 0, 0), state).double().eval()  # type: ignore[no-untyped-call]
    expected = {place: np.zeros(4) for place in ours}
    assert expected.keys() == {(kind, layer) for kind in KINDS for layer in (1, 2)}
    for window in windows:
        full.zero_grad()
        next_token_loss(full, torch.tensor(window[None], dtype=torch.int64)).backward()  # type: ignore[no-untyped-call]
        for (kind, layer), total in expected.items():
            for block in range(4):
                one = 0.0
                for param in job.layout.params:
                    if (param.kind, param.layer) == (kind, layer):
                        index = torch.tensor(param.index([block]))
                        value, grad = (
                            tensor.detach().index_select(param.dim, index)
                            for tensor in (full.get_parameter(param.name), full.get_parameter(param.name).grad)
                        )
                        one += float((grad**2 if score == "fisher" else value * grad).sum())
                total[block] += abs(one)
    for place, values in expected.items():
        np.testing.assert_allclose(ours[place], values, rtol=2e-3, atol=1e-7)


IMPORTANCE = ("blueprint.policy=importance", "blueprint.common=1", "blueprint.score_windows=4", "eval.every=0")


def strategy_of(job: Job, folder: Path) -> TwistStrategy:
    kept = RunFolder(folder)
    kept.create(job)
    return TwistStrategy(job, kept)


@pytest.mark.parametrize(
    "overrides",
    [
        ("blueprint.policy=rolling",),
        ("blueprint.policy=ordered", "blueprint.num_sub=[4,2,1]", "blueprint.scale=linear"),
        ("blueprint.policy=static",),
        ("blueprint.assign=shuffled", "blueprint.num_sub=[1,2,3]"),
        ("blueprint.assign=drawn", "blueprint.num_sub=[1+3,2+2]"),
    ],
)
def test_the_app_is_rounds_run(overrides: tuple[str, ...], tiny_job: MakeJob, tmp_path: Path) -> None:
    job = tiny_job("flower.wait_for_nodes=0.05", "eval.every=0", "train.rounds=3", *overrides)
    strategy = strategy_of(job, tmp_path / "run")
    ours = strategy.run(LocalGrid())
    assert_same_run(ours, run(job, start(job), tmp_path / "oracle"))
    for event in strategy.folder.events("round"):
        assert event["bytes_down"]["weights"] + event["bytes_up"]["weights"] == event["predicted_bytes"]


@pytest.mark.parametrize("every", [0, 2])
def test_importance_is_the_same_after_a_resume(every: int, tiny_job: MakeJob, tmp_path: Path) -> None:
    """Scores are part of the run's state: whoever has the checkpoint draws the same blueprints."""
    job = tiny_job(
        *IMPORTANCE,
        f"blueprint.score_every={every}",
        *("train.rounds=4", "flower.wait_for_nodes=0.05", "checkpoint_every=1"),
    )
    whole = run(job, start(job), tmp_path / "oracle")
    assert whole.scores is not None
    strategy = strategy_of(job, tmp_path / "run")
    first = dict(strategy.state.scores or {})
    assert first == score_blocks(job, job.initial_state(), 0)
    grid = LocalGrid()
    strategy._round(grid)
    resumed = TwistStrategy(job, strategy.folder)
    assert resumed.state.scores == first
    assert plan(job, resumed.state) == plan(job, strategy.state)
    ours = resumed.run(LocalGrid())
    assert_same_run(ours, whole)
    assert ours.scores == whole.scores
    assert (whole.scores == first) == (every == 0)
    best = job.scored(whole.scores).division.common_blocks("attn", 1)
    assert all(set(best) <= set(task.blueprint.held("attn", 1)) for task in plan(job, ours))


# A user's own


OURS = """
from twist_fl import Policy

def last(deal):
    rest = [block for block in range(deal.num_full) if block not in deal.common]
    return [sorted([*deal.common, *rest[len(rest) - size + len(deal.common):]]) for size in deal.num_sub]

def turning(deal):
    return [(deal.round % deal.num_full,)] * len(deal.num_sub)

frozen = Policy(turning, still=True)
covering = Policy(last, covers=True)

def nothing(deal): return None
def few(deal): return [(0,)]
def words(deal): return [("a", "b")] * 3
def long(deal): return [range(3)] * 3
def twice(deal): return [(1, 1)] * 3
def backwards(deal): return [(2, 1)] * 3
def beyond(deal): return [(2, 4)] * 3
def stranger(deal): return [(1, 3)] * 3
"""


def test_a_users_policy_says_which_blocks(user_module: Callable[[str], str], tiny_job: MakeJob) -> None:
    module = user_module(OURS)
    job = tiny_job(f"blueprint.policy={module}:last", "blueprint.num_sub=[1,2,3]")
    for kind in KINDS:
        held = [blueprint.held(kind, 1) for blueprint in job.blueprints(5)]
        assert held == [(3,), (2, 3), (1, 2, 3)]
    turning, frozen = (
        tiny_job(f"blueprint.policy={module}:{name}", "blueprint.num_sub=1") for name in ("turning", "frozen")
    )
    assert [turning.blueprints(round_)[0].held("attn", 1) for round_ in (1, 2, 4)] == [(1,), (2,), (0,)]
    assert [frozen.blueprints(round_)[0].held("attn", 1) for round_ in (1, 2, 4)] == [(1,), (1,), (1,)]


def test_only_a_policy_that_covers_needs_places_for_all_blocks(
    user_module: Callable[[str], str], tiny_job: MakeJob
) -> None:
    module = user_module(OURS)
    few = ("blueprint.num_sub=1", "train.workers=2")
    assert tiny_job(f"blueprint.policy={module}:last", *few).blueprints(1)[0].held("attn", 1) == (3,)
    with pytest.raises(ConfigError, match="2 workers with 0 common blocks cannot cover all 4 blocks"):
        tiny_job(f"blueprint.policy={module}:covering", *few)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nothing", "must give a row of block ids for each worker: 'NoneType' object is not iterable"),
        ("words", "must give a row of block ids for each worker: 'str' object cannot be interpreted as an integer"),
        ("few", "gave 1 rows for 3 workers"),
        ("long", "gave worker 0 the blocks [0, 1, 2], and its num_sub is 2"),
        ("twice", "gave worker 0 the blocks [1, 1]: they must be distinct, ascending, and from 0 to 3"),
        ("backwards", "gave worker 0 the blocks [2, 1]: they must be distinct, ascending, and from 0 to 3"),
        ("beyond", "gave worker 0 the blocks [2, 4]: they must be distinct, ascending, and from 0 to 3"),
        ("stranger", "gave worker 0 the blocks [1, 3]: the common blocks [0] must be among them"),
    ],
)
def test_a_users_policy_that_gives_other_rows_is_refused_before_a_run_starts(
    name: str, reason: str, user_module: Callable[[str], str], tiny_job: MakeJob
) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_job(f"blueprint.policy={user_module(OURS)}:{name}", "blueprint.num_sub=2", "blueprint.common=1")
    assert str(caught.value) == f"the policy {name} {reason}"


def test_a_worker_needs_no_policy_and_a_server_that_goes_on_does(
    user_module: Callable[[str], str], tiny_job: MakeJob, tmp_path: Path
) -> None:
    job = tiny_job(f"blueprint.policy={user_module(OURS)}:last")
    text = job.to_json().replace(":last", ":gone")
    theirs = job_from_json(text)
    assert (theirs.config.blueprint.policy[-5:], theirs.layout) == (":gone", job.layout)
    folder = RunFolder(tmp_path / "run")
    folder.create(theirs)
    with pytest.raises(ConfigError, match=r"^blueprint\.policy='of_the_users_\d+:gone': the module .* has no gone$"):
        go_on(folder)


# Mixed sizes


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(0, 2**32), st.integers(1, 10**6))
def test_shuffled_sizes_are_a_permutation_anew_each_round(num_sub: list[int], seed: int, round_: int) -> None:
    shuffled = replace(division(*num_sub), assign="shuffled")
    sizes = shuffled.sizes(layout_of(), seed, round_)
    assert sorted(sizes) == sorted(shuffled.num_sub)
    assert sizes == shuffled.sizes(layout_of(), seed, round_)


def test_shuffled_sizes_reach_every_worker() -> None:
    shuffled = replace(division(12, 6, 4), assign="shuffled")
    seen = {sizes for round_ in range(60) for sizes in enumerate(shuffled.sizes(layout_of(), 0, round_))}
    assert seen == {(worker, (size, size)) for worker in range(3) for size in (12, 6, 4)}


@st.composite
def pairs(draw: st.DrawFn) -> Division:
    """Sizes to draw from of which the largest would do for all."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4))
    workers = draw(st.integers(1, 6))
    enough = -(-12 // workers)
    largest = draw(st.tuples(st.integers(enough, 12), st.integers(enough, 12)))
    capped = [(min(heads, largest[0]), min(ffn, largest[1])) for heads, ffn in sizes]
    return Division("both", (*capped, largest), 1, 2, assign="drawn", drawn_workers=workers)


@given(pairs(), st.integers(0, 2**32), st.integers(1, 10**6))
def test_drawn_sizes_cover_every_block(drawn: Division, seed: int, round_: int) -> None:
    layout = layout_of()
    drawn.check(layout)
    sizes = drawn.sizes(layout, seed, round_)
    assert len(sizes) == drawn.drawn_workers
    assert set(sizes) <= set(drawn.num_sub)
    blueprints = draw_round(layout, drawn, seed, round_)
    assert [(b.shape[0][1], b.shape[1][1]) for b in blueprints] == list(sizes)
    for kind in KINDS:
        assert set().union(*(b.held(kind, 2) for b in blueprints)) == set(range(12))


def test_drawn_sizes_are_uniform_where_nothing_needs_repair() -> None:
    drawn = replace(division(12, 6, 4, policy="ordered"), assign="drawn", drawn_workers=2)
    sizes = [size for round_ in range(600) for size, _ in drawn.sizes(layout_of(), 0, round_)]
    for size in (12, 6, 4):
        assert sizes.count(size) / 1200 == pytest.approx(1 / 3, abs=0.06)


# Tickets


def test_ordered_tickets_are_the_first_blocks_and_important_ones_the_highest_scores() -> None:
    layout = layout_of()
    ordered = replace(division(6, 6), ticket_policy="ordered")
    assert draw_ticket(layout, ordered, (3, 5), 0, 7).held("ffn", 2) == (0, 1, 2, 3, 4)
    scored = replace(division(6, 6, policy="importance", common=2), scores=scores_of(layout))
    for kind, layer in scored.scores or ():
        best = scored.by_score(kind, layer)
        ticket = draw_ticket(layout, replace(scored, ticket_policy="importance"), (4, 4), 0, 1)
        assert set(ticket.held(kind, layer)) == set(best[:4])
        drawn = [draw_ticket(layout, scored, (4, 4), 0, draw).held(kind, layer) for draw in range(8)]
        assert all(set(best[:2]) <= set(held) for held in drawn)
        assert len(set(drawn)) > 1


def test_equal_tickets_are_evaluated_once(tiny_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tiny_job("eval.ticket_policy=ordered", "blueprint.policy=ordered")
    calls: list[Blueprint] = []
    models = job.models()
    lent = models.lent

    def counted(blueprint: Blueprint, state: State) -> AbstractContextManager[object]:
        calls.append(blueprint)
        return lent(blueprint, state)

    monkeypatch.setattr(models, "lent", counted)
    windows, state = job.corpus.test[:4], job.initial_state()
    found = ticket_distribution(models, state, job.division, (2, 2), windows, tickets=5, seed=0, batch_size=4)
    assert len(calls) == 1
    assert len(set(found.perplexities)) == 1
    assert len(found.perplexities) == 5


def test_results_of_a_scored_run(tiny_job: MakeJob, tmp_path: Path) -> None:
    job = tiny_job(
        *IMPORTANCE, "eval.ticket_policy=importance", "eval.tickets=2", "eval.max_windows=8", "train.rounds=1"
    )
    folder = RunFolder(tmp_path / "run")
    folder.create(job)
    state = run(job, start(job), tmp_path)
    (row,) = final_results(job, state, folder)["tickets"]
    assert row["std"] == 0
    folder.save(state, job.model_config)
    loaded = folder.load()
    assert loaded is not None
    assert loaded.scores == state.scores
    assert same(loaded.params, state.params)


# What is refused


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (division(2, 3, policy="static"), "2 workers with 0 common blocks cannot cover all 12 blocks"),
        (division(13, policy="ordered"), "num_sub=13 (attn) is more than the 12 blocks"),
        (
            division(2, 2, policy="rolling", common=2),
            "num_sub=2 (attn): the 2 common blocks fill it and leave no window to roll",
        ),
        (
            replace(division(3, 4), assign="drawn", drawn_workers=2),
            "of the sizes [(3, 3), (4, 4)] (heads, FFN blocks) none, if all 2 workers draw it, covers all (12, 12)",
        ),
        (division(3, 3, 3, 3, policy="importance", common=4), "num_sub=3 (attn) is below 4"),
        (division(4, 4, 4, policy="importance", common=3), "3 workers with 3 common blocks cannot cover"),
    ],
)
def test_an_impossible_division_is_refused(refused: Division, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        refused.check(layout_of())


REFUSED = {
    "blueprint.policy=importance": "blueprint.policy=importance needs blueprint.common: at least 1",
    "blueprint.common=0,1": "blueprint.common=0,1 must be a number of blocks (6), a share",
    "blueprint.num_common=2": "unknown key 'blueprint.num_common', did you mean 'blueprint.common'?",
    "blueprint.policy=importance blueprint.common=1 algorithm=ddp": "divides nothing with algorithm=ddp: use twist",
    "eval.ticket_policy=importance": "needs the scores of blueprint.policy=importance",
    "blueprint.assign=drawn blueprint.num_sub=[]": "blueprint.num_sub=[] has 0 entries",
    "blueprint.setting=ffn blueprint.num_sub=1+2": "blueprint.num_sub=1+2 is a size for attention+FFN, and blueprint",
    "blueprint.score_windows=0": "blueprint.score_windows=0 must be more than 0",
    "blueprint.policy=rolled": "blueprint.policy='rolled' must be one of random, rolling, ordered",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_refused(overrides: str, tiny_job: MakeJob) -> None:
    with pytest.raises(ConfigError, match=re.escape(REFUSED[overrides])):
        tiny_job(*overrides.split())

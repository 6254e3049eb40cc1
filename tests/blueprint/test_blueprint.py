"""Algorithm 1 and its randomness (paper, section 3.1; spec, section 2)."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twist_fl.blueprint.architectures import KINDS, Kind
from twist_fl.blueprint.blocks import Layout, make_layout
from twist_fl.blueprint.blueprint import Blueprint, Scale
from twist_fl.blueprint.division import Debt, Division, Setting
from twist_fl.blueprint.drawing import draw_round, draw_ticket, full_blueprint
from twist_fl.blueprint.policies import algorithm_1

NUM_LAYERS = 6
Deal = tuple[int, list[int], list[int], list[int], int]
"""(num_full, num_sub of each worker, common, debt, seed)"""


def layout_of(heads: int = 12, ffn_blocks: int = 12, num_layers: int = NUM_LAYERS) -> Layout:
    sizes = {"n_embd": heads, "n_head": heads, "n_inner": ffn_blocks, "n_layer": num_layers}
    return make_layout({"model_type": "gpt2", "vocab_size": 2, "n_positions": 2, **sizes}, ffn_blocks)


def equal(num_sub: int, num_workers: int, setting: Setting = "both", common: int = 0) -> Division:
    return Division(setting, ((num_sub, num_sub),) * num_workers, 1, 2, (common, common))


@st.composite
def deals(draw: st.DrawFn) -> Deal:
    """A legal one, of equal or unequal workers."""
    num_full = draw(st.integers(1, 12))
    blocks = st.integers(0, num_full - 1)
    common = draw(st.lists(blocks, unique=True, max_size=num_full // 2))
    debt = draw(st.lists(blocks, unique=True, max_size=num_full))
    least = max(len(common), 1)
    num_workers = draw(st.integers(1, 6))
    if draw(st.booleans()):
        smallest = next(n for n in range(least, 13) if num_workers * (n - len(common)) >= num_full - len(common))
        num_sub = [draw(st.integers(smallest, num_full))] * num_workers
    else:
        num_sub = draw(st.lists(st.integers(least, num_full), min_size=num_workers, max_size=num_workers))
        while sum(n - len(common) for n in num_sub) < num_full - len(common):
            num_sub[num_sub.index(min(num_sub))] += 1
    return num_full, num_sub, common, sorted(debt), draw(st.integers(0, 2**32))


@given(deals())
def test_every_row_is_sorted_distinct_of_its_size_and_holds_the_common_blocks(
    deal: Deal,
) -> None:
    num_full, num_sub, common, debt, seed = deal
    rows = algorithm_1(num_full, num_sub, common, np.random.default_rng(seed), debt)
    assert [len(row) for row in rows] == num_sub
    for row in rows:
        assert row == tuple(sorted(set(row)))
        assert set(common) <= set(row) <= set(range(num_full))


@given(deals())
def test_every_block_is_held(deal: Deal) -> None:
    num_full, num_sub, common, debt, seed = deal
    rows = algorithm_1(num_full, num_sub, common, np.random.default_rng(seed), debt)
    assert set().union(*rows) == set(range(num_full))


@given(deals())
def test_debt_goes_out_twice_before_any_other_block_does(deal: Deal) -> None:
    num_full, num_sub, common, debt, seed = deal
    rows = algorithm_1(num_full, num_sub, common, np.random.default_rng(seed), debt)
    # A worker that lacks a block of the debt was given no other block beyond its deal, and deals do not overlap.
    lacking = [set(row) - set(common) - set(debt) for row in rows if not set(debt) <= set(row)]
    assert all(not one & other for one, other in combinations(lacking, 2))


@pytest.mark.parametrize("seed", range(20))
def test_debt_is_dealt_first_to_different_workers(seed: int) -> None:
    rows = algorithm_1(12, [3] * 4, [], np.random.default_rng(seed), [3, 7, 8])
    owners = [[worker for worker, row in enumerate(rows) if block in row] for block in (3, 7, 8)]
    assert len({owner for (owner,) in owners}) == 3


def test_a_worker_that_never_answers_starves_no_block() -> None:
    owed: set[int] = set()
    owed_for = dict.fromkeys(range(12), 0)
    for seed in range(200):
        rows = algorithm_1(12, [3] * 4, [], np.random.default_rng(seed), sorted(owed))
        owed = set(rows[0])
        owed_for = {block: owed_for[block] + 1 if block in owed else 0 for block in owed_for}
        assert max(owed_for.values()) < 8


def test_debt_is_held_by_all_where_there_is_room() -> None:
    rows = algorithm_1(12, [6] * 4, [], np.random.default_rng(0), [0, 1, 2])
    assert all({0, 1, 2} <= set(row) for row in rows)


def test_debt_reaches_the_layer_and_kind_it_names() -> None:
    layout, division = layout_of(), equal(6, 4)
    owed: Debt = frozenset({("ffn", 2, 5), ("ffn", 2, 9)})
    with_debt, without = draw_round(layout, division, 0, 1, owed), draw_round(layout, division, 0, 1)
    assert all({5, 9} <= set(blueprint.held("ffn", 2)) for blueprint in with_debt)
    for kind, layer in ((k, la) for k in KINDS for la in range(NUM_LAYERS)):
        changed = [b.held(kind, layer) for b in with_debt] != [b.held(kind, layer) for b in without]
        assert changed == ((kind, layer) == ("ffn", 2))


def held_once(layout: Layout, division: Division, seed: int, round_: int) -> Iterator[tuple[Kind, int, int, int]]:
    for worker, blueprint in enumerate(draw_round(layout, division, seed, round_)):
        for kind in KINDS:
            for layer in division.layers(layout.num_layers):
                yield from ((kind, layer, worker, block) for block in blueprint.held(kind, layer))


@given(st.integers(0, 2**63), st.integers(1, 10**6), st.sampled_from([3, 4, 6]))
def test_a_draw_depends_on_its_coordinates_only(seed: int, round_: int, num_sub: int) -> None:
    both = draw_round(layout_of(), equal(num_sub, 4), seed, round_)
    assert both == draw_round(layout_of(), equal(num_sub, 4), seed, round_)
    attn = draw_round(layout_of(), equal(num_sub, 4, "attn"), seed, round_)
    ffn = draw_round(layout_of(), equal(num_sub, 4, "ffn"), seed, round_)
    deeper = draw_round(layout_of(num_layers=9), equal(num_sub, 4), seed, round_)
    for worker, blueprint in enumerate(both):
        assert blueprint.attn == attn[worker].attn
        assert blueprint.ffn == ffn[worker].ffn
        assert blueprint.attn[1:4] == deeper[worker].attn[1:4]


FRESH = """
from test_blueprint import equal, layout_of
from twist_fl.blueprint.drawing import draw_round, draw_ticket
print(*(b.digest for b in draw_round(layout_of(), equal(4, 4), 11, 5)), end=" ")
print(draw_ticket(layout_of(), equal(4, 4), (3, 5), 11, 2).digest)
"""


def test_a_fresh_process_draws_the_same(request: pytest.FixtureRequest) -> None:
    command = [sys.executable, "-W", "error", "-c", FRESH]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=request.path.parent)
    ours = [b.digest for b in draw_round(layout_of(), equal(4, 4), 11, 5)]
    assert result.stdout.split() == [*ours, draw_ticket(layout_of(), equal(4, 4), (3, 5), 11, 2).digest]


def test_the_smallest_subnets_vary_between_rounds() -> None:
    """As printed, Algorithm 1 gives block b to worker b mod S for ever when N_sub = N_full/S."""
    owners: dict[tuple[Kind, int, int], set[int]] = {}
    for round_ in range(40):
        for kind, layer, worker, block in held_once(layout_of(), equal(3, 4), 0, round_):
            owners.setdefault((kind, layer, block), set()).add(worker)
    assert len(owners) == 2 * 3 * 12
    assert all(workers == {0, 1, 2, 3} for workers in owners.values())


def indicators(num_rounds: int) -> dict[tuple[Kind, int], np.ndarray]:
    """For each divided layer and kind, (num_rounds, 12): whether worker 0 of 2 holds each block, in +1 and -1."""
    layout, division = layout_of(), equal(6, 2)
    signs = {(kind, layer): -np.ones((num_rounds, 12)) for kind in KINDS for layer in division.layers(NUM_LAYERS)}
    for round_ in range(num_rounds):
        for kind, layer, worker, block in held_once(layout, division, 3, round_):
            if worker == 0:
                signs[kind, layer][round_, block] = 1
    return signs


def test_layers_kinds_and_rounds_are_independent_and_every_block_equally_likely() -> None:
    num_rounds = 600
    signs = indicators(num_rounds)
    five_sigma = 5 / num_rounds**0.5
    for sign in signs.values():
        assert np.abs(sign.mean(axis=0)).max() < five_sigma
        assert np.abs((sign[1:] * sign[:-1]).mean(axis=0)).max() < five_sigma
    for one, other in combinations(signs.values(), 2):
        assert np.abs((one * other).mean(axis=0)).max() < five_sigma
        assert np.abs((one[1:] * other[:-1]).mean(axis=0)).max() < five_sigma


def test_workers_of_a_round_seeds_and_tickets_differ() -> None:
    layout, division = layout_of(), equal(6, 4)
    drawn = draw_round(layout, division, 0, 1) + draw_round(layout, division, 1, 1)
    drawn += [draw_ticket(layout, division, (6, 6), seed, draw) for seed in (0, 1) for draw in (0, 1)]
    assert len({blueprint.digest for blueprint in drawn}) == 12


@pytest.mark.parametrize(("setting", "whole"), [("attn", "ffn"), ("ffn", "attn")])
def test_the_setting_leaves_the_other_kind_whole(setting: Setting, whole: Kind) -> None:
    for blueprint in draw_round(layout_of(12, 6), equal(3, 4, setting), 0, 1):
        full = full_blueprint(layout_of(12, 6))
        assert blueprint.shape[KINDS.index(whole) - 1][1:4] == (3, 3, 3)
        assert all(blueprint.held(whole, layer) == full.held(whole, layer) for layer in range(NUM_LAYERS))


def test_first_and_last_layers_are_whole() -> None:
    for blueprint in draw_round(layout_of(), equal(3, 4), 0, 1):
        assert blueprint.shape == ((12, 3, 3, 3, 12, 12),) * 2
        assert not blueprint.is_full


def test_workers_may_hold_different_amounts() -> None:
    division = Division("both", ((2, 6), (4, 2), (6, 4)), 1, 2)
    drawn = draw_round(layout_of(), division, 0, 1)
    assert [(b.shape[0][2], b.shape[1][2]) for b in drawn] == [(2, 6), (4, 2), (6, 4)]
    assert [b.factor("attn", 2, "linear") for b in drawn] == [6, 3, 2]


@given(st.integers(1, 12), st.integers(1, 6), st.data())
def test_check_refuses_exactly_what_cannot_cover_and_names_the_smallest_that_can(
    num_full: int, num_workers: int, data: st.DataObject
) -> None:
    common = data.draw(st.integers(0, num_full))
    num_sub = data.draw(st.integers(max(common, 1), num_full))
    layout = layout_of(num_full, num_full)

    def covers(n: int) -> bool:
        return num_full - common <= num_workers * (n - common)

    division = equal(num_sub, num_workers, common=common)
    if covers(num_sub):
        division.check(layout)
    else:
        with pytest.raises(ValueError, match="cannot cover") as raised:
            division.check(layout)
        named = int(re.findall(r"smallest legal N_sub for all is (\d+)", str(raised.value))[0])
        assert covers(named)
        assert not covers(named - 1)
        assert f"num_sub={num_sub} " in str(raised.value)
        equal(named, num_workers, common=common).check(layout)


@pytest.mark.parametrize(
    ("division", "message"),
    [
        (equal(13, 4), "num_sub=13 (attn) is more than the 12 blocks"),
        (equal(0, 4), "num_sub=0 (attn) is below 1"),
        (equal(2, 4, common=3), "num_sub=2 (attn) is below 3"),
        (replace(equal(2, 6), common=(0, 2)), "num_sub=2 (ffn): 6 workers with 2 common blocks cannot cover"),
        (Division("both", ((6, 6), (6, 2))), "num_sub=[6, 2] (ffn): 2 workers with 0 common blocks cannot cover"),
        (Division("both", ((6, 6),) * 4, 4, 2), "undivided_first=4 and undivided_last=2 leave none of the 6 layers"),
    ],
)
def test_check_names_the_value_and_the_constraint(division: Division, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        division.check(layout_of())


def test_check_ignores_the_kind_that_is_not_divided() -> None:
    Division("attn", ((6, 1),) * 2, 1, 2).check(layout_of())
    with pytest.raises(ValueError, match="cannot cover"):
        Division("both", ((6, 1),) * 2, 1, 2).check(layout_of())
    Division("attn", ((8, 6),) * 2, 1, 2, common=(3, 7)).check(layout_of(12, 6))


def test_each_kind_has_its_own_common_blocks() -> None:
    division = Division("both", ((2, 6),) * 4, 1, 2, common=(1, 3))
    layout = layout_of(3, 12)
    division.check(layout)
    for blueprint in [
        *draw_round(layout_of(3, 12), division, 0, 1),
        draw_ticket(layout_of(3, 12), division, (1, 4), 0, 0),
    ]:
        for layer in (1, 2, 3):
            assert set(blueprint.attn[layer]) >= {0}
            assert set(blueprint.ffn[layer]) >= {0, 1, 2}


@given(deals(), st.integers(0, 5))
def test_json_round_trip(deal: Deal, round_: int) -> None:
    num_full, num_sub, common, _, seed = deal
    division = Division("both", tuple((n, n) for n in num_sub), 1, 2, (len(common), len(common)))
    for blueprint in draw_round(layout_of(num_full, num_full), division, seed, round_):
        again = Blueprint.from_json(blueprint.to_json())
        assert again == blueprint
        assert hash(again) == hash(blueprint)
        assert again.digest == blueprint.digest


def test_the_digest_tells_equal_shapes_apart() -> None:
    one = full_blueprint(layout_of(4, 4))
    left = replace(one, attn=((0, 1), *one.attn[1:]))
    right = replace(one, attn=((2, 3), *one.attn[1:]))
    swapped = replace(one, ffn=left.attn)
    assert left.shape == right.shape
    assert len({b.digest for b in (one, left, right, swapped)}) == 4


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 100))
def test_a_ticket_has_the_size_asked_for_and_need_not_cover(heads: int, ffn_blocks: int, draw: int) -> None:
    ticket = draw_ticket(layout_of(), equal(6, 2), (heads, ffn_blocks), 0, draw)
    assert ticket.shape == ((12, heads, heads, heads, 12, 12), (12, ffn_blocks, ffn_blocks, ffn_blocks, 12, 12))
    for layer in range(NUM_LAYERS):
        for kind in KINDS:
            held = ticket.held(kind, layer)
            assert held == tuple(sorted(set(held) & set(range(12))))
    assert ticket == draw_ticket(layout_of(), equal(3, 4), (heads, ffn_blocks), 0, draw)


def test_tickets_reach_every_block() -> None:
    drawn = [draw_ticket(layout_of(), equal(6, 2), (1, 1), 0, draw) for draw in range(150)]
    assert {ticket.attn[1] for ticket in drawn} == {(block,) for block in range(12)}


@pytest.mark.parametrize("size", [0, 13])
def test_an_impossible_ticket_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"ticket of {size} ffn blocks is impossible: choose 1 to 12"):
        draw_ticket(layout_of(), equal(6, 2), (6, size), 0, 0)


@pytest.mark.parametrize(("scale", "heads", "ffn"), [("sqrt", 2.0, 3**0.5), ("linear", 4.0, 3.0), ("none", 1.0, 1.0)])
def test_factor(scale: Scale, heads: float, ffn: float) -> None:
    ticket = draw_ticket(layout_of(8, 12), equal(6, 2), (2, 4), 0, 0)
    assert (ticket.factor("attn", 1, scale), ticket.factor("ffn", 1, scale)) == (heads, ffn)
    assert ticket.factor("attn", 0, scale) == 1.0

"""The laws of the streaming mean, its checks and the coverage debt (spec, section 6)."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twist_fl.blueprint.architectures import KINDS
from twist_fl.blueprint.blocks import Layout, make_layout
from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.blueprint.division import Division
from twist_fl.blueprint.drawing import draw_round, full_blueprint
from twist_fl.blueprint.moments import MOMENTS
from twist_fl.model.subnet import State, slice_state
from twist_fl.rounds import RoundMean, RunState, plan, start
from twist_fl.system.threads import PIECE, threads
from twist_fl.training.aggregate import ReplyError, StreamingMean, check_state, coverage_debt
from twist_fl.training.interval import Moments
from twist_fl.training.job import Job
from twist_fl.training.worker import Reply, Task

RandomState = Callable[..., State]

SIZES = {"n_embd": 8, "n_head": 4, "n_inner": 6, "n_layer": 3, "vocab_size": 3, "n_positions": 2}
LAYOUT = make_layout({"model_type": "gpt2", **SIZES}, ffn_blocks=3)
DIVISION = Division("both", ((2, 1), (2, 2), (1, 1)), 1, 1)


def aggregate(old: State, replies: Sequence[tuple[Blueprint, State]], weights: Sequence[int] | None = None) -> State:
    mean = StreamingMean(LAYOUT, copied(old))
    for (blueprint, state), weight in zip(replies, weights or [1] * len(replies), strict=True):
        mean.add(blueprint, state, weight)
    return mean.finish()


def copied(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def same(ours: State, theirs: State) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours
    )


def naive(old: State, replies: Sequence[tuple[Blueprint, State]], weights: Sequence[int]) -> State:
    """The mean of every element on its own, in Python floats (float64)."""
    new = {}
    for param in LAYOUT.params:
        result = old[param.name].clone()
        for element in np.ndindex(param.shape):
            total, weight = 0.0, 0
            for (blueprint, state), reply_weight in zip(replies, weights, strict=True):
                at = list(element)
                if param.kind is not None and param.layer is not None:
                    run = param.shape[param.dim] // param.sections
                    section, inside = divmod(at[param.dim], run)
                    block, offset = divmod(inside, param.width)
                    held = blueprint.held(param.kind, param.layer)
                    if block not in held:
                        continue
                    at[param.dim] = (section * len(held) + held.index(block)) * param.width + offset
                total += reply_weight * state[param.name][tuple(at)].item()
                weight += reply_weight
            if weight:
                result[element] = total / weight
        new[param.name] = result
    return new


def replies_of(random_state: RandomState, num: int, round_: int = 1) -> list[tuple[Blueprint, State]]:
    """Different states from `num` workers."""
    drawn = (draw_round(LAYOUT, DIVISION, 0, round_) * 2)[:num]
    states = [slice_state(LAYOUT, random_state(LAYOUT, seed), blueprint) for seed, blueprint in enumerate(drawn)]
    return list(zip(drawn, states, strict=True))


@pytest.mark.parametrize("weights", [[1, 1, 1], [7, 30720, 1]])
@pytest.mark.parametrize("num", [1, 2, 3])
def test_against_the_naive_mean(num: int, weights: list[int], random_state: RandomState) -> None:
    old, replies = random_state(LAYOUT, 99), replies_of(random_state, num)
    assert same(aggregate(old, replies, weights[:num]), naive(old, replies, weights[:num]))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 30720), st.booleans()), unique_by=lambda each: each[0]))
def test_replies_that_wait_are_the_same_mean(random_state: RandomState, arrivals: list[tuple[int, int, bool]]) -> None:
    """In any order, beside any that do not wait."""
    old, replies, weights = random_state(LAYOUT, 99), replies_of(random_state, 5), [1] * 5
    mean = StreamingMean(LAYOUT, copied(old))
    for i, weight, lasts in arrivals:
        weights[i] = weight
        mean.add(*replies[i], weight, lasts=lasts)
    here = sorted(i for i, _, _ in arrivals)
    assert same(mean.finish(), aggregate(old, [replies[i] for i in here], [weights[i] for i in here]))
    assert mean.memory or sum(not lasts for _, _, lasts in arrivals) < 2


def test_replies_that_wait_need_no_sums(random_state: RandomState) -> None:
    mean, replies = StreamingMean(LAYOUT, random_state(LAYOUT, 99)), replies_of(random_state, 5)
    for blueprint, state in replies:
        mean.add(blueprint, state, lasts=True)
    assert same(mean.finish(), aggregate(random_state(LAYOUT, 99), replies))
    assert not mean.memory


def test_of_a_state_that_holds_more_only_the_blueprints_blocks_count(random_state: RandomState) -> None:
    old, drawn = random_state(LAYOUT, 99), draw_round(LAYOUT, DIVISION, 0, 1)
    whole = [random_state(LAYOUT, seed) for seed in range(3)]
    mean = StreamingMean(LAYOUT, copied(old))
    for blueprint, state in zip(drawn, whole, strict=True):
        mean.add(blueprint, state, given=full_blueprint(LAYOUT))
    sliced = [slice_state(LAYOUT, state, blueprint) for blueprint, state in zip(drawn, whole, strict=True)]
    assert same(mean.finish(), aggregate(old, list(zip(drawn, sliced, strict=True))))


@given(st.integers(0, 10**6), st.lists(st.integers(1, 10**5), min_size=3, max_size=3))
def test_identical_replies_are_a_fixed_point(random_state: RandomState, seed: int, weights: list[int]) -> None:
    state = random_state(LAYOUT, seed)
    drawn = draw_round(LAYOUT, DIVISION, seed, 1)
    for order in ((0, 1, 2), (2, 0, 1)):
        replies = [(drawn[worker], slice_state(LAYOUT, state, drawn[worker])) for worker in order]
        assert same(aggregate(state, replies, weights), state)
        assert same(aggregate({name: value + 1 for name, value in state.items()}, replies, weights), state)


def test_arrival_order_does_not_matter(random_state: RandomState) -> None:
    old, replies = random_state(LAYOUT, 99), replies_of(random_state, 5)
    first = aggregate(old, replies)
    for order in permutations(range(5)):
        assert same(aggregate(old, [replies[worker] for worker in order]), first)


def test_float32_sums_would_depend_on_the_order() -> None:
    """Shows that the law above needs float64: the same permutations of float32 sums disagree."""
    values = [torch.randn(1000, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    sums = [sum((values[i] for i in order), torch.zeros(1000)) for order in permutations(range(5))]
    assert any(not torch.equal(sums[0], other) for other in sums[1:])


def test_disjoint_block_is_a_copy_and_shared_a_mean(random_state: RandomState) -> None:
    full = full_blueprint(LAYOUT)
    left = replace(full, attn=(full.attn[0], (0, 1), full.attn[2]))
    right = replace(full, attn=(full.attn[0], (2, 3), full.attn[2]))
    one, other, old = (random_state(LAYOUT, seed) for seed in range(3))
    new = aggregate(old, [(left, slice_state(LAYOUT, one, left)), (right, slice_state(LAYOUT, other, right))])
    name = "transformer.h.1.attn.c_proj.weight"
    assert torch.equal(new[name], torch.cat([one[name][:4], other[name][4:]]))
    name = "transformer.h.1.attn.c_proj.bias"
    assert torch.equal(new[name], ((one[name].double() + other[name].double()) / 2).float())


def test_what_nobody_held_keeps_the_servers_value(random_state: RandomState) -> None:
    full = full_blueprint(LAYOUT)
    part = replace(full, ffn=(full.ffn[0], (0, 2), full.ffn[2]))
    old, trained = random_state(LAYOUT, 0), random_state(LAYOUT, 1)
    new = aggregate(old, [(part, slice_state(LAYOUT, trained, part))])
    bias = "transformer.h.1.mlp.c_fc.bias"
    assert torch.equal(new[bias], torch.cat([trained[bias][:2], old[bias][2:4], trained[bias][4:]]))
    assert same(aggregate(old, []), old)


def spread(old: State) -> Sequence[tuple[Blueprint, State]]:
    """Five replies whose values differ by up to 2^24, in either sign, and cancel in part."""
    generator = torch.Generator().manual_seed(0)
    drawn = (draw_round(LAYOUT, DIVISION, 0, 1) * 2)[:5]
    factors = {name: 2.0 ** torch.randint(-12, 13, value.shape, generator=generator) for name, value in old.items()}
    states = [{name: (-1) ** i * value * factors[name].roll(i) for name, value in old.items()} for i in range(5)]
    return [(blueprint, slice_state(LAYOUT, state, blueprint)) for blueprint, state in zip(drawn, states, strict=True)]


@pytest.mark.parametrize("weights", [[1] * 5, [7, 30720, 1, 2, 99]])
def test_sums_are_float64_in_any_order(weights: list[int], random_state: RandomState) -> None:
    """Half of a sum lies in the state's memory, half elsewhere: the result is that of whole float64 numbers."""
    old = random_state(LAYOUT, 99)
    replies = spread(old)
    expected = naive(old, replies, weights)
    for order in permutations(range(5)):
        assert same(aggregate(old, [replies[i] for i in order], [weights[i] for i in order]), expected)


@pytest.mark.parametrize("size", [2, 3, 7, 2**20])
@pytest.mark.parametrize("num", [1, 2, 4])
def test_pieces_and_threads_do_not_matter(
    size: int, num: int, random_state: RandomState, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, replies = random_state(LAYOUT, 99), replies_of(random_state, 5)
    expected = aggregate(old, replies, [3, 1, 2, 1, 5])
    monkeypatch.setattr("twist_fl.training.aggregate.PIECE", 2 * size)
    monkeypatch.setattr("twist_fl.system.threads.usable_cores", lambda: num)
    with threads(num):
        for seed, (blueprint, state) in enumerate(replies):
            assert same(slice_state(LAYOUT, random_state(LAYOUT, seed), blueprint), state)
            check_state(LAYOUT, blueprint, state)
            with pytest.raises(ReplyError, match="finite"):
                check_state(LAYOUT, blueprint, state | {BIAS: CHECKED["nan"][0](state)[BIAS]})
        assert same(aggregate(old, replies, [3, 1, 2, 1, 5]), expected)


@pytest.mark.parametrize("width", [64, 65])
def test_state_and_sums_are_two_copies_however_many_reply(width: int) -> None:
    """The state stays where it is; beside it NumPy and Python never allocate more than its size and a few pieces."""
    layout = make_layout(SIZES | {"model_type": "gpt2", "n_embd": 4 * width, "n_inner": 3 * width, "vocab_size": 99}, 3)
    num_bytes = 4 * layout.num_params()
    state = {param.name: torch.zeros(param.shape) for param in layout.params}
    replies = {seed: {name: torch.full_like(value, seed) for name, value in state.items()} for seed in (1, 2)}
    places = {name: tensor.data_ptr() for name, tensor in state.items()}
    full, memory, kept = full_blueprint(layout), None, []
    tracemalloc.start()
    try:
        for num in (1, 4, 64):
            mean = StreamingMean(layout, state, memory)
            for i in range(num):
                mean.add(full, replies[1 + i % 2])
            state, memory = mean.finish(), mean.memory
            kept.append(sum(half.nbytes for half in memory.values()))
            assert tracemalloc.get_traced_memory()[0] < 1.05 * num_bytes + 100_000
        assert tracemalloc.get_traced_memory()[1] < 1.05 * num_bytes + 8 * PIECE + 100_000
    finally:
        tracemalloc.stop()
    assert kept[0] == 0  # one reply is its own mean
    assert kept[1] == kept[2] <= 1.02 * num_bytes
    assert {name: tensor.data_ptr() for name, tensor in state.items()} == places
    assert all(bool((tensor == 1.5).all()) for tensor in state.values())


def test_memory_of_another_round_is_taken_and_what_is_in_it_does_not_matter(random_state: RandomState) -> None:
    old, memory = random_state(LAYOUT, 99), StreamingMean(LAYOUT, random_state(LAYOUT)).memory
    for num, round_ in ((3, 1), (1, 2), (2, 3)):
        replies = replies_of(random_state, num, round_)
        mean = StreamingMean(LAYOUT, copied(old), memory)
        for weight, (blueprint, state) in enumerate(replies, start=1):
            mean.add(blueprint, state, weight)
        halves = {name: half.ctypes.data for name, half in memory.items()}
        assert same(mean.finish(), aggregate(old, replies, list(range(1, num + 1))))
        assert mean.memory is memory
        assert {name: half.ctypes.data for name, half in memory.items()} == halves
        for half in memory.values():
            half.fill(float("nan"))


def test_a_round_takes_the_sums_of_the_round_before_and_nobody_elses(
    tiny_job: Callable[..., Job], random_state: RandomState
) -> None:
    job = tiny_job("train.optimizer_state=server")
    state = RoundMean(job, start(job), plan(job, start(job))).finish()
    assert len(state.spare) == 3
    tasks, given = plan(job, state), [id(memory) for memory in state.spare]
    first, second = RoundMean(job, state, tasks), RoundMean(job, state, tasks)
    assert [id(memory) for memory in first._spare] == given
    assert not {id(memory) for memory in second._spare} & set(given)
    for mean, seed in ((first, 1), (second, 2)):
        for task in tasks:
            mean.add(task, honest(job, task, random_state, seed))
    name = "transformer.wte.weight"
    for mean, seed in ((first, 1), (second, 2)):
        assert torch.equal(mean.finish().params[name], random_state(job.layout, seed)[name])


def test_large_values_count_up_to_the_bound(random_state: RandomState) -> None:
    blueprint, state = replies_of(random_state, 1)[0]
    check_state(LAYOUT, blueprint, state | {BIAS: torch.full_like(state[BIAS], 1e9)})


def test_adding_does_not_change_the_reply_or_the_old_state(random_state: RandomState) -> None:
    old, replies = random_state(LAYOUT, 99), replies_of(random_state, 3)
    before = [{name: value.clone() for name, value in state.items()} for state in (old, *(s for _, s in replies))]
    aggregate(old, replies, [3, 2, 1])
    assert all(same(state, was) for state, was in zip([old, *(s for _, s in replies)], before, strict=True))


BIAS = "transformer.ln_f.bias"
CHECKED: dict[str, tuple[Callable[[State], State], str]] = {
    "shape": (lambda s: s | {BIAS: s[BIAS][:-1]}, "ln_f.bias has shape (7,), expected (8,)"),
    "name": (lambda s: s | {"spy": s[BIAS]}, "parameter 'spy' is not in the block table"),
    "missing": (lambda s: {name: value for name, value in s.items() if name != BIAS}, f"{BIAS!r} is missing"),
    "dtype": (lambda s: s | {BIAS: s[BIAS].double()}, "ln_f.bias is torch.float64, expected torch.float32"),
    "nan": (lambda s: s | {BIAS: s[BIAS] * float("nan")}, "ln_f.bias has values that are not finite"),
    "inf": (lambda s: s | {BIAS: s[BIAS] / 0}, "ln_f.bias has values that are not finite"),
    "infinite in sum only": (
        lambda s: s | {BIAS: s[BIAS].fill_(3e38)},
        "ln_f.bias has a value of 3e+38, expected -",
    ),
    "one that is huge": (
        lambda s: s | {BIAS: torch.tensor([0.1] * 6 + [1e30, -1e30])},
        "ln_f.bias has a value of -1e+30, expected -1e+09 to 1e+09",
    ),
}


@pytest.mark.parametrize("fault", CHECKED)
def test_check_state_names_the_fault(fault: str, random_state: RandomState) -> None:
    spoil, message = CHECKED[fault]
    blueprint, state = replies_of(random_state, 1)[0]
    check_state(LAYOUT, blueprint, state)
    with pytest.raises(ReplyError, match=re.escape(message)):
        check_state(LAYOUT, blueprint, spoil(state))


def test_a_subnet_of_another_size_is_refused(random_state: RandomState) -> None:
    small, large = draw_round(LAYOUT, DIVISION, 0, 1)[2], draw_round(LAYOUT, DIVISION, 0, 1)[1]
    with pytest.raises(ReplyError, match=r"c_attn\.weight has shape \(8, 12\), expected \(8, 6\)"):
        check_state(LAYOUT, small, slice_state(LAYOUT, random_state(LAYOUT), large))


@pytest.fixture
def tiny_job(tiny_job: Callable[..., Job]) -> Callable[..., Job]:
    """At a learning rate that could have made the random replies below."""
    return lambda *overrides: tiny_job("train.lr=1", *overrides)


def honest(job: Job, task: Task, random_state: RandomState, seed: int = 5) -> Reply:
    def sliced(seed: int) -> State:
        return slice_state(job.layout, random_state(job.layout, seed), task.blueprint)

    moments = None
    if job.config.train.optimizer_state == "server":
        first = sliced(seed + 1)
        second = {name: first[name].square() + value.square() for name, value in sliced(seed + 2).items()}
        moments = Moments(task.num_batches, {"exp_avg": first, "exp_avg_sq": second})
    return Reply(task.digest, sliced(seed), 3.0, 60, task.num_batches, moments=moments)


def other_digest(reply: Reply) -> Reply:
    return replace(reply, digest="0" * 64)


def with_moments(change: Callable[[torch.Tensor], torch.Tensor], step: int = 2) -> Callable[[Reply], Reply]:
    """The second moments changed."""

    def changed(reply: Reply) -> Reply:
        assert reply.moments is not None
        first, second = MOMENTS
        bad = {name: change(value) for name, value in reply.moments.values[second].items()}
        return replace(reply, moments=Moments(step, {first: reply.moments.values[first], second: bad}))

    return changed


@given(st.integers(1, 9), st.integers(0, 3), st.integers(1, 9), st.integers(0, 3))
def test_a_reply_answers_one_task_though_blueprints_come_again(
    round_: int, worker: int, later: int, other: int
) -> None:
    task = Task(round_, worker, full_blueprint(LAYOUT), 0, 1)
    again = replace(task, round=later, worker=other)
    assert (task.digest == again.digest) == ((round_, worker) == (later, other))


BAD_REPLIES: dict[str, tuple[Callable[[Reply], Reply], str]] = {
    "digest": (other_digest, "the reply is to another task"),
    "batches": (lambda reply: replace(reply, num_batches=1), "trained 1 batches, asked were 2"),
    "no moments": (lambda reply: replace(reply, moments=None), "moments are missing"),
    "bad moments": (with_moments(lambda value: value * torch.nan), "values that are not finite"),
    "negative squares": (
        with_moments(lambda value: 0 * value - 10),
        "transformer.wte.weight has a value of -10, expected 0 to",
    ),
    "too many steps": (with_moments(lambda value: value, step=10**6), "moment_step is 1000000, expected 2"),
} | {
    fault: (lambda reply, spoil=spoil: replace(reply, params=spoil(reply.params)), message)
    for fault, (spoil, message) in CHECKED.items()
    if fault not in ("shape", "one that is huge")
}


@pytest.mark.parametrize("fault", BAD_REPLIES)
def test_a_bad_reply_is_named_and_dropped_and_the_round_goes_on(
    fault: str, tiny_job: Callable[..., Job], random_state: RandomState
) -> None:
    spoil, message = BAD_REPLIES[fault]
    job = tiny_job("train.optimizer_state=server")
    state = start(job)
    tasks = plan(job, state)
    replies = [honest(job, task, random_state, seed) for seed, task in enumerate(tasks)]
    with_bad, without = RoundMean(job, state, tasks), RoundMean(job, state, tasks)
    for worker in (1, 0, 2):
        with_bad.add(tasks[worker], spoil(replies[worker]) if worker == 1 else replies[worker])
    for worker in (0, 2):
        without.add(tasks[worker], replies[worker])
    ours, theirs = with_bad.finish(), without.finish()
    assert with_bad.report.dropped.keys() == {1}
    assert message in with_bad.report.dropped[1]
    assert with_bad.report.answered == [0, 2]
    assert same(ours.params, theirs.params)
    assert ours.moments is not None
    assert theirs.moments is not None
    assert all(same(ours.moments.values[name], theirs.moments.values[name]) for name in MOMENTS)
    assert ours.cursors == [2, 0, 2]
    assert ours.round == 1


def bytes_of(state: RunState, mean: RoundMean) -> list[bytes]:
    """All that a reply could touch: parameters, moments and sums, whoever's memory they are in."""
    assert state.moments is not None
    states = [state.params, *state.moments.values.values()]
    return [tensor.numpy().tobytes() for values in states for tensor in values.values()] + [
        half.tobytes() for each in mean._spare for half in each.values()
    ]


@pytest.mark.parametrize("fault", BAD_REPLIES)
def test_a_bad_reply_touches_nothing(fault: str, tiny_job: Callable[..., Job], random_state: RandomState) -> None:
    job = tiny_job("train.optimizer_state=server")
    state = start(job)
    tasks = plan(job, state)
    mean = RoundMean(job, state, tasks, in_place=True)
    untouched = bytes_of(state, mean)
    for worker in (1, 0):
        mean.add(tasks[worker], BAD_REPLIES[fault][0](honest(job, tasks[worker], random_state)))
        assert bytes_of(state, mean) == untouched
        mean.add(tasks[2 - worker], honest(job, tasks[2 - worker], random_state))
        assert bytes_of(state, mean) != untouched
        untouched = bytes_of(state, mean)


@pytest.mark.parametrize("answered", [[], [1], [2, 0], [1, 2, 0]])
def test_in_place_is_the_same_in_the_states_own_memory(
    answered: list[int], tiny_job: Callable[..., Job], random_state: RandomState
) -> None:
    job = tiny_job("train.optimizer_state=server", "train.weighting=tokens")
    ours, theirs = start(job), start(job)
    for _ in range(2):
        tasks, places = plan(job, ours), {name: tensor.data_ptr() for name, tensor in ours.params.items()}
        means = RoundMean(job, ours, tasks, in_place=True), RoundMean(job, theirs, tasks)
        before = copied(theirs.params)
        for worker in answered:
            for mean in means:
                mean.add(tasks[worker], honest(job, tasks[worker], random_state, seed=worker))
        assert same(theirs.params, before)
        ours, theirs = means[0].finish(), means[1].finish()
        assert same(ours.params, theirs.params)
        assert ours.moments is not None
        assert theirs.moments is not None
        assert ours.moments.step == theirs.moments.step
        assert all(same(ours.moments.values[name], theirs.moments.values[name]) for name in MOMENTS)
        assert {name: tensor.data_ptr() for name, tensor in ours.params.items()} == places


def test_a_worker_is_answered_or_dropped_and_never_both(
    tiny_job: Callable[..., Job], random_state: RandomState
) -> None:
    """Whatever comes from it twice, in whichever order."""
    job = tiny_job()
    state = start(job)
    tasks = plan(job, state)
    good = [honest(job, task, random_state) for task in tasks]
    mean = RoundMean(job, state, tasks)
    mean.add(tasks[0], good[0])
    mean.drop(0, "failed later")
    mean.add(tasks[0], other_digest(good[0]))
    mean.add(tasks[1], other_digest(good[1]))
    mean.drop(1, "failed")
    mean.add(tasks[1], good[1])
    mean.drop(2, "failed")
    assert mean.finish().cursors == [2, 2, 0]
    assert (mean.report.answered, mean.report.dropped) == ([0, 1], {2: "failed"})


def test_a_second_answer_does_not_count_twice(tiny_job: Callable[..., Job], random_state: RandomState) -> None:
    job = tiny_job()
    state = start(job)
    tasks = plan(job, state)
    mean = RoundMean(job, state, tasks)
    for seed in (1, 2):
        mean.add(tasks[0], honest(job, tasks[0], random_state, seed))
    assert (mean.report.answered, mean.report.dropped) == ([0], {})
    assert mean.report.notes == {0: "answered more than once: the first counts"}
    assert mean.report.num_tokens == 60
    shared = "transformer.wte.weight"
    assert torch.equal(mean.finish().params[shared], random_state(job.layout, 1)[shared])


def test_moments_that_were_not_asked_for_are_refused(tiny_job: Callable[..., Job], random_state: RandomState) -> None:
    job = tiny_job()
    state = start(job)
    tasks = plan(job, state)
    mean = RoundMean(job, state, tasks)
    reply = honest(job, tasks[0], random_state)
    mean.add(tasks[0], replace(reply, moments=Moments(2, dict.fromkeys(MOMENTS, reply.params))))
    assert "were not asked for" in mean.report.dropped[0]


@pytest.mark.parametrize(("weighting", "expected"), [("workers", 2.0), ("tokens", 7 / 3)])
def test_weighting(weighting: str, expected: float, tiny_job: Callable[..., Job], random_state: RandomState) -> None:
    job = tiny_job(f"train.weighting={weighting}")
    state = start(job)
    first, second, _ = plan(job, state)
    tasks = [replace(first, num_batches=1), second]  # 30 and 60 tokens
    mean = RoundMean(job, state, tasks)
    for task, value in zip(tasks, (1.0, 3.0), strict=True):
        reply = honest(job, task, random_state)
        constant = {name: torch.full_like(tensor, value) for name, tensor in reply.params.items()}
        mean.add(task, replace(reply, params=constant, num_tokens=30 * task.num_batches, loss=value))
    assert torch.equal(mean.finish().params["transformer.ln_f.bias"], torch.full((32,), expected))
    assert mean.report.loss == 7 / 3  # the training loss is a token mean either way


def test_a_failed_worker_leaves_a_debt_that_is_repaid_first(
    tiny_job: Callable[..., Job], random_state: RandomState
) -> None:
    job = tiny_job()
    state = start(job)
    tasks = plan(job, state)
    mean = RoundMean(job, state, tasks)
    for task in tasks[:2]:
        mean.add(task, honest(job, task, random_state))
    after = mean.finish()
    expected = {
        (kind, layer, block)
        for kind in KINDS
        for layer in (1, 2)
        for block in range(4)
        if all(block not in task.blueprint.held(kind, layer) for task in tasks[:2])
    }
    assert expected, "choose another seed: the two workers that answered cover everything"
    assert after.debt == expected
    for kind, layer, block in expected:
        name = f"transformer.h.{layer}." + ("attn.c_proj.weight" if kind == "attn" else "mlp.c_proj.weight")
        assert torch.equal(after.params[name].chunk(4)[block], state.params[name].chunk(4)[block])
    # Three workers have six places for four blocks: whatever is owed goes out at least twice.
    for kind, layer, block in after.debt:
        assert sum(block in task.blueprint.held(kind, layer) for task in plan(job, after)) >= 2
    assert coverage_debt(job.layout, job.division, [task.blueprint for task in plan(job, after)]) == frozenset()


def test_a_round_without_answers_changes_nothing_but_the_debt(tiny_job: Callable[..., Job]) -> None:
    job = tiny_job("blueprint.setting=ffn")
    state = start(job)
    after = RoundMean(job, state, plan(job, state)).finish()
    assert same(after.params, state.params)
    assert after.cursors == [0, 0, 0]
    assert after.debt == {("ffn", layer, block) for layer in (1, 2) for block in range(4)}


def brute_force_debt(layout: Layout, answered: list[Blueprint]) -> set[tuple[str, int, int]]:
    return {
        ("attn", layer, block)
        for layer in range(1, layout.num_layers - 1)
        for block in range(layout.num_blocks[0])
        if not any(block in blueprint.attn[layer] for blueprint in answered)
    }


@given(st.integers(0, 1000), st.sets(st.integers(0, 4)))
def test_coverage_debt_is_what_no_answer_holds(round_: int, answered: set[int]) -> None:
    layout = make_layout({"model_type": "gpt2", **SIZES, "n_layer": 5}, ffn_blocks=3)
    division = Division("attn", ((1, 3),) * 5, 1, 1)
    drawn = draw_round(layout, division, 0, round_)
    blueprints = [drawn[worker] for worker in sorted(answered)]
    assert coverage_debt(layout, division, blueprints) == brute_force_debt(layout, blueprints)

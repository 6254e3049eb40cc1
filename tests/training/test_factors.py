"""Second moments as means of rows and columns: against a computation by hand, and the laws that let them travel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import LAYOUTS
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from twist_fl.blueprint.blocks import Layout, Param, make_layout
from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.blueprint.cost import moment_bytes, round_bytes
from twist_fl.blueprint.division import Division, Setting
from twist_fl.blueprint.drawing import draw_round, full_blueprint
from twist_fl.blueprint.moments import SQUARES, factor_layout, moment_layouts
from twist_fl.model.subnet import State, load_state, slice_state
from twist_fl.rounds import RoundMean, dispatch, plan, run, start
from twist_fl.training.aggregate import StreamingMean, check_state
from twist_fl.training.client_state import MomentShelf
from twist_fl.training.factors import from_factors, to_factors
from twist_fl.training.interval import Moments
from twist_fl.training.job import Job
from twist_fl.training.worker import Worker

RandomState = Callable[..., State]
DIVISION = Division("both", ((2, 3), (3, 5), (1, 2), (4, 6)), 1, 0)
families = pytest.mark.parametrize("family", LAYOUTS)


def factors(layout: Layout, squares: State) -> State:
    return to_factors(layout, Moments(5, {SQUARES: squares})).values[SQUARES]


def products(layout: Layout, parts: State) -> State:
    return from_factors(layout, Moments(5, {SQUARES: parts}), "cpu").values[SQUARES]


def squares_of(random_state: RandomState, layout: Layout, seed: int = 0) -> State:
    return {name: value.square() for name, value in random_state(layout, seed).items()}


def close(ours: State, theirs: State) -> None:
    """The same sums in another order."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=2e-6, atol=0, msg=name)


def places(param: Param, blueprint: Blueprint, layout: Layout) -> list[list[int]]:
    """Of each block and section of a subnet's matrix, its indices along the divided dimension."""
    held = layout.held(param, blueprint)
    if param.kind is None:
        return [list(range(param.shape[0]))]
    num = param.sections * (param.num_blocks if held is None else len(held))
    return [list(range(i * param.width, (i + 1) * param.width)) for i in range(num)]


@families
@pytest.mark.parametrize("worker", range(4))
def test_by_hand(family: str, worker: int, random_state: RandomState) -> None:
    """Each block's rank-1 approximation is the outer product of its row and column sums over its sum."""
    layout = LAYOUTS[family]
    blueprint = draw_round(layout, DIVISION, 0, 1)[worker]
    squares = slice_state(layout, squares_of(random_state, layout), blueprint)
    found = products(layout, factors(layout, squares))
    for param in layout.params:
        expected = squares[param.name].double().numpy().copy()
        if expected.ndim == 2:
            matrix = np.moveaxis(expected, param.dim, 0)
            for rows in places(param, blueprint, layout):
                block = matrix[rows]
                matrix[rows] = np.outer(block.sum(1), block.sum(0)) / block.sum()
        np.testing.assert_allclose(found[param.name].numpy(), expected, rtol=2e-6)
        assert found[param.name].is_contiguous()


@families
def test_factors_are_blocks_as_parameters_are(family: str, random_state: RandomState) -> None:
    """What a blueprint names of the factors is the factors of what it names."""
    layout, of_factors = LAYOUTS[family], factor_layout(LAYOUTS[family])
    squares = squares_of(random_state, layout)
    for blueprint in draw_round(layout, DIVISION, 0, 1):
        parts = factors(layout, slice_state(layout, squares, blueprint))
        check_state(of_factors, blueprint, parts, least=0)
        close(parts, slice_state(of_factors, factors(layout, squares), blueprint))


@families
@pytest.mark.parametrize("in_place", [False, True])
def test_the_mean_of_factors_is_the_factors_of_the_mean(family: str, in_place: bool, random_state: RandomState) -> None:
    layout, of_factors = LAYOUTS[family], factor_layout(LAYOUTS[family])
    old = squares_of(random_state, layout, 9)
    drawn = draw_round(layout, DIVISION, 0, 1)[:3]
    plain, ours = (
        StreamingMean(layout, {n: v.clone() for n, v in old.items()}),
        StreamingMean(of_factors, factors(layout, old)),
    )
    for seed, blueprint in enumerate(drawn):
        squares = slice_state(layout, squares_of(random_state, layout, seed), blueprint)
        plain.add(blueprint, squares, 1 + seed, lasts=in_place)
        ours.add(blueprint, factors(layout, squares), 1 + seed, lasts=in_place)
    close(ours.finish(), factors(layout, plain.finish()))


@given(data=st.data(), family=st.sampled_from(list(LAYOUTS)))
def test_products_are_exact_and_their_factors_are_those_they_came_of(data: st.DataObject, family: str) -> None:
    """Of any blocks whose rows are multiples of one another, also of zeros and of numbers far apart."""
    layout = LAYOUTS[family]
    powers = st.integers(-40, 20)
    squares = {}
    for param in layout.params:
        matrix = torch.zeros(param.shape)
        if matrix.ndim == 2:
            moved = matrix.movedim(param.dim, 0)
            scale = 2.0 ** torch.tensor(data.draw(st.lists(powers, min_size=4, max_size=4)), dtype=torch.float32)
            for i, rows in enumerate(places(param, full_blueprint(layout), layout)):
                zero = data.draw(st.booleans()) if i == 0 else i % 3 == 0
                column = 0.0 if zero else scale[torch.arange(len(rows)) % 4]
                row = scale[torch.arange(moved.shape[1]) % 3]
                moved[rows] = torch.outer(torch.as_tensor(column).expand(len(rows)), row)
        squares[param.name] = matrix
    parts = factors(layout, squares)
    found = products(layout, parts)
    close(found, squares)
    close(factors(layout, found), parts)
    assert all(torch.equal(found[name] == 0, value == 0) for name, value in squares.items())


def test_what_travels() -> None:
    layout = LAYOUTS["gpt2"]
    assert list(moment_layouts("factored", layout)) == [SQUARES]
    assert moment_layouts("reset", layout) == moment_layouts("client", layout) == {}
    shapes = {param.name: param.shape for param in factor_layout(layout).params}
    assert (shapes["transformer.wte.weight/along"], shapes["transformer.wte.weight/across"]) == ((50,), (1, 24))
    assert shapes["transformer.h.0.attn.c_attn.weight/along"] == (72,)
    assert shapes["transformer.h.0.attn.c_attn.weight/across"] == (12, 24)  # q, k and v of 4 heads
    assert shapes["transformer.h.0.mlp.c_proj.weight/across"] == (6, 24)
    assert shapes["transformer.h.0.mlp.c_proj.bias"] == (24,)


@pytest.mark.parametrize("setting", ["attn", "ffn", "both"])
def test_the_factors_of_gpt2_are_less_than_a_hundredth(setting: Setting) -> None:
    layout = make_layout(GPT2Config().to_dict())
    drawn = draw_round(layout, Division(setting, ((6, 6),) * 4), 0, 1)
    assert 0 < moment_bytes(moment_layouts("factored", layout), drawn) < 0.01 * round_bytes(layout, drawn)


# Training


def squares_by_hand(layout: Layout, squares: State) -> State:
    """Of the whole model."""
    approximated = {}
    for param in layout.params:
        matrix = squares[param.name].double().clone()
        for rows in places(param, full_blueprint(layout), layout) if matrix.ndim == 2 else ():
            block = matrix.movedim(param.dim, 0)[rows]
            matrix.movedim(param.dim, 0)[rows] = torch.outer(block.sum(1), block.sum(0)) / block.sum()
        approximated[param.name] = matrix
    return approximated


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_against_adam_written_out(optimizer: str, tiny_job: Callable[..., Job], tmp_path: Path) -> None:
    """One worker that holds everything: a first moment that is zero when an interval begins and corrected as if it were
    not, a second one that goes on from its rank-1 approximation. eps is large against the noise in gradients that are
    zero on paper (key biases)."""
    settings = ("train.eps=1e-4", "train.weight_decay=0.1", f"train.optimizer={optimizer}", "train.rounds=3")
    job = tiny_job(*settings, "train.workers=1", "blueprint.num_sub=4", "train.optimizer_state=factored")
    ours, config = run(job, start(job), tmp_path), job.config.train
    params = {name: value.double() for name, value in job.initial_state().items()}
    model = GPT2LMHeadModel(job.model_config).double()  # type: ignore[arg-type]
    squares = {name: torch.zeros_like(value) for name, value in params.items()}
    step = 0
    for _ in range(3):
        first = {name: torch.zeros_like(value) for name, value in params.items()}
        for _ in range(2):
            x = torch.tensor(job.corpus.train[job.shard(0).batch(step)], dtype=torch.int64)
            step += 1
            load_state(model, params)
            model.zero_grad()
            logits = model(x, use_cache=False).logits[:, :-1]
            F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                decay, gradient = 0.1 * params[name], parameter.grad
                if optimizer == "adam":
                    gradient = gradient + decay
                first[name] = config.beta1 * first[name] + (1 - config.beta1) * gradient
                squares[name] = config.beta2 * squares[name] + (1 - config.beta2) * gradient**2
                mean, square = first[name] / (1 - config.beta1**step), squares[name] / (1 - config.beta2**step)
                change = mean / (square.sqrt() + config.eps) + (decay if optimizer == "adamw" else 0)
                params[name] = params[name] - config.lr * change
        squares = squares_by_hand(job.layout, squares)
    assert ours.moments is not None
    assert ours.moments.step == 6
    for name, value in params.items():
        torch.testing.assert_close(ours.params[name].double(), value, rtol=1e-4, atol=1e-5, msg=name)
    for name, value in products(job.layout, ours.moments.values[SQUARES]).items():
        torch.testing.assert_close(value.double(), squares[name], rtol=1e-3, atol=1e-9, msg=name)


def test_a_first_interval_is_that_of_a_new_optimiser(tiny_job: Callable[..., Job], tmp_path: Path) -> None:
    """Bit for bit."""
    found = []
    for name in ("reset", "server", "factored"):
        job = tiny_job(f"train.optimizer_state={name}", "train.rounds=1")
        found.append(run(job, start(job), tmp_path / name).params)
    assert all(torch.equal(value, other[name]) for other in found for name, value in found[0].items())


# Replies that are none


def without_one(parts: State) -> State:
    return {name: value for name, value in parts.items() if name != "transformer.wte.weight/along"}


SPOILT: dict[str, tuple[Callable[[State], State], str]] = {
    "negative": (
        lambda parts: {name: value - 1 for name, value in parts.items()},
        "transformer.wte.weight/along has a value of -1, expected 0 to",
    ),
    "not finite": (lambda parts: {name: value / 0 for name, value in parts.items()}, "has values that are not finite"),
    "one missing": (without_one, "parameter 'transformer.wte.weight/along' is missing"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_reply_with_factors_that_are_none_is_dropped(
    fault: str, tiny_job: Callable[..., Job], tmp_path: Path
) -> None:
    spoil, reason = SPOILT[fault]
    job = tiny_job("train.optimizer_state=factored")
    worker, state = Worker(job, MomentShelf(tmp_path)), start(job)
    tasks = plan(job, state)
    mean, without = RoundMean(job, state, tasks), RoundMean(job, state, tasks)
    for task in tasks:
        reply = worker.train(task, *dispatch(job, state, task))
        if task.worker == 1:
            assert reply.moments is not None
            values = {SQUARES: spoil({name: torch.zeros_like(v) for name, v in reply.moments.values[SQUARES].items()})}
            mean.add(task, replace(reply, moments=Moments(reply.moments.step, values)))
            continue
        mean.add(task, reply)
        without.add(task, reply)
    assert reason in mean.report.dropped[1]
    ours, theirs = mean.finish().moments, without.finish().moments
    assert ours is not None
    assert theirs is not None
    assert all(torch.equal(value, theirs.values[SQUARES][name]) for name, value in ours.values[SQUARES].items())

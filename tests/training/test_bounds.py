"""What honest Adam can do, and that one reply beyond it costs a run nothing but that reply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf, isfinite
from pathlib import Path

import pytest
import torch
from flwr.app import Message
from hypothesis import given
from hypothesis import strategies as st
from local_grid import Answer, Bend, LocalGrid, assert_same_run, bent, changed, failing

from twist_fl.blueprint.moments import FIRST, SQUARES
from twist_fl.config.schema import TrainConfig
from twist_fl.federation.strategy import TwistStrategy
from twist_fl.rounds import RoundMean, RunState, dispatch, plan, start
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.training.aggregate import ReplyError
from twist_fl.training.bounds import check_moments, largest_step, moment_ratio, reach
from twist_fl.training.client_state import MomentShelf
from twist_fl.training.interval import Moments, make_optimizer
from twist_fl.training.job import Job
from twist_fl.training.worker import Reply, Task, Worker

MakeJob = Callable[..., Job]
BETAS = [(0.9, 0.999), (0.9, 0.95), (0.5, 0.5), (0.0, 0.9), (0.99, 0.9999), (0.7, 0.5)]
GRADIENTS = st.lists(st.floats(-1e6, 1e6, width=32).map(lambda value: value or 0.0), min_size=1, max_size=30)


@given(GRADIENTS, st.sampled_from(BETAS), st.sampled_from([0.0, 0.1]), st.floats(-3, 3))
def test_no_gradients_take_adam_further(
    gradients: list[float], betas: tuple[float, float], decay: float, at: float
) -> None:
    config = TrainConfig(lr=0.1, beta1=betas[0], beta2=betas[1], optimizer="adamw", weight_decay=decay)
    place = torch.nn.Parameter(torch.tensor([at]))
    optimizer = make_optimizer([place], config)
    for step, gradient in enumerate(gradients, start=1):
        place.grad = torch.tensor([gradient])
        optimizer.step()
        known = optimizer.state[place]
        check_moments({FIRST: {"x": known["exp_avg"]}, SQUARES: {"x": known["exp_avg_sq"]}}, config)
        assert abs(float(place.detach())) <= reach({"x": abs(at)}, config, [0.1] * step)["x"]


@pytest.mark.parametrize("betas", BETAS)
def test_some_gradients_take_adam_nearly_so_far(betas: tuple[float, float]) -> None:
    """The bound is no larger than it must be: these gradients make Cauchy-Schwarz an equality."""
    config = TrainConfig(beta1=betas[0], beta2=betas[1])
    first = squares = 0.0
    for i in range(400):
        gradient = (betas[0] / betas[1]) ** (399 - i)
        first = betas[0] * first + (1 - betas[0]) * gradient
        squares = betas[1] * squares + (1 - betas[1]) * gradient**2
    assert 0.99 * moment_ratio(config) <= first / squares**0.5 <= moment_ratio(config) * 1.000001


def test_where_the_second_beta_forgets_faster_there_is_no_bound() -> None:
    assert largest_step(TrainConfig(beta1=0.9, beta2=0.8)) == inf
    assert largest_step(TrainConfig(beta2=0.0)) == inf


def test_larger_first_moments_are_refused_by_name() -> None:
    values = {FIRST: {"x": torch.tensor([1.0, 1.0])}, SQUARES: {"x": torch.tensor([1.0, 0.0])}}
    with pytest.raises(ReplyError, match=r"^exp_avg of x exceeds 7\.34 roots of exp_avg_sq, as no gradients make it$"):
        check_moments(values, TrainConfig())


# Lies

NAME = "transformer.h.1.mlp.c_fc.weight"


def one_number(reply: Reply) -> Reply:
    value = reply.params[NAME].clone()
    value.view(-1)[7] = 1e8
    return replace(reply, params={**reply.params, NAME: value})


def blocks_times(reply: Reply, by: float = 1e6) -> Reply:
    return replace(reply, params={name: value * by for name, value in reply.params.items()})


def moments_changed(reply: Reply, moment: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Reply:
    assert reply.moments is not None
    values = {name: change(value) for name, value in reply.moments.values[moment].items()}
    return replace(reply, moments=Moments(reply.moments.step, reply.moments.values | {moment: values}))


LIES: dict[str, Callable[[Reply], Reply]] = {
    "one number": one_number,
    "blocks": blocks_times,
    "a hundredfold": lambda reply: blocks_times(reply, -100.0),
    "no squares": lambda reply: moments_changed(reply, SQUARES, torch.zeros_like),
    "large moments": lambda reply: moments_changed(reply, FIRST, lambda value: value + 1e3),
}


def run_without_one(bend: Bend, tiny_job: MakeJob, folder: Path) -> RunState:
    """A run in which worker 1's reply in round 2 is bent, and does not count."""
    job = tiny_job("train.optimizer_state=server", "train.rounds=3", "flower.wait_for_nodes=0.05", "eval.every=0")
    run = RunFolder(folder)
    run.create(job)
    ended = TwistStrategy(job, run).run(LocalGrid(3, bent(2, [1], bend)))
    rounds = run.events("round")
    assert [list(event["dropped"]) for event in rounds] == [[], ["1"], []]
    assert isfinite(rounds[-1]["loss"])
    return ended


@pytest.fixture(scope="module")
def without_one(tiny_job: MakeJob, tmp_path_factory: pytest.TempPathFactory) -> RunState:
    def fails(task: Task, message: Message, answer: Answer) -> list[Message]:
        return [failing("no")(message)]

    return run_without_one(fails, tiny_job, tmp_path_factory.mktemp("fails") / "run")


@pytest.mark.parametrize("lie", LIES)
def test_a_poisoned_reply_is_dropped_and_the_run_ends_as_without_it(
    lie: str, without_one: RunState, tiny_job: MakeJob, tmp_path: Path
) -> None:
    def lies(task: Task, message: Message, answer: Answer) -> list[Message]:
        return [changed(task, message, answer(), LIES[lie])]

    assert_same_run(run_without_one(lies, tiny_job, tmp_path / "run"), without_one)


@pytest.mark.parametrize(
    ("rule", "optimizer_state"),
    [("mean", "reset"), ("mean", "server"), ("median", "factored"), ("trimmed_mean", "server")],
)
def test_the_worst_reply_that_counts_leaves_the_others_honest(
    rule: str, optimizer_state: str, tiny_job: MakeJob, tmp_path: Path
) -> None:
    """A liar that goes to the bound in every round: nobody else is ever refused, and nothing ceases to be finite."""
    job = tiny_job(f"train.optimizer_state={optimizer_state}", f"aggregate.rule={rule}", "train.rounds=8")
    worker, state = Worker(job, MomentShelf(tmp_path)), start(job)
    for _ in range(8):
        tasks = plan(job, state)
        mean = RoundMean(job, state, tasks)
        for task in tasks:
            reply = worker.train(task, *dispatch(job, state, task))
            if task.worker == 1:
                far = reach({name: float(value.abs().max()) for name, value in state.params.items()}, job.config.train,
                            [job.config.train.lr] * task.num_batches)  # fmt: skip
                signs = torch.Generator().manual_seed(task.round)
                lie = {n: far[n] * 0.999 * (2.0 * torch.randint(2, v.shape, generator=signs) - 1)
                       for n, v in reply.params.items()}  # fmt: skip
                reply = replace(reply, params=lie)
                if optimizer_state == "server":
                    reply = moments_changed(reply, SQUARES, lambda value: value.clamp(1e-12))
                    assert reply.moments is not None
                    squares, ratio = reply.moments.values[SQUARES], moment_ratio(job.config.train)
                    first = {name: ratio * value.sqrt() for name, value in squares.items()}
                    reply = replace(reply, moments=Moments(reply.moments.step, {FIRST: first, SQUARES: squares}))
            mean.add(task, reply)
        state = mean.finish()
        assert (mean.report.dropped, mean.report.answered) == ({}, [0, 1, 2])
        assert isfinite(mean.report.loss)

"""Outer optimisers: Flower's own on full blueprints, the mean at a neutral setting, nothing where nobody held it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvgM
from local_grid import LocalGrid, assert_same_run, same
from torch import nn

from twist_fl.federation.strategy import TwistStrategy
from twist_fl.model.subnet import State
from twist_fl.rounds import RunState, run, start, twist_round
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.training.client_state import MomentShelf
from twist_fl.training.job import Job
from twist_fl.training.outer_optimizer import OuterState, outer_step
from twist_fl.training.worker import Worker

MakeJob = Callable[..., Job]
RandomState = Callable[..., State]
ROUNDS = 4


def settings(optimizer: str, lr: float = 0.7, momentum: float = 0.8) -> tuple[str, ...]:
    return (f"aggregate.optimizer={optimizer}", f"aggregate.server_lr={lr}", f"aggregate.momentum={momentum}")


def means(job: Job, random_state: RandomState) -> list[State]:
    return [random_state(job.layout, seed) for seed in range(ROUNDS)]


def whole(job: Job) -> Mapping[str, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    return {param.name: np.ones(param.num_blocks, bool) for param in job.layout.params}


def ours(job: Job, found: list[State]) -> list[State]:
    """The parameters after each round whose mean is one of `found`, from the job's first."""
    state, after = start(job), []
    params, outer = state.params, state.outer
    assert outer is not None
    for mean in found:
        before, params = params, {name: value.clone() for name, value in mean.items()}
        outer_step(job.config.aggregate, job.layout, before, params, whole(job), outer)
        after.append(params)
    return after


def arrays(state: State) -> ArrayRecord:
    return ArrayRecord({name: Array(value.numpy()) for name, value in state.items()})


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_against_flowers_fedavgm_and_fedadam(optimizer: str, tiny_job: MakeJob, random_state: RandomState) -> None:
    job = tiny_job(*settings(optimizer))
    theirs = (
        FedAvgM(server_learning_rate=0.7, server_momentum=0.8)
        if optimizer == "momentum"
        else FedAdam(eta=0.7, beta_1=0.8, beta_2=0.99, tau=1e-3)
    )
    current, found = start(job).params, means(job, random_state)
    for round_, (mean, mine) in enumerate(zip(found, ours(job, found), strict=True), 1):
        record = arrays(current)
        theirs.current_arrays = record if optimizer == "momentum" else {k: v.numpy() for k, v in record.items()}
        content = RecordDict({"arrays": arrays(mean), "metrics": MetricRecord({"num-examples": 1})})
        new, _ = theirs.aggregate_train(round_, [Message(content, dst_node_id=1, message_type="train")])
        assert new is not None
        current = {name: torch.from_numpy(array.numpy().copy()).float() for name, array in new.items()}
        for name, value in mine.items():
            torch.testing.assert_close(value, current[name], rtol=2e-5, atol=1e-5)


def test_nesterov_is_torchs_own(tiny_job: MakeJob, random_state: RandomState) -> None:
    """As in DiLoCo: SGD on the change with its sign turned."""
    job = tiny_job(*settings("nesterov"))
    theirs = {name: nn.Parameter(value.clone()) for name, value in start(job).params.items()}
    sgd, found = torch.optim.SGD(theirs.values(), lr=0.7, momentum=0.8, nesterov=True), means(job, random_state)
    for mean, mine in zip(found, ours(job, found), strict=True):
        for name, parameter in theirs.items():
            parameter.grad = parameter.detach() - mean[name]
        sgd.step()
        for name, parameter in theirs.items():
            torch.testing.assert_close(mine[name], parameter.detach(), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["momentum", "nesterov"])
def test_the_neutral_setting_is_the_mean_bit_for_bit(optimizer: str, tiny_job: MakeJob, tmp_path: Path) -> None:
    plain, neutral = tiny_job(), tiny_job(*settings(optimizer, lr=1, momentum=0))
    assert same(run(plain, start(plain), tmp_path).params, run(neutral, start(neutral), tmp_path).params)


def test_what_nobody_held_neither_moves_nor_remembers(tiny_job: MakeJob, tmp_path: Path) -> None:
    job = tiny_job(*settings("adam"), "train.workers=2")
    state = start(job)
    for _ in range(2):
        before = state
        assert before.outer is not None
        worker = Worker(job, MomentShelf(tmp_path))
        blueprints = job.blueprints(state.round + 1, state.debt)[:1]
        state, report = twist_round(job, state, [worker, Silent(job, MomentShelf(tmp_path))])
        assert report.answered == [0]
        assert state.outer is not None
        for param in job.layout.params:
            ids = job.layout.held(param, blueprints[0])
            held = np.isin(range(param.num_blocks), range(param.num_blocks) if ids is None else ids)
            shape = param.blocked(param.num_blocks)
            pairs = [
                (before.params, state.params),
                *zip(before.outer.values.values(), state.outer.values.values(), strict=True),
            ]
            for old, new in pairs:
                one, other = (each[param.name].view(shape)[:, :, ~torch.from_numpy(held)] for each in (old, new))
                assert torch.equal(one, other), param.name
            moved = state.outer.rounds[param.name] - before.outer.rounds[param.name]
            assert moved.tolist() == held.astype(int).tolist()


class Silent(Worker):
    """Its reply never counts."""

    def train(self, *given: object, **more: object):  # type: ignore[no-untyped-def]
        reply = super().train(*given, **more)  # type: ignore[arg-type]
        reply.params.popitem()
        return reply


@pytest.mark.parametrize("variant", ["true", "hybrid"])
@pytest.mark.parametrize("optimizer", ["nesterov", "adam"])
def test_the_app_and_a_resumed_run_are_the_same(
    optimizer: str, variant: str, tiny_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})  # evaluation takes one core, too
    job = tiny_job(
        *settings(optimizer), f"train.variant={variant}", "train.rounds=3", "eval.every=0", "flower.wait_for_nodes=0.05"
    )
    once = run(job, start(job), tmp_path / "once")
    cut = RunFolder(tmp_path / "cut")
    cut.create(job)
    cut.save(run(job, start(job), tmp_path / "half", num_rounds=2), job.model_config)
    loaded = cut.load()
    assert loaded is not None
    assert_same_run(run(job, loaded, tmp_path / "half"), once)
    folder = RunFolder(tmp_path / "run")
    folder.create(job)
    app = TwistStrategy(job, folder).run(LocalGrid(3 if variant == "true" else 2))
    assert_same_run(app, once)
    assert_same_outer(app, once)


def assert_same_outer(one: RunState, other: RunState) -> None:
    found = [state.outer or OuterState() for state in (one, other)]
    assert all(same(found[0].values[name], found[1].values[name]) for name in found[0].values)
    assert all(np.array_equal(found[0].rounds[name], counts) for name, counts in found[1].rounds.items())
    assert found[0].values


def test_not_for_ddp(tiny_job: MakeJob, tmp_path: Path) -> None:
    """Its one step is Adam's: a preset's outer optimiser, which others take, changes nothing there."""
    jobs = [tiny_job("algorithm=ddp", *words) for words in ((), ("aggregate.optimizer=momentum",))]
    assert start(jobs[1]).outer is None
    plain, other = (run(job, start(job), tmp_path) for job in jobs)
    assert same(plain.params, other.params)

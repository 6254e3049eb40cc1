"""An interval of local training against a plain PyTorch loop, bit for bit (spec, section 5)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2LMHeadModel

from twist_fl.blueprint.moments import MOMENTS
from twist_fl.config.schema import TrainConfig
from twist_fl.model.subnet import State, get_state, load_state
from twist_fl.training.interval import Moments, train_interval
from twist_fl.training.job import Job

RandomState = Callable[..., State]
CONFIG = TrainConfig(lr=1e-2)


@pytest.fixture
def job(tiny_job: Callable[..., Job]) -> Job:
    return tiny_job("model.dropout=0.1")


def batches(job: Job, num: int) -> list[torch.Tensor]:
    """The second batch is smaller, as at the end of an epoch."""
    windows = torch.tensor(job.corpus.train[: 2 * num], dtype=torch.int64)
    return [batch[:1] if position == 1 else batch for position, batch in enumerate(torch.split(windows, 2))]


def new_model(job: Job, state: State) -> nn.Module:
    model = GPT2LMHeadModel(job.model_config)  # type: ignore[arg-type]
    load_state(model, state)
    return model


def plain_adam(model: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)


def plain_steps(model: nn.Module, optimizer: torch.optim.Adam, found: list[torch.Tensor], seed: int) -> list[float]:
    torch.manual_seed(seed)
    model.train()
    losses = []
    for x in found:
        logits = model(x, use_cache=False).logits  # a cache lays keys and values elsewhere, which may round otherwise
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), x[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    return all(torch.equal(value, get_state(theirs)[name]) for name, value in get_state(ours).items())


def test_against_a_plain_loop(job: Job, random_state: RandomState) -> None:
    ours, theirs = (new_model(job, random_state(job.layout)) for _ in range(2))
    interval = train_interval(ours, batches(job, 3), CONFIG, seed=5)
    losses = plain_steps(theirs, plain_adam(theirs), batches(job, 3), seed=5)
    assert same(ours, theirs)
    # 2, 1 and 2 windows of 16 tokens: the loss is a token mean.
    assert interval.loss == pytest.approx((2 * losses[0] + losses[1] + 2 * losses[2]) / 5, rel=1e-7)
    assert (interval.num_tokens, interval.num_batches, interval.moments.step) == (5 * 15, 3, 3)


def test_moments_continue_the_optimiser_bit_for_bit(job: Job, random_state: RandomState) -> None:
    ours, theirs = (new_model(job, random_state(job.layout)) for _ in range(2))
    optimizer = plain_adam(theirs)
    moments = None
    for seed in range(3):
        moments = train_interval(ours, batches(job, 2), CONFIG, seed, moments).moments
        plain_steps(theirs, optimizer, batches(job, 2), seed)
    assert same(ours, theirs)
    assert moments is not None
    assert moments.step == 6
    for name, parameter in theirs.named_parameters():
        for moment in MOMENTS:
            assert torch.equal(moments.values[moment][name], optimizer.state[parameter][moment])


def test_without_moments_the_optimiser_starts_anew(job: Job, random_state: RandomState) -> None:
    ours, theirs, continued = (new_model(job, random_state(job.layout)) for _ in range(3))
    moments = None
    for seed in range(2):
        train_interval(ours, batches(job, 2), CONFIG, seed)
        plain_steps(theirs, plain_adam(theirs), batches(job, 2), seed)
        moments = train_interval(continued, batches(job, 2), CONFIG, seed, moments).moments
    assert same(ours, theirs)
    assert not same(ours, continued)


def test_moments_of_some_parameters_leave_the_others_new(job: Job, random_state: RandomState) -> None:
    """As with optimizer_state=client: the divided parameters come fresh, with their own step count of 0."""
    ours, theirs = (new_model(job, random_state(job.layout)) for _ in range(2))
    kept = {name for name in get_state(ours) if ".attn." not in name}
    first = train_interval(ours, batches(job, 2), CONFIG, 0).moments
    some = Moments(first.step, {moment: {name: first.values[moment][name] for name in kept} for moment in MOMENTS})
    train_interval(ours, batches(job, 2), CONFIG, 1, some)

    old = plain_adam(theirs)
    plain_steps(theirs, old, batches(job, 2), 0)
    new = plain_adam(theirs)
    for name, parameter in theirs.named_parameters():
        if name in kept:
            new.state[parameter] = old.state[parameter]
    plain_steps(theirs, new, batches(job, 2), 1)
    assert same(ours, theirs)


def test_given_moments_go_on_where_they_lie(job: Job, random_state: RandomState) -> None:
    model = new_model(job, random_state(job.layout))
    moments = train_interval(model, batches(job, 2), CONFIG, 0).moments
    after = train_interval(model, batches(job, 2), CONFIG, 1, moments).moments
    assert (moments.step, after.step) == (2, 4)
    assert all(after.values[m][name] is value for m in MOMENTS for name, value in moments.values[m].items())


def test_every_knob_of_adam_is_used(job: Job, random_state: RandomState) -> None:
    changed = [{"lr": 2e-2}, {"beta1": 0.5}, {"beta2": 0.5}, {"eps": 1e-2}, {"weight_decay": 0.1}]
    base = new_model(job, random_state(job.layout))
    train_interval(base, batches(job, 2), CONFIG, 0)
    for knob in changed:
        model = new_model(job, random_state(job.layout))
        train_interval(model, batches(job, 2), TrainConfig(**({"lr": 1e-2} | knob)), 0)  # type: ignore[arg-type]
        assert not same(model, base), knob


def test_the_seed_fixes_the_dropout(job: Job, random_state: RandomState) -> None:
    models = [new_model(job, random_state(job.layout)) for _ in range(3)]
    for model, seed in zip(models, (3, 3, 4), strict=True):
        torch.rand(1)  # whatever was drawn before does not matter
        train_interval(model, batches(job, 2), CONFIG, seed)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def test_gradients_do_not_outlive_the_interval(job: Job, random_state: RandomState) -> None:
    model = new_model(job, random_state(job.layout))
    train_interval(model, batches(job, 1), CONFIG, 0)
    assert all(parameter.grad is None for parameter in model.parameters())

"""Perplexity against Hugging Face's own loss (spec, section 8)."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from math import exp, inf, log
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel, PreTrainedModel

from twist_fl.blueprint.drawing import draw_ticket, full_blueprint
from twist_fl.data.corpus import Windows
from twist_fl.model.subnet import State, lend_state, load_state, take_back
from twist_fl.tickets.evaluate import mean_nll, perplexity, subnet_perplexity, ticket_distribution
from twist_fl.training.interval import next_token_loss
from twist_fl.training.job import Job

RandomState = Callable[..., State]


@pytest.fixture
def job(tiny_job: Callable[..., Job]) -> Job:
    return tiny_job()


@pytest.fixture
def windows(job: Job) -> Windows:
    return job.corpus.test[:7]


def plain_model(job: Job, state: State) -> PreTrainedModel:
    model = GPT2LMHeadModel(job.model_config)  # type: ignore[arg-type]
    load_state(model, state)
    model.train(False)
    return model


def losses(model: PreTrainedModel, windows: Windows) -> list[float]:
    """Hugging Face's mean loss of each window alone."""
    model.train(False)
    rows = [torch.tensor(row[None], dtype=torch.int64) for row in windows]
    with torch.inference_mode():
        return [float(model(input_ids=row, labels=row).loss) for row in rows]


def test_a_model_that_is_lent_a_state_holds_no_copy_of_it_and_gives_it_back(
    job: Job, windows: Windows, random_state: RandomState
) -> None:
    state, models = random_state(job.layout), job.models(device="cpu")
    whole = {value.data_ptr(): value.clone() for value in state.values()}
    with models.lent(full_blueprint(job.layout), state) as model:
        assert {parameter.data_ptr() for parameter in model.parameters()} == whole.keys()
        found = perplexity(model, windows, 4)
    assert not {parameter.data_ptr() for parameter in model.parameters()} & whole.keys()
    assert found == perplexity(plain_model(job, state), windows, 4)
    load_state(model, state)  # it has room of its own again
    assert all(value.equal(whole[value.data_ptr()]) for value in state.values())


def present(tensor: torch.Tensor) -> int:
    """How many of its pages take up memory."""
    first, last = -(-tensor.data_ptr() // mmap.PAGESIZE), (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE
    with Path("/proc/self/pagemap").open("rb") as pages:
        pages.seek(8 * first)
        return int((np.frombuffer(pages.read(8 * (last - first)), np.uint64) >> 63).sum())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which pages are there")
def test_a_model_that_has_given_back_what_was_lent_takes_up_no_room() -> None:
    model = nn.ParameterList([torch.empty(2**16) for _ in range(8)])
    state = {name: torch.ones(2**16) for name, _ in model.named_parameters()}
    used = [torch.ones(2**16) for _ in range(16)]
    lend_state(model, state)
    assert all(map(present, state.values()))
    del used  # malloc keeps it, and gives it to the next of this size
    take_back(model)
    assert not sum(map(present, model))


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 100])
def test_against_hugging_face_window_by_window(
    batch_size: int, job: Job, windows: Windows, random_state: RandomState
) -> None:
    model = plain_model(job, random_state(job.layout))
    theirs = losses(model, windows)
    assert mean_nll(model, windows, batch_size) == pytest.approx(fmean(theirs), rel=1e-6)
    assert perplexity(model, windows, batch_size) == pytest.approx(exp(fmean(theirs)), rel=1e-5)
    # A mean of batch means, the usual mistake, is told apart by the uneven last batch.
    if batch_size in (3, 4):
        batch_means = [fmean(theirs[start : start + batch_size]) for start in range(0, len(theirs), batch_size)]
        assert abs(fmean(batch_means) / fmean(theirs) - 1) > 1e-4


def test_loss_against_hugging_face_with_gradients(job: Job, windows: Windows, random_state: RandomState) -> None:
    rows = torch.tensor(np.array(windows), dtype=torch.int64)
    ours, theirs = (plain_model(job, random_state(job.layout)).double() for _ in range(2))
    torch.autograd.backward(next_token_loss(ours, rows))
    torch.autograd.backward(theirs(input_ids=rows, labels=rows).loss)
    # Both compute the loss itself in float32.
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_dropout_is_off_and_no_gradient_is_kept(tiny_job: Callable[..., Job], random_state: RandomState) -> None:
    job = tiny_job("model.dropout=0.5")
    model = plain_model(job, random_state(job.layout)).train()
    assert mean_nll(model, job.corpus.test[:7], 7) == mean_nll(model, job.corpus.test[:7], 7)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_full_model_is_evaluated_without_scale(job: Job, windows: Windows, random_state: RandomState) -> None:
    state = random_state(job.layout)
    ours = subnet_perplexity(job.models("cpu"), state, [full_blueprint(job.layout)], windows, 4)
    assert ours == perplexity(plain_model(job, state), windows, 4)


def test_subnet_perplexity_averages_the_workers_losses(job: Job, windows: Windows, random_state: RandomState) -> None:
    state, drawn, models = random_state(job.layout), job.blueprints(1), job.models("cpu")
    each = [perplexity(models.load_sliced(blueprint, state), windows, 4) for blueprint in drawn]
    assert len(set(each)) == 3
    expected = exp(fmean(log(value) for value in each))
    assert subnet_perplexity(models, state, drawn, windows, 4) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("factor", [1e30, float("nan")])
def test_a_diverged_model_has_an_infinite_perplexity(
    factor: float, job: Job, windows: Windows, random_state: RandomState
) -> None:
    state = {name: factor * value for name, value in random_state(job.layout).items()}
    assert subnet_perplexity(job.models("cpu"), state, job.blueprints(1), windows, 4) == inf
    assert perplexity(plain_model(job, state), windows, 4) == inf


def test_tickets_are_fixed_by_their_seed(job: Job, windows: Windows, random_state: RandomState) -> None:
    state = random_state(job.layout)

    def distribution(seed: int, tickets: int = 4) -> tuple[float, ...]:
        models = job.models("cpu")
        return ticket_distribution(
            models, state, job.division, (2, 1), windows, tickets=tickets, seed=seed, batch_size=4
        ).perplexities

    assert distribution(0) == distribution(0)
    assert distribution(0, 2) == distribution(0)[:2]
    assert len({*distribution(0), *distribution(1)}) == 8


def test_a_distribution_says_what_was_drawn(job: Job, windows: Windows, random_state: RandomState) -> None:
    state, done = random_state(job.layout), []
    models = job.models("cpu")
    found = ticket_distribution(
        models, state, job.division, (2, 1), windows, tickets=3, seed=0, batch_size=4, on_ticket=lambda: done.append(1)
    )
    tickets = [draw_ticket(job.layout, job.division, (2, 1), 0, draw) for draw in range(3)]
    expected = [perplexity(models.load_sliced(ticket, state), windows, 4) for ticket in tickets]
    assert found.perplexities == tuple(expected)
    assert found.num_params == job.layout.num_params(tickets[0])
    assert len(done) == 3
    summary = found.summary()
    assert (summary["mean"], summary["std"]) == (fmean(expected), stdev(expected))
    assert (summary["min"], summary["max"]) == (min(expected), max(expected))
    assert summary["num_sub"] == (2, 1)

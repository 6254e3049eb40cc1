"""The chunked cross-entropy against the plain one: value, gradients, memory (issue: logits never exist whole)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from twist_fl.model.subnet import State
from twist_fl.rounds import run, start
from twist_fl.training.interval import next_token_loss
from twist_fl.training.job import Job
from twist_fl.training.loss import linear_cross_entropy

RandomState = Callable[..., State]


def problem(num: int, d: int = 5, vocab: int = 11, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num)
    hidden = torch.randn(num, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return [hidden, weight, torch.randint(vocab, (num,), generator=generator)]


def with_gradients(loss: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    return [loss.detach(), *torch.autograd.grad(3 * loss, [hidden, weight])]


@given(st.integers(1, 40), st.integers(1, 50))
def test_against_the_plain_loss_in_float64(num: int, chunk: int) -> None:
    hidden, weight, targets = problem(num)
    ours = with_gradients(linear_cross_entropy(hidden, weight, targets, chunk), hidden, weight)
    plain = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    for one, other in zip(ours, with_gradients(plain, hidden, weight), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_without_gradients_it_is_the_same_number() -> None:
    hidden, weight, targets = problem(23, dtype=torch.float32)
    trained = linear_cross_entropy(hidden, weight, targets, 4)
    with torch.inference_mode():
        evaluated = linear_cross_entropy(hidden, weight, targets, 4)
    assert evaluated.dtype == torch.float32
    assert torch.equal(evaluated, trained.detach())


def test_under_autocast_it_is_the_plain_loss_under_autocast() -> None:
    """The products are bfloat16's on both sides; only the order of the sums differs."""
    hidden, weight, targets = problem(64, 32, 50, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, targets, 16)
        plain = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
    pairs = list(zip(with_gradients(ours, hidden, weight), with_gradients(plain, hidden, weight), strict=True))
    assert pairs[0][0].dtype == pairs[2][0].dtype == torch.float32
    torch.testing.assert_close(*pairs[0], rtol=1e-6, atol=0)
    for one, other in pairs[1:]:
        assert float((one - other).norm() / other.norm()) < 1e-2
    exact = F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")
    assert 0 < abs((ours / exact).item() - 1) < 1e-2


def test_a_second_backward_is_refused() -> None:
    hidden, weight, targets = problem(9)
    loss = linear_cross_entropy(hidden, weight, targets, 4)
    loss.backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()  # type: ignore[no-untyped-call]


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize(("chunk", "expected"), [(16, 16), (1000, 128)])
def test_the_logits_never_exist_whole(chunk: int, expected: int) -> None:
    hidden, weight, targets = problem(128, 2, 1000, torch.float32)
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, targets, chunk).backward()  # type: ignore[no-untyped-call]
    assert largest.numel == expected * 1000


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_models_loss_does_not_depend_on_the_chunk(
    reduction: str, tiny_job: Callable[..., Job], random_state: RandomState
) -> None:
    """45 tokens: in chunks of 7 against the plain loss of Hugging Face's own logits; the head is tied."""
    job = tiny_job()
    windows = torch.tensor(job.corpus.train[:3], dtype=torch.int64)
    found = []
    for chunk in (7, 45):
        model = job.models("cpu").load_sliced(job.blueprints(1)[0], random_state(job.layout)).double()
        loss = next_token_loss(model.train(False), windows, reduction, chunk)
        loss.backward()  # type: ignore[no-untyped-call]
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


def test_training_runs_in_chunks(tiny_job: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory) -> None:
    """The knob reaches the step: the same run to rounding, not to the bit."""
    found = []
    for chunk in (7, 256):
        job = tiny_job(f"train.loss_chunk={chunk}", "train.eps=1e-3", "train.rounds=1")
        found.append(run(job, start(job), tmp_path_factory.mktemp("run")).params)
    assert not all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-5, atol=2e-6, msg=name)


def test_a_head_with_a_bias_is_not_computed_wrongly(tiny_job: Callable[..., Job]) -> None:
    job = tiny_job()
    model = job.models("cpu").load_sliced(job.blueprints(1)[0], job.initial_state())
    model.lm_head.bias = torch.nn.Parameter(torch.ones(job.layout.params[0].shape[0]))
    with pytest.raises(AssertionError, match="without a bias"):
        next_token_loss(model, torch.zeros(1, 16, dtype=torch.int64), chunk=4)

"""How much each block matters on training text: `blueprint.policy=importance` chooses the common blocks by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from twist_fl.blueprint.architectures import Kind
from twist_fl.blueprint.blocks import Param
from twist_fl.blueprint.division import Purpose, Scores, generator
from twist_fl.blueprint.drawing import full_blueprint
from twist_fl.data.corpus import Windows
from twist_fl.model.subnet import State
from twist_fl.training.interval import next_token_loss
from twist_fl.training.job import Job

TERMS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "fisher": lambda parameter, gradient: gradient.double().square(),
    "taylor": lambda parameter, gradient: parameter.double() * gradient,
}
"""Whose sum over a block's parameters is, in absolute value, its score for one window: the diagonal of the empirical
Fisher information; or to first order the change of the loss if the block were zero (Michel et al., 2019)."""


def block_scores(job: Job, params: Mapping[str, torch.Tensor], windows: Windows, score: str = "fisher") -> Scores:
    """The score of each block of each divided (kind, layer), summed over `windows`, (N, T) token ids.

    Each window has its own gradient, of its mean loss, without dropout.
    """
    places = _divided(job)
    total = {place: torch.zeros(found[0].num_blocks, dtype=torch.float64) for place, found in places.items()}
    model = job.models().load(full_blueprint(job.layout), params)
    model.train(False)
    named = dict(model.named_parameters())
    with _threads(job.config.train.threads or 1):
        for window in windows:
            model.zero_grad(set_to_none=True)
            batch = torch.tensor(window[None], dtype=torch.int64, device=model.device)
            next_token_loss(model, batch, chunk=job.config.train.loss_chunk).backward()  # type: ignore[no-untyped-call]
            for place, of_blocks in places.items():
                one = torch.stack([_by_block(param, named[param.name], score) for param in of_blocks])
                total[place] += one.sum(0).abs()
    return {place: tuple(blocks.tolist()) for place, blocks in total.items()}


def _divided(job: Job) -> dict[tuple[Kind, int], list[Param]]:
    """The parameters of each divided (kind, layer)."""
    found: dict[tuple[Kind, int], list[Param]] = {}
    for param in job.division.params(job.layout):
        assert param.kind is not None and param.layer is not None
        found.setdefault((param.kind, param.layer), []).append(param)
    return found


def _by_block(param: Param, parameter: nn.Parameter, score: str) -> torch.Tensor:
    """The sum over each block's entries of one parameter: (blocks,), float64, on the CPU."""
    assert parameter.grad is not None
    terms = TERMS[score](parameter.detach(), parameter.grad)
    return terms.reshape(param.blocked(param.num_blocks)).sum((0, 1, 3)).cpu()


def score_blocks(job: Job, params: State, round_: int) -> Scores:
    """The scores after `round_` rounds, by the job's settings, on training windows that depend on seed and round."""
    blueprint, train = job.config.blueprint, job.corpus.train
    rng = generator(job.config.seed, Purpose.SCORE, round_, 0)
    chosen = rng.permutation(len(train))[: blueprint.score_windows]
    return block_scores(job, params, train[np.sort(chosen)], blueprint.score)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """As many as a worker has, wherever this is called: the order of a sum depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)

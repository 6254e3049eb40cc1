"""One interval of local training (paper, section 5; spec: Adam, new at every interval by default)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from twist_fl.blueprint.blocks import Layout
from twist_fl.blueprint.moments import FIRST, MOMENTS, SQUARES
from twist_fl.config.schema import TrainConfig
from twist_fl.model.subnet import State, get_state
from twist_fl.training.loss import LOSS_CHUNK, SoftTargets, linear_cross_entropy
from twist_fl.training.precision import forward_precision, product_precision


@dataclass
class Moments:
    """Adam's state: of its two moments those that are known, each of some parameters by name or of their factors, and
    the steps they have seen."""

    step: int = 0
    values: dict[str, State] = field(default_factory=lambda: {name: {} for name in MOMENTS})

    def clone(self) -> Moments:
        return Moments(
            self.step, {moment: {n: v.clone() for n, v in each.items()} for moment, each in self.values.items()}
        )


@dataclass(frozen=True)
class Interval:
    """What an interval did: mean loss in nats per predicted token, its result, and the optimiser's state at its end."""

    loss: float
    num_tokens: int
    num_batches: int
    result: State
    """The model's parameters as trained, or with DDP their gradient; not copied."""
    moments: Moments


def next_token_loss(
    model: nn.Module,
    windows: torch.Tensor,
    reduction: str = "mean",
    chunk: int = LOSS_CHUNK,
    soft: SoftTargets | None = None,
) -> torch.Tensor:
    """Cross-entropy of each window's tokens 1..T-1 given those before; `windows` is (B, T) int64.

    Up to `chunk` predicted tokens it is the model's own forward and the plain loss; more go through the head in
    chunks, and their logits never exist whole. With `soft` the gradient is that of the cross-entropy with it, and the
    value stays.
    """
    causal_lm: Any = model
    targets = windows[:, 1:].flatten()
    if targets.numel() <= chunk:
        logits = causal_lm(windows, use_cache=False).logits[:, :-1].flatten(0, 1)  # (B (T-1), V)
        wide = torch.promote_types(logits.dtype, torch.float32)
        loss = F.cross_entropy(logits.to(wide), targets, reduction=reduction)
        if soft is None:
            return loss
        mixed = soft.loss(logits.log_softmax(1, dtype=wide)) / (1 if reduction == "sum" else targets.numel())
        return loss.detach() + (mixed - mixed.detach())
    hidden = causal_lm.base_model(windows, use_cache=False).last_hidden_state  # (B, T, d)
    head = causal_lm.get_output_embeddings()
    assert head.bias is None, "the chunked loss knows heads without a bias only"
    total = linear_cross_entropy(hidden[:, :-1].flatten(0, 1), head.weight, targets, chunk, soft)
    return total if reduction == "sum" else total / targets.numel()


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Adam:
    """Of the same two moments, whichever it is."""
    make = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return make(
        parameters,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def _step(optimizer: torch.optim.Optimizer, config: TrainConfig, rate: float) -> None:
    """With gradients no longer than config.clip_norm, at that learning rate; nothing here waits for the device."""
    (group,) = optimizer.param_groups
    if config.clip_norm is not None:
        nn.utils.clip_grad_norm_(group["params"], config.clip_norm)
    group["lr"] = rate
    optimizer.step()


def train_interval(
    model: nn.Module,
    batches: Iterable[torch.Tensor],
    config: TrainConfig,
    seed: int,
    moments: Moments | None = None,
    rates: Iterable[float] | None = None,
    soft: Iterable[SoftTargets | None] | None = None,
) -> Interval:
    """Train `model` in place on `batches`, each (B, T) int64 on the model's device, at `rates`, else at config.lr.

    `moments` may cover any subset of the parameters; the others start anew. Where they are second moments only, the
    first are zeros as old as they, so that the first steps are short. Those that lie on the model's device change in
    place. `soft` has a teacher's targets for each batch. `seed` fixes the dropout. The host never waits for the device
    between the first batch and the last: it reads the next one meanwhile.
    """
    torch.manual_seed(seed)
    model.train()
    device = next(model.parameters()).device
    named = dict(model.named_parameters())
    optimizer = make_optimizer(named.values(), config)
    if moments is not None:
        _restore(optimizer, named, moments)
    loss_sum, num_tokens, num_batches = torch.zeros((), dtype=torch.float64, device=device), 0, 0
    with product_precision(config.precision, device):
        every = zip(batches, rates or repeat(config.lr), soft or repeat(None), strict=False)
        for windows, rate, targets in every:
            predicted = windows.shape[0] * (windows.shape[1] - 1)
            loss_sum += _backward(model, windows, config, targets) * predicted
            _step(optimizer, config, rate)
            num_tokens += predicted
            num_batches += 1
    after = _collect(optimizer, named, (moments.step if moments else 0) + num_batches)
    model.zero_grad(set_to_none=True)
    return Interval(float(loss_sum) / max(1, num_tokens), num_tokens, num_batches, get_state(model), after)


def batch_gradient(
    model: nn.Module, windows: torch.Tensor, config: TrainConfig, seed: int, soft: SoftTargets | None = None
) -> Interval:
    """What a worker of DDP does: the gradient of one batch's mean loss; `windows` is (B, T) int64."""
    torch.manual_seed(seed)
    model.train()
    with product_precision(config.precision, windows.device):
        loss = _backward(model, windows, config, soft)
    gradient = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    model.zero_grad(set_to_none=True)
    return Interval(float(loss), windows.shape[0] * (windows.shape[1] - 1), 1, gradient, Moments())


def adam_step(
    params: State, gradient: State, moments: Moments, config: TrainConfig, rate: float
) -> tuple[State, Moments]:
    """What the server of DDP does with the workers' mean gradient: one step. What is given is moved, all of it."""
    named = {name: nn.Parameter(value) for name, value in params.items()}
    for name, parameter in named.items():
        parameter.grad = gradient[name]
    optimizer = make_optimizer(named.values(), config)
    _restore(optimizer, named, moments)
    _step(optimizer, config, rate)
    return {name: parameter.detach() for name, parameter in named.items()}, _collect(optimizer, named, moments.step + 1)


def zero_moments(layouts: Mapping[str, Layout]) -> Moments:
    """The state of an Adam that has seen no step: of each moment what its layout is made of."""
    return Moments(0, {name: {p.name: torch.zeros(p.shape) for p in layout.params} for name, layout in layouts.items()})


def _backward(model: nn.Module, windows: torch.Tensor, config: TrainConfig, soft: SoftTargets | None) -> torch.Tensor:
    """The gradients of the mean loss of one batch; that loss, float64, still on the device."""
    with forward_precision(config.precision, windows.device):
        loss = next_token_loss(model, windows, chunk=config.loss_chunk, soft=soft)
    model.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach().double()


def _restore(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], moments: Moments) -> None:
    for name in moments.values[SQUARES]:
        parameter = named[name]
        known = {moment: values[name].to(parameter.device) for moment, values in moments.values.items()}
        step = torch.tensor(float(moments.step), device=parameter.device)
        optimizer.state[parameter] = {"step": step, FIRST: torch.zeros_like(parameter), **known}


def _collect(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], step: int) -> Moments:
    after = Moments(step)
    for name, parameter in named.items():
        if parameter in optimizer.state:
            for moment in MOMENTS:
                after.values[moment][name] = optimizer.state[parameter][moment]
    return after

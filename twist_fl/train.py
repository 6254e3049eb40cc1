"""One interval of local training (paper, section 5; spec: Adam, new at every interval by default)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from twist_fl.config import TrainConfig
from twist_fl.loss import LOSS_CHUNK, linear_cross_entropy
from twist_fl.precision import forward_precision, product_precision
from twist_fl.subnet import State

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Moments:
    """Adam's state of some parameters by name: two moments, and the steps they have seen."""

    step: int = 0
    values: dict[str, State] = field(default_factory=lambda: {name: {} for name in MOMENTS})


@dataclass(frozen=True)
class Interval:
    """What an interval did: mean loss in nats per predicted token, and the optimiser state it ended with."""

    loss: float
    num_tokens: int
    num_batches: int
    moments: Moments


def next_token_loss(
    model: nn.Module, windows: torch.Tensor, reduction: str = "mean", chunk: int = LOSS_CHUNK
) -> torch.Tensor:
    """Cross-entropy of each window's tokens 1..T-1 given those before; `windows` is (B, T) int64.

    Up to `chunk` predicted tokens it is the model's own forward and the plain loss; more go through the head in
    chunks, and their logits never exist whole.
    """
    causal_lm: Any = model
    targets = windows[:, 1:].flatten()
    if targets.numel() <= chunk:
        logits = causal_lm(windows, use_cache=False).logits[:, :-1].flatten(0, 1)  # (B (T-1), V)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), targets, reduction=reduction)
    hidden = causal_lm.base_model(windows, use_cache=False).last_hidden_state  # (B, T, d)
    head = causal_lm.get_output_embeddings()
    assert head.bias is None, "the chunked loss knows heads without a bias only"
    total = linear_cross_entropy(hidden[:, :-1].flatten(0, 1), head.weight, targets, chunk)
    return total if reduction == "sum" else total / targets.numel()


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Adam:
    return torch.optim.Adam(
        model.parameters(),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def train_interval(
    model: nn.Module, batches: Iterable[torch.Tensor], config: TrainConfig, seed: int, moments: Moments | None = None
) -> Interval:
    """Train `model` in place on `batches`, each (B, T) int64 on the model's device.

    `moments` may cover any subset of the parameters; the others start anew. `seed` fixes the dropout. The host
    never waits for the device between the first batch and the last: it reads the next one meanwhile.
    """
    torch.manual_seed(seed)
    model.train()
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, config)
    if moments is not None:
        _restore(optimizer, model, moments)
    loss_sum, num_tokens, num_batches = torch.zeros((), dtype=torch.float64, device=device), 0, 0
    with product_precision(config.precision, device):
        for windows in batches:
            predicted = windows.shape[0] * (windows.shape[1] - 1)
            loss_sum += _step(model, optimizer, windows, config) * predicted
            num_tokens += predicted
            num_batches += 1
    after = _collect(optimizer, model, (moments.step if moments else 0) + num_batches)
    model.zero_grad(set_to_none=True)
    return Interval(float(loss_sum) / max(1, num_tokens), num_tokens, num_batches, after)


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, windows: torch.Tensor, config: TrainConfig
) -> torch.Tensor:
    """One optimiser step; the mean loss before it, float64, still on the device."""
    with forward_precision(config.precision, windows.device):
        loss = next_token_loss(model, windows, chunk=config.loss_chunk)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach().double()


def _restore(optimizer: torch.optim.Optimizer, model: nn.Module, moments: Moments) -> None:
    named = dict(model.named_parameters())
    for name in moments.values[MOMENTS[0]]:
        parameter = named[name]
        optimizer.state[parameter] = {
            "step": torch.tensor(float(moments.step), device=parameter.device),
            **{moment: moments.values[moment][name].to(parameter.device, copy=True) for moment in MOMENTS},
        }


def _collect(optimizer: torch.optim.Optimizer, model: nn.Module, step: int) -> Moments:
    after = Moments(step)
    for name, parameter in model.named_parameters():
        if parameter in optimizer.state:
            for moment in MOMENTS:
                after.values[moment][name] = optimizer.state[parameter][moment]
    return after

"""One interval of local training (paper, section 5; spec: Adam, new at every interval by default)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from twist_fl.config import TrainConfig
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


def next_token_loss(model: nn.Module, windows: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy of each window's tokens 1..T-1 given those before; `windows` is (B, T) int64."""
    logits = model(windows, use_cache=False).logits[:, :-1]  # (B, T-1, V)
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten(), reduction=reduction)


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

    `moments` may cover any subset of the parameters; the others start anew. `seed` fixes the dropout.
    """
    torch.manual_seed(seed)
    model.train()
    named = dict(model.named_parameters())
    optimizer = make_optimizer(model, config)
    if moments is not None:
        for name in moments.values[MOMENTS[0]]:
            parameter = named[name]
            optimizer.state[parameter] = {
                "step": torch.tensor(float(moments.step), device=parameter.device),
                **{moment: moments.values[moment][name].to(parameter.device, copy=True) for moment in MOMENTS},
            }
    loss_sum, num_tokens, num_batches = torch.zeros((), dtype=torch.float64), 0, 0
    for windows in batches:
        loss = next_token_loss(model, windows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        predicted = windows.shape[0] * (windows.shape[1] - 1)
        loss_sum = loss_sum.to(loss.device) + loss.detach() * predicted
        num_tokens += predicted
        num_batches += 1
    after = Moments((moments.step if moments else 0) + num_batches)
    for name, parameter in named.items():
        if parameter in optimizer.state:
            for moment in MOMENTS:
                after.values[moment][name] = optimizer.state[parameter][moment]
    model.zero_grad(set_to_none=True)
    return Interval(float(loss_sum) / max(1, num_tokens), num_tokens, num_batches, after)

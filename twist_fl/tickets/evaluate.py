"""Exact perplexity: of a full model, of one ticket, of a distribution of tickets (spec, section 8)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp, inf
from statistics import fmean, stdev

import torch
from torch import nn

from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.blueprint.division import Division
from twist_fl.blueprint.drawing import draw_ticket
from twist_fl.data.corpus import Windows
from twist_fl.model.subnet import ModelCache
from twist_fl.system.errors import ConfigError
from twist_fl.training.interval import next_token_loss

LARGEST_NLL = 700.0
"""Nats per token above which a perplexity is infinite, as it is of a model that gives no numbers."""


def sum_nll(model: nn.Module, windows: Windows, batch_size: int) -> float:
    """Negative log-likelihood in nats of all tokens that `windows` predict."""
    model.eval()
    device = next(model.parameters()).device
    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(windows), batch_size):
            batch = torch.tensor(windows[start : start + batch_size], dtype=torch.int64, device=device)
            total += float(next_token_loss(model, batch, reduction="sum"))
    return total


def mean_nll(model: nn.Module, windows: Windows, batch_size: int) -> float:
    """The same per predicted token, an exact token mean. Raises ConfigError if there is no window."""
    if not len(windows):
        raise ConfigError("there is no test text here: the run was made without (data.source=empty)")
    return sum_nll(model, windows, batch_size) / float(len(windows) * (windows.shape[1] - 1))


def perplexity(model: nn.Module, windows: Windows, batch_size: int) -> float:
    """exp(total negative log-likelihood / number of predicted tokens)."""
    return perplexity_of(mean_nll(model, windows, batch_size))


def perplexity_of(nll: float) -> float:
    return exp(nll) if nll < LARGEST_NLL else inf


def subnet_perplexity(
    models: ModelCache,
    state: Mapping[str, torch.Tensor],
    blueprints: Sequence[Blueprint],
    windows: Windows,
    batch_size: int,
) -> float:
    """Of subnets, each with its blocks and scale: test losses averaged over them (section 4.2)."""
    losses = []
    for blueprint in blueprints:
        with models.lent(blueprint, state) as model:
            losses.append(mean_nll(model, windows, batch_size))
    return perplexity_of(fmean(losses))


@dataclass(frozen=True)
class Tickets:
    """Perplexities of random tickets of one size."""

    num_sub: tuple[int, int]
    """(heads, FFN blocks) per divided layer."""
    num_params: int
    """As they are shipped: `Layout.own_keys`."""
    perplexities: tuple[float, ...]

    def summary(self) -> dict[str, object]:
        values = self.perplexities
        spread = (stdev(values) if max(values) < inf else inf) if len(values) > 1 else 0.0
        return asdict(self) | {"mean": fmean(values), "std": spread, "min": min(values), "max": max(values)}


def ticket_distribution(
    models: ModelCache,
    state: Mapping[str, torch.Tensor],
    division: Division,
    num_sub: tuple[int, int],
    windows: Windows,
    *,
    tickets: int,
    seed: int,
    batch_size: int,
    on_ticket: Callable[[], None] = lambda: None,
) -> Tickets:
    """Perplexity of `tickets` tickets; the same seed gives the same tickets for any model. Equal ones are one work."""
    drawn = [draw_ticket(models.layout, division, num_sub, seed, draw) for draw in range(tickets)]
    found: dict[Blueprint, float] = {}
    for blueprint in drawn:
        if blueprint not in found:
            found[blueprint] = subnet_perplexity(models, state, [blueprint], windows, batch_size)
        on_ticket()
    own, held = models.layout.own_keys(drawn[0])
    return Tickets(num_sub, own.num_params(held), tuple(found[blueprint] for blueprint in drawn))

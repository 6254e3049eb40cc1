"""How far an honest worker's Adam can go, whatever its text: a reply from beyond is a fault or a lie, and is refused.

With b1, b2 the betas, m and v the two moments of one number: by the Cauchy-Schwarz inequality |m| <= c sqrt(v) after
any gradients, c = (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)), if b1^2 < b2 (else there is no bound). Weighted means,
medians and trimmed means of several workers' moments keep that. The corrections of the first steps multiply a step by
at most max(1, sqrt(1 - b2) / (1 - b1)). So a step is at most `largest_step` learning rates long, in each number.
Decoupled weight decay goes towards 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf, sqrt

import torch

from twist_fl.blueprint.moments import FIRST, SQUARES
from twist_fl.config.schema import TrainConfig
from twist_fl.model.subnet import State
from twist_fl.system.threads import for_each, pieces, ranges
from twist_fl.training.aggregate import ReplyError

_ROUNDING = 1.01
"""Of all a round's float32 and 16-bit numbers together, with room."""
_SMALLEST = 1e-38
"""Squares below are not exact in float32."""


def moment_ratio(config: TrainConfig) -> float:
    """The largest |m| / sqrt(v)."""
    spread = 1 - config.beta1**2 / config.beta2 if config.beta2 else 0.0
    return (1 - config.beta1) / sqrt((1 - config.beta2) * spread) if spread > 0 else inf


def largest_step(config: TrainConfig) -> float:
    """In learning rates, of any one number."""
    return moment_ratio(config) * max(1, sqrt(1 - config.beta2) / (1 - config.beta1))


def magnitudes(state: State) -> dict[str, float]:
    """The largest magnitude in each parameter."""
    return {name: max(map(abs, extremes)) for name, extremes in ranges(state).items()}


def reach(sent: dict[str, float], config: TrainConfig, rates: Iterable[float]) -> dict[str, float]:
    """The largest magnitude of each parameter that training at `rates` can make of those `sent`."""
    path = largest_step(config) * sum(rates)
    return {name: _ROUNDING * (largest + path) for name, largest in sent.items()}


def check_moments(values: dict[str, State], config: TrainConfig) -> None:
    """Raises ReplyError where first moments, if they travel, are larger than any gradients make them beside their
    squares: the next workers' steps would have no bound."""
    ratio = moment_ratio(config) * _ROUNDING

    def look(work: tuple[str, torch.Tensor, torch.Tensor]) -> None:
        name, first, squares = work
        if not bool((first.square() <= ratio**2 * squares + _SMALLEST).all()):
            raise ReplyError(f"{FIRST} of {name} exceeds {ratio:.3g} roots of {SQUARES}, as no gradients make it")

    for_each(
        look,
        [
            (name, first[at], values[SQUARES][name][at])
            for name, first in values.get(FIRST, {}).items()
            for at in pieces(tuple(first.shape))
        ],
    )

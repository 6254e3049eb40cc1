"""The learning rate of every batch of a run: a pure function of the batch's index, never of when it is asked for.

So a resumed run, FedAvg, DDP and every worker agree, and a round need not know what was before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import cos, pi

from twist_fl.config.schema import TrainConfig


def learning_rate(config: TrainConfig, batch: int, total: int) -> float:
    """Of batch number `batch`, from 0, of the `total` batches that a run has for a worker in all its rounds.

    It rises to `config.lr` in equal steps over the first `warmup` of the run, none of them 0, and then is what
    `config.schedule` says; the batch after the last would have 0, unless it is constant.
    """
    rising = round(config.warmup * total)
    if batch < rising:
        return config.lr * (batch + 1) / (rising + 1)
    if config.schedule == "constant":
        return config.lr
    falling = round(config.decay * total) if config.schedule == "wsd" else total
    first = max(rising, total - falling)
    if batch < first:
        return config.lr
    left = (total - batch) / (total - first)
    return config.lr * ((1 - cos(pi * left)) / 2 if config.schedule == "cosine" else left)


def learning_rates(config: TrainConfig, first: int, num_batches: int, total: int) -> Iterator[float]:
    """Of `num_batches` batches from number `first`. Who has missed rounds trains some beyond the last: as it."""
    return (learning_rate(config, min(batch, total - 1), total) for batch in range(first, first + num_batches))

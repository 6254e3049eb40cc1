"""A run's events as TensorBoard's scalars by round, in the folder `tensorboard` of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from twist_fl.runs.events import Event
from twist_fl.system.units import size_label


def tracker(config: dict[str, Any], folder: Path) -> Callable[[Event], None]:
    """A run that goes on after round k hides what was written beyond k before."""
    from torch.utils.tensorboard import SummaryWriter

    writer: SummaryWriter | None = None

    def hear(event: Event) -> None:
        nonlocal writer
        if event["event"] == "start":
            writer = SummaryWriter(str(folder / "tensorboard"), purge_step=event["round"] + 1)
        if writer is None:
            return
        for name, value in scalars(event):
            writer.add_scalar(name, value, event["round"])
        if event["event"] in ("done", "failed"):
            writer.close()
        else:
            writer.flush()

    return hear


def scalars(event: Event) -> Iterator[tuple[str, float]]:
    """Names and values of what an event measured."""
    match event["event"]:
        case "round":
            yield "loss", event["loss"]
            yield "bytes/sent", sum(event["bytes_down"].values())
            yield "bytes/received", sum(event["bytes_up"].values())
            yield "seconds/round", event["seconds"]
            yield "seconds/training", event["training_seconds"]
            yield "replies lost", len(event["dropped"])
        case "eval":
            yield from ((f"perplexity/{key}", event[key]) for key in ("full", "subnets") if key in event)
        case "federated" if "perplexity" in event:
            yield "perplexity/federated", event["perplexity"]
        case "results":
            if "full" in event:
                yield "results/full model", event["full"]
            for ticket in event["tickets"]:
                yield f"results/tickets of {size_label(ticket)}", ticket["mean"]

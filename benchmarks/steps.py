"""Seconds of training steps, of a subnet or of DDP, on whatever device the model is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from twist_fl.blueprint.blocks import Layout
from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.blueprint.drawing import full_blueprint
from twist_fl.config.schema import TrainConfig
from twist_fl.training.interval import make_optimizer, next_token_loss, train_interval
from twist_fl.training.job import Job
from twist_fl.training.precision import forward_precision, product_precision


class LossOf(nn.Module):
    """The training loss as a module, which is what DDP wraps."""

    def __init__(self, model: nn.Module, chunk: int) -> None:
        super().__init__()
        self.model, self.chunk = model, chunk

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        return next_token_loss(self.model, windows, chunk=self.chunk)


class RandomState(Mapping[str, torch.Tensor]):
    """Small random parameters, each made when it is asked for: a whole state would count in the model's peak."""

    def __init__(self, layout: Layout, blueprint: Blueprint | None) -> None:
        self.shapes = {param.name: layout.shape(param, blueprint) for param in layout.params}

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.randn(self.shapes[name]).mul_(0.02)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def random_model(job: Job, blueprint: Blueprint | None = None) -> nn.Module:
    """The model of `blueprint` as a worker has it, on the job's device; the full one if none is given."""
    blueprint = blueprint or full_blueprint(job.layout)
    return job.models(compile=job.config.train.compile).load(blueprint, RandomState(job.layout, blueprint))


class Stopwatch:
    """Hands out batches, and notes when: from one to the next is a step."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.times = device, list[float]()

    def note(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())

    def hand_out(self, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        for batch in batches:
            self.note()
            yield batch
        self.note()

    def median(self, warm_up: int) -> float:
        """Seconds of a step, the first `warm_up` left out."""
        steps = [after - before for before, after in zip(self.times, self.times[1:], strict=False)]
        return statistics.median(steps[warm_up:])


def subnet_steps(model: nn.Module, batches: Iterable[torch.Tensor], config: TrainConfig, warm_up: int) -> float:
    """Seconds of a step of TwIST's own training."""
    watch = Stopwatch(next(model.parameters()).device)
    train_interval(model, watch.hand_out(batches), config, 0)
    return watch.median(warm_up)


def ddp_steps(model: nn.Module, batches: Iterable[torch.Tensor], config: TrainConfig, warm_up: int) -> float:
    """Seconds of a step of torch's DistributedDataParallel in this process group: same loss, same Adam."""
    device = next(model.parameters()).device
    torch.manual_seed(0)
    model.train()
    loss_of = nn.parallel.DistributedDataParallel(LossOf(model, config.loss_chunk))
    optimizer, watch = make_optimizer(model.parameters(), config), Stopwatch(device)
    with product_precision(config.precision, device):
        for windows in watch.hand_out(batches):
            with forward_precision(config.precision, device):
                loss = loss_of(windows)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return watch.median(warm_up)

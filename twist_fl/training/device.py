"""What this machine, or the container it is, lets a run use."""

from __future__ import annotations

import psutil

from twist_fl.config.checks import NODES
from twist_fl.config.schema import Config
from twist_fl.config.sizes import workers_per_round
from twist_fl.system.cores import usable_cores
from twist_fl.system.errors import ConfigError


def check_memory(num_params: int, what: str) -> None:
    """Raises ConfigError if not even the model's weights fit in this machine's memory."""
    needed, there = 4 * num_params, psutil.virtual_memory().total
    if needed > there:
        raise ConfigError(
            f"{what} has {num_params:,} parameters, {needed / 1e9:,.1f} GB in float32, and this machine has "
            f"{there / 1e9:,.1f} GB of memory: use smaller sizes"
        )


def cpus_per_worker(config: Config) -> int:
    """CPU cores Flower reserves per simulated worker."""
    return config.flower.cpus_per_worker or max(1, usable_cores() // workers_per_round(config))


def check_simulation(config: Config) -> None:
    """Raises ConfigError if this machine has not the cores, GPUs or arithmetic that one simulated worker asks for."""
    import torch

    cores, gpus = usable_cores(), torch.cuda.device_count()
    if cpus_per_worker(config) > cores:
        raise ConfigError(f"flower.cpus_per_worker={config.flower.cpus_per_worker} is more than the {cores} cores here")
    if config.flower.gpus_per_worker > gpus:
        raise ConfigError(
            f"flower.gpus_per_worker={config.flower.gpus_per_worker:g}, but torch sees {gpus} GPUs here: "
            f"use at most {gpus}"
        )
    check_training(config)


def check_training(config: Config) -> None:
    """Raises ConfigError if this machine has not the device or the arithmetic that training asks for."""
    from twist_fl.training.precision import check_precision

    if config.data.private == NODES:
        raise ConfigError(
            "data.private=nodes trains on nodes of other machines (docs/nodes.md): here, give the folder that holds a "
            "folder or a file a worker"
        )
    check_device(config.train.device)
    check_precision(config.train.precision, device(config))


def device(config: Config) -> str:
    """The torch device that a worker here trains on."""
    import torch

    if config.train.device != "auto":
        return config.train.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raises ConfigError if `device` is not auto or a device that torch can use here."""
    import torch

    if device == "auto":
        return
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"train.device={device!r} cannot be used here ({reason}): use auto or cpu") from error

"""The training runs that experiments share, by name: two experiments that need the same one train it once."""

from __future__ import annotations

from twist_fl.blueprint.division import Setting
from twist_fl.experiments.lab import Task, train

DDP = train("ddp", "algorithm=ddp")
FEDAVG = train("fedavg", "algorithm=fedavg")


def twist(setting: Setting, size: int) -> Task:
    """TwIST whose workers hold `size` blocks of each divided layer."""
    return train(f"twist-{setting}-{size}", f"blueprint.setting={setting}", f"blueprint.num_sub={size}")


def variation(name: str, *overrides: str) -> Task:
    """TwIST at `both` 6/12 with something else changed."""
    return train(f"both-6-{name}", "blueprint.setting=both", "blueprint.num_sub=6", *overrides)

"""The arithmetic of a training step: float32, TF32 products, or bfloat16 by autocast. Parameters stay float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from twist_fl.config.schema import Precision
from twist_fl.system.errors import ConfigError


def check_precision(precision: Precision, device: str) -> None:
    """Raises ConfigError if `device` has no such arithmetic."""
    if precision == "tf32" and not device.startswith("cuda"):
        raise ConfigError(
            f"train.precision=tf32 needs a CUDA GPU, this worker trains on {device!r}: use float32 or bfloat16"
        )


def forward_precision(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Around one forward pass, never longer: autocast keeps its copies of the weights until it ends."""
    if precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


@contextmanager
def product_precision(precision: Precision, device: torch.device) -> Iterator[None]:
    """Around forward and backward: TF32 products on a GPU only if asked for, and as before afterwards."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

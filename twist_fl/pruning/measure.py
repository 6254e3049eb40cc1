"""What a method costs: seconds, and the memory it needs on top of what is there."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from twist_fl.system.memory import peak_bytes, start_peak


@dataclass
class Cost:
    """Filled when the measured part is over."""

    seconds: float = 0.0
    peak_bytes: int = 0
    """Increase of this process's peak resident set, plus that of torch's allocated memory on the GPU if one is used.

    Freed memory is given back to the system before (glibc), so that what an earlier method left does not hide it.
    The model that a method makes for itself is in it; the checkpoint it starts from is not.
    """


@contextmanager
def measured(device: str) -> Iterator[Cost]:
    """Wall clock and peak memory of the body; `device` is where it computes."""
    on_gpu = device.startswith("cuda")
    cost = Cost()
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    allocated = 0
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
    resident, start = start_peak(), time.perf_counter()
    yield cost
    if on_gpu:
        torch.cuda.synchronize(device)
        cost.peak_bytes += torch.cuda.max_memory_allocated(device) - allocated
    cost.seconds = time.perf_counter() - start
    cost.peak_bytes += max(0, peak_bytes() - resident)

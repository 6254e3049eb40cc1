"""Peak memory of this process, or of what torch has on a GPU for it."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path


class Peak:
    """Peak memory since `restart`, above what was held when this was made.

    On a GPU it is what torch has allocated there for this process; else this process's resident set.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._before = self.restart()

    def restart(self) -> int:
        """Forget the peak so far; returns the bytes held now."""
        self._most = 0
        if not self.device.startswith("cuda"):
            return start_peak()
        import torch

        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def num_bytes(self) -> int:
        """0 if less was held than at first. What was seen once counts, though another of this process restarts."""
        self._most = max(self._most, self._peak() - self._before)
        return self._most

    def _peak(self) -> int:
        if not self.device.startswith("cuda"):
            return peak_bytes()
        import torch

        return int(torch.cuda.max_memory_allocated(self.device))


def start_peak() -> int:
    """Resident bytes now. On Linux the peak starts anew here, where the kernel allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _memory_bytes("VmRSS")


def peak_bytes() -> int:
    """Peak resident bytes since `start_peak`."""
    return _memory_bytes("VmHWM")


def _memory_bytes(field: str) -> int:
    """A memory field of this process. Where /proc does not say, the peak since its start stands for any.

    getrusage is not the first choice: on Linux its peak outlives exec, so a child would start with its parent's.
    """
    try:
        found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""Peak memory of this process."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path


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

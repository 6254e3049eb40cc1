"""The CPU cores of this machine, or of the container it is."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cores() -> int:
    """CPU cores this process may use: its affinity, and the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _quota(Path("/sys/fs/cgroup/cpu.max"), cores)))


def _quota(file: Path, unlimited: int) -> int:
    if not file.is_file():
        return unlimited
    quota, period = file.read_text().split()
    return unlimited if quota == "max" else int(quota) // int(period)

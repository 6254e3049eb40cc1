"""Where a figure comes from: commit, versions, hardware."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from twist_fl import __version__
from twist_fl.system.cores import usable_cores


def provenance() -> dict[str, Any]:
    """Commit, versions and hardware, to stand beside every reported figure."""
    import torch

    return {
        "twist_fl": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hardware": {
            "processor": _processor(),
            "cores": usable_cores(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def commit() -> str | None:
    """The source tree's commit, with a plus if it has changes; None outside a git checkout.

    Flower runs a copy of the tree: there the command that started it passes the commit on.
    """
    given = os.environ.get("TWIST_FL_COMMIT")
    if given:
        return given
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    git = ["git", "-C", str(here)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False).stdout
    return (head + "+" * bool(changed)) or None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

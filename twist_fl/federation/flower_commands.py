"""Flower's own commands: what they see of the environment, and what they answer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twist_fl.federation.simulation import CONNECTION
from twist_fl.system.errors import LaunchError
from twist_fl.system.untrusted import plain, read_json

_DIRECT = "localhost,127.0.0.1"


def flower_environment(home: Path) -> dict[str, str]:
    """The user's own, for proxies and hubs are theirs to name, with Flower's state in `home`.

    No proxy stands between us and this machine; no installs, no telemetry, no checks for updates.
    """
    direct = ",".join(filter(None, [_DIRECT, os.environ.get("NO_PROXY") or os.environ.get("no_proxy")]))
    return os.environ | {
        "PATH": os.pathsep.join(filter(None, [str(Path(sys.executable).parent), os.environ.get("PATH")])),
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # else every run tries to install torch
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "NO_PROXY": direct,
        "no_proxy": direct,
    }


def answers(commands: Sequence[Sequence[str]], home: Path) -> list[Any]:
    """What each of `flwr`'s `commands` says of the SuperLink that `home` names, as JSON; all are asked at once.

    Raises LaunchError with Flower's reason if one fails.
    """
    asked = [
        subprocess.Popen(
            ["flwr", *words, CONNECTION, "--format", "json"],
            env=flower_environment(home),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for words in commands
    ]
    # All to their ends first: none is left behind where one fails.
    said = [tuple(part.decode(errors="replace") for part in process.communicate()) for process in asked]
    return [_answer(words, *parts) for words, parts in zip(commands, said, strict=True)]


def _answer(words: Sequence[str], output: str, errors: str) -> Any:
    """Before the JSON, and before a reason in it, stands what Flower does, as "Listing all nodes..."."""
    try:
        found = read_json(output[output.index("{") :])
    except ValueError:
        found = {"error-message": errors or output}
    if not found.get("success"):
        reason = plain(" ".join(str(found.get("error-message", "")).split()).rpartition("... ")[2])
        raise LaunchError(f"flwr {' '.join(words)} failed: {reason or 'it does not say why'}")
    return found

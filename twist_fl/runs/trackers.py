"""Other eyes on a run: functions that are called with every event of its log, in the process that writes it.

A tracker is `module:function`, of a module that is installed, on PYTHONPATH or in the working folder. The function
takes the run's configuration and folder, and returns what is called with each event, a dict: see `events.FIELDS`. A run
begins, and goes on, with "start"; it ends with "done" or "failed".
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twist_fl.runs.events import Event
from twist_fl.system.environment import WORKING_FOLDER
from twist_fl.system.errors import ConfigError

if TYPE_CHECKING:
    from twist_fl.config.schema import Config
    from twist_fl.runs.checkpoint import RunFolder

_TENSORBOARD = "twist_fl.runs.tensorboard:tracker"


def check_trackers(config: Config) -> list[tuple[str, Callable[..., Any]]]:
    """The trackers of a configuration, with their names. Raises ConfigError if one cannot be had here."""
    if config.log.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError("log.tensorboard=true needs the package tensorboard: pip install 'twist-fl[tensorboard]'")
    names = [_TENSORBOARD] * config.log.tensorboard + ([config.log.tracker] if config.log.tracker else [])
    return [(name, _find(name)) for name in names]


def _find(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    if not module or not function:
        raise ConfigError(f"log.tracker={name!r} is not of the form module:function, for example my_tracker:start")
    if (here := os.environ.get(WORKING_FOLDER) or str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # last: what lies there hides nothing
    try:
        found = getattr(importlib.import_module(module), function, None)
    except (ImportError, SyntaxError, TypeError) as error:  # TypeError: a name that begins with a dot
        raise ConfigError(
            f"log.tracker={name!r}: {error}: install it where the server runs, or name its folder in PYTHONPATH"
        ) from error
    if not callable(found):
        what = "has no such function" if found is None else f"has there a {type(found).__name__}, not a function"
        raise ConfigError(f"log.tracker={name!r}: the module {module} {what}")
    return found  # type: ignore[no-any-return]


def listen(config: Config, folder: RunFolder) -> None:
    """Have the trackers hear what is logged in `folder` from now on. Raises ConfigError."""
    for name, start in check_trackers(config):
        folder.event_log.listeners.append(_Guard(name, start, config, folder))


class _Guard:
    """Calls a tracker. An error in it is said in the run's log, once, and ends nothing."""

    def __init__(self, name: str, start: Callable[..., Any], config: Config, folder: RunFolder) -> None:
        self._name, self._folder, self._said = name, folder, False
        self._call: Callable[[Event], None] | None = None
        self._start: Callable[[], Any] = lambda: start(asdict(config), folder.path)

    def __call__(self, event: Event) -> None:
        if event["event"] == "tracker":
            return
        try:
            if self._call is None:
                self._call = self._start()
            self._call(dict(event))
        except Exception as error:  # noqa: BLE001 (it is not our code, and a run is worth more than its picture)
            if not self._said:
                self._said = True
                self._folder.log("tracker", name=self._name, error=f"{type(error).__name__}: {error}")

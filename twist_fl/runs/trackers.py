"""Other eyes on a run: functions that are called with every event of its log, in the process that writes it.

A tracker is a function that `plugins.TRACKER` finds. It takes the run's configuration and folder, and returns what
is called with each event, a dict: see `events.FIELDS`. A run begins, and goes on, with "start"; it ends with "done" or
"failed".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from twist_fl.runs.events import Event
from twist_fl.system.errors import ConfigError
from twist_fl.system.plugins import TRACKER

if TYPE_CHECKING:
    from twist_fl.config.schema import Config
    from twist_fl.runs.checkpoint import RunFolder


def check_trackers(config: Config) -> list[tuple[str, Callable[..., Any]]]:
    """The trackers of a configuration, with their names. Raises ConfigError if one cannot be had here."""
    if config.log.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError("log.tensorboard=true needs the package tensorboard: pip install 'twist-fl[tensorboard]'")
    names = ["tensorboard"] * config.log.tensorboard + [config.log.tracker] * bool(config.log.tracker)
    return [(name, TRACKER.find(name)) for name in names if name]


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

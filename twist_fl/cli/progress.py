"""What a person sees while a run goes on: what it does, and how it goes; fed by the run's own event log."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from twist_fl.config.shares import Size
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.events import Event
from twist_fl.runs.start import Start, find_start
from twist_fl.runs.story import Follower, lines, round_text, warnings
from twist_fl.runs.trained import chosen_sizes
from twist_fl.system.units import duration_text

_LOOK_SECONDS = 0.25
_LINE_SECONDS = 30.0
"""Without a terminal: seconds between two lines on rounds, or on what is waited for."""
_ENDS = ("done", "deployed", "failed")


class _Bar(Progress):
    """A bar with a line of its own below it."""

    note = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.note:
            yield Text("  " + self.note)


def waits_for(console: Console, what: str) -> None:
    """A line that says it on a terminal, and stays: a text that is read shows its own progress below."""
    if console.is_terminal:
        console.print(f"{what} ...", style="dim", soft_wrap=True)


def loading(console: Console, start: str, words: Sequence[str], sizes: Sequence[Size] | None) -> Start:
    """`find_start`, and what to say before its weights are loaded. Raises ConfigError as that and `chosen_sizes`."""
    found = find_start(start, words)
    chosen_sizes(found.job, sizes)
    waits_for(console, f"loading torch and the {'run' if found.run else 'model'}")
    return found


class Running(Protocol):
    """What may end before the run does."""

    def poll(self) -> int | None:
        """None while it runs."""


class RunProgress:
    """Follows one run: what it waits for, its rounds, then its ticket evaluation."""

    def __init__(self, console: Console, folder: RunFolder, total_tickets: int, doing: str = "starting") -> None:
        self.console, self.total_tickets = console, total_tickets
        self._follower = Follower(folder.events_file)
        for _ in self._follower.look():
            pass  # what is there already is not news
        self._doing = doing
        self._bar = _Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(self._doing, total=None)
        self._began = self._last_line = time.monotonic()

    def __enter__(self) -> RunProgress:
        self._bar.start()
        self._print(self._doing)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def follow(self, process: Running) -> list[Event]:
        """Show events until the run says that it is done or has failed, or `process` ends.

        Returns those that say how it ended, and what devices measured.
        """
        ends: list[Event] = []
        while True:
            running = process.poll() is None
            for event in self._follower.look():
                self._show(event)
                if event["event"] in (*_ENDS, "device"):
                    ends.append(event)
            if not running or (ends and ends[-1]["event"] in _ENDS):
                return ends
            self._remind()
            time.sleep(_LOOK_SECONDS)

    def _show(self, event: Event) -> None:
        story, kind = self._follower.story, event["event"]
        self._doing, self._bar.note = story.state, round_text(story)
        done, total = (sum(story.tickets.values()), self.total_tickets) if story.tickets else (story.round, None)
        self._bar.update(self._task, description=self._doing, completed=done, total=total or story.num_rounds or None)
        for text in warnings(event):
            self._print(text, "yellow")
        if kind == "start" or (not self.console.is_terminal and kind not in (*_ENDS, "results")):
            self._say(event)

    def _say(self, event: Event) -> None:
        """Of rounds the first, the last, and from time to time one in between."""
        story = self._follower.story
        if event["event"] == "round" and event["round"] not in (1, story.num_rounds) and not self._is_quiet():
            return
        for text in lines(event, story):
            self._print(text)

    def _is_quiet(self) -> bool:
        return time.monotonic() - self._last_line >= _LINE_SECONDS

    def _remind(self) -> None:
        if not self.console.is_terminal and self._is_quiet():
            self._print(f"{self._doing} ({duration_text(time.monotonic() - self._began)})")

    def _print(self, text: str, style: str | None = None) -> None:
        self._last_line = time.monotonic()
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

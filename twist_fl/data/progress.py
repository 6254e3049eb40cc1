"""What is being read or tokenised, how fast, and how much of it is done: for whoever waits longer than two seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from twist_fl.system.units import human_bytes

_PATIENCE = 2.0
_LINE_SECONDS = 10.0
"""Without a terminal: seconds between two lines."""


class Meter:
    """On a terminal a bar, else a line now and then, on standard error."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def task(self, what: str, total: int | None = None, done: int = 0) -> Iterator[Callable[[int], None]]:
        """Gives what to call with bytes that are done. `total` bytes if that is known, of which `done` at first."""
        begin = line = time.monotonic()
        at, bar, shown = done, self._bar(total), False
        first: tuple[float, int] | None = None  # the pace is that after the first piece: a source may begin slowly
        row = bar.add_task(what, total=total, completed=done, note="")

        def advance(size: int) -> None:
            nonlocal at, first, line, shown
            at += size
            now = time.monotonic()
            first = first or (now, at)
            if now - begin < _PATIENCE:
                return
            note = f"{human_bytes(at)}{f' of {human_bytes(total)}' if total else ''}"
            if now > first[0]:
                note += f", {human_bytes((at - first[1]) / (now - first[0]))}/s"
            if self.console.is_terminal:
                if not shown:
                    bar.start()
                bar.update(row, completed=at, note=note)
            elif not shown or now - line >= _LINE_SECONDS:
                line = now
                self.say(f"{what}: {note}{f', {at / total:.0%}' if total else ''}")
            shown = True

        try:
            yield advance
        finally:
            if bar.live.is_started:
                bar.stop()

    def _bar(self, total: int | None) -> Progress:
        left = [TextColumn("left"), TimeRemainingColumn()] if total else []
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[note]}"), *left)
        return Progress(*columns, console=self.console, transient=True)

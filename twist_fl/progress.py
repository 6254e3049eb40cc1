"""What a person sees while a run goes on: one live line per run, fed by the run's own event log."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from twist_fl.checkpoint import RunFolder
from twist_fl.events import EventReader

_LOOK_SECONDS = 0.25
_LINE_SECONDS = 30.0
"""Without a terminal: seconds between two printed lines."""


def human_bytes(size: float) -> str:
    """Bytes in decimal units: 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def _held_text(event: Mapping[str, Any]) -> str:
    """What the settings come to, of a run's "start" event: an algorithm that divides nothing says so here."""
    held, full = event["subnet_params"], event["num_params"]
    spread = " to ".join(f"{size:,}" for size in dict.fromkeys([min(held), max(held)]))
    part = f"all {full:,}" if min(held) == full else f"{spread} of {full:,}"
    return f"each worker (of {len(held)}) trains {part} parameters"


class Running(Protocol):
    """What may end before the run does."""

    def poll(self) -> int | None:
        """None while it runs."""


class RunProgress:
    """Follows one run: rounds, loss, perplexity, bytes on the wire, time left; then its ticket evaluation."""

    def __init__(self, console: Console, folder: RunFolder, total_tickets: int) -> None:
        self.console, self.total_tickets = console, total_tickets
        self._log = EventReader(folder.events_file)
        self._bar = Progress(
            TextColumn("[bold]{task.description:<15}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._train: Any = None
        self._tickets: Any = None
        self._log.read()  # what is there already is not news
        self._bytes = 0
        self._note = ""
        self._perplexity = ""
        self._last_line = 0.0

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def follow(self, process: Running) -> list[dict[str, Any]]:
        """Show events until the run says that it is done or has failed, or `process` ends; returns its events."""
        ours: list[dict[str, Any]] = []
        while True:
            running = process.poll() is None
            events = self._log.read()
            if self._log.rewound:  # by a resumed run, whose news begin where it does
                events = events[max(i for i, event in enumerate(events) if event["event"] == "start") :]
            for event in events:
                self._show(event)
                ours.append(event)
            if not running or (ours and ours[-1]["event"] in ("done", "deployed", "failed")):
                return ours
            time.sleep(_LOOK_SECONDS)

    def _show(self, event: dict[str, Any]) -> None:
        getattr(self, f"_on_{event['event']}", lambda event: None)(event)

    def _on_start(self, event: dict[str, Any]) -> None:
        name = event["algorithm"]
        if self._train is None:
            self._train = self._bar.add_task(name, total=event["num_rounds"], completed=event["round"], note="starting")
        self.console.print(
            f"{name}: {event['num_rounds']} rounds; {_held_text(event)}", highlight=False, soft_wrap=True
        )

    def _on_nodes(self, event: dict[str, Any]) -> None:
        for reason in event["failed"]:
            self.console.print(f"a node is not ready: {reason}", style="yellow", markup=False)

    def _on_round(self, event: dict[str, Any]) -> None:
        self._bytes += sum(event["bytes_down"].values()) + sum(event["bytes_up"].values())
        for worker, reason in event["dropped"].items():
            text = f"round {event['round']}: worker {worker} did not count: {reason}"
            self.console.print(text, style="yellow", markup=False)
        for worker, note in event["notes"].items():
            self.console.print(f"round {event['round']}: worker {worker}: {note}", style="yellow", markup=False)
        self._note = f"loss {event['loss']:.3f}{self._perplexity}  {human_bytes(self._bytes)}"
        if self._train is not None:
            self._bar.update(self._train, completed=event["round"], note=self._note)
        self._line(f"round {event['round']}  {self._note}")

    def _on_eval(self, event: dict[str, Any]) -> None:
        self._perplexity = f"  perplexity {event['full']:.1f}"

    def _on_ticket(self, event: dict[str, Any]) -> None:
        if self._tickets is None:
            self._tickets = self._bar.add_task("  tickets", total=self.total_tickets, note="")
            self._line("drawing and evaluating tickets", force=True)
        self._bar.update(self._tickets, advance=1, note=f"size {event['size']}")

    def _line(self, text: str, force: bool = False) -> None:
        if self.console.is_terminal:
            return
        now = time.monotonic()
        if force or now - self._last_line >= _LINE_SECONDS:
            self._last_line = now
            self.console.print(text)

"""`twist-fl status`: where runs stand, from outside: their folders say it, whoever trains them and however.

Nothing here needs torch.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from twist_fl.config.finding import checkpoints_of
from twist_fl.runs.story import (
    Follower,
    federated_text,
    held_text,
    lines,
    nodes_text,
    results_text,
    round_text,
    warnings,
)
from twist_fl.system.errors import ConfigError
from twist_fl.system.locks import is_locked
from twist_fl.system.units import count, duration_text

_LOOK_SECONDS = 0.5


class Look:
    """A run's folder, looked at again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._follower = Follower(folder / "events.jsonl")

    def again(self) -> list[str]:
        """Reads what is new; what it says, a line each."""
        return [
            text for event in self._follower.look() for text in (*warnings(event), *lines(event, self._follower.story))
        ]

    @property
    def busy(self) -> bool:
        """Whether a process works on the run."""
        return any(is_locked(self.folder / f".{who}.lock") for who in ("command", "server"))

    def state(self) -> str:
        story, busy = self._follower.story, self.busy
        resume = f"go on with: twist-fl train --resume {shlex.quote(str(self.folder))}"
        if story.ended == "done":
            return story.state + ("; a command is at work in its folder" if busy else "")
        if busy:
            return f"starting again after round {story.round}" if story.ended else story.state
        if story.ended:
            return f"{story.state}; {self._saved()}; {resume}"
        return (
            f"stopped at round {story.round} of {story.num_rounds}; {self._saved()}; {resume}"
            if story.start
            else (f"not at work, and has not begun; {resume}")
        )

    def _saved(self) -> str:
        newest = max(checkpoints_of(self.folder), default=0)
        return f"round {newest} is saved" if newest else "nothing is saved"

    def line(self) -> str:
        """All in one."""
        return "  ".join(filter(None, (f"{self.folder}: {self.state()}", round_text(self._follower.story))))

    def details(self) -> Iterator[str]:
        """A line for each thing that is known."""
        story = self._follower.story
        yield f"{self.folder}: {self.state()}"
        facts = [
            ("workers", held_text(story.start) if story.start else ""),
            ("nodes", nodes_text(story.nodes) if story.nodes else ""),
            *(("not ready", reason) for reason in story.nodes.get("failed", ())),
            ("rounds", f"{story.round} of {story.num_rounds}" if story.start else ""),
            ("training", round_text(story)),
            ("evaluation", federated_text(story.federated) if story.federated else ""),
            ("pace", f"{story.round_seconds:.2f} s a round, the median of the last" if story.round_seconds else ""),
            *(
                ("lost", f"{count(number, 'reply')} of worker {worker}, the last: {reason}")
                for worker, (number, reason) in sorted(story.lost.items())
            ),
            ("results", results_text(story.results) if story.results else ""),
            ("last event", f"{story.last:%Y-%m-%d %H:%M:%S} UTC, {_ago(story.last)} ago" if story.last else ""),
        ]
        yield from (f"  {name:<11}{fact}" for name, fact in facts if fact)


def _ago(then: datetime) -> str:
    return duration_text(max(0.0, (datetime.now(UTC) - then).total_seconds()))


def show_status(console: Console, paths: Sequence[Path], follow: bool) -> None:
    """Of one run all that is known, of several a line each; `follow` until none is at work. Raises ConfigError."""
    looks = [Look(folder) for path in paths for folder in runs_in(path)]
    for look in looks:
        look.again()
    if follow and console.is_terminal:
        with Live(_picture(looks), console=console, auto_refresh=False) as live:
            while any(look.busy for look in looks):
                time.sleep(_LOOK_SECONDS)
                for look in looks:
                    look.again()
                live.update(_picture(looks), refresh=True)
        return
    console.print(_picture(looks), soft_wrap=True)
    followed = False
    while follow and any(look.busy for look in looks):
        followed = True
        time.sleep(_LOOK_SECONDS)
        _tell(console, looks)
    if followed:
        _tell(console, looks)
        console.print(_picture(looks), soft_wrap=True)


def _picture(looks: Sequence[Look]) -> Text:
    return Text("\n".join(looks[0].details() if len(looks) == 1 else [look.line() for look in looks]))


def _tell(console: Console, looks: Sequence[Look]) -> None:
    for look in looks:
        for text in look.again():
            console.print(text if len(looks) == 1 else f"{look.folder}: {text}", soft_wrap=True, highlight=False)


def runs_in(path: Path) -> list[Path]:
    """The run's folder itself, or all runs below it. Raises ConfigError if there is none."""
    found = []
    for folder, inside, files in os.walk(path):
        if {"job.json", "events.jsonl"} & set(files):
            found.append(Path(folder))
            inside.clear()
    if not found:
        state = "holds no run (no job.json)" if path.exists() else "does not exist"
        raise ConfigError(f"{path} {state}: give a run's folder, or a folder of runs")
    return sorted(found)

"""Do a lab's tasks: what is done already stays, several at a time, each in a process of its own that can be resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from twist_fl.experiments.lab import SCALES, TRAIN, Lab, Task
from twist_fl.experiments.measures import MEASURES
from twist_fl.runs.events import EventReader
from twist_fl.runs.local import train_local
from twist_fl.runs.results import refuse_other_settings
from twist_fl.system.errors import LaunchError
from twist_fl.system.files import write_json
from twist_fl.system.provenance import provenance
from twist_fl.system.units import duration_text
from twist_fl.training.job import make_job

_LOOK_SECONDS = 0.5
_INTERRUPTED = 130


def execute(lab: Lab, task: Task) -> None:
    """Do one task in this process. A training run goes on from its newest checkpoint."""
    if task.kind == TRAIN:
        folder = lab.run(task.name)
        if not folder.job_file.is_file():
            lab.begin(task)
            folder.create(make_job(lab.config(task)))
        train_local(folder)
        return
    (run,) = task.runs
    stamp = lab.stamp(task)
    result = MEASURES[task.kind](lab.run(run), **task.arguments)
    fields = {"of": stamp, "result": result, **provenance()}
    write_json(fields, lab.file(task))


def check(lab: Lab, tasks: Sequence[Task]) -> None:
    """Raises ConfigError if a run's settings are impossible, or the one that is here has others or another start."""
    for task in tasks:
        if task.kind == TRAIN:
            config = lab.config(task)
            if lab.run(task.name).job_file.is_file():
                lab.refuse_other_start(task)
                refuse_other_settings(lab.run(task.name), config)


@dataclass
class _Work:
    task: Task
    process: subprocess.Popen[bytes]
    began: float
    shown: TaskID
    events: EventReader
    """Of a training run."""
    done: int = 0
    of: int = 0


class Pool:
    """Up to `jobs` tasks at a time, measurements as soon as their runs are finished."""

    def __init__(self, console: Console, lab: Lab, tasks: Sequence[Task], jobs: int) -> None:
        self.console, self.lab, self.jobs = console, lab, jobs
        self.waiting = [task for task in tasks if not lab.is_done(task)]
        self.total = len(self.waiting)
        self.failed: list[Task] = []
        self._working: list[_Work] = []
        self._seconds: dict[str, list[float]] = {}
        self._bar = Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def run(self) -> None:
        """Raises LaunchError naming the tasks that failed; typer.Exit(130) when interrupted."""
        try:
            with self._bar:
                overall = self._bar.add_task("all tasks", total=self.total, note="")
                while self.waiting or self._working:
                    self._start()
                    self._look()
                    done = self.total - len(self.waiting) - len(self._working)
                    self._bar.update(overall, completed=done, note=f"{done}/{self.total}{self._left()}")
                    if not self._working and not self._ready():
                        break  # what is left needs a run that failed
                    time.sleep(_LOOK_SECONDS)
        except KeyboardInterrupt:
            self.console.print("\ninterrupted; what is finished is kept. The same command goes on.", soft_wrap=True)
            raise typer.Exit(_INTERRUPTED) from None
        finally:
            for work in self._working:
                work.process.terminate()
            for work in self._working:
                work.process.wait()
        if self.failed:
            logs = ", ".join(str(self._log(task)) for task in self.failed)
            left = f"; {len(self.waiting)} others need them" if self.waiting else ""
            raise LaunchError(f"{len(self.failed)} of {self.total} tasks failed{left}. Their logs: {logs}")

    def _ready(self) -> list[Task]:
        unfinished = {task.name for task in (*self.waiting, *self.failed, *(w.task for w in self._working))}
        return [task for task in self.waiting if not unfinished & set(task.runs)]

    def _start(self) -> None:
        for task in self._ready()[: self.jobs - len(self._working)]:
            self.waiting.remove(task)
            words = json.dumps({"folder": str(self.lab.folder), "scale": self.lab.scale.name,
                                "overrides": self.lab.overrides, "task": asdict(task)})  # fmt: skip
            self._log(task).parent.mkdir(parents=True, exist_ok=True)
            with self._log(task).open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "twist_fl.experiments.runner", words],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                    env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
                )  # fmt: skip
            shown = self._bar.add_task(f"  {task.name}", total=1.0, note="")
            events = EventReader(self.lab.run(task.name).events_file)
            self._working.append(_Work(task, process, time.monotonic(), shown, events))

    def _look(self) -> None:
        for work in list(self._working):
            if work.process.poll() is None:
                if work.task.kind == TRAIN:
                    for event in work.events.read():
                        work.of = event.get("num_rounds", work.of)
                        work.done = event.get("round", work.done)
                    done, of = work.done, work.of
                    self._bar.update(work.shown, completed=done / max(1, of), note=f"{done}/{of}")
                continue
            self._working.remove(work)
            self._bar.remove_task(work.shown)
            seconds = time.monotonic() - work.began
            if work.process.returncode:
                self.failed.append(work.task)
                self.console.print(f"failed: {work.task.name}, see {self._log(work.task)}", style="red", soft_wrap=True)
            else:
                self._seconds.setdefault(work.task.kind, []).append(seconds)
                if not self.console.is_terminal:
                    self.console.print(f"done: {work.task.name} ({duration_text(seconds)}){self._left()}")

    def _left(self) -> str:
        """Time left, once each kind of task has been timed."""
        left = [*self.waiting, *(work.task for work in self._working)]
        if not left or not {task.kind for task in left} <= set(self._seconds):
            return ""
        seconds = sum(fmean(self._seconds[task.kind]) for task in left)
        spent = sum(time.monotonic() - work.began for work in self._working)
        return f", about {duration_text(max(0.0, seconds - spent) / self.jobs)} left"

    def _log(self, task: Task) -> Path:
        return self.lab.folder / "logs" / f"{task.name}.log"


def _main(words: str) -> None:
    given = json.loads(words)
    task = given["task"]
    lab = Lab(Path(given["folder"]), SCALES[given["scale"]], tuple(given["overrides"]))
    execute(lab, Task(task["name"], task["kind"], tuple(task["runs"]), task["arguments"]))


if __name__ == "__main__":
    _main(sys.argv[1])

"""A lab: the folder of one scale's runs and measurements, and the tasks that fill it.

A task is one training run, or one measurement of finished runs; its result is a JSON file below the lab, so nothing is
done twice and an interrupted experiment goes on where it was. Experiments say which tasks they need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from twist_fl.blueprint.division import Setting
from twist_fl.config.schema import Config, load_config
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.errors import ConfigError
from twist_fl.system.files import read_json, write_json

Runner = Literal["local", "flower"]
TRAIN = "train"


@dataclass(frozen=True)
class Scale:
    """How large the runs of an experiment are."""

    name: str
    preset: str
    overrides: tuple[str, ...]
    tickets: int
    """Random tickets per size."""
    runner: Runner
    """local: each run in one process, as many at a time as there are cores; flower: one simulation after another."""
    about: str
    needs: tuple[str, ...] = ()
    """Settings that its user must give."""
    seeds: int = 3
    """Runs of what an experiment repeats over seeds."""


PLAIN = (*("train.schedule=constant", "train.warmup=0", "train.clip_norm=null", "train.beta2=0.999"), "train.lr=1e-3")
"""The paper's experiments keep the paper's optimiser: what they compare is drawn, not scheduled."""
ALIKE = (
    *("blueprint.num_sub=4", "blueprint.assign=fixed", "blueprint.common=0", "blueprint.scale=sqrt"),
    *("aggregate.optimizer=mean", "aggregate.momentum=0.9"),
)
"""And the paper's workers, all of one size; the two larger scales have half of the blocks."""
SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            "tiny",
            "demo",
            ("train.device=cpu", "train.threads=1", "eval.every=20", "checkpoint_every=20", *PLAIN, *ALIKE),
            20,
            "local",
            "0.5 M parameters from scratch, the demo's text, 100 intervals; table1 takes four cores half an hour",
        ),
        Scale(
            "small",
            "wikitext2",
            ("train.threads=1", *PLAIN, *ALIKE, "blueprint.num_sub=1/2"),
            20,
            "local",
            "0.8 M parameters from scratch on WikiText-2 (data.path=FOLDER), 3 epochs; a CPU night or a GPU hour",
            seeds=1,
        ),
        Scale(
            "smollm2",
            "wikitext2",
            (
                *("train.device=cpu", "train.threads=1", "train.rounds=30", "train.interval=5", "train.batch_size=1"),
                *("train.beta2=0.95", *ALIKE, "blueprint.num_sub=1/2"),
                *("data.window=512", "blueprint.ffn_blocks=12", "checkpoint_every=3"),
                *("blueprint.undivided_first=2", "blueprint.undivided_last=2"),
                *("eval.every=0", "eval.batch_size=4", "eval.max_windows=32"),
            ),
            20,
            "local",
            "SmolLM2-135M on WikiText-2 (model.pretrained=FILE data.path=FOLDER); for the experiment "
            "`pretrained`: three hours of two cores, 20 GB of memory",
            ("model.pretrained", "data.path"),
            seeds=1,
        ),
        Scale(
            "paper",
            "gpt2-wikitext103",
            (),
            20,
            "flower",
            "the paper's: GPT-2 124M on WikiText-103, 3 epochs, four workers; GPUs and the hub",
        ),
    )
}


@dataclass(frozen=True)
class Task:
    """`kind` is "train" or a name of `measures.MEASURES`; `name` is unique and becomes a path below the lab."""

    name: str
    kind: str
    runs: tuple[str, ...] = ()
    """Training tasks that must be finished before. Of training: the one whose model it starts from, if any."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of training: `overrides`, a list of key=value. Of a measurement: its function's keywords."""


def train(name: str, *overrides: str, after: Task | None = None) -> Task:
    """A run, from scratch (or the preset's checkpoint) or from the model that `after` has trained."""
    return Task(name, TRAIN, (after.name,) if after else (), {"overrides": list(overrides)})


def measure(kind: str, run: Task, **arguments: Any) -> Task:
    """One measurement of one run: `measures.MEASURES[kind](folder, **arguments)`."""
    words = "-".join("+".join(map(str, v)) if isinstance(v, (list, tuple)) else str(v) for v in arguments.values())
    return Task(f"{run.name}/{kind}-{words}" if words else f"{run.name}/{kind}", kind, (run.name,), arguments)


@dataclass(frozen=True)
class Lab:
    folder: Path
    scale: Scale
    overrides: tuple[str, ...] = ()

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.folder / "runs" / name)

    @cached_property
    def settings(self) -> tuple[Setting, ...]:
        """What experiments that compare settings compare: all, or the one that blueprint.setting names."""
        named = any(word.startswith("blueprint.setting=") for word in self.overrides)
        return (self.base.blueprint.setting,) if named else get_args(Setting)

    def words(self, task: Task) -> list[str]:
        """The overrides of a training task. Raises ConfigError if the lab's would make another run of it."""
        own = dict(word.split("=", 1) for word in task.arguments["overrides"])
        for word in self.overrides:
            key, _, value = word.partition("=")
            if key != "seed" and own.get(key, value) != value:  # a run with a seed of its own counts from the lab's
                raise ConfigError(f"{word} would change {task.name}, which is {key}={own[key]}: leave it out")
        wanted = [*self.scale.overrides, *self.overrides, *task.arguments["overrides"]]
        wanted += [f"model.pretrained={self.run(name).path}" for name in task.runs]
        return [*wanted, f"name={task.name}", f"dir={self.run(task.name).path}"]

    def config(self, task: Task) -> Config:
        """Of a training task. Raises ConfigError."""
        return load_config(self.scale.preset, self.words(task))

    @cached_property
    def base(self) -> Config:
        """The scale's settings without any run's own."""
        return load_config(self.scale.preset, [*self.scale.overrides, *self.overrides])

    def file(self, task: Task) -> Path:
        """Where a measurement's result goes, and of which runs it is; of a run, from which others it started."""
        return self.folder / "measured" / f"{task.name}.json"

    def result(self, task: Task) -> dict[str, Any]:
        """A training run's results.json, or what a measurement gave. The task must be done."""
        if task.kind == TRAIN:
            found: dict[str, Any] = read_json(self.run(task.name).results_file)
            return found
        return dict(read_json(self.file(task))["result"])

    def is_done(self, task: Task) -> bool:
        """What was done with a run that has been made anew since does not count."""
        there = bool(self.run(task.name).events("done")) if task.kind == TRAIN else self.file(task).is_file()
        return there and self._stamped(task) == self.stamp(task)

    def stamp(self, task: Task) -> dict[str, str | None]:
        """The runs that a task is done with, as they are now."""
        return {name: self.run_id(name) for name in task.runs}

    def _stamped(self, task: Task) -> dict[str, str | None]:
        """As `stamp`, of when the task was done or, a training run, begun."""
        file = self.file(task)
        return dict(read_json(file)["of"]) if file.is_file() else {}

    def begin(self, task: Task) -> None:
        """Before a run's folder is made: note what it starts from."""
        if task.runs:
            write_json({"of": self.stamp(task)}, self.file(task))

    def refuse_other_start(self, task: Task) -> None:
        """Raises ConfigError if the run that is here started from another run than the lab has now."""
        if self._stamped(task) != self.stamp(task):
            raise ConfigError(
                f"{self.run(task.name).path} did not start from the {task.runs[0]!r} that is (or will be) in this lab, "
                "or does not say so: remove it to train it anew"
            )

    def run_id(self, name: str) -> str | None:
        file = self.run(name).job_file
        return str(read_json(file)["run_id"]) if file.is_file() else None

"""`twist-fl reproduce`: plan an experiment's tasks, do those that are missing, and show what came out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from twist_fl.cli.train import resume, train_new
from twist_fl.config.schema import Config, load_config
from twist_fl.config.suggest import nearest, settings_named
from twist_fl.experiments.catalog import EXPERIMENTS
from twist_fl.experiments.experiment import Data, Experiment
from twist_fl.experiments.lab import SCALES, TRAIN, Lab, Task
from twist_fl.experiments.pages import write_page
from twist_fl.experiments.runner import Pool, check
from twist_fl.report import plots
from twist_fl.report.cells import Cells, markdown, terminal_table
from twist_fl.report.document_tables import fill, origin
from twist_fl.system.cores import usable_cores
from twist_fl.system.errors import ConfigError
from twist_fl.system.files import read_json, write_json, write_text
from twist_fl.system.provenance import provenance

EVERY = "all"


def reproduce(
    console: Console,
    names: Sequence[str],
    scale: str,
    overrides: Sequence[str],
    *,
    folder: Path | None = None,
    out: Path | None = None,
    jobs: int | None = None,
    seeds: int | None = None,
    dry_run: bool = False,
    doc: Path | None = None,
) -> None:
    """Do the experiments `names` at `scale`; tables, figures, JSON and report.html go to `out` (default: the lab).

    `seeds` runs are made of what an experiment repeats (default: the scale's number).
    Raises ConfigError for an unknown name or an impossible setting, LaunchError if a task fails.
    """
    if scale not in SCALES:
        raise ConfigError(f"--scale {scale!r} must be one of {', '.join(SCALES)}{nearest(scale, SCALES)}")
    if missing := set(SCALES[scale].needs) - {word.partition("=")[0] for word in overrides}:
        raise ConfigError(f"--scale {scale} needs {' '.join(f'{key}=...' for key in sorted(missing))} after the name")
    chosen = [_experiment(name) for name in (EXPERIMENTS if EVERY in names else names)]
    wanted = replace(SCALES[scale], seeds=seeds or SCALES[scale].seeds)
    lab = Lab((folder or Path("runs/reproduce") / scale).resolve(), wanted, tuple(overrides))
    if not lab.base.eval.sizes:
        raise ConfigError("eval.sizes=[] leaves nothing to compare: give at least one size, or leave it out")
    tasks = list({task.name: task for experiment in chosen for task in experiment.tasks(lab)}.values())
    check(lab, tasks)
    if dry_run:
        _show_plan(console, lab, chosen, tasks)
        return
    target = out or lab.folder
    if lab.scale.runner == "flower":
        _train_by_flower(console, lab, [task for task in tasks if task.kind == TRAIN])
    Pool(console, lab, tasks, jobs or usable_cores()).run()
    for experiment in chosen:
        _show(console, lab, experiment, target)
    page = write_page(target)
    if doc is not None:
        fill_page(doc, target)
    console.print(f"tables, figures and JSON in {target}; all of it in {page}", soft_wrap=True)


def _experiment(name: str) -> Experiment:
    if name not in EXPERIMENTS:
        known = [*EXPERIMENTS, EVERY]
        if settings := settings_named(name, Config):
            raise ConfigError(f"{name!r} is no experiment but a setting, which has a value: {settings[0]}=...")
        raise ConfigError(f"no experiment {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    return EXPERIMENTS[name]


def _show_plan(console: Console, lab: Lab, chosen: Sequence[Experiment], tasks: Sequence[Task]) -> None:
    """What would be done, and what of it is done already."""
    lines: Cells = [["task", "kind", "state"]]
    for task in tasks:
        lines.append([task.name, task.kind, "done" if lab.is_done(task) else "to do"])
    runs = [task for task in tasks if task.kind == TRAIN]
    config = lab.base
    console.print(f"{', '.join(each.name for each in chosen)} at scale {lab.scale.name}: {lab.scale.about}")
    for line in lines:
        console.print("  ".join(cell.ljust(width) for cell, width in zip(line, (46, 12, 6), strict=True)).rstrip())
    todo = sum(not lab.is_done(task) for task in tasks)
    budget = f"{config.train.rounds} intervals" if config.train.rounds else f"{config.train.epochs} epochs"
    console.print(
        f"{len(runs)} training runs of {budget}, {len(tasks) - len(runs)} measurements; {todo} tasks to do "
        f"by {'Flower simulations, one after another' if lab.scale.runner == 'flower' else 'processes without Flower'}"
    )


def _train_by_flower(console: Console, lab: Lab, runs: Sequence[Task]) -> None:
    for task in runs:
        folder = lab.run(task.name)
        if folder.job_file.is_file():
            resume(console, folder.path)
        else:
            lab.begin(task)
            train_new(console, load_config(lab.scale.preset, lab.words(task)))


def _show(console: Console, lab: Lab, experiment: Experiment, target: Path) -> None:
    """NAME.json, NAME.md and the figures; the tables in the terminal too."""
    data: Data = {"experiment": experiment.name, **experiment.collect(lab)}
    about: dict[str, Any] = {"scale": lab.scale.name, "preset": lab.scale.preset, "seed": lab.base.seed}
    words = (word for word in (*lab.scale.overrides, *lab.overrides) if not word.startswith("data.path="))
    about["overrides"] = [portable(word) for word in words]
    about["commits"] = sorted({commit for task in experiment.tasks(lab) if (commit := _commit_of(lab, task))})
    data["provenance"] = provenance() | about
    write_json(data, target / f"{experiment.name}.json")
    write_text(render(data), target / f"{experiment.name}.md")
    for name, draw in experiment.figures.items():
        plots.save_png(partial(draw, data), target / f"{name}.png")
    for caption, cells in experiment.tables(data).items():
        console.print(terminal_table(caption, cells))
    for note in experiment.notes(data):
        console.print(note, highlight=False)


def portable(word: str) -> str:
    """A path of this machine says its last part only, as in `results.portable_config`."""
    key, _, value = word.partition("=")
    return f"{key}={Path(value).name}" if Path(value).is_absolute() else word


def _commit_of(lab: Lab, task: Task) -> str | None:
    """Of the tree that did the task."""
    commit = read_json(lab.run(task.name).results_file if task.kind == TRAIN else lab.file(task)).get("commit")
    return str(commit) if commit else None


def render(data: Data, images: str = "") -> str:
    """An experiment's tables, figures (in the folder `images`), notes and origin as Markdown."""
    experiment = EXPERIMENTS[data["experiment"]]
    parts = [f"**{caption}**\n\n{markdown(cells)}" for caption, cells in experiment.tables(data).items()]
    for name in experiment.figures:
        parts.append(f"![{experiment.title}]({images}{name}.png)\n\n*{experiment.reading(data)}*\n")
    parts.append("".join(f"- {note}\n" for note in experiment.notes(data)))
    parts.append(f"{origin(data['provenance'])}\n")
    return "\n".join(parts)


def fill_page(page: Path, results: Path) -> None:
    """Bring every `<!-- table: NAME -->` of a Markdown page up to NAME.json in `results`.

    Raises KeyError for a result that has no place in the page.
    """
    images = f"{Path(os.path.relpath(results.resolve(), page.resolve().parent)).as_posix()}/"
    found = {name: read_json(results / f"{name}.json") for name in EXPERIMENTS
             if (results / f"{name}.json").is_file()}  # fmt: skip
    write_text(fill(page.read_text(), {name: render(data, images) for name, data in found.items()}), page)

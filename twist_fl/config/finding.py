"""Runs by their folders: what is in a folder of runs, and the nearest run to a path that holds none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from shlex import quote

from twist_fl.config.hub import beside, expanded
from twist_fl.system.errors import ConfigError

_SHOWN = 8


def is_run(folder: Path) -> bool:
    return (folder / "job.json").is_file()


def runs_in(folder: Path) -> list[Path]:
    """The runs one or two folders below `folder`, as runs/mine and runs/demo/twist are below runs."""
    return sorted(file.parent for depth in ("*", "*/*") for file in folder.glob(f"{depth}/job.json"))


def checkpoints_of(run: Path) -> dict[int, Path]:
    """A run's whole checkpoints by their rounds, oldest first. Copies that somebody made beside them are none."""
    found = ((re.fullmatch(r"round-(\d{6,18})", path.name, re.ASCII), path) for path in run.glob("checkpoints/round-*"))
    return dict(sorted((int(match[1]), path) for match, path in found if match and path.is_dir()))


def no_run(path: Path) -> ConfigError:
    """What to say of a path that was given for a run and holds none: the runs in it, around it, or like it."""
    if found := runs_in(path):
        return ConfigError(f"{path} holds no run itself (no job.json), but runs: give {listed(found)}")
    if around := next((above for above in path.parents if is_run(above)), None):
        return ConfigError(f"{path} is a part of a run: give the run, {around}")
    if path.exists():
        return ConfigError(f"{path} holds no run (no job.json): give the folder of a run that was started")
    started = f"{path} does not exist: give the folder of a run that was started"
    same = [run for run in runs_in(Path("runs").resolve()) if path.name in run.parts[-2:]]
    return ConfigError(started + (f", did you mean {listed(same)}?" if same else beside(path)))


def listed(paths: Sequence[Path]) -> str:
    """Paths with "or" between them, below the current folder as one would type them."""
    here = Path.cwd()
    words = [str(path.relative_to(here) if path.is_relative_to(here) else path) for path in paths[:_SHOWN]]
    return " or ".join(words) + (f" ({len(paths) - _SHOWN} more)" if len(paths) > _SHOWN else "")


def finished_runs(paths: Iterable[Path]) -> list[Path]:
    """The runs given; of a folder of runs those in it that are finished. Raises ConfigError if none is."""
    found: list[Path] = []
    for path in map(expanded, paths):
        if not path.is_dir():
            raise no_run(path.resolve())
        if is_run(path) or (path / "results.json").is_file() or not (inside := runs_in(path)):
            found.append(path)
            continue
        finished = [run for run in inside if (run / "results.json").is_file()]
        if not finished:
            raise ConfigError(
                f"{path} holds {len(inside)} runs and none is finished: go on with `twist-fl train --resume "
                f"{quote(listed(inside[:1]))}`, for example"
            )
        found += finished
    return list(dict.fromkeys(found))

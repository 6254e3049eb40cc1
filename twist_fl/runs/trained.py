"""A trained run: its job and its newest state, and the ticket sizes one asks of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twist_fl.config.shares import ShareError, blocks_of_share
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.errors import ConfigError


def load_final(path: Path, places: Sequence[str] = ()) -> tuple[RunFolder, Any, Any]:
    """A run's folder, job and newest state; `places` say where its text is now. Raises ConfigError if it has no
    checkpoint yet."""
    folder = RunFolder(path)
    folder.check_run()
    from twist_fl.runs.resume import at_places

    job = at_places(folder.job(), places)
    state = folder.load()
    if state is None:
        raise ConfigError(f"{folder.path} has no checkpoint yet: let it train for checkpoint_every rounds")
    return folder, job.scored(state.scores), state


def chosen_sizes(job: Any, given: Sequence[int] | ShareError | None) -> list[int]:
    """The ticket sizes given, else the run's. Raises ConfigError if a size is impossible, or the run has none."""
    from twist_fl.config.sizes import blocks_per_layer, ticket_sizes

    if isinstance(given, ShareError):
        of = blocks_per_layer(job.layout, job.division)
        raise ConfigError(blocks_of_share(given, of, "blocks of a divided layer"))
    sizes: list[int] = list(given or job.config.eval.sizes)
    if not sizes:
        raise ConfigError("the run has eval.sizes=[]: give sizes, for example --sizes 8,6,4")
    try:
        for size in sizes:
            ticket_sizes(job.layout, job.division, size)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return sizes

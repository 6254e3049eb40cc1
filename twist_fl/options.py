"""Arguments and options that several commands of `cli.py` take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

RunDir = Annotated[Path, typer.Argument(help="Folder of a trained run, for example runs/demo/twist.")]
Sizes = Annotated[
    str | None, typer.Option(help="Ticket sizes in blocks per divided layer, as 8,6,4; default: as the run.")
]
Draws = Annotated[int, typer.Option(min=1, max=100_000, help="Random tickets per size; prune: for se and se-unscaled.")]
Windows = Annotated[int | None, typer.Option(min=1, help="Test windows to use; default: as the run.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the ticket and of the sampling.")]
Places = Annotated[
    list[str] | None,
    typer.Argument(help="data.path=NEW (or data.tokenizer=NEW) if the run's text has moved; its hash is checked."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="key=value settings, for example train.lr=1e-3 blueprint.num_sub=4; `twist-fl keys` lists them."
    ),
]


def new_folder(text: str, *names: str) -> Any:
    """An option for a folder that is made: no file may stand there."""
    return typer.Option(*names, file_okay=False, help=text)


def new_file(text: str) -> Any:
    """An option for a file that is written: no folder may stand there."""
    return typer.Option(dir_okay=False, help=text)

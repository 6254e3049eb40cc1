"""report.html of experiments: one self-contained page, without scripts, of every result in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from html import escape
from pathlib import Path

from twist_fl import plots
from twist_fl.experiments.catalog import EXPERIMENTS
from twist_fl.experiments.experiment import Data, Experiment
from twist_fl.files import write_text
from twist_fl.report import note, page, table

TITLE = "TwIST on Flower: the paper's experiments"


def write_page(folder: Path) -> Path:
    """Of every experiment whose NAME.json is in `folder`, in the catalogue's order."""
    body = [f"<h1>{TITLE}</h1>"]
    for name, experiment in EXPERIMENTS.items():
        file = folder / f"{name}.json"
        if file.is_file():
            body += _section(experiment, json.loads(file.read_text()))
    out = folder / "report.html"
    write_text(page(TITLE, "\n".join(body)), out)
    return out


def _section(experiment: Experiment, data: Data) -> Iterator[str]:
    yield f"<h2>{escape(experiment.name)}: {escape(experiment.title)}</h2>"
    for name, draw in experiment.figures.items():
        label = f'<svg role="img" aria-label="{escape(experiment.title, quote=True)}"'
        yield f"<figure>{plots.svg(partial(draw, data), name).replace('<svg', label, 1)}</figure>"
    for caption, cells in experiment.tables(data).items():
        yield f"<h3>{escape(caption)}</h3>{table(cells)}"
    for sentence in experiment.notes(data):
        yield note(sentence)
    about = data["provenance"]
    hardware = about["hardware"]
    yield note(
        f"Scale {about['scale']} (preset {about['preset']}), seed {about['seed']}; commit {about['commit']}, runs of "
        f"{', '.join(about['commits']) or 'no commit'}; {hardware['processor']}, {hardware['cores']} cores, "
        f"GPU: {hardware['gpu'] or 'none'}."
    )

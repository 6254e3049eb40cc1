"""report.html of experiments: one self-contained page, without scripts, of every result in a folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from html import escape
from pathlib import Path

from twist_fl.experiments.catalog import EXPERIMENTS
from twist_fl.experiments.experiment import Data, Experiment
from twist_fl.report.document_tables import short_commit
from twist_fl.report.glossary import ALGORITHMS, WORDS
from twist_fl.report.webpage import figure, note, page, table, terms
from twist_fl.system.files import read_json, write_text

TITLE = "TwIST on Flower: the paper's experiments"


def write_page(folder: Path) -> Path:
    """Of every experiment whose NAME.json is in `folder`, in the catalogue's order."""
    found = {name: read_json(file) for name in EXPERIMENTS if (file := folder / f"{name}.json").is_file()}
    meanings = WORDS | dict(ALGORITHMS.values())
    body = [f"<h1>{TITLE}</h1>", *_contents([EXPERIMENTS[name] for name in found]), terms(meanings)]
    for name, data in found.items():
        body += _section(EXPERIMENTS[name], data)
    out = folder / "report.html"
    write_text(page(TITLE, "\n".join(body)), out)
    return out


def _contents(experiments: Sequence[Experiment]) -> Iterator[str]:
    items = (f'<li><a href="#{each.name}">{escape(each.title)}</a></li>' for each in experiments)
    yield f"<nav><ul>{''.join(items)}</ul></nav>"


def _section(experiment: Experiment, data: Data) -> Iterator[str]:
    yield f'<h2 id="{experiment.name}">{escape(experiment.title)}</h2>'
    for name, draw in experiment.figures.items():
        yield figure(partial(draw, data), name, experiment.title, experiment.reading(data))
    for caption, cells in experiment.tables(data).items():
        yield table(cells, caption)
    for sentence in experiment.notes(data):
        yield note(sentence)
    about = data["provenance"]
    hardware = about["hardware"]
    yield note(
        f"Made by twist-fl reproduce {experiment.name} at scale {about['scale']} (preset {about['preset']}), seed "
        f"{about['seed']}; commit {short_commit(about['commit'])}, runs of "
        f"{', '.join(map(short_commit, about['commits'])) or 'no commit'}; {hardware['processor']}, "
        f"{hardware['cores']} cores, GPU: {hardware['gpu'] or 'none'}."
    )

"""One HTML file that shows finished runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from twist_fl.report import plots
from twist_fl.report.cells import Cells
from twist_fl.report.compare import MISSING, FinishedRun, Row, read_runs, row_of
from twist_fl.report.conclusions import conclusions
from twist_fl.report.glossary import ALGORITHMS, LOWER, WORDS
from twist_fl.report.tables import (
    DEVICE_BYTES,
    DEVICES,
    MEMORY,
    PERPLEXITY,
    SENT,
    against_pruning_table,
    device_tables,
    run_tables,
    ticket_cells,
)
from twist_fl.report.webpage import details, figure, note, page, paragraph, table, terms
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.files import write_text
from twist_fl.system.units import count


def figures(runs: Sequence[RunFolder], folder: Path) -> list[Path]:
    """Write perplexity_vs_kappa.png, training.png and, where tickets were drawn, tickets.png."""
    finished = read_runs(runs)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in plots.drawings(finished).items():
        written.append(folder / f"{name}.png")
        plots.save_png(partial(draw, finished), written[-1])
    return written


def write_report(
    runs: Sequence[RunFolder],
    out: Path,
    deployed: Sequence[Mapping[str, Any]] = (),
    against_pruning: Sequence[Mapping[str, Any]] = (),
    title: str = "TwIST on Flower: run report",
) -> None:
    """Write `out`: what to conclude, what the words mean, tables, figures, devices, configuration and provenance.

    `deployed` has a mapping per edge device, as in deployed.json; what is missing shows as a dash. `against_pruning`
    has one per model, as in against_pruning.json.
    Raises ConfigError for a run that has not finished.
    """
    finished = read_runs(runs)
    tables = run_tables(rows := [row_of(run) for run in finished])
    body = [
        f"<h1>{escape(title)}</h1>",
        *_summary(finished),
        *_words(finished),
        *_against_pruning(against_pruning),
        *_perplexities(finished, tables),
        *_figures(finished),
        *_devices(deployed),
        *_costs(rows, tables),
        *_configuration(finished),
        *_provenance(finished),
    ]
    write_text(page(title, "\n".join(body)), out)


def _summary(runs: Sequence[FinishedRun]) -> Iterator[str]:
    """What the numbers say, and what would make them say less."""
    yield paragraph(f"Perplexity: {LOWER}. {' '.join(conclusions(runs))}")
    for run in runs:
        if run.lost_replies:
            lost = f"{count(run.lost_replies, 'reply')} of workers did not count"
            yield paragraph(f"{run.label}: {lost}; those rounds are the mean of the others.")
    seeds = _each([str(run.config["seed"]) for run in runs])
    yield note(f"A run is one training with one seed ({seeds}): small differences may be chance.")


def _words(runs: Sequence[FinishedRun]) -> Iterator[str]:
    yield "<h2>What the words mean</h2>"
    present = dict.fromkeys(run.config["algorithm"] for run in runs)
    yield terms(WORDS | dict(ALGORITHMS[algorithm] for algorithm in present))


def _against_pruning(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not rows:
        return
    yield "<h2>Why not just prune?</h2>"
    ((caption, cells),) = against_pruning_table(rows).items()
    yield table(cells, caption)
    yield note(
        "Pruned models keep the same share of the divided layers' weights as zeros in a model of full size: zeros take "
        "as much room on disk, and as long to compute. A ticket is a smaller model, a random one here, and its "
        f"perplexity a mean over {max(row['draws'] for row in rows)} draws. Prompt tokens are what one CPU thread "
        "reads in a second; the last column is what pruning and its calibration took."
    )


def _perplexities(runs: Sequence[FinishedRun], tables: Mapping[str, Cells]) -> Iterator[str]:
    yield "<h2>Perplexity</h2>"
    yield table(tables[PERPLEXITY], PERPLEXITY)
    tokens = _each([f"{run.results['test_tokens']:,}" for run in runs], "tokens")
    yield note(
        f"Measured on the test split ({tokens}), which no run has trained on. k/n: random tickets "
        f"({_each([_draws(run) for run in runs], 'per size')}) of k of the n blocks in every divided layer."
    )
    every = [
        table(ticket_cells(run.tickets), f"{run.label}: perplexity ({LOWER}) of {_draws(run)} random tickets per size")
        for run in runs
        if run.tickets
    ]
    if every:
        yield details("Every ticket size", "\n".join(every))


def _costs(rows: Sequence[Row], tables: Mapping[str, Cells]) -> Iterator[str]:
    yield "<h2>Bytes, memory, time</h2>"
    yield table(tables[SENT], SENT)
    yield note(
        "Predicted is what the paper's Appendix C counts. Moments are the two running averages that Adam, the "
        "optimiser, keeps for each weight: twice the weights' bytes where they travel. All else: which blocks a worker "
        "holds, its configuration, its metrics. Replies lost did not count."
    )
    if not any(row.weight_bytes for row in rows):
        yield note("Nothing was sent: the runs trained in one process. Predicted is what they would have sent.")
    yield table(tables[MEMORY], MEMORY)
    yield note(
        "Peak memory is the most that a worker held while it trained, above what it held before it had a model: on a "
        "GPU what torch allocated, else resident memory, with what libraries and messages take. Predicted for it is "
        "what the paper counts: weights, gradients and two moments, 16 bytes a parameter, and 0.06 GiB, without "
        "activations. The wall clock is without evaluation."
    )


def _figures(runs: Sequence[FinishedRun]) -> Iterator[str]:
    seeds = f"Seed: {_each([str(run.config['seed']) for run in runs])}."
    draws = f"{_each([_draws(run) for run in runs], 'draws per size')}. {seeds}"
    captions = {
        "training": f"Training loss of every round (thin) and its mean over {plots.smoothing_rounds(runs)} "
        f"intervals (bold); below, perplexity of the full model on the test split's first {plots.watched(runs)} "
        f"windows. Of both, {LOWER}. {seeds}",
        "perplexity_vs_kappa": f"Perplexity ({LOWER}) of random tickets without fine-tuning, by the blocks they hold; "
        "rightmost, the full model. A flat line: small models are as good as the whole. Bars: one standard "
        f"deviation; thin lines: lowest to highest draw. {draws}",
        "tickets": f"Perplexity ({LOWER}) of every random ticket: a dot per draw; boxes from the first to the third "
        "quartile with the median, whiskers to the extremes. All panels have one scale, runs stand in the legend's "
        f"order. {draws}",
    }
    titles = {
        "training": "Training",
        "perplexity_vs_kappa": "Perplexity against ticket size",
        "tickets": "Distribution of tickets",
    }
    for name, draw in plots.drawings(runs).items():
        yield f"<h2>{titles[name]}</h2>"
        yield figure(partial(draw, runs), name, titles[name], captions[name])


def _draws(run: FinishedRun) -> str:
    """Tickets per size: '20', or '1 to 20' if sizes differ."""
    counts = sorted({len(ticket["perplexities"]) for ticket in run.tickets})
    return " to ".join(str(count) for count in dict.fromkeys([counts[0], counts[-1]])) if counts else "no"


def _devices(deployed: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not deployed:
        return
    yield "<h2>Models on devices</h2>"
    tables = device_tables(deployed)
    yield table(tables[DEVICES], DEVICES)
    yield note(
        "Each device got the largest ticket that meets its limits, as a model of its own: MB are of weights and the KV "
        "cache of one full context, ms are the device's own for each token it writes, prompt tokens are what it reads "
        "before it writes, κ is the share of a divided layer's blocks."
    )
    yield table(tables[DEVICE_BYTES], DEVICE_BYTES)
    yield note("Peak memory is measured on the device's side; received are all tickets it was sent to find one.")


def _configuration(runs: Sequence[FinishedRun]) -> Iterator[str]:
    yield "<h2>Configuration</h2>"
    flat = [dict(_flat(run.config)) for run in runs]
    keys = dict.fromkeys(key for each in flat for key in each)
    differing = [key for key in keys if len({str(each.get(key)) for each in flat}) > 1]
    if differing:
        lines = [[key, *(str(each.get(key, MISSING)) for each in flat)] for key in differing]
        yield table(
            [["setting", *(run.label for run in runs)], *lines], "Settings in which the runs differ", words=True
        )
    elif len(runs) > 1:
        yield note("The runs have the same configuration.")
    for run in runs:
        yield details(f"All settings of {run.label}", f"<pre>{escape(OmegaConf.to_yaml(run.config))}</pre>")


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _provenance(runs: Sequence[FinishedRun]) -> Iterator[str]:
    yield "<h2>Provenance</h2>"
    facts = [_facts(run) for run in runs]
    yield table(
        [["", "of the runs"], *([name, _each([each[name] for each in facts])] for name in facts[0])],
        "Where the numbers come from",
        words=True,
    )
    if any(each["commit"].endswith("+") for each in facts):
        yield note("A plus after the commit: the tree had uncommitted changes.")


def _facts(run: FinishedRun) -> dict[str, str]:
    results, config, hardware = run.results, run.config, run.results["hardware"]
    data = config["data"]
    return {
        "commit": results["commit"] or "unknown",
        "versions": f"twist_fl {results['twist_fl']}, Python {results['python']}, torch {results['torch']}",
        "hardware": f"{hardware['processor']}, {hardware['cores']} cores; GPU: {hardware['gpu'] or 'none'}",
        "seed": str(config["seed"]),
        "data": data["source"] + (f" {data['name']}" if data["source"] == "wikitext" else ""),
        "corpus digest": str(results["corpus"]),
        "test tokens": f"{results['test_tokens']:,}",
        "parameters": f"{results['num_params']:,}",
        "rounds": f"{results['rounds']:,}",
    }


def _each(values: Sequence[str], what: str = "") -> str:
    """The value that all runs share, or each run's, of `what`."""
    text = " / ".join(values if len(set(values)) > 1 else values[:1]) + (what and f" {what}")
    return text + ", in the order of the table" * (len(set(values)) > 1)

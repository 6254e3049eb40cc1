"""One HTML file that shows finished runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from twist_fl import plots
from twist_fl.checkpoint import RunFolder
from twist_fl.compare import (
    MISSING,
    FinishedRun,
    Row,
    comparison_table,
    duration_text,
    kappa,
    limits_text,
    perplexity_text,
    read_runs,
    row_of,
    size_label,
    sizes_of,
    table_cells,
)
from twist_fl.files import write_text
from twist_fl.webpage import details, figure, note, page, table

__all__ = ["Row", "comparison_table", "duration_text", "figures", "table_cells", "write_report"]

_DEVICE_COLUMNS = {
    "name": "device",
    "limits": "limits",
    "size": "blocks",
    "num_params": "parameters",
    "weight_mb": "weights, MB",
    "bytes_received": "bytes received",
    "perplexity": "perplexity",
    "ms_per_token": "ms per token",
    "peak_mb": "peak memory, MB",
}


def figures(runs: Sequence[RunFolder], folder: Path) -> list[Path]:
    """Write training.png, perplexity_vs_kappa.png and, where tickets were drawn, tickets.png."""
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
    title: str = "TwIST on Flower: run report",
) -> None:
    """Write `out`: summary, table, figures, deployed devices, configuration and provenance of finished `runs`.

    `deployed` has a mapping per edge device, as in deployed.json; what is missing shows as a dash.
    Raises ConfigError for a run that has not finished.
    """
    finished = read_runs(runs)
    rows = [row_of(run) for run in finished]
    body = [
        f"<h1>{escape(title)}</h1>",
        *_summary(finished),
        *_comparison(finished, rows),
        *_figures(finished),
        *_devices(deployed),
        *_configuration(finished),
        *_provenance(finished),
    ]
    write_text(page(title, "\n".join(body)), out)


def _summary(runs: Sequence[FinishedRun]) -> Iterator[str]:
    yield "<ul>"
    for run in runs:
        yield f"<li><b>{escape(run.label)}</b>: {escape(_in_words(run))}</li>"
    yield "</ul>"


def _in_words(run: FinishedRun) -> str:
    """The full model's perplexity, and how many times that of it a ticket of about a third of the blocks has."""
    full = f"the full model has perplexity {perplexity_text(run.full)}"
    if not run.tickets:
        return f"{full}; no tickets were drawn."
    ticket = min(run.tickets, key=lambda each: abs(kappa(size_label(each)) - 1 / 3))
    return (
        f"{full}; random tickets of {size_label(ticket)} blocks, without fine-tuning, have "
        f"{perplexity_text(ticket['mean'])} on average, {ticket['mean'] / run.full:.3g} times that."
    )


def _comparison(runs: Sequence[FinishedRun], rows: Sequence[Row]) -> Iterator[str]:
    yield "<h2>Comparison</h2>"
    yield table(table_cells(rows))
    tokens = _each([f"{run.results['test_tokens']:,}" for run in runs], "tokens")
    yield note(
        f"Perplexity on the test split ({tokens}). Under k/n: mean ± standard deviation over random tickets "
        f"({_each([_draws(run) for run in runs], 'per size')}) of k of the n blocks in every divided layer. "
        "Bytes are both directions of all rounds and workers. Peak memory is the most that a worker held while it "
        "trained, above what it held before it had a model: on a GPU what torch allocated, else resident memory, with "
        "what libraries and messages take. Predicted for it is the cost model's: weights, gradients and two moments, "
        "16 bytes a parameter, and 0.06 GiB; no activations. Wall clock is without evaluation."
    )
    if not any(row.weight_bytes for row in rows):
        yield note("Nothing was sent: the runs trained in one process. Predicted is what they would have sent.")
    lost = [sum(len(each["dropped"]) for each in run.rounds) for run in runs]
    if any(lost):
        yield note(f"Replies that did not count: {_each([str(number) for number in lost])}.")
    if sizes_of(rows):
        yield details("Every ticket size", table(list(_ticket_rows(runs))))


def _ticket_rows(runs: Sequence[FinishedRun]) -> Iterator[list[str]]:
    yield ["run", "blocks", "κ", "parameters", "draws", "mean", "std", "min", "max"]
    for run in runs:
        for ticket in run.tickets:
            size, spread = size_label(ticket), [perplexity_text(ticket[key]) for key in ("mean", "std", "min", "max")]
            counts = [f"{ticket['num_params']:,}", str(len(ticket["perplexities"]))]
            yield [run.label, size, f"{kappa(size):.3f}", *counts, *spread]


def _figures(runs: Sequence[FinishedRun]) -> Iterator[str]:
    seeds = f"Seed: {_each([str(run.config['seed']) for run in runs])}."
    draws = f"{_each([_draws(run) for run in runs], 'draws per size')}. {seeds}"
    captions = {
        "training": f"Training loss of every round (thin) and its mean over {plots.smoothing_rounds(runs)} "
        f"intervals (bold); perplexity of the full model on the test split's first {plots.watched(runs)} windows. "
        f"{seeds}",
        "perplexity_vs_kappa": "Perplexity of random tickets without fine-tuning against their size; rightmost, the "
        f"full model. Bars: one standard deviation; thin lines: lowest to highest draw. {draws}",
        "tickets": "Perplexity of every random ticket: a dot per draw; boxes from the first to the third quartile with "
        "the median, whiskers to the extremes. Runs stand in the legend's order; each panel has its own scale. "
        f"{draws}",
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
    yield "<h2>Edge devices</h2>"
    lines = [[_device_text(device, key) for key in _DEVICE_COLUMNS] for device in deployed]
    yield table([list(_DEVICE_COLUMNS.values()), *lines])
    yield note(
        "Each device got the largest ticket that meets its limits, as a dense model: MB are of weights and the KV "
        "cache of one full context, ms are the device's own a token, κ is the share of a layer's blocks. Perplexity, "
        "latency and peak memory are measured on the device's side; bytes are of every ticket it was sent to find one."
    )


def _device_text(device: Mapping[str, Any], key: str) -> str:
    if key == "limits":
        return limits_text(device)
    value = device.get(key)
    if value is None:
        return MISSING
    if key == "size":
        return size_label(device) if "of" in device else str(value)
    if key == "perplexity":
        return perplexity_text(value)
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _configuration(runs: Sequence[FinishedRun]) -> Iterator[str]:
    yield "<h2>Configuration</h2>"
    flat = [dict(_flat(run.config)) for run in runs]
    keys = dict.fromkeys(key for each in flat for key in each)
    differing = [key for key in keys if len({str(each.get(key)) for each in flat}) > 1]
    if differing:
        lines = [[key, *(str(each.get(key, MISSING)) for each in flat)] for key in differing]
        yield table([["differs in", *(run.label for run in runs)], *lines], words=True)
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
        [["", "of the runs"], *([name, _each([each[name] for each in facts])] for name in facts[0])], words=True
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

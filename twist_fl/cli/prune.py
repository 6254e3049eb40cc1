"""`twist-fl prune`: what post-training pruning makes of a run or a model, and what it costs. No Flower here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from twist_fl.config.shares import Size
from twist_fl.config.sizes import TicketSize
from twist_fl.data.corpus import Windows
from twist_fl.pruning.methods import prune, pruned_perplexities, save_pruned, sparsity
from twist_fl.report.cells import titled, uncut_table
from twist_fl.report.compare import spread_text
from twist_fl.runs.results import portable_config
from twist_fl.runs.start import Start
from twist_fl.runs.trained import TrainedRun, chosen_sizes
from twist_fl.system.errors import ConfigError
from twist_fl.system.files import write_json
from twist_fl.system.provenance import provenance
from twist_fl.system.units import perplexity_text, size_label
from twist_fl.training.job import Job

Row = dict[str, Any]
_COLUMNS = ("method", "blocks", "perplexity", "sparsity", "seconds", "peak MB", "tokens")


def prune_run(
    console: Console,
    start: Start,
    methods: list[str],
    sizes: Sequence[Size] | None,
    *,
    windows: int | None,
    calibration: int,
    draws: int,
    out: Path | None,
    save: Path | None,
) -> None:
    """Prune a run's newest checkpoint, or a model, by every method to every size; a table, and pruned.json."""
    out = out or start.results().path / "pruned.json"
    run = TrainedRun(start)
    job, state, config = run.job, run.state, run.job.config
    chosen = [size for size in chosen_sizes(job, sizes) if sizes or not size.is_whole]
    if all(size.is_whole for size in chosen):
        whole = chosen_sizes(job, ["1/1"])[0].row["size"]
        raise ConfigError(f"--sizes {whole} is the whole layer, which leaves nothing to prune: give sizes below it")
    test = job.corpus.test[: windows or config.eval.max_windows]
    with console.status("the full model"):
        full = run.perplexity(windows=test)
    rows: list[Row] = []
    for method in methods:
        for size in chosen:
            with console.status(f"{method}, {size_label(size.row)}"):
                rows.append(_row(console, job, state.params, method, size, test, calibration, draws, save))
    results = provenance() | {
        "config": portable_config(config),
        "corpus": job.text.digest,
        "rounds": state.round,
        "test_tokens": int(test.size),
        "calibration_windows": calibration,
        "full": full,
        "rows": rows,
    }
    write_json(results, out)
    title = f"{run.title}: perplexity (lower is better) on {test.size:,} test tokens; "
    console.print(titled(f"{title}full model {perplexity_text(full)}", _table(rows)))
    console.print(
        "Seconds, peak memory and calibration tokens are spent after training, for each size anew. "
        f"A random ticket (se) costs 0 s and 0 tokens; its perplexity is the mean ± std of {draws} draws.",
        highlight=False,
    )
    console.print(f"results: {out.resolve()}", soft_wrap=True)


def _row(
    console: Console,
    job: Job,
    params: Any,
    method: str,
    size: TicketSize,
    test: Windows,
    calibration: int,
    draws: int,
    save: Path | None,
) -> Row:
    """One method at one size; a random ticket is a distribution over draws, the first of which is saved."""
    config = job.config
    pruned = prune(job, params, method, size, seed=config.seed, calibration_windows=calibration, say=console.print)
    perplexities = pruned_perplexities(job, pruned, test, config.eval.batch_size, draws=draws, seed=config.seed)
    if save is not None:
        save_pruned(job, pruned, save / f"{method}-{size.row['size']}")
    return {
        "method": method,
        **size.row,
        "scale": pruned.scale,
        "perplexity": fmean(perplexities),
        "std": stdev(perplexities) if len(perplexities) > 1 else None,
        "perplexities": perplexities,
        "sparsity": sparsity(job, pruned),
        "seconds": pruned.seconds,
        "peak_bytes": pruned.peak_bytes,
        "calibration_tokens": pruned.calibration_tokens,
        "blueprint": pruned.blueprint and json.loads(pruned.blueprint.to_json()),
        "notes": pruned.notes,
    }


def _table(rows: list[Row]) -> Table:
    lines = [
        [
            row["method"],
            size_label(row),
            perplexity_text(row["perplexity"]) if row["std"] is None else spread_text(row["perplexity"], row["std"]),
            f"{row['sparsity']:.4f}",
            f"{row['seconds']:.2f}",
            f"{row['peak_bytes'] / 1e6:.1f}",
            f"{row['calibration_tokens']:,}",
        ]
        for row in rows
    ]
    return uncut_table([_COLUMNS, *lines])

"""The tables of finished runs and of devices, by caption: for the report, for documents and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from twist_fl.report.cells import Cells, narrow
from twist_fl.report.compare import MISSING, Row, kappa, sizes_of, spread_text
from twist_fl.report.glossary import LOWER
from twist_fl.system.units import duration_text, human_bytes, perplexity_text, size_label

PERPLEXITY = f"Test perplexity ({LOWER}), and of random tickets mean ± standard deviation"
SENT = "What was sent: both directions, all rounds and workers"
MEMORY = "Memory of a worker while it trains, and time"
AGAINST_PRUNING = f"Test perplexity ({LOWER}) of smaller models, and what they cost"
DEVICES = f"Models on devices: test perplexity ({LOWER}) and speed, as each device measured them"
DEVICE_BYTES = "Models on devices: what each received and holds"


def run_tables(rows: Sequence[Row]) -> dict[str, Cells]:
    """The comparison: perplexities, bytes, memory and time. A line per run, or a column where that is narrower."""
    found = {PERPLEXITY: perplexity_cells(rows), SENT: sent_cells(rows), MEMORY: memory_cells(rows)}
    return {caption: narrow(cells) for caption, cells in found.items()}


def perplexity_cells(rows: Sequence[Row]) -> Cells:
    sizes = sizes_of(rows)
    lines = [
        [
            row.label,
            perplexity_text(row.full),
            *(spread_text(*row.tickets[size]) if size in row.tickets else MISSING for size in sizes),
        ]
        for row in rows
    ]
    return [["blocks kept", "all (full model)", *sizes], *lines]


def sent_cells(rows: Sequence[Row]) -> Cells:
    header = ["", "weights", "weights, predicted", "optimiser's moments", "all else", "replies lost"]
    lines = [
        [
            row.label,
            *map(_bytes, (row.weight_bytes, row.predicted_weight_bytes, row.moment_bytes, row.other_bytes)),
            f"{row.lost_replies:,}",
        ]
        for row in rows
    ]
    return [header, *lines]


def memory_cells(rows: Sequence[Row]) -> Cells:
    lines = [
        [row.label, _bytes(row.peak_bytes), _bytes(row.predicted_peak_bytes), duration_text(row.seconds)]
        for row in rows
    ]
    return [["", "peak memory", "peak memory, predicted", "wall clock of rounds"], *lines]


def _bytes(num: int) -> str:
    return human_bytes(num) if num else MISSING


def against_pruning_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Cells]:
    """Of models as in against_pruning.json: good, small, fast, and what it took after training to make them so."""
    lines = [
        [
            str(row["label"]),
            size_label(row),
            perplexity_text(row["perplexity"]),
            f"{row['file_bytes'] / 1e6:.2f}",
            f"{1000 * row['window'] / row['ms_per_window']:,.0f}",
            f"{row['seconds']:.1f}",
        ]
        for row in rows
    ]
    header = ["model", "blocks kept", "perplexity", "MB on disk", "prompt tokens/s", "s after training"]
    return {AGAINST_PRUNING: [header, *lines]} if rows else {}


def device_tables(devices: Sequence[Mapping[str, Any]]) -> dict[str, Cells]:
    """Of devices as in deployed.json, what is missing is a dash: what a model is good for, then what it weighs."""
    return {DEVICES: device_cells(devices), DEVICE_BYTES: device_bytes_cells(devices)} if devices else {}


def device_cells(devices: Sequence[Mapping[str, Any]]) -> Cells:
    lines = [
        [
            str(device["name"]),
            limits_text(device),
            size_label(device) if "of" in device else MISSING,
            perplexity_text(device["perplexity"]) if "perplexity" in device else MISSING,
            _number(device, "ms_per_token", 2),
            _number(device, "prompt_tokens_per_second", 0),
        ]
        for device in devices
    ]
    return [["device", "limits", "blocks", "perplexity", "ms per token", "prompt tokens/s"], *lines]


def device_bytes_cells(devices: Sequence[Mapping[str, Any]]) -> Cells:
    lines = [
        [
            str(device["name"]),
            f"{device['num_params']:,}" if "num_params" in device else MISSING,
            _number(device, "weight_mb", 2),
            f"{device['bytes_received'] / 1e6:,.2f}" if "bytes_received" in device else MISSING,
            _number(device, "peak_mb", 1),
        ]
        for device in devices
    ]
    return [["device", "parameters", "weights, MB", "received, MB", "peak memory, MB"], *lines]


def _number(device: Mapping[str, Any], key: str, decimals: int) -> str:
    return f"{device[key]:,.{decimals}f}" if device.get(key) is not None else MISSING


def limits_text(device: Mapping[str, Any]) -> str:
    """What a ticket had to meet, and what kept it from being larger: '3.5 MB, 20 ms, κ 0.25: memory decides'."""
    forms = {"memory_mb": "{:g} MB", "latency_ms": "{:g} ms", "prompt_ms": "{:g} ms a prompt", "kappa": "κ {:.3g}"}
    forms |= {"context": "{} tokens"} | ({"dtype": "{}"} if device.get("dtype", "float32") != "float32" else {})
    limits = [form.format(device[key]) for key, form in forms.items() if device.get(key) is not None]
    decides = device.get("limited_by")
    return (", ".join(limits) or MISSING) + (f": {decides} decides" if decides and len(limits) > 1 else "")


def ticket_cells(tickets: Sequence[Mapping[str, Any]]) -> Cells:
    """One run's tickets, a line per size."""
    lines = [
        [
            size_label(ticket),
            f"{kappa(size_label(ticket)):.3f}",
            f"{ticket['num_params']:,}",
            spread_text(ticket["mean"], ticket["std"]),
            *(perplexity_text(ticket[key]) for key in ("min", "max")),
        ]
        for ticket in tickets
    ]
    return [["blocks kept", "κ", "parameters", "mean ± std", "lowest", "highest"], *lines]

"""Figures of docs/performance.md, from what `performance.read` has found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from performance import Found

from twist_fl.report.plots import DPI, NO_LINE, figure_of, log_ticks, looks_of, styled


def draw(found: Found, folder: Path) -> None:
    """ddp.png, growth.png and chaos.png, of what has run."""
    with styled():
        for name, drawing in (("ddp", draw_ddp), ("growth", draw_growth), ("chaos", draw_chaos)):
            if name in found:
                drawing(found[name]).savefig(folder / f"{name}.png", format="png", dpi=DPI)


def draw_ddp(found: Mapping[str, Any]) -> Figure:
    """Speed-up over DDP and share of its memory against the blocks held, beside FLOPs and the paper's numbers."""
    looks = looks_of(dict.fromkeys(row["setting"] for row in found["rows"]))
    flops: dict[str, Any] = {"linestyle": "--", "linewidth": 1, "markersize": 3}
    paper: dict[str, Any] = {"fillstyle": "none", "markersize": 5, **NO_LINE}
    others = {"FLOPs": {"color": "black", **flops}, "paper": {"color": "black", "marker": "o", **paper}}
    figure = figure_of(5.8, looks | others)
    speed, memory = figure.subplots(2, 1, sharex=True)
    for setting, look in looks.items():
        rows = [row for row in found["rows"] if row["setting"] == setting]
        sizes = [row["keep"] for row in rows]
        speed.plot(sizes, [row["speed_up"] for row in rows], **look, markersize=5, linewidth=1.6)
        speed.plot(sizes, [row["flop_ratio"] for row in rows], **look | flops)
        speed.plot(sizes, [row["paper_speed_up"] for row in rows], **look | paper)
        memory.plot(sizes, [row["memory"] for row in rows], **look, markersize=5, linewidth=1.6)
        memory.plot(sizes, [row["paper_memory"] for row in rows], **look | paper)
    speed.set_ylabel("times as fast as DDP")
    memory.set_ylabel("peak memory / DDP's")
    memory.set_xlabel(f"blocks held of {found['rows'][0]['of']} in a divided layer")
    memory.set_xticks(sorted({row["keep"] for row in found["rows"]}))
    return figure


def draw_growth(found: Mapping[str, Any]) -> Figure:
    """A round's time and memory against the number of workers, and against the model's size."""
    flower, server, models = found["flower"], found["server"], found["sizes"]
    looks = looks_of(
        (
            "a round through Flower, tiny model",
            "the server's part",
            "shared segments",
            "a worker's training (cost model)",
        )
    )
    figure = figure_of(9.6, looks)
    by_workers, workers_memory, by_size, size_memory = figure.subplots(4, 1)
    through, part, segments, train = looks.values()
    _line(by_workers, flower, "workers", [row["seconds"] for row in flower], through)
    _line(by_workers, server, "workers", [row["seconds"] for row in server], part)
    _line(workers_memory, server, "workers", [row["copies"] * row["state_mb"] / 1e3 for row in server], part)
    _line(workers_memory, server, "workers", [row["segment_mb"] / 1e3 for row in server], segments)
    _line(by_size, models, "num_params", [row["server_seconds"] for row in models], part)
    _line(size_memory, models, "num_params", [row["server_gb"] for row in models], part)
    _line(size_memory, models, "num_params", [row["training_gib"] * 2**30 / 1e9 for row in models], train)
    for axes, rows in ((by_workers, [*flower, *server]), (workers_memory, server)):
        axes.set_xlabel(f"workers (the server's part: a state of {server[0]['state_mb']:.0f} MB)")
        _log_ticks(axes, sorted({row["workers"] for row in rows}))
    for axes in (by_size, size_memory):
        axes.set_xlabel("parameters of GPT-2 small to XL (millions), 4 workers")
        _log_ticks(axes, [row["num_params"] for row in models], lambda value: f"{value / 1e6:,.0f}")
    for axes, unit in zip(figure.axes, ("seconds a round", "memory (GB)") * 2, strict=True):
        axes.set_ylabel(unit)
        axes.set_yscale("log")
        limits = axes.get_ylim()
        ticks = log_ticks(*limits)
        axes.set_yticks(ticks, [f"{tick:,.10g}" for tick in ticks])
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(limits)
    return figure


def draw_chaos(found: Mapping[str, Any]) -> Figure:
    """Memory and open files of the server and the SuperLink after each round; both begin anew when they are killed."""
    looks = {name: look | {"marker": ""} for name, look in looks_of(["server", "superlink"]).items()}
    figure = figure_of(4.6, looks)
    for axes, unit, label in zip(
        figure.subplots(2, 1, sharex=True), ("mb", "files"), ("MB", "open files"), strict=True
    ):
        for name, look in looks.items():
            rows = [row for row in found["samples"] if f"{name}_{unit}" in row]
            axes.plot([row["round"] for row in rows], [row[f"{name}_{unit}"] for row in rows], **look, linewidth=1.2)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    axes.set_xlabel("round")
    return figure


def _line(
    axes: Axes, rows: Sequence[Mapping[str, Any]], x: str, values: Sequence[float], look: Mapping[str, Any]
) -> None:
    axes.plot([row[x] for row in rows], values, **look, markersize=5, linewidth=1.6)


def _log_ticks(axes: Axes, places: Sequence[float], label: Callable[[float], str] = str) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(places)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(list(places), [label(place) for place in places])

"""Figures of docs/performance.md, from what `performance.read` has found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from twist_fl.performance import Found
from twist_fl.plots import COLORS, DPI, MARKERS, WIDTH, log_ticks, styled


def draw(found: Found, folder: Path) -> None:
    """ddp.png and growth.png, of what has run."""
    with styled():
        for name, drawing in (("ddp", draw_ddp), ("growth", draw_growth)):
            if name in found:
                drawing(found[name]).savefig(folder / f"{name}.png", format="png", dpi=DPI)


def draw_ddp(found: Mapping[str, Any]) -> Figure:
    """Speed-up over DDP and share of its memory against the blocks held, beside FLOPs and the paper's numbers."""
    figure = Figure(figsize=(WIDTH, 6.0), layout="constrained")
    speed, memory = figure.subplots(2, 1, sharex=True)
    settings = list(dict.fromkeys(row["setting"] for row in found["rows"]))
    for setting, color, marker in zip(settings, COLORS, MARKERS, strict=False):
        rows = [row for row in found["rows"] if row["setting"] == setting]
        sizes = [row["keep"] for row in rows]
        look: dict[str, Any] = {"color": color, "marker": marker, "markersize": 5}
        speed.plot(sizes, [row["speed_up"] for row in rows], **look, linewidth=1.6)
        speed.plot(sizes, [row["flop_ratio"] for row in rows], color=color, linestyle="--", linewidth=1)
        paper: dict[str, Any] = look | {"linestyle": "none", "fillstyle": "none"}
        speed.plot(sizes, [row["paper_speed_up"] for row in rows], **paper)
        memory.plot(sizes, [row["memory"] for row in rows], **look, linewidth=1.6)
        memory.plot(sizes, [row["paper_memory"] for row in rows], **paper)
    speed.set_ylabel("times as fast as DDP")
    memory.set_ylabel("peak memory / DDP's")
    memory.set_xlabel(f"blocks held of {found['rows'][0]['of']} in a divided layer")
    memory.set_xticks(sorted({row["keep"] for row in found["rows"]}))
    handles = [
        Line2D([], [], color=color, marker=marker, markersize=5, linewidth=1.6)
        for _, color, marker in zip(settings, COLORS, MARKERS, strict=False)
    ]
    handles += [
        Line2D([], [], color="black", linestyle="--", linewidth=1),
        Line2D([], [], color="black", linestyle="none", marker="o", fillstyle="none", markersize=5),
    ]
    figure.legend(handles, [*settings, "FLOPs", "paper"], loc="outside upper left", ncols=5, frameon=False)
    return figure


def draw_growth(found: Mapping[str, Any]) -> Figure:
    """A round's time and the server's memory against the number of workers, and both against the model's size."""
    figure = Figure(figsize=(WIDTH, 8.4), layout="constrained")
    seconds, memory, sizes = figure.subplots(3, 1)
    flower, server, models = found["flower"], found["server"], found["sizes"]
    _line(seconds, flower, "workers", "seconds", 0, "through Flower (tiny model)")
    _line(seconds, server, "workers", "seconds", 1, f"the server's part (state of {server[0]['state_mb']:.0f} MB)")
    seconds.set_ylabel("seconds a round")
    _line(memory, [row | {"gb": row["copies"] * row["state_mb"] / 1e3} for row in server], "workers", "gb", 1, "server")
    _line(memory, [row | {"gb": row["segment_mb"] / 1e3} for row in server], "workers", "gb", 2, "shared segments")
    memory.set_ylabel("memory (GB)")
    for axes, rows in ((seconds, [*flower, *server]), (memory, server)):
        axes.set_xlabel("workers")
        _log_ticks(axes, sorted({row["workers"] for row in rows}))
    _line(sizes, models, "num_params", "server_seconds", 1, "server, seconds a round")
    _line(sizes, models, "num_params", "server_gb", 2, "server, GB")
    _line(sizes, models, "num_params", "training_gib", 3, "a worker's training, GiB (cost model)")
    sizes.set_xlabel("parameters of GPT-2 small to XL (millions), 4 workers")
    sizes.set_ylabel("seconds or GB")
    _log_ticks(sizes, [row["num_params"] for row in models], lambda value: f"{value / 1e6:,.0f}")
    for axes in (seconds, memory, sizes):
        axes.set_yscale("log")
        limits = axes.get_ylim()
        ticks = log_ticks(*limits)
        axes.set_yticks(ticks, [f"{tick:,.10g}" for tick in ticks])
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(limits)
        axes.legend(frameon=False, fontsize=8)
    return figure


def _line(axes: Axes, rows: Sequence[Mapping[str, Any]], x: str, y: str, look: int, label: str) -> None:
    style: dict[str, Any] = {"color": COLORS[look], "marker": MARKERS[look], "markersize": 5, "linewidth": 1.6}
    axes.plot([row[x] for row in rows], [row[y] for row in rows], **style, label=label)


def _log_ticks(axes: Axes, places: Sequence[float], label: Callable[[float], str] = str) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(places)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(list(places), [label(place) for place in places])

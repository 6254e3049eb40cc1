"""Figures of finished runs, and what all figures share: their width, which a phone shows, their looks, their legend."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil, floor, isfinite, log10, nan
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from twist_fl.report.compare import FinishedRun, kappa
from twist_fl.report.glossary import LOWER
from twist_fl.system.units import size_label

# Okabe and Ito's palette without yellow, told apart with any common colour blindness; markers for those without colour.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#808080")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
LINES = ("-", "--", ":", "-.")
WIDTH = 4.5
"""Inches; text of 10 points is then 11 pixels high on a phone of 390."""
DPI = 200
PERPLEXITY = f"test perplexity\n({LOWER})"
"""The name of an axis of perplexities."""
LOG_FROM = 3.0
"""A perplexity axis is logarithmic if its values span more than this factor."""
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "twist_fl",
}
_TICKS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8))

Draw = Callable[[Sequence[FinishedRun]], Figure]
Looks = Mapping[str, Mapping[str, Any]]
"""By label, what `Axes.plot` is given."""
NO_LINE = {"linestyle": "none"}


def drawings(runs: Sequence[FinishedRun]) -> dict[str, Draw]:
    """The figures that these runs have data for, by name."""
    tickets: dict[str, Draw] = {"tickets": draw_tickets} if ticket_sizes(runs) else {}
    return {"perplexity_vs_kappa": draw_perplexity_vs_kappa, **tickets, "training": draw_training}


def save_png(draw: Callable[[], Figure], path: Path) -> None:
    with styled():
        draw().savefig(path, format="png", dpi=DPI)


def svg(draw: Callable[[], Figure], name: str) -> str:
    """An <svg> element to put inline: no document type, metadata or namespaces, and ids that start with `name`."""
    text = io.StringIO()
    with styled():
        draw().savefig(text, format="svg", metadata={"Date": None})
    element = text.getvalue().partition("<svg")
    inline = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", "".join(element[1:]), flags=re.DOTALL)
    return re.sub(r"<[^<>]+>", lambda tag: _inline_tag(tag[0], name), inline)


def _inline_tag(tag: str, name: str) -> str:
    tag = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", tag).replace("xlink:href", "href")
    return re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{name}-", tag)


@contextmanager
def styled() -> Iterator[None]:
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        yield


def looks_of(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A colour, a marker and a line for each label; without colour, marker and line still tell 32 of them apart."""
    return {
        label: {
            "color": COLORS[i % len(COLORS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": LINES[i // len(MARKERS) % len(LINES)],
        }
        for i, label in enumerate(labels)
    }


def figure_of(height: float, looks: Looks | None = None) -> Figure:
    """An empty figure with `height` inches for the axes and, above them where it covers no data, the legend."""
    looks = looks or {}
    widest = max((len(line) for label in looks for line in label.splitlines()), default=0)
    columns = max(1, min(len(looks), int(WIDTH / (0.6 + 0.075 * widest))))  # inches: a handle with its gaps, a letter
    lines = sum(label.count("\n") + 1 for label in looks)
    figure = Figure(figsize=(WIDTH, height + 0.2 * ceil(lines / columns)), layout="constrained")
    if looks:
        handles = [Line2D([], [], **({"linewidth": 1.6, "markersize": 5} | dict(look))) for look in looks.values()]
        figure.legend(handles, list(looks), loc="outside upper left", ncols=columns, frameon=False)
    return figure


def draw_training(runs: Sequence[FinishedRun]) -> Figure:
    """Training loss per round, as logged and smoothed; below it the full model's perplexity on the test split."""
    looks = _run_looks(runs)
    figure = figure_of(5.2, looks)
    loss, perplexity = figure.subplots(2, 1, sharex=True)
    width = smoothing_rounds(runs)
    for i, (run, look) in enumerate(zip(runs, looks.values(), strict=True)):
        rounds = run.intervals
        losses = [_number(each["loss"]) for each in run.rounds]
        smooth = smoothed(losses, width * run.rounds_per_interval)
        loss.plot(rounds, losses, color=look["color"], linewidth=0.8, alpha=0.35)
        # Markers at a fifth of the diagonal from each other, those of different runs side by side.
        loss.plot(rounds, smooth, **look, linewidth=1.6, markersize=4, markevery=(0.2 * (i + 0.5) / len(runs), 0.2))
        evaluations = sorted(run.full_by_interval.items())
        every = max(1, len(evaluations) // 12)
        perplexity.plot(*_columns(evaluations), **look, markersize=4, linewidth=1.4, markevery=every)
    loss.set_ylabel("training loss\n(nats per token)")
    perplexity.set_ylabel(f"full model's perplexity\n({LOWER})")
    perplexity.set_xlabel(_rounds_label(runs))
    perplexity.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    scale_perplexity(perplexity, [value for run in runs for value in run.full_by_interval.values()])
    return figure


def watched(runs: Sequence[FinishedRun]) -> str:
    """How many windows of the test split perplexity is measured on while training: '64', or '64 to 128'."""
    counts = sorted({run.config["eval"]["watch_windows"] for run in runs})
    return " to ".join(str(count) for count in dict.fromkeys([counts[0], counts[-1]]))


def _rounds_label(runs: Sequence[FinishedRun]) -> str:
    intervals = {run.config["train"]["interval"] for run in runs}
    return f"round of {intervals.pop()} batches per worker" if len(intervals) == 1 else "round"


def draw_perplexity_vs_kappa(runs: Sequence[FinishedRun]) -> Figure:
    """Mean perplexity of random tickets with standard deviation (bars) and extremes (thin lines), to the full model."""
    looks = _run_looks(runs)
    figure = figure_of(3.5, looks)
    axes = figure.subplots()
    values = [run.full for run in runs]
    for i, (run, look) in enumerate(zip(runs, looks.values(), strict=True)):
        shift = min(0.008, 0.03 / len(runs)) * (i - (len(runs) - 1) / 2)  # so that bars do not cover each other
        tickets = sorted(_partial(run), key=lambda ticket: kappa(size_label(ticket)))
        places = [kappa(size_label(ticket)) + shift for ticket in tickets]
        means, stds, least, most = ([ticket[key] for ticket in tickets] for key in ("mean", "std", "min", "max"))
        axes.plot([*places, 1], [*means, run.full], **look, linewidth=1.4, markersize=5)
        axes.errorbar(places, means, yerr=stds, fmt="none", color=look["color"], capsize=3, elinewidth=2)
        axes.vlines(places, least, most, color=look["color"], linewidth=0.8)
        values += least + most
    axes.set_xlabel("blocks kept of a divided layer (their share is κ)")
    axes.set_ylabel(PERPLEXITY)
    _size_ticks(axes, ["1/1", *ticket_sizes(runs)], runs)
    scale_perplexity(axes, values)
    return figure


def _size_ticks(axes: Axes, sizes: Sequence[str], runs: Sequence[FinishedRun]) -> None:
    """A tick at every size; of labels too close to each other, the larger size's stays."""
    totals = {ticket["of"] for run in runs for ticket in run.tickets}
    full = "{0}/{0}".format(totals.pop()) if len(totals) == 1 else "full"
    places = {kappa(size): size for size in sizes} | {1.0: full}
    gap = 0.105 * (1 - min(places))
    labels: dict[float, str] = {}
    for place in sorted(places, reverse=True):
        labelled = not labels or min(at for at, text in labels.items() if text) - place > gap
        labels[place] = places[place] if labelled else ""
    axes.set_xticks(list(labels), list(labels.values()))


def draw_tickets(runs: Sequence[FinishedRun]) -> Figure:
    """Perplexity of every drawn ticket, all on one scale: a panel per size, a box and a strip of dots per run."""
    sizes = ticket_sizes(runs)[::-1]
    rows = -(-len(sizes) // 2)
    figure = figure_of(0.2 + 2.0 * rows, _run_looks(runs))
    panels = figure.subplots(rows, 2, squeeze=False, sharey=True).flatten()
    every = [value for axes, size in zip(panels, sizes, strict=False) for value in _draw_size(axes, size, runs)]
    for axes in panels[len(sizes) :]:
        axes.set_visible(False)
    for axes in panels[: len(sizes) : 2]:
        axes.set_ylabel(PERPLEXITY)
    scale_perplexity(panels[0], every)
    return figure


def _draw_size(axes: Axes, size: str, runs: Sequence[FinishedRun]) -> list[float]:
    """What was drawn into the panel."""
    every: list[float] = []
    for i, (run, look) in enumerate(zip(runs, _run_looks(runs).values(), strict=True)):
        drawn = [ticket["perplexities"] for ticket in run.tickets if size_label(ticket) == size]
        values = [value for value in drawn[0] if isfinite(value)] if drawn else []
        box(axes, values, i, 0.6, look)
        every += values
    axes.set_title(f"{size} blocks", fontsize=10)
    axes.set_xticks([])
    axes.set_xlim(-0.6, len(runs) - 0.4)
    return every


def box(axes: Axes, values: Sequence[float], place: float, width: float, look: Mapping[str, Any]) -> None:
    """Quartiles and median, whiskers to the extremes, and a dot per value; `values` are finite."""
    if not values:
        return
    line = {"color": look["color"], "linewidth": 1.2}
    axes.boxplot(
        values, positions=[place], widths=width, whis=(0, 100), showfliers=False, manage_ticks=False,
        boxprops=line, whiskerprops=line, capprops=line, medianprops=line | {"linewidth": 2.2},
    )  # fmt: skip
    spread = [place + 0.67 * width * (0.618 * draw % 1 - 0.5) for draw in range(len(values))]
    axes.plot(spread, values, **{**look, **NO_LINE}, markersize=3.5, alpha=0.55, markeredgewidth=0)


def ticket_sizes(runs: Sequence[FinishedRun]) -> list[str]:
    """Sizes smaller than the full model, largest first."""
    sizes = {size_label(ticket) for run in runs for ticket in _partial(run)}
    return sorted(sizes, key=kappa, reverse=True)


def _partial(run: FinishedRun) -> list[Mapping[str, Any]]:
    """Without tickets that hold every block: they are the full model."""
    return [ticket for ticket in run.tickets if ticket["size"] < ticket["of"]]


def smoothing_rounds(runs: Sequence[FinishedRun]) -> int:
    """Odd number of intervals that the smoothed loss is the mean of: a twentieth of the longest run, at most 51."""
    longest = max(len(run.rounds) // run.rounds_per_interval for run in runs)
    return min(longest // 20, 50) // 2 * 2 + 1


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Centred mean of `width` values, fewer at the ends; not-a-number is left out."""
    windows = (values[max(0, i - width // 2) : i + width // 2 + 1] for i in range(len(values)))
    return [fmean(finite) if (finite := [v for v in window if isfinite(v)]) else nan for window in windows]


def scale_perplexity(axes: Axes, values: Iterable[float]) -> None:
    """Plain numbers on the y axis, logarithmic if `values` span more than a factor of LOG_FROM."""
    finite = [value for value in values if isfinite(value)]
    if not finite or max(finite) <= LOG_FROM * min(finite):
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], min_n_ticks=4))
        return
    axes.set_yscale("log")
    limits = axes.get_ylim()
    ticks = log_ticks(*limits)
    axes.set_yticks(ticks, [f"{tick:,.10g}" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(limits)


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`: the coarsest set with at least four, all powers of ten if there are many."""
    decades = range(floor(log10(low)), floor(log10(high)) + 1)
    for mantissas in _TICKS:
        ticks = [m * 10.0**decade for decade in decades for m in mantissas if low <= m * 10.0**decade <= high]
        if len(ticks) >= 4:
            break
    return ticks


def _run_looks(runs: Sequence[FinishedRun]) -> dict[str, dict[str, Any]]:
    """By label, in lines that fit the figure, without mathematics."""
    return looks_of(fill(run.label, 44, break_on_hyphens=False).replace("$", r"\$") for run in runs)


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [first for first, _ in pairs], [second for _, second in pairs]


def _number(value: float | None) -> float:
    return nan if value is None else value

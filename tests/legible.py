"""What a reader needs of any figure: text that is whole, large enough and apart, and a legend beside the data."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox, BboxBase

from twist_fl.report.plots import WIDTH

FONT = 10
"""Points: 11 pixels on a phone, where WIDTH inches are 358 pixels."""
SLACK = 1.0
"""Pixels by which an extent may be too large."""


def assert_legible(figure: Figure) -> None:
    """All text inside the figure, apart and large enough; every axis named; the legend covers no axes."""
    FigureCanvasAgg(figure).draw()  # type: ignore[no-untyped-call]
    assert figure.get_figwidth() == WIDTH
    texts = [(text.get_text(), text.get_window_extent(), float(text.get_fontsize())) for text in _texts(figure)]
    assert texts
    for word, extent, size in texts:
        assert size >= FONT, f"{word!r} has {size} points"
        assert _inside(extent, figure.bbox), f"{word!r} is clipped: {extent} of {figure.bbox}"
    for (one, first, _), (other, second, _) in combinations(texts, 2):
        assert not _overlap(first, second), f"{one!r} and {other!r} overlap"
    for legend in figure.legends:
        assert not any(_overlap(legend.get_window_extent(), axes.bbox) for axes in figure.axes)
    for axes in figure.axes:
        assert axes.get_legend() is None
    _assert_named([axes for axes in figure.axes if axes.get_visible()])


def _assert_named(panels: list[Axes]) -> None:
    """Each panel has its labels, or shares the axis or its row with one that has."""
    for axes in panels:
        left = [other for other in panels if abs(other.bbox.y0 - axes.bbox.y0) < 2]
        assert any(other.get_ylabel() for other in left), "a row without a label"
        below = [other for other in panels if abs(other.bbox.x0 - axes.bbox.x0) < 2]
        ticks = any(label.get_text() for label in axes.get_xticklabels())
        assert not ticks or any(other.get_xlabel() for other in below), "a column without a label"


def _texts(figure: Figure) -> Iterator[Text]:
    for axes in figure.axes:
        if not axes.get_visible():
            continue
        yield from _seen([axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts])
        for axis in (axes.xaxis, axes.yaxis):
            yield from _seen(_tick_labels(axis))
    for legend in figure.legends:
        yield from _seen(legend.get_texts())


def _tick_labels(axis: Axis) -> Iterator[Text]:
    """Those in view: matplotlib keeps some beyond the limits."""
    low, high = sorted(axis.get_view_interval())
    for tick in axis.get_major_ticks():
        if low <= tick.get_loc() <= high:
            yield from (tick.label1, tick.label2)


def _seen(texts: list[Text] | Iterator[Text]) -> Iterator[Text]:
    return (text for text in texts if text.get_visible() and text.get_text().strip())


def _inside(extent: Bbox, whole: BboxBase) -> bool:
    return bool(
        extent.x0 >= whole.x0 - SLACK
        and extent.y0 >= whole.y0 - SLACK
        and extent.x1 <= whole.x1 + SLACK
        and extent.y1 <= whole.y1 + SLACK
    )


def _overlap(one: Bbox, other: Bbox) -> bool:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return bool(width > SLACK and height > SLACK)

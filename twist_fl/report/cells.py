"""A table as text: a header, then lines. However it is shown, it has at most six columns, which any page can hold."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

Cells = list[list[str]]
"""A header, then lines as long as it; the first column names the lines."""
MAX_COLUMNS = 6


def turned(cells: Sequence[Sequence[str]]) -> Cells:
    """On its side: lines become columns."""
    return [list(column) for column in zip(*cells, strict=True)]


def narrow(cells: Sequence[Sequence[str]]) -> Cells:
    """As it is or on its side, whichever has fewer columns: what a phone shows without scrolling."""
    return turned(cells) if len(cells) < len(cells[0]) else [list(line) for line in cells]


def fit(cells: Sequence[Sequence[str]]) -> list[Cells]:
    """The same cells in tables of at most MAX_COLUMNS columns.

    As they are; else on their side, if that fits; else in parts as even as can be, each of which begins with the first
    column.
    """
    if len(cells[0]) <= MAX_COLUMNS:
        return [[list(line) for line in cells]]
    if len(cells) <= MAX_COLUMNS:
        return [turned(cells)]
    names, *columns = turned(cells)
    num_parts = -(-len(columns) // (MAX_COLUMNS - 1))
    ends = [len(columns) * part // num_parts for part in range(num_parts + 1)]
    return [turned([names, *columns[start:end]]) for start, end in pairwise(ends)]


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """Markdown, one table or, of too many columns, several; numbers to the right."""
    return "\n".join(map(_markdown, fit(cells)))


def _markdown(cells: Cells) -> str:
    header, *lines = [[cell.replace("|", r"\|") for cell in line] for line in cells]
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join("| " + " | ".join(line) + " |\n" for line in (header, rule, *lines))


def terminal_table(title: str, cells: Cells) -> Group:
    """As it is or on its side, whichever fits a narrow terminal better."""
    return titled(title, uncut_table(narrow(cells)))


def uncut_table(cells: Sequence[Sequence[str]]) -> Table:
    """Cells that are too wide for the terminal go on in the next line: rich would cut numbers."""
    header, *lines = cells
    table = Table(Column(header[0], overflow="fold"))
    for name in header[1:]:
        table.add_column(name, justify="right", overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table


def titled(title: str, table: Table) -> Group:
    """With a title as wide as the terminal: a table breaks its own at its width, which may be two columns."""
    return Group(Text(title, style="italic"), table)

"""What an experiment is: the tasks it needs, what it makes of their results, and how that is shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure

from twist_fl.experiments.lab import Lab, Task
from twist_fl.report.cells import Cells

Data = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """One table or figure of the paper, or one of ours."""

    name: str
    title: str
    tasks: Callable[[Lab], Sequence[Task]]
    collect: Callable[[Lab], Data]
    """Of finished tasks: plain JSON with our numbers and, where the paper has them, the paper's under "paper"."""
    tables: Callable[[Data], dict[str, Cells]]
    """By caption."""
    figures: dict[str, Callable[[Data], Figure]] = field(default_factory=dict)
    """By file name without ending."""
    reading: Callable[[Data], str] = lambda data: ""
    """How to read the figure: what its marks are, of how many draws and which seed."""
    notes: Callable[[Data], list[str]] = lambda data: []
    """Sentences below the table, from the numbers."""

"""What to conclude from finished runs, in two sentences made of their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from twist_fl.report.compare import FinishedRun, kappa
from twist_fl.system.units import perplexity_text, size_label

_THIRD = 1 / 3
_MOST_NAMED = 4
"""Other runs that a sentence can hold by name."""


def conclusions(runs: Sequence[FinishedRun]) -> list[str]:
    """Which full model is best, then which random tickets of about a third of the blocks are, and what they lose."""
    return [_of_full_models(runs), _of_tickets(runs)]


def _of_full_models(runs: Sequence[FinishedRun]) -> str:
    best, *others = sorted(runs, key=lambda run: run.full)
    if not others:
        return f"The full model has perplexity {perplexity_text(best.full)}."
    named = [f"{run.label}: {perplexity_text(run.full)}{_times(run.full, best.full, 'as much')}" for run in others]
    return (
        f"The best full model is that of {best.label}: perplexity {perplexity_text(best.full)} "
        f"({_listed(named, [run.full for run in others])})."
    )


def _of_tickets(runs: Sequence[FinishedRun]) -> str:
    size = _size_nearest_a_third(runs)
    if size is None:
        return "No tickets were drawn."
    means = {run.label: mean for run in runs for mean in _means(run, size)}
    full = {run.label: run.full for run in runs}
    best, *others = sorted(means, key=lambda label: means[label])
    found = f"{perplexity_text(means[best])} on average{_times(means[best], full[best], 'its full model')}"
    what = f"tickets with {size} of the blocks, not trained further,"
    if not others:
        return f"Random {what} have {found}."
    named = [f"{label}: {perplexity_text(means[label])}{_times(means[label], full[label])}" for label in others]
    return f"The best random {what} are those of {best}: {found} ({_listed(named, [means[o] for o in others])})."


def _size_nearest_a_third(runs: Sequence[FinishedRun]) -> str | None:
    """Of the sizes that most runs have drawn."""
    drawn = [size_label(ticket) for run in runs for ticket in run.tickets]
    return min(drawn, key=lambda size: (-drawn.count(size), abs(kappa(size) - _THIRD)), default=None)


def _means(run: FinishedRun, size: str) -> list[float]:
    return [float(ticket["mean"]) for ticket in run.tickets if size_label(ticket) == size]


def _times(value: float, other: float, what: str = "") -> str:
    """', 1.28 times its full model'; nothing of what is not finite."""
    ratio = value / other
    return f", {ratio:.3g} times {what}".rstrip() if isfinite(ratio) else ""


def _listed(named: Sequence[str], values: Sequence[float]) -> str:
    """By name, or of many runs their range."""
    if len(named) <= _MOST_NAMED:
        return "; ".join(named)
    return f"the other {len(named)} from {perplexity_text(min(values))} to {perplexity_text(max(values))}"

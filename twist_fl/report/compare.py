"""Finished runs side by side: what `plots.py` draws and `tables.py` tabulates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import nan
from shlex import quote
from statistics import fmean
from typing import Any

from twist_fl.report.glossary import ALGORITHMS
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.errors import ConfigError
from twist_fl.system.files import read_json
from twist_fl.system.units import size_label

MISSING = "-"


@dataclass(frozen=True)
class FinishedRun:
    """A run's results and log, with a label that no other run of the comparison has."""

    label: str
    results: Mapping[str, Any]
    """The content of results.json."""
    rounds: Sequence[Mapping[str, Any]]
    """The "round" events, oldest first."""
    predicted_round_bytes: int
    full_by_interval: Mapping[float, float]
    """Perplexity of the full model after the intervals at which it was evaluated."""

    @property
    def intervals(self) -> list[float]:
        """Where each of `rounds` ends, in intervals: a round is one, and with DDP a batch."""
        return [each["round"] / self.rounds_per_interval for each in self.rounds]

    @property
    def rounds_per_interval(self) -> int:
        return _rounds_per_interval(self.config)

    @property
    def predicted_bytes(self) -> int:
        return sum(each.get("predicted_bytes", self.predicted_round_bytes) for each in self.rounds)

    @property
    def lost_replies(self) -> int:
        """Replies of workers that did not count, in all rounds."""
        logged = sum(len(each["dropped"]) for each in self.rounds)
        return int(self.results.get("lost_replies", logged))

    @property
    def full(self) -> float:
        return float(self.results.get("full", nan))  # of a run whose server has no text

    @property
    def tickets(self) -> Sequence[Mapping[str, Any]]:
        """One entry per ticket size: `evaluate.Tickets.summary` with `size` and `of`."""
        found: Sequence[Mapping[str, Any]] = self.results["tickets"]
        return found

    @property
    def config(self) -> dict[str, Any]:
        """Without the run's folder, which says nothing about the run."""
        return {key: value for key, value in self.results["config"].items() if key != "dir"}


def read_runs(folders: Sequence[RunFolder]) -> list[FinishedRun]:
    """Raises ConfigError if a folder has no results yet, or if there are no folders."""
    if not folders:
        raise ConfigError("no runs to compare: give the folder of at least one finished run")
    results = [_results(folder) for folder in folders]
    labels = _labels([each["config"] for each in results], [folder.path.name for folder in folders])
    return [_finished(*parts) for parts in zip(labels, results, folders, strict=True)]


def _results(folder: RunFolder) -> dict[str, Any]:
    if not folder.results_file.is_file():
        raise ConfigError(
            f"{folder.path} has no results.json, so there is no run or it has not finished: "
            f"finish it with `twist-fl train --resume {quote(str(folder.path))}`"
        )
    results: dict[str, Any] = read_json(folder.results_file, dict)
    return results


def _finished(label: str, results: dict[str, Any], folder: RunFolder) -> FinishedRun:
    evaluations, rounds = (
        [each for each in folder.events(event) if each["round"] <= results["rounds"]] for event in ("eval", "round")
    )  # a run that goes on, longer, has results of its first rounds until it is finished again
    starts = folder.events("start")
    predicted = starts[-1]["predicted_round_bytes"] if starts else 0
    per_interval = _rounds_per_interval(results["config"])
    full_by_interval = {each["round"] / per_interval: each["full"] for each in evaluations}
    return FinishedRun(label, results, rounds, predicted, full_by_interval)


def _rounds_per_interval(config: Mapping[str, Any]) -> int:
    return int(config["train"]["interval"]) if config["algorithm"] == "ddp" else 1


def _labels(configs: Sequence[Mapping[str, Any]], folder_names: Sequence[str]) -> list[str]:
    """The algorithm, and of optimiser state, name, folder or number the first that tells runs apart."""
    labels = [ALGORITHMS[config["algorithm"]][0] for config in configs]
    states = [config["train"]["optimizer_state"] for config in configs]
    if len(set(states)) > 1:
        pairs = zip(labels, states, strict=True)
        labels = [label if label == "DDP" else f"{label}, moments: {state}" for label, state in pairs]
    names = [str(config["name"]) for config in configs]
    numbers = [f"#{i + 1}" for i in range(len(configs))]
    told_apart = list(labels)
    for label in set(labels):
        alike = [i for i, other in enumerate(labels) if other == label]
        extras = [names, list(folder_names), numbers]
        extra = next(extra for extra in extras if len({extra[i] for i in alike}) == len(alike))
        for i in alike if len(alike) > 1 else ():
            told_apart[i] = f"{label} ({extra[i]})"
    return told_apart


@dataclass(frozen=True)
class Row:
    """One run of the comparison."""

    label: str
    full: float
    """Perplexity of the full model."""
    tickets: Mapping[str, tuple[float, float]]
    """Mean and standard deviation of the perplexity of random tickets, by size: 'k/12'."""
    weight_bytes: int
    """Both directions, all rounds and workers."""
    predicted_weight_bytes: int
    """What Appendix C says `weight_bytes` should be."""
    moment_bytes: int
    other_bytes: int
    """Blueprints, configuration and metrics."""
    lost_replies: int
    """Replies of workers that did not count."""
    peak_bytes: int
    """Most memory a worker held while training; 0 in logs that do not say."""
    predicted_peak_bytes: int
    """What Appendix C says `peak_bytes` should be."""
    seconds: float
    """Wall clock of the rounds, without evaluation."""


def comparison_table(folders: Sequence[RunFolder]) -> list[Row]:
    """One row per run, in the order given. Raises ConfigError for a run that has not finished."""
    return [row_of(run) for run in read_runs(folders)]


def row_of(run: FinishedRun) -> Row:
    return Row(
        label=run.label,
        full=run.full,
        tickets={size_label(ticket): (ticket["mean"], ticket["std"]) for ticket in run.tickets},
        weight_bytes=_wire_bytes(run, "weights"),
        predicted_weight_bytes=run.predicted_bytes,
        moment_bytes=_wire_bytes(run, "moments"),
        other_bytes=_wire_bytes(run, "other"),
        lost_replies=run.lost_replies,
        peak_bytes=max((each.get("peak_bytes", 0) for each in run.rounds), default=0),
        predicted_peak_bytes=max((each.get("predicted_peak_bytes", 0) for each in run.rounds), default=0),
        seconds=sum(each["seconds"] for each in run.rounds),
    )


def _wire_bytes(run: FinishedRun, kind: str) -> int:
    return sum(int(each[way].get(kind, 0)) for each in run.rounds for way in ("bytes_down", "bytes_up"))


def kappa(size: str) -> float:
    """Blocks held / blocks in the layer, of '4/12'; of '1/3+6/12' the mean of both kinds."""
    return fmean(float(Fraction(part)) for part in size.split("+"))


def sizes_of(rows: Iterable[Row]) -> list[str]:
    """Every ticket size of any run, largest first."""
    return sorted({size for row in rows for size in row.tickets}, key=kappa, reverse=True)


def spread_text(mean: float, std: float) -> str:
    """As `perplexity_text`, both numbers with the mean's decimals."""
    decimals = 2 if mean < 1000 else 0
    return f"{mean:,.{decimals}f} ± {std:,.{decimals}f}"

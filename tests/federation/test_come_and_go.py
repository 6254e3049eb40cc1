"""Machines that come and go, as real processes: a SuperLink, `twist-fl node`, `flwr run`. What test_pool.py asks of the
server alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from chaos import Run, until
from local_grid import assert_same_run, run_without
from loopback import Network, network, warm_node

from twist_fl.config.schema import load_config
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.events import EventLog
from twist_fl.training.job import make_job

TIMEOUT = 8.0
WORDS = (
    *("train.workers=4", "train.rounds=1000", "train.interval=1", "train.optimizer_state=server", "train.threads=1"),
    *("eval.every=0", "eval.max_windows=4", "checkpoint_every=1"),
    *(f"flower.round_timeout={TIMEOUT}", "flower.wait_for_nodes=5"),
)
AWAY = 10
"""Rounds that half of the nodes are gone for."""


@dataclass(frozen=True)
class Seen:
    """What the log says, and between which of its rounds each part of the story happened."""

    folder: RunFolder
    rounds: list[dict[str, Any]]
    nodes: list[dict[str, Any]]
    slow: int
    """The round that a node was too slow for."""
    gone: int
    """The round after which nobody waited for the half that had left."""
    back: int
    """The round after which they were there again."""


@pytest.fixture(scope="module")
def seen(tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """Three nodes serve four workers; a fourth joins; one stops for longer than a round may take; two are killed, and
    ten rounds later two new ones come. Then the run is ended."""
    home = tmp_path_factory.mktemp("come-and-go")
    folder = RunFolder(home / "run")
    with network(home / "flower", 4, warm_node, forked=True, begin_with=3) as running:
        run = Run(running, folder, 1000, [*tiny, *WORDS], EventLog(home / "record.jsonl"))

        def round_reached(number: int) -> None:
            until(lambda: run.round >= number, f"round {number}", 180)

        def ready(number: int, after: int = 0) -> int:
            """The round after which so many nodes were, `after` that round or later."""

            def found() -> list[int]:
                events = folder.events("nodes")
                return [e["round"] for e in events if e["nodes"] == number and e["round"] >= after]

            until(lambda: bool(found()), f"{number} nodes after round {after}", 180)
            return found()[-1]

        def missed(*workers: str, after: int = 0) -> int:
            """The round by which all of them have been missed."""

            def found() -> dict[str, int]:
                events = folder.events("round")[after:]
                return {worker: event["round"] for event in events for worker in event["dropped"]}

            until(lambda: found().keys() >= set(workers), f"workers {workers} are missed", 180)
            return max(found().values())

        try:
            run.begin()
            assert ready(3) == 0
            round_reached(2)
            running.start_node(3)
            round_reached(ready(4) + 2)
            stopped = family(running, 3)
            for process in stopped:
                process.suspend()
            slow = missed("3")
            for process in stopped:
                process.resume()
            round_reached(ready(4, slow) + 2)
            for place in (1, 2):
                running.nodes[place].kill()
            gone = missed("1", "2", after=slow)
            ready(2, gone)
            round_reached(gone + AWAY)
            for place in (1, 2):
                running.start_node(place)
            round_reached((back := ready(4, gone)) + 2)
        finally:
            run.stop()
    yield Seen(folder, folder.events("round"), folder.events("nodes"), slow, gone, back)


def family(running: Network, place: int) -> list[psutil.Process]:
    return [running.nodes[place], *running.nodes[place].children(recursive=True)]


def test_a_node_that_joins_in_the_middle_has_a_part_from_then_on(seen: Seen) -> None:
    first, second = seen.nodes[:2]
    assert (first["round"], first["nodes"], first["gone"], first["new"]) == (0, 3, [], [])
    assert (second["nodes"], second["gone"], second["new"]) == (4, [], [3])


def test_a_slow_node_costs_its_round_and_no_more(seen: Seen) -> None:
    """Its reply comes when the round is over: it is dropped, and the node is asked to go on."""
    (why,) = seen.rounds[seen.slow - 1]["dropped"].items()
    assert why == ("3", f"no reply within flower.round_timeout={TIMEOUT:g} s, of node 3")
    assert seen.rounds[seen.slow - 1]["seconds"] >= TIMEOUT
    assert seen.rounds[seen.slow]["answered"] == [0, 1, 2, 3]


def test_half_of_the_nodes_are_gone_for_ten_rounds(seen: Seen) -> None:
    """Those that stay serve all workers, and nobody is waited for twice."""
    dropped = [worker for event in seen.rounds[seen.slow :] for worker in event["dropped"]]
    assert sorted(dropped) == ["1", "2"]
    assert all(event["answered"] == [0, 1, 2, 3] for event in seen.rounds[seen.gone :])
    assert seen.back - seen.gone >= AWAY
    left = next(event for event in seen.nodes if event["round"] == seen.gone)
    assert (left["nodes"], seen.nodes[-1]["nodes"]) == (2, 4)
    later = [event for event in seen.nodes if event["round"] > seen.slow]
    assert [sorted(place for event in later for place in event[key]) for key in ("gone", "new")] == [[1, 2]] * 2


def test_the_log_says_who_and_why_and_when_and_nothing_is_lost(
    seen: Seen, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    """The weights are those of one process that leaves out the same replies: what was owed has been paid."""
    rounds = {event["round"]: event["dropped"] for event in seen.rounds}
    assert list(rounds) == list(range(1, len(rounds) + 1))
    assert all(event["time"] for event in [*seen.rounds, *seen.nodes])
    ended = seen.folder.load()
    assert ended is not None
    job = make_job(load_config("demo", [*tiny, *WORDS]))
    same, owed = run_without(job, ended.round, tmp_path, lambda task: str(task.worker) in rounds[task.round])
    assert_same_run(ended, same)
    assert owed[seen.gone - 1] > 0
    assert owed[-1] == 0

"""`benchmarks/chaos.py`, its short form with real processes, too."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from chaos import BLOWS, blow_after, chaos, drift, perplexities, side_by_side

from twist_fl.runs.checkpoint import RunFolder


def test_a_node_is_killed_in_most_rounds_and_every_blow_falls() -> None:
    found = Counter(map(blow_after, range(1, 2001)))
    assert found["node killed"] > 1300
    assert {blow: found[blow] for blow, *_ in BLOWS} == {
        "server killed": 20,
        "disk full": 5,
        "network cut": 20,
        "SuperLink killed": 10,
    }
    assert set(map(blow_after, range(1, 41))) == {"node killed", None, *(blow for blow, *_ in BLOWS)}


def test_what_grows_is_seen() -> None:
    def samples(*values: float) -> list[dict[str, float]]:
        return [{"mb": value} for value in values]

    assert drift(samples(900, 5, 100, 100, 130, 130), "mb") == pytest.approx(1.3)
    assert drift(samples(7, 7, 7), "mb") == 1
    assert drift([{}, *samples(1, 2)], "mb") is None


def test_perplexities_are_compared_after_as_many_intervals(tmp_path: Path) -> None:
    ours = RunFolder(tmp_path)
    for round_, answered in enumerate(([0, 1], [0], [0, 1], [], [1, 0]), start=1):
        others = {"loss": 1.0, "seconds": 1.0, "dropped": {}, "bytes_down": {}, "bytes_up": {}}
        ours.log("round", round=round_, answered=answered, **others)
        ours.log("eval", round=round_, full=10.0 - round_)
    found = perplexities(ours)
    assert found == {2: 9.0, 3: 8.0, 5: 6.0, 7: 5.0}
    assert side_by_side(found, {2: 1.0, 4: 2.0, 6: 3.0, 8: 4.0, 20: 5.0}) == [(6.0, 2.0), (5.0, 3.0)]


def test_a_run_that_is_hurt_loses_no_round_and_leaves_nothing_behind(tiny: tuple[str, ...], tmp_path: Path) -> None:
    blows = {1: "node killed", 2: "server killed", 3: "node killed", 4: "disk full", 6: "SuperLink killed"}
    settings = [word for word in tiny if not word.startswith("train.rounds=")]
    found = chaos(7, 3, [*settings, "flower.round_timeout=10"], tmp_path / "chaos", blow_after=blows.get)
    assert (found["rounds_done"], found["each_round_once"], found["processes_left"]) == (7, True, 0)
    assert found["blows"] == {"node killed": 2, "server killed": 1, "disk full": 1, "SuperLink killed": 1}
    assert found["ends"] >= Counter({"server killed": 1, "disk full": 1, "SuperLink killed": 1})
    assert found["intervals"] + found["lost_replies"] == 21
    assert found["lost_replies"] < 11
    assert found["perplexities"]

"""`benchmarks/chaos.py`, its short form with real processes, too."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from chaos import BLOWS, blow_after, chaos, drift


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


def test_a_run_that_is_hurt_loses_no_round_and_leaves_nothing_behind(tiny: tuple[str, ...], tmp_path: Path) -> None:
    blows = {1: "node killed", 2: "server killed", 3: "node killed", 4: "disk full", 6: "SuperLink killed"}
    settings = [word for word in tiny if not word.startswith("train.rounds=")]
    found = chaos(7, 3, [*settings, "flower.round_timeout=5"], tmp_path / "chaos", blow_after=blows.get)
    assert (found["rounds_done"], found["each_round_once"], found["processes_left"]) == (7, True, 0)
    assert found["blows"] == {"node killed": 2, "server killed": 1, "disk full": 1, "SuperLink killed": 1}
    assert found["ends"] == {"server killed": 1, "disk full": 1, "SuperLink killed": 1}
    assert found["intervals"] + found["lost_replies"] == 21
    assert found["lost_replies"] < 11

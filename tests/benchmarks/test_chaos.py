"""A short form of `benchmarks/chaos.py`: real processes that are killed, and a disk that is full."""

from __future__ import annotations

from pathlib import Path

from chaos import BLOWS, chaos, schedule


def test_a_run_that_is_hurt_all_the_time_loses_nothing(tiny: tuple[str, ...], tmp_path: Path) -> None:
    blows = {1: "node killed", 2: "server killed", 4: "disk full"}
    settings = [*tiny, "train.workers=2", "train.rounds=6", "flower.wait_for_nodes=60", "eval.max_windows=4"]
    found = chaos(blows, 6, 2, settings, tmp_path)
    assert found["each_round_once"]
    assert found["state_round"] == 6
    assert found["intervals"] + found["lost_replies"] == 12
    assert found["ends"]["server killed"] == 1
    assert found["ends"]["disk full"] == 1
    assert found["processes_left"] == 0
    assert 0.8 < found["ratio"] < 1.25


def test_a_node_is_killed_in_most_rounds_and_every_blow_falls() -> None:
    found = list(schedule(60).values())
    assert found.count("node killed") > 30
    assert {blow: found.count(blow) for blow in BLOWS} == {blow: len(when) for blow, when in BLOWS.items()}

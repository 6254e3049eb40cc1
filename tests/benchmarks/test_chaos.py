"""`benchmarks/chaos.py`. Its parts hurt a real run in tests/federation/test_node.py."""

from __future__ import annotations

from collections import Counter

import pytest
from chaos import BLOWS, blow_after, drift


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

"""`twist-fl federation status`: whom it asks, and how answers read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from twist_fl.federation import network_status
from twist_fl.federation.federation_folder import create
from twist_fl.federation.network_status import Target, described, target
from twist_fl.federation.simulation import write_connection
from twist_fl.system.errors import ConfigError
from twist_fl.system.files import write_json


def test_a_folder_says_where_its_superlink_is(tmp_path: Path) -> None:
    made = create(tmp_path / "lab", ["lab.example.org"], ["a"], 9000)
    with pytest.raises(ConfigError, match="has not been up: start it with twist-fl federation up"):
        target(str(made.folder), None, False)
    made.flwr_home.mkdir()
    write_connection(made.flwr_home, "127.0.0.1:9000", made.ca)
    write_json({"17": "a"}, made.flwr_home / "nodes.json")
    assert target(str(made.folder), None, False) == Target("127.0.0.1:9000", made.ca, {"17": "a"}, made.runs)
    with pytest.raises(ConfigError, match=r"are for HOST:PORT: the folder .* says both itself"):
        target(str(made.folder), None, True)


def test_an_address_needs_a_certificate_or_a_word(tmp_path: Path) -> None:
    ca = tmp_path / "ca.crt"
    ca.touch()
    assert target("lab:8000", ca, False) == Target("lab:8000", ca, {}, None)
    assert target("lab:8000", None, True) == Target("lab:8000", None, {}, None)
    for given in ((None, False), (ca, True)):
        with pytest.raises(ConfigError, match=r"lab:8000: give --root-certificates ca\.crt, or --insecure where"):
            target("lab:8000", *given)
    with pytest.raises(ConfigError, match=r"does not exist: give the federation's ca\.crt"):
        target("lab:8000", tmp_path / "no.crt", False)
    with pytest.raises(ConfigError, match="is a URL: give HOST:PORT alone, lab:8000"):
        target("https://lab:8000", ca, False)
    with pytest.raises(ConfigError, match="holds no federation"):
        target(str(tmp_path), None, False)


def node(name: str, status: str) -> dict[str, Any]:
    return {"node-id": name, "status": status, "online-elapsed": 61.0, "offline-at": "2026-11-28 08:00:00Z"}


def test_each_state_has_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [node("1", "online"), node("2", "offline"), node("33", "registered"), node("4", "unregistered")]
    run = {"run-id": "5", "status": "finished:failed", "status-details": "of\nmemory", "elapsed": 2.0}
    run |= {"network-traffic": {"inbound-bytes": 1500, "outbound-bytes": 3_000_000}}
    monkeypatch.setattr(network_status, "answers", lambda commands, home: [{"nodes": nodes}, {"runs": [run]}])
    assert list(described(Target("lab:8000", None, {"1": "first"}, None))) == [
        "SuperLink lab:8000: 1 of 3 nodes online",
        "  node 2      offline since 2026-11-28 08:00:00Z",
        "  node 33     let in, has not joined yet",
        "  node first  online for 1 min 1 s",
        "  run 5  finished:failed (of memory), 2.0 s, 1.5 kB in, 3.0 MB out",
    ]

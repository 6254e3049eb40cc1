"""What Flower's commands see, and how their answers are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from twist_fl.federation.flower_commands import _answer, flower_environment
from twist_fl.system.errors import LaunchError


def test_the_users_proxy_stays_and_this_machine_needs_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    monkeypatch.setenv("FLWR_HOME", "/elsewhere")
    monkeypatch.setenv("NO_PROXY", "lab.example.org")
    found = flower_environment(tmp_path)
    assert (found["HTTPS_PROXY"], found["FLWR_HOME"]) == ("http://proxy:3128", str(tmp_path))
    assert found["NO_PROXY"] == found["no_proxy"] == "localhost,127.0.0.1,lab.example.org"


def test_the_json_is_found_behind_what_is_said_to_people() -> None:
    assert _answer(["list"], 'Loading...\n{"success": true, "runs": []}', "") == {"success": True, "runs": []}


@pytest.mark.parametrize(
    ("output", "errors", "reason"),
    [
        ('{"success": false, "error-message": "Listing all nodes...\\nNo such\\nname."}', "", "No such name."),
        ("", "flwr: broken", "flwr: broken"),
        ("{", "", "{"),
        ("", "", "it does not say why"),
    ],
)
def test_a_reason_is_one_line(output: str, errors: str, reason: str) -> None:
    with pytest.raises(LaunchError) as caught:
        _answer(["supernode", "list"], output, errors)
    assert str(caught.value) == f"flwr supernode list failed: {reason}"

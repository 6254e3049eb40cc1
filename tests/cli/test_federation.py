"""The words of `twist-fl federation`: what they do is tested in tests/federation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from typer.testing import CliRunner

from twist_fl.cli import federation
from twist_fl.cli.app import app
from twist_fl.cli.usage import explain
from twist_fl.federation import network, network_status
from twist_fl.federation.federation_folder import opened


def said(*words: str) -> str:
    done = CliRunner().invoke(app, ["federation", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_init_says_what_comes_next(tmp_path: Path) -> None:
    folder = tmp_path / "my lab"
    words = said("init", str(folder), "--host", "lab", "--host", "localhost", "--node", "a", "--node", "b")
    assert "keys for a, b; the certificate is for lab, localhost\n" in words
    assert f"twist-fl federation up '{folder}' --nodes 2\n" in words
    assert f"twist-fl federation up '{folder}' --nodes 0 --listen 0.0.0.0" in words
    assert (opened(folder).port, opened(folder).hosts) == (8000, ("lab", "localhost"))


def test_up_starts_all_nodes_on_loopback_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said("init", str(tmp_path / "lab"), "--host", "lab", "--node", "a", "--node", "b")
    given: list[tuple[str, int]] = []
    monkeypatch.setattr(network, "up", lambda there, listen, num_nodes, say: given.append((listen, num_nodes)))
    said("up", str(tmp_path / "lab"))
    said("up", str(tmp_path / "lab"), "--nodes", "0", "--listen", "0.0.0.0")
    assert given == [("127.0.0.1", 2), ("0.0.0.0", 0)]


def test_status_follows_what_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter(["one", "one", "two"])

    def described(there: object) -> Iterator[str]:
        if (look := next(looks, None)) is None:
            raise KeyboardInterrupt
        yield look

    monkeypatch.setattr(network_status, "described", described)
    monkeypatch.setattr(federation, "_LOOK_SECONDS", 0)
    done = CliRunner().invoke(app, ["federation", "status", "lab:8000", "--insecure", "-f"])
    assert (done.output, done.exit_code) == ("one\ntwo\n", 130)


def test_a_wrong_word_is_told_from_the_right_one() -> None:
    done = CliRunner().invoke(app, ["federation", "statsu"], standalone_mode=False)
    assert isinstance(done.exception, click.UsageError)
    assert explain(done.exception, ["federation", "statsu"]).startswith(
        "No such command 'statsu', did you mean 'status'?"
    )

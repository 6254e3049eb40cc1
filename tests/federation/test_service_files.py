"""Units and Compose files: systemd takes them, and the commands in them are ours."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from twist_fl.cli.app import app
from twist_fl.federation.service_files import node_files, server_files

CONFIG = "partition-id=1 num-partitions=2"


def parsed(words: list[str]) -> dict[str, object]:
    """What the command line gives the command."""
    command, *rest = words[1:]
    found = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    if rest[0] in getattr(found, "commands", {}):
        found, rest = found.commands[rest[0]], rest[1:]
    parameters: dict[str, object] = found.make_context(command, rest).params
    return parameters


def started(unit: str) -> list[str]:
    (line,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    return shlex.split(line)


@pytest.mark.parametrize("folder", ["/srv/lab", "/srv/my lab 100%"])
def test_the_server_runs_no_node_and_listens_to_all(folder: str) -> None:
    files = server_files(Path(folder), "lab.example.org:9000")
    compose = yaml.safe_load(files["compose.yaml"])["services"]["server"]
    assert compose["ports"] == ["9000:9000"]
    unit = parsed(started(files["twist-fl-server.service"].replace("%%", "%")))
    for given, where in ((unit, folder), (parsed(compose["command"]), "/federation")):
        assert {key: str(value) for key, value in given.items()} == {"folder": where, "nodes": "0", "listen": "0.0.0.0"}


def test_a_node_runs_with_its_key_and_place() -> None:
    files = node_files("lab.example.org:9000", CONFIG)
    compose = yaml.safe_load(files["compose.yaml"])["services"]["node"]
    for given in (parsed(started(files["twist-fl-node.service"])), parsed(compose["command"])):
        assert (given["superlink"], given["node_config"], given["insecure"]) == ("lab.example.org:9000", CONFIG, False)
        assert (str(given["root_certificates"]), str(given["auth_supernode_private_key"])) == ("ca.crt", "key")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    for name, text in (server_files(tmp_path, "lab:8000") | node_files("lab:8000", CONFIG)).items():
        if name.endswith(".service"):
            # The command need not be installed here.
            (tmp_path / name).write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.MULTILINE))
            done = subprocess.run(
                ["systemd-analyze", "verify", tmp_path / name], capture_output=True, text=True, check=False
            )
            assert (done.returncode, done.stderr) == (0, "")

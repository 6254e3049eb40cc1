"""`twist-fl federation`, as docs/nodes.md has it: made, started, a run, looked at, ended, with nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from twist_fl.cli.app import app
from twist_fl.federation.federation_folder import Federation, create
from twist_fl.federation.network import check_up, next_step, reached_at, up
from twist_fl.federation.simulation import free_port
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.children import stop_tree
from twist_fl.system.errors import ConfigError, LaunchError
from twist_fl.system.locks import locked

PATIENCE = 300.0
"""Seconds after which something counts as stuck: a busy machine is slow."""
DOCS = Path(__file__).parents[2] / "docs" / "nodes.md"


def until(ready: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ready():
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)


def documented(command: str) -> list[str]:
    """The words after `twist-fl` of the document's first line that begins so."""
    line = next(line for line in DOCS.read_text().splitlines() if line.startswith(f"twist-fl {command} "))
    return shlex.split(line, comments=True)[1:]


def listening(process: psutil.Process) -> Iterator[str]:
    for each in [process, *process.children(recursive=True)]:
        with suppress(psutil.Error):
            yield from (c.laddr.ip for c in each.net_connections("inet") if c.status == psutil.CONN_LISTEN)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen[bytes], Path]]:
    """The folder, `up` and what it says."""
    home = tmp_path_factory.mktemp("federation")
    ours = [sys.executable, "-m", "twist_fl"]
    words = [*ours, *documented("federation init"), "--port", str(free_port())]
    subprocess.run(words, cwd=home, check=True, capture_output=True)
    said = home / "up.out"
    with said.open("w") as output:
        process = subprocess.Popen([*ours, *documented("federation up")], cwd=home, stdout=output, stderr=output)
    try:
        until(lambda: said.read_text().count(": online") == 2 or process.poll() is not None, said.read_text)
        assert process.poll() is None, said.read_text()
        yield home / "lab", process, said
    finally:
        stop_tree(process)


def test_a_run_from_keys_to_the_end(running: tuple[Path, subprocess.Popen[bytes], Path], tiny: tuple[str, ...]) -> None:
    folder, process, said = running
    # The line to paste, with less to do.
    (line,) = re.findall(r"^  (FLWR_HOME=.*)$", said.read_text(), re.MULTILINE)
    less: tuple[str, ...] = (
        "train.workers=2",
        "train.rounds=1",
        "eval.every=0",
        "eval.max_windows=2",
        "eval.tickets=1",
    )
    less = (*less, "flower.transport=flight", "flower.flight=localhost:0")
    line = line.replace('" run-dir', f' {" ".join((*tiny, *less))}" run-dir')
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # that `flwr`, as after `source .venv/bin/activate`
    words = ["bash", "-ec", line]
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    logs = [done.stdout, done.stderr, *(log.read_text() for log in (folder / "logs").iterdir())]
    assert done.returncode == 0, "\n".join(logs)
    events = RunFolder(folder / "runs" / "first").events()
    assert events[-1]["event"] == "done", "\n".join(logs)
    (nodes,), (round_,) = ([event for event in events if event["event"] == kind] for kind in ("nodes", "round"))
    assert round_["bytes_via"]["flight"] and not round_["bytes_via"]["inline"]
    assert (nodes["nodes"], nodes["failed"]) == (2, [])

    seen = CliRunner().invoke(app, ["federation", "status", str(folder)], catch_exceptions=False)
    assert re.search(r"^SuperLink 127\.0\.0\.1:\d+: 2 of 2 nodes online$", seen.output, re.MULTILINE)
    assert re.search(r"^  node a  online for .*\n  node b  online for ", seen.output, re.MULTILINE)
    assert re.search(r"^  run \d+  \S+, .* in, .* out$", seen.output, re.MULTILINE)
    assert re.search(r"lab/runs/first: finished .*sent .*, received ", seen.output)

    # All that listens is for this machine only.
    assert set(listening(psutil.Process(process.pid))) == {"127.0.0.1"}


def test_a_stranger_is_refused_with_a_reason(
    running: tuple[Path, subprocess.Popen[bytes], Path], tmp_path: Path
) -> None:
    folder, _, _ = running
    stranger = create(tmp_path / "other", ["localhost"], ["x"], 8000)
    address = f"localhost:{json.loads((folder / 'federation.json').read_text())['port']}"
    words = [sys.executable, "-m", "twist_fl", "node", "--superlink", address, "--root-certificates"]
    words += [str(folder / "ca.crt"), "--auth-supernode-private-key", str(stranger.node("x") / "key")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1
    assert "the SuperLink does not take this node's key" in done.stderr


def test_it_is_up_once(running: tuple[Path, subprocess.Popen[bytes], Path]) -> None:
    folder, process, _ = running
    seen = CliRunner().invoke(app, ["federation", "up", str(folder)])
    assert isinstance(seen.exception, ConfigError)
    assert f"is up already (process {process.pid}): end it with Ctrl-C there first" in str(seen.exception)


def test_ctrl_c_ends_all(running: tuple[Path, subprocess.Popen[bytes], Path]) -> None:
    """The last: it ends what the others use."""
    folder, process, said = running
    above = psutil.Process(process.pid)
    everyone = [above, *above.children(recursive=True)]
    assert len(everyone) > 6  # the SuperLink, two nodes of three processes
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130, said.read_text()
    assert psutil.wait_procs(everyone, timeout=PATIENCE)[1] == []
    assert not list(folder.glob("flower-*"))
    seen = CliRunner().invoke(app, ["federation", "status", str(folder)])
    assert isinstance(seen.exception, LaunchError)
    assert "is it up? flwr supernode list failed: Connection to the SuperLink is unavailable" in str(seen.exception)


# Before anything starts


@pytest.fixture
def made(tmp_path: Path) -> Federation:
    return create(tmp_path / "lab", ["lab.example.org"], ["a", "b"], free_port())


def test_it_listens_where_its_certificate_is_for(made: Federation) -> None:
    for listen in ("127.0.0.1", "localhost", "0.0.0.0", "::"):
        check_up(made, listen, 2)
    with pytest.raises(ConfigError, match=r"--listen 10\.0\.0\.5: the server's certificate is for lab\.example\.org, "):
        check_up(made, "10.0.0.5", 2)
    assert [reached_at(listen) for listen in ("0.0.0.0", "10.0.0.5", "lab")] == ["127.0.0.1", "10.0.0.5", "lab"]


def test_it_starts_the_nodes_whose_keys_are_here(made: Federation) -> None:
    with pytest.raises(ConfigError, match=r"--nodes 3: the federation has 2, a, b"):
        check_up(made, "127.0.0.1", 3)
    (made.node("b") / "key").unlink()
    check_up(made, "127.0.0.1", 1)
    with pytest.raises(ConfigError, match=r"--nodes 2 starts node b here, whose key is not .*: give --nodes 1, or"):
        check_up(made, "127.0.0.1", 2)


def test_a_port_that_is_taken_is_named(made: Federation) -> None:
    named = rf"something listens on 127\.0\.0\.1:{made.port} already: end it, or"
    with socket.create_server(("127.0.0.1", made.port)), pytest.raises(ConfigError, match=named):
        check_up(made, "127.0.0.1", 2)


def test_a_folder_is_used_by_one_command(made: Federation) -> None:
    with locked(made.folder / ".up.lock"), pytest.raises(ConfigError, match=r"is up already \(process \d+\)"):
        up(made, "127.0.0.1", 0, print)


@pytest.mark.parametrize("num_nodes", range(7))
def test_the_first_run_can_be_run(num_nodes: int, tmp_path: Path) -> None:
    """Its settings fit as many workers as nodes run here; as there are, if none does."""
    from twist_fl.config.schema import load_config
    from twist_fl.config.sizes import layout_of, make_division
    from twist_fl.model.hf_config import model_config

    names = tuple("abcdef")
    step = next_step(Federation(tmp_path, ("localhost",), 8000, names), num_nodes)
    found = re.search(r'overrides="(.*?)"', step)
    assert found
    config = load_config("demo", found[1].split())
    assert config.train.workers == (num_nodes or 6)
    if config.model.pretrained is None:
        layout = layout_of(config, model_config(config).to_dict())
        make_division(config, layout).check(layout, True)

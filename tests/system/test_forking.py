"""Programs that are forked run as `python SCRIPT WORD...` would, but for what is loaded already."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from twist_fl.system import forking

TELLS = """
import json, os, sys
from beside import HERE
import given
print(json.dumps({
    "words": sys.argv, "folder": os.getcwd(), "environment": dict(os.environ), "beside": HERE, "given": given.HERE,
    "path": sys.path[:2], "input": sys.stdin.read(), "loaded": "loaded_before" in sys.modules, "name": __name__,
}))
print("aside", file=sys.stderr)
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Which has loaded a module that sets something in the environment, as libraries do."""
    (tmp_path / "loaded_before.py").write_text("import os\nos.environ.setdefault('A_LIBRARY', 'set')\n")
    with (tmp_path / "errors").open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-P", forking.__file__, "serve", str(tmp_path / "forking"), "loaded_before"],
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            stderr=errors,
        )
    yield process
    process.kill()
    process.wait()


def asked(tmp_path: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    while not (tmp_path / "forking").exists():
        pass
    return subprocess.Popen(
        [sys.executable, forking.__file__, *words],
        env={forking.SOCKET: str(tmp_path / "forking"), **environment},
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def tells(tmp_path: Path) -> Path:
    (tmp_path / "app").mkdir()
    (tmp_path / "more").mkdir()
    (tmp_path / "app" / "beside.py").write_text("HERE = 'beside the script'")
    (tmp_path / "more" / "given.py").write_text("HERE = 'on PYTHONPATH'")
    script = tmp_path / "app" / "tells.py"
    script.write_text(TELLS)
    return script


@pytest.mark.usefixtures("server")
def test_a_fork_is_what_was_asked_for(tmp_path: Path) -> None:
    script = tells(tmp_path)
    given = {"PYTHONPATH": str(tmp_path / "more"), "MINE": "ä b"}
    process = asked(tmp_path, str(script), "--one", "two words", **given)
    out, err = process.communicate("read\n", timeout=30)
    assert err == "aside\n"
    assert process.returncode == 0
    found = json.loads(out)
    environment: Mapping[str, str] = found.pop("environment")
    assert found == {
        "words": [str(script), "--one", "two words"],
        "folder": str(tmp_path),
        "beside": "beside the script",
        "given": "on PYTHONPATH",
        "path": [str(tmp_path / "app"), str(tmp_path / "more")],
        "input": "read\n",
        "loaded": True,
        "name": "__main__",
    }
    assert {**given, "A_LIBRARY": "set"}.items() <= environment.items()
    assert "HOME" not in environment  # the server's own


def test_who_asked_ends_with_the_fork_and_the_server_goes_on(tmp_path: Path, server: subprocess.Popen[bytes]) -> None:
    script = tmp_path / "sleeps.py"
    script.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(999)")
    first, second = asked(tmp_path, str(script)), asked(tmp_path, str(script))
    pids = []
    for each in (first, second):
        assert each.stdout
        pids.append(int(each.stdout.readline()))
    assert set(pids) == {child.pid for child in psutil.Process(server.pid).children()}
    os.kill(pids[0], signal.SIGKILL)
    first.communicate(timeout=30)
    assert second.poll() is None
    os.kill(pids[1], signal.SIGTERM)
    second.communicate(timeout=30)
    assert server.poll() is None
    assert not psutil.Process(server.pid).children()


def test_who_dies_while_it_asks_does_not_stop_the_server(tmp_path: Path, server: subprocess.Popen[bytes]) -> None:
    script = tmp_path / "short.py"
    script.write_text("print('here')")
    asked(tmp_path, str(script)).communicate(timeout=30)
    length = (50).to_bytes(8, "big")
    for part in (b"", length, length + b'{"words": ["'):
        with socket.socket(socket.AF_UNIX) as asking:
            asking.connect(str(tmp_path / "forking"))
            asking.sendall(part)
    assert asked(tmp_path, str(script)).communicate(timeout=30)[0] == "here\n"
    assert server.poll() is None
    assert (tmp_path / "errors").read_text().count("was not understood") == 3


def test_without_a_server_the_program_runs_by_itself_and_says_so(tmp_path: Path) -> None:
    script = tmp_path / "short.py"
    script.write_text("import sys\nprint(sys.argv[1:])")
    (tmp_path / "forking").touch()
    out, err = asked(tmp_path, str(script), "--language=PYTHON", "word").communicate(timeout=30)
    assert out == "['word']\n"  # the first is for Ray's set-up of a worker
    assert "forks nothing" in err

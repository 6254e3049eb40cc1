"""What a command started ends with it, also when it is killed; nothing of another run is touched."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
from app_runs import PATIENCE

from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system import children
from twist_fl.system.errors import ConfigError

COMMAND = """
import subprocess, sys, time
from pathlib import Path
from twist_fl.system import children as guard
with guard.flower_home(Path(sys.argv[1])) as home:
    guard.ray_folder(home).joinpath("socket").touch()
    # One whose parent is gone, in a session of its own, which does not end when asked to.
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(999)"
    words = [sys.executable, "-c", child]
    subprocess.Popen(words, env={"FLWR_HOME": str(home)}, start_new_session=True).stdout
    time.sleep(999)
"""
SLEEP = [sys.executable, "-c", "import time; time.sleep(999)"]


@contextmanager
def running(words: list[str], **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(words, env=os.environ | environment, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()


def wait_for(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def homes(folder: Path) -> list[Path]:
    return list(folder.glob("flower-*"))


def test_all_ends_with_a_command_that_is_killed(tmp_path: Path) -> None:
    with running([sys.executable, "-c", COMMAND, str(tmp_path)]) as command:
        assert command.stdout
        command.stdout.read(1)
        (home,) = homes(tmp_path)
        assert len(children.processes_of(lambda other: other == home)) == 1
        ray = children.ray_folder(home)
        assert len(str(ray)) < 48
        assert (ray / "socket").exists()
        command.kill()
        command.wait()
        wait_for(lambda: not homes(tmp_path))
    assert children.processes_of(lambda other: other == home) == []
    assert not ray.exists()


def test_all_ends_with_the_block(tmp_path: Path) -> None:
    with ExitStack() as stack:
        with children.flower_home(tmp_path) as home:
            process = stack.enter_context(running(SLEEP, FLWR_HOME=str(home)))
            (watch,) = [each for each in psutil.Process().children() if str(home) in each.cmdline()]
        assert process.poll() is not None
    assert not watch.is_running()
    assert homes(tmp_path) == []


def test_what_a_killed_run_has_left_goes_and_nothing_of_another(tmp_path: Path) -> None:
    for run in ("mine", "mine-too"):
        (tmp_path / run / "flower-1").mkdir(parents=True)
    mine, other = (tmp_path / run / "flower-1" for run in ("mine", "mine-too"))
    ray = children.ray_folder(mine)
    with running(SLEEP, FLWR_HOME=str(mine)) as stale, running(SLEEP, FLWR_HOME=str(other)) as live:
        children.clear_stale(mine.parent)
        assert stale.wait() != 0
        assert live.poll() is None
    assert (mine.exists(), ray.exists(), other.exists()) == (False, False, True)


@pytest.mark.parametrize("length", [10, 200])
def test_rays_folder_has_a_short_name_in_any_temporary_folder(
    length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", f"{tmp_path}/{'t' * length}")
    ray = children.ray_folder(tmp_path)
    try:
        assert len(str(ray)) < 48
        assert children.ray_folder(tmp_path) == ray
    finally:
        ray.rmdir()


def test_a_folder_that_is_in_use_says_by_whom(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with (
        folder.lock("command"),
        pytest.raises(ConfigError, match=rf"another command \(process {os.getpid()}\) is at work in"),
        folder.lock("command"),
    ):
        pass
    with folder.lock("command"):
        pass


def test_what_a_killed_server_had_half_written_is_removed_unless_one_is_at_work(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    half = tmp_path / "checkpoints" / ".round-000003.4242"
    half.mkdir(parents=True)
    with folder.lock("server"):
        folder.tidy()
        assert half.exists()
    folder.tidy()
    assert not half.exists()

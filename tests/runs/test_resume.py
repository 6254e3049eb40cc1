"""A real simulation that is killed, interrupted and resumed, and one of whose workers dies."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import psutil
from app_runs import (
    ONE_PROCESS,
    PATIENCE,
    assert_is_rounds_run,
    processes_of,
    saved_rounds,
    started,
    twist_fl,
    wait_until,
)
from conftest import Run

from twist_fl.runs.checkpoint import RunFolder

LONG = ("train.rounds=12", "train.interval=20", "checkpoint_every=1")
"""Long enough that something can happen to it on its way."""


def test_a_killed_run_ends_as_if_nothing_had_happened(small: tuple[str, ...], tmp_path: Path) -> None:
    """With state that stays on the clients: the hardest to resume."""
    folder = RunFolder(tmp_path / "run")
    words = (*small, *LONG, ONE_PROCESS, "train.optimizer_state=client")
    with started("train", "demo", *words, f"dir={folder.path}") as process:
        wait_until(lambda: saved_rounds(folder) >= 2, process)
        names = " ".join(word for running in processes_of(folder) for word in running.cmdline())
        assert "raylet" in names  # so that their absence below means something
        process.kill()
        process.wait()
        deadline = time.monotonic() + PATIENCE
        while processes_of(folder) and time.monotonic() < deadline:
            time.sleep(0.05)
    assert processes_of(folder) == []
    assert 2 <= saved_rounds(folder) < 12
    assert not folder.events("done")

    done = twist_fl("train", "--resume", folder.path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_is_rounds_run(folder, tmp_path / "oracle")
    assert [event["round"] for event in folder.events("round")] == list(range(1, 13))
    assert processes_of(folder) == []


def test_a_dead_worker_is_replaced_and_an_interrupted_run_goes_on(
    small: tuple[str, ...], tmp_path: Path, run: Run
) -> None:
    """One simulation for both: a start costs most. It goes on without one."""
    folder = RunFolder(tmp_path / "run")
    with started("train", "demo", *small, *LONG, f"dir={folder.path}") as process:
        wait_until(lambda: saved_rounds(folder) >= 2, process)
        actors: list[psutil.Process] = []

        def found() -> bool:
            actors.extend(each for each in processes_of(folder) if "ray::" in " ".join(each.cmdline()))
            return bool(actors)

        wait_until(found, process)
        actors[0].kill()
        killed = saved_rounds(folder)
        wait_until(lambda: saved_rounds(folder) >= killed + 3, process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, output
    saved = saved_rounds(folder)
    assert saved < 12
    assert f"interrupted; round {saved} is saved; go on after it with:  twist-fl train --resume {folder.path}" in output
    assert processes_of(folder) == []
    assert not folder.events("done")
    rounds = folder.events("round")
    assert rounds[-1]["answered"] == [0, 1]

    status, out, err = run("train", "--local", "--resume", folder.path)
    assert status == 0, out + err
    rounds = folder.events("round")
    assert [event["round"] for event in rounds] == list(range(1, 13))
    lost = sum(len(event["dropped"]) for event in rounds)
    assert json.loads(folder.results_file.read_text())["lost_replies"] == lost <= 1
    assert ("1 reply was lost" in out) == bool(lost)

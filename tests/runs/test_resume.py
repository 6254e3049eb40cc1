"""A real simulation that is interrupted, killed and resumed."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import psutil
from app_runs import PATIENCE, assert_is_rounds_run, processes_of, saved_rounds, started, twist_fl, wait_until

from twist_fl.runs.checkpoint import RunFolder


def test_a_run_is_interrupted_then_killed_then_ends_as_if_nothing_had_happened(
    small: tuple[str, ...], tmp_path: Path
) -> None:
    """With state that stays on the clients: the hardest to resume."""
    folder = RunFolder(tmp_path / "run")
    words = (*small, "train.optimizer_state=client", "train.rounds=16", "train.interval=20", "checkpoint_every=1")
    with started("train", "demo", *words, f"dir={folder.path}") as process:
        wait_until(lambda: saved_rounds(folder) >= 2, process)
        names = " ".join(word for running in processes_of(folder) for word in running.cmdline())
        assert "raylet" in names  # so that their absence below means something
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, output
    saved = saved_rounds(folder)
    assert f"interrupted; round {saved} is saved; go on after it with:  twist-fl train --resume {folder.path}" in output
    assert processes_of(folder) == []
    assert not folder.events("done")

    with started("train", "--resume", folder.path) as process:
        wait_until(lambda: saved_rounds(folder) >= saved + 2, process)
        process.kill()
        process.wait()
        deadline = time.monotonic() + PATIENCE
        while processes_of(folder) and time.monotonic() < deadline:
            time.sleep(0.05)
    assert processes_of(folder) == []
    assert saved + 2 <= saved_rounds(folder) < 16
    assert not folder.events("done")

    done = twist_fl("train", "--resume", folder.path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_is_rounds_run(folder, tmp_path / "oracle")
    assert [event["round"] for event in folder.events("round")] == list(range(1, 17))
    assert processes_of(folder) == []


def test_a_worker_whose_process_dies_is_replaced(small: tuple[str, ...], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    words = (*small, "flower.cpus_per_worker=1", "train.rounds=16", "train.interval=20", "checkpoint_every=1")
    with started("train", "demo", *words, f"dir={folder.path}") as process:
        wait_until(lambda: saved_rounds(folder) >= 2, process)
        actors: list[psutil.Process] = []

        def found() -> bool:
            actors.extend(each for each in processes_of(folder) if "ray::" in " ".join(each.cmdline()))
            return bool(actors)

        wait_until(found, process)
        actors[0].kill()
        output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    rounds = folder.events("round")
    assert rounds[-1]["answered"] == [0, 1]
    lost = sum(len(event["dropped"]) for event in rounds)
    assert json.loads(folder.results_file.read_text())["lost_replies"] == lost <= 1
    assert ("replies of workers were lost" in output) == bool(lost)

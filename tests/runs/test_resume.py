"""A real simulation that is killed, interrupted and resumed, and one of whose workers dies."""

from __future__ import annotations

import json
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
from app_runs import (
    ONE_PROCESS,
    PATIENCE,
    processes_of,
    saved_rounds,
    started,
    wait_until,
)
from conftest import Run
from local_grid import assert_same_run

from twist_fl import rounds
from twist_fl.runs.checkpoint import RunFolder

NUM_ROUNDS = 20
LONG = (f"train.rounds={NUM_ROUNDS}", "train.interval=20", "checkpoint_every=1", "train.optimizer_state=client")
"""Long enough that something can happen to it on its way, with state on the clients: the hardest to resume."""


def test_killed_gone_on_a_worker_dead_interrupted_and_gone_on_locally(
    small: tuple[str, ...], tmp_path: Path, run: Run
) -> None:
    """Two simulations for all: a start costs most."""
    folder = RunFolder(tmp_path / "run")
    with started("train", "demo", *small, *LONG, ONE_PROCESS, f"dir={folder.path}") as process:
        wait_until(lambda: saved_rounds(folder) >= 2, process)
        names = " ".join(word for running in processes_of(folder) for word in running.cmdline())
        assert "raylet" in names  # so that their absence below means something
        process.kill()
        process.wait()
        deadline = time.monotonic() + PATIENCE
        while processes_of(folder) and time.monotonic() < deadline:
            time.sleep(0.05)
    assert processes_of(folder) == []
    killed_at = saved_rounds(folder)
    assert 2 <= killed_at < NUM_ROUNDS

    with started("train", "--resume", folder.path) as process:
        actors: list[psutil.Process] = []

        def found() -> bool:
            for each in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.Error):  # it has ended
                    if each.cmdline()[0].startswith("ray::WarmActor"):
                        actors.append(each)
            return bool(actors)

        wait_until(lambda: saved_rounds(folder) > killed_at, process)
        gone_on = folder.load()
        wait_until(found, process)
        actors[0].kill()
        reached = saved_rounds(folder)

        def whole_again() -> bool:
            """The round in which an actor died may lack its reply; one after it lacks none."""
            return any(e["round"] > reached and e["answered"] == [0, 1] for e in folder.events("round"))

        wait_until(whole_again, process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, output
    job = folder.job()
    assert gone_on is not None
    assert_same_run(gone_on, rounds.run(job, rounds.start(job), tmp_path / "oracle", gone_on.round))
    saved = saved_rounds(folder)
    assert saved < NUM_ROUNDS
    assert f"interrupted; round {saved} is saved; go on after it with:  twist-fl train --resume {folder.path}" in output
    assert processes_of(folder) == []
    assert not folder.events("done")

    status, out, err = run("train", "--local", "--resume", folder.path)
    assert status == 0, out + err
    events = folder.events("round")
    assert [event["round"] for event in events] == list(range(1, NUM_ROUNDS + 1))
    lost = sum(len(event["dropped"]) for event in events)
    assert json.loads(folder.results_file.read_text())["lost_replies"] == lost <= 2
    assert bool(lost) == bool(re.search(r"repl(y was|ies were) lost", out))

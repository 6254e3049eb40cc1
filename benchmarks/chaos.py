"""A run that is hurt all the time: nodes are killed and started again, the server and the SuperLink are killed, its
disk is full, the network is cut. What is lost, what grows, and what the model is worth in the end.

A SuperLink and nodes of `twist-fl node` on this machine; every message goes through a relay that can be cut. After most
rounds a node is killed with SIGKILL, and a new one starts: forked (nursery.py), or its loading of torch would be what
is measured. The server is killed by SIGKILL; a limit of 4 kB on what it may write to a file stands for a full disk.
Whatever ends it, `flwr run` is called again with the same folder, as an operator would. In the end it is
compared with an undisturbed run after as many successful intervals: at every tenth round of its second half, for from
one to the next perplexity moves by a few percent.

With --folder it goes on where it was when it is called again, with the same --rounds and --nodes.

    python benchmarks/chaos.py [--rounds 2000] [--minutes 15] [--folder DIR] [--nodes 3] [--out FILE] [key=value ...]
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any

import psutil
from common import save, show
from loopback import Network, Relay, network, warm_node

from twist_fl.config.schema import load_config
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.events import EventLog
from twist_fl.runs.local import train_local
from twist_fl.runs.story import Follower
from twist_fl.system.children import stop_tree
from twist_fl.system.locks import is_locked
from twist_fl.training.job import Job, make_job

STUCK = 900.0  # seconds after which something counts as stuck
FULL = 4096  # bytes that a file may have where the disk is full
BLOWS = (("server killed", 100, 10), ("disk full", 400, 21), ("network cut", 100, 37), ("SuperLink killed", 200, 33))
"""What happens after each 100th, 200th or 400th round, and after which the first time."""
KILLED = 0.75
"""Share of the other rounds after which a node is killed."""
MEASURED = ("server_mb", "server_files", "superlink_mb", "superlink_files", "processes")
BlowAfter = Callable[[int], str | None]  # what happens after a round, if anything
KEPT = 400
"""Samples in the result: of a longer run every second, every third, ..."""
JOB = """
    train.schedule=constant train.warmup=0 train.lr=2e-3 train.interval=4 train.threads=1 train.device=cpu
    train.optimizer_state=reset flower.round_timeout=10 flower.wait_for_nodes=10 eval.every=10 eval.max_windows=64
    blueprint.num_sub=6 eval.sizes=[6] eval.tickets=2 checkpoint_every=1
"""


class Run:
    """A run of so many rounds: its server is begun again whenever it has ended; every way it ended is in the record."""

    def __init__(
        self, running: Network, folder: RunFolder, num_rounds: int, words: list[str], record: EventLog
    ) -> None:
        self.folder, self._num_rounds, self._running, self._record = folder, num_rounds, running, record
        overrides = " ".join([*words, f"train.rounds={num_rounds}"])
        self._settings = {"preset": "demo", "overrides": overrides, "run-dir": str(folder.path)}
        self._lock = folder.path / ".server.lock"
        self._follower = Follower(folder.path / "events.jsonl")
        self._client: subprocess.Popen[bytes] | None = None
        self._blow = ""

    @property
    def alive(self) -> bool:
        return is_locked(self._lock)

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(int(self._lock.read_text()))

    @property
    def round(self) -> int:
        """The last that its log has."""
        for _ in self._follower.look():
            pass
        return self._follower.story.round

    @property
    def done(self) -> bool:
        return self.round >= self._num_rounds and self._follower.story.ended == "done"

    def begin(self) -> None:
        """Until the server has begun, or could not; its lock alone says nothing, it is taken twice."""
        if self._client is not None:
            self._record.write("end", why=self._blow or self._follower.story.state.split(";")[0][:80])
        self.stop()
        self._blow = ""
        before, client = self._follower.story.start, self._running.begin_run(self._settings)
        self._client = client
        until(lambda: self.done or self._follower.story.start is not before or client.poll() is not None, "a server")

    def stop(self) -> None:
        if self._client is not None:
            stop_tree(self._client)

    def hit(self, blow: str, relay: Relay) -> None:
        with suppress(psutil.Error, ProcessLookupError, ValueError):
            match blow:
                case "server killed":
                    self.process.kill()
                case "SuperLink killed":  # its child, the server, would try to reach it for minutes
                    self._running.link.kill()
                    self._running.link.wait()
                    self.process.kill()
                    self._running.start_link()
                case "disk full":
                    resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (FULL, FULL))
                case "network cut":
                    relay.cut(5.0)
                    return  # the server goes on
            self._blow = blow


def until(ready: Callable[[], bool], what: str, patience: float = STUCK) -> None:
    deadline = time.monotonic() + patience
    while not ready():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited for {patience:g} s: {what}")
        time.sleep(0.1)


def resources(running: Network, run: Run) -> dict[str, float]:
    """Of the server, the SuperLink and everything of the network: memory in MB, open files, processes."""
    found: dict[str, float] = {}
    with suppress(psutil.Error, ValueError):
        link = psutil.Process(running.link.pid)
        for name, process in (("server", run.process), ("superlink", link)):
            found[f"{name}_mb"] = process.memory_info().rss / 1e6
            found[f"{name}_files"] = process.num_fds()
        found["processes"] = len(running.processes())
    return found


def blow_after(round_: int) -> str | None:
    """What happens after a round: its number says so, and a run that goes on is hurt as one that runs through."""
    found = next((blow for blow, every, first in BLOWS if round_ % every == first), None)
    return found or ("node killed" if random.Random(round_).random() < KILLED else None)


def torment(
    running: Network,
    run: Run,
    record: EventLog,
    blow_after: BlowAfter,
    relay: Relay,
    seconds: float = inf,
) -> None:
    """Until the run is done, or so long. What the machine gave is recorded after each round."""
    deadline, seen = time.monotonic() + seconds, run.round
    while not run.done and time.monotonic() < deadline:
        if not run.alive:
            run.begin()
        elif (round_ := run.round) > seen:
            blow = next(filter(None, map(blow_after, range(seen + 1, round_ + 1))), None)
            seen, rng = round_, random.Random(round_)
            record.write("sample", round=round_, **resources(running, run))
            if blow is None:
                continue
            record.write("blow", round=round_, blow=blow)
            if blow == "node killed":
                place = rng.randrange(len(running.nodes))
                time.sleep(rng.uniform(0, 2.0))  # somewhere in the round
                if not running.nodes[place].is_running():
                    record.write("gone", round=round_, node=place)
                else:
                    running.nodes[place].kill()
                    running.nodes[place].wait()
                running.start_node(place)
            else:
                run.hit(blow, relay)
        time.sleep(0.1)


def perplexities(folder: RunFolder) -> dict[int, float]:
    """Of the full model, by how many intervals had counted."""
    counted, found = 0, {}
    for event in folder.events():
        counted += len(event["answered"]) if event["event"] == "round" else 0
        if event["event"] == "eval":
            found[counted] = event["full"]
    return found


def side_by_side(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[tuple[float, float]]:
    """Each of our second half beside what the other had after as many intervals, or nearly."""
    second = {counted: value for counted, value in ours.items() if 2 * counted > max(ours)}
    return [(value, theirs[min(theirs, key=lambda n: abs(n - counted))]) for counted, value in second.items()]


def undisturbed(words: Sequence[str], home: Path, num_rounds: int) -> RunFolder:
    """The same run in one process; it goes on where it was, too."""
    folder = RunFolder(home / f"undisturbed-{num_rounds}")
    if not folder.job_file.is_file():
        folder.create(make_job(load_config("demo", [*words, f"train.rounds={num_rounds}"])))
    if not folder.finished(num_rounds):
        train_local(folder)
    return folder


def drift(samples: list[dict[str, Any]], name: str) -> float | None:
    """The median over the last third over that of the second third; 1 is flat."""
    values: list[float] = [sample[name] for sample in samples if name in sample]
    if (third := len(values) // 3) == 0:
        return None
    return statistics.median(values[-third:]) / statistics.median(values[-2 * third : -third])


def chaos(
    num_rounds: int,
    num_nodes: int,
    settings: Sequence[str],
    home: Path,
    minutes: float = inf,
    blow_after: BlowAfter = blow_after,
) -> dict[str, Any]:
    """Hurt the run in `home` until it is done, or so long; what has been found so far."""
    given = dict(word.split("=", 1) for word in [*JOB.split(), f"train.workers={num_nodes}", *settings])
    words = [f"{key}={value}" for key, value in given.items()]
    job = make_job(load_config("demo", [*words, f"train.rounds={num_rounds}"]))  # reads the text: that is not timed
    folder, relay, record = RunFolder(home / "run"), Relay(), EventLog(home / "record.jsonl")

    def through(address: str, node_config: str) -> list[str]:
        relay.target = address
        return warm_node(relay.address, node_config)

    record.write("session")
    shutil.rmtree(home / "flower", ignore_errors=True)  # the logs of the session before
    with network(home / "flower", num_nodes, through, forked=True) as running:
        run_ = Run(running, folder, num_rounds, words, record)
        try:
            torment(running, run_, record, blow_after, relay, 60 * minutes)
        finally:
            run_.stop()
            record.write("stopped")
    left = psutil.wait_procs(running.processes(), timeout=60)[1]  # on a busy machine the last take their time
    return {"processes_left": len(left), **result(job, folder, record, partial(undisturbed, words, home))}


def result(job: Job, folder: RunFolder, record: EventLog, undisturbed: Callable[[int], RunFolder]) -> dict[str, Any]:
    """What the run's folder and the record say, beside an undisturbed run of the same seed."""
    if (ended := folder.load()) is None or not (ours := perplexities(folder)):
        raise SystemExit(f"it was stopped before anything was evaluated: go on, or see {folder.path}")
    events = record.events()
    begins = [*(i for i, event in enumerate(events) if event["event"] == "session"), None]
    parts = [events[begin:end] for begin, end in pairwise(begins)]
    times = [[datetime.fromisoformat(event["time"]) for event in part] for part in parts]
    sessions = [[event for event in part if event["event"] == "sample"] for part in parts]
    samples = [sample for session in sessions for sample in session]
    rounds = [event for event in folder.events("round") if event["round"] <= ended.round]
    intervals = sum(len(event["answered"]) for event in rounds)
    pairs = side_by_side(ours, perplexities(undisturbed(round(intervals / job.config.train.workers))))
    return {
        "settings": {"rounds": job.num_rounds, "nodes": job.config.train.workers, "job": JOB.split()},
        "rounds_done": ended.round,
        "sessions": len(sessions),
        "seconds": sum((each[-1] - each[0]).total_seconds() for each in times),
        "blows": Counter(event["blow"] for event in record.events("blow")),
        "ends": Counter(event["why"] for event in record.events("end")),
        "each_round_once": [event["round"] for event in rounds] == list(range(1, ended.round + 1)),
        "intervals": intervals,
        "nodes_gone_by_themselves": len(record.events("gone")),
        "lost_replies": sum(len(event["dropped"]) for event in rounds),
        "reasons": Counter(why for event in rounds for why in event["dropped"].values()),
        "median_round": statistics.median(event["seconds"] for event in rounds),
        "ratio": statistics.geometric_mean(ours / theirs for ours, theirs in pairs),
        "perplexities": pairs,
        "drift": {name: drift(max(sessions, key=len), name) for name in MEASURED},
        "samples": samples[:: max(1, len(samples) // KEPT)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=15.0, help="then it stops, wherever it is")
    parser.add_argument("--folder", type=Path, help="where it goes on; default: a new one, which is removed")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file for the results, JSON")
    parser.add_argument("settings", nargs="*", help="key=value settings over those of the job")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = chaos(args.rounds, args.nodes, args.settings, args.folder or Path(scratch), args.minutes)
    save(found, args.out)
    show(("what", "found"), [(name, str(value)) for name, value in found.items() if name != "samples"])
    sys.exit(0 if found["each_round_once"] and not found["processes_left"] else 1)


if __name__ == "__main__":
    main()

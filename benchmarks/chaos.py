"""A run that is hurt all the time: nodes are killed and started again, the server is killed, its disk is full, its
network is cut. What is lost, what grows, and what the model is worth in the end.

A SuperLink and nodes of `twist-fl node` on this machine; every message goes through a relay that can be cut. In most
rounds a node is killed with SIGKILL, and a new one starts. The server is killed by SIGKILL; a limit of 4 kB on what it
may write to a file stands for a full disk. Whatever ends it, `flwr run` is called again with the same folder, as an
operator would. In the end the model is compared with that of an undisturbed run with as many successful intervals.

    python benchmarks/chaos.py [--rounds 60] [--nodes 3] [--out FILE] [key=value ...]
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from common import save, show
from loopback import Network, network, warm_node

from twist_fl.blueprint.drawing import full_blueprint
from twist_fl.config.schema import load_config
from twist_fl.rounds import run, start
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.children import stop_tree
from twist_fl.system.locks import is_locked
from twist_fl.tickets.evaluate import perplexity
from twist_fl.training.job import Job, make_job

TIMEOUT = 3600.0
"""Seconds after which the whole is stuck."""
FULL = 4096
"""Bytes that a file may have where the disk is full."""
BLOWS = {"server killed": (0.2, 0.5, 0.8), "disk full": (0.3, 0.7), "network cut": (0.4, 0.6, 0.9)}
"""When, in shares of the rounds; a node is killed in most others."""
MEASURED = ("server_mb", "server_files", "superlink_mb", "superlink_files", "processes")
KILLED = 0.75
"""Share of the rounds in which a node is killed."""
JOB = """
    train.schedule=constant train.warmup=0 train.lr=2e-3 train.interval=8 train.threads=1 train.device=cpu
    train.optimizer_state=reset flower.round_timeout=40 flower.wait_for_nodes=30 eval.every=0 eval.max_windows=64
    blueprint.num_sub=6 eval.sizes=[6] eval.tickets=2 checkpoint_every=1
"""


class Relay:
    """Passes bytes on to an address that is told later, until it is cut."""

    def __init__(self) -> None:
        self.target = ""
        self._door = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._door.getsockname()[1]}"
        self._open: set[socket.socket] = set()
        self._cut_until = 0.0
        threading.Thread(target=self._serve, daemon=True).start()

    def cut(self, seconds: float) -> None:
        """Every connection breaks, and none is made for so long."""
        self._cut_until = time.monotonic() + seconds
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        while True:
            client, _ = self._door.accept()
            threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        host, port = self.target.split(":")
        with client, suppress(OSError):
            if time.monotonic() < self._cut_until:
                return
            with socket.create_connection((host, int(port))) as server:
                ends = {client: server, server: client}
                self._open |= ends.keys()
                while True:
                    for ready in select.select(list(ends), [], [])[0]:
                        if not (content := ready.recv(2**16)):
                            self._open -= ends.keys()
                            return
                        ends[ready].sendall(content)


class Run:
    """One run's server, begun again whenever it has ended; every way it ended is counted."""

    def __init__(self, running: Network, folder: RunFolder, settings: dict[str, str]) -> None:
        self.folder, self.ends = folder, Counter[str]()
        self._running, self._settings = running, settings
        self._lock = folder.path / ".server.lock"
        self._client: subprocess.Popen[bytes] | None = None
        self._blow = ""

    @property
    def alive(self) -> bool:
        return is_locked(self._lock)

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(int(self._lock.read_text()))

    def begin(self) -> None:
        if self._client is not None:
            failed = self.folder.events("failed")
            self.ends[self._blow or (failed[-1]["error"].split(";")[0][:80] if failed else "no reason")] += 1
        self.stop()
        self._blow = ""
        self._client = self._running.begin_run(self._settings)
        until(lambda: self.alive or self.done, "the server starts")

    def stop(self) -> None:
        if self._client is not None:
            stop_tree(self._client)

    @property
    def done(self) -> bool:
        return bool(self.folder.events("done"))

    def hit(self, blow: str, relay: Relay) -> None:
        with suppress(psutil.Error, ProcessLookupError, ValueError):
            match blow:
                case "server killed":
                    self.process.kill()
                case "disk full":
                    resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (FULL, FULL))
                case "network cut":
                    relay.cut(5.0)
                    return  # the server goes on
            self._blow = blow


def until(ready: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not ready():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited for too long: {what}")
        time.sleep(0.1)


def resources(running: Network, run: Run) -> dict[str, float]:
    """Of the server, the SuperLink and everything of the network: memory in MB, open files, processes."""
    found: dict[str, float] = {}
    with suppress(psutil.Error, ValueError):
        everyone = [p for p in psutil.process_iter() if str(running.home) in " ".join(_environment(p))]
        link = psutil.Process(running.link.pid)
        for name, process in (("server", run.process), ("superlink", link)):
            found[f"{name}_mb"] = process.memory_info().rss / 1e6
            found[f"{name}_files"] = process.num_fds()
        found["processes"] = len(everyone)
    return found


def _environment(process: psutil.Process) -> list[str]:
    try:
        return list(process.environ().values())
    except psutil.Error:
        return []


def schedule(num_rounds: int, seed: int = 0) -> dict[int, str]:
    """What happens after which round."""
    rng = random.Random(seed)
    nodes = {round_: "node killed" for round_ in range(1, num_rounds) if rng.random() < KILLED}
    return nodes | {max(1, round(share * num_rounds)): blow for blow, shares in BLOWS.items() for share in shares}


def torment(running: Network, run: Run, relay: Relay, blows: dict[int, str]) -> list[dict[str, float]]:
    """Until the run is done. What it took, at the end of each round."""
    rng, samples, seen = random.Random(0), [], 0
    while not run.done:
        if not run.alive:
            run.begin()
            continue
        round_ = max((event["round"] for event in run.folder.events("round")), default=0)
        if round_ > seen:
            seen = round_
            samples.append({"round": round_, "time": time.monotonic(), **resources(running, run)})
            if (blow := blows.get(round_)) == "node killed":
                place = rng.randrange(len(running.nodes))
                time.sleep(rng.uniform(0, 2.0))  # somewhere in the round
                running.nodes[place].kill()
                running.nodes[place].wait()
                running.start_node(place)
            elif blow:
                run.hit(blow, relay)
        time.sleep(0.1)
    return samples


def undisturbed(job: Job, intervals: int, scratch: Path) -> tuple[Job, float]:
    """A run of the same seed with as many successful intervals, and the perplexity of its model."""
    rounds = round(intervals / job.config.train.workers)
    return job, full_perplexity(job, run(job, start(job), scratch, rounds).params)


def full_perplexity(job: Job, params: Any) -> float:
    model = job.models().load_sliced(full_blueprint(job.layout), params)
    return perplexity(model, job.corpus.test[:64], 8)


def drift(samples: list[dict[str, float]], name: str) -> float:
    """The median over the last third of the run over that of the second third; 1 is flat."""
    values = [sample[name] for sample in samples if name in sample]
    third = max(1, len(values) // 3)
    return statistics.median(values[-third:]) / statistics.median(values[-2 * third : -third] or values[:1])


def chaos(blows: dict[int, str], num_rounds: int, num_nodes: int, settings: list[str], scratch: Path) -> dict[str, Any]:
    words = [*JOB.split(), f"train.workers={num_nodes}", f"train.rounds={num_rounds}", *settings]
    job = make_job(load_config("demo", words))  # reads the text before anything is timed
    folder, relay = RunFolder(scratch / "run"), Relay()

    def through(address: str, node_config: str) -> list[str]:
        relay.target = address
        return warm_node(relay.address, node_config)

    began = time.monotonic()
    with network(scratch / "flower", num_nodes, through) as running:
        run_ = Run(running, folder, {"preset": "demo", "overrides": " ".join(words), "run-dir": str(folder.path)})
        try:
            samples = torment(running, run_, relay, blows)
        finally:
            run_.stop()
        home = str(running.home)
    seconds = time.monotonic() - began
    left = [p.pid for p in psutil.process_iter() if home in " ".join(_environment(p)) and p.pid != os.getpid()]
    rounds, ended = folder.events("round"), folder.load()
    assert ended is not None
    intervals = sum(len(event["answered"]) for event in rounds)
    ours, theirs = full_perplexity(job, ended.params), undisturbed(job, intervals, scratch / "oracle")[1]
    return {
        "rounds": num_rounds,
        "nodes": num_nodes,
        "seconds": seconds,
        "blows": dict(sorted(blows.items())),
        "counts": Counter(blows.values()),
        "ends": run_.ends,
        "each_round_once": [event["round"] for event in rounds] == list(range(1, num_rounds + 1)),
        "state_round": ended.round,
        "losses": [event["loss"] for event in rounds],
        "lost_replies": sum(len(event["dropped"]) for event in rounds),
        "intervals": intervals,
        "processes_left": len(left),
        "perplexity": ours,
        "undisturbed": theirs,
        "ratio": ours / theirs,
        "drift": {name: drift(samples, name) for name in MEASURED},
        "samples": samples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file for the results, JSON")
    parser.add_argument("settings", nargs="*", help="key=value settings over those of the job")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = chaos(schedule(args.rounds), args.rounds, args.nodes, args.settings, Path(scratch))
    save(found, args.out)
    show(("what", "found"), [(name, str(value)) for name, value in found.items() if name not in ("samples", "losses")])
    sys.exit(0 if found["each_round_once"] and not found["processes_left"] else 1)


if __name__ == "__main__":
    main()

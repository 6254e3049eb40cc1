"""`twist-fl node` on a real SuperLink: the same weights, one process for all messages, nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import write_text
from local_grid import assert_same_run
from loopback import Network, network, stock_node, warm_node
from typer.testing import CliRunner

from twist_fl.cli.app import app
from twist_fl.config.schema import load_config
from twist_fl.federation import node
from twist_fl.rounds import run, start
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.errors import ConfigError, LaunchError
from twist_fl.training.job import make_job

PATIENCE = 300.0
"""Seconds after which something counts as stuck: a busy machine is slow."""


def served_by(log: Path) -> list[tuple[int, str]]:
    """The executor's process and the kind of each message it answered without an error."""
    return [(int(pid), kind) for pid, kind in re.findall(r"process (\d+): (\S+) message, start-up", log.read_text())]


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The node's process and all below it, which later may have lost their parent."""
    above = psutil.Process(process.pid)
    return [above, *above.children(recursive=True)]


def role(process: psutil.Process) -> str:
    words = process.cmdline()
    return next((name for name in ("supernode", "executor") if name in words), "node")


def until(ready: Callable[[], bool], what: object = "") -> None:
    deadline = time.monotonic() + PATIENCE
    while not ready():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


# Training


WORDS = ("train.workers=2", "train.rounds=1", "eval.every=0", "eval.max_windows=4", "eval.tickets=2")
LLAMA = ("model.architecture=llama", "model.n_head=8", "model.n_kv_head=4")
"""Blocks are KV groups of two heads."""


@dataclass(frozen=True)
class Trained:
    """A round on a warm node and one of Flower's own, which still run; each has text and caches of its own."""

    folder: RunFolder
    network: Network
    said: str
    texts: Path
    caches: Path


@pytest.fixture(scope="module")
def trained(tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """As on two machines: tensors go inline, and nobody finds in a cache what another has read.

    Flower's own node gets its path in the node config; it starts a process for each message, which takes most of the
    time. Ours get it by --data.
    """
    home = tmp_path_factory.mktemp("warm")
    folder, texts, caches = RunFolder(home / "run"), home / "texts", home / "caches"
    for place, num_words in enumerate((400, 900)):
        (texts / str(place)).mkdir(parents=True)
        write_text(texts / str(place) / "a.txt", num_words, seed=30 + place)

    def node_with_text(address: str, node_config: str) -> list[str]:
        place = node_config.partition("=")[2][0]
        own_cache = ["env", f"TWIST_FL_CACHE={caches / place}"]
        if place == "1":
            return [*own_cache, *stock_node(address, f"{node_config} data='{texts / place}'")]
        return [*own_cache, *warm_node(address, node_config), "--data", str(texts / place)]

    words = (*tiny, *WORDS, *LLAMA, "data.private=nodes", "flower.transport=inline")
    with network(home / "flower", 2, node_with_text) as running:
        settings = {"preset": "demo", "overrides": " ".join(words), "run-dir": str(folder.path)}
        said = running.run(settings, PATIENCE)
        logs = "".join([said, *(running.node_log(place).read_text() for place in range(2))])
        assert [event["event"] for event in folder.events()][-1:] == ["done"], logs
        yield Trained(folder, running, said, texts, caches)


def test_nodes_train_as_one_process_that_has_all_texts(trained: Trained, tiny: tuple[str, ...], tmp_path: Path) -> None:
    rounds, (nodes,) = trained.folder.events("round"), trained.folder.events("nodes")
    assert [(event["answered"], event["dropped"]) for event in rounds] == [([0, 1], {})]
    assert all(event["bytes_via"]["inline"] and not event["bytes_via"]["shm"] for event in rounds)
    assert (nodes["nodes"], nodes["shared_memory"], nodes["failed"]) == (2, 0, [])
    assert nodes["windows"]["0"] < nodes["windows"]["1"]
    assert [len(list((trained.caches / place / "tokens").iterdir())) for place in "01"] == [1, 1]
    same = make_job(load_config("demo", [*tiny, *WORDS, *LLAMA, f"data.private={trained.texts}"]))
    ended = trained.folder.load()
    assert ended is not None
    assert_same_run(ended, run(same, start(same), tmp_path))


def test_flwr_run_says_how_it_goes(trained: Trained) -> None:
    line = r"^round 1 of 1  loss [\d.]+  sent [\d.]+ [kM]B, received [\d.]+ [kM]B  [\d.]+ s$"
    assert re.search(line, trained.said, re.M), trained.said
    assert re.search(r"^perplexity: full model [\d.,]+; random tickets, mean: 2/4 [\d.,]+$", trained.said, re.M)
    assert f"finished; results in {trained.folder.results_file}" in trained.said


def test_one_process_answers_every_message(trained: Trained) -> None:
    served = served_by(trained.network.node_log(0))
    assert list(dict.fromkeys(kind for _, kind in served)) == ["query", "train"], "the first may be asked again"
    assert len({pid for pid, _ in served}) == 1


def test_a_task_is_given_to_nobody_without_the_secret(trained: Trained) -> None:
    from twist_fl.federation.executor import TaskSource

    running = trained.network
    child = next(process for process in family(running.nodes[0]) if role(process) == "supernode")
    listening = [found.laddr for found in child.net_connections("tcp") if found.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening] == ["127.0.0.1"]
    source = TaskSource(f"127.0.0.1:{listening[0].port}", b"guessed")
    try:
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            source.acquire()
    finally:
        source.close()


def test_a_node_whose_supernode_dies_ends_and_says_so(trained: Trained) -> None:
    running = trained.network
    everyone = family(running.nodes[0])
    assert sorted(map(role, everyone)) == ["executor", "node", "supernode"]
    next(process for process in everyone if role(process) == "supernode").kill()
    assert running.nodes[0].wait(PATIENCE) == 1
    assert "the SuperNode ended with status -9" in running.node_log(0).read_text()
    assert psutil.wait_procs(everyone, timeout=PATIENCE)[1] == []


def test_a_killed_node_takes_its_processes_with_it(trained: Trained) -> None:
    """One that has been started anew, in place of the one before."""
    running = trained.network
    running.start_node(0)
    until(lambda: len(family(running.nodes[0])) > 1)
    everyone = family(running.nodes[0])
    assert {role(process) for process in everyone} >= {"node", "supernode"}
    running.nodes[0].kill()
    running.nodes[0].wait()
    assert psutil.wait_procs(everyone, timeout=PATIENCE)[1] == []


# An app of its own: what a node does with errors and bundles

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "probe"
version = "1.0.0"
description = ""
license = "Apache-2.0"
dependencies = ["flwr"]
[tool.flwr.app]
publisher = "twist-fl"
fab-include = ["*.py"]
[tool.flwr.app.components]
serverapp = "probe_server:app"
clientapp = "probe_client:app"
"""

PROBE_SERVER = """
import json, time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

def ask(grid, word):
    content = RecordDict({"ask": ConfigRecord({"word": word})})
    (reply,) = grid.send_and_receive([Message(content, dst_node_id=list(grid.get_node_ids())[0], message_type="query")])
    return reply.error.reason if reply.has_error() else dict(reply.content["answer"])

@app.main()
def main(grid, context):
    while not list(grid.get_node_ids()):
        time.sleep(0.1)
    answers = [ask(grid, word) for word in WORDS]
    Path(RESULT).write_text(json.dumps(answers))
"""

PROBE_CLIENT = """
import os, sys
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
calls = 0

@app.query()
def query(message, context):
    global calls
    calls += 1
    word = message.content["ask"]["word"]
    if word == "raise":
        raise ValueError("no such word")
    if word == "die":
        os._exit(3)
    ours = [name for name in sys.modules if name.partition(".")[0] in ("twist_fl", "torch")]
    answer = {"pid": os.getpid(), "calls": calls, "bundle": BUNDLE, "ours": ours, "top": "wire" in sys.modules}
    return Message(RecordDict({"answer": ConfigRecord(answer)}), reply_to=message)
"""


def probe(folder: Path, bundle: str, words: list[str]) -> Path:
    """A Flower app whose server sends `words` one after another and writes the answers to result.json."""
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PYPROJECT)
    server = f"WORDS, RESULT = {words!r}, {str(folder / 'result.json')!r}\n{PROBE_SERVER}"
    (folder / "probe_server.py").write_text(server)
    (folder / "probe_client.py").write_text(f"BUNDLE = {bundle!r}\n{PROBE_CLIENT}")
    return folder


def ask(running: Network, folder: Path) -> list[dict[str, object] | str]:
    output = running.run({}, PATIENCE, folder)
    assert (folder / "result.json").is_file(), output + running.node_log(0).read_text()
    answers: list[dict[str, object] | str] = json.loads((folder / "result.json").read_text())
    return answers


def test_errors_bundles_another_superlink_and_interruption(tmp_path: Path) -> None:
    """One network for all: a start costs seconds."""
    with network(tmp_path / "flower", 1, warm_node) as running:
        # A message that raises is answered as Flower's executor would, and the process goes on.
        first, error, third = ask(running, probe(tmp_path / "one", "one", ["ok", "raise", "ok"]))
        assert error == "<class 'ValueError'>:<'no such word'>"
        assert isinstance(first, dict) and isinstance(third, dict)
        assert (first["calls"], third["calls"]) == (1, 3)
        assert first["pid"] == third["pid"]
        # The app's process holds the bundle's modules and none of ours.
        assert first["ours"] == [] and not first["top"]

        # The same bundle in a new run is still loaded; another bundle gets a process of its own.
        (again,) = ask(running, probe(tmp_path / "two", "two", ["ok"]))
        assert isinstance(again, dict)
        assert (again["bundle"], again["calls"]) == ("two", 1)
        assert again["pid"] != first["pid"]
        assert not psutil.pid_exists(int(str(first["pid"])))

        # A SuperLink that is started anew knows the node no more: it joins again.
        running.link.kill()
        running.link.wait()
        running.start_link()
        (joined,) = ask(running, probe(tmp_path / "three", "three", ["ok"]))
        assert isinstance(joined, dict)
        assert joined["calls"] == 1
        assert "does not know this node: joining again" in running.node_log(0).read_text()

        # Ctrl-C.
        everyone = family(running.nodes[0])
        assert sorted(map(role, everyone)) == ["executor", "node", "supernode"]
        running.nodes[0].send_signal(signal.SIGINT)
        assert running.nodes[0].wait(PATIENCE) == 130
        assert psutil.wait_procs(everyone, timeout=PATIENCE)[1] == []
        assert "Traceback" not in running.node_log(0).read_text().rpartition("joining again")[2]


# Before anything starts


def test_another_flower_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "version", lambda package: "1.43.0")
    with pytest.raises(ConfigError, match=r"installed is 1\.43\.0: install 'flwr==1\.42\.\*'"):
        node.run_node(["--insecure"])


def test_a_supernode_that_cannot_start_ends_the_node(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LaunchError, match="the SuperNode ended with status 1; its own words are above"):
        node.run_node(["--superlink", "127.0.0.1:1", "--root-certificates", "no/such/file"])
    assert "does not point to a file" in capfd.readouterr().err


def test_a_supernode_that_is_refused_ends_the_node_with_plain_words(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "node0"
    key.write_text("no key")
    with pytest.raises(LaunchError, match=rf"^--auth-supernode-private-key {key} is not the private key of a node: "):
        node.run_node(["--superlink", "127.0.0.1:1", "--auth-supernode-private-key", str(key)])
    assert "Exit Code: 302" in capfd.readouterr().err  # Flower's own words stand above


@pytest.mark.parametrize(("seconds", "ends"), [(60, KeyboardInterrupt), (-1, LaunchError)])
def test_a_node_that_was_forgotten_waits_for_its_key_to_be_let_in(
    seconds: float, ends: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = iter([node.ForgottenError("forgotten"), LaunchError("not let in"), KeyboardInterrupt()])

    def end(arguments: list[str]) -> None:
        raise next(errors)

    monkeypatch.setattr(node, "_run_supernode", end)
    monkeypatch.setattr(node, "_LET_IN_SECONDS", seconds)
    with pytest.raises(ends):
        node.run_node([])


def test_the_options_are_flowers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    for file in ("ca.crt", "key", "keys.yaml"):
        Path(file).touch()
    monkeypatch.setattr(node, "run_node", given.append)
    secure = ["--superlink", "host:8000", "--root-certificates", "ca.crt", "--auth-supernode-private-key", "key"]
    secure += ["--node-config", "partition-id=0 num-partitions=2", "--trusted-entities", "keys.yaml"]
    for words in (secure, ["--insecure", "--superlink", "host:8000"]):
        assert CliRunner().invoke(app, ["node", *words], catch_exceptions=False).exit_code == 0
    assert given == [secure, ["--insecure", "--superlink", "host:8000"]]


def test_a_process_that_waits_for_a_lock_ends_with_its_parent() -> None:
    """As one does that pulls a message of a SuperNode which was killed."""
    waiting = (
        "import os, threading; from twist_fl.federation.executor import end_with\n"
        "end_with(os.getppid()); print(os.getpid(), flush=True); threading.Event().wait()"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {waiting!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        process.kill()
    assert psutil.wait_procs([child], timeout=60)[1] == []


def test_the_executor_ends_with_its_line() -> None:
    """Nobody to serve: no SuperNode, no parent's word."""
    with node.Executor("hash", "127.0.0.1:1") as executor:
        assert executor.alive
        os.kill(executor._process.pid, signal.SIGTERM)
        until(lambda: not executor.alive)
        executor.serve("token", lambda: True)
        assert not executor.alive

"""`twist-fl node` on a real SuperLink: the same weights, one process for all messages, nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import chaos
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
from twist_fl.runs.events import EventLog
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


@pytest.fixture(scope="module")
def trained(tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunFolder, Network]]:
    """Five rounds on two nodes, which still run; after the first the server is killed, after the third its disk is
    full, and the run is begun again."""
    home = tmp_path_factory.mktemp("warm")
    folder, record = RunFolder(home / "run"), EventLog(home / "record.jsonl")
    words = (*tiny, "train.workers=2", "train.rounds=5", "eval.every=0", "eval.max_windows=4", "eval.tickets=2")
    words = (*words, "train.optimizer_state=client", "checkpoint_every=1")
    with network(home / "flower", 2, warm_node) as running:
        settings = {"preset": "demo", "overrides": " ".join(words), "run-dir": str(folder.path)}
        hurt = chaos.Run(running, folder, settings, record)
        try:
            chaos.torment(running, hurt, record, {1: "server killed", 3: "disk full"}.get, seconds=PATIENCE)
        finally:
            hurt.stop()
        logs = running.run_log.read_text() + running.node_log(0).read_text() + running.node_log(1).read_text()
        assert [event["event"] for event in folder.events()][-1:] == ["done"], logs
        assert [event["why"] for event in record.events("end")] == ["server killed", "disk full"]
        assert all(event.get("processes", 9) > 4 for event in record.events("sample"))
        yield folder, running


def test_warm_nodes_train_as_rounds_run_whatever_ends_the_server(
    trained: tuple[RunFolder, Network], tmp_path: Path
) -> None:
    folder, _ = trained
    answered = [(event["round"], event["answered"]) for event in folder.events("round")]
    assert answered == [(round_, [0, 1]) for round_ in range(1, 6)]
    for nodes in folder.events("nodes"):
        assert (nodes["nodes"], nodes["shared_memory"], nodes["failed"]) == (2, 2, [])
    assert all(event["bytes_via"]["shm"] and not event["bytes_via"]["inline"] for event in folder.events("round"))
    job, ended = folder.job(), folder.load()
    assert ended is not None
    assert_same_run(ended, run(job, start(job), tmp_path))


def test_one_process_per_node_answers_every_round(trained: tuple[RunFolder, Network]) -> None:
    """Of three servers."""
    _, running = trained
    served = [served_by(running.node_log(i)) for i in range(2)]
    for each in served:
        kinds = [kind for _, kind in each]
        assert (kinds[0], kinds.count("query")) == ("query", 3)
        assert 5 <= kinds.count("train") <= 8  # those of rounds that were not saved are trained again
    pids = [{pid for pid, _ in each} for each in served]
    assert [len(found) for found in pids] == [1, 1]
    assert pids[0] != pids[1]


def test_a_task_is_given_to_nobody_without_the_secret(trained: tuple[RunFolder, Network]) -> None:
    from twist_fl.federation.executor import TaskSource

    _, running = trained
    child = next(process for process in family(running.nodes[0]) if role(process) == "supernode")
    listening = [found.laddr for found in child.net_connections("tcp") if found.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening] == ["127.0.0.1"]
    source = TaskSource(f"127.0.0.1:{listening[0].port}", b"guessed")
    try:
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            source.acquire()
    finally:
        source.close()


def test_a_node_whose_supernode_dies_ends_and_says_so(trained: tuple[RunFolder, Network]) -> None:
    _, running = trained
    everyone = family(running.nodes[0])
    assert sorted(map(role, everyone)) == ["executor", "node", "supernode"]
    next(process for process in everyone if role(process) == "supernode").kill()
    assert running.nodes[0].wait(PATIENCE) == 1
    assert "the SuperNode ended with status -9" in running.node_log(0).read_text()
    assert psutil.wait_procs(everyone, timeout=PATIENCE)[1] == []


def test_a_killed_node_takes_its_processes_with_it(trained: tuple[RunFolder, Network]) -> None:
    _, running = trained
    everyone = family(running.nodes[1])
    assert sorted(map(role, everyone)) == ["executor", "node", "supernode"]
    running.nodes[1].kill()
    running.nodes[1].wait()
    assert psutil.wait_procs(everyone, timeout=PATIENCE)[1] == []


# Text of their own


def test_nodes_with_text_of_their_own_train_as_one_process_that_has_both(tiny: tuple[str, ...], tmp_path: Path) -> None:
    """A warm node with --data, and Flower's own with the path in its node config; as on machines of their own, neither
    finds in a cache what the other or the server has read, and tensors go inline. Of another architecture: blocks are
    KV groups of two heads. Flower's own node starts a process for each message, which takes most of the time."""
    for place, num_words in enumerate((400, 900)):
        (tmp_path / "texts" / str(place)).mkdir(parents=True)
        write_text(tmp_path / "texts" / str(place) / "a.txt", num_words, seed=30 + place)
    folder = RunFolder(tmp_path / "run")
    words = [*tiny, "train.workers=2", "train.rounds=1", "eval.every=0", "eval.max_windows=4", "eval.tickets=2"]
    words += ["model.architecture=llama", "model.n_head=8", "model.n_kv_head=4"]

    def node_with_text(address: str, node_config: str) -> list[str]:
        place = node_config.partition("=")[2][0]
        path, own_cache = tmp_path / "texts" / place, ["env", f"TWIST_FL_CACHE={tmp_path / 'caches' / place}"]
        if place == "0":
            return [*own_cache, *warm_node(address, node_config), "--data", str(path)]
        return [*own_cache, *stock_node(address, f"{node_config} data='{path}'")]

    with network(tmp_path / "flower", 2, node_with_text) as running:
        overrides = " ".join([*words, "data.private=nodes", "flower.transport=inline"])
        output = running.run({"preset": "demo", "overrides": overrides, "run-dir": str(folder.path)}, PATIENCE)
        logs = output + running.node_log(0).read_text() + running.node_log(1).read_text()
        assert [event["event"] for event in folder.events()][-1:] == ["done"], logs
    said = re.search(r"^round 1 of 1  loss [\d.]+  sent [\d.]+ MB, received [\d.]+ MB  [\d.]+ s$", output, re.M)
    assert said, output
    assert re.search(r"^perplexity: full model [\d.,]+; random tickets, mean: 2/4 [\d.,]+$", output, re.M), output
    assert f"finished; results in {folder.results_file}" in output
    (event,), (nodes,) = folder.events("round"), folder.events("nodes")
    assert (event["answered"], event["dropped"]) == ([0, 1], {})
    assert event["bytes_via"]["inline"] and not event["bytes_via"]["shm"]
    assert nodes["windows"]["0"] < nodes["windows"]["1"]
    assert [len(list((tmp_path / "caches" / place / "tokens").iterdir())) for place in "01"] == [1, 1]
    same = make_job(load_config("demo", [*words, f"data.private={tmp_path / 'texts'}"]))
    ended = folder.load()
    assert ended is not None
    assert_same_run(ended, run(same, start(same), tmp_path / "moments"))


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


def test_the_executor_ends_with_its_line() -> None:
    """Nobody to serve: no SuperNode, no parent's word."""
    with node.Executor("hash", "127.0.0.1:1") as executor:
        assert executor.alive
        os.kill(executor._process.pid, signal.SIGTERM)
        until(lambda: not executor.alive)
        executor.serve("token", lambda: True)
        assert not executor.alive

"""`twist-fl federation up`: a SuperLink with TLS and node keys, and some of its nodes, on this machine."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from ipaddress import ip_address
from pathlib import Path
from shlex import quote

from twist_fl.federation.federation_folder import LOOPBACK, Federation, joined
from twist_fl.federation.flower_commands import answers, flower_environment
from twist_fl.federation.simulation import CONNECTION, stage_app, start, wait_until_healthy, write_connection
from twist_fl.system.children import clear_stale, flower_home, stop_tree
from twist_fl.system.errors import ConfigError, LaunchError
from twist_fl.system.files import write_json
from twist_fl.system.locks import holder, locked

_LOOK_SECONDS = 0.2
_JOINED = re.compile(r"SuperNode ID: \d+")
_ENDED = re.compile(r"^error: (.*)$", re.MULTILINE)


def reached_at(listen: str) -> str:
    """Where the SuperLink is reached from this machine."""
    try:
        return LOOPBACK[1] if ip_address(listen).is_unspecified else listen
    except ValueError:
        return listen


def check_up(federation: Federation, listen: str, num_nodes: int) -> None:
    """Raises ConfigError if it cannot start."""
    here = reached_at(listen)
    if here not in (known := [*federation.hosts, *LOOPBACK]):
        raise ConfigError(
            f"--listen {listen}: the server's certificate is for {', '.join(known)} only: make one for it, too, with "
            f"twist-fl federation init --host {listen}, or listen on 0.0.0.0, all addresses"
        )
    if num_nodes > len(federation.nodes):
        raise ConfigError(
            f"--nodes {num_nodes}: the federation has {len(federation.nodes)}, {', '.join(federation.nodes)}"
        )
    for name in federation.nodes[:num_nodes]:
        if not (key := federation.node(name) / "key").is_file():
            raise ConfigError(
                f"--nodes {num_nodes} starts node {name} here, whose key is not ({key}): give --nodes "
                f"{federation.nodes.index(name)}, or bring the key back"
            )
    with socket.socket(socket.AF_INET6 if ":" in here else socket.AF_INET) as probe:
        if probe.connect_ex((here, federation.port)) == 0:
            raise ConfigError(
                f"something listens on {joined(here, federation.port)} already: end it, or make a federation with "
                "another --port"
            )


def up(federation: Federation, listen: str, num_nodes: int, say: Callable[[str], None]) -> None:
    """Run until Ctrl-C, or until the SuperLink ends by itself, which is a LaunchError. Nothing is left running.

    All nodes' public keys are let in; the first `num_nodes` nodes are started here. Each process has its log in
    FOLDER/logs. Raises ConfigError where it cannot start.
    """
    lock = federation.folder / ".up.lock"
    try:
        with locked(lock):
            check_up(federation, listen, num_nodes)
            clear_stale(federation.folder)
            _run(federation, listen, num_nodes, say)
    except BlockingIOError:
        raise ConfigError(f"{federation.folder} is up already{holder(lock)}: end it with Ctrl-C there first") from None


def _run(federation: Federation, listen: str, num_nodes: int, say: Callable[[str], None]) -> None:
    address = joined(reached_at(listen), federation.port)
    logs, link_log = federation.folder / "logs", federation.folder / "logs" / "superlink.log"
    logs.mkdir(exist_ok=True)
    federation.flwr_home.mkdir(exist_ok=True)
    write_connection(federation.flwr_home, address, federation.ca)
    shutil.rmtree(federation.flwr_home / "app", ignore_errors=True)
    stage_app(federation.flwr_home / "app")
    processes: dict[str, subprocess.Popen[bytes]] = {}
    with flower_home(federation.folder) as home:
        try:
            environment = flower_environment(home)
            link = processes["the SuperLink"] = start(_superlink(federation, listen), environment, link_log)
            wait_until_healthy(address, link, link_log, federation.ca)
            say(f"SuperLink: https://{address}, listening on {listen}; its log: {link_log}")
            register(federation)
            say(f"let in: {', '.join(federation.nodes)}")
            for name in federation.nodes[:num_nodes]:
                log = logs / f"node-{name}.log"
                log.unlink(missing_ok=True)
                processes[name] = start(_node(federation, name, address), environment, log)
                say(f"node {name}: started, its log: {log}")
            say(next_step(federation, num_nodes))
            _watch(processes, logs, say)
        finally:
            for process in processes.values():
                stop_tree(process)


def next_step(federation: Federation, num_nodes: int) -> str:
    """The lines to paste in another terminal."""
    workers = num_nodes or len(federation.nodes)
    home, folder = quote(str(federation.flwr_home)), federation.runs / "first"
    return (
        "In another terminal, a first run:\n"
        f"  FLWR_HOME={home} flwr run {quote(str(federation.flwr_home / 'app'))} {CONNECTION} --stream --run-config "
        + quote(f'preset="demo" overrides="train.workers={workers}" run-dir="{folder}"')
        + f"\nand how it stands:\n  twist-fl federation status {quote(str(federation.folder))} -f\n"
        "Ctrl-C here ends all."
    )


def _superlink(federation: Federation, listen: str) -> list[str]:
    folder = federation.folder
    words = ["flower-superlink", "--host", listen, "--port", str(federation.port), "--enable-supernode-auth"]
    words += ["--ssl-ca-certfile", str(federation.ca), "--ssl-certfile", str(folder / "server.crt")]
    return [*words, "--ssl-keyfile", str(folder / "server.key")]


def _node(federation: Federation, name: str, address: str) -> list[str]:
    words = ["-m", "twist_fl", "node", "--superlink", address, "--root-certificates", str(federation.ca)]
    words += ["--auth-supernode-private-key", str(federation.node(name) / "key")]
    return [sys.executable, *words, "--node-config", federation.node_config(name)]


def register(federation: Federation) -> None:
    """Let in every node, by its public key; FLWR_HOME/nodes.json then says which of Flower's ids is which name."""
    keys = [str(federation.node(name) / "key.pub") for name in federation.nodes]
    words = [["supernode", "register", key, "--name", name] for key, name in zip(keys, federation.nodes, strict=True)]
    found = answers(words, federation.flwr_home)
    ids = {str(answer["node-id"]): name for answer, name in zip(found, federation.nodes, strict=True)}
    write_json(ids, federation.flwr_home / "nodes.json")


def _watch(processes: Mapping[str, subprocess.Popen[bytes]], logs: Path, say: Callable[[str], None]) -> None:
    """Says who has joined and who has ended. Raises LaunchError when the SuperLink ends."""
    link, *nodes = processes
    waiting, running = set(nodes), set(nodes)
    while processes[link].poll() is None:
        for name in nodes:
            log = logs / f"node-{name}.log"
            if name in waiting and _JOINED.search(log.read_text(errors="replace")):
                waiting.remove(name)
                say(f"node {name}: online")
            if name in running and processes[name].poll() is not None:
                running.remove(name)
                reason = _ENDED.findall(log.read_text(errors="replace"))
                say(f"node {name}: ended, {reason[-1] if reason else 'see its log'}")
        time.sleep(_LOOK_SECONDS)
    raise LaunchError(f"{link} ended with status {processes[link].returncode}: see {logs / 'superlink.log'}")

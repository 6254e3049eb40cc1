"""`twist-fl federation status`: what a SuperLink knows of its nodes and runs, as Flower's own commands say it."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from twist_fl.config.finding import runs_in
from twist_fl.config.hub import expanded
from twist_fl.federation.federation_folder import opened
from twist_fl.federation.flower_commands import answers
from twist_fl.federation.joining import check_address
from twist_fl.federation.simulation import CONNECTION, write_connection
from twist_fl.runs.status import Look
from twist_fl.system.errors import ConfigError, LaunchError
from twist_fl.system.files import read_json
from twist_fl.system.units import duration_text, human_bytes
from twist_fl.system.untrusted import plain


@dataclass(frozen=True)
class Target:
    """How to reach a SuperLink; its nodes' names by their ids, and the folder of its runs, where they are here."""

    address: str
    ca: Path | None
    names: Mapping[str, str]
    runs: Path | None


def target(what: str, root_certificates: Path | None, insecure: bool) -> Target:
    """A federation's folder, or HOST:PORT with its CA certificate or without TLS. Raises ConfigError."""
    folder = expanded(what)
    if not folder.is_dir() and ":" in what:
        check_address(what)
        if insecure == (root_certificates is not None):
            raise ConfigError(f"{what}: give --root-certificates ca.crt, or --insecure where the SuperLink has no TLS")
        if root_certificates is not None and not expanded(root_certificates).is_file():
            raise ConfigError(f"--root-certificates {root_certificates} does not exist: give the federation's ca.crt")
        return Target(what, root_certificates and expanded(root_certificates), {}, None)
    if insecure or root_certificates is not None:
        raise ConfigError(f"--root-certificates and --insecure are for HOST:PORT: the folder {what} says both itself")
    federation = opened(folder)
    home = federation.flwr_home
    if not (home / "nodes.json").is_file():
        raise ConfigError(f"{what} has not been up: start it with twist-fl federation up {what}")
    address = tomllib.loads((home / "config.toml").read_text())["superlink"][CONNECTION]["address"]
    return Target(address, federation.ca, read_json(home / "nodes.json", dict), federation.runs)


def described(there: Target) -> Iterator[str]:
    """A line for the SuperLink, each node, each run, and each run's folder. Raises LaunchError if none answers."""
    with TemporaryDirectory(prefix="twist-fl-") as home:
        write_connection(Path(home), there.address, there.ca)
        try:
            nodes, runs = answers([["supernode", "list"], ["list"]], Path(home))
        except LaunchError as error:
            raise LaunchError(f"no answer from a SuperLink at {there.address}: is it up? {error}") from error
    found = [node for node in nodes["nodes"] if node["status"] not in ("unregistered", "deleted")]
    online = sum(node["status"] == "online" for node in found)
    yield f"SuperLink {there.address}: {online} of {len(found)} nodes online"
    names = {node["node-id"]: there.names.get(node["node-id"], node["node-id"]) for node in found}
    width = max(map(len, names.values()), default=0)
    for node in sorted(found, key=lambda node: names[node["node-id"]]):
        yield f"  node {names[node['node-id']]:<{width}}  {_standing(node)}"
    yield from (_run(run) for run in runs["runs"])
    for folder in runs_in(there.runs) if there.runs else []:
        look = Look(folder)
        look.again()
        yield look.line()


def _standing(node: Mapping[str, Any]) -> str:
    match node["status"]:
        case "online":
            return f"online for {duration_text(node['online-elapsed'])}"
        case "offline":
            return f"offline since {plain(node['offline-at'])}"
        case "registered":
            return "let in, has not joined yet"
        case other:
            return plain(str(other))


def _run(run: Mapping[str, Any]) -> str:
    """In Flower's words. Its bytes pass the SuperLink: those that go by shared memory are in the run's folder."""
    traffic = run["network-traffic"]
    moved = f"{human_bytes(traffic['inbound-bytes'])} in, {human_bytes(traffic['outbound-bytes'])} out"
    detail = f" ({plain(run['status-details'])})" if run["status-details"] not in ("", "N/A") else ""
    return f"  run {run['run-id']}  {plain(run['status'])}{detail}, {duration_text(run['elapsed'])}, {moved}"

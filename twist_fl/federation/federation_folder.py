"""The folder of a federation: its keys and certificates, and what starts its machines. Made once, by `init`."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from twist_fl.config.hub import beside, expanded
from twist_fl.federation.authority import Authority, node_key
from twist_fl.federation.service_files import node_files, server_files
from twist_fl.system.errors import ConfigError
from twist_fl.system.files import read_json, write_json, write_text

LOOPBACK = ("localhost", "127.0.0.1")
_ABOUT = "federation.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252})|[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*")


@dataclass(frozen=True)
class Federation:
    """What `init` was told. Nodes in the order of their partition ids."""

    folder: Path
    hosts: tuple[str, ...]
    port: int
    nodes: tuple[str, ...]

    @property
    def ca(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def flwr_home(self) -> Path:
        """FLWR_HOME for `flwr run` and `flwr ls`: its config.toml names the SuperLink that runs."""
        return self.folder / "flwr"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def node(self, name: str) -> Path:
        return self.folder / "nodes" / name

    def node_config(self, name: str) -> str:
        return f"partition-id={self.nodes.index(name)} num-partitions={len(self.nodes)}"


def joined(host: str, port: int) -> str:
    """HOST:PORT, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def create(folder: Path, hosts: Sequence[str], nodes: Sequence[str], port: int, force: bool = False) -> Federation:
    """Keys, certificates and service files for named hosts and nodes.

    The certificate is for localhost, too. Private keys can be read by their owner only. Raises ConfigError for a
    host or a name that cannot be, and where something is in the folder, unless `force`: then all is made anew, and
    runs in it stay.
    """
    folder = expanded(folder).absolute()
    for host in hosts:
        _check_host(host)
    for name in nodes:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"--node {name!r} becomes the name of a folder: letters, digits, - and _ only")
        if list(nodes).count(name) > 1:
            raise ConfigError(f"--node {name} is given twice: each node has a key of its own")
    if folder.exists() and any(folder.iterdir()) and not force:
        what = "holds keys already" if (folder / _ABOUT).is_file() else "is not empty"
        raise ConfigError(f"{folder} {what}: give another folder, or --force to make all keys in it anew")
    made = Federation(folder, tuple(hosts), port, tuple(nodes))
    (folder / _ABOUT).unlink(missing_ok=True)  # written last: with it, all is there
    shutil.rmtree(folder / "nodes", ignore_errors=True)
    _make_keys(made)
    for name, text in server_files(made.folder, joined(hosts[0], port)).items():
        write_text(text, folder / name)
    write_json({"hosts": hosts, "port": port, "nodes": nodes}, folder / _ABOUT)
    return made


def _check_host(host: str) -> None:
    if not _HOST.fullmatch(host):
        raise ConfigError(
            f"--host {host!r} is no host: give the name or the IP address alone under which nodes reach the server, "
            "for example lab.example.org or 10.0.0.5; its port is --port"
        )


def _make_keys(made: Federation) -> None:
    authority = Authority(f"{made.folder.name} CA"[:64])
    certificate, key = authority.server(list(dict.fromkeys([*made.hosts, *LOOPBACK])))
    _write(authority.certificate, made.ca)
    _write(authority.key, made.folder / "ca.key", private=True)
    _write(certificate, made.folder / "server.crt")
    _write(key, made.folder / "server.key", private=True)
    for name in made.nodes:
        private, public = node_key(name)
        _write(private, made.node(name) / "key", private=True)
        _write(public, made.node(name) / "key.pub")
        _write(authority.certificate, made.node(name) / "ca.crt")
        for file, text in node_files(joined(made.hosts[0], made.port), made.node_config(name)).items():
            write_text(text, made.node(name) / file)


def _write(data: bytes, path: Path, private: bool = False) -> None:
    """Whole or absent; what is private was never anybody else's to read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    making = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(making, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644), "wb") as file:
        file.write(data)
    making.replace(path)


def opened(folder: Path) -> Federation:
    """What `create` made there. Raises ConfigError if it did not."""
    folder = expanded(folder).absolute()
    if not (folder / _ABOUT).is_file():
        raise ConfigError(
            f"{folder} holds no federation (no {_ABOUT}){'' if folder.exists() else beside(folder)}: make one with "
            "twist-fl federation init FOLDER --host NAME --node NAME"
        )
    about = read_json(folder / _ABOUT, dict)
    return Federation(folder, tuple(about["hosts"]), about["port"], tuple(about["nodes"]))

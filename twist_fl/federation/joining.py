"""What `twist-fl node` is given, checked before Flower's SuperNode starts: its own words would come after its log."""

from __future__ import annotations

import glob
import re
import tomllib
from pathlib import Path

from twist_fl.config.checks import shown
from twist_fl.config.hub import beside, expanded
from twist_fl.system.errors import ConfigError

DEFAULT_PORT = 8000
"""Of flower-superlink's HTTP API in Flower 1.41, which nodes talk to."""
_PAIR = re.compile(r"(\S+?)=('[^']*'|\"[^\"]*\"|\S+)")


def node_arguments(
    superlink: str,
    insecure: bool,
    root_certificates: Path | None,
    auth_supernode_private_key: Path | None,
    node_config: str,
    trusted_entities: Path | None,
    data: str | None = None,
) -> list[str]:
    """The options of `flower-supernode`. Raises ConfigError for an address, a file or a pair that cannot be."""
    check_address(superlink)
    files = {
        "--root-certificates": root_certificates,
        "--auth-supernode-private-key": auth_supernode_private_key,
        "--trusted-entities": trusted_entities,
    }
    for option, file in files.items():
        if file is not None and not expanded(file).is_file():
            state = (
                "is a folder: give the file" if expanded(file).is_dir() else f"does not exist{beside(expanded(file))}"
            )
            raise ConfigError(f"{option} {str(file)!r} {state}")
    if insecure and root_certificates:
        raise ConfigError("--insecure and --root-certificates exclude each other: with a certificate, leave --insecure")
    _check_pairs(node_config)
    if data is not None:
        node_config = _with_data(node_config, data)
    given = {
        "--superlink": superlink,
        "--root-certificates": root_certificates,
        "--auth-supernode-private-key": auth_supernode_private_key,
        "--node-config": node_config,
        "--trusted-entities": trusted_entities,
    }
    return ["--insecure"] * insecure + [word for pair in given.items() if pair[1] for word in map(str, pair)]


def _with_data(node_config: str, data: str) -> str:
    """The node's configuration with its own text, which the app finds there, in any working folder."""
    if node_config.endswith(".toml"):
        raise ConfigError(f"--data {data!r} and --node-config {node_config}: write data = {data!r} into that file")
    if any(key == "data" for key, _ in _PAIR.findall(node_config)):
        raise ConfigError(f"--data {data!r} and data in --node-config {shown(node_config)} are the same: give one")
    path = expanded(data).absolute()
    if not path.exists() and not (glob.has_magic(data) and glob.glob(str(path), recursive=True)):  # noqa: PTH207
        raise ConfigError(f"--data {data!r} does not exist{beside(path)}")
    if "'" in str(path):
        raise ConfigError(f"--data {data!r}: Flower's node config cannot hold the quote in it, rename it")
    return f"{node_config} data='{path}'".strip()


def check_address(superlink: str) -> None:
    """Raises ConfigError unless it is HOST:PORT, with the form that was meant."""
    bare = re.sub(r"^\w+://", "", superlink).rstrip("/")
    if bare.count(":") > 1 and not bare.startswith("["):
        raise ConfigError(f"--superlink {superlink}: an IPv6 address stands in brackets, as [::1]:{DEFAULT_PORT}")
    host, _, port = bare.rpartition(":") if re.search(r":[^\]]*$", bare) else (bare, "", "")
    possible = port.isdecimal() and 0 < int(port) < 2**16
    named = re.fullmatch(r"[\w.-]+|\[[\w:.%]+\]", host)
    meant = f"{host if named else 'localhost'}:{port if possible else DEFAULT_PORT}"
    if bare != superlink:
        raise ConfigError(f"--superlink {superlink} is a URL: give HOST:PORT alone, {meant}")
    if not port:
        raise ConfigError(
            f"--superlink {superlink} has no port: give HOST:PORT, for example {meant} ({DEFAULT_PORT} is "
            "flower-superlink's default, its --port another)"
        )
    if not named or not possible:
        raise ConfigError(f"--superlink {superlink} is not HOST:PORT with a port of 1 to 65535, for example {meant}")


def _check_pairs(node_config: str) -> None:
    if node_config.endswith(".toml"):
        if not expanded(node_config).is_file():
            raise ConfigError(f"--node-config {node_config!r} does not exist{beside(expanded(node_config))}")
        return
    left = _PAIR.sub("", node_config).strip()
    text = "\n".join(f"{key} = {value}" for key, value in _PAIR.findall(node_config))
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        left = left or text
    if left:
        raise ConfigError(
            f"--node-config {shown(node_config)} is not KEY=VALUE with numbers, true, false or quoted words, for "
            'example "partition-id=0 num-partitions=2"'
        )

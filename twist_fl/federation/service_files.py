"""What starts a federation's machines when they boot: units for systemd, and files for Docker Compose."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from shlex import join

UNIT, COMPOSE = "twist-fl-{}.service", "compose.yaml"
_KEYS = ("--root-certificates", "ca.crt", "--auth-supernode-private-key", "key")
_IMAGE = """\
    build:
      context: ${TWIST_FL:?the folder of twist_fl's source}
      dockerfile_inline: |
        FROM python:3.12-slim
        COPY . /twist_fl
        RUN pip install --no-cache-dir -r /twist_fl/requirements.lock && pip install --no-cache-dir --no-deps /twist_fl
"""


def server_files(folder: Path, address: str) -> dict[str, str]:
    """By name. The unit's paths are this machine's."""
    inside, port = "/federation", address.rpartition(":")[2]
    return {
        UNIT.format("server"): _unit("TwIST: the SuperLink", _up(str(folder)), str(folder).replace("%", "%%")),
        COMPOSE: f"""\
# On the server: TWIST_FL=/path/of/twist_fl docker compose up --build -d
services:
  server:
{_IMAGE}    command: {json.dumps(_up(inside))}
    volumes: [".:{inside}"]
    ports: ["{port}:{port}"]
    restart: unless-stopped
""",
    }


def _up(folder: str) -> list[str]:
    return ["twist-fl", "federation", "up", folder, "--nodes", "0", "--listen", "0.0.0.0"]


def node_files(address: str, node_config: str) -> dict[str, str]:
    """By name, for a folder with the node's key and ca.crt. The unit's paths are as on this machine, below ~."""
    node = ["twist-fl", "node", "--superlink", address, *_KEYS, "--node-config", node_config]
    return {
        UNIT.format("node"): _unit(f"TwIST: a node ({node_config})", node, "%h/twist-fl-node"),
        COMPOSE: f"""\
# On the node's machine, in this folder: TWIST_FL=/path/of/twist_fl docker compose up --build -d
services:
  node:
{_IMAGE}    command: {json.dumps(node)}
    working_dir: /node
    volumes: [".:/node:ro", "cache:/root/.cache"]
    restart: unless-stopped
volumes:
  cache:
""",
    }


def _unit(what: str, command: list[str], folder: str) -> str:
    """`folder` may begin with %h, systemd's name of the user's home."""
    program = str(Path(sys.executable).with_name(command[0]))
    line = join([program, *command[1:]]).replace("%", "%%")
    return f"""\
[Unit]
Description={what}

[Service]
WorkingDirectory={folder}
# Where twist-fl lies on the machine that made this file: change it if it lies elsewhere.
ExecStart={line}
Restart=on-failure
RestartSec=5
KillMode=mixed
SuccessExitStatus=130

[Install]
WantedBy=default.target
"""

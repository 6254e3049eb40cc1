"""What starts a federation's machines when they boot: units for systemd, and files for Docker Compose."""

from __future__ import annotations

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
    up = ["federation", "up", "{folder}", "--nodes", "0", "--listen", "0.0.0.0"]
    port = address.rpartition(":")[2]
    compose = [word.replace("{folder}", "/federation") for word in up]
    return {
        UNIT.format("server"): _unit(
            "TwIST: the SuperLink", [word.replace("{folder}", str(folder)) for word in up], folder
        ),
        COMPOSE: f"""\
# On the server: TWIST_FL=/path/of/twist_fl docker compose up --build -d
services:
  server:
{_IMAGE}    command: {_words(["twist-fl", *compose])}
    volumes: [".:/federation"]
    ports: ["{port}:{port}"]
    restart: unless-stopped
""",
    }


def node_files(address: str, node_config: str) -> dict[str, str]:
    """By name, for a folder with the node's key and ca.crt. The unit's paths are as on this machine, below ~."""
    node = ["node", "--superlink", address, *_KEYS, "--node-config", node_config]
    return {
        UNIT.format("node"): _unit(f"TwIST: a node ({node_config})", node, Path("%h/twist-fl-node")),
        COMPOSE: f"""\
# On the node's machine, in this folder: TWIST_FL=/path/of/twist_fl docker compose up --build -d
services:
  node:
{_IMAGE}    command: {_words(["twist-fl", *node])}
    working_dir: /node
    volumes: [".:/node:ro", "cache:/root/.cache"]
    restart: unless-stopped
volumes:
  cache:
""",
    }


def _unit(what: str, words: list[str], folder: Path) -> str:
    command = str(Path(sys.executable).with_name("twist-fl"))
    return f"""\
[Unit]
Description={what}

[Service]
WorkingDirectory={folder}
# Where twist-fl lies on the machine that made this file: change it if it lies elsewhere.
ExecStart={join([command, *words])}
Restart=on-failure
RestartSec=5
KillMode=mixed
SuccessExitStatus=130

[Install]
WantedBy=default.target
"""


def _words(words: list[str]) -> str:
    return "[" + ", ".join(f'"{word}"' for word in words) + "]"

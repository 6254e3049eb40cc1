"""Start a Flower simulation of our own, follow it, and leave nothing behind.

A private SuperLink on a free loopback port, with its state in memory and its FLWR_HOME inside the run's
folder, takes one `flwr run` and is stopped with all its children when the run ends, fails or is interrupted.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil

from twist_fl.checkpoint import RunFolder
from twist_fl.config import Config, conf_dir
from twist_fl.results import commit

_START_SECONDS = 60
_STOP_SECONDS = 3
_APP_FILES = ("*.py", "pyproject.toml", "conf/*.yaml", "twist_fl/**/*.py")
_CONNECTION = "twist-fl"


class LaunchError(RuntimeError):
    """Flower did not start, or the run did not finish; the message names the log to read."""


def app_dir() -> Path:
    """The folder that `flwr run` takes: the source tree, or its copy inside an installed wheel."""
    return conf_dir().parent


def stage_app(target: Path) -> Path:
    """The app's own files by themselves: `flwr run` resolves every file below the folder it takes, a .venv's too."""
    source = app_dir()
    for file in (found for pattern in _APP_FILES for found in source.glob(pattern)):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    return target


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def quiet_environment(home: Path) -> dict[str, str]:
    """Flower without its own installs, telemetry and update check, its state in `home`."""
    scripts = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": scripts + os.pathsep + os.environ.get("PATH", ""),
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_worker_niceness": "0",  # Ray's default, 15, starves the workers beside any other job
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        # Idle OpenMP threads sleep instead of spinning: server and workers share the cores.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "TWIST_FL_COMMIT": commit() or "",
    }


@contextmanager
def superlink(home: Path, log: Path) -> Iterator[dict[str, str]]:
    """A private simulation SuperLink; yields the environment in which `flwr` finds it as `twist-fl`."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    address = f"127.0.0.1:{free_port()}"
    (home / "config.toml").write_text(f'[superlink.{_CONNECTION}]\naddress = "{address}"\ninsecure = true\n')
    environment = quiet_environment(home)
    host, port = address.split(":")
    command = ["flower-superlink", "--insecure", "--simulation", "--host", host, "--port", port]
    with log.open("a") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        _wait_until_healthy(address, process, log)
        yield environment
    finally:
        stop_tree(process)
        shutil.rmtree(home, ignore_errors=True)


def _wait_until_healthy(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"http://{address}/health", timeout=1).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise LaunchError(f"Flower's SuperLink did not start within {_START_SECONDS} s: see {log}")


def stop_tree(process: subprocess.Popen[bytes]) -> None:
    """Stop `process` and every process below it: politely, then for good."""
    try:
        tree = psutil.Process(process.pid)
        processes = [*tree.children(recursive=True), tree]
    except psutil.NoSuchProcess:
        return
    for member in processes:
        with suppress(psutil.NoSuchProcess):
            member.terminate()
    _, alive = psutil.wait_procs(processes, timeout=_STOP_SECONDS)
    for member in alive:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def cpus_per_worker(config: Config) -> int:
    """CPU cores Flower reserves per simulated worker."""
    chosen = config.flower.cpus_per_worker
    return chosen or max(1, (os.cpu_count() or 1) // config.train.workers)


@contextmanager
def flower_run(
    folder: RunFolder, config: Config, num_nodes: int, run_config: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """`flwr run` of our app in a private simulation of `num_nodes` nodes; yields the running process.

    Its output goes to flower.log in the run's folder. Leaving the block stops everything.
    """
    log = folder.path / "flower.log"
    settings = folder.path / "flower.toml"
    pairs = {"run-dir": str(folder.path), **run_config}
    settings.write_text("".join(f"{key} = {_toml_string(value)}\n" for key, value in pairs.items()))
    resources = (
        f"num-supernodes={num_nodes} client-resources-num-cpus={cpus_per_worker(config)} "
        f"client-resources-num-gpus={config.flower.gpus_per_worker}"
    )
    with superlink(folder.path / "flower", log) as environment:
        command = ["flwr", "run", str(stage_app(folder.path / "flower" / "app")), _CONNECTION, "--stream"]
        command += ["--run-config", str(settings), "--federation-config", resources]
        with log.open("a") as output:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        try:
            yield process
        finally:
            stop_tree(process)


def _toml_string(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'

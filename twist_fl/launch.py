"""Start a Flower simulation of our own, follow it, and leave nothing behind.

A private SuperLink on a free loopback port, with its state in memory and its FLWR_HOME inside the run's
folder, takes one `flwr run` and is stopped with all its children when the run ends, fails or is interrupted.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil

from twist_fl.checkpoint import RunFolder
from twist_fl.checks import LaunchError
from twist_fl.config import Config, conf_dir
from twist_fl.machine import cpus_per_worker, usable_cores
from twist_fl.results import commit

_START_SECONDS = 60
_STOP_SECONDS = 3
CONNECTION = "twist-fl"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def stage_app(target: Path) -> Path:
    """The folder that `flwr run` takes, put together in `target` from the source tree or an installed wheel.

    The app's own files by themselves: `flwr run` resolves every file below the folder it takes, a .venv's too.
    """
    package, app = Path(__file__).resolve().parent, conf_dir().parent
    files = {app / name: name for name in ("server_app.py", "client_app.py", "pyproject.toml")}
    files |= {file: f"conf/{file.name}" for file in conf_dir().glob("*.yaml")}
    files |= {file: f"twist_fl/{file.relative_to(package)}" for file in package.rglob("*.py")}
    for file, name in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / name)
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
        "NO_PROXY": "127.0.0.1,localhost," + os.environ.get("NO_PROXY", ""),
        "no_proxy": "127.0.0.1,localhost," + os.environ.get("no_proxy", ""),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_worker_niceness": "0",  # Ray's default, 15, starves the workers beside any other job
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        # Idle OpenMP threads sleep instead of spinning: server and workers share the cores.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "TWIST_FL_COMMIT": commit() or "",
    }


def write_connection(home: Path, address: str) -> None:
    """Where `flwr` with FLWR_HOME=`home` finds the SuperLink CONNECTION."""
    (home / "config.toml").write_text(f'[superlink.{CONNECTION}]\naddress = "{address}"\ninsecure = true\n')


def write_settings(settings: Mapping[str, str], file: Path) -> Path:
    """A file for `flwr run --run-config`."""
    file.write_text("".join(f"{key} = {_toml_string(value)}\n" for key, value in settings.items()))
    return file


@contextmanager
def superlink(home: Path, log: Path) -> Iterator[dict[str, str]]:
    """A private simulation SuperLink; yields the environment in which `flwr` finds it as `twist-fl`."""
    address = f"127.0.0.1:{free_port()}"
    write_connection(home, address)
    environment = quiet_environment(home)
    host, port = address.split(":")
    command = ["flower-superlink", "--insecure", "--simulation", "--host", host, "--port", port]
    with _process(command, environment, log) as process:
        wait_until_healthy(address, process, log)
        yield environment


@contextmanager
def _process(command: list[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose output goes to `log`; it and all below it are stopped at the end of the block."""
    process = None
    try:
        with log.open("a") as output:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        yield process
    finally:
        if process is not None:
            with _undisturbed():
                stop_tree(process)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """An impatient second Ctrl-C must not leave processes behind."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_until_healthy(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"http://{address}/health", timeout=1, trust_env=False).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise LaunchError(f"Flower's SuperLink did not start within {_START_SECONDS} s: see {log}")


def stop_tree(process: subprocess.Popen[bytes]) -> None:
    """Stop `process` and every process below it: politely, then for good."""
    try:
        tree = psutil.Process(process.pid)
        stop([*tree.children(recursive=True), tree])
    except psutil.NoSuchProcess:
        return
    process.wait()


def stop(processes: list[psutil.Process]) -> None:
    """Ask `processes` to end, and kill those that have not after a few seconds."""
    for member in processes:
        with suppress(psutil.NoSuchProcess):
            member.terminate()
    _, alive = psutil.wait_procs(processes, timeout=_STOP_SECONDS)
    for member in alive:
        with suppress(psutil.NoSuchProcess):
            member.kill()


def processes_of(home: Path) -> list[psutil.Process]:
    """Processes that were started with this FLWR_HOME, also those whose parent has died."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("FLWR_HOME") == str(home):
                found.append(process)
    return found


@contextmanager
def flower_run(
    folder: RunFolder, config: Config, num_nodes: int, run_config: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """`flwr run` of our app in a private simulation of `num_nodes` nodes; yields the running process.

    Its output goes to flower.log in the run's folder. Leaving the block stops everything. Raises ConfigError if
    another command is using the folder.
    """
    log = folder.path / "flower.log"
    resources = (
        f"num-supernodes={num_nodes} client-resources-num-cpus={cpus_per_worker(config)} "
        f"client-resources-num-gpus={config.flower.gpus_per_worker} init-args-num-cpus={usable_cores()}"
    )
    with folder.lock("command"), _flower_home(folder.path) as home, superlink(home, log) as environment:
        settings = write_settings({"run-dir": str(folder.path), **run_config}, home / "settings.toml")
        command = ["flwr", "run", str(stage_app(home / "app")), CONNECTION, "--stream"]
        command += ["--run-config", str(settings), "--federation-config", resources]
        with _process(command, environment, log) as process:
            yield process


@contextmanager
def _flower_home(folder: Path) -> Iterator[Path]:
    """A FLWR_HOME of this run's own, gone afterwards with every process that was started in it."""
    home = Path(tempfile.mkdtemp(prefix="flower-", dir=folder))
    try:
        yield home
    finally:
        with _undisturbed():
            stop(processes_of(home))
            shutil.rmtree(home, ignore_errors=True)


def _toml_string(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'

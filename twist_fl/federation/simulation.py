"""Start a Flower simulation of our own, follow it, and leave nothing behind.

A private SuperLink on a free loopback port, with its state in memory and its FLWR_HOME inside the run's
folder, takes one `flwr run` and is stopped with all its children when the run ends, fails or is interrupted. It
starts while the command loads torch and reads the text. Its server and workers are forks of one process that has loaded
torch for them (`system/forking.py`); they wait until the command has made the run's folder.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil

from twist_fl.config.schema import Config, conf_dir
from twist_fl.federation.actors import SIMULATION
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system import awaiting, forking
from twist_fl.system.children import clear_stale, ended, flower_home, ray_folder
from twist_fl.system.cores import usable_cores
from twist_fl.system.environment import private_environment
from twist_fl.system.errors import LaunchError
from twist_fl.training.device import cpus_per_worker

_START_SECONDS = 60
_LOOK_SECONDS = 0.25
CONNECTION = "twist-fl"
_BEGIN = "twist_fl: a simulation begins\n"
_DIED = "twist_fl: the simulation is over: "
LOADED = ("torch", "transformers.modeling_utils", "flwr.simulation.app")
"""What server and workers load. Not what is ours, which they find in the app as `flwr run` has installed it, and not
Ray, whose library reads its environment while it is loaded; it takes a quarter of a second."""
_PARTS = {
    SIMULATION: "the simulation, with the server in it,",
    "raylet": "Ray's raylet",
    "gcs_server": "Ray's gcs_server",
}
"""Programs that a simulation runs until its end, and how messages call them."""
_FIRST_WORDS = 4
"""Of a command in which its program's name stands."""


def stage_app(target: Path) -> Path:
    """The folder that `flwr run` takes, put together in `target` from the source tree or an installed wheel.

    The app's own files by themselves: `flwr run` resolves every file below the folder it takes, a .venv's too.
    """
    package, app = Path(__file__).resolve().parents[1], conf_dir().parent
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


def write_connection(home: Path, address: str, ca: Path | None = None) -> None:
    """Where `flwr` with FLWR_HOME=`home` finds the SuperLink CONNECTION; with its CA certificate, by TLS."""
    security = f"root-certificates = {_toml_string(str(ca.absolute()))}" if ca else "insecure = true"
    text = f'[superlink]\ndefault = "{CONNECTION}"\n[superlink.{CONNECTION}]\naddress = "{address}"\n{security}\n'
    (home / "config.toml").write_text(text)


def write_settings(settings: Mapping[str, str], file: Path) -> Path:
    """A file for `flwr run --run-config`."""
    file.write_text("".join(f"{key} = {_toml_string(value)}\n" for key, value in settings.items()))
    return file


def start(command: list[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """A process whose output goes to the end of `log`, and which no Ctrl-C at this terminal reaches."""
    with log.open("a") as output:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )


def wait_until_healthy(address: str, process: subprocess.Popen[bytes], log: Path, ca: Path | None = None) -> None:
    """Until the SuperLink answers, by TLS if `ca` is given. Raises LaunchError."""
    context = ssl.create_default_context(cafile=ca) if ca else True
    url = f"http{'s' if ca else ''}://{address}/health"
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(url, timeout=1, trust_env=False, verify=context).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise LaunchError(f"Flower's SuperLink did not start within {_START_SECONDS} s: see {log}")


class Simulation:
    """A private SuperLink, the `flwr run` that was given to it, and what they start: once one ends, it is over."""

    def __init__(
        self, superlink: subprocess.Popen[bytes], run: subprocess.Popen[bytes], log: Path, signal: Path
    ) -> None:
        self._log, self._signal = log, signal
        self.parts = {"Flower's SuperLink": psutil.Process(superlink.pid), "flwr run": psutil.Process(run.pid)}
        self._root = self.parts["Flower's SuperLink"]

    def begin(self) -> None:
        """The run's folder is ready: the server, which has waited for this, goes to work in it."""
        self._signal.touch()

    def poll(self) -> int | None:
        """None while all parts run; what has died is then in the log."""
        self._look()
        for what, process in self.parts.items():
            if ended(process):
                with self._log.open("a") as file:
                    file.write(f"{_DIED}{what} (process {process.pid}) has ended\n")
                return 0
        return None

    def wait(self, timeout: float) -> None:
        """Raises LaunchError if all parts still run after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise LaunchError(f"the simulation did not end within {timeout:g} s: see {self._log}")
            time.sleep(_LOOK_SECONDS)

    def _look(self) -> None:
        """For parts that have started since the last look."""
        if len(self.parts) == 2 + len(_PARTS):
            return
        with suppress(psutil.Error):
            for process in self._root.children(recursive=True):
                with suppress(psutil.Error):
                    for word in process.cmdline()[:_FIRST_WORDS]:
                        if what := _PARTS.get(Path(word).name):
                            self.parts.setdefault(what, process)


@contextmanager
def flower_run(
    folder: RunFolder, config: Config, num_nodes: int, run_config: Mapping[str, str]
) -> Iterator[Simulation]:
    """`flwr run` of our app in a private simulation of `num_nodes` nodes, which waits for `Simulation.begin`.

    Its output goes to flower.log in the run's folder. Leaving the block stops everything. What an earlier command
    that was killed has left in the folder goes first. Raises ConfigError if another command is using the folder.
    """
    log = folder.path / "flower.log"
    resources = (
        f"num-supernodes={num_nodes} client-resources-num-cpus={cpus_per_worker(config)} "
        f"client-resources-num-gpus={config.flower.gpus_per_worker} init-args-num-cpus={usable_cores()}"
    )
    with folder.lock("command"):
        clear_stale(folder.path)
        folder.tidy()
        started: list[subprocess.Popen[bytes]] = []
        try:
            with flower_home(folder.path) as home:
                with log.open("a") as file:
                    file.write(_BEGIN)
                address = f"127.0.0.1:{free_port()}"
                write_connection(home, address)
                environment = private_environment(home) | {"RAY_TMPDIR": str(ray_folder(home))}
                if sys.platform == "linux":
                    started.append(_start_forking(home, environment, log))
                host, port = address.split(":")
                words = ["flower-superlink", "--insecure", "--simulation", "--host", host, "--port", port]
                started.append(superlink := start(words, environment, log))
                begin = home / "begin"
                given = {"run-dir": str(folder.path), "wait-for": str(begin), **run_config}
                settings = write_settings(given, home / "settings.toml")
                command = [sys.executable, "-P", awaiting.__file__, address]
                command += ["flwr", "run", str(stage_app(home / "app")), CONNECTION, "--stream"]
                command += ["--run-config", str(settings), "--federation-config", resources]
                started.append(run := start(command, environment, log))
                yield Simulation(superlink, run, log, begin)
        finally:
            for process in started:  # stopped with the home
                process.wait()
            folder.tidy()


def _start_forking(home: Path, environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """The process of which server and workers become forks; `environment` then leads Flower and Ray there."""
    path, programs = ray_folder(home) / "forking", home / "bin"
    environment[forking.SOCKET] = str(path)
    program = shutil.which(SIMULATION, path=environment["PATH"])
    if program is None:
        raise LaunchError(f"Flower's {SIMULATION} is not beside this Python, {sys.executable}: install flwr there")
    programs.mkdir()
    ours = programs / SIMULATION
    ours.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-IS", forking.__file__, program])} "$@"\n')
    ours.chmod(0o700)
    environment["PATH"] = os.pathsep.join([str(programs), environment["PATH"]])
    # First a variable that no fork changes: beside it lies the room for a title, such as Ray gives its workers.
    kept_first = {forking.SOCKET: str(path), **environment}
    return start([sys.executable, "-P", forking.__file__, "serve", str(path), *LOADED], kept_first, log)


def why_it_ended(log: Path) -> str:
    """Why the last simulation in `log` ended before its time: the first error of the chain, or what died."""
    text = log.read_text(errors="replace") if log.is_file() else ""
    text = re.sub(r"\x1b\[[\d;]*m", "", text.rpartition(_BEGIN)[2])
    # What ends a simulation Flower reports last, as a chain of tracebacks; what clients raised stands before.
    _, _, chain = text.rpartition("Simulation raised an exception")
    died = re.search(rf"^{_DIED}(.*)$", text, re.MULTILINE)
    errors = re.findall(r"^[\w.]*(?:Error|Exception|Exit|Interrupt)(?:\([\w.]*\))?: .*$", chain, re.MULTILINE)
    if len(chain) < len(text) and errors:
        return str(errors[0]).strip()
    return died[1] if died else ""


def _toml_string(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'

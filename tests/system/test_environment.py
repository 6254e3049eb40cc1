"""Of the user's environment, what reaches a private Flower and Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from twist_fl.system.children import ray_folder
from twist_fl.system.environment import private_environment

HOME = Path("/run/flower-1")


@pytest.mark.parametrize(
    "name",
    [
        *("HOME", "LANG", "LC_ALL", "TMPDIR", "USER", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH"),
        *("CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "HF_HOME", "HF_TOKEN", "TWIST_FL_CACHE"),
    ],
)
def test_what_is_meant_to_pass_passes(name: str) -> None:
    assert private_environment(HOME, {name: "/as/given"})[name] == "/as/given"


def test_modules_are_looked_for_where_the_user_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    private = private_environment(HOME, {"PYTHONPATH": "mine:/theirs:", "TWIST_FL_WORKING_FOLDER": "/elsewhere"})
    assert private["PYTHONPATH"] == f"{tmp_path}/mine:/theirs:{tmp_path}"
    assert private["TWIST_FL_WORKING_FOLDER"] == str(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        *("RAY_ADDRESS", "RAY_NAMESPACE", "FLWR_LOCAL_CONTROL_API_PORT", "GRPC_VERBOSITY", "GRPC_DNS_RESOLVER"),
        *("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "grpc_proxy"),
        *("PYTHONWARNINGS", "PYTHONSTARTUP", "PYTHONINSPECT", "OMP_NUM_THREADS", "SSLKEYLOGFILE", "MY_PATH"),
    ],
)
def test_nothing_else_does(name: str) -> None:
    assert name not in private_environment(HOME, {name: "1"})


def test_ours_come_before_the_users() -> None:
    given = {"FLWR_HOME": "/theirs", "NO_PROXY": "", "RAY_worker_niceness": "15", "PATH": "/usr/bin"}
    private = private_environment(HOME, given)
    assert private["FLWR_HOME"] == str(HOME)
    assert private["NO_PROXY"] == private["no_proxy"] == "*"
    assert private["RAY_worker_niceness"] == "0"
    assert private["PATH"].endswith(":/usr/bin")


LISTENING = """
import json, sys
import psutil, ray
ray.init(include_dashboard=False, num_cpus=1, logging_level="error")
assert ray.get(ray.remote(lambda: 1).remote()) == 1
us = psutil.Process()
sockets = [each for found in (us, *us.children(recursive=True)) for each in found.net_connections("inet")]
print(json.dumps([each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN]))
ray.shutdown()
"""


def test_ray_listens_on_the_loopback_address_only(tmp_path_factory: pytest.TempPathFactory) -> None:
    """By default all its ports are open to the network, and whoever reaches them may run code."""
    home = tmp_path_factory.mktemp("home")
    environment = private_environment(home) | {"RAY_TMPDIR": str(ray_folder(home))}
    done = subprocess.run(
        [sys.executable, "-c", LISTENING], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    addresses = json.loads(done.stdout.splitlines()[-1])
    assert len(addresses) >= 4
    assert {address.removeprefix("::ffff:") for address in addresses} == {"127.0.0.1"}

"""Of the user's environment, what reaches a private Flower and Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

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

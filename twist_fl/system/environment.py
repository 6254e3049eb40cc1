"""The environment of the processes that we start: of the user's own, only what is meant to reach them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from twist_fl.system.provenance import commit

_PASSES = re.compile(
    # who and where we are
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LANGUAGE|LC_.*|TZ|TMPDIR|XDG_.*"
    # which Python, with which libraries
    r"|PYTHON(PATH|HOME|USERBASE|NOUSERSITE|PLATLIBDIR|DONTWRITEBYTECODE|PYCACHEPREFIX)|VIRTUAL_ENV|CONDA_.*|LD_.*|DYLD_.*"
    # GPUs and arithmetic
    r"|(CUDA|CUBLAS|CUDNN|NVIDIA|HIP|ROCR|ROCM|HSA|TORCH|PYTORCH)_.*"
    # models, texts, and ourselves
    r"|(HF|HUGGINGFACE|TRANSFORMERS|DATASETS|TWIST_FL)_.*"
)


WORKING_FOLDER = "TWIST_FL_WORKING_FOLDER"
"""Names the folder in which the user gave the command: modules of the user's are looked for there, too."""


def private_environment(home: Path, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a private Flower and its Ray see, with Flower's state in `home`.

    The rule: a variable of the user's passes if it says where things are (programs, libraries, caches, temporary
    files), in which language, or what a GPU and torch do. No other does: not a Flower's or Ray's of the user's own
    (FLWR_*, RAY_*), no proxy (all that is talked to is on this machine, and what comes from a hub, the command has
    fetched), no GRPC_*, no switch of the interpreter (PYTHONWARNINGS=error ends Ray), no number of threads
    (train.threads says it). Then come our own: no installs, no telemetry, no checks for updates, short waits.
    """
    scripts = str(Path(sys.executable).parent)
    modules = given.get("PYTHONPATH")
    kept = {name: value for name, value in given.items() if _PASSES.fullmatch(name)}
    if modules:  # relative to where the user is
        kept["PYTHONPATH"] = os.pathsep.join(str(Path(folder).absolute()) for folder in modules.split(os.pathsep))
    return kept | {
        WORKING_FOLDER: str(Path.cwd()),
        "PATH": os.pathsep.join(filter(None, [scripts, given.get("PATH")])),
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "NO_PROXY": "*",  # nor one that the operating system knows of
        "no_proxy": "*",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # off: Ray listens on the loopback address only, on Linux too
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_worker_niceness": "0",  # Ray's default, 15, starves the workers beside any other job
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        # Idle OpenMP threads sleep instead of spinning: server and workers share the cores.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "TWIST_FL_COMMIT": commit() or "",
    }

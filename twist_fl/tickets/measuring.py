"""A process that has torch loaded, and forks a fresh one for every ticket that is measured.

Loading takes some ten times as long as measuring a small ticket; what is measured is still the fork's own time and
memory, as its life begins with the ticket. The process ends with the one that started it. No torch in this file.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

Request = dict[str, Any]
_REPORT, _WORDS = "report.json", "words.txt"


class Measuring:
    """`python -m twist_fl.tickets.edge_client --serve`, with `threads` for libraries that ask the environment."""

    def __init__(self, threads: int) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="twist-edge-")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "twist_fl.tickets.edge_client", "--serve"],
            cwd=self._scratch.name,
            env=quiet_environment(self._scratch.name, threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for who asks
        )
        atexit.register(self.close)

    def ask(self, request: Request, scratch: Path) -> Any:
        """What the fork reported. Raises RuntimeError with the end of what it said if it fails."""
        assert self._process.stdin and self._process.stdout
        with suppress(BrokenPipeError):  # it has ended: the answer says so
            self._process.stdin.write(json.dumps(request | {"scratch": str(scratch)}) + "\n")
            self._process.stdin.flush()
        status = self._process.stdout.readline().strip() or f"the measuring process's, {self._process.wait()}"
        if status != "0":
            words = (scratch / _WORDS).read_text(errors="replace") if (scratch / _WORDS).exists() else ""
            raise RuntimeError(f"measuring {request['folder']} failed with exit status {status}: {words[-2000:]}")
        return json.loads((scratch / _REPORT).read_text())

    def close(self) -> None:
        self._process.terminate()
        self._process.communicate()
        self._scratch.cleanup()


@lru_cache
def measuring(threads: int) -> Measuring:
    """This process's, started when it is first asked for: early, if there is something else to do meanwhile."""
    return Measuring(threads)


def quiet_environment(scratch: str, threads: int) -> dict[str, str]:
    """No network, no progress bars; this package on the path; transformers copies the model code to `scratch`."""
    search = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, search)),
        "HF_MODULES_CACHE": str(Path(scratch) / "modules"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }


def serve(measure: Callable[[Request], Any]) -> None:
    """Answer requests of standard input until it ends, each in a fork: its exit status, on a line of its own."""
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            os._exit(_answer(measure, request, Path(request["scratch"])))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _answer(measure: Callable[[Request], Any], request: Request, scratch: Path) -> int:
    """Never returns into the loop of the process it was forked from."""
    with _said_to(scratch / _WORDS):
        try:
            (scratch / _REPORT).write_text(json.dumps(measure(request)))
        except BaseException:  # noqa: BLE001 (told to who asked)
            traceback.print_exc()
            return 1
        return 0


@contextmanager
def _said_to(file: Path) -> Iterator[None]:
    with file.open("w") as words:
        os.dup2(words.fileno(), 1)
        os.dup2(words.fileno(), 2)
        yield
        sys.stdout.flush()
        sys.stderr.flush()

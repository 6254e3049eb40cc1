"""As a script (`python awaiting.py ADDRESS COMMAND...`): COMMAND, once the SuperLink at ADDRESS answers.

So the command that starts both need not wait: it loads torch meanwhile. Only Python's own library, to start at once.
"""

from __future__ import annotations

import os
import sys
import time
from http.client import HTTPConnection, HTTPException

_LOOK_SECONDS = 0.1


def healthy(address: str) -> bool:
    connection = HTTPConnection(address, timeout=1)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def main(address: str, *command: str) -> None:
    """The simulation is over when the SuperLink ends: nothing here waits for ever."""
    while not healthy(address):
        time.sleep(_LOOK_SECONDS)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Simulated workers that load torch while the server does, and whose process Ray replaces when it dies.

Flower makes an actor that loads nothing before its first message. It puts one that has died back into its pool,
where it fails every message that it is given. It names no option for another kind, so this file, with `executor.py`,
knows Flower's internals, and of Ray's which helpers a cluster of one machine can do without.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Event
from typing import Any

RESTARTS = 3
"""How often a worker's process is replaced: one that dies again and again (of its memory, say) shall be seen."""

_RAY_SECONDS = 20
_ray_starts = Event()


@contextmanager
def loading() -> Iterator[None]:
    """Loading torch and transformers makes a million objects that stay; looking for garbage among them again and again
    is a tenth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def wait_for_ray() -> None:
    """In a simulation, until Ray's processes start: all workers wait for it, and what this thread loads holds up the
    thread that gets there. Anywhere else it does nothing."""
    if not _is_simulation():
        return
    import ray

    deadline = time.monotonic() + _RAY_SECONDS
    while not (_ray_starts.is_set() or ray.is_initialized()) and time.monotonic() < deadline:
        time.sleep(0.02)


def _is_simulation() -> bool:
    return "flwr.simulation.app" in sys.modules


def prepare_actors(warm: Callable[[], None]) -> None:
    """In the process of a simulation, before it starts Ray; anywhere else it does nothing. A worker begins with `warm`.

    A message whose process dies is given to the next one. If the worker had begun to train it in memory that it shares
    with the server, the next one sees that and refuses: one reply is lost.
    """
    if not _is_simulation():
        return
    import ray
    from flwr.server.superlink.fleet.vce.backend import raybackend
    from flwr.simulation.ray_transport.ray_actor import VirtualClientEngineActor
    from ray._private.node import Node

    node: Any = Node

    class WarmActor(VirtualClientEngineActor):
        def __init__(self) -> None:
            with loading():
                warm()

    def init_ray(_: object, config: Mapping[str, Any]) -> None:
        """The path of modules by the environment, not as Flower by a `runtime_env`: for one, Ray starts other processes
        than those that it starts at once. Without the autoscaler's monitor and, for there is no dashboard, the process
        that would only count its usage."""
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*sys.path, os.environ.get("PYTHONPATH")]))
        _ray_starts.set()
        arguments = {"include_dashboard": False, **config.get("init_args", {})}
        if not arguments["include_dashboard"]:
            node.start_monitor = node.start_api_server = _nothing
        ray.init(**arguments)

    lasting = ray.remote(max_restarts=RESTARTS, max_task_retries=RESTARTS)
    internals: Any = raybackend
    internals.ClientAppActor = lasting(WarmActor)
    internals.RayBackend.init_ray = init_ray


def _nothing(*_: object, **__: object) -> None: ...

"""Simulated workers that load what they need at once, and whose process Ray replaces when it dies.

Flower makes an actor that loads nothing before its first message. It puts one that has died back into its pool,
where it fails every message that it is given. It names no option for another kind, so this file, with `executor.py`,
knows Flower's internals, and of Ray's which helpers a cluster of one machine can do without.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from twist_fl.system import forking

SIMULATION = "flwr-simulation"
"""Flower's program: the process of a simulation, with the server in it."""
RESTARTS = 3
"""How often a worker's process is replaced: one that dies again and again (of its memory, say) shall be seen."""


def prepare_actors(warm: Callable[[], None]) -> None:
    """In the process of a simulation, before it starts Ray; anywhere else it does nothing. A worker begins with `warm`.

    A message whose process dies is given to the next one. If the worker had begun to train it in memory that it shares
    with the server, the next one sees that and refuses: one reply is lost.
    """
    if Path(sys.argv[0]).name != SIMULATION:
        return
    import ray
    from flwr.server.superlink.fleet.vce.backend import raybackend
    from flwr.simulation.ray_transport.ray_actor import VirtualClientEngineActor
    from ray._private import ray_constants
    from ray._private.node import Node

    node: Any = Node
    constants: Any = ray_constants

    class WarmActor(VirtualClientEngineActor):
        def __init__(self) -> None:
            warm()

    def init_ray(_: object, config: Mapping[str, Any]) -> None:
        """The path of modules by the environment, not as Flower by a `runtime_env`: for one, Ray starts other processes
        than those that it starts at once. Without the autoscaler's monitor and, for there is no dashboard, the process
        that would only count its usage."""
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*sys.path, os.environ.get("PYTHONPATH")]))
        if forking.SOCKET in os.environ:  # joined to the folder of Ray's own
            constants.SETUP_WORKER_FILENAME = forking.__file__
        arguments = {"include_dashboard": False, **config.get("init_args", {})}
        if not arguments["include_dashboard"]:
            node.start_monitor = node.start_api_server = _nothing
        ray.init(**arguments)

    lasting = ray.remote(max_restarts=RESTARTS, max_task_retries=RESTARTS)
    internals: Any = raybackend
    internals.ClientAppActor = lasting(WarmActor)
    internals.RayBackend.init_ray = init_ray


def _nothing(*_: object, **__: object) -> None: ...

"""Simulated workers that load torch while the server does, and whose process Ray replaces when it dies.

Flower 1.41 makes an actor that loads nothing before its first message. It puts one that has died back into its pool,
where it fails every message that it is given. It names no option for another kind, so this file, with `executor.py`,
knows Flower's internals.
"""

from __future__ import annotations

import sys
from typing import Any

RESTARTS = 3
"""How often a worker's process is replaced: one that dies again and again (of its memory, say) shall be seen."""


def prepare_actors() -> None:
    """In the process of a simulation, before it makes its actors; anywhere else it does nothing.

    A message whose process dies is given to the next one. If the worker had begun to train it in memory that it shares
    with the server, the next one sees that and refuses: one reply is lost.
    """
    if "flwr.simulation.app" not in sys.modules:
        return
    import ray
    from flwr.simulation.ray_transport import ray_actor

    class WarmActor(ray_actor.VirtualClientEngineActor):
        def __init__(self) -> None:
            import twist_fl.serve  # noqa: F401

    lasting = ray.remote(max_restarts=RESTARTS, max_task_retries=RESTARTS)
    internals: Any = ray_actor
    internals.ClientAppActor = lasting(WarmActor)

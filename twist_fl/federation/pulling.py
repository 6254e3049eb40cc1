"""How long the server waits for the rest of a reply that is announced and not there yet.

Flower's Grid takes the replies that are announced, one after the other, and waits for every object of each: for three
minutes, if its sender has died while it sent them, and meanwhile for nobody else. It has no setting for that, so this
file, with `actors.py` and `executor.py`, knows Flower's internals. A simulation's replies are whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError, pull_objects
from flwr.superlink.grid import http_grid

_FIRST_BACKOFF, _LAST_BACKOFF = 0.05, 0.5
"""Seconds between two looks for an object; Flower's own are 1 and 10."""


@contextmanager
def patience(give_up: Callable[[float], str]) -> Iterator[None]:
    """While the block pulls replies: whenever an object is not there yet, `give_up` is asked, with the seconds since
    one came last. If it says why, that reply becomes an error with these words."""

    def pull(object_ids: list[str], pull_object_fn: Callable[[str], bytes]) -> dict[str, bytes]:
        came = time.monotonic()

        def pull_one(object_id: str) -> bytes:
            nonlocal came
            try:
                content = pull_object_fn(object_id)
            except ObjectUnavailableError:
                if why := give_up(time.monotonic() - came):
                    raise ObjectPullError(object_id, why) from None
                raise
            came = time.monotonic()
            return content

        return pull_objects(
            object_ids,
            pull_one,
            max_time=None,
            max_tries_per_object=None,
            initial_backoff=_FIRST_BACKOFF,
            backoff_cap=_LAST_BACKOFF,
        )

    module = http_grid.__dict__
    module["pull_objects"] = pull
    try:
        yield
    finally:
        module["pull_objects"] = pull_objects

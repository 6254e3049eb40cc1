"""Messages out, replies in as they come."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from twist_fl.config.schema import FlowerConfig
from twist_fl.federation.pulling import patience

_SLACK = 60.0
"""Seconds more that a message is worth something: sending a round's takes time, and clocks differ."""
_LATE = 0.005
"""The share of its wait that a reply may lie before it is looked for. Every look is work for the SuperLink, which may
stand on the machine that trains: looks every 0.05 s take half a core of it."""

_QUIET = 5.0
"""Seconds without any of it after which the rest of a reply is given up, if a node has left."""


def exchange(
    grid: Grid,
    messages: Iterable[Message],
    flower: FlowerConfig,
    timeout: float,
    pending: dict[str, Message] | None = None,
    lasts: float | None = None,
) -> Iterator[Message]:
    """Push each message as it is made; then the replies as they arrive, until all are in or time is up.

    The caller works on a reply while others still train; `pending` shows it, by message id, what has been sent and is
    not answered. `timeout` is in seconds. After twice `lasts`, which is `timeout` if not given, and a minute, Flower
    gives the message to nobody any more and takes no reply to it (its default is 12 hours): a node that was away does
    not begin with rounds that are over.
    Each reply is given as an answer to the message that was sent, whatever it says itself: the errors that Flower
    reports (a message expired, a node gone) lack those fields, and a client's are not to be trusted.
    """
    pending, refused = {} if pending is None else pending, []
    for message in messages:
        message.metadata.ttl = min(message.metadata.ttl, 2 * (lasts or timeout) + _SLACK)
        if pushed := list(filter(None, grid.push_messages([message]))):
            pending |= dict.fromkeys(pushed, _envelope(message))
        else:
            refused.append(Message(Error(code=0, reason="the node has left"), reply_to=_envelope(message)))
    return _replies(grid, pending, refused, flower, time.monotonic() + timeout)


def _replies(
    grid: Grid, pending: dict[str, Message], refused: list[Message], flower: FlowerConfig, deadline: float
) -> Iterator[Message]:
    yield from refused
    begin = time.monotonic()

    def give_up(quiet: float) -> str:
        if time.monotonic() > deadline:
            return "it was not all there in time"
        nodes = {message.metadata.dst_node_id for message in pending.values()}
        return "the node has left" if quiet > _QUIET and not nodes <= set(grid.get_node_ids()) else ""

    while pending and time.monotonic() < deadline:
        with patience(give_up):
            replies = list(grid.pull_messages(pending))
        found = [(reply, pending.pop(reply.metadata.reply_to_message_id, None)) for reply in replies]
        for reply, sent in found:
            if sent is not None:
                yield Message(reply.error if reply.has_error() else reply.content, reply_to=sent)
        if pending:
            time.sleep(max(flower.poll_interval, _LATE * (time.monotonic() - begin)))


def _envelope(message: Message) -> Message:
    """The message without its content: what is sent must not stay in memory until it is answered."""
    about = message.metadata
    return Message(
        RecordDict(), dst_node_id=about.dst_node_id, message_type=about.message_type, group_id=about.group_id
    )

"""Messages that are announced and not all there: their sender still sends, or has died, or its run has ended."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import flwr.supernode.start_client_internal as loop
import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common.constant import Status
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from twist_fl.config.schema import FlowerConfig
from twist_fl.federation import exchange as ours
from twist_fl.federation import executor

SENDER = 7
TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


class Announced(HttpGrid):
    """One message is pushed; its reply is announced at once, and each of its objects is there after `tries` looks."""

    def __init__(self, tries: float, nodes: Iterable[int] = (SENDER,)) -> None:
        super().__init__(token="token")
        self._run: Any = SimpleNamespace(run_id=1)
        self._client: Any = SimpleNamespace(
            PullMessages=self.announce, PullObject=self.look, ConfirmMessageReceived=lambda _: None
        )
        self.tries, self.nodes, self.looks = tries, list(nodes), dict[str, int]()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        (self.sent,) = messages
        self.sent.metadata.__dict__["_message_id"] = "pushed"
        return ["pushed"]

    def get_node_ids(self) -> Iterable[int]:
        return self.nodes

    def announce(self, _: object) -> PullAppMessagesResponse:
        reply = Message(RecordDict({"answer": ConfigRecord({"value": 42})}), reply_to=self.sent)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        self.objects = {key: value.deflate() for key, value in get_all_nested_objects(reply).items()}
        return PullAppMessagesResponse(
            messages_list=[message_to_proto(reply)], message_object_trees=[get_object_tree(reply)]
        )

    def look(self, request: Any) -> PullObjectResponse:
        looks = self.looks[request.object_id] = self.looks.get(request.object_id, 0) + 1
        there = looks > self.tries
        content = self.objects[request.object_id] if there else b""
        return PullObjectResponse(object_found=True, object_available=there, object_content=content)


def answered(grid: Announced, timeout: float) -> tuple[Message, float]:
    begin = time.monotonic()
    message = Message(RecordDict(), dst_node_id=SENDER, message_type=MessageType.TRAIN)
    (reply,) = ours.exchange(grid, [message], FlowerConfig(), timeout)
    return reply, time.monotonic() - begin


def test_a_reply_that_is_still_sent_is_waited_for() -> None:
    reply, _ = answered(Announced(tries=3), timeout=60)
    assert reply.content.config_records["answer"]["value"] == 42


@pytest.mark.parametrize(
    ("nodes", "timeout", "why"), [((), 600, "the node has left"), ((SENDER,), 1, "it was not all there in time")]
)
def test_a_reply_whose_sender_has_died_holds_nobody_up(
    nodes: tuple[int, ...], timeout: float, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's grid waits for three minutes."""
    monkeypatch.setattr(ours, "_QUIET", 0.2)
    reply, seconds = answered(Announced(tries=float("inf"), nodes=nodes), timeout)
    assert (reply.error.reason or "").endswith(why)
    assert reply.metadata.src_node_id == SENDER
    assert seconds < 30


def test_a_run_that_ends_while_its_message_comes_leaves_no_task_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's own loop leaves one, for which the executor would wait instead of serving the next run."""
    message = Message(RecordDict(), dst_node_id=1, message_type=MessageType.TRAIN)
    message.metadata.__dict__["_message_id"] = message.object_id
    store = ObjectStoreFactory().store()

    def ended(*_: object) -> bytes:
        raise RunNotRunningException

    def tasks_left() -> int:
        state = InMemoryNodeState(store)
        state.set_node_id(1)
        state.store_run(Run.create_empty(message.metadata.run_id))
        given: dict[str, Any] = dict.fromkeys(("get_run", "get_fab", "pull_object", "confirm_message_received"), ended)
        given["receive"] = lambda: (message, get_object_tree(message))
        assert loop._pull_and_store_message(state, store, {}, trusted_entities=None, **given) is None
        return sum(task.status.status != Status.FINISHED for task in state.get_tasks())

    assert tasks_left() == 1
    monkeypatch.setitem(loop.__dict__, "pull_objects", executor.pull_of_a_run)
    assert tasks_left() == 0

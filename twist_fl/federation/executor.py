"""One process that answers all messages of a SuperNode, put together from Flower's own parts.

Flower starts a new process for every message, which loads torch, the data, the model and the GPU context anew.
Here the process stays, one per app bundle. All imports of Flower's internals are in this file, written for the
version that `node.py` asks for before it loads it. It runs as a script and imports nothing of twist_fl: an app's
process must hold the twist_fl that came in the app's bundle, and no other.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from logging import ERROR, INFO
from multiprocessing.connection import Connection
from typing import Any

from flwr.app import Context, Error, Message
from flwr.cli.install import install_from_fab
from flwr.clientapp.client_app import ClientApp, LoadClientAppError
from flwr.clientapp.utils import get_load_client_app_fn
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, fab_from_proto, run_from_proto
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullAppMessagesRequest, PullTaskInputRequest
from flwr.supercore import log
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, pull_objects
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supercore.utils import get_flwr_home
from flwr.supernode.cli import flower_supernode
from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

_LOOK_SECONDS, _SHORTEST_SECONDS = 0.2, 0.02
_IDLE_SHARE = 0.05
_PATIENT: dict[str, Any] = {"max_tries_per_object": None, "initial_backoff": 0.05, "backoff_cap": 0.5}
"""Seconds between two looks for an object that the sender is still sending; Flower's own are 1 and 10."""
_MESSAGE_SECONDS = 30.0
_SERVED = "process %d: %s message, start-up %.4f s, pulled in %.4f s, app %.4f s"


def end_with(parent: int) -> None:
    """SIGINT when the parent process is no more. Flower's own monitor raises it in a thread of its own: a main thread
    that waits for a lock, as while a message is pulled from a SuperNode that was killed, would sleep on."""
    main = threading.get_ident()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


class Pace:
    """Waits between two looks that grow with the time already waited: an answer is late by a twentieth of it."""

    def __init__(self, longest: float) -> None:
        self.longest = longest
        self.reset()

    def reset(self) -> None:
        self._since = time.monotonic()

    def wait(self) -> None:
        waited = time.monotonic() - self._since
        time.sleep(min(self.longest, max(_SHORTEST_SECONDS, _IDLE_SHARE * waited)))


# The SuperNode: Flower's own, that does not sleep three seconds between two looks


class SuperNodeSleeps:
    """Stands for `time` in the SuperNode's loop, which sleeps 3 s without a message and 0.5 s without a reply."""

    def __init__(self) -> None:
        self._pace = Pace(longest=3.0)

    def sleep(self, seconds: float) -> None:
        if seconds >= self._pace.longest:
            self._pace.wait()
        else:  # a message is being served
            self._pace.reset()
            time.sleep(_SHORTEST_SECONDS)


def pull_of_a_run(object_ids: list[str], pull_object_fn: Callable[[str], bytes]) -> dict[str, bytes]:
    """A message's objects, as the server sends them. Raises RuntimeError if the run ends meanwhile: what Flower raises
    then is no Exception, and leaves a task behind that waits for the rest for ever."""
    try:
        return pull_objects(object_ids, pull_object_fn, **_PATIENT)
    except RunNotRunningException:
        raise RuntimeError("the run has ended") from None


def run_supernode(parent: int, arguments: list[str]) -> None:
    """Flower's `flower-supernode` with `arguments`; it ends with its parent process."""
    end_with(parent)
    loop = importlib.import_module("flwr.supernode.start_client_internal")
    loop.__dict__["time"] = SuperNodeSleeps()
    loop.__dict__["pull_objects"] = pull_of_a_run
    sys.argv = ["flower-supernode", *arguments]
    flower_supernode()


# What hands out tasks: holds the SuperNode's secret, runs no app


class TaskSource:
    """Takes pending ClientApp tasks from the SuperNode at `address`, signed with their shared secret."""

    def __init__(self, address: str, secret: bytes) -> None:
        protected = {"/flwr.proto.Runtime/AcquireTask"}
        signing = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=protected)
        version = RuntimeVersionHttpInterceptor(component_name="SuperExec")
        self._client = RuntimeHttpClient.from_server_address(address, True, None, [version, signing])
        self._request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])

    def acquire(self) -> tuple[str, str] | None:
        """The hash of the next task's bundle and the task's token, which allows that one task only."""
        answer = self._client.AcquireTask(self._request)
        return (answer.task.fab_hash, answer.token) if answer.token else None

    def close(self) -> None:
        self._client.close()


# The process that runs the app: holds a task's token, one at a time


class Executor:
    """Answers messages for one app bundle, which it loads once and keeps."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.fab_hash = ""
        self._app: ClientApp | None = None

    def serve(self, token: str) -> None:
        """Answer the token's message as Flower's own executor would: the app's reply, or its error as a reply."""
        started = time.perf_counter()
        retries = make_simple_http_retry_invoker()
        version = RuntimeVersionHttpInterceptor(component_name="flwr-clientapp")
        client = RuntimeHttpClient.from_server_address(
            self.address, True, None, [version, RuntimeTokenHttpInterceptor(token)], retry_invoker=retries
        )
        heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
        heartbeat.start()
        task = Task(client)
        try:
            task.run(self.load, time.perf_counter() - started)
        finally:
            retries.max_tries = 1  # also when stopped: the SuperNode may be gone
            push_task_output(client, task.context, task.status, task.details)
            if heartbeat.is_running:
                heartbeat.stop()
            client.close()

    def load(self, run: Run, fab: Fab) -> ClientApp:
        """The bundle's ClientApp, imported at the first message. Raises LoadClientAppError for another bundle."""
        fab_hash = hashlib.sha256(fab.content).hexdigest()
        if self._app is None:
            with _lock():
                install_from_fab(fab.content, skip_prompt=True)
            load = get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
            self._app, self.fab_hash = load(run.fab_id, run.fab_version, fab.hash_str), fab_hash
        if fab_hash != self.fab_hash:
            raise LoadClientAppError(f"this process serves bundle {self.fab_hash}, the task is for {fab_hash}")
        return self._app


@contextmanager
def _lock() -> Iterator[None]:
    """One process at a time unpacks a bundle: Flower takes a folder that exists for a complete one."""
    get_flwr_home().mkdir(parents=True, exist_ok=True)
    with (get_flwr_home() / "twist-fl-node.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Task:
    """One message: its input, its reply, and how it ended."""

    def __init__(self, client: RuntimeHttpClient) -> None:
        self.client = client
        self.context: Context | None = None
        self.message: Message | None = None
        self.status: str = SubStatus.FAILED
        self.details = "ClientApp task failed due to unknown reason"

    def run(self, load: Callable[[Run, Fab], ClientApp], connecting: float) -> None:
        """Pull the input, run the app, push the reply."""
        clock = [time.perf_counter()]
        reply = None
        try:
            run, fab = self._pull_input()
            self.message = self._pull_message()
            clock.append(time.perf_counter())
            app = load(run, fab)
            clock.append(time.perf_counter())
            reply = app(self.message, self._context)
            clock.append(time.perf_counter())
            self.status, self.details = SubStatus.COMPLETED, ""
            pulling, loading, inside = (after - before for before, after in pairwise(clock))
            log(INFO, _SERVED, os.getpid(), self.message.metadata.message_type, connecting + loading, pulling, inside)
        except Exception as error:  # noqa: BLE001  as Flower's executor: what the app raises is the server's to know
            log(ERROR, "ClientApp raised an exception", exc_info=error)
            reply = self._failed(error)
        if reply is not None:
            try:
                push_message(self.client, reply, self._context)
            except Exception as error:  # noqa: BLE001  as Flower's executor: the next message may fare better
                log(ERROR, "Failed to push reply message", exc_info=error)

    @property
    def _context(self) -> Context:
        assert self.context is not None
        return self.context

    def _pull_input(self) -> tuple[Run, Fab]:
        answer = self.client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id = answer.task_id
        TaskIdentity.run_id = answer.run.run_id
        TaskIdentity.node_id = answer.context.node_id
        self.context = context_from_proto(answer.context)
        return run_from_proto(answer.run), fab_from_proto(answer.fab)

    def _pull_message(self) -> Message:
        """The task's message. The SuperNode names a task just before it stores the message: so look again."""
        deadline = time.monotonic() + _MESSAGE_SECONDS
        while not (answer := self.client.PullMessages(PullAppMessagesRequest())).messages_list:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the SuperNode had no message for its task within {_MESSAGE_SECONDS:g} s")
            time.sleep(_SHORTEST_SECONDS)
        tree = answer.message_object_trees[0]
        ours = Node(node_id=self._context.node_id), self._context.run_id
        pull = make_pull_object_fn_protobuf(self.client.PullObject, *ours)
        confirm = make_confirm_message_received_fn_protobuf(self.client.ConfirmMessageReceived, *ours)
        message = pull_and_inflate_object_from_tree(tree, pull, confirm, return_type=Message, **_PATIENT)
        message.metadata.__dict__["_message_id"] = tree.object_id  # what a message travels without
        return message

    def _failed(self, error: Exception) -> Message | None:
        """The error as a reply, in Flower's own words, if there is a message to reply to."""
        code, reason = ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(error)}:<'{error}'>"
        self.details = reason
        if isinstance(error, LoadClientAppError):
            code = ErrorCode.LOAD_CLIENT_APP_EXCEPTION
            reason = "An exception was raised when attempting to load `ClientApp`"
        return None if self.message is None else Message(Error(code=code, reason=reason), reply_to=self.message)


def run_executor(parent: int, address: str, descriptor: int) -> None:
    """Serve each token that comes down the line, and say so, until the line closes or a signal comes.

    Ends with SIGINT's KeyboardInterrupt when Flower gives the task up or the parent dies: a half-done task's
    process is not used again.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    end_with(parent)
    executor = Executor(address)
    with Connection(descriptor) as line:
        try:
            while True:
                executor.serve(line.recv_bytes().decode())
                line.send_bytes(b"served")
        except (EOFError, BrokenPipeError, KeyboardInterrupt):
            for number in (signal.SIGINT, signal.SIGTERM):  # a second one would only break the clean end
                signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    role, parent, *rest = sys.argv[1:]
    if role == "supernode":
        run_supernode(int(parent), rest)
    else:
        run_executor(int(parent), rest[0], int(rest[1]))

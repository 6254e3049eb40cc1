"""Flower records <-> our objects: what is not a tensor travels in small config records, as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from flwr.app import ConfigRecord, Message, RecordDict

from twist_fl.blueprint.blocks import Layout
from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.config.checks import check_name
from twist_fl.federation import tensors, transport
from twist_fl.federation.packing import Packing
from twist_fl.federation.tensors import KnownArrays, get_tensors, handle_of, put_tensors, take_whole
from twist_fl.federation.transport import ChangedError, Segment, SegmentError
from twist_fl.model.subnet import Copies, State, slice_state, take_slice
from twist_fl.system.errors import ConfigError
from twist_fl.system.untrusted import Field, plain, read_exactly
from twist_fl.training.aggregate import ReplyError
from twist_fl.training.interval import Moments
from twist_fl.training.job import Job
from twist_fl.training.worker import Reply, Task

_REPLY = {
    "digest": Field(str),
    "loss": Field(float),
    "num_tokens": Field(int, 1),
    "num_batches": Field(int, 1),
    "seconds": Field(float, 0),
    "note": Field(str),
    "peak_bytes": Field(int, 0),
    "moment_step": Field(int, 0, or_null=True),
}
_TASK = {
    "round": Field(int, 0),
    "worker": Field(int, 0),
    "blueprint": Field(str),
    "cursor": Field(int, 0),
    "num_batches": Field(int, 0),
    "keep_from": Field(int, 0),
    "moment_step": Field(int, 0, or_null=True),
}
_OWN_TEXT = {"digest": Field(str), "windows": Field(int, 0), "test": Field(int, 0)}
DIED = "its process died while it trained"
"""Why a worker's reply does not count whose task, given to another process, is half trained where it lies."""
_PARTITION = re.compile("[0-9]{1,18}")


class TaskError(ValueError):
    """A message to a worker that is no task for it."""


# Config records


def _to_record(fields: Mapping[str, Any]) -> ConfigRecord:
    return ConfigRecord({"json": json.dumps(fields)})


def _text(content: RecordDict, key: str) -> str:
    return str(content.config_records[key]["json"])


def job_of(content: RecordDict) -> str:
    return _text(content, "job")


# A node's place


def question(job_json: str, tokens: Iterable[Segment], tokenizer: Mapping[str, str] | None = None) -> RecordDict:
    """Asks a node to build its worker, and which of the tokens it can read: by those transports tensors can go.
    `tokenizer` are the files of one, for a node's own text."""
    flower = ConfigRecord({"version": version("flwr")})
    content = RecordDict({"job": ConfigRecord({"json": job_json}), "flower": flower})
    for token in tokens:
        tensors.put_handle(content, token)
    if tokenizer is not None:
        content["tokenizer"] = ConfigRecord(dict(tokenizer))
    return content


def tokenizer_of(content: RecordDict) -> dict[str, str]:
    """The files that came with the question."""
    return {name: str(text) for name, text in content.config_records.get("tokenizer", ConfigRecord()).items()}


def check_flower(content: RecordDict) -> None:
    """Raises ConfigError if the server that asks has another minor version of Flower than this node.

    Flower's SuperLink lets such a node in; what either sends, the other may not understand.
    """
    here, there = version("flwr"), str(content.config_records["flower"]["version"])
    if here.split(".")[:2] != there.split(".")[:2]:
        raise ConfigError(f"this node has Flower {here} and the server {there}: install flwr=={there} on the node")


def answer(content: RecordDict, run_id: str, partition: object) -> RecordDict:
    """A ready node's reply to `question`: the tokens' bytes prove that it can read the server's memory."""
    found = node_record(partition)
    handles = {kind: handle for kind in transport.KINDS if (handle := handle_of(content, kind)) is not None}
    for kind, handle in handles.items():
        try:
            read = tensors.open_segment(handle, run_id, transport.TOKEN_BYTES, probing=True)
            found.config_records["node"][kind] = transport.token_text(read)
        except SegmentError as error:  # another machine, user or container; no way through the network
            found.config_records["node"][f"{kind}-error"] = str(error)
    return found


def node_record(partition: object) -> RecordDict:
    """A node's answer to `connect`: its place among the nodes."""
    return RecordDict({"node": ConfigRecord({"partition": str(partition)})})


def tell_text(content: RecordDict, digest: str, num_windows: int, num_test: int) -> None:
    """All that a node says of its own text, in its answer to `connect`."""
    content["text"] = _to_record({"digest": digest, "windows": num_windows, "test": num_test})


def told_text(content: RecordDict) -> tuple[str, int, int]:
    """What `tell_text` wrote. Raises ValueError if it is not there."""
    if "text" not in content.config_records:
        raise ValueError("it says nothing of its own text")
    fields = read_exactly(_text(content, "text"), _OWN_TEXT)
    check_name("text", fields["digest"])
    return fields["digest"], fields["windows"], fields["test"]


def _of_node(content: RecordDict, key: str, default: str = "") -> str:
    return str(content.config_records.get("node", ConfigRecord()).get(key, default))


def partition_of(content: RecordDict) -> int:
    """The place a node gave itself; what is not a number comes last."""
    partition = _of_node(content, "partition")
    return int(partition) if _PARTITION.fullmatch(partition) else 2**64


def token_of(content: RecordDict, kind: str) -> str:
    """What the node read in the server's memory by this transport; nothing if it could not."""
    return _of_node(content, kind)


def why_not(content: RecordDict, kind: str) -> str:
    """Its own words, if it could not."""
    return plain(_of_node(content, f"{kind}-error", "it does not say why"))


# Tasks


@dataclass(frozen=True)
class Parcel:
    """A task with its tensors, weights in the dtype of the wire, where they lie."""

    task: Task
    params: State
    moments: Moments | None
    segment: Segment | None

    @property
    def in_place(self) -> bool:
        """Whether the tensors may be trained where they lie: the segment then holds the reply's."""
        return self.segment is not None and all(tensor.dtype == torch.float32 for tensor in self.params.values())


def task_to_records(
    job: Job,
    job_json: str,
    task: Task,
    params: State,
    moments: Moments | None,
    segment: Segment | None = None,
    known: KnownArrays | None = None,
) -> RecordDict:
    """The task with what its blueprint names of the server's whole state: what `rounds.dispatch` gives. One that only
    evaluates has no moments."""
    fields = asdict(task) | {"blueprint": task.blueprint.to_json(), "moment_step": moments and moments.step}
    content = RecordDict({"job": ConfigRecord({"json": job_json}), "task": _to_record(fields)})
    packing = Packing.of(job, task.blueprint, moments is not None)

    def take(layout: Layout, name: str, value: torch.Tensor, out: torch.Tensor) -> Copies:
        return take_slice(layout, packing.blueprint, name, value, out)

    put_tensors(content, packing, params, moments, take, segment, {} if known is None else known)
    return content


def task_from_records(job: Job, content: RecordDict, trains: bool = True) -> Parcel:
    """Without `trains`, of a task that only evaluates.

    Raises SegmentError if the tensors are not those that were sent, TaskError for what is no task."""
    try:
        return _read_task(job, content, trains)
    except ChangedError as error:
        raise SegmentError(f"{DIED}: {error}") from error  # nobody else writes there
    except SegmentError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise TaskError(f"malformed task: {plain(f'{type(error).__name__}: {error}')}") from error


def _read_task(job: Job, content: RecordDict, trains: bool) -> Parcel:
    fields = read_exactly(_text(content, "task"), _TASK)
    step = fields.pop("moment_step")
    blueprint = Blueprint.from_json(fields["blueprint"])
    job.layout.check_blueprint(blueprint)
    task = Task(**fields | {"blueprint": blueprint})
    if task.worker not in job.clients:
        raise ValueError(f"worker={task.worker} is none of the run's clients, {job.clients[0]} to {job.clients[-1]}")
    handle, packing = handle_of(content), Packing.of(job, task.blueprint, trains)
    segment = None if handle is None else tensors.open_segment(handle, job.run_id, packing.segment_bytes)
    return Parcel(task, *get_tensors(content, packing, step, segment), segment)


# Replies


def reply_to_records(
    job: Job, blueprint: Blueprint, reply: Reply, segment: Segment | None = None, sent: State | None = None
) -> RecordDict:
    """`sent`: the parcel's weights, which the reply's are told from where the packing says so."""
    fields = {
        "digest": reply.digest,
        "loss": reply.loss,
        "num_tokens": reply.num_tokens,
        "num_batches": reply.num_batches,
        "seconds": reply.seconds,
        "note": reply.note,
        "peak_bytes": reply.peak_bytes,
        "moment_step": reply.moments and reply.moments.step,
    }
    content, packing, params = RecordDict({"reply": _to_record(fields)}), Packing.of(job, blueprint), reply.params
    if packing.differences:
        assert sent is not None
        params = {name: tensor - sent[name] for name, tensor in params.items()}
    put_tensors(content, packing, params, reply.moments, take_whole, segment, {})
    return content


def reply_fields(content: RecordDict) -> dict[str, Any]:
    """What a reply says beside its tensors: loss, num_tokens, ... Raises KeyError or ValueError if it is no reply."""
    return read_exactly(_text(content, "reply"), _REPLY)


def reply_from_records(
    job: Job, blueprint: Blueprint, content: RecordDict, segment: Segment | None = None, kept: State | None = None
) -> Reply:
    """The reply to a task with `blueprint` that was sent in `segment`, if in any.

    `kept`: the server's whole state of when it sent the task, which differences are added to.
    Raises ReplyError if the records are not those of a reply.
    """
    try:
        fields = reply_fields(content)
        fields["note"] = plain(fields["note"])
        packing = Packing.of(job, blueprint)
        params, moments = get_tensors(content, packing, fields.pop("moment_step"), segment)
        params = {name: tensor.float() for name, tensor in params.items()}
        if packing.differences:
            assert kept is not None
            before = slice_state(job.layout, kept, packing.blueprint)
            params = {name: before[name] + change for name, change in params.items()}
        return Reply(params=params, moments=moments, **fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ReplyError(f"malformed reply: {plain(f'{type(error).__name__}: {error}')}") from error


# Errors


def has_died(message: Message) -> bool:
    """Whether a simulated worker's process has died and Ray replaces it no more: any other message to it fails, too."""
    return message.has_error() and "ray.exceptions.ActorDiedError" in (message.error.reason or "")


def error_of(message: Message) -> str:
    """Why a reply carries no content, in one line."""
    # Flower's: <class 'ValueError'>:<'text'>, which may end with a traceback; of Ray, RayTaskError(ClientAppException).
    form = r"<class '(?:[^']*\W)?(\w+)\)?'>:<'(.*)'>"
    reason = re.sub(form, r"\1: \2", (message.error.reason or "").strip(), flags=re.DOTALL)
    reason = re.sub(r"^Reply message objects.*object with ID '\w+': ", "its reply did not come whole: ", reason)
    lines = [line for line in reason.splitlines() if line.strip()]
    if lines and DIED in lines[-1]:
        return DIED
    return plain(lines[-1].strip()) if lines else f"Flower error {message.error.code}"

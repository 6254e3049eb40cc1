"""Flower records <-> our objects.

Every tensor travels as its own raw little-endian array, shared ones identical for all workers, so that Flower's
content addressing uploads those once. What is not a tensor travels in one small config record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from twist_fl.aggregate import ReplyError
from twist_fl.blueprint import Blueprint
from twist_fl.rounds import Reply, Task
from twist_fl.subnet import State
from twist_fl.train import MOMENTS, Moments

_DTYPES = {"float32": np.float32}
_STYPE = "raw.little"
_REPLY_TYPES = {"digest": str, "loss": float, "num_tokens": int, "num_batches": int, "seconds": float, "note": str}


def to_arrays(state: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """Float32 tensors as raw arrays, one copy each."""
    return ArrayRecord(
        {
            name: Array(
                dtype="float32", shape=tuple(tensor.shape), stype=_STYPE, data=tensor.contiguous().numpy().tobytes()
            )
            for name, tensor in state.items()
        }
    )


def from_arrays(record: ArrayRecord) -> State:
    """Tensors that own their memory. Raises ReplyError for an array that is not as `to_arrays` makes it."""
    state = {}
    for name, array in record.items():
        dtype = _DTYPES.get(array.dtype)
        if dtype is None or array.stype != _STYPE:
            raise ReplyError(f"{name} is {array.dtype}/{array.stype}, expected float32/{_STYPE}")
        if len(array.data) != np.dtype(dtype).itemsize * int(np.prod(array.shape)):
            raise ReplyError(f"{name} has {len(array.data)} bytes for shape {tuple(array.shape)}")
        state[name] = torch.from_numpy(np.frombuffer(bytearray(array.data), dtype).reshape(tuple(array.shape)))
    return state


def node_record(partition: object) -> RecordDict:
    """A node's answer to `connect`: its place among the nodes."""
    return RecordDict({"node": ConfigRecord({"partition": str(partition)})})


def partition_of(content: RecordDict) -> int:
    """The place a node gave itself; what is not a number comes last."""
    record = content.config_records.get("node", ConfigRecord())
    partition = str(record.get("partition", ""))
    return int(partition) if partition.isdecimal() else 2**64


def _to_record(fields: Mapping[str, Any]) -> ConfigRecord:
    return ConfigRecord({"json": json.dumps(fields)})


def _from_record(content: RecordDict, key: str) -> dict[str, Any]:
    fields = json.loads(str(content.config_records[key]["json"]))
    if not isinstance(fields, dict):
        raise TypeError(f"record {key!r} is no JSON object")
    return fields


def task_to_records(job_json: str, task: Task, params: State, moments: Moments | None) -> RecordDict:
    fields = asdict(task) | {"blueprint": task.blueprint.to_json(), "moment_step": moments and moments.step}
    content = RecordDict({"job": ConfigRecord({"json": job_json}), "task": _to_record(fields)})
    _put_tensors(content, params, moments)
    return content


def task_from_records(content: RecordDict) -> tuple[str, Task, State, Moments | None]:
    fields = _from_record(content, "task")
    step = fields.pop("moment_step")
    task = Task(**fields | {"blueprint": Blueprint.from_json(fields["blueprint"])})
    return str(content.config_records["job"]["json"]), task, *_get_tensors(content, step)


def reply_to_records(reply: Reply) -> RecordDict:
    fields = {
        "digest": reply.digest,
        "loss": reply.loss,
        "num_tokens": reply.num_tokens,
        "num_batches": reply.num_batches,
        "seconds": reply.seconds,
        "note": reply.note,
        "moment_step": reply.moments and reply.moments.step,
    }
    content = RecordDict({"reply": _to_record(fields)})
    _put_tensors(content, reply.params, reply.moments)
    return content


def reply_from_records(content: RecordDict) -> Reply:
    """Raises ReplyError if the records are not those of a reply."""
    try:
        fields = _from_record(content, "reply")
        for name, kind in _REPLY_TYPES.items():
            if type(fields[name]) is not kind or (kind is int and fields[name] < 1):
                raise TypeError(f"{name}={fields[name]!r} is no {'positive ' * (kind is int)}{kind.__name__}")
        params, moments = _get_tensors(content, fields.pop("moment_step"))
        return Reply(params=params, moments=moments, **fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ReplyError(f"malformed reply: {error!r}") from error


def _put_tensors(content: RecordDict, params: State, moments: Moments | None) -> None:
    content["params"] = to_arrays(params)
    if moments is not None:
        for name in MOMENTS:
            content[name] = to_arrays(moments.values[name])


def _get_tensors(content: RecordDict, step: int | None) -> tuple[State, Moments | None]:
    params = from_arrays(content.array_records["params"])
    if step is None:
        return params, None
    return params, Moments(step, {name: from_arrays(content.array_records[name]) for name in MOMENTS})


def num_bytes(content: RecordDict) -> dict[str, int]:
    """Bytes of the weights, of the optimiser's moments, and of everything else in a message."""
    sizes = {name: sum(len(array.data) for array in record.values()) for name, record in content.array_records.items()}
    weights = sizes.pop("params", 0)
    other = sum(record.count_bytes() for record in content.config_records.values())
    return {"weights": weights, "moments": sum(sizes.values()), "other": other}


def error_of(message: Message) -> str:
    """Why a reply carries no content, in one line."""
    # Flower's own form: <class 'ValueError'>:<'text'>, where text may end with a whole traceback (and the class in
    # a simulation is 'ray.exceptions.RayTaskError(ClientAppException)').
    form = r"<class '(?:[^']*\W)?(\w+)\)?'>:<'(.*)'>"
    reason = re.sub(form, r"\1: \2", (message.error.reason or "").strip(), flags=re.DOTALL)
    lines = [line for line in reason.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"Flower error {message.error.code}"

"""Records: round trips are bit exact, weights cost exactly what Appendix C says, a malformed reply is a ReplyError."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from hypothesis import given
from hypothesis import strategies as st
from local_grid import same

from twist_fl import wire
from twist_fl.aggregate import ReplyError
from twist_fl.cost import state_bytes
from twist_fl.job import Job
from twist_fl.rounds import Reply, RunState, Task, dispatch, plan
from twist_fl.subnet import State
from twist_fl.train import MOMENTS, Moments

MakeJob = Callable[..., Job]
RandomState = Callable[..., State]

OTHER_CONSTANT, OTHER_PER_BLOCK = 4_096, 4
"""Bytes beside the tensors: the job and the names of a task's fields; a block's id with its comma and brackets."""
FRAME_CONSTANT, FRAME_PER_ARRAY = 8_192, 512
"""What Flower itself adds when it serialises a message: hashes and shapes, however large the array."""


def random_run(job: Job, random_state: RandomState) -> RunState:
    """A state with every number random; with moments if the job's server keeps them."""
    moments = None
    if job.config.train.optimizer_state == "server":
        moments = Moments(30, {name: random_state(job.layout, 1 + i) for i, name in enumerate(MOMENTS)})
    return RunState(random_state(job.layout), [4, 2, 6], 2, moments=moments)


def tasks(job: Job, state: RunState) -> list[tuple[Task, RecordDict]]:
    found = plan(job, state, keep_from=1)
    return [(task, wire.task_to_records(job.to_json(), task, *dispatch(job, state, task))) for task in found]


@pytest.fixture(params=["reset", "server"])
def job(request: pytest.FixtureRequest, tiny_job: MakeJob) -> Job:
    return tiny_job(f"train.optimizer_state={request.param}")


@pytest.fixture
def state(job: Job, random_state: RandomState) -> RunState:
    return random_run(job, random_state)


@pytest.fixture
def reply(job: Job, state: RunState) -> Reply:
    task = plan(job, state)[1]
    params, moments = dispatch(job, state, task)
    return Reply(task.blueprint.digest, params, 1.25, 60, 2, 0.5, moments)


# Round trips


def test_a_task_arrives_as_it_was_sent(job: Job, state: RunState) -> None:
    for task, content in tasks(job, state):
        job_json, arrived, params, moments = wire.task_from_records(content)
        sent_params, sent_moments = dispatch(job, state, task)
        assert job_json == job.to_json()
        assert arrived == task
        assert arrived.blueprint.digest == task.blueprint.digest
        assert same(params, sent_params)
        assert (moments is None) == (sent_moments is None)
        if moments is not None and sent_moments is not None:
            assert moments.step == sent_moments.step == 30
            assert all(same(moments.values[name], sent_moments.values[name]) for name in MOMENTS)


def test_a_reply_arrives_as_it_was_sent(reply: Reply) -> None:
    arrived = wire.reply_from_records(wire.reply_to_records(reply))
    assert replace(arrived, params={}, moments=None) == replace(reply, params={}, moments=None)
    assert same(arrived.params, reply.params)
    assert (arrived.moments is None) == (reply.moments is None)
    if arrived.moments is not None and reply.moments is not None:
        assert arrived.moments.step == reply.moments.step
        assert all(same(arrived.moments.values[name], reply.moments.values[name]) for name in MOMENTS)


@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=12))
def test_every_float_survives(bits: list[int]) -> None:
    """Subnormals, infinities and each NaN's payload too: it is the bytes that travel."""
    sent = torch.from_numpy(np.array(bits, np.uint32).view(np.float32))
    arrived = wire.from_arrays(wire.to_arrays({"x": sent}))["x"]
    assert arrived.dtype == torch.float32
    assert arrived.view(torch.int32).tolist() == sent.view(torch.int32).tolist()


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 3, 4)])
def test_every_shape_survives(shape: tuple[int, ...]) -> None:
    sent = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(wire.from_arrays(wire.to_arrays({"x": sent}))["x"], sent)


def test_a_transposed_tensor_travels_in_its_own_order() -> None:
    sent = torch.arange(6.0).view(2, 3).T
    assert torch.equal(wire.from_arrays(wire.to_arrays({"x": sent}))["x"], sent)


def test_what_arrives_is_a_copy(reply: Reply) -> None:
    """Training writes into the tensors; the message stays as it was."""
    content = wire.reply_to_records(reply)
    before = {name: array.data for name, array in content.array_records["params"].items()}
    for tensor in wire.reply_from_records(content).params.values():
        tensor.fill_(7.0)
    assert {name: array.data for name, array in content.array_records["params"].items()} == before


# Bytes


def test_weights_cost_what_appendix_c_says(job: Job, state: RunState, reply: Reply) -> None:
    for task, content in tasks(job, state):
        sizes = wire.num_bytes(content)
        assert sizes["weights"] == state_bytes(job.layout, task.blueprint) == 4 * job.layout.num_params(task.blueprint)
        assert sizes["moments"] == (2 * sizes["weights"] if state.moments else 0)
    sizes = wire.num_bytes(wire.reply_to_records(reply))
    assert sizes["weights"] == state_bytes(job.layout, plan(job, state)[1].blueprint)
    assert sizes["moments"] == (2 * sizes["weights"] if reply.moments else 0)


def test_subnets_of_unequal_workers_cost_unequal_bytes(tiny_job: MakeJob, random_state: RandomState) -> None:
    job = tiny_job("blueprint.num_sub=[1,2,4]")
    sizes = [wire.num_bytes(content)["weights"] for _, content in tasks(job, random_run(job, random_state))]
    assert sizes == sorted(set(sizes))
    assert sizes[2] == state_bytes(job.layout)


@pytest.mark.parametrize("num_layers", [5, 9, 13])
def test_the_rest_is_small_and_bounded(num_layers: int, tiny_job: MakeJob, random_state: RandomState) -> None:
    """Both what num_bytes reports and what Flower adds do not depend on the size of any tensor."""
    job = tiny_job(f"model.n_layer={num_layers}", "train.optimizer_state=server")
    for task, content in tasks(job, random_run(job, random_state)):
        sizes = wire.num_bytes(content)
        held = sum(map(len, task.blueprint.attn + task.blueprint.ffn))
        bound = OTHER_CONSTANT + OTHER_PER_BLOCK * (held + 2 * num_layers)
        assert 0 < sizes["other"] <= bound
        arrays = sum(map(len, content.array_records.values()))
        assert arrays == 3 * len(job.layout.params)
        serialised = sum(len(part.deflate()) for part in get_all_nested_objects(content).values())
        # Equal objects (the shared zero biases of a new model) are stored once, hence no lower bound.
        assert serialised <= sum(sizes.values()) + FRAME_CONSTANT + FRAME_PER_ARRAY * arrays


def test_a_reply_carries_no_job(reply: Reply) -> None:
    assert wire.num_bytes(wire.reply_to_records(reply))["other"] < 512


def test_a_message_without_tensors_weighs_nothing() -> None:
    assert wire.num_bytes(RecordDict()) == {"weights": 0, "moments": 0, "other": 0}


# Content addressing


def test_shared_arrays_are_the_same_object_for_every_worker(job: Job, state: RunState) -> None:
    """Flower uploads equal objects once; a block's slice must not pass for another's of the same shape."""
    sent = tasks(job, state)
    for record in ("params", *(MOMENTS if state.moments else ())):
        for param in job.layout.params:
            ids = [content.array_records[record][param.name].object_id for _, content in sent]
            held = [job.layout.held(param, task.blueprint) for task, _ in sent]
            for i, one in enumerate(ids):
                for j, other in enumerate(ids):
                    assert (one == other) == (held[i] == held[j]), param.name
    assert len({task.blueprint for task, _ in sent}) == 3


# Malformed replies

Spoil = Callable[[RecordDict], Any]


def set_fields(**fields: Any) -> Spoil:
    def spoil(content: RecordDict) -> None:
        old = json.loads(str(content.config_records["reply"]["json"]))
        content["reply"] = ConfigRecord({"json": json.dumps(old | fields)})

    return spoil


def drop_field(name: str) -> Spoil:
    def spoil(content: RecordDict) -> None:
        old = json.loads(str(content.config_records["reply"]["json"]))
        del old[name]
        content["reply"] = ConfigRecord({"json": json.dumps(old)})

    return spoil


def set_json(text: str) -> Spoil:
    return lambda content: content.__setitem__("reply", ConfigRecord({"json": text}))


def set_array(**changes: Any) -> Spoil:
    def spoil(content: RecordDict) -> None:
        record = content.array_records["params"]
        name, array = next(iter(record.items()))
        fields = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": array.data}
        record[name] = Array(**fields | changes)

    return spoil


MALFORMED: dict[str, tuple[Spoil, str]] = {
    "nothing": (lambda content: [content.pop(name) for name in list(content)], "reply"),
    "no reply record": (lambda content: content.pop("reply"), "reply"),
    "no tensors": (lambda content: content.pop("params"), "params"),
    "records of the wrong kind": (lambda content: content.__setitem__("params", ConfigRecord({"a": 1})), "params"),
    "no json": (lambda content: content.__setitem__("reply", ConfigRecord({"text": "hello"})), "json"),
    "garbage": (set_json("{not json"), "Expecting property name"),
    "empty text": (set_json(""), "Expecting value"),
    "a list": (set_json("[1, 2]"), "malformed reply"),
    "null": (set_json("null"), "malformed reply"),
    "a missing field": (drop_field("loss"), "loss"),
    "a missing moment_step": (drop_field("moment_step"), "moment_step"),
    "an extra field": (set_fields(extra=1), "extra"),
    "a number for the digest": (set_fields(digest=17), "digest"),
    "text for the loss": (set_fields(loss="low"), "loss"),
    "text for the tokens": (set_fields(num_tokens="60"), "num_tokens"),
    "a negative number of tokens": (set_fields(num_tokens=-60), "num_tokens"),
    "half a batch": (set_fields(num_batches=1.5), "num_batches"),
    "moments that are not there": (set_fields(moment_step=30), "exp_avg"),
    "float64": (set_array(dtype="float64"), r"wte\.weight is float64/raw\.little, expected float32/raw\.little"),
    "numpy's own format": (set_array(stype="numpy.ndarray"), r"is float32/numpy\.ndarray"),
    "too few bytes": (set_array(data=b"\0" * 12), r"wte\.weight has 12 bytes for shape \(300, 32\)"),
    "a larger shape": (set_array(shape=(301, 32)), r"has 38400 bytes for shape \(301, 32\)"),
    "a negative shape": (set_array(shape=(-300, -32)), "malformed reply"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_reply_is_a_reply_error(case: str, tiny_job: MakeJob, random_state: RandomState) -> None:
    job = tiny_job()
    state = random_run(job, random_state)
    task = plan(job, state)[0]
    content = wire.reply_to_records(Reply(task.blueprint.digest, dispatch(job, state, task)[0], 1.25, 60, 2))
    wire.reply_from_records(content)
    spoil, reason = MALFORMED[case]
    spoil(content)
    with pytest.raises(ReplyError, match=reason):
        wire.reply_from_records(content)


def test_a_reply_with_half_of_its_moments(tiny_job: MakeJob, random_state: RandomState) -> None:
    job = tiny_job("train.optimizer_state=server")
    state = random_run(job, random_state)
    task = plan(job, state)[0]
    params, moments = dispatch(job, state, task)
    content = wire.reply_to_records(Reply(task.blueprint.digest, params, 1.25, 60, 2, moments=moments))
    content.pop("exp_avg_sq")
    with pytest.raises(ReplyError, match="exp_avg_sq"):
        wire.reply_from_records(content)


# Why a node failed


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("<class 'ValueError'>:<'no room'>", "ValueError: no room"),
        (
            "<class 'flwr.clientapp.client_app.ClientAppException'>:<'\nException ClientAppException occurred. "
            'Message: ray::ClientAppActor.run() (pid=7)\n  File "a.py", line 3\nRuntimeError: no GPU\'>',
            "RuntimeError: no GPU",
        ),
        (
            "<class 'ray.exceptions.RayTaskError(ClientAppException)'>:<'\x1b[36mray::run()\nValueError: no room'>",
            "ValueError: no room",
        ),
        ("Node is gone", "Node is gone"),
        ("  \n", "Flower error 5"),
        (None, "Flower error 5"),
    ],
)
def test_an_error_is_told_in_one_line(reason: str | None, expected: str) -> None:
    asked = Message(RecordDict(), dst_node_id=3, message_type="train")
    assert wire.error_of(Message(Error(5, reason), reply_to=asked)) == expected


def test_an_empty_record_holds_no_tensors() -> None:
    assert wire.from_arrays(ArrayRecord()) == {}

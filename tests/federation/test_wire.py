"""Records: round trips are bit exact, weights cost exactly what Appendix C says, a malformed reply is a ReplyError."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from hypothesis import given
from hypothesis import strategies as st
from local_grid import same
from transformers import GPT2Config

from twist_fl.blueprint.blocks import make_layout
from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.blueprint.cost import state_bytes
from twist_fl.blueprint.division import Division
from twist_fl.blueprint.drawing import draw_ticket
from twist_fl.blueprint.moments import moment_layouts
from twist_fl.federation import tensors, transport, wire
from twist_fl.federation.packing import DTYPES, Packing
from twist_fl.federation.transport import Segment, SegmentError, SharedHandle, SharedSegment
from twist_fl.model.subnet import State, copy_all, slice_state, take_slice
from twist_fl.rounds import RunState, dispatch, plan, start
from twist_fl.system.errors import ConfigError
from twist_fl.training.aggregate import ReplyError
from twist_fl.training.client_state import MomentShelf
from twist_fl.training.interval import Moments
from twist_fl.training.job import Job
from twist_fl.training.worker import Reply, Task, Worker

MakeJob = Callable[..., Job]
RandomState = Callable[..., State]

OTHER_CONSTANT, OTHER_PER_BLOCK = 4_096, 4
"""Bytes beside the tensors: the job and the names of a task's fields; a block's id with its comma and brackets."""
FRAME_CONSTANT, FRAME_PER_ARRAY = 8_192, 512
"""What Flower itself adds when it serialises a message: hashes and shapes, however large the array."""


def random_run(job: Job, random_state: RandomState) -> RunState:
    """A state with every number random; with moments if the job's server keeps them."""
    moments = None
    if layouts := job.moment_layouts:
        moments = Moments(30, {name: random_state(each, 1 + i) for i, (name, each) in enumerate(layouts.items())})
    return RunState(random_state(job.layout), [4, 2, 6], 2, moments=moments)


def task_records(job: Job, state: RunState, task: Task, segment: Segment | None = None, **known: Any) -> RecordDict:
    return wire.task_to_records(job, job.to_json(), task, state.params, state.moments, segment, **known)


def tasks(job: Job, state: RunState) -> list[tuple[Task, RecordDict]]:
    known: dict[tuple[str, str], Array] = {}
    return [(task, task_records(job, state, task, known=known)) for task in plan(job, state, keep_from=1)]


def new_token() -> SharedSegment:
    return transport.make_token(partial(transport.create, "run"))


@contextmanager
def new_segment(job: Job, blueprint: Blueprint) -> Iterator[Segment]:
    """As the server makes it for a task."""
    segment = transport.create(job.run_id, Packing.of(job, blueprint).segment_bytes)
    yield segment
    segment.close()


@pytest.fixture(params=["inline", "shm"])
def segment(request: pytest.FixtureRequest, job: Job, state: RunState) -> Iterator[Segment | None]:
    """What worker 1's task and reply travel in."""
    if request.param == "inline":
        yield None
        return
    with new_segment(job, plan(job, state)[1].blueprint) as found:
        yield found


@pytest.fixture(params=["reset", "server", "factored"])
def job(request: pytest.FixtureRequest, tiny_job: MakeJob) -> Job:
    return tiny_job(f"train.optimizer_state={request.param}")


@pytest.fixture
def state(job: Job, random_state: RandomState) -> RunState:
    return random_run(job, random_state)


@pytest.fixture
def reply(job: Job, state: RunState) -> Reply:
    task = plan(job, state)[1]
    params, moments = dispatch(job, state, task)
    return Reply(task.digest, params, 1.25, 60, 2, 0.5, moments, peak_bytes=123_456_789)


# Round trips


def test_a_task_arrives_as_it_was_sent(job: Job, state: RunState, segment: Segment | None) -> None:
    task = plan(job, state, keep_from=1)[1]
    content = task_records(job, state, task, segment)
    parcel = wire.task_from_records(job, content)
    params, moments = dispatch(job, state, task)
    assert wire.job_of(content) == job.to_json()
    assert parcel.task == task
    assert parcel.task.blueprint.digest == task.blueprint.digest
    assert same(parcel.params, params)
    assert_same_moments(parcel.moments, moments)
    assert moments is None or moments.step == 30
    assert (parcel.segment is None) == (segment is None)


def assert_same_moments(ours: Moments | None, theirs: Moments | None) -> None:
    assert (ours is None) == (theirs is None)
    if ours is not None and theirs is not None:
        assert ours.step == theirs.step
        assert ours.values.keys() == theirs.values.keys()
        assert all(same(values, theirs.values[name]) for name, values in ours.values.items())


def test_a_reply_arrives_as_it_was_sent(job: Job, state: RunState, reply: Reply, segment: Segment | None) -> None:
    blueprint = plan(job, state)[1].blueprint
    content = wire.reply_to_records(job, blueprint, reply, segment)
    arrived = wire.reply_from_records(job, blueprint, content, segment)
    assert replace(arrived, params={}, moments=None) == replace(reply, params={}, moments=None)
    assert same(arrived.params, reply.params)
    assert_same_moments(arrived.moments, reply.moments)


@pytest.mark.parametrize("setting", ["attn", "ffn", "both"])
@pytest.mark.parametrize("num_sub", [1, 2, 3, 4])
def test_what_is_written_is_the_slice(setting: str, num_sub: int, tiny_job: MakeJob, random_state: RandomState) -> None:
    job = tiny_job(f"blueprint.setting={setting}", f"blueprint.num_sub={max(2, num_sub)}")
    state = random_run(job, random_state)
    blueprint = draw_ticket(job.layout, job.division, (num_sub, num_sub), 3, 1)
    for name, value in slice_state(job.layout, state.params, blueprint).items():
        out = torch.full(value.shape, torch.nan)
        copy_all(take_slice(job.layout, blueprint, name, state.params[name], out))
        assert torch.equal(out, value), name


@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=12))
def test_every_float_survives(bits: list[int]) -> None:
    """Subnormals, infinities and each NaN's payload too: it is the bytes that travel."""
    sent = torch.from_numpy(np.array(bits, np.uint32).view(np.float32))
    arrived = tensors.from_arrays(tensors.to_arrays({"x": sent}))["x"]
    assert arrived.dtype == torch.float32
    assert arrived.view(torch.int32).tolist() == sent.view(torch.int32).tolist()


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 3, 4)])
def test_every_shape_survives(shape: tuple[int, ...]) -> None:
    sent = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tensors.from_arrays(tensors.to_arrays({"x": sent}))["x"], sent)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_ticket_in_16_bits_travels_in_them(dtype: torch.dtype) -> None:
    sent = torch.randn(2, 3).to(dtype)
    arrays = tensors.to_arrays({"x": sent})
    assert len(arrays["x"].data) == 12
    assert torch.equal(tensors.from_arrays(arrays)["x"], sent)
    arrays["x"].dtype = "float8"
    with pytest.raises(ReplyError, match="x is 'float8', expected one of float32, bfloat16, float16"):
        tensors.from_arrays(arrays)


def test_a_transposed_tensor_travels_in_its_own_order() -> None:
    sent = torch.arange(6.0).view(2, 3).T
    assert torch.equal(tensors.from_arrays(tensors.to_arrays({"x": sent}))["x"], sent)


def test_what_arrives_is_read_where_it_lies_and_training_leaves_it_alone(
    job: Job, state: RunState, segment: Segment | None, tmp_path: Path
) -> None:
    task = plan(job, state)[1]
    content = task_records(job, state, task, segment)
    parcel = wire.task_from_records(job, content)
    where = {name: tensor.data_ptr() for name, tensor in parcel.params.items()}
    before = {name: tensor.clone() for name, tensor in parcel.params.items()}
    Worker(job, MomentShelf(tmp_path)).train(parcel.task, parcel.params, parcel.moments)
    again = wire.task_from_records(job, content)  # checks the sum of a segment
    assert same(again.params, before)
    if segment is None:
        assert {name: tensor.data_ptr() for name, tensor in again.params.items()} == where


def test_by_shared_memory_a_task_is_trained_where_it_lies(job: Job, tmp_path: Path) -> None:
    """The same numbers, bit for bit; then the model lets go of the memory."""
    worker, state = Worker(job, MomentShelf(tmp_path)), start(job)
    task = plan(job, state)[1]
    expected = worker.train(task, *dispatch(job, state, task))
    expected = replace(expected, params={name: tensor.clone() for name, tensor in expected.params.items()})
    with new_segment(job, task.blueprint) as segment:
        parcel = wire.task_from_records(job, task_records(job, state, task, segment))
        reply = worker.train(parcel.task, parcel.params, parcel.moments, parcel.in_place)
        made = len(reply.params) if job.config.train.optimizer_state == "factored" else None  # its factors are new
        assert pointers(reply)[:made] == pointers(parcel)[:made]
        content = wire.reply_to_records(job, task.blueprint, reply, segment)
        arrived = wire.reply_from_records(job, task.blueprint, content, segment)
        assert (arrived.loss, arrived.digest) == (expected.loss, expected.digest)
        assert same(arrived.params, expected.params)
        assert_same_moments(arrived.moments, expected.moments)
        segment.memory.zero_()
        assert same(worker.train(task, *dispatch(job, state, task)).params, expected.params)
        assert not segment.memory.any()
        del parcel, reply
        assert Path("/proc/self/maps").read_text().count(segment.name) == 1  # the server's


def test_a_worker_that_fails_half_way_lets_go_of_its_task(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does next goes into other memory: the segment may be a round's that is over."""
    worker, state = Worker(job, MomentShelf(tmp_path)), start(job)
    task = plan(job, state)[1]

    def one_batch_then_none(task: Task) -> Iterator[torch.Tensor]:
        yield torch.zeros((1, 16), dtype=torch.int64)
        raise OSError("the disk is gone")

    with new_segment(job, task.blueprint) as segment:
        parcel = wire.task_from_records(job, task_records(job, state, task, segment))
        with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is gone"):
            patch.setattr(worker, "batches", one_batch_then_none)
            worker.train(parcel.task, parcel.params, parcel.moments, parcel.in_place)
        segment.memory.zero_()
        worker.train(task, *dispatch(job, state, task))
        assert not segment.memory.any()


@pytest.mark.parametrize("overrides", [(), ("flower.wire_dtype=bfloat16",)])
def test_only_float32_in_shared_memory_is_trained_in_place(overrides: tuple[str, ...], tiny_job: MakeJob) -> None:
    job = tiny_job(*overrides)
    state = start(job)
    task = plan(job, state)[0]
    assert not wire.task_from_records(job, task_records(job, state, task)).in_place
    with new_segment(job, task.blueprint) as segment:
        parcel = wire.task_from_records(job, task_records(job, state, task, segment))
        assert parcel.in_place == (not overrides)


def pointers(of: Reply | wire.Parcel) -> list[int]:
    states = [of.params, *(of.moments.values.values() if of.moments else ())]
    return [tensor.data_ptr() for state in states for tensor in state.values()]


@given(st.integers(0, 3), st.sampled_from(list(DTYPES)), st.sampled_from(["reset", "server", "factored"]))
def test_tensors_in_a_segment_are_aligned_and_apart(draw: int, wire_dtype: str, optimizer_state: str) -> None:
    layout = make_layout(GPT2Config(n_embd=12, n_layer=3, n_head=4, n_positions=7, vocab_size=11).to_dict())
    division = Division("both", ((1 + draw, 2),), undivided_first=1, undivided_last=0)
    layouts = {"params": layout} | moment_layouts(optimizer_state, layout)
    packing = Packing(layouts, draw_ticket(layout, division, (1 + draw, 2), 0, 0), wire_dtype)
    places = sorted(packing.places.values(), key=lambda place: place.start)
    assert len(places) == sum(len(each.params) for each in layouts.values())
    assert all(place.start % 64 == 0 for place in places)
    assert all(before.stop <= after.start < before.stop + 64 for before, after in pairwise(places))
    sizes = sum(map(packing.num_bytes, layouts))
    assert sizes <= places[-1].stop == packing.segment_bytes < sizes + 64 * len(places)


# Sixteen bits


@pytest.mark.parametrize("wire_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("by", ["inline", "shm"])
def test_weights_are_rounded_to_nearest_and_moments_are_not(
    wire_dtype: str, by: str, tiny_job: MakeJob, random_state: RandomState
) -> None:
    job = tiny_job("train.optimizer_state=server", f"flower.wire_dtype={wire_dtype}")
    state = random_run(job, random_state)
    task = plan(job, state)[1]
    params, moments = dispatch(job, state, task)
    rounded = {name: tensor.to(getattr(torch, wire_dtype)).float() for name, tensor in params.items()}
    assert not same(rounded, params)
    with ExitStack() as stack:
        segment = stack.enter_context(new_segment(job, task.blueprint)) if by == "shm" else None
        content = task_records(job, state, task, segment)
        parcel = wire.task_from_records(job, content)
        sent = {name: tensor.clone() for name, tensor in parcel.params.items()}
        assert same({name: tensor.float() for name, tensor in sent.items()}, rounded)
        assert_same_moments(parcel.moments, moments)
        half = state_bytes(job.layout, task.blueprint) // 2
        assert tensors.num_bytes(content) | {"other": 0} == {"weights": half, "moments": 4 * half, "other": 0}
        trained = {name: tensor + 1e-3 * torch.randn(tensor.shape) for name, tensor in rounded.items()}
        for after in (rounded, trained):
            reply = Reply(task.digest, after, 1.25, 60, 2, 0.5, moments)
            content = wire.reply_to_records(job, task.blueprint, reply, segment, sent)
            arrived = wire.reply_from_records(job, task.blueprint, content, segment, state.params)
            # What the worker was not sent, the server has kept; only the change is rounded.
            for name, tensor in params.items():
                change = (after[name] - rounded[name]).to(getattr(torch, wire_dtype)).float()
                assert torch.equal(arrived.params[name], tensor + change)
            assert_same_moments(arrived.moments, moments)
            assert tensors.num_bytes(content)["weights"] == half
        assert not same(arrived.params, params)


@pytest.mark.parametrize("wire_dtype", ["bfloat16", "float16"])
def test_gradients_of_ddp_travel_as_they_are(wire_dtype: str, tiny_job: MakeJob, random_state: RandomState) -> None:
    job = tiny_job("algorithm=ddp", f"flower.wire_dtype={wire_dtype}")
    state = random_run(job, random_state)
    task = plan(job, state)[0]
    reply = Reply(task.digest, random_state(job.layout, 7), 1.25, 30, 1)
    content = wire.reply_to_records(job, task.blueprint, reply)
    arrived = wire.reply_from_records(job, task.blueprint, content)
    rounded = {name: tensor.to(getattr(torch, wire_dtype)).float() for name, tensor in reply.params.items()}
    assert same(arrived.params, rounded)


# Bytes


def test_weights_cost_what_appendix_c_says(job: Job, state: RunState, reply: Reply, segment: Segment | None) -> None:
    task = plan(job, state)[1]
    down = task_records(job, state, task, segment)
    up = wire.reply_to_records(job, task.blueprint, reply, segment)
    for content in (down, up):
        sizes = tensors.num_bytes(content)
        assert sizes["weights"] == state_bytes(job.layout, task.blueprint) == 4 * job.layout.num_params(task.blueprint)
        assert sizes["moments"] == sum(state_bytes(each, task.blueprint) for each in job.moment_layouts.values())
        assert tensors.transport_of(content) == ("inline" if segment is None else "shm")
        if segment is not None:
            assert not content.array_records
            num_tensors = sum(len(each.params) for each in ({"params": job.layout} | job.moment_layouts).values())
            assert 0 <= len(segment.memory) - sizes["weights"] - sizes["moments"] < 64 * num_tensors


def test_subnets_of_unequal_workers_cost_unequal_bytes(tiny_job: MakeJob, random_state: RandomState) -> None:
    job = tiny_job("blueprint.num_sub=[1,2,4]")
    sizes = [tensors.num_bytes(content)["weights"] for _, content in tasks(job, random_run(job, random_state))]
    assert sizes == sorted(set(sizes))
    assert sizes[2] == state_bytes(job.layout)


@pytest.mark.parametrize("num_layers", [5, 9, 13])
def test_the_rest_is_small_and_bounded(num_layers: int, tiny_job: MakeJob, random_state: RandomState) -> None:
    """Both what num_bytes reports and what Flower adds do not depend on the size of any tensor."""
    job = tiny_job(f"model.n_layer={num_layers}", "train.optimizer_state=server")
    for task, content in tasks(job, random_run(job, random_state)):
        sizes = tensors.num_bytes(content)
        held = sum(map(len, task.blueprint.attn + task.blueprint.ffn))
        bound = OTHER_CONSTANT + OTHER_PER_BLOCK * (held + 2 * num_layers)
        assert 0 < sizes["other"] <= bound
        arrays = sum(map(len, content.array_records.values()))
        divided = 2 * 6  # layers, and parameters made of blocks in each
        assert num_layers > 5 or arrays == 3 * (len(job.layout.params) - divided + 1)
        serialised = sum(len(part.deflate()) for part in get_all_nested_objects(content).values())
        # Equal objects (the shared zero biases of a new model) are stored once, hence no lower bound.
        assert serialised <= sum(sizes.values()) + FRAME_CONSTANT + FRAME_PER_ARRAY * arrays


def test_a_reply_carries_no_job(job: Job, state: RunState, reply: Reply, segment: Segment | None) -> None:
    content = wire.reply_to_records(job, plan(job, state)[1].blueprint, reply, segment)
    assert tensors.num_bytes(content)["other"] < 512


def test_a_message_without_tensors_weighs_nothing() -> None:
    assert tensors.num_bytes(RecordDict()) == {"weights": 0, "moments": 0, "other": 0}


# Content addressing


def test_shared_arrays_are_the_same_object_for_every_worker(job: Job, state: RunState) -> None:
    """Flower uploads equal objects once; a block's slice must not pass for another's of the same shape."""
    alone = [(task, task_records(job, state, task)) for task in plan(job, state, keep_from=1)]
    for sent in (tasks(job, state), alone):
        for record, layout in ({"params": job.layout} | job.moment_layouts).items():
            arrays = [content.array_records[record] for _, content in sent]
            assert len({array[tensors.BLOCKS].object_id for array in arrays}) == 3
            for param in layout.params:
                divided = param.kind is not None and param.layer in (1, 2)
                found = [array.get(param.name) for array in arrays]
                assert [array is None for array in found] == [divided] * 3
                assert divided or len({array.object_id for array in found if array is not None}) == 1
        assert len({task.blueprint for task, _ in sent}) == 3


def test_shared_arrays_are_made_once_a_round(job: Job, state: RunState) -> None:
    first, second, _ = (content.array_records["params"] for _, content in tasks(job, state))
    assert first["transformer.wte.weight"] is second["transformer.wte.weight"]


def test_a_worker_with_all_blocks_shares_no_array_with_one_that_has_some(
    tiny_job: MakeJob, random_state: RandomState
) -> None:
    job = tiny_job("blueprint.num_sub=[2,4,4]", "train.rounds=9")
    state = random_run(job, random_state)
    (_, some), (_, one), (_, other) = tasks(job, state)
    assert tensors.BLOCKS in some.array_records["params"]
    assert tensors.BLOCKS not in one.array_records["params"]
    assert list(one.array_records["params"]) == [param.name for param in job.layout.params]
    assert all(one.array_records["params"][name] is array for name, array in other.array_records["params"].items())
    for task, content in tasks(job, state):
        assert same(wire.task_from_records(job, content).params, dispatch(job, state, task)[0])


# Shared memory

ATTACH = """
import json, sys
from twist_fl.federation import transport
handle, run_id = json.loads(sys.argv[1])
segment = transport.attach(transport.SharedHandle(**handle), run_id)
segment.check(transport.SharedHandle(**handle))
segment.memory[0] = 7
"""


def attach_elsewhere(handle: SharedHandle, run_id: str) -> subprocess.CompletedProcess[str]:
    """Another process opens the segment, checks it and writes a byte."""
    words = [sys.executable, "-c", ATTACH, json.dumps([asdict(handle), run_id])]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)


def test_another_process_reads_and_writes_the_same_memory() -> None:
    segment = new_token()
    done = attach_elsewhere(segment.handle(), "run")
    assert done.returncode == 0, done.stderr
    assert segment.memory[0] == 7
    segment.close()


def test_when_the_server_is_gone_so_is_its_memory() -> None:
    code = (
        "import os; from twist_fl.federation import transport; "
        "s = transport.create('run', 32); print(s.handle()); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 9
    handle = eval(done.stdout, {"SharedHandle": SharedHandle})
    with pytest.raises(SegmentError, match=r"is gone, or on another machine: No such file or directory$"):
        transport.attach(handle, "run")


def no_change(segment: SharedSegment, handle: SharedHandle) -> SharedHandle:
    return handle


def other_file(segment: SharedSegment, handle: SharedHandle) -> SharedHandle:
    """The server closed the segment, and its number now belongs to another one."""
    other = transport.create("run", 32)
    os.dup2(other.fd, segment.fd)
    other.close()
    return handle


REFUSED: dict[str, tuple[Callable[[SharedSegment, SharedHandle], SharedHandle], str, str]] = {
    "of another run": (no_change, "other", r"segment 'twist_fl-run-\w+' is not of this run \(other\)"),
    "of a run with a longer name": (no_change, "ru", "is not of this run"),
    "another file": (other_file, "run", r"is gone: in its place is /memfd:twist_fl-run-"),
    "no such file": (lambda _, handle: replace(handle, fd=99_999), "run", "is gone, or on another machine: No such"),
    "no such process": (lambda _, handle: replace(handle, pid=2**30), "run", "is gone, or on another machine: No such"),
    "larger": (lambda _, handle: replace(handle, num_bytes=64), "run", "has 32 bytes, its handle says 64"),
    "smaller": (lambda _, handle: replace(handle, num_bytes=16), "run", "has 32 bytes, its handle says 16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_handle_that_names_another_memory_is_refused(case: str) -> None:
    change, run_id, reason = REFUSED[case]
    segment = new_token()
    handle = change(segment, segment.handle())
    with pytest.raises(SegmentError, match=reason):
        transport.attach(handle, run_id)
    segment.close()


def test_nobody_can_cut_a_segment_short() -> None:
    segment = transport.create("run", 5000)
    with pytest.raises(PermissionError):
        os.truncate(f"/proc/self/fd/{segment.fd}", 100)
    segment.close()


@given(st.binary(min_size=1, max_size=3 * 4096 + 9), st.data())
def test_a_changed_byte_changes_the_checksum(content: bytes, data: st.DataObject) -> None:
    memory = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    before = transport.checksum(memory)
    assert before == transport.checksum(memory.clone())
    memory[data.draw(st.integers(0, len(content) - 1))] += data.draw(st.integers(1, 255))
    assert transport.checksum(memory) != before


def test_pieces_in_another_order_have_another_checksum() -> None:
    memory = torch.arange(4 * 4096, dtype=torch.int32).view(torch.uint8)
    assert transport.checksum(memory) != transport.checksum(memory.view(4, -1).flip(0).contiguous().view(-1))


@pytest.mark.parametrize("by", ["inline", "shm"])
def test_equal_shapes_that_change_places_change_the_hash(by: str, tiny_job: MakeJob, random_state: RandomState) -> None:
    """A record's hash, by which Flower asks for it, has the names in it; a segment's checksum is of bytes in order."""
    job = tiny_job()
    task = plan(job, start(job))[0]
    ours = random_state(job.layout)
    names = [f"transformer.h.{layer}.mlp.c_fc.weight" for layer in (0, 3)]
    theirs = ours | {names[0]: ours[names[1]], names[1]: ours[names[0]]}
    hashes = []
    for state in (ours, theirs, ours):
        size = Packing.of(job, task.blueprint).segment_bytes
        segment = transport.create(job.run_id, size) if by == "shm" else None
        content = wire.task_to_records(job, job.to_json(), task, state, None, segment)
        hashes.append(segment.handle().checksum if segment else content.array_records["params"].object_id)
        if segment:
            segment.close()
    assert hashes[0] == hashes[2] != hashes[1]


def test_a_task_that_was_changed_on_the_way_is_refused(tiny_job: MakeJob, random_state: RandomState) -> None:
    job = tiny_job()
    state = random_run(job, random_state)
    task, other = plan(job, state)[:2]
    with new_segment(job, task.blueprint) as segment:
        content = task_records(job, state, task, segment)
        segment.memory[1000] += 1
        with pytest.raises(SegmentError, match=r"has checksum 0x\w+, its handle says 0x\w+"):
            wire.task_from_records(job, content)
        task_records(job, state, other, segment)  # the segment's next use
        with pytest.raises(SegmentError, match="has checksum"):
            wire.task_from_records(job, content)
        with pytest.raises(SegmentError, match="is not of this run"):
            wire.task_from_records(replace(job, run_id="another"), content)


def test_a_task_whose_process_died_half_way_says_so(job: Job, tmp_path: Path) -> None:
    """Another process is given the same message, and finds in the segment what the first has begun to train."""
    worker, state = Worker(job, MomentShelf(tmp_path)), start(job)
    task = plan(job, state)[1]
    with new_segment(job, task.blueprint) as segment:
        content = task_records(job, state, task, segment)
        parcel = wire.task_from_records(job, content)
        worker.train(parcel.task, parcel.params, parcel.moments, parcel.in_place)
        asked = Message(content, dst_node_id=1, message_type="train")
        with pytest.raises(SegmentError) as second:
            wire.task_from_records(job, content)
    for reason in (f"<class 'SegmentError'>:<'{second.value}'>", f"Traceback\nx.SegmentError: {second.value}"):
        assert wire.error_of(Message(Error(0, reason), reply_to=asked)) == "its process died while it trained"


def test_a_worker_keeps_its_segment_until_it_fails_to_answer() -> None:
    segments = transport.Segments({"shm": partial(transport.create, "run")})
    segments.deal(dict.fromkeys((0, 1), ("shm", 100)))
    first, other = segments.take(0), segments.take(1)
    assert segments.take(0) is first is segments.get(0) is not other
    segments.deal({0: ("shm", 101), 1: ("shm", 100)})
    larger = segments.take(0)
    assert len(larger.memory) == 101
    late = tensors.open_segment(other.handle(), "run", 100)
    segments.drop(1)
    late.memory.fill_(1)  # where nobody reads
    assert segments.get(1) is None
    assert segments.take(1).memory.sum() == 0
    for handle in (first.handle(), other.handle()):
        with pytest.raises(SegmentError, match="is gone"):
            tensors.open_segment(handle, "run", 100)
    segments.close()
    with pytest.raises(SegmentError, match="is gone"):
        tensors.open_segment(larger.handle(), "run", 101)


@given(st.lists(st.dictionaries(st.integers(0, 4), st.tuples(st.sampled_from(transport.KINDS), st.integers(1, 3)))))
def test_segments_go_from_worker_to_worker_before_any_is_made(rounds: list[dict[int, tuple[str, int]]]) -> None:
    made: list[tuple[str, int]] = []

    class Piece(transport.Segment):
        def __init__(self, kind: str, num_bytes: int) -> None:
            self.kind, self.name, self.memory = kind, "", torch.zeros(num_bytes)  # type: ignore[misc]
            made.append((kind, num_bytes))

        def handle(self) -> transport.Handle:
            raise NotImplementedError

        def close(self) -> None:
            held.subtract([(self.kind, len(self.memory))])

    segments = transport.Segments({kind: partial(Piece, kind) for kind in transport.KINDS})
    held: Counter[tuple[str, int]] = Counter()
    for wanted in rounds:
        before, there, needed = len(made), held.copy(), Counter(wanted.values())
        segments.deal(wanted)
        assert +held == there & needed  # what nobody needs has gone before anything comes
        found = {worker: segments.take(worker) for worker in wanted}
        assert {worker: (each.kind, len(each.memory)) for worker, each in found.items()} == wanted
        assert len({id(each) for each in found.values()}) == len(wanted)
        assert Counter(made[before:]) == needed - there
        held.update(made[before:])


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


def drop_array(name: str) -> Spoil:
    return lambda content: content.array_records["params"].pop(name)


def set_handle(**changes: Any) -> Spoil:
    fields: dict[str, Any] = {"name": "twist_fl-x", "pid": 1, "fd": 3, "num_bytes": 8, "checksum": 9, "weights": 8}
    return lambda content: content.__setitem__("shm", ConfigRecord(fields | changes))


MALFORMED: dict[str, tuple[Spoil, str]] = {
    "nothing": (lambda content: [content.pop(name) for name in list(content)], "reply"),
    "no reply record": (lambda content: content.pop("reply"), "reply"),
    "no tensors": (lambda content: content.pop("params"), "params"),
    "records of the wrong kind": (lambda content: content.__setitem__("params", ConfigRecord({"a": 1})), "params"),
    "no json": (lambda content: content.__setitem__("reply", ConfigRecord({"text": "hello"})), "json"),
    "garbage": (set_json("{not json"), "Expecting property name"),
    "empty text": (set_json(""), "Expecting value"),
    "a list": (set_json("[1, 2]"), "malformed reply"),
    "nested deeply": (set_json("[" * 100_000), "JSON that is nested too deeply"),
    "a field nested deeply": (set_json('{"loss": ' + "[" * 100_000 + "]" * 100_000 + "}"), "nested too deeply"),
    "a hundred megabytes": (
        set_json('"' + "a" * 100_000_000 + '"'),
        r"100000002 characters of JSON: more than 16777216",
    ),
    "more tokens than there are": (
        set_fields(num_tokens=10**400),
        r"num_tokens=1000.*\.\.\..* is no int of at least 1$",
    ),
    "more digits than Python reads": (set_json('{"loss": ' + "1" * 5000 + "}"), "integer string conversion"),
    "NaN seconds": (set_fields(seconds=float("nan")), "seconds=nan is no float of at least 0"),
    "endless seconds": (set_fields(seconds=float("inf")), "seconds=inf is no float of at least 0"),
    "negative seconds": (set_fields(seconds=-1.0), r"seconds=-1\.0 is no float of at least 0"),
    "no step of moments": (set_fields(moment_step=True), "moment_step=True is no int of at least 0 or null"),
    "a long name": (set_fields(**{"x" * 10**6: 1}), r"^malformed reply: ValueError: unknown field 'xxxxxxx.{,60}$"),
    "null": (set_json("null"), "malformed reply"),
    "a missing field": (drop_field("loss"), "loss"),
    "a missing moment_step": (drop_field("moment_step"), "moment_step"),
    "an extra field": (set_fields(extra=1), "extra"),
    "a number for the digest": (set_fields(digest=17), "digest"),
    "text for the loss": (set_fields(loss="low"), "loss"),
    "text for the tokens": (set_fields(num_tokens="60"), "num_tokens"),
    "a negative number of tokens": (set_fields(num_tokens=-60), "num_tokens"),
    "half a batch": (set_fields(num_batches=1.5), "num_batches"),
    "a negative peak": (set_fields(peak_bytes=-1), "peak_bytes=-1 is no int of at least 0"),
    "a peak that is no number": (set_fields(peak_bytes=True), "peak_bytes=True is no int"),
    "a missing peak": (drop_field("peak_bytes"), "peak_bytes"),
    "moments that are not there": (set_fields(moment_step=30), "moment_step=30, where the job's messages hold params"),
    "float64": (set_array(dtype="float64"), r"wte\.weight is float64/raw\.little, expected float32/raw\.little"),
    "numpy's own format": (set_array(stype="numpy.ndarray"), r"is float32/numpy\.ndarray"),
    "too few bytes": (set_array(data=b"\0" * 12), r"wte\.weight has 12 bytes for shape \(300, 32\)"),
    "a larger shape": (set_array(shape=(301, 32)), r"wte\.weight has shape \(301, 32\), expected \(300, 32\)"),
    "a negative shape": (set_array(shape=(-300, -32)), r"has shape \(-300, -32\), expected \(300, 32\)"),
    "a parameter missing": (drop_array("transformer.wpe.weight"), r"'transformer\.wpe\.weight' of 'params' is missing"),
    "no blocks": (drop_array(tensors.BLOCKS), "array 'blocks' of 'params' is missing"),
    "a handle where none was sent": (set_handle(), r"handle of segment 'twist_fl-x', but none was sent"),
    "a handle without a name": (set_handle(name=5), "segment's name=5 is no str"),
    "a handle with a broken number": (set_handle(checksum=0.5), r"segment's checksum=0\.5 is no int"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_reply_is_a_reply_error(case: str, tiny_job: MakeJob, random_state: RandomState) -> None:
    job = tiny_job()
    state = random_run(job, random_state)
    task = plan(job, state)[0]
    reply = Reply(task.digest, dispatch(job, state, task)[0], 1.25, 60, 2)
    content = wire.reply_to_records(job, task.blueprint, reply)
    wire.reply_from_records(job, task.blueprint, content)
    spoil, reason = MALFORMED[case]
    spoil(content)
    tensors.num_bytes(content)
    with pytest.raises(ReplyError, match=reason):
        wire.reply_from_records(job, task.blueprint, content)


def test_what_a_worker_says_is_one_short_line(tiny_job: MakeJob, random_state: RandomState) -> None:
    job = tiny_job()
    state = random_run(job, random_state)
    task = plan(job, state)[0]
    note = "\x1b[31mred\r\n\u202etxt\0" + "x" * 10**6
    reply = Reply(task.digest, dispatch(job, state, task)[0], 1.25, 60, 2, note=note)
    found = wire.reply_from_records(job, task.blueprint, wire.reply_to_records(job, task.blueprint, reply)).note
    assert found.startswith(" [31mred   txt xxx")
    assert len(found) == 300
    assert found.isprintable()


@pytest.mark.parametrize(
    ("partition", "place"),
    [("3", 3), ("9" * 5000, 2**64), ("\u0663", 2**64), ("-1", 2**64), ("", 2**64), ("1.5", 2**64), ("\u00b2", 2**64)],
)
def test_a_place_that_is_no_number_comes_last(partition: str, place: int) -> None:
    assert wire.partition_of(wire.node_record(partition)) == place


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"worker": 3}, "worker=3 is none of the run's clients, 0 to 2"),
        ({"worker": "../x"}, "worker='../x' is no int"),
        ({"round": 10**30}, "is no int of at least 0"),
        ({"num_batches": -1}, "num_batches=-1 is no int of at least 0"),
        ({"spy": 1}, "unknown field 'spy'"),
        ({"blueprint": "[" * 100_000}, "nested too deeply"),
        ({"blueprint": "{}"}, "num_blocks is missing"),
        ({"blueprint": '{"num_blocks": [4, 4], "attn": [[0]], "ffn": [[0]]}'}, "a blueprint of 1 layers"),
        ({"blueprint": '{"num_blocks": [4, 0], "attn": [], "ffn": []}'}, r"num_blocks=\[4, 0\] is no pair"),
        ({"blueprint": '{"num_blocks": [4, 4], "attn": [[0]], "ffn": []}'}, "1 layers with heads and 0 with FFN"),
        ({"blueprint": '{"num_blocks": [4, 4], "attn": [[4]], "ffn": [[0]]}'}, r"attn blocks \[4\] of layer 0"),
        ({"blueprint": '{"num_blocks": [4, 4], "attn": [[0]], "ffn": [[1, 0]]}'}, r"ffn blocks \[1, 0\] of layer 0"),
        ({"blueprint": '{"num_blocks": [4, 4], "attn": [[]], "ffn": [[0]]}'}, r"attn blocks \[\] of layer 0"),
        ({"blueprint": '{"num_blocks": [4, 4], "attn": [[0]], "ffn": ["0"]}'}, "ffn blocks '0' of layer 0"),
    ],
)
def test_a_task_that_is_none_is_refused(
    fields: dict[str, Any], reason: str, tiny_job: MakeJob, random_state: RandomState
) -> None:
    job = tiny_job()
    state = random_run(job, random_state)
    content = wire.task_to_records(job, job.to_json(), plan(job, state)[0], state.params, None)
    told = json.loads(str(content.config_records["task"]["json"]))
    content["task"] = ConfigRecord({"json": json.dumps(told | fields)})
    with pytest.raises(ValueError, match=reason):
        wire.task_from_records(job, content)


def test_a_reply_with_half_of_its_moments(tiny_job: MakeJob, random_state: RandomState) -> None:
    job = tiny_job("train.optimizer_state=server")
    state = random_run(job, random_state)
    task = plan(job, state)[0]
    params, moments = dispatch(job, state, task)
    reply = Reply(task.digest, params, 1.25, 60, 2, moments=moments)
    content = wire.reply_to_records(job, task.blueprint, reply)
    content.pop("exp_avg_sq")
    with pytest.raises(ReplyError, match="exp_avg_sq"):
        wire.reply_from_records(job, task.blueprint, content)


def test_a_reply_by_a_handle_that_is_not_its_own_is_refused(tiny_job: MakeJob, random_state: RandomState) -> None:
    """Another run's or worker's segment, another size, another content."""
    job = tiny_job()
    state = random_run(job, random_state)
    task = plan(job, state)[0]
    reply = Reply(task.digest, dispatch(job, state, task)[0], 1.25, 60, 2)
    size = len(reply.params) and Packing.of(job, task.blueprint).segment_bytes
    with new_segment(job, task.blueprint) as segment:
        content = wire.reply_to_records(job, task.blueprint, reply, segment)
        sent = dict(content.config_records["shm"])
        for change, reason in (
            ({"name": "twist_fl-other-1"}, f"handle of segment 'twist_fl-other-1', expected '{segment.name}'"),
            ({"num_bytes": 12}, f"has 12 bytes, expected {size}"),
            ({"checksum": 12}, "its handle says 0xc"),
        ):
            content["shm"] = ConfigRecord(sent | change)
            with pytest.raises(ReplyError, match=reason):
                wire.reply_from_records(job, task.blueprint, content, segment)
        content["shm"] = ConfigRecord(sent)
        assert same(wire.reply_from_records(job, task.blueprint, content, segment).params, reply.params)
        segment.memory[-1] += 1
        with pytest.raises(ReplyError, match="has checksum"):
            wire.reply_from_records(job, task.blueprint, content, segment)


def test_a_reply_of_another_shape_is_not_spread_over_the_buffer(tiny_job: MakeJob, random_state: RandomState) -> None:
    job = tiny_job()
    state = random_run(job, random_state)
    task = plan(job, state)[0]
    params = dispatch(job, state, task)[0] | {"transformer.ln_f.weight": torch.ones(1)}
    with pytest.raises(ValueError, match=r"^transformer\.ln_f\.weight has shape \(1,\), expected \(32,\)$"):
        wire.reply_to_records(job, task.blueprint, Reply(task.digest, params, 1.25, 60, 2))


# Whether a node shares this machine


def test_a_node_proves_that_it_reads_the_servers_memory(tiny_job: MakeJob) -> None:
    job = tiny_job()
    token = transport.make_token(partial(transport.create, job.run_id))
    asked = wire.question(job.to_json(), [token])
    found = wire.answer(asked, job.run_id, "3")
    assert (wire.partition_of(found), wire.token_of(found, "shm")) == (3, transport.token_text(token))
    assert set(found.config_records["node"]) == {"partition", "shm"}
    assert transport.token_text(token) != transport.token_text(new_token())
    assert wire.token_of(wire.answer(asked, "another run", "3"), "shm") == ""
    assert wire.token_of(wire.answer(wire.question(job.to_json(), []), job.run_id, "3"), "shm") == ""
    token.close()
    found = wire.answer(asked, job.run_id, "3")
    assert wire.token_of(found, "shm") == ""
    assert "is gone" in wire.why_not(found, "shm")


# Why a node failed


@pytest.mark.parametrize(("there", "fits"), [("1.41.7", True), ("1.40.0", False), ("1.4.1", False), ("2.41.0", False)])
def test_a_node_of_another_flower_says_so_when_it_is_asked(
    there: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twist_fl.federation.wire.version", lambda name: "1.41.0")
    asked = wire.question("{}", [])
    monkeypatch.setattr("twist_fl.federation.wire.version", lambda name: there)
    if fits:
        wire.check_flower(asked)
        return
    with pytest.raises(ConfigError, match=rf"^this node has Flower {there} and the server 1\.41\..* on the node$"):
        wire.check_flower(asked)


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
        (
            "Reply message objects are unavailable. The sender may not have completed the upload before the "
            "object-push session expired. Failed to pull object with ID '1a60c1': the node has left",
            "its reply did not come whole: the node has left",
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
    assert tensors.from_arrays(ArrayRecord()) == {}

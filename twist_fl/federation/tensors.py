"""The tensors of a message: in Flower's arrays, or in memory elsewhere with a handle in the message.

Inline, a record has one raw little-endian array with all of the worker's own blocks, and one for each parameter held
whole, identical for all workers, so that Flower's content addressing uploads those once. Else the message carries a
segment's handle (`transport.py`, `flight.py`). Nothing is pickled, and what arrives is read where it lies.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import asdict
from functools import partial
from io import BytesIO
from math import prod

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from twist_fl.blueprint.blocks import Layout
from twist_fl.federation import transport
from twist_fl.federation.packing import DTYPES, Packing
from twist_fl.federation.transport import FlightHandle, Handle, Segment, SegmentError, SharedHandle
from twist_fl.model.subnet import Copies, State, copy_all
from twist_fl.system.untrusted import Field, shown
from twist_fl.training.aggregate import ReplyError
from twist_fl.training.interval import Moments

_ANY_HANDLE = {"name": Field(str), "num_bytes": Field(int, 1), "checksum": Field(int, 0)}
_HANDLES: dict[str, tuple[type[Handle], dict[str, Field]]] = {
    "shm": (SharedHandle, _ANY_HANDLE | {"pid": Field(int, 1), "fd": Field(int, 0)}),
    "flight": (FlightHandle, _ANY_HANDLE | dict.fromkeys(("location", "certificate", "down", "up"), Field(str))),
}
"""For each transport, whose name that of a message's record is: what a handle is, and its fields."""
_STYPE = "raw.little"
BLOCKS = "blocks"
"""Name of the array with a record's divided parameters; a parameter's name has a dot in it."""

Take = Callable[[Layout, str, torch.Tensor, torch.Tensor], Copies]
"""take(layout, name, value, out): what puts the parameter's value, or the part that travels, into `out`."""
KnownArrays = MutableMapping[tuple[str, str], Array]
"""Arrays made before in the same round, by record and parameter: made, and hashed by Flower, once for all workers."""


# Arrays


def _new_array(shape: tuple[int, ...], dtype: str, take: Callable[[torch.Tensor], Copies]) -> Array:
    """An array whose bytes the copies of `take` fill in place."""
    # BytesIO lends its bytes for writing and then gives them away: both without a copy.
    stream = BytesIO(bytes(prod(shape) * DTYPES[dtype].itemsize))
    copy_all(take(torch.frombuffer(stream.getbuffer(), dtype=DTYPES[dtype]).view(shape)))
    return Array(dtype=dtype, shape=shape, stype=_STYPE, data=stream.getvalue())


def _look_into(name: str, array: Array, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """The array's bytes as a tensor, not copied: nobody may write into it. Raises ReplyError if it is another array."""
    if (array.dtype, array.stype) != (dtype, _STYPE):
        raise ReplyError(f"{name} is {array.dtype}/{array.stype}, expected {dtype}/{_STYPE}")
    if tuple(array.shape) != shape:
        raise ReplyError(f"{name} has shape {tuple(array.shape)}, expected {shape}")
    if not all(type(size) is int and size > 0 for size in shape):
        raise ReplyError(f"{name} has shape {shape}: every size must be at least 1")
    if len(array.data) != DTYPES[dtype].itemsize * prod(shape):
        raise ReplyError(f"{name} has {len(array.data)} bytes for shape {shape}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(array.data, dtype=DTYPES[dtype]).view(shape)


def to_arrays(state: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """Tensors of a dtype that travels as raw arrays, one each, one copy each."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    return ArrayRecord(
        {
            name: _new_array(tuple(tensor.shape), names[tensor.dtype], partial(_copy, name, tensor))
            for name, tensor in state.items()
        }
    )


def from_arrays(record: ArrayRecord) -> State:
    """Tensors to be read only. Raises ReplyError for an array that is not as `to_arrays` makes it."""
    found = {}
    for name, array in record.items():
        if array.dtype not in DTYPES:
            raise ReplyError(f"{name} is {shown(array.dtype)}, expected one of {', '.join(DTYPES)}")
        found[name] = _look_into(name, array, tuple(array.shape), array.dtype)
    return found


# All tensors of a message


def put_tensors(
    content: RecordDict,
    packing: Packing,
    params: State,
    moments: Moments | None,
    take: Take,
    segment: Segment | None,
    known: KnownArrays,
) -> None:
    states = {"params": params} | (moments.values if moments else {})
    if segment is None:
        for record, layout in packing.layouts.items():
            content[record] = _pack(packing, record, states[record], partial(take, layout), known)
        return
    views = packing.views_of_all(segment.memory)
    outs = [(record, name, out) for record in views for name, out in views[record].items()]
    copy_all(
        pair for record, name, out in outs for pair in take(packing.layouts[record], name, states[record][name], out)
    )
    sizes = {record: packing.num_bytes(record) for record in packing.layouts}
    sizes = {"weights": sizes.pop("params"), "moments": sum(sizes.values())}
    put_handle(content, segment, sizes)


def _pack(
    packing: Packing,
    record: str,
    state: State,
    take: Callable[[str, torch.Tensor, torch.Tensor], Copies],
    known: KnownArrays,
) -> ArrayRecord:
    """One array for the blocks, one for each parameter held whole."""
    dtype = packing.dtype(record)
    arrays = ArrayRecord()  # its constructor copies arrays, and with them loses the hashes
    for param in packing.shared(record):
        place = record, param.name
        if place not in known:
            known[place] = _new_array(param.shape, dtype, partial(take, param.name, state[param.name]))
        arrays[param.name] = known[place]

    blocks = packing.blocks(record)

    def take_own(buffer: torch.Tensor) -> Copies:
        for name, out in packing.views(record, blocks, buffer).items():
            yield from take(name, state[name], out)

    if blocks:
        arrays[BLOCKS] = _new_array((packing.num_elements(record, blocks),), dtype, take_own)
    return arrays


def get_tensors(
    content: RecordDict, packing: Packing, step: int | None, segment: Segment | None
) -> tuple[State, Moments | None]:
    """Weights in the dtype of the wire, and moments, where they lie. What came inline cannot be written into."""
    if (step is None) != (len(packing.layouts) == 1):
        raise ValueError(f"moment_step={step}, where the job's messages hold {', '.join(packing.layouts)}")
    handle = handle_of(content)
    if handle is None:
        states = {record: _unpack(packing, record, content.array_records[record]) for record in packing.layouts}
    else:
        states = packing.views_of_all(_checked(segment, handle, packing))
    params = states.pop("params")
    return params, None if step is None else Moments(step, states)


def _checked(segment: Segment | None, handle: Handle, packing: Packing) -> torch.Tensor:
    """The segment's memory, if the handle is its and it holds what was written. Raises SegmentError."""
    if segment is None:
        raise SegmentError(f"handle of segment {handle.name!r}, but none was sent")
    if handle.num_bytes != packing.segment_bytes:
        raise SegmentError(f"segment {handle.name} has {handle.num_bytes} bytes, expected {packing.segment_bytes}")
    segment.check(handle)
    return segment.memory


def _unpack(packing: Packing, record: str, arrays: ArrayRecord) -> State:
    dtype = packing.dtype(record)
    expected, blocks = {param.name: param.shape for param in packing.shared(record)}, packing.blocks(record)
    if blocks:
        expected[BLOCKS] = (packing.num_elements(record, blocks),)
    if wrong := expected.keys() ^ arrays.keys():
        raise ReplyError(f"array {min(wrong)!r} of {record!r} is missing or unknown ({len(wrong)} in all)")
    found = {name: _look_into(name, arrays[name], shape, dtype) for name, shape in expected.items()}
    if blocks:
        found |= packing.views(record, blocks, found.pop(BLOCKS))
    return {param.name: found[param.name] for param in packing.layouts[record].params}


def take_whole(layout: Layout, name: str, value: torch.Tensor, out: torch.Tensor) -> Copies:
    return _copy(name, value, out)


def _copy(name: str, value: torch.Tensor, out: torch.Tensor) -> Copies:
    if value.shape != out.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(out.shape)}")
    if value.data_ptr() != out.data_ptr():  # a worker's tensors, trained in place, are there already
        yield value, out


def put_handle(content: RecordDict, segment: Segment, sizes: Mapping[str, int] = {}) -> None:
    """`sizes`: bytes of the weights and of the moments in it."""
    content[segment.kind] = ConfigRecord({**asdict(segment.handle()), **sizes})


def handle_of(content: RecordDict, kind: str = "") -> Handle | None:
    """The handle in a message whose tensors lie elsewhere, of any kind or this one. Raises ValueError if it is
    malformed."""
    kind = kind or transport_of(content)
    if kind not in content.config_records:
        return None
    handle, expected = _HANDLES[kind]
    fields = dict(content.config_records[kind])
    for name, field in expected.items():
        if not field.holds(fields.get(name)):
            raise ValueError(f"segment's {name}={shown(fields.get(name))} is no {field}")
    return handle(**{name: fields[name] for name in expected})  # type: ignore[arg-type]


def open_segment(handle: Handle, run_id: str, num_bytes: int, probing: bool = False) -> Segment:
    """The server's segment in a worker. Raises SegmentError if it is not this run's, gone, or not as large as it must
    be: then no memory is taken for it."""
    if handle.num_bytes != num_bytes:
        raise SegmentError(f"segment {handle.name} has {handle.num_bytes} bytes, expected {num_bytes}")
    if isinstance(handle, SharedHandle):
        return transport.attach(handle, run_id)
    assert isinstance(handle, FlightHandle)
    from twist_fl.federation import flight  # loads Arrow Flight, which few runs need

    return flight.fetch(handle, run_id, probing)


# Sizes


def num_bytes(content: RecordDict) -> dict[str, int]:
    """Bytes of the weights, of the optimiser's moments, and of everything else, however they travel."""
    sizes = {name: sum(len(array.data) for array in record.values()) for name, record in content.array_records.items()}
    weights = sizes.pop("params", 0)
    moments = sum(sizes.values())
    segment = content.config_records.get(transport_of(content), ConfigRecord())
    weights += _said(segment, "weights")
    moments += _said(segment, "moments")
    other = sum(len(record.deflate()) for record in content.config_records.values())
    return {"weights": weights, "moments": moments, "other": other}


def _said(segment: ConfigRecord, name: str) -> int:
    """A size that the sender gives of its part of a segment; what is no number counts as nothing."""
    size = segment.get(name)
    return size if type(size) is int and 0 <= size < 2**63 else 0


def transport_of(content: RecordDict) -> str:
    """How the message's tensors travel: shm, flight or inline."""
    return next((kind for kind in _HANDLES if kind in content.config_records), "inline")

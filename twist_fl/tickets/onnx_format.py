"""A ticket for onnxruntime: one step of the model with its KV cache, whose heads may differ from layer to layer.

Inputs `input_ids` and `position_ids` (batch, new tokens) and `past_key_values.N.key` and `.value` (batch, KV heads of
layer N, past tokens, d_head), which are empty at first; outputs `logits` and the longer caches, `present.N.key` and
`.value`. All texts of a batch are of one length: there is no padding.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from twist_fl.blueprint.architectures import architecture_of
from twist_fl.blueprint.blocks import make_layout
from twist_fl.data.tokenizer import copy_tokenizer
from twist_fl.system.plugins import needs
from twist_fl.tickets.checking import Answers, Probe, answers, check_dtype
from twist_fl.tickets.export import Ticket

FILE = "model.onnx"
DTYPES = ("float32", "int8")
_OPSET = 18


def write(ticket: Ticket, folder: Path, tokenizer_folder: Path | None, dtype: str) -> str:
    """`model.onnx` in `folder`, with the tokenizer beside it, checked in onnxruntime."""
    check_dtype("onnx", dtype, DTYPES)
    needs("onnx", "onnxscript", "onnxruntime", extra="onnx")
    probe = Probe(ticket)
    d_head = make_layout(ticket.model_config, ticket.blueprint.num_blocks[1]).sizes["d_head"]
    shapes = [(heads, d_head) for heads in ticket.model_config["heads_per_layer"]]
    whole = folder / (FILE if dtype == "float32" else f"float32-{FILE}")
    _write_step(probe.model, shapes, whole)
    if dtype == "int8":
        _in_bytes(whole, folder / FILE)
    if tokenizer_folder:
        positions = architecture_of(ticket.model_config).keys["n_positions"]
        copy_tokenizer(tokenizer_folder, folder, ticket.model_config[positions])
    return f"onnxruntime: {probe.compare(_answers(folder / FILE, shapes, probe.tokens), exact=dtype == 'float32')}"


class _Step(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, position_ids: Any, *past: Any) -> tuple[Any, ...]:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        output = self.model(input_ids=input_ids, position_ids=position_ids, past_key_values=cache, use_cache=True)
        present = [each for layer in output.past_key_values.layers for each in (layer.keys, layer.values)]
        return output.logits, *present


def _names(prefix: str, shapes: Sequence[tuple[int, int]]) -> list[str]:
    return [f"{prefix}.{layer}.{each}" for layer in range(len(shapes)) for each in ("key", "value")]


def _write_step(model: Any, shapes: Sequence[tuple[int, int]], file: Path) -> None:
    """The numbers of tokens and texts stay open: those of the example are unlike each other and unlike 1."""
    model.set_attn_implementation("eager")
    batch, past, new = 2, 3, 5
    cache = tuple(torch.zeros(batch, heads, past, d_head) for heads, d_head in shapes for _ in range(2))
    tokens = torch.zeros(batch, new, dtype=torch.int64)
    positions = torch.arange(past, past + new).repeat(batch, 1)
    some = torch.export.Dim.DYNAMIC
    open_sizes = ({0: some, 1: some}, {0: some, 1: some}, tuple({0: some, 2: some} for _ in cache))
    with _quietly():
        program: Any = torch.onnx.export(
            _Step(model).eval(),
            (tokens, positions, *cache),
            dynamo=True,
            dynamic_shapes=open_sizes,
            input_names=["input_ids", "position_ids", *_names("past_key_values", shapes)],
            output_names=["logits", *_names("present", shapes)],
            opset_version=_OPSET,
            verbose=False,
        )
        program.save(file)


@contextmanager
def _quietly() -> Iterator[None]:
    """The exporter warns of its own old code, and of packages that nothing here needs."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _in_bytes(whole: Path, file: Path) -> None:
    """Weights of 8 bits, a scale for each output; what they are multiplied with is rounded when it is known.

    Both without a sign: products of bytes with and without one overflow on processors that lack VNNI.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quietly():
        quantize_dynamic(whole, file, weight_type=QuantType.QUInt8, per_channel=True)
    for each in (whole, whole.with_name(f"{whole.name}.data")):
        each.unlink(missing_ok=True)


def _answers(file: Path, shapes: Sequence[tuple[int, int]], tokens: Sequence[int]) -> Answers:
    """The first half at once, all others one by one: what a device does."""
    import numpy as np
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = 1
    session = InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = _names("past_key_values", shapes)
    cache = [np.zeros((1, heads, 0, d_head), np.float32) for heads, d_head in shapes for _ in range(2)]
    half, said = len(tokens) // 2, list[Any]()
    for start, end in [(0, half), *((place, place + 1) for place in range(half, len(tokens)))]:
        given = {"input_ids": np.array([tokens[start:end]]), "position_ids": np.arange(start, end)[None]}
        logits, *cache = session.run(None, given | dict(zip(names, cache, strict=True)))
        said.append(torch.from_numpy(logits[0]))
    return answers(torch.cat(said), tokens)

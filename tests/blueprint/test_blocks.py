"""The block table against the real model and a naive per-head oracle (spec, section 1)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from twist_fl.blueprint.blocks import Layout, Param, make_layout, runs
from twist_fl.model.subnet import copy_all, take_blocks
from twist_fl.training.job import Job

SMALL: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 12,
    "n_head": 4,
    "n_inner": 30,
    "n_layer": 3,
    "vocab_size": 11,
    "n_positions": 7,
}


def real_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 3), st.data())
def test_index_is_the_naive_one(num_blocks: int, width: int, sections: int, data: st.DataObject) -> None:
    held = data.draw(st.sets(st.integers(0, num_blocks - 1), min_size=1).map(sorted))
    param = Param("x", (2, sections * num_blocks * width), 0, "attn", 1, sections, width)
    positions = torch.arange(sections * num_blocks * width).view(sections, num_blocks, width)
    assert param.index(held) == positions[:, held].flatten().tolist()
    assert param.shape_with(len(held)) == (2, len(param.index(held)))


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2), st.data())
def test_blocks_are_taken_as_the_index_says(
    num_blocks: int, width: int, sections: int, dim: int, data: st.DataObject
) -> None:
    held = data.draw(st.sets(st.integers(0, num_blocks - 1), min_size=1).map(sorted))
    shape = [2, 3, 2]
    shape[dim] = sections * num_blocks * width
    param = Param("x", tuple(shape), 0, "attn", dim, sections, width)
    whole = torch.randn(shape)
    out = torch.empty(param.shape_with(len(held)))
    copy_all(take_blocks(param, held, whole, out))
    assert torch.equal(out, whole.index_select(dim, torch.tensor(param.index(held))))


def test_runs_join_neighbours_with_equal_tags() -> None:
    assert list(runs([0, 1, 2, 5, 7, 8])) == [
        (slice(0, 3), slice(0, 3)),
        (slice(5, 6), slice(3, 4)),
        (slice(7, 9), slice(4, 6)),
    ]
    assert list(runs(range(4), ["a", "b", "b", "a"])) == [
        (slice(a, b), slice(a, b)) for a, b in ((0, 1), (1, 3), (3, 4))
    ]


def test_c_attn_gives_each_head_its_query_key_and_value() -> None:
    c_attn = make_layout(SMALL, 5).by_name["transformer.h.1.attn.c_attn.weight"]
    assert c_attn.index([1, 3]) == [3, 4, 5, 9, 10, 11, 15, 16, 17, 21, 22, 23, 27, 28, 29, 33, 34, 35]


def test_ffn_block_is_d_inner_over_r_neurons() -> None:
    layout = make_layout(SMALL, 5)
    assert layout.by_name["transformer.h.0.mlp.c_fc.bias"].index([4]) == [24, 25, 26, 27, 28, 29]
    assert layout.by_name["transformer.h.0.mlp.c_proj.weight"].dim == 0
    assert layout.num_blocks == (4, 5)


@pytest.mark.parametrize("config", [{}, {"n_inner": None}, {"n_layer": 1}, {"n_embd": 8, "n_head": 2}])
def test_names_shapes_and_order_are_the_real_models(config: dict[str, Any]) -> None:
    sizes = SMALL | config
    layout = make_layout(sizes, 2)
    real = real_shapes(GPT2Config(**sizes))
    assert [(param.name, param.shape) for param in layout.params] == list(real.items())
    layout.check_names(real)


def test_what_is_divided_is_what_the_spec_says() -> None:
    divided = {param.name: param.kind for param in make_layout(SMALL, 5).params if param.layer == 0 and param.kind}
    assert divided == {
        "transformer.h.0.attn.c_attn.weight": "attn",
        "transformer.h.0.attn.c_attn.bias": "attn",
        "transformer.h.0.attn.c_proj.weight": "attn",
        "transformer.h.0.mlp.c_fc.weight": "ffn",
        "transformer.h.0.mlp.c_fc.bias": "ffn",
        "transformer.h.0.mlp.c_proj.weight": "ffn",
    }


def test_num_params_counts_the_subnet(tiny_job: Callable[..., Job]) -> None:
    job = tiny_job()  # d_model 32, heads of 8, FFN blocks of 32 neurons; two of four are held in two layers
    head, ffn_block = 4 * 32 * 8 + 3 * 8, 2 * 32 * 32 + 32
    for blueprint in job.blueprints(1):
        assert job.layout.num_params(blueprint) == job.layout.num_params() - 4 * head - 4 * ffn_block


def shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    return {param.name: param.shape for param in layout.params}


def test_a_parameter_the_table_does_not_know_is_an_error() -> None:
    layout = make_layout(SMALL, 5)
    with pytest.raises(ValueError, match=re.escape("'lm_head.weight' is not in the block table")):
        layout.check_names(shapes(layout) | {"lm_head.weight": (11, 12)})


def test_a_missing_parameter_is_an_error() -> None:
    layout = make_layout(SMALL, 5)
    some = {name: shape for name, shape in shapes(layout).items() if "ln_f" not in name}
    with pytest.raises(ValueError, match=re.escape("'transformer.ln_f.bias' is missing (2 in all)")):
        layout.check_names(some)


def test_a_wrong_shape_is_an_error() -> None:
    layout = make_layout(SMALL, 5)
    with pytest.raises(ValueError, match=re.escape("ln_f.bias has shape (13,), expected (12,)")):
        layout.check_names(shapes(layout) | {"transformer.ln_f.bias": (13,)})


def test_blocks_of_unequal_size_are_refused_and_the_nearest_number_named() -> None:
    with pytest.raises(ValueError, match=r"ffn_blocks=4 does not divide the 30 FFN neurons: use (3|5)"):
        make_layout(SMALL)  # as many as heads by default
    with pytest.raises(ValueError, match="ffn_blocks=0 does not divide the 30 FFN neurons: use 1"):
        make_layout(SMALL, 0)


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="model_type 'mamba' has no block table; known: gpt2"):
        make_layout(SMALL | {"model_type": "mamba"})

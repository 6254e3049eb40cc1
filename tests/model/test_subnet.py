"""Physical subnet = masked full model, for logits and gradients (spec, sections 3, 4 and 7)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import D_HEAD, FFN_BLOCKS, HEADS, NEURONS
from families import UNEVEN_GPT2 as CONFIG
from families import UNEVEN_LAYOUT as LAYOUT
from transformers import GPT2LMHeadModel, PreTrainedModel

from twist_fl.blueprint.architectures import KINDS
from twist_fl.blueprint.blueprint import Blueprint, Scale
from twist_fl.blueprint.division import Division, Setting
from twist_fl.blueprint.drawing import draw_round, draw_ticket, full_blueprint
from twist_fl.model.subnet import (
    ModelCache,
    State,
    attach_factors,
    build_model,
    fold_scale,
    get_state,
    load_state,
    slice_state,
)
from twist_fl.training.interval import next_token_loss

SETTINGS: list[Setting] = ["attn", "ffn", "both"]
SCALES: list[Scale] = ["sqrt", "linear", "none"]
RandomState = Callable[..., State]


def ticket(setting: Setting = "both", draw: int = 0) -> Blueprint:
    return draw_ticket(LAYOUT, Division(setting, (), 1, 2), (3, 2), seed=0, draw=draw)


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(seed))


def in_precision(model: PreTrainedModel, state: State) -> PreTrainedModel:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(next(iter(state.values())).dtype)
    model.train(False)
    return model


def full_model(state: State) -> PreTrainedModel:
    """Hugging Face's own class, untouched, in the state's precision."""
    model = in_precision(GPT2LMHeadModel(CONFIG), state)
    load_state(model, state)
    return model


def physical_model(state: State, blueprint: Blueprint, scale: Scale) -> PreTrainedModel:
    model = in_precision(build_model(CONFIG, LAYOUT, blueprint, scale), state)
    load_state(model, slice_state(LAYOUT, state, blueprint))
    return model


def masked_model(state: State, blueprint: Blueprint, scale: Scale) -> PreTrainedModel:
    """The whole model; what the blueprint does not name is multiplied by zero."""

    def mask(kind: Any, layer: int) -> torch.Tensor:
        num_full, width = (HEADS, D_HEAD) if kind == "attn" else (FFN_BLOCKS, NEURONS)
        blocks = torch.zeros(num_full, dtype=next(iter(state.values())).dtype)
        held = blueprint.held(kind, layer)
        ratio = num_full / len(held)
        blocks[list(held)] = {"sqrt": ratio**0.5, "linear": ratio, "none": 1.0}[scale]
        return blocks.repeat_interleave(width)

    model = full_model(state)
    attach_factors(model, LAYOUT, mask)
    return model


def gradients(model: PreTrainedModel) -> tuple[torch.Tensor, State]:
    logits = model(tokens(), use_cache=False).logits
    # Random weights on the logits: every one of them counts, and no symmetry hides an error.
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(logits)
    (logits * weights).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(((ours - theirs).abs().max() / theirs.abs().max()).detach())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_against_the_masked_model_in_float64(setting: Setting, scale: Scale, random_state: RandomState) -> None:
    state, blueprint = random_state(LAYOUT, dtype=torch.float64), ticket(setting)
    ours, our_grads = gradients(physical_model(state, blueprint, scale))
    theirs, their_grads = gradients(masked_model(state, blueprint, scale))
    assert relative(ours, theirs) < 1e-10
    sliced = slice_state(LAYOUT, their_grads, blueprint)
    assert our_grads.keys() == sliced.keys()
    for name, grad in our_grads.items():
        torch.testing.assert_close(grad, sliced[name], rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("setting", SETTINGS)
def test_against_the_masked_model_in_float32(setting: Setting, random_state: RandomState) -> None:
    state, blueprint = random_state(LAYOUT), ticket(setting)
    ours, our_grads = gradients(physical_model(state, blueprint, "sqrt"))
    theirs, their_grads = gradients(masked_model(state, blueprint, "sqrt"))
    assert relative(ours, theirs) < 1e-5
    largest = max(float(grad.abs().max()) for grad in their_grads.values())
    for name, grad in slice_state(LAYOUT, their_grads, blueprint).items():
        assert float((our_grads[name] - grad).abs().max()) < 1e-5 * largest, name


def test_blocks_that_are_not_held_get_no_gradient(random_state: RandomState) -> None:
    """So the masked variant's dropped blocks do not move under Adam without weight decay."""
    blueprint = ticket()
    _, grads = gradients(masked_model(random_state(LAYOUT), blueprint, "sqrt"))
    for param in LAYOUT.params:
        held = LAYOUT.held(param, blueprint)
        if held is not None:
            others = sorted(set(range(param.shape[param.dim])) - set(param.index(held)))
            assert not grads[param.name].index_select(param.dim, torch.tensor(others)).any(), param.name


@pytest.mark.parametrize("output", ["attn.c_proj.bias", "mlp.c_proj.bias"])
def test_the_comparison_would_see_a_dropped_or_scaled_shared_bias(output: str, random_state: RandomState) -> None:
    state, blueprint = random_state(LAYOUT, dtype=torch.float64), ticket()
    wanted = masked_model(state, blueprint, "sqrt")(tokens()).logits
    for factor in (0.0, blueprint.factor("attn", 1, "sqrt")):
        model = physical_model(state, blueprint, "sqrt")
        with torch.no_grad():
            model.get_parameter(f"transformer.h.1.{output}").mul_(factor)
        assert relative(model(tokens()).logits, wanted) > 1e-3


def scattered(state: State, folded: State, blueprint: Blueprint) -> State:
    """A full state whose blocks outside the subnet are zero, element by element."""
    full = {}
    for param in LAYOUT.params:
        held = LAYOUT.held(param, blueprint)
        value = folded[param.name]
        if held is not None:
            whole = torch.zeros(param.shape, dtype=value.dtype)
            for position, index in enumerate(param.index(held)):
                whole.select(param.dim, index).copy_(value.select(param.dim, position))
            value = whole
        full[param.name] = value
    return full


@pytest.mark.parametrize("scale", SCALES)
def test_folded_slice_in_a_plain_model_without_hooks(scale: Scale, random_state: RandomState) -> None:
    """The dropped head has zero output rows, the scale sits in the weight: Hugging Face's model needs no help."""
    state, blueprint = random_state(LAYOUT, dtype=torch.float64), ticket()
    folded = fold_scale(LAYOUT, state, blueprint, scale)
    theirs = full_model(scattered(state, folded, blueprint))(tokens()).logits
    hooked = physical_model(state, blueprint, scale)(tokens()).logits
    without_hooks = in_precision(build_model(CONFIG, LAYOUT, blueprint, "none"), state)
    load_state(without_hooks, folded)
    assert relative(hooked, theirs) < 1e-10
    assert relative(without_hooks(tokens()).logits, hooked) < 1e-12


def test_folding_leaves_the_state_as_it_was(random_state: RandomState) -> None:
    state = random_state(LAYOUT)
    before = copy.deepcopy(state)
    folded, name = fold_scale(LAYOUT, state, ticket(), "sqrt"), "transformer.h.1.mlp.c_proj.weight"
    assert all(torch.equal(state[name], before[name]) for name in state)
    assert not torch.equal(folded[name], slice_state(LAYOUT, before, ticket())[name])


def test_scales_differ(random_state: RandomState) -> None:
    state = random_state(LAYOUT, dtype=torch.float64)
    logits = [physical_model(state, ticket(), scale)(tokens()).logits for scale in SCALES]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert relative(logits[i], logits[j]) > 1e-3


def test_slices_are_concatenated_blocks(random_state: RandomState) -> None:
    state, blueprint = random_state(LAYOUT), ticket()
    sliced = slice_state(LAYOUT, state, blueprint)
    heads, blocks = blueprint.held("attn", 1), blueprint.held("ffn", 1)
    layer = "transformer.h.1."
    qkv = [section.chunk(HEADS, dim=1) for section in state[layer + "attn.c_attn.weight"].chunk(3, dim=1)]
    expected = torch.cat([section[head] for section in qkv for head in heads], dim=1)
    assert torch.equal(sliced[layer + "attn.c_attn.weight"], expected)
    rows = state[layer + "attn.c_proj.weight"].chunk(HEADS)
    assert torch.equal(sliced[layer + "attn.c_proj.weight"], torch.cat([rows[head] for head in heads]))
    neurons = state[layer + "mlp.c_fc.bias"].chunk(FFN_BLOCKS)
    assert torch.equal(sliced[layer + "mlp.c_fc.bias"], torch.cat([neurons[block] for block in blocks]))
    assert sliced[layer + "mlp.c_proj.bias"] is state[layer + "mlp.c_proj.bias"]


def test_the_slice_of_the_full_blueprint_is_the_state_itself(random_state: RandomState) -> None:
    state = random_state(LAYOUT)
    sliced = slice_state(LAYOUT, state, full_blueprint(LAYOUT))
    assert list(sliced) == list(state)
    assert all(sliced[name] is state[name] for name in state)


@pytest.mark.parametrize("setting", SETTINGS)
def test_counts_and_shapes_are_the_real_models(setting: Setting, random_state: RandomState) -> None:
    blueprint = ticket(setting)
    model = build_model(CONFIG, LAYOUT, blueprint, "sqrt")
    own = {name: tuple(p.shape) for name, p in model.named_parameters()}
    LAYOUT.check_names(own, blueprint)
    assert LAYOUT.num_params(blueprint) == sum(p.numel() for p in model.parameters())
    sliced = slice_state(LAYOUT, random_state(LAYOUT), blueprint)
    assert LAYOUT.num_params(blueprint) == sum(tensor.numel() for tensor in sliced.values())
    assert LAYOUT.num_params(blueprint) < LAYOUT.num_params()


def test_the_full_blueprint_is_the_plain_model_bit_for_bit(random_state: RandomState) -> None:
    state = random_state(LAYOUT)
    model = physical_model(state, full_blueprint(LAYOUT), "linear")
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(tokens()).logits, full_model(state)(tokens()).logits)


def test_the_tied_head_stays_tied_and_is_stored_once() -> None:
    model = build_model(CONFIG, LAYOUT, ticket(), "sqrt")
    assert model.get_submodule("lm_head").weight is model.get_submodule("transformer.wte").weight
    assert set(get_state(model)) == set(LAYOUT.by_name)


def test_each_worker_of_an_unequal_round_has_its_own_scale(random_state: RandomState) -> None:
    state = random_state(LAYOUT, dtype=torch.float64)
    division = Division("both", ((1, 3), (2, 1), (3, 2)), 1, 2)
    division.check(LAYOUT)
    for blueprint in draw_round(LAYOUT, division, 0, 1):
        ours = physical_model(state, blueprint, "sqrt")(tokens()).logits
        assert relative(ours, masked_model(state, blueprint, "sqrt")(tokens()).logits) < 1e-10


def test_one_warm_model_serves_all_blueprints_of_a_shape(random_state: RandomState) -> None:
    models = ModelCache(CONFIG, LAYOUT, "sqrt")
    for seed in (0, 1):
        for draw in (0, 1):
            state, blueprint = random_state(LAYOUT, seed), ticket(draw=draw)
            warm = models.load_sliced(blueprint, state)
            cold = physical_model(state, blueprint, "sqrt")
            assert torch.equal(next_token_loss(warm.train(False), tokens()), next_token_loss(cold, tokens()))
    assert models.load_sliced(ticket(), state) is models.load_sliced(ticket(draw=1), state)
    assert models.load_sliced(ticket("attn"), state) is not models.load_sliced(ticket(), state)


def test_loading_does_not_alias_the_state(random_state: RandomState) -> None:
    """Training the warm model must not move the server's parameters."""
    state = random_state(LAYOUT)
    before = copy.deepcopy(state)
    model = ModelCache(CONFIG, LAYOUT, "sqrt").load_sliced(ticket(), state)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_load_state_names_what_is_missing(random_state: RandomState) -> None:
    state = random_state(LAYOUT)
    del state["transformer.ln_f.bias"]
    with pytest.raises(KeyError, match=r"transformer\.ln_f\.bias"):
        load_state(GPT2LMHeadModel(CONFIG), state)


def test_every_kind_has_an_output_projection_in_the_model() -> None:
    model = GPT2LMHeadModel(CONFIG)
    names = [LAYOUT.outputs[kind].format(layer=layer) for kind in KINDS for layer in range(LAYOUT.num_layers)]
    assert len({id(model.get_submodule(name)) for name in names}) == 2 * CONFIG.n_layer

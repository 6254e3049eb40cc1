"""Slice a state by a blueprint, and build the physically smaller model that holds the slice (section 3.2).

A state is a dict of tensors named as in the Hugging Face model, without the tied head. A subnet is the
same model class with narrower projections; scale and mask are one factor on the input of each output
projection, so the shared output bias is never scaled.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from twist_fl.blueprint.architectures import KINDS
from twist_fl.blueprint.blocks import Layout, Param, runs
from twist_fl.blueprint.blueprint import Blueprint, Scale
from twist_fl.model.shared_keys import read_keys, share_keys
from twist_fl.model.subnet_classes import model_class, subnet_fields
from twist_fl.system.errors import ConfigError
from twist_fl.system.threads import for_each, pieces

State = dict[str, torch.Tensor]
ALIGNMENT = 64
"""Bytes of a cache line: torch's own tensors begin at a multiple of it."""

CAUSAL = "sdpa_causal"
"""SDPA without a mask function: whole windows need no mask but the causal one, which the kernel makes itself.

Hugging Face's own "sdpa" looks for packed sequences in every forward pass, which waits for the GPU, and compiled
it builds an explicit mask, which the fast kernels refuse. The same numbers, bit for bit.
"""
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


def slice_state(layout: Layout, state: Mapping[str, torch.Tensor], blueprint: Blueprint) -> State:
    """The parameters `blueprint` names: block ones as one concatenated sub-matrix, shared ones as they are.

    Parameters held whole are not copied.
    """
    sliced = {}
    for param in layout.params:
        tensor, held = state[param.name], layout.held(param, blueprint)
        if held is not None:
            whole, tensor = tensor, tensor.new_empty(param.shape_with(len(held)))
            copy_all(take_blocks(param, held, whole, tensor))
        sliced[param.name] = tensor
    return sliced


Copies = Iterator[tuple[torch.Tensor, torch.Tensor]]
"""Pairs (from, to) of equal shapes, for `copy_all`."""


def take_blocks(param: Param, held: Sequence[int], whole: torch.Tensor, out: torch.Tensor) -> Copies:
    """What puts the blocks `held` of the full parameter `whole` into `out`, of shape `param.shape_with(len(held))`.

    Neighbouring blocks go in one strided copy, at the speed of memory; `out` may lie in any buffer.
    """
    source = whole.reshape(param.blocked(param.num_blocks))
    target = out.view(param.blocked(len(held)))
    for blocks, positions in runs(held):
        yield source[:, :, blocks], target[:, :, positions]


def take_slice(layout: Layout, blueprint: Blueprint, name: str, tensor: torch.Tensor, out: torch.Tensor) -> Copies:
    """What puts `slice_state`'s part of one parameter into `out`, in `out`'s dtype, without a copy in between."""
    param = layout.by_name[name]
    held = layout.held(param, blueprint)
    return iter([(tensor, out)]) if held is None else take_blocks(param, held, tensor, out)


def copy_all(copies: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy each first into its second."""
    for_each(lambda pair: pair[1].copy_(pair[0]), [(a[at], b[at]) for a, b in copies for at in pieces(a.shape)])


def mask_state(layout: Layout, state: Mapping[str, torch.Tensor], blueprint: Blueprint) -> State:
    """The whole state with zeros for the blocks that `blueprint` does not name; what it holds whole is not copied."""
    masked = dict(state)
    for param in layout.params:
        held = layout.held(param, blueprint)
        if held is not None:
            masked[param.name] = torch.zeros_like(state[param.name])
            shape = param.blocked(param.num_blocks)
            source, target = state[param.name].reshape(shape), masked[param.name].view(shape)
            for blocks, _ in runs(held):
                target[:, :, blocks].copy_(source[:, :, blocks])
    return masked


def get_state(model: nn.Module) -> State:
    """The model's own parameters, not copied; a tied head appears once, as the embedding."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def load_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copy `state` into the model's parameters in place. Raises KeyError if one is missing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name])


def lend_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Make the tensors of `state` the model's parameters, without a copy: training moves them, until `take_back`."""
    for name, parameter in model.named_parameters():
        parameter.data = state[name]


def take_back(model: nn.Module) -> None:
    """End `lend_state`: the model has memory of its own again, which takes up no room before it is written.

    On a GPU nothing was lent, and nothing changes.
    """
    lent = [parameter for parameter in model.parameters() if parameter.device.type == "cpu"]
    if not lent:
        return
    # Not torch.empty: where that takes what others have freed, it keeps room that nobody else can have.
    places = [-(-each.nbytes // ALIGNMENT) * ALIGNMENT for each in lent]
    fresh = torch.frombuffer(mmap.mmap(-1, sum(places), access=mmap.ACCESS_COPY), dtype=torch.uint8)
    for parameter, memory in zip(lent, torch.split(fresh, places), strict=True):
        parameter.data = memory[: parameter.nbytes].view(parameter.dtype).view(parameter.shape)


def build_model(
    config: PreTrainedConfig, layout: Layout, blueprint: Blueprint, scale: Scale, device: str = "cpu"
) -> PreTrainedModel:
    """The subnet as a real, smaller model with uninitialised parameters, its scale attached as hooks.

    The full blueprint gives the plain full model, without any hook.
    """
    own, held = layout.own_keys(blueprint)
    sized = type(config)(**subnet_fields(config.to_dict(), own, held))
    with no_init_weights(), torch.device("meta"):  # drawing numbers that nobody sees takes most of the time
        model: PreTrainedModel = model_class(config.model_type)(sized)
    model.to_empty(device=device)
    for name, module in list(model.named_modules()):
        if next(module.buffers(recurse=False), None) is not None:  # rotary frequencies: no parameters, so not loaded
            model.set_submodule(name, type(module)(sized).to(device))
    model.tie_weights()
    if own.sizes["kv_heads"] != layout.sizes["kv_heads"]:
        share_keys(model, layout, device)
        read_keys(model, layout, blueprint)
    attach_factors(model, layout, lambda kind, layer: blueprint.factor(kind, layer, scale))
    return model


def attach_factors(
    model: nn.Module, layout: Layout, factor: Callable[[Any, int], float | torch.Tensor]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Multiply the input of each output projection by `factor(kind, layer)`.

    A number scales a physical subnet; a vector over the projection's input scales and masks a full model.
    The number 1 attaches nothing.
    """
    handles = []
    for kind in KINDS:
        for layer in range(layout.num_layers):
            value = factor(kind, layer)
            if isinstance(value, float) and value == 1.0:
                continue
            projection = model.get_submodule(layout.outputs[kind].format(layer=layer))
            handles.append(projection.register_forward_pre_hook(_multiplier(value)))
    return handles


def _multiplier(factor: float | torch.Tensor) -> Callable[[nn.Module, tuple[torch.Tensor]], tuple[torch.Tensor]]:
    return lambda _module, inputs: (inputs[0] * factor,)


def fold_scale(layout: Layout, state: Mapping[str, torch.Tensor], blueprint: Blueprint, scale: Scale) -> State:
    """The slice with each scale folded into its output projection's weight: for models without hooks."""
    return fold_into(layout, slice_state(layout, state, blueprint), blueprint, scale)


def fold_into(layout: Layout, sliced: Mapping[str, torch.Tensor], blueprint: Blueprint, scale: Scale) -> State:
    """`fold_scale` of what `slice_state` gave."""
    folded = dict(sliced)
    for kind in KINDS:
        for layer in range(layout.num_layers):
            factor = blueprint.factor(kind, layer, scale)
            if factor != 1.0:
                name = layout.outputs[kind].format(layer=layer) + ".weight"
                folded[name] = folded[name] * factor
    return folded


class ModelCache:
    """One physical model per shape, kept warm between rounds: new weights are copied into it, or lent to it.

    With `compile` its body is compiled, too, once per shape: parameters stay the same objects, wherever their numbers
    lie, so nothing makes torch compile again but another batch size. Raises ConfigError where torch cannot compile.
    """

    backend = "inductor"

    def __init__(
        self, config: PreTrainedConfig, layout: Layout, scale: Scale, device: str = "cpu", compile: bool = False
    ) -> None:
        if compile:
            check_compiler(device)
        self.config, self.layout, self.scale, self.device, self.compile = config, layout, scale, device, compile
        self._models: dict[object, PreTrainedModel] = {}

    def load(self, blueprint: Blueprint, state: Mapping[str, torch.Tensor], in_place: bool = False) -> PreTrainedModel:
        """The model of `blueprint`'s shape, holding `state` (already sliced).

        With `in_place` and on a CPU it holds the very tensors of `state`, until `take_back`.
        """
        model = self.warm(blueprint)
        (lend_state if in_place and self.device == "cpu" else load_state)(model, state)
        return model

    def warm(self, blueprint: Blueprint) -> PreTrainedModel:
        """The model of `blueprint`'s shape, holding whatever it held last."""
        if blueprint.shape not in self._models:
            self._models[blueprint.shape] = self._build(blueprint)
        read_keys(self._models[blueprint.shape], self.layout, blueprint)
        return self._models[blueprint.shape]

    def load_sliced(self, blueprint: Blueprint, state: Mapping[str, torch.Tensor]) -> PreTrainedModel:
        """As `load`, from the full state."""
        return self.load(blueprint, slice_state(self.layout, state, blueprint))

    @contextmanager
    def lent(self, blueprint: Blueprint, state: Mapping[str, torch.Tensor]) -> Iterator[PreTrainedModel]:
        """As `load_sliced`, to be read only: on a CPU what it holds whole is not copied, and nothing stays."""
        model = self.load(blueprint, slice_state(self.layout, state, blueprint), in_place=True)
        try:
            yield model
        finally:
            take_back(model)

    def _build(self, blueprint: Blueprint) -> PreTrainedModel:
        model = build_model(self.config, self.layout, blueprint, self.scale, self.device)
        model.set_attn_implementation(CAUSAL)
        if self.compile:
            # All models share one piece of code, for which torch counts the compilations.
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            model.base_model.compile(fullgraph=True, dynamic=False, backend=self.backend)
        return model


def check_compiler(device: str) -> None:
    """Raises ConfigError unless torch.compile finds what it needs: it must not fall back in silence."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        raise ConfigError("train.compile=true needs a C++ compiler (g++, clang++ or $CXX): install one or set it false")
    if device.startswith("cuda") and find_spec("triton") is None:
        raise ConfigError("train.compile=true needs triton on a GPU: pip install triton, or set it false")

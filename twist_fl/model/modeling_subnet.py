"""Models whose layers may hold fewer attention blocks and FFN neurons than their full size.

This file is shipped beside every exported ticket, so that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works where twist_fl is not
installed; training uses the same classes. It needs torch and transformers only.
"""

from typing import Any

import transformers
from torch import nn

if int(transformers.__version__.partition(".")[0]) != 5:
    raise ImportError(f"this ticket needs transformers>=5.17,<6, here is {transformers.__version__}")

from transformers import (
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    OPTForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D


class _Subnet:
    """`config.heads_per_layer` (KV groups, where queries share keys) and `config.neurons_per_layer`: one entry a layer.

    All that is divided shrinks by the share held: outputs of the projections named, inputs of the last of them, and
    `counts`, the attributes in which the architecture counts its heads.
    """

    layers = "model.layers"
    attn: tuple[str, ...]
    ffn: tuple[str, ...]
    counts: tuple[str, ...] = ()

    def __init__(self: Any, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        of_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        layers = self.get_submodule(self.layers)
        for layer, heads, neurons in zip(layers, config.heads_per_layer, config.neurons_per_layer, strict=True):
            _narrow(layer, self.attn, heads, of_heads)
            _narrow(layer, self.ffn, neurons, _shape(layer.get_submodule(self.ffn[-1]))[1])
            for name in self.counts:
                owner, _, attribute = name.rpartition(".")
                module = layer.get_submodule(owner)
                setattr(module, attribute, getattr(module, attribute) * heads // of_heads)
        self.post_init()


def _shape(projection: Any) -> tuple[int, int]:
    """(outputs, inputs)."""
    if isinstance(projection, Conv1D):
        return projection.nf, projection.nx
    return projection.out_features, projection.in_features


def _narrow(layer: nn.Module, names: tuple[str, ...], held: int, of: int) -> None:
    for name in names if held != of else ():
        full: Any = layer.get_submodule(name)
        outputs, inputs = _shape(full)
        if name == names[-1]:
            inputs = inputs * held // of
        else:
            outputs = outputs * held // of
        make: Any = Conv1D  # untyped in transformers
        narrow = (
            make(outputs, inputs) if isinstance(full, Conv1D) else nn.Linear(inputs, outputs, full.bias is not None)
        )
        layer.set_submodule(name, narrow)


class _SubnetOfLlama(_Subnet):
    attn = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    ffn = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


class SubnetGPT2LMHeadModel(_Subnet, GPT2LMHeadModel):
    layers = "transformer.h"
    attn = ("attn.c_attn", "attn.c_proj")
    ffn = ("mlp.c_fc", "mlp.c_proj")
    counts = ("attn.num_heads", "attn.split_size")


class SubnetLlamaForCausalLM(_SubnetOfLlama, LlamaForCausalLM):
    pass


class SubnetMistralForCausalLM(_SubnetOfLlama, MistralForCausalLM):
    pass


class SubnetQwen2ForCausalLM(_SubnetOfLlama, Qwen2ForCausalLM):
    pass


class SubnetQwen3ForCausalLM(_SubnetOfLlama, Qwen3ForCausalLM):
    pass


class SubnetOPTForCausalLM(_Subnet, OPTForCausalLM):
    layers = "model.decoder.layers"
    attn = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
    ffn = ("fc1", "fc2")
    counts = ("self_attn.num_heads",)


class SubnetGPTNeoXForCausalLM(_Subnet, GPTNeoXForCausalLM):
    layers = "gpt_neox.layers"
    attn = ("attention.query_key_value", "attention.dense")
    ffn = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")


SUBNETS: dict[str, Any] = {
    "gpt2": SubnetGPT2LMHeadModel,
    "llama": SubnetLlamaForCausalLM,
    "mistral": SubnetMistralForCausalLM,
    "qwen2": SubnetQwen2ForCausalLM,
    "qwen3": SubnetQwen3ForCausalLM,
    "opt": SubnetOPTForCausalLM,
    "gpt_neox": SubnetGPTNeoXForCausalLM,
}
"""By the config's model_type."""

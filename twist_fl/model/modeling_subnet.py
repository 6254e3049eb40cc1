"""Models whose layers may hold fewer attention blocks and FFN neurons than their full size.

This file is shipped beside every exported ticket, so that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works where twist_fl is not
installed; training uses the same classes. It needs torch and transformers only, and asks transformers
for the classes of one architecture when they are named: an older version need not know the others.
"""

from functools import cache
from typing import Any, NamedTuple

import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D


class Family(NamedTuple):
    """An architecture in transformers: its classes, where its layers are, and their projections, the output's last."""

    model: str
    config: str
    layers: str
    attn: tuple[str, ...]
    ffn: tuple[str, ...]
    since: str = "4.46"
    """The first version of transformers that has it, or the first that was tried."""


_LLAMA = Family(
    *("LlamaForCausalLM", "LlamaConfig", "model.layers"),
    attn=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    ffn=("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        *("GPT2LMHeadModel", "GPT2Config", "transformer.h"),
        attn=("attn.c_attn", "attn.c_proj"),
        ffn=("mlp.c_fc", "mlp.c_proj"),
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA._replace(model="MistralForCausalLM", config="MistralConfig"),
    "qwen2": _LLAMA._replace(model="Qwen2ForCausalLM", config="Qwen2Config"),
    "qwen3": _LLAMA._replace(model="Qwen3ForCausalLM", config="Qwen3Config", since="4.51"),
    "opt": Family(
        *("OPTForCausalLM", "OPTConfig", "model.decoder.layers"),
        attn=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
        ffn=("fc1", "fc2"),
    ),
    "gpt_neox": Family(
        *("GPTNeoXForCausalLM", "GPTNeoXConfig", "gpt_neox.layers"),
        attn=("attention.query_key_value", "attention.dense"),
        ffn=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
}
"""By the config's model_type."""
_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "split_size", "embed_dim", "hidden_size")
"""What an attention module calls its heads and their width together, in some architecture and version."""


def needs(model_type: str) -> str:
    """The versions of transformers that open a model of this architecture, as pip has it."""
    return f"transformers>={FAMILIES[model_type].since},<6"


def model_class(model_type: str) -> Any:
    """Its class, named Subnet and the name of the whole model's; made when it is first asked for."""
    return _classes(model_type)[0]


@cache
def _classes(model_type: str) -> tuple[Any, Any]:
    family, here = FAMILIES[model_type], transformers.__version__
    if not _numbers(family.since) <= _numbers(here) < (6, 0):
        wanted = needs(model_type)
        raise ImportError(f"this {model_type} ticket needs {wanted}, here is {here}: pip install '{wanted}'")
    # A config class of its own: older versions would open every later model of the config's class as a ticket.
    config: Any = type(f"Subnet{family.config}", (getattr(transformers, family.config),), {"__module__": __name__})
    bases = (_Subnet, getattr(transformers, family.model))
    fields = {"__module__": __name__, "family": family, "config_class": config}
    return type(f"Subnet{family.model}", bases, fields), config


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split(".")[:2])


def __getattr__(name: str) -> Any:
    """The classes that a ticket's config.json names."""
    for model_type, family in FAMILIES.items():
        if name in (f"Subnet{family.model}", f"Subnet{family.config}"):
            return _classes(model_type)[name == f"Subnet{family.config}"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Subnet:
    """`config.heads_per_layer` (KV groups, where queries share keys) and `config.neurons_per_layer`: one entry a layer.

    All that is divided shrinks by the share held: outputs of the projections named, inputs of the last of them, and
    `_COUNTS`.
    """

    family: Family

    def __init__(self: Any, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        of_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        attn, ffn = self.family.attn, self.family.ffn
        layers = self.get_submodule(self.family.layers)
        for layer, heads, neurons in zip(layers, config.heads_per_layer, config.neurons_per_layer, strict=True):
            _narrow(layer, attn, heads, of_heads)
            _narrow(layer, ffn, neurons, _shape(layer.get_submodule(ffn[-1]))[1])
            attention = layer.get_submodule(attn[0].rpartition(".")[0])
            for name in _COUNTS:
                if hasattr(attention, name):
                    setattr(attention, name, getattr(attention, name) * heads // of_heads)
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
        owner, _, attribute = name.rpartition(".")
        setattr(layer.get_submodule(owner), attribute, narrow)

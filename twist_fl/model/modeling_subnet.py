"""Models whose layers may hold fewer attention blocks and FFN neurons than their full size.

This file is shipped beside every exported ticket, with the ticket's `FAMILY` at its end, so that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works where twist_fl is not
installed; training uses the same classes. It needs torch and transformers only.
"""

from functools import cache
from typing import Any, NamedTuple

import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D


class Family(NamedTuple):
    """An architecture in transformers: its classes, where its layers are, and their projections, the output's last."""

    model_type: str
    model: str
    config: str
    layers: str
    attn: tuple[str, ...]
    ffn: tuple[str, ...]
    since: str
    """The first version of transformers that opens it."""


_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "split_size", "embed_dim", "hidden_size")
"""What an attention module calls its heads and their width together, in some architecture and version."""


@cache
def model_class(family: Family) -> Any:
    """Named Subnet and the name of the whole model's class."""
    config = config_class(family)
    bases = (_Subnet, getattr(transformers, family.model))
    fields = {"__module__": __name__, "family": family, "config_class": config}
    return type(f"Subnet{family.model}", bases, fields)


@cache
def config_class(family: Family) -> Any:
    """One of its own: older versions would open every later model of the whole model's class as a ticket."""
    wanted, here = f"transformers>={family.since},<6", transformers.__version__
    if not _numbers(family.since) <= _numbers(here) < (6, 0):
        raise ImportError(f"this {family.model_type} ticket needs {wanted}, here is {here}: pip install '{wanted}'")
    return type(f"Subnet{family.config}", (getattr(transformers, family.config),), {"__module__": __name__})


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split(".")[:2])


FAMILY: Family | None = None
"""The ticket's, which stands at the end of the file beside it."""


def __getattr__(name: str) -> Any:
    """The classes that a ticket's config.json names."""
    if FAMILY and name == f"Subnet{FAMILY.config}":
        return config_class(FAMILY)
    if FAMILY and name == f"Subnet{FAMILY.model}":
        return model_class(FAMILY)
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

"""A GPT-2 whose layers may hold fewer heads and FFN neurons than their full size.

This file is shipped beside every exported ticket, so that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works where twist_fl is not
installed; training uses the same class. It needs torch and transformers only.
"""

from typing import Any

from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D


class SubnetGPT2LMHeadModel(GPT2LMHeadModel):
    """`config.heads_per_layer` and `config.neurons_per_layer` give each layer's size, one entry a layer."""

    def __init__(self, config):  # type: ignore[no-untyped-def]
        super().__init__(config)
        d_model = config.n_embd
        make: Any = Conv1D  # untyped in transformers; Conv1D(out, in)
        sizes = zip(self.transformer.h, config.heads_per_layer, config.neurons_per_layer, strict=True)
        layer: Any
        for layer, heads, neurons in sizes:
            attn, mlp = layer.attn, layer.mlp
            d_attn = heads * attn.head_dim
            if d_attn != d_model:
                attn.num_heads, attn.split_size = heads, d_attn
                attn.c_attn, attn.c_proj = make(3 * d_attn, d_model), make(d_model, d_attn)
            if neurons != mlp.c_fc.nf:
                mlp.c_fc, mlp.c_proj = make(neurons, d_model), make(d_model, neurons)
        self.post_init()  # type: ignore[no-untyped-call]

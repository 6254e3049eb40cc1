"""A GPT-2 whose layers may hold fewer heads and FFN neurons than their full size.

This file is shipped beside every exported ticket, so that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works where twist_fl is not
installed; training uses the same class. It needs torch and transformers only.
"""

from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D


class SubnetGPT2LMHeadModel(GPT2LMHeadModel):
    """`config.heads_per_layer` and `config.neurons_per_layer` give each layer's size, one entry a layer."""

    def __init__(self, config):  # type: ignore[no-untyped-def]
        super().__init__(config)
        d_model = config.n_embd
        sizes = zip(self.transformer.h, config.heads_per_layer, config.neurons_per_layer, strict=True)
        for layer, heads, neurons in sizes:
            attn, mlp = layer.attn, layer.mlp
            d_attn = heads * attn.head_dim
            if d_attn != d_model:
                attn.num_heads, attn.split_size = heads, d_attn
                attn.c_attn, attn.c_proj = Conv1D(3 * d_attn, d_model), Conv1D(d_model, d_attn)
            if neurons != mlp.c_fc.nf:
                mlp.c_fc, mlp.c_proj = Conv1D(neurons, d_model), Conv1D(d_model, neurons)
        self.post_init()

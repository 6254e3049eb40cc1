"""Our block tables: every parameter of each architecture, in the order of the model's own (docs/code.md)."""

from __future__ import annotations

from dataclasses import replace

from twist_fl.blueprint.architectures import KEYS, QUERIES, Architecture, Blocks, ModelDict, Row, When


def _never(config: ModelDict) -> bool:
    return False


# What rows depend on


def _set(key: str, default: bool = False) -> When:
    return lambda config: bool(config.get(key, default))


def _untied(default: bool) -> When:
    """The head is a parameter of its own; `default` is the family's tie_word_embeddings."""
    return lambda config: not config.get("tie_word_embeddings", default)


def _projects(config: ModelDict) -> bool:
    return bool((config.get("word_embed_proj_dim") or config["hidden_size"]) != config["hidden_size"])


def _opt_ends_with_norm(config: ModelDict) -> bool:
    keeps = config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False)
    return bool(keeps and config.get("layer_norm_elementwise_affine", True))


# What is refused


def _sliding_window(config: ModelDict) -> str | None:
    window, context = config.get("sliding_window"), config["max_position_embeddings"]
    if window is None or window >= context:
        return None
    return (
        f"sliding_window={window} and a context of {context} tokens needs masks that subnets are trained without: up "
        f"to {window} tokens it is the same model with sliding_window=null, max_position_embeddings={window} in its "
        "config.json"
    )


def _odd_heads(config: ModelDict) -> str | None:
    d_head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return f"heads of {d_head} entries cannot rotate them in pairs: use heads of an even size" if d_head % 2 else None


def _layerdrop(config: ModelDict) -> str | None:
    drop = config.get("layerdrop", 0.0)
    return f"layerdrop={drop} trains some layers only sometimes: set it to 0 in its config" if drop else None


def _cross_attention(config: ModelDict) -> str | None:
    return "add_cross_attention=true is no causal language model" if config.get("add_cross_attention") else None


# The architectures

_HEADS = KEYS  # of heads that each have their own
_NEURONS = Blocks("ffn", "ffn_width")
_KEYS = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
}


def _norm(name: str, when: When | None = None) -> tuple[Row, Row]:
    return Row(f"{name}.weight", ("d_model",), when), Row(f"{name}.bias", ("d_model",), when)


def _linear(name: str, outputs: str | Blocks, inputs: str | Blocks, bias: When | None = None) -> tuple[Row, Row]:
    """nn.Linear keeps its weight as (out, in)."""
    return Row(f"{name}.weight", (outputs, inputs)), Row(f"{name}.bias", (outputs,), bias)


def _conv1d(name: str, outputs: str | Blocks, inputs: str | Blocks) -> tuple[Row, Row]:
    """GPT-2's own: (in, out)."""
    return Row(f"{name}.weight", (inputs, outputs)), Row(f"{name}.bias", (outputs,))


def _gpt2() -> Architecture:
    layer = "transformer.h.{layer}."
    return Architecture(
        "gpt2",
        rows=(
            Row("transformer.wte.weight", ("vocab", "d_model")),
            Row("transformer.wpe.weight", ("positions", "d_model")),
            *_norm(layer + "ln_1"),
            *_conv1d(layer + "attn.c_attn", Blocks("attn", "d_head", sections=3), "d_model"),
            *_conv1d(layer + "attn.c_proj", "d_model", _HEADS),
            *_norm(layer + "ln_2"),
            *_conv1d(layer + "mlp.c_fc", _NEURONS, "d_model"),
            *_conv1d(layer + "mlp.c_proj", "d_model", _NEURONS),
            *_norm("transformer.ln_f"),
            Row("lm_head.weight", ("vocab", "d_model"), _untied(True)),
        ),
        outputs={"attn": layer + "attn.c_proj", "ffn": layer + "mlp.c_proj"},
        keys={key: key for key in _KEYS},
        dropout=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        # gelu_new as one fused kernel: the same function, a fifth less time per step on a CPU.
        scratch={"activation_function": "gelu_pytorch_tanh"},
        refuse=(_cross_attention,),
    )


def _llama(
    model_type: str,
    qkv_bias: When | None,
    o_bias: When,
    mlp_bias: When = _never,
    qk_norm: When | None = _never,
    scratch: ModelDict | None = None,
) -> Architecture:
    """LLaMA and what was made after it: the FFN is gated; an attention block is a KV group with its queries, or by
    blueprint.attn_blocks one query head."""
    layer = "model.layers.{layer}."
    return Architecture(
        model_type,
        rows=(
            Row("model.embed_tokens.weight", ("vocab", "d_model")),
            *_linear(layer + "self_attn.q_proj", QUERIES, "d_model", qkv_bias),
            *_linear(layer + "self_attn.k_proj", KEYS, "d_model", qkv_bias),
            *_linear(layer + "self_attn.v_proj", KEYS, "d_model", qkv_bias),
            *_linear(layer + "self_attn.o_proj", "d_model", QUERIES, o_bias),
            Row(layer + "self_attn.q_norm.weight", ("d_head",), qk_norm),
            Row(layer + "self_attn.k_norm.weight", ("d_head",), qk_norm),
            *_linear(layer + "mlp.gate_proj", _NEURONS, "d_model", mlp_bias),
            *_linear(layer + "mlp.up_proj", _NEURONS, "d_model", mlp_bias),
            *_linear(layer + "mlp.down_proj", "d_model", _NEURONS, mlp_bias),
            Row(layer + "input_layernorm.weight", ("d_model",)),
            Row(layer + "post_attention_layernorm.weight", ("d_model",)),
            Row("model.norm.weight", ("d_model",)),
            Row("lm_head.weight", ("vocab", "d_model"), _untied(False)),
        ),
        outputs={"attn": layer + "self_attn.o_proj", "ffn": layer + "mlp.down_proj"},
        keys=_KEYS | {"n_kv_head": "num_key_value_heads", "d_head": "head_dim"},
        dropout=("attention_dropout",),
        scratch=scratch or {},
        refuse=(_odd_heads, _sliding_window),
    )


def _opt() -> Architecture:
    layer, bias = "model.decoder.layers.{layer}.", _set("enable_bias", True)
    affine = _set("layer_norm_elementwise_affine", True)
    return Architecture(
        "opt",
        rows=(
            Row("model.decoder.embed_tokens.weight", ("vocab", "d_embed")),
            Row("model.decoder.embed_positions.weight", ("positions_and_2", "d_model")),
            Row("model.decoder.project_out.weight", ("d_embed", "d_model"), _projects),
            Row("model.decoder.project_in.weight", ("d_model", "d_embed"), _projects),
            *_norm("model.decoder.final_layer_norm", _opt_ends_with_norm),
            *_linear(layer + "self_attn.k_proj", _HEADS, "d_model", bias),
            *_linear(layer + "self_attn.v_proj", _HEADS, "d_model", bias),
            *_linear(layer + "self_attn.q_proj", _HEADS, "d_model", bias),
            *_linear(layer + "self_attn.out_proj", "d_model", _HEADS, bias),
            *_norm(layer + "self_attn_layer_norm", affine),
            *_linear(layer + "fc1", _NEURONS, "d_model", bias),
            *_linear(layer + "fc2", "d_model", _NEURONS, bias),
            *_norm(layer + "final_layer_norm", affine),
            Row("lm_head.weight", ("vocab", "d_embed"), _untied(True)),
        ),
        outputs={"attn": layer + "self_attn.out_proj", "ffn": layer + "fc2"},
        keys=_KEYS | {"n_inner": "ffn_dim"},
        dropout=("dropout", "attention_dropout"),
        refuse=(_layerdrop,),
    )


def _gpt_neox() -> Architecture:
    layer, bias = "gpt_neox.layers.{layer}.", _set("attention_bias", True)
    return Architecture(
        "gpt_neox",
        rows=(
            Row("gpt_neox.embed_in.weight", ("vocab", "d_model")),
            *_norm(layer + "input_layernorm"),
            *_norm(layer + "post_attention_layernorm"),
            *_linear(layer + "attention.query_key_value", Blocks("attn", "d_qkv"), "d_model", bias),
            *_linear(layer + "attention.dense", "d_model", _HEADS, bias),
            *_linear(layer + "mlp.dense_h_to_4h", _NEURONS, "d_model"),
            *_linear(layer + "mlp.dense_4h_to_h", "d_model", _NEURONS),
            *_norm("gpt_neox.final_layer_norm"),
            Row("lm_head.weight", ("vocab", "d_model"), _untied(False)),
        ),
        outputs={"attn": layer + "attention.dense", "ffn": layer + "mlp.dense_4h_to_h"},
        keys=_KEYS,
        dropout=("hidden_dropout", "attention_dropout"),
    )


GPT2 = _gpt2()
LLAMA = _llama("llama", _set("attention_bias"), _set("attention_bias"), _set("mlp_bias"))
MISTRAL = _llama("mistral", _never, _never, scratch={"sliding_window": None})
QWEN2 = _llama("qwen2", None, _never)
QWEN3 = replace(_llama("qwen3", _set("attention_bias"), _set("attention_bias"), qk_norm=None), since="4.51")
OPT = _opt()
GPT_NEOX = replace(_gpt_neox(), since="5.17")  # version 4 calls its head otherwise

"""Tiny models of every architecture, and of the variants whose rows depend on the config."""

from __future__ import annotations

from typing import Any

from transformers import GPT2Config, PreTrainedConfig

from twist_fl.blueprint.architectures import ModelDict
from twist_fl.blueprint.blocks import Layout, make_layout
from twist_fl.model.hf_config import config_from_dict

HEADS, FFN_BLOCKS, D_HEAD, NEURONS = 4, 6, 8, 5
"""Unequal on purpose: a heads-for-blocks mix-up must not pass."""
CONTEXT, VOCAB, LAYERS = 12, 50, 3
UNEVEN_GPT2 = GPT2Config(
    vocab_size=VOCAB,
    n_positions=CONTEXT,
    n_embd=HEADS * D_HEAD,
    n_inner=FFN_BLOCKS * NEURONS,
    n_layer=5,
    n_head=HEADS,
    bos_token_id=0,
    eos_token_id=0,
)
UNEVEN_LAYOUT = make_layout(UNEVEN_GPT2.to_dict(), FFN_BLOCKS)
_KEYS = ("num_hidden_layers", "hidden_size", "max_position_embeddings")
_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def _plain(d_model: int, **others: Any) -> dict[str, Any]:
    return dict(zip(_KEYS, (LAYERS, d_model, CONTEXT), strict=True)) | {"vocab_size": VOCAB} | _NO_TOKENS | others


def _llama(**others: Any) -> dict[str, Any]:
    """Four KV groups of two queries; heads of 6 entries, not d_model / num_attention_heads."""
    heads = {"num_attention_heads": 2 * HEADS, "num_key_value_heads": HEADS, "head_dim": 6}
    return _plain(24, intermediate_size=FFN_BLOCKS * NEURONS) | heads | others


def _opt(**others: Any) -> dict[str, Any]:
    return _plain(24, num_attention_heads=HEADS, ffn_dim=FFN_BLOCKS * NEURONS, **others)


def _neox(**others: Any) -> dict[str, Any]:
    return _plain(32, num_attention_heads=HEADS, intermediate_size=FFN_BLOCKS * NEURONS, **others)


_GPT2: dict[str, Any] = {
    **{"vocab_size": VOCAB, "n_positions": CONTEXT, "n_embd": 24, "n_inner": FFN_BLOCKS * NEURONS},
    **{"n_layer": LAYERS, "n_head": HEADS, **_NO_TOKENS},
}
_HEADS = " heads"
"""In a name: a block of attention is one of 8 query heads."""
_MODELS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "gpt2 untied": _GPT2 | {"tie_word_embeddings": False},
    "llama": _llama(),
    "llama biased tied": _llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama biased heads": _llama(attention_bias=True, mlp_bias=True),
    "mistral": _llama(sliding_window=None),
    "qwen2": _llama(hidden_size=48, tie_word_embeddings=True),
    "qwen3": _llama(),
    "qwen3 biased tied": _llama(attention_bias=True, tie_word_embeddings=True),
    "qwen3 heads": _llama(tie_word_embeddings=True),
    "opt": _opt(),
    "opt projected": _opt(word_embed_proj_dim=10, do_layer_norm_before=False),
    "opt bare untied": _opt(enable_bias=False, layer_norm_elementwise_affine=False, tie_word_embeddings=False),
    "gpt_neox": _neox(),
    "gpt_neox bare tied": _neox(attention_bias=False, use_parallel_residual=False, tie_word_embeddings=True),
}
CONFIGS: dict[str, PreTrainedConfig] = {
    name: config_from_dict({"model_type": name.split()[0], **fields}) for name, fields in _MODELS.items()
}


def layout_of(name: str, fields: ModelDict) -> Layout:
    """Of the blocks that the name says."""
    return make_layout(fields, FFN_BLOCKS, "heads" if name.endswith(_HEADS) else "kv_groups")


LAYOUTS: dict[str, Layout] = {name: layout_of(name, config.to_dict()) for name, config in CONFIGS.items()}
FAMILIES = [name for name in CONFIGS if " " not in name]
"""One of each architecture."""
OF_HEADS = [name for name in CONFIGS if name.endswith(_HEADS)]

"""A ticket as one GGUF file for llama.cpp: its `deci` is Llama with heads and FFN neurons of their own in each layer.

Both rotate neighbouring pairs of a head's entries, where transformers pairs the halves: rows of queries and keys
change places, and all is the same. Blueprints hold a block of either kind in every layer, so no layer is without.
Where all layers are of one size, as in a whole model, the file is plain `llama`, which more programs open.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from twist_fl.blueprint.blocks import make_layout
from twist_fl.data.gguf_folder import in_pairs
from twist_fl.data.tokenizer import load_tokenizer
from twist_fl.system.errors import ConfigError, LaunchError
from twist_fl.system.plugins import needs
from twist_fl.tickets.checking import Answers, Probe, check_dtype
from twist_fl.tickets.export import Ticket
from twist_fl.tickets.gguf_tokenizer import Vocabulary, read_vocabulary
from twist_fl.tickets.llama_cpp import ask

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILE = "model.gguf"
DTYPES = ("float32", "float16", "bfloat16", "q8_0")
_FAMILIES = ("llama", "mistral", "qwen2")
_TEXT = "It's 1,234 o'clock;\n\n  the dog -- naïve? -- sat \"here\"."
"""Digits, contractions, spaces, a letter of two bytes: where tokenizers differ."""
_LETTER = "a"


def write(ticket: Ticket, folder: Path, tokenizer_folder: Path | None, dtype: str) -> str:
    """`model.gguf` in `folder`, checked in llama.cpp. Raises ConfigError for a ticket that it cannot hold."""
    check_dtype("gguf", dtype, DTYPES)
    needs("gguf", "xllamacpp", extra="gguf")
    _check_family(ticket.model_config)
    if tokenizer_folder is None:
        raise ConfigError("--format gguf has the tokenizer in the same file, and there is none")
    vocabulary = read_vocabulary(tokenizer_folder, ticket.model_config["vocab_size"])
    probe = Probe(ticket)
    factors = _rotation_factors(ticket.model_config, probe.model)
    narrow = _write_file(ticket, folder / FILE, vocabulary, factors, dtype)
    tokenizer = load_tokenizer(str(tokenizer_folder))
    said = ask(folder / FILE, probe.tokens, _TEXT, tokenizer.encode(_LETTER, add_special_tokens=False)[0])
    words = probe.compare(Answers(said["logprobs"], said["likeliest"]), exact=dtype == "float32")
    expected = len(tokenizer(_TEXT)["input_ids"])
    if said["text_tokens"] != expected:
        raise LaunchError(
            f"llama.cpp makes {said['text_tokens']} tokens of a text of {expected}: nothing was written; this is a "
            "defect, please report it with the tokenizer.json"
        )
    return f"llama.cpp: {words}" + (f"; {narrow} tensors are float16, their rows no multiple of 32" if narrow else "")


def _check_family(config: Mapping[str, Any]) -> None:
    if (family := config["model_type"]) not in _FAMILIES:
        raise ConfigError(
            f"--format gguf: llama.cpp has layers of different sizes for the Llama family ({', '.join(_FAMILIES)}), "
            f"not for {family!r}: use --format compact, hf or onnx"
        )
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise ConfigError(f"--format gguf: llama.cpp's deci has hidden_act=silu, not {activation!r}: use --format onnx")


def _rotation_factors(config: Mapping[str, Any], model: Any) -> torch.Tensor | None:
    """What llama.cpp divides its frequencies by, None for nothing: all rotations that do not depend on the length."""
    rotary, rope = model.model.rotary_emb, config["rope_parameters"]
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise ConfigError(
            f"--format gguf: rotations of rope_type={rope['rope_type']!r} change with the length of a text; written "
            "are those of default, linear and llama3: use --format compact, hf or onnx"
        )
    of_head = 2 * len(rotary.inv_freq)
    plain = rope["rope_theta"] ** (-torch.arange(0, of_head, 2, dtype=torch.float64) / of_head)
    factors = (plain / rotary.inv_freq.double()).float()
    return None if rope["rope_type"] == "default" else factors


def _write_file(ticket: Ticket, file: Path, vocabulary: Vocabulary, factors: torch.Tensor | None, dtype: str) -> int:
    """The number of tensors that Q8_0, which takes 32 numbers of a row at a time, cannot hold."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
    from gguf.quants import quantize

    kinds = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
    wanted = GGMLQuantizationType[kinds[dtype]]
    arch = MODEL_ARCH.LLAMA if _is_plain(ticket.model_config) else MODEL_ARCH.DECI
    writer = GGUFWriter(file, MODEL_ARCH_NAMES[arch])
    layout = make_layout(ticket.model_config, ticket.blueprint.num_blocks[1])
    _write_sizes(writer, ticket.model_config, layout.sizes)
    _write_vocabulary(writer, vocabulary)
    names, narrow = get_tensor_name_map(arch, layout.num_layers), 0
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    for name, tensor in ticket.params.items():
        values = tensor.detach().float().cpu()
        if ".q_proj." in name or ".k_proj." in name:
            values = in_pairs(values, layout.sizes["d_head"])
        kind = wanted if values.dim() > 1 else GGMLQuantizationType.F32  # norms and biases: few, and all need F32
        if kind == GGMLQuantizationType.Q8_0 and values.shape[-1] % 32:
            kind, narrow = GGMLQuantizationType.F16, narrow + 1
        numbers = quantize(values.contiguous().numpy(), kind)
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs, name  # of these families all have one
        writer.add_tensor(theirs, numbers, raw_dtype=kind)
    writer.add_file_type({"float32": 0, "float16": 1, "bfloat16": 32, "q8_0": 7}[dtype])
    writer.add_quantization_version(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return narrow


def _is_plain(config: Mapping[str, Any]) -> bool:
    """Whether it is a Llama of layers of one size. (Qwen2's are not: they have biases, and are not rotated so.)"""
    alike = all(len(set(config[key])) == 1 for key in ("heads_per_layer", "neurons_per_layer"))
    return alike and config["model_type"] != "qwen2"


def _write_sizes(writer: GGUFWriter, config: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    heads, neurons, d_head = config["heads_per_layer"], config["neurons_per_layer"], sizes["d_head"]
    queries = [held * sizes["d_query"] // d_head for held in heads]
    if _is_plain(config):
        (heads, neurons, queries) = (each[0] for each in (heads, neurons, queries))
    writer.add_block_count(sizes["layers"])
    writer.add_context_length(sizes["positions"])
    writer.add_embedding_length(sizes["d_model"])
    writer.add_head_count(queries)
    writer.add_head_count_kv(heads)
    writer.add_feed_forward_length(neurons)
    writer.add_key_length(d_head)
    writer.add_value_length(d_head)
    writer.add_rope_dimension_count(d_head)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(sizes["vocab"])


def _write_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.cut)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for name, number in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(vocabulary.begins)
    writer.add_add_eos_token(vocabulary.ends)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)

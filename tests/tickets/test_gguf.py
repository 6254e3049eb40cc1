"""GGUF files, opened by llama.cpp itself: every export here is checked in it, token by token, by `Probe.compare`."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_tickets import HEADS, UNEVEN, ticket

from twist_fl.system.errors import ConfigError, LaunchError
from twist_fl.tickets import gguf_format
from twist_fl.tickets.checking import Answers, Probe

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama biased tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3}),
    "llama linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2 heads": ("qwen2", {}),
    "qwen2": ("qwen2", {}),
}


def _off(words: str) -> float:
    found = re.search(r"perplexity (\S+) % off", words)
    assert found, words
    return float(found[1])


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_says_what_the_ticket_says(name: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    model_type, others = MODELS[name]
    given = ticket(model_type, HEADS if name.endswith(" heads") else UNEVEN, **others)
    words = gguf_format.write(given, tmp_path, tokenizer_folder, "float32")
    assert words.startswith("llama.cpp: 47 of 47 likeliest tokens are the ticket's")
    assert _off(words) < 0.01
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(("dtype", "most"), [("float16", 1.0), ("bfloat16", 3.0), ("q8_0", 5.0)])
def test_smaller_numbers_are_smaller_files_and_about_the_same(
    dtype: str, most: float, tokenizer_folder: Path, tmp_path: Path
) -> None:
    words = gguf_format.write(ticket(), tmp_path, tokenizer_folder, dtype)
    assert 0 < _off(words) < most
    bits = {"float16": 16, "bfloat16": 16, "q8_0": 8.5}[dtype]
    weights = sum(value.numel() for value in ticket().params.values())
    assert (tmp_path / "model.gguf").stat().st_size < 1.1 * weights * bits / 8 + 20_000
    # The FFN's output projections, of 16, 48 and 24 neurons, and the attention's of the layer with one KV group.
    assert words.endswith("; 4 tensors are float16, their rows no multiple of 32") == (dtype == "q8_0")


def test_the_file_says_the_sizes_of_every_layer(tokenizer_folder: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    given = ticket()
    gguf_format.write(given, tmp_path, tokenizer_folder, "float32")
    fields = {name: field.contents() for name, field in GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert fields["general.architecture"] == "deci"
    assert fields["deci.attention.head_count_kv"] == [4, 2, 1]
    assert fields["deci.attention.head_count"] == [8, 4, 2]
    assert fields["deci.feed_forward_length"] == [16, 48, 24]
    assert fields["deci.context_length"] == 64
    assert len(fields["tokenizer.ggml.tokens"]) == given.model_config["vocab_size"] == 320
    assert fields["tokenizer.ggml.tokens"][319] == "[PAD319]"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert (fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.add_bos_token"]) == (0, False)


def test_a_wrong_file_is_found(tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in transformers' order: what a forgotten permutation gives."""
    monkeypatch.setattr(gguf_format, "in_pairs", lambda rows, d_head: rows)
    with pytest.raises(LaunchError, match=r"the export is not the ticket: .* % off, where at most 0\.1 %"):
        gguf_format.write(ticket(), tmp_path, tokenizer_folder, "float32")


def test_a_file_that_llama_cpp_does_not_open_is_an_error(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_format, "_write_vocabulary", lambda writer, vocabulary: None)
    with pytest.raises(LaunchError, match=r"llama\.cpp does not open the file that was written: [\s\S]*tokenizer"):
        gguf_format.write(ticket(), tmp_path, tokenizer_folder, "float32")


def test_a_missing_answer_is_no_check() -> None:
    probe = Probe(ticket())
    with pytest.raises(LaunchError, match="cannot be checked: it answers 1 of 47 questions"):
        probe.compare(Answers([0.0], [1]), exact=False)


@pytest.mark.parametrize(
    ("model", "dtype", "reason"),
    [
        (("gpt2", {}), "float32", r"for the Llama family \(llama, mistral, qwen2\), not for 'gpt2': use --format comp"),
        (("qwen3", {}), "float32", r"not for 'qwen3'"),
        (("llama", {"hidden_act": "gelu"}), "float32", r"has hidden_act=silu, not 'gelu': use --format onnx"),
        (("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}), "float32",
         r"rope_type='yarn' change with the length .* default, linear and llama3"),
        (("llama", {"vocab_size": 260}), "float32", r"the tokenizer has a token \d+, the model only 260 tokens"),
        (("llama", {}), "int8", r"--dtype 'int8': the format gguf has float32, float16, bfloat16, q8_0"),
    ],
)  # fmt: skip
def test_what_the_format_cannot_hold_is_refused_before_anything_is_written(
    model: tuple[str, dict[str, Any]], dtype: str, reason: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=reason):
        gguf_format.write(ticket(model[0], **model[1]), tmp_path, tokenizer_folder, dtype)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    other, target = tmp_path / "other", tmp_path / "ticket"
    shutil.copytree(tokenizer_folder, other)
    target.mkdir()
    fields = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    fields["pre_tokenizer"]["add_prefix_space"] = True
    (other / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=r"would cut text otherwise than this tokenizer\.json does: .* gpt-2, smollm"):
        gguf_format.write(ticket(), target, other, "float32")
    with pytest.raises(ConfigError, match="has the tokenizer in the same file, and there is none"):
        gguf_format.write(ticket(), target, None, "float32")


def test_a_missing_package_names_the_extra(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"this needs gguf and xllamacpp: pip install 'twist-fl\[gguf\]'"):
        gguf_format.write(ticket(), tmp_path, tokenizer_folder, "float32")

"""GGUF files as checkpoints: what this package, or gguf's own writer, has written comes back as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from hypothesis import given
from hypothesis import strategies as st
from small_tickets import ALIKE, UNEVEN, ticket
from transformers import AutoModelForCausalLM

from twist_fl.blueprint.blocks import make_layout
from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.config.schema import load_config
from twist_fl.data.gguf_folder import as_folder, in_halves, in_pairs
from twist_fl.data.tokenizer import load_tokenizer
from twist_fl.model.hf_config import model_config
from twist_fl.model.pretrained import load_pretrained
from twist_fl.system.errors import ConfigError
from twist_fl.tickets import gguf_format

WHOLE = Blueprint((4, 6), (tuple(range(4)),) * 3, (tuple(range(6)),) * 3)
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
TEXT = "It's 1,234 o'clock;\n\n  the dog -- naïve? -- sat \"here\"."


def written(folder: Path, tokenizer_folder: Path, dtype: str = "float32", **others: Any) -> tuple[Path, Any]:
    """A whole Llama in a GGUF file that llama.cpp has checked, and the ticket that it is."""
    folder.mkdir(exist_ok=True)
    made = ticket("llama", others.pop("blueprint", WHOLE), **others)
    gguf_format.write(made, folder, tokenizer_folder, dtype)
    return folder / "model.gguf", made


@given(heads=st.integers(1, 5), half=st.integers(1, 4), columns=st.integers(1, 3))
def test_rows_change_places_and_back_in_every_head(heads: int, half: int, columns: int) -> None:
    rows = torch.arange(float(heads * 2 * half * columns)).reshape(-1, columns)
    paired = in_pairs(rows, 2 * half)
    assert torch.equal(in_halves(paired, 2 * half), rows)
    assert paired[: 2 * half, 0].tolist() == rows[[i // 2 + i % 2 * half for i in range(2 * half)], 0].tolist()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("blueprint", [WHOLE, ALIKE])
def test_what_was_exported_comes_back_as_it_was(
    tied: bool, blueprint: Blueprint, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Also a ticket whose layers are of one size: as a file it is a small Llama."""
    file, made = written(tmp_path, tokenizer_folder, blueprint=blueprint, tie_word_embeddings=tied)
    name = f"model.pretrained={file}"
    config = model_config(load_config(None, [name, "data.window=16"]))
    assert config.tie_word_embeddings == tied
    state = load_pretrained(str(file), make_layout(config.to_dict()))
    assert state.keys() == made.params.keys()
    assert all(torch.equal(state[key], value) for key, value in made.params.items())
    ours, theirs = load_tokenizer(str(file)), load_tokenizer(str(tokenizer_folder))
    assert ours(TEXT)["input_ids"] == theirs(TEXT)["input_ids"]
    assert (ours.eos_token_id, ours.decode(ours(TEXT)["input_ids"])) == (theirs.eos_token_id, TEXT)


def test_a_file_is_read_once_and_again_when_it_has_changed(tokenizer_folder: Path, tmp_path: Path) -> None:
    file, _ = written(tmp_path, tokenizer_folder)
    folder = as_folder(file)
    assert as_folder(file) == folder
    auto: Any = AutoModelForCausalLM
    assert auto.from_pretrained(folder).config.model_type == "llama"
    file.touch()
    assert as_folder(file) != folder
    assert as_folder(tmp_path) == tmp_path


def test_numbers_of_fewer_bits_are_what_they_are_multiplied_as(tokenizer_folder: Path, tmp_path: Path) -> None:
    file, made = written(tmp_path, tokenizer_folder, "q8_0")
    state = load_pretrained(str(file), make_layout(made.model_config))
    for key, value in made.params.items():
        assert torch.allclose(state[key], value, atol=float(value.abs().max()) / 127)


@pytest.mark.parametrize("cut", ["smollm", "qwen2", "llama-bpe"])
def test_text_is_cut_by_the_rules_that_the_file_names(
    cut: str, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GGUFWriter, "add_tokenizer_pre", lambda self, pre: self.add_string("tokenizer.ggml.pre", cut))
    monkeypatch.setattr(gguf_format, "ask", lambda *given: {"logprobs": [], "likeliest": [], "text_tokens": 0})
    monkeypatch.setattr("twist_fl.tickets.checking.Probe.compare", lambda *given, **how: "")
    plain = load_tokenizer(str(tokenizer_folder))
    monkeypatch.setattr(gguf_format, "load_tokenizer", lambda name: Counts(plain))
    file, _ = written(tmp_path, tokenizer_folder)
    fields = json.loads((as_folder(file) / "tokenizer.json").read_text())
    assert fields["model"]["ignore_merges"] == (cut == "llama-bpe")
    pieces = load_tokenizer(str(file)).backend_tokenizer.pre_tokenizer.pre_tokenize_str("the 1234")
    numbers = {"smollm": ["Ġ", "1", "2", "3", "4"], "qwen2": ["Ġ", "1", "2", "3", "4"], "llama-bpe": ["Ġ", "123", "4"]}
    assert [piece for piece, _ in pieces] == ["the", *numbers[cut]]


class Counts:
    """A tokenizer of which the exporter believes that llama.cpp counts as it does."""

    def __init__(self, tokenizer: Any) -> None:
        self.encode = tokenizer.encode

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": []}


def header(file: Path, architecture: str, **fields: Any) -> Path:
    writer = GGUFWriter(file, architecture)
    for key, value in fields.items():
        writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def refused(file: Path, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        as_folder(file)


def test_what_is_no_model_that_can_be_read_is_refused(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.gguf"
    refused(header(file, "mamba"), r"the architecture mamba, and read are llama, qwen2, qwen3: give the Hugging Face f")
    refused(header(file, "llama"), "has no weights or no tokenizer: give the file of the whole model")
    file.write_bytes(b"nothing")
    refused(file, r"is no GGUF model that can be read: .*: get it again")
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        refused(file, r"this needs gguf: pip install 'twist-fl\[gguf\]'")
    whole, _ = written(tmp_path / "whole", tokenizer_folder)
    file.write_bytes(whole.read_bytes()[:-2000])
    refused(file, r"is no GGUF model that can be read: .*: get it again")
    scaled, _ = written(tmp_path / "scaled", tokenizer_folder, rope_parameters=LINEAR)
    refused(scaled, "scales its rotations for long texts, which a GGUF file says in part only: give the Hugging Face f")
    uneven, _ = written(tmp_path / "uneven", tokenizer_folder, blueprint=UNEVEN)
    refused(uneven, "is a ticket, whose layers differ in size: give the model that it was drawn from")


def test_a_folder_of_gguf_files_names_them(tmp_path: Path) -> None:
    file = header(tmp_path / "a.gguf", "mamba")
    with pytest.raises(ConfigError, match=rf"holds no model \(no config\.json\): give {file}"):
        model_config(load_config(None, [f"model.pretrained={tmp_path}"]))

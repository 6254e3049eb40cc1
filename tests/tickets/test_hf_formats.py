"""Folders for transformers: with the ticket's own class, and for the classes that all have."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_tickets import ALIKE, HEADS, UNEVEN, ticket
from transformers import AutoModelForCausalLM, AutoTokenizer

from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.data.tokenizer import train_tokenizer
from twist_fl.system.errors import ConfigError
from twist_fl.tickets import hf_formats
from twist_fl.tickets.checking import Probe, distributions
from twist_fl.tickets.export import in_dtype

HEADS_ALIKE = replace(HEADS, attn=((0, 1, 4, 7), (2, 3, 4, 5), (0, 2, 5, 6)), ffn=ALIKE.ffn)
THREE_HEADS = replace(HEADS_ALIKE, attn=((0, 1, 7),) * 3)
FEWER_NEURONS = Blueprint((4, 6), ((0, 1, 2, 3),) * 3, ((0, 2), (1, 3), (4, 5)))


@pytest.mark.parametrize(
    ("model_type", "blueprint", "fits"),
    [
        ("llama", ALIKE, True),
        ("llama", UNEVEN, False),
        ("llama", HEADS_ALIKE, True),
        ("llama", THREE_HEADS, False),  # which do not divide the width
        ("qwen3", HEADS, False),
        ("qwen2", ALIKE, True),
        ("gpt2", FEWER_NEURONS, True),
        ("gpt2", ALIKE, False),  # its heads fill the width of the model
        ("gpt_neox", ALIKE, False),
    ],
)
def test_a_stock_class_opens_it_exact_where_it_can_be(
    model_type: str, blueprint: Blueprint, fits: bool, tmp_path: Path
) -> None:
    given = ticket(model_type, blueprint)
    words = hf_formats.plain(given, tmp_path, None, "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model).__module__.startswith("transformers.models.")
    assert type(model).__name__ == json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    numbers = sum(each.numel() for each in model.parameters())
    assert (numbers == given.num_params) == fits
    assert ("of full size, with zeros for the blocks left out" in words) == (not fits)
    assert "47 of 47 likeliest tokens are the ticket's" in words
    probe = Probe(given)
    theirs, ours = (distributions(each, probe.tokens) for each in (model, probe.model))
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)  # sums of more numbers, zeros among them
    assert not {"auto_map", "heads_per_layer"} & json.loads((tmp_path / "config.json").read_text()).keys()


def test_the_full_size_has_zeros_where_the_ticket_has_no_blocks(tmp_path: Path) -> None:
    hf_formats.plain(ticket("llama", UNEVEN), tmp_path, None, "float32")
    layer = AutoModelForCausalLM.from_pretrained(tmp_path).model.layers[2]
    rows = layer.self_attn.k_proj.weight.view(4, -1).abs().sum(1)
    assert [bool(row) for row in rows] == [False, False, True, False]
    neurons = layer.mlp.down_proj.weight.view(32, 6, 8).abs().sum((0, 2))
    assert [bool(block) for block in neurons] == [False, True, True, False, True, False]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_numbers_are_a_ticket_with_a_hash_of_its_own(dtype: str, tmp_path: Path) -> None:
    given = ticket()
    words = hf_formats.compact(given, tmp_path, None, dtype)
    assert "likeliest tokens are the ticket's, perplexity " in words
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert {str(each.dtype) for each in opened.parameters()} == {f"torch.{dtype}"}
    about = json.loads((tmp_path / "twist.json").read_text())
    assert about["digest"] == in_dtype(given, dtype).digest != given.digest


def test_the_tokenizer_pads_and_knows_the_longest_context(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["the cat sat on the mat"] * 9, 270)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "ticket").mkdir()
    hf_formats.plain(ticket(), tmp_path / "ticket", tmp_path / "tokenizer", "float32")
    opened = AutoTokenizer.from_pretrained(tmp_path / "ticket")
    assert opened.model_max_length == 64
    assert opened(["the", "the cat sat"], padding=True)["attention_mask"][0][-1] == 0


def test_a_dtype_it_has_not_is_refused(tmp_path: Path) -> None:
    for write in (hf_formats.compact, hf_formats.plain):
        with pytest.raises(ConfigError, match=r"--dtype 'q8_0': the format \w+ has float32, bfloat16, float16"):
            write(ticket(), tmp_path, None, "q8_0")
    assert not list(tmp_path.iterdir())

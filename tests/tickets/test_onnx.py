"""ONNX, run by onnxruntime: one export, since torch takes its time for it."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_tickets import ticket

from twist_fl.data.tokenizer import train_tokenizer
from twist_fl.system.errors import ConfigError
from twist_fl.tickets import onnx_format
from twist_fl.tickets.checking import Probe

GIVEN = ticket("llama")
SHAPES = [(heads, 8) for heads in (4, 2, 1)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder, tokenizer = tmp_path_factory.mktemp("onnx"), tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["the cat sat on the mat"] * 9, 270).save_pretrained(tokenizer)
    return folder, onnx_format.write(GIVEN, folder, tokenizer, "float32")


def test_onnxruntime_says_what_the_ticket_says(exported: tuple[Path, str]) -> None:
    folder, words = exported
    assert words.startswith("onnxruntime: 47 of 47 likeliest tokens are the ticket's")
    found = re.search(r"perplexity (\S+) % off", words)
    assert found
    assert float(found[1]) < 0.01
    assert {file.name for file in folder.iterdir()} == {"model.onnx", "tokenizer.json", "tokenizer_config.json"}


def test_every_layer_has_a_cache_of_its_own_size_and_texts_come_in_batches(exported: tuple[Path, str]) -> None:
    from onnxruntime import InferenceSession

    session = InferenceSession(exported[0] / "model.onnx", providers=["CPUExecutionProvider"])
    heads = {each.name: each.shape[1] for each in session.get_inputs() if each.name.endswith(".key")}
    assert heads == {f"past_key_values.{layer}.key": number for layer, number in enumerate((4, 2, 1))}
    tokens = np.array(Probe(GIVEN).tokens[:24]).reshape(3, 8)
    names = onnx_format._names("past_key_values", SHAPES)
    empty = [np.zeros((3, held, 0, d_head), np.float32) for held, d_head in SHAPES for _ in range(2)]
    positions = np.tile(np.arange(8), (3, 1))
    given = {"input_ids": tokens, "position_ids": positions, **dict(zip(names, empty, strict=True))}
    logits, *present = session.run(None, given)
    with torch.inference_mode():
        expected = Probe(GIVEN).model(torch.from_numpy(tokens), use_cache=False).logits
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)
    assert [each.shape for each in present] == [(3, held, 8, d_head) for held, d_head in SHAPES for _ in range(2)]


def test_bytes_are_about_the_same(exported: tuple[Path, str], tmp_path: Path) -> None:
    import onnx

    whole, probe = tmp_path / "whole.onnx", Probe(GIVEN)
    shutil.copyfile(exported[0] / "model.onnx", whole)
    onnx_format._in_bytes(whole, tmp_path / "model.onnx")
    answers = onnx_format._answers(tmp_path / "model.onnx", SHAPES, probe.tokens)
    found = re.search(r"(\d+) of 47 .* perplexity (\S+) % off", probe.compare(answers, exact=False))
    assert found
    assert int(found[1]) > 30
    assert 0 < float(found[2]) < 10
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    kinds = {each.data_type for each in onnx.load(tmp_path / "model.onnx").graph.initializer if len(each.dims) == 2}
    assert onnx.TensorProto.UINT8 in kinds


def test_a_dtype_and_a_missing_package_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--dtype 'float16': the format onnx has float32, int8"):
        onnx_format.write(GIVEN, tmp_path, None, "float16")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs onnx and onnxscript and onnxruntime: pip install 'twist-fl\[onnx\]'"):
        onnx_format.write(GIVEN, tmp_path, None, "float32")
    assert not list(tmp_path.iterdir())

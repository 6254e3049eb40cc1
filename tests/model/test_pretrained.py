"""What `model.pretrained` may hold: the whole model under its own names, or a ConfigError before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CONFIGS, FFN_BLOCKS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPT2Model

from twist_fl.blueprint.blocks import Layout, make_layout
from twist_fl.model.hf_config import folder_config
from twist_fl.model.pretrained import check_pretrained, load_pretrained
from twist_fl.model.subnet import State, get_state
from twist_fl.system.errors import ConfigError
from twist_fl.system.files import new_folder
from twist_fl.training.job import Job

MakeJob = Callable[..., Job]

CONFIG = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
LAYOUT = make_layout(CONFIG.to_dict())
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"


@pytest.fixture
def model(tmp_path: Path) -> GPT2LMHeadModel:
    """Saved in `tmp_path`."""
    torch.manual_seed(3)
    made = GPT2LMHeadModel(CONFIG)
    made.save_pretrained(tmp_path)
    return made


def refused(folder: Path, match: str, layout: Layout = LAYOUT) -> None:
    for read in (check_pretrained, load_pretrained):
        with pytest.raises(ConfigError, match=match):
            read(str(folder), layout)


def resaved(folder: Path, change: Callable[[State], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = change(dict(tensors)) or tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def same(ours: State, theirs: State) -> bool:
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


# What is right


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("form", ["whole", "sharded", "pickled"])
def test_every_family_is_read_as_transformers_reads_it(name: str, form: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    auto: Any = AutoModelForCausalLM
    made = auto.from_config(CONFIGS[name])
    made.save_pretrained(tmp_path, max_shard_size="4KB" if form == "sharded" else "1GB")
    if form == "pickled":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    assert (tmp_path / "model.safetensors.index.json").exists() == (form == "sharded")
    layout = make_layout(folder_config("x", tmp_path).to_dict(), FFN_BLOCKS)
    check_pretrained(str(tmp_path), layout)
    ours = load_pretrained(str(tmp_path), layout)
    assert same(ours, get_state(auto.from_pretrained(tmp_path, dtype=torch.float32)))
    assert same(ours, get_state(made))


def test_the_base_model_alone_is_the_whole_of_a_tied_one(tmp_path: Path) -> None:
    """As GPT-2 lies on the hub: names without `transformer.`, and buffers that are no parameters."""
    GPT2Model(CONFIG).save_pretrained(tmp_path)
    resaved(tmp_path, lambda old: old | {"h.0.attn.bias": torch.ones(8, 8), "h.1.attn.masked_bias": torch.ones(1)})
    auto: Any = AutoModelForCausalLM
    assert same(load_pretrained(str(tmp_path), LAYOUT), get_state(auto.from_pretrained(tmp_path)))


def test_a_tied_head_may_be_there_or_not_or_be_all_there_is(model: GPT2LMHeadModel, tmp_path: Path) -> None:
    expected = get_state(model)
    assert same(load_pretrained(str(tmp_path), LAYOUT), expected)
    resaved(tmp_path, lambda old: old | {HEAD: old[EMBEDDING].clone()})
    assert same(load_pretrained(str(tmp_path), LAYOUT), expected)
    resaved(tmp_path, lambda old: old.pop(EMBEDDING) is None)
    assert same(load_pretrained(str(tmp_path), LAYOUT), expected)


def test_what_is_read_is_float32_and_no_view_of_the_file(model: GPT2LMHeadModel, tmp_path: Path) -> None:
    model.bfloat16().save_pretrained(tmp_path)
    state = load_pretrained(str(tmp_path), LAYOUT)
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert same(state, {name: value.float() for name, value in get_state(model).items()})
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


# Names that do not fit


@pytest.mark.parametrize("base", [GPT2LMHeadModel, GPT2Model])
@pytest.mark.parametrize(
    ("prefix", "why"),
    [
        ("_orig_mod.", r"what torch\.compile puts before them: save the model inside it, model\._orig_mod$"),
        ("module.", r"what DataParallel and DDP put before them: save the model inside it, model\.module$"),
        ("model.", "which no model of this kind has: save the model itself, not what it is wrapped in"),
        ("net.lm.", "which no model of this kind has"),
    ],
)
def test_names_with_a_prefix_are_refused_and_it_is_named(prefix: str, why: str, base: Any, tmp_path: Path) -> None:
    base(CONFIG).save_pretrained(tmp_path)
    resaved(tmp_path, lambda old: {prefix + name: value for name, value in old.items()})
    refused(tmp_path, rf"^model\.pretrained='{tmp_path}': its 28 names begin with '{prefix}', {why}")


def without(*names: str) -> Callable[[State], Any]:
    return lambda old: {name: value for name, value in old.items() if name not in names}


CHANGES: dict[str, tuple[Callable[[State], Any], str]] = {
    "missing": (without("transformer.h.1.ln_1.bias"), r"1 missing \(transformer\.h\.1\.ln_1\.bias\): give the whole"),
    "unknown": (lambda old: old | {"score.weight": torch.ones(2)}, r"1 unknown \(score\.weight\)"),
    "another layer": (lambda old: old | {"transformer.h.2.ln_1.bias": torch.ones(8)}, r"1 unknown \(transformer\.h\.2"),
    "nothing": (lambda old: {"nothing": torch.ones(1)}, r"28 missing \(.*, \.\.\.\); 1 unknown \(nothing\)"),
    "another shape": (
        lambda old: old | {"transformer.ln_f.bias": torch.ones(9)},
        r"1 of another shape \(transformer\.ln_f\.bias\) \(transformer\.ln_f\.bias is \(9,\), expected \(8,\)\)",
    ),
    "a larger vocabulary": (
        lambda old: old | {EMBEDDING: torch.ones(24, 8)},
        r"transformer\.wte\.weight is \(24, 8\), expected \(20, 8\)",
    ),
    "another head": (
        lambda old: old | {HEAD: old[EMBEDDING] + 1},
        r"lm_head\.weight differs from transformer\.wte\.weight, and its config ties them: set tie_word_",
    ),
    "not a number": (
        lambda old: old | {"transformer.ln_f.bias": torch.full((8,), torch.nan)},
        r"transformer\.ln_f\.bias has values that are not finite",
    ),
    "infinite": (
        lambda old: old | {"transformer.h.0.ln_1.bias": torch.full((8,), -torch.inf)},
        r"transformer\.h\.0\.ln_1\.bias has values that are not finite",
    ),
    "quantised": (
        lambda old: old | {"transformer.ln_f.bias": torch.ones(8, dtype=torch.int8)},
        r"transformer\.ln_f\.bias is torch\.int8: give weights that are not quantised",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_does_not_fit_is_refused_by_name(case: str, model: GPT2LMHeadModel, tmp_path: Path) -> None:
    change, reason = CHANGES[case]
    resaved(tmp_path, change)
    refused(tmp_path, reason)


def test_an_untied_model_needs_its_head(model: GPT2LMHeadModel, tmp_path: Path) -> None:
    untied = make_layout(CONFIG.to_dict() | {"tie_word_embeddings": False})
    refused(tmp_path, r"lm_head\.weight is missing, and its config does not tie it to transformer\.wte\.weight", untied)


def test_a_run_is_refused_before_its_text_is_read(
    model: GPT2LMHeadModel, tiny_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resaved(tmp_path, lambda old: {"_orig_mod." + name: value for name, value in old.items()})
    monkeypatch.setattr("twist_fl.data.run_text.load_corpus", lambda *_: pytest.fail("text was read"))
    with pytest.raises(ConfigError, match="its 28 names begin with '_orig_mod"):
        tiny_job(f"model.pretrained={tmp_path}", "data.window=8", "blueprint.undivided_last=0")


# Files that cannot be read


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (_truncate, "holds no weights that can be read: .*: copy or download it again"),
    "empty": (lambda file: file.write_bytes(b""), "holds no weights that can be read"),
    "text": (lambda file: file.write_text("hello"), "holds no weights that can be read"),
    "a pointer": (
        lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"),
        "is a Git LFS pointer, not weights: run `git lfs pull`",
    ),
    "gone": (lambda file: file.unlink(), "has no weights: of .* none is there"),
}


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_that_is_no_file_of_weights(case: str, name: str, model: GPT2LMHeadModel, tmp_path: Path) -> None:
    if name == "pytorch_model.bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / name)
    spoil, reason = FILES[case]
    spoil(tmp_path / name)
    refused(tmp_path, reason)


class Trap:
    """Pickled, it writes a file where it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_not_run(zipped: bool, model: GPT2LMHeadModel, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").unlink()
    torch.save({"a": Trap(tmp_path / "trap")}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    refused(tmp_path, "holds no weights that can be read")
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "model.safetensors.index.json is no index of weights"),
        ('{"weight_map": []}', r"weight_map=\[\] is no dict"),
        ('{"weight_map": {"a": 1}}', "is no index of weights"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "is no name for a folder"),
        ('{"weight_map": {"a": "part.safetensors"}}', r"is incomplete: 1 missing \(part\.safetensors\) of 1 files"),
    ],
)
def test_an_index_that_leads_nowhere(text: str, reason: str, model: GPT2LMHeadModel, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, reason)


def test_a_sealed_folder_is_checked(model: GPT2LMHeadModel, tmp_path: Path) -> None:
    with new_folder(tmp_path / "sealed", sealed=True) as making:
        model.save_pretrained(making)
    file = tmp_path / "sealed" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    load_pretrained(str(file.parent), LAYOUT)
    file.write_bytes(content)
    refused(file.parent, "is not what was written")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "Expecting property name"),
        (b"\xff\xfe\x00", "codec can't decode"),
        (b"[]", r"\[\] is no JSON object"),
        (b"{}", "model_type is missing"),
        (b'{"model_type": 3}', "model_type=3 is no str"),
        (b'{"model_type": "gpt2", "n_head": 0}', "n_head=0 is no int of at least 1"),
        (b'{"model_type": "gpt2", "n_embd": "wide"}', "n_embd='wide' is no int"),
        (b'{"model_type": "gpt2", "dtype": "x"}', "has no attribute 'x'"),
        (b"[" * 100_000, "JSON that is nested too deeply"),
    ],
)
def test_a_config_that_is_none(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=f"^model: its config.json is not a model's: .*{reason}"):
        folder_config("model", tmp_path)

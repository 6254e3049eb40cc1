"""What is said to a mistake in a setting: its value, what is allowed, and the nearest right thing, in one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twist_fl.config.schema import Config, load_config
from twist_fl.config.suggest import CHOICE_SYNONYMS, KEY_SYNONYMS, setting_paths, settings_like
from twist_fl.system.errors import ConfigError

MEANT = {
    "learning_rate": "train.lr",
    "train.learning_rate": "train.lr",
    "train.learningRate": "train.lr",
    "model.lr": "train.lr",
    "trian.lr": "train.lr",
    "batch": "train.batch_size",
    "bs": "train.batch_size",
    "num_clients": "train.workers",
    "clients": "train.workers",
    "n_clients": "train.workers",
    "num_rounds": "train.rounds",
    "epochs": "train.epochs",
    "local_epochs": "train.interval",
    "local_steps": "train.interval",
    "hidden_size": "model.n_embd",
    "model.hidden-size": "model.n_embd",
    "num_layers": "model.n_layer",
    "num_hidden_layers": "model.n_layer",
    "num_heads": "model.n_head",
    "model_name": "model.pretrained",
    "model.name": "model.pretrained",
    "dataset": "data.source",
    "output_dir": "dir",
    "device": "train.device",
    "dtype": "train.precision",
    "sparsity": "blueprint.num_sub",
    "kappa": "blueprint.num_sub",
    "blueprint.keep": "blueprint.num_sub",
    "seq_len": "data.window",
}


@pytest.mark.parametrize("key", MEANT)
def test_names_of_other_tools_lead_to_ours(key: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key '{key}', did you mean '{MEANT[key]}'"):
        load_config(overrides=[f"{key}=1"])


def test_every_synonym_is_of_a_setting_that_exists_and_is_none_itself() -> None:
    paths = set(setting_paths(Config))
    assert KEY_SYNONYMS.keys() <= paths
    words = [word for words in KEY_SYNONYMS.values() for word in words.split()]
    assert len(words) == len(set(words))
    assert not {path.rpartition(".")[2] for path in paths} & set(words)
    for key, names in KEY_SYNONYMS.items():
        assert all(settings_like(word, Config) == [key] for word in names.split())
    others = [word for words in CHOICE_SYNONYMS.values() for word in words.split()]
    assert len(others) == len(set(others))


REFUSED = {
    "train.optimizer=sgd": "train.optimizer='sgd' must be one of adam, adamw",
    "train.fraction=0": "train.fraction=0.0 must be in (0, 1]",
    "fraction_fit=0.5": "unknown key 'fraction_fit', did you mean 'train.fraction'?",
    "data.source=file": "'file' must be one of builtin, files, wikitext, hub, empty, or module:name of your own, "
    "did you mean 'files'?",
    "data.source=huggingface": "or module:name of your own, did you mean 'hub'?",
    "blueprint.setting=mlp": "blueprint.setting='mlp' must be one of attn, ffn, both, did you mean 'ffn'?",
    "train.precision=bf16": "train.precision='bf16' must be one of float32, tf32, bfloat16, did you mean 'bfloat16'?",
    "flower.wire_dtype=fp32": "must be one of float32, bfloat16, float16, did you mean 'float32'?",
    "model.architecture=gpt-2": "qwen3, opt, gpt_neox, or module:name of your own, did you mean 'gpt2'?",
    "algorithm=TwIST": "algorithm='TwIST' must be one of twist, fedavg, ddp, did you mean 'twist'?",
    "blueprint.policy=best": "blueprint.policy='best' must be one of random, rolling, ordered, static, importance",
    "blueprint.num_sub=abc": "blueprint.num_sub=abc must be a number of blocks (6), a share of a layer",
    "blueprint.num_sub=[]": "blueprint.num_sub=[] has 0 entries for train.workers=4",
    "blueprint.num_sub=-1": "blueprint.num_sub=-1: a layer's share is 1 block or more, not -1",
    "blueprint.num_sub=6.5": "blueprint.num_sub=6.5 must be a number of blocks (6), a share of a layer",
    "blueprint.num_sub=6,,3": "blueprint.num_sub=6,,3 has an empty place: write 6,3",
    "blueprint.num_sub=[6": "blueprint.num_sub=[6 has one bracket of two: write 6 or 6,3",
    "blueprint.num_sub=null": "blueprint.num_sub=null must be a size, or several as 6,3",
    "train.lr=": "train.lr= has no value: write a number, for example 0.0001, or leave it out",
    "data.path=": "data.path= has no value: write null for none, or leave it out",
    "train.lr=0,001": "train.lr='0,001' must be a number: use 0.001",
    "train.lr=inf": "train.lr=inf must be a number, not infinite",
    "train.lr=1e400": "train.lr=inf must be a number, not infinite",
    "train.workers=1,000": "train.workers='1,000' must be a whole number: use 1000",
    "train.workers=true": "train.workers='true' must be a whole number, for example 4",
    "train.workers=1000000": "train.workers=1000000 is too much: use at most 10000",
    "model.n_layer=1e9": "model.n_layer=1000000000 is too much: use at most 1000",
    "seed=1e30": "seed=1e+30 is too much: use at most 9223372036854775807",
    "flower.round_timeout=inf": "flower.round_timeout=inf is too much: use at most 10000000",
    "data.vocab_size=256": "data.vocab_size=256 must be at least 257",
    "train.compile=maybe": "train.compile='maybe' must be true or false",
    "train.device=gpu": "train.device='gpu' must be auto, cpu, or a GPU as cuda, cuda:1 or mps, did you mean 'cuda'?",
    "train.device=meta": "train.device='meta' must be auto, cpu, or a GPU",
    "name=two words": "name: 'two words' is no name for a folder: use letters, digits, '.', '_', '+' and '-', for "
    "example two_words",
    "name=null": "name=null must be a word, for example run",
    f"name={'a' * 300}": "is no name for a folder: use at most 200 letters",
    "train.lr:1e-3": "is not of the form key=value: did you mean train.lr=1e-3?",
    "deploy.devices=phone": "deploy.devices=phone must be a list of mappings: [{name: ..., memory_mb: ...",
    "data.path=~nobody-here/x data.source=files": "'~nobody-here/x': there is no such user here",
}


@pytest.mark.parametrize("words", REFUSED)
def test_refused(words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(REFUSED[words])):
        load_config(overrides=words.split() if words.count("=") > 1 else [words])


SPACES = {
    ("train.lr", "1e-3"): "did you mean train.lr=1e-3, without spaces?",
    ("train.lr", "=", "1e-3"): "did you mean train.lr=1e-3, without spaces?",
    ("train.lr=", "1e-3"): "'train.lr=' has no value: write train.lr=1e-3 without spaces",
    ("eval.sizes=8,", "6"): "'eval.sizes=8,' goes on in '6': write eval.sizes=8,6 without spaces",
    ("train.lr",): "what is to be its value? train.lr=...",
}


@pytest.mark.parametrize("words", SPACES)
def test_a_setting_in_several_words_is_put_together(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=re.escape(SPACES[words])):
        load_config(overrides=list(words))


READ = {
    "train.lr=1e-3": 1e-3,
    "train.lr=1e3": 1e3,
    "train.lr=1e\u22123": 1e-3,
    "train.lr=\u0661": 1.0,
    "seed=010": 10,
    "seed=1e3": 1000,
    "seed=6.0": 6,
    "seed=1_000": 1000,
    "name=1": "1",
    "name=on": "on",
    "name='quoted'": "quoted",
    "train.compile=yes": True,
    "train.compile=False": False,
    "train.variant=true": "true",
    "blueprint.scale=none": "none",
    "train.threads=none": None,
    "model.pretrained=null": None,
    "eval.sizes=8, 6": [8, 6],
    "eval.sizes=[8,6,]": [8, 6],
    "eval.sizes=8,6,": [8, 6],
    "eval.sizes=[]": [],
    "data.train_glob=*.md": "*.md",
    "train.lr = 0.1": 0.1,
}


@pytest.mark.parametrize("word", READ)
def test_a_value_is_read_by_its_settings_type_and_not_by_yamls_rules(word: str) -> None:
    config = load_config(overrides=[word])
    value: object = config
    for part in word.partition("=")[0].strip().split("."):
        value = getattr(value, part)
    assert (value, type(value)) == (READ[word], type(READ[word]))


@given(st.text(max_size=40))
def test_whatever_is_written_is_read_or_refused(text: str) -> None:
    """Of no setting another error comes."""
    for key in ("seed", "train.lr", "blueprint.num_sub", "train.compile", "data.source", "data.tokenizer", "name"):
        if "${" not in text:
            try:
                load_config(overrides=[f"{key}={text}"])
            except ConfigError as error:
                assert str(error).splitlines() == [str(error)]


IDLE = {
    "blueprint.setting=attn blueprint.ffn_blocks=6": "blueprint.ffn_blocks=6 changes nothing: blueprint.setting=attn",
    "blueprint.setting=ffn blueprint.attn_blocks=heads": "blueprint.setting=ffn leaves attention whole",
    "blueprint.score=taylor": "only blueprint.policy=importance and blueprint.rewire score",
    "blueprint.num_sub=6 blueprint.assign=drawn": "blueprint.num_sub names one size for all: give several",
    "flower.flight=localhost:0 flower.transport=inline": "flower.flight=localhost:0 changes nothing: flower.tr",
    "flower.flight_key=a flower.flight_certificate=b": "flower.flight_certificate=b changes nothing: ",
    "data.train_glob=*.md": "data.train_glob=*.md changes nothing: it is for other text than data.source=builtin",
    "model.pretrained=gpt2 model.n_layer=6": "model.n_layer=6 changes nothing: it is read from model.pretrained=gpt2",
    "data.tokenizer=gpt2 data.vocab_size=300": "data.vocab_size=300 changes nothing: the tokenizer is there already",
    "eval.every=0 eval.watch_windows=5": "eval.every=0 evaluates at the end alone",
    "train.schedule=linear train.decay=0.2": "it is for train.schedule=wsd",
    "aggregate.optimizer=mean aggregate.server_lr=0.7": "aggregate.optimizer=mean has no settings",
    "eval.sizes=[] eval.tickets=5": "eval.tickets=5 changes nothing: eval.sizes=[] draws none",
    "train.device=cpu flower.gpus_per_worker=0.5": "train.device=cpu leaves GPUs alone",
}


@pytest.mark.parametrize("words", IDLE)
def test_a_setting_that_changes_nothing_is_refused_of_a_new_run(words: str) -> None:
    load_config("demo", words.split())
    with pytest.raises(ConfigError, match=re.escape(IDLE[words])):
        load_config("demo", words.split(), strict=True)


def test_what_the_preset_says_may_change_nothing() -> None:
    assert load_config("demo", ["algorithm=fedavg"], strict=True).algorithm == "fedavg"
    assert load_config("demo", ["algorithm=fedavg", "blueprint.num_sub=4"], strict=True).blueprint.num_sub == [4]


FILES = {
    "bad.yaml": (b"name: \xff", r"'bad\.yaml' is not UTF-8 text \(invalid start byte at byte 6\)"),
    "word.yaml": (b"hello", r"'word\.yaml' holds no settings"),
    "deep.yaml": (b"a: " + b"[" * 20_000 + b"]" * 20_000, r"'deep\.yaml' is not YAML: it is nested too deep"),
    "on.yaml": (b"name: on", "name=True must be text: YAML reads on, yes"),
    "nul.yaml": (b'name: "a\\0"', r"name='a\\x00' holds '\\x00', which is no letter"),
    "twice.yaml": (b"seed: 1\nseed: 2", "found duplicate key seed"),
    "own.yml": (b"seed: -3", "seed=-3 must be 0 or more"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_configuration(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, reason = FILES[name]
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    with pytest.raises(ConfigError, match=reason) as found:
        load_config(name)
    assert "\n" not in str(found.value)


def test_what_stands_for_a_preset_and_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for run_ in ("runs/mine", "runs/demo/twist"):
        Path(run_).mkdir(parents=True)
        (Path(run_) / "job.json").touch()
    Path("empty").mkdir()
    Path("mine.yml").touch()
    for given_, reason in {
        "demoo": "no preset 'demoo', did you mean 'demo'?; presets: demo",
        "mine": "no preset 'mine', but a run, runs/mine; presets: demo",
        "runs/mine": "runs/mine is a run: go on with it by `twist-fl train --resume runs/mine`",
        "runs": "runs holds runs: name one, runs/demo/twist or runs/mine",
        "empty": "'empty' is a folder: give a YAML file, or a preset (demo",
        "demo.yaml": "no file 'demo.yaml'; the preset is called demo",
        "mine.yaml": "no file 'mine.yaml', did you mean 'mine.yml'?",
        "": "'' stands where a preset or file is expected: demo, for example",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(reason)):
            load_config(given_)

"""Presets, overrides and errors that teach."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from twist_fl.config.devices import DeviceConfig
from twist_fl.config.schema import Config, from_yaml, load_config, presets, to_yaml
from twist_fl.config.sizes import layout_of, make_division, of_workers, smallest_share
from twist_fl.model.hf_config import scratch_fields
from twist_fl.system.errors import ConfigError
from twist_fl.training.job import Job


def test_defaults_are_the_papers() -> None:
    config = load_config()
    assert config == Config()
    train = config.train
    assert (train.interval, train.lr, train.beta1, train.beta2, train.weight_decay) == (15, 1e-4, 0.9, 0.999, 0.0)
    assert (train.batch_size, train.epochs, train.workers, config.data.window) == (2, 3, 4, 1024)
    assert (config.blueprint.undivided_first, config.blueprint.undivided_last) == (2, 2)
    assert config.eval.tickets >= 20


@pytest.mark.parametrize("preset", presets())
def test_every_preset_loads_and_survives_yaml(preset: str) -> None:
    left = {"wikitext2": ["data.path=some/text"], "finetune": ["model.pretrained=org/model"]}  # to the user
    config = load_config(preset, left.get(preset, ()))
    assert config.name == preset
    assert from_yaml(to_yaml(config)) == config


def test_overrides_win_over_the_preset_and_later_ones_over_earlier(tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("seed: 5\ntrain: {lr: 0.01, workers: 2}\n")
    config = load_config(str(preset), ["train.lr=0.02", "eval.sizes=[3,1]", "train.lr=0.03", "data.path=null"])
    assert (config.seed, config.train.workers, config.train.lr, config.eval.sizes) == (5, 2, 0.03, [3, 1])
    assert config.train.interval == Config().train.interval


def test_round_trip_through_yaml() -> None:
    overrides = ["blueprint.num_sub=[1,2,3,4]", "blueprint.common=1", "train.lr=3e-4", "model.pretrained=./a b"]
    config = load_config(overrides=[*overrides, "deploy.devices=[{name: phone, memory_mb: 300}]", "data.name='1'"])
    assert from_yaml(to_yaml(config)) == config
    assert config.deploy.devices == [DeviceConfig("phone", 300.0, None, None)]


def test_true_is_the_name_of_a_variant() -> None:
    for overrides in ([], ["train.variant=true"], ["train.variant='true'"]):
        config = load_config(overrides=overrides)
        assert config.train.variant == "true"
        assert from_yaml(to_yaml(config)) == config
    with pytest.raises(ConfigError, match=r"train\.variant='false' must be one of true, masked, hybrid"):
        load_config(overrides=["train.variant=false"])


def test_of_epochs_and_rounds_the_later_counts() -> None:
    assert load_config("demo").train.rounds == 100
    assert load_config("demo", ["train.epochs=2"]).train.rounds is None
    both = load_config("demo", ["train.epochs=2", "train.rounds=5"])
    assert (both.train.epochs, both.train.rounds) == (2, 5)
    assert from_yaml(to_yaml(both)) == both


def test_a_path_alone_is_files() -> None:
    assert load_config("demo", ["data.path=texts"]).data.source == "files"
    assert load_config("gpt2-wikitext103", ["data.path=texts"]).data.source == "wikitext"
    assert load_config("demo", ["data.path=org/texts", "data.source=hub"]).data.source == "hub"


def test_one_number_stands_for_all_workers() -> None:
    assert load_config(overrides=["blueprint.num_sub=3"]).blueprint.num_sub == [3]
    sizes = ["blueprint.num_sub=6,50%,0.25,3+6,1/3+.5,1/1", "train.workers=6"]
    assert load_config(overrides=sizes).blueprint.num_sub == [6, "1/2", "1/4", "3+6", "1/3+1/2", "1/1"]
    assert load_config(overrides=["eval.sizes=6,3"]).eval.sizes == [6, 3]


REFUSED = {
    "trian.lr=1": "unknown key 'trian.lr', did you mean 'train.lr'?",
    "train.learning=1": "unknown key 'train.learning'",
    "train.epoch=1": "unknown key 'train.epoch', did you mean 'train.epochs'?",
    "blueprint.nsub=3": "unknown key 'blueprint.nsub', did you mean 'blueprint.num_sub'?",
    "lr=1": "unknown key 'lr', did you mean 'train.lr'?",
    "batch_size=1": "unknown key 'batch_size', did you mean 'train.batch_size' or 'eval.batch_size'?",
    "data={source: builtin, path: texts}": "data.path='texts' is not read with data.source=builtin: add data.source=fi",
    "qqq=1": "unknown key 'qqq'; known here: name, algorithm, seed",
    "deploy.devices=[{memory: 3}]": "'memory_mb'",
    "deploy.devices=[{name: tv}]": "deploy.devices 'tv' has no limit: give memory_mb, latency_ms, prompt_ms, kappa, or",
    "deploy.devices=[{kappa: 1.5}]": "deploy.devices 'device': kappa=1.5 must be in (0, 1]",
    "deploy.devices=[{latency_ms: 0, kappa: 1}]": "deploy.devices 'device': latency_ms=0 must be more than 0",
    "deploy.devices=[{memory_mb: nan}]": "deploy.devices 'device': memory_mb=nan must be more than 0",
    "train.lr": "override 'train.lr' is not of the form key=value",
    "train=3": "train is a section: set one of its keys, for example train.workers=",
    "train.lr=fast": "train.lr='fast' must be a number, for example 0.0001",
    "train.lr.x=1": "'train.lr.x' is no key: train.lr holds one value",
    "train.workers=2.5": "train.workers=2.5 must be a whole number: use 2 or 3",
    "train.epochs=null": "train.epochs=null must be a whole number, for example 3",
    "train.lr=[1,": "train.lr='[1,' must be a number, for example 0.0001",
    "deploy.devices=[{name: tv": "is not YAML: close its brackets, or quote it",
    "eval.sizes=few": "eval.sizes=few must be a number of blocks (6), a share of a layer",
    "train.lr=${nope}": "train.lr: Interpolation key 'nope' not found",
    "algorithm=twits": "algorithm='twits' must be one of twist, fedavg, ddp, did you mean 'twist'?",
    "blueprint.scale=cubic": "blueprint.scale='cubic' must be one of sqrt, linear, none",
    "seed=-1": "seed=-1 must be 0 or more",
    "train.workers=0": "train.workers=0 must be more than 0",
    "train.interval=-3": "train.interval=-3 must be more than 0",
    "train.rounds=0": "train.rounds=0 must be more than 0",
    "train.lr=nan": "train.lr=nan must be more than 0",
    "train.beta2=1": "train.beta2=1.0 must be in [0, 1)",
    "train.weight_decay=-1": "train.weight_decay=-1.0 must be 0 or more",
    "data.window=1": "data.window=1 must be at least 2",
    "data.test_fraction=1": "data.test_fraction=1.0 must be between 0 and 1",
    "name=../other": "name: '../other' is no name for a folder",
    "flower.gpus_per_worker=-1": "flower.gpus_per_worker=-1.0 must be 0 or more",
    "data.source=files": "data.source=files needs data.path",
    "model.dropout=1": "model.dropout=1.0 must be in [0, 1)",
    "model.n_embd=100": "model.n_embd=100 must be a multiple of model.n_head=12: use 96",
    "blueprint.undivided_first=-1": "blueprint.undivided_first=-1 must be 0 or more",
    "blueprint.num_sub=[6,6]": "blueprint.num_sub=6,6 has 2 entries for train.workers=4",
    "blueprint.num_sub=1+2+3": "blueprint.num_sub=1+2+3 must be a number of blocks (6), a share",
    "flower.transport=flight": "flower.transport=flight needs flower.flight: the server's HOST:PORT, as nodes name it",
    "flower.flight=localhost": "flower.flight='localhost' is not HOST:PORT with a port of 0 to 65535, for example",
    "flower.flight=http://localhost:1": "flower.flight='http://localhost:1' is not HOST:PORT",
    "flower.flight=localhost:70000": "flower.flight='localhost:70000' is not HOST:PORT with a port of 0 to 65535",
    "flower.flight_key=server.key": "flower.flight_certificate and flower.flight_key belong together: give both or",
    "eval.every=-1": "eval.every=-1 must be 0 or more",
}


@pytest.mark.parametrize("override", REFUSED)
def test_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(REFUSED[override])):
        load_config(overrides=[override])


def test_an_unknown_preset_or_file() -> None:
    with pytest.raises(ConfigError, match="no preset 'wikitxt'"):
        load_config("wikitxt")
    with pytest.raises(ConfigError, match=r"no file 'nowhere\.yaml'"):
        load_config("nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "message"), [("- 1", "is a mapping of keys to values"), ("a: [1", "is not YAML"), ("null: 1", "key type")]
)
def test_a_file_that_is_no_configuration(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(str(file))


JOB_REFUSED = {
    "data.window=33": "data.window=33 is longer than the model's context: use at most 32",
    "blueprint.num_sub=1": "cannot cover all 4 blocks; the smallest legal N_sub for all is 2",
    "blueprint.num_sub=5": "blueprint.num_sub=5 of a layer's 4 blocks is impossible: choose 1 to 4",
    "blueprint.ffn_blocks=7": "blueprint.ffn_blocks=7 does not divide the 128 FFN neurons: use 8",
    "blueprint.undivided_first=3": "leave none of the 5 layers to divide",
    "eval.sizes=5": "eval.sizes=5 of a layer's 4 blocks is impossible: choose 1 to 4",
    "blueprint.common=5": "blueprint.common=5 of a layer's 4 blocks is impossible: choose 0 to 4",
    f"data.path={'a' * 300}": "cannot be looked for: File name too long",
    "model.pretrained=./no/such/folder": "model.pretrained='./no/such/folder' does not exist",
    "model.pretrained=/etc": "model.pretrained='/etc' holds no model (no config.json): give a run that has a",
}


@pytest.mark.parametrize("override", JOB_REFUSED, ids=lambda word: word[:40])
def test_refused_before_anything_starts(override: str, tiny_job: Callable[..., Job]) -> None:
    with pytest.raises(ConfigError, match=re.escape(JOB_REFUSED[override])):
        tiny_job(override)


@pytest.mark.parametrize(("workers", "dealt"), [(2, [12, 6]), (5, [12, 6, 4, 3, 12]), (8, [12, 6, 4, 3] * 2)])
def test_the_demos_sizes_go_round_however_many_workers_there_are(workers: int, dealt: list[int]) -> None:
    config = load_config("demo", [f"train.workers={workers}"])
    layout = layout_of(config, scratch_fields(config.model, config.data.vocab_size))
    division = make_division(config, layout)
    division.check(layout, True)
    assert [size[0] for size in division.num_sub] == dealt
    assert sorted(division.sizes(layout, 0, 1)) == sorted(division.num_sub)


def test_sizes_that_are_shuffled_are_dealt_out_to_those_who_train() -> None:
    config = load_config("demo", ["train.workers=20", "train.fraction=0.2"])
    layout = layout_of(config, scratch_fields(config.model, config.data.vocab_size))
    division = make_division(config, layout)
    for share in (of_workers(division, [3, 7, 11, 19]), smallest_share(config, division)):
        share.check(layout, True)
        assert [size[0] for size in share.num_sub] == [12, 6, 4, 3]

"""Any checkpoint is a start: what commands say of a model is what they would say of a run that had just begun."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from small_tickets import fields
from transformers import AutoModelForCausalLM

from twist_fl import TrainedRun
from twist_fl.config.schema import load_config
from twist_fl.data.tokenizer import train_tokenizer
from twist_fl.model.hf_config import config_from_dict
from twist_fl.model.saved import open_model
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.start import find_start
from twist_fl.system.errors import ConfigError
from twist_fl.tickets import gguf_format
from twist_fl.tickets.evaluate import perplexity
from twist_fl.training.job import make_job

WORDS = ("blueprint.undivided_first=1", "blueprint.undivided_last=0", "eval.batch_size=4", "eval.max_windows=6")
"""Of the model's three layers, two are divided."""
OF_A_RUN = ("train.rounds=2", "train.workers=2", "blueprint.num_sub=1/2", "eval.sizes=1/1,1/2,1/4", "data.window=64")

pytestmark = pytest.mark.usefixtures("no_flower")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    """A tiny Llama that nobody has trained, with a tokenizer of the text."""
    folder = tmp_path_factory.mktemp("models") / "my-llama"
    tokenizer = train_tokenizer([(text_folder / "train.txt").read_text()], 300)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    auto.from_config(config_from_dict(fields("llama", vocab_size=len(tokenizer)))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gguf(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as one file."""
    run, folder = TrainedRun(model, WORDS), tmp_path_factory.mktemp("files")
    run.export(run.blueprint(), folder / "gguf", "gguf")
    return (folder / "gguf" / gguf_format.FILE).rename(folder / "my-gguf.gguf")


@pytest.fixture
def begun(model: Path, text_folder: Path, tmp_path: Path) -> RunFolder:
    """A run from the model of which nothing is trained yet, and which is saved."""
    from twist_fl import rounds

    settings = [f"model.pretrained={model}", f"data.path={text_folder}", *WORDS, *OF_A_RUN]
    job, folder = make_job(load_config(None, settings)), RunFolder(tmp_path / "runs" / "begun")
    folder.create(job)
    folder.save(rounds.start(job), job.model_config, job.corpus.tokenizer_folder)
    return folder


def test_a_model_a_file_and_a_run_from_it_are_the_same(
    model: Path, gguf: Path, begun: RunFolder, text_folder: Path
) -> None:
    words = (*WORDS, f"data.path={text_folder}")
    starts = [TrainedRun(model, words), TrainedRun(gguf, words), TrainedRun(begun.path)]
    for other in starts[1:]:
        assert other.job.division.layers(3) == starts[0].job.division.layers(3)
        assert all(torch.equal(other.state.params[key], value) for key, value in starts[0].state.params.items())
        assert [*other.test.flat] == [*starts[0].test.flat]
        for size in ("1/1", "1/2"):
            assert other.tickets(size, 2) == starts[0].tickets(size, 2)
    assert [run.state.round for run in starts] == [0, 0, 0]
    assert [run.title for run in starts] == ["my-llama", "my-gguf", f"{begun.path}, round 0"]


def test_a_model_that_one_holds_is_left_alone_by_evaluations(model: Path, text_folder: Path) -> None:
    run = TrainedRun(model, (*WORDS, f"data.path={text_folder}"))
    held = run.model()
    before = {key: tensor.clone() for key, tensor in held.state_dict().items()}
    run.tickets("1/1")
    run.perplexity()
    assert all(torch.equal(before[key], tensor) for key, tensor in held.state_dict().items())
    assert run.perplexity() == perplexity(held, run.test, run.job.config.eval.batch_size)


def test_query_heads_are_blocks_of_a_model_as_it_is(model: Path, text_folder: Path, tmp_path: Path) -> None:
    """The whole model is the same whatever its blocks are, and what is exported is what was evaluated."""
    words = (*WORDS, f"data.path={text_folder}")
    run = TrainedRun(model, (*words, "blueprint.attn_blocks=heads", "blueprint.ffn_blocks=6", "blueprint.common=1+2"))
    assert run.job.layout.num_blocks == (8, 6)
    assert run.perplexity() == TrainedRun(model, words).perplexity()
    for size, held in (("1/3", (3, 2)), ("3+6", (3, 6)), ("5", (5, 4)), ("8+2", (8, 2))):
        ticket = run.blueprint(size)
        assert (len(ticket.attn[1]), len(ticket.ffn[1])) == held
        assert ticket.attn[1][0] == 0
        opened = open_model(run.export(ticket, tmp_path / size.replace("/", "-")).folder)
        assert perplexity(opened, run.test, 4) == pytest.approx(run.perplexity(ticket), rel=1e-5)


def test_every_command_says_of_a_model_what_it_says_of_a_run(
    run: Run, model: Path, gguf: Path, begun: RunFolder, text_folder: Path, tmp_path: Path
) -> None:
    words = (*WORDS, f"data.path={text_folder}", "deploy.new_tokens=4")
    given: dict[str, tuple[Any, ...]] = {
        "tickets": ("--draws", 2),
        "generate": ("--size", "1/2", "--temperature", 0, "--new-tokens", 6),
        "export": ("--size", "1/2"),
        "prune": ("--method", "magnitude,se", "--draws", 2, "--sizes", "1/2"),
        "deploy": ("--device", "phone=50%"),
    }
    for command, options in given.items():
        said = []
        for start, settings in ((model, words), (gguf, words), (begun.path, ())):
            status, output, error = run(command, start, *options, *settings)
            assert status == 0, error
            said.append(output)
        if command in ("tickets", "generate"):
            rest = [text.split("perplexity", 1)[-1] for text in said]
            assert rest[0] == rest[1] == rest[2]
    folders = [tmp_path / "runs" / name for name in ("my-llama", "my-gguf", "begun")]
    pruned = [json.loads((folder / "pruned.json").read_text()) for folder in folders]
    assert pruned[0]["full"] == pruned[1]["full"] == pruned[2]["full"]
    assert [row["perplexity"] for row in pruned[0]["rows"]] == [row["perplexity"] for row in pruned[2]["rows"]]
    devices = [json.loads((folder / "deployed.json").read_text())[0] for folder in folders]
    assert devices[0]["perplexity"] == devices[1]["perplexity"] == devices[2]["perplexity"]
    assert len({(each["size"], each["weight_mb"]) for each in devices}) == 1
    for folder in folders[:2]:
        card = (folder / "exports" / "2-of-4-compact-float32" / "README.md").read_text()
        assert f"| source | `{folder.name}` as it is, drawn with" in card
        assert "rounds of training" not in card
        assert {file.name for file in folder.iterdir()} >= {"deployed", "exports", "pruned.json"}
    assert not [file for file in model.iterdir() if file.stat().st_mtime > begun.job_file.stat().st_mtime]


def test_cost_is_on_paper(run: Run, model: Path, gguf: Path) -> None:
    said = [run("cost", start, *WORDS[:2], "train.lr=1") for start in (model, gguf)]
    assert [status for status, _, _ in said] == [0, 0]
    below = [text[text.index("┏") :] for _, text, _ in said]  # above stand their names, in one line or two
    assert below[0] == below[1]
    assert "4 x 2/4" in said[0][1]


def test_results_go_where_they_are_told_to(run: Run, model: Path, text_folder: Path, tmp_path: Path) -> None:
    words = ("--device", "phone=50%", *WORDS, f"data.path={text_folder}", "deploy.new_tokens=4")
    status, _, error = run("deploy", model, "--out", "there", *words)
    assert status == 0, error
    assert {file.name for file in (tmp_path / "there").iterdir()} >= {"deployed", "deployed.json"}
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["deploy", "prune", "export"])
def test_nothing_is_written_where_something_else_is(
    command: str, run: Run, model: Path, begun: RunFolder, tmp_path: Path
) -> None:
    begun.path.rename(begun.path.with_name("my-llama"))
    status, _, error = run(command, model, *WORDS)
    assert status == 2
    assert f"{tmp_path / 'runs' / 'my-llama'}, where results of my-llama would go, holds a run: give --out" in error
    shutil.rmtree(tmp_path / "runs")
    shutil.copytree(model, tmp_path / "runs" / "my-llama")
    status, _, error = run(command, "runs/my-llama", *WORDS)
    assert status == 2
    assert "runs/my-llama, where results of my-llama would go, holds a model: give --out FOLDER" in error


def test_text_is_read_by_what_needs_it_alone(run: Run, model: Path) -> None:
    absent = (*WORDS, "data.path=absent")
    for command in ("generate", "export"):
        assert run(command, model, *absent)[0] == 0
    for command in ("tickets", "prune", "deploy"):
        status, _, error = run(command, model, *absent)
        assert status == 2
        assert "data.path='absent' does not exist" in error


def test_a_window_is_no_longer_than_the_context_unless_it_is_given(model: Path) -> None:
    assert find_start(model, WORDS).job.config.data.window == 64
    assert find_start(model, [*WORDS, "data.window=16"]).job.config.data.window == 16
    with pytest.raises(ConfigError, match=r"data\.window=128 is longer than the model's context: use at most 64"):
        find_start(model, [*WORDS, "data.window=128"])


def refused(start: Path | str, match: str, *words: str) -> None:
    with pytest.raises(ConfigError, match=match):
        find_start(start, words).load()


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        (
            "train.lr=1",
            r"train\.lr changes nothing here: .* is a model as it is, and nothing trains it\. What counts: s",
        ),
        ("blueprint.num_sub=2", r"blueprint\.num_sub changes nothing here"),
        ("data.private=nodes", r"data\.private|train\.rounds"),
        ("model.n_layer=2", r"model\.n_layer=2 changes nothing: it is read from model\.pretrained="),
        ("blueprint.undivided_last=2", "leave none of the 3 layers to divide: make their sum at most 2"),
        ("blueprint.nsub=2", r"unknown key 'blueprint\.nsub', did you mean"),
        ("eval.sizes=9", r"eval\.sizes=9 of a layer's 4 blocks is impossible"),
    ],
)
def test_a_setting_that_means_nothing_of_a_model_is_refused(word: str, reason: str, model: Path) -> None:
    refused(model, reason, *WORDS, word)


def test_the_settings_of_a_run_are_fixed(begun: RunFolder) -> None:
    refused(
        begun.path,
        r"blueprint\.ffn_blocks=2 would make it another run: this one has None\. .*; for a model with other settings, "
        rf"give {begun.path / 'checkpoints' / 'round-000000'}",
        "blueprint.ffn_blocks=2",
    )
    assert find_start(begun.checkpoints()[-1], [*WORDS, "blueprint.ffn_blocks=2"]).job.layout.num_blocks == (4, 2)


def test_what_is_neither_run_nor_model_is_refused(
    model: Path, begun: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    refused("empty", r"^empty holds no model \(no config\.json\): give a run that has a checkpoint, .* a GGUF file")
    refused("org/name", r"^no run 'org/name', and as a model it is neither here nor among .* the hub cannot be reached")
    refused("runs", rf"holds no run itself \(no job\.json\), but runs: give {Path('runs/begun')}")
    refused("begun", r"does not exist: .*, did you mean runs/begun\?")
    refused("./absent", "does not exist")
    shutil.rmtree(begun.path / "checkpoints")
    refused(begun.path, "has no checkpoint yet: let it train for checkpoint_every rounds")
    small = TrainedRun(model, WORDS)
    small.export(small.blueprint("1/2"), tmp_path / "small")
    refused("small", r"^small is a ticket, whose layers differ in size: give the run it was drawn from")
    gpt = tmp_path / "gpt.gguf"
    gpt.write_bytes(b"nothing")
    refused(gpt, r"gpt\.gguf is no GGUF model that can be read")


def test_a_tokenizer_that_is_too_large_is_refused(model: Path, text_folder: Path, tmp_path: Path) -> None:
    larger = train_tokenizer([f"{(text_folder / 'train.txt').read_text()} {list(range(300))}"], 400)
    larger.save_pretrained(tmp_path / "larger")
    given = TrainedRun(model, [*WORDS, f"data.path={text_folder}", f"data.tokenizer={tmp_path / 'larger'}"])
    with pytest.raises(ConfigError, match=r"the tokenizer has \d+ tokens and model\.pretrained=.* only 300"):
        given.perplexity()


def test_weights_that_do_not_fit_are_refused(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    about = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(about | {"intermediate_size": 40}))
    refused(copy, "does not fit its config.json", *WORDS)

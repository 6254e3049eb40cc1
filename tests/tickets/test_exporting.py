"""`twist-fl export`: one command for every format, a model card beside each, nothing left of what fails."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from small_tickets import ticket

from twist_fl import TrainedRun
from twist_fl.runs import local
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.errors import LaunchError
from twist_fl.tickets.card import Source, licence_of, model_card
from twist_fl.tickets.export import make_ticket, write_ticket
from twist_fl.tickets.exporting import export
from twist_fl.training.job import Job

SOURCE = Source("mine", 7, None, None)


@pytest.fixture(scope="module")
def trained(tiny_job: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "tiny")
    folder.create(tiny_job("eval.every=0", "eval.max_windows=4", "eval.tickets=1", "name=tiny"))
    local.train_local(folder, eval_threads=1)
    return folder.path


def test_the_command_writes_checks_and_says_so(run: Run, trained: Path, tmp_path: Path) -> None:
    status, output, error = run("export", str(trained), "--size", "1/2", "--out", str(tmp_path / "phone"))
    assert status == 0, error
    expected = (
        r"phone: \d+\.\d kB; checked in transformers: 31 of 31 likeliest tokens are the ticket's, perplexity 0 % off"
    )
    assert re.search(expected, " ".join(output.split()))
    about = json.loads((tmp_path / "phone" / "twist.json").read_text())
    assert about["blueprint"] == json.loads(TrainedRun(trained).blueprint(2).to_json())
    card = (tmp_path / "phone" / "README.md").read_text()
    for words in (
        "run `tiny` after 2 rounds",
        about["digest"],
        "0.5 of attn, 0.5 of ffn",
        "| perplexity | not measured",
    ):
        assert words in card
    settings = json.loads((tmp_path / "phone" / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 32
    assert settings["pad_token"] == settings["eos_token"]


def test_a_smaller_dtype_is_half_the_size_and_its_card_knows_a_perplexity(run: Run, trained: Path) -> None:
    words = ("export", str(trained), "--size", "2", "--draw", "1", "--dtype", "bfloat16", "--windows", "4")
    assert run(*words)[0] == 0
    folder, source = trained / "exports" / "2-of-4-compact-bfloat16", TrainedRun(trained)
    blueprint = source.blueprint(2, draw=1)
    ours = make_ticket(source.job.layout, source.state.params, source.job.model_config.to_dict(), blueprint, "sqrt")
    assert 0 < (folder / "model.safetensors").stat().st_size - 2 * ours.num_params < 10_000
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    card = (folder / "README.md").read_text()
    assert ours.digest in card
    assert f"| perplexity | {source.perplexity(blueprint, source.test):.2f} on 64 test tokens" in card


def test_a_format_of_the_users_comes_in_by_the_same_door(
    run: Run, trained: Path, user_module: Callable[[str], str], tmp_path: Path
) -> None:
    module = user_module(
        "def names(ticket, folder, tokenizer_folder, dtype):\n"
        "    (folder / 'ours.txt').write_text(ticket.digest + str((tokenizer_folder / 'tokenizer.json').is_file()))\n"
        "    return 'a look'\n"
    )
    status, output, _ = run("export", str(trained), "--format", f"{module}:names", "--out", str(tmp_path / "ours"))
    assert (status, output.split(";")[-1].strip()) == (0, "checked in a look")
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {"ours.txt", "README.md", "SHA256SUMS"}
    assert (tmp_path / "ours" / "ours.txt").read_text().endswith("True")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--format", "compcat"), r"format='compcat' must be one of compact, hf, gguf, .*did you mean 'compact'\?"),
        (("--format", "json:loads"), r"must be a function \(ticket, folder, tokenizer_folder, dtype\) -> words"),
        (("--dtype", "int3"), r"--dtype 'int3': the format compact has float32, bfloat16, float16"),
        (("--size", "half"), r"--size half must be a number of blocks \(6\), a share of a layer \(1/2, 50%\), or both"),
        (("--size", "5"), r"--size 5 of a layer's 4 blocks is impossible: choose 1 to 4"),
        (("--format", "gguf"), r"--format gguf: llama\.cpp has layers of different sizes for the Llama family"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    words: tuple[str, ...], reason: str, run: Run, trained: Path, tmp_path: Path
) -> None:
    status, _, error = run("export", str(trained), *words, "--out", str(tmp_path / "not"))
    assert status == 2
    assert re.search(reason, " ".join(error.split()))
    assert not list(tmp_path.iterdir())


def test_an_export_that_is_not_the_ticket_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(ticket: Any, folder: Path, tokenizer_folder: Path | None) -> None:
        ticket.params["model.norm.weight"][0] += 1
        write_ticket(ticket, folder, tokenizer_folder)
        ticket.params["model.norm.weight"][0] -= 1

    monkeypatch.setattr("twist_fl.tickets.hf_formats.write_ticket", wrong)
    with pytest.raises(LaunchError, match=r"the export is not the ticket: .* nothing was written"):
        export(ticket(), tmp_path / "phone", "compact", "float32", None, SOURCE)
    assert not list(tmp_path.iterdir())


def test_the_card_has_the_licence_of_the_base(tmp_path: Path) -> None:
    assert licence_of(tmp_path) is None
    assert licence_of(None) is None
    (tmp_path / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n\nlicense: none\n")
    assert licence_of(tmp_path) == "apache-2.0"
    card = model_card(ticket(), Source("mine", 7, "org/base", "apache-2.0"), "hf", "float32", "all", "1 MB")
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\nlicense: apache-2.0\n---\n")
    assert "| base model | org/base |" in card
    unknown = model_card(ticket(), Source("mine", 7, "org/base", None), "hf", "float32", "all", "1 MB")
    assert "| licence | that of the base model |" in unknown
    assert "license:" not in unknown

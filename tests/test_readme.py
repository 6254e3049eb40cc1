"""The README's commands run, and its table is the committed one."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from twist_fl.cli import app
from twist_fl.config import load_config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("twist-fl ")
]
TINY = [
    *("model.n_layer=3", "model.n_embd=24", "model.n_positions=16", "data.window=16", "data.vocab_size=300"),
    *("blueprint.undivided_first=1", "blueprint.num_sub=6", "train.workers=2", "train.rounds=2", "train.interval=2"),
    *("train.batch_size=2", "eval.tickets=2", "eval.sizes=[6]", "deploy.new_tokens=4"),
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_is_one_that_exists(words: list[str]) -> None:
    name, *rest = words
    group = typer.main.get_command(app)
    parsed = group.commands[name].make_context(name, rest)  # type: ignore[attr-defined]
    if name in ("train", "cost") and "runs/mine" not in words:
        load_config(parsed.params["preset"], parsed.params["overrides"] or [])


def test_your_text_block_runs(tmp_path: Path, text_folder: Path) -> None:
    (tmp_path / "my_texts").symlink_to(text_folder)
    block = next(block for block in BLOCKS if "data.path=my_texts" in block)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for line in block.splitlines():
        words = shlex.split(line, comments=True)
        if words[1] == "train":
            words += TINY
        if words[1] == "deploy":
            for there, here in (("phone=2.0", "phone=1.0"), ("watch=1.3", "watch=0.9MB"), ("20ms", "2000ms")):
                words = [word.replace(there, here) for word in words]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
    assert (tmp_path / "report.html").read_text().count("<svg") == 3
    assert (tmp_path / "runs" / "mine" / "deployed" / "phone" / "model.safetensors").is_file()


def test_the_table_is_the_published_one() -> None:
    table = (ROOT / "results" / "demo" / "table.md").read_text()
    assert f"<!-- table: results/demo/table.md -->\n{table}<!-- /table -->" in README


def test_the_map_of_the_code_has_every_file() -> None:
    """The package's own, folders as a whole."""
    named = (ROOT / "docs" / "code.md").read_text().partition("## The files")[2].partition("## ")[0]
    package = ROOT / "twist_fl"
    modules = {path.name for path in package.glob("*.py")} | {f"{path.parent.name}/" for path in package.glob("*/*.py")}
    assert modules - set(re.findall(r"[\w/]+(?:\.py|/)", named)) == {"__init__.py"}


def test_files_the_readme_names_exist() -> None:
    for name in re.findall(r"\]\(([^):]+)\)", README):
        assert (ROOT / name).exists(), name

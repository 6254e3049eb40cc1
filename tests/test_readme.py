"""The README's commands run, and the map of the code has every file; `test_docs.py` holds the rest."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from conftest import Run

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("twist-fl ")
]
MINE = [words for words in COMMANDS if {"name=mine", "runs/mine"} & set(words) and "runs/mine-fedavg" not in words]
"""Those on one's own text: in the README's order each finds what those before have left."""
SMALLER = {
    "phone=2.0MB,20ms": "phone=1.0MB,2000ms",
    "watch=1.3MB": "watch=0.9MB",
    **{"train.rounds=200": "train.rounds=3", "data.path=NEW": "data.path=my_texts"},
}
"""For the tiny model and its text."""
TINY = [
    *("model.n_layer=3", "model.n_embd=24", "model.n_positions=16", "data.window=16", "data.vocab_size=300"),
    *("blueprint.undivided_first=1", "train.workers=2", "train.rounds=2", "train.interval=2"),
    *("train.batch_size=2", "eval.tickets=2", "eval.sizes=[6]", "eval.max_windows=16", "deploy.new_tokens=4"),
]
FASTER = {
    "name=mine": [*TINY, "--local"],  # in a simulation: tests/federation/test_app.py
    "prune": ["--draws", "2", "--calibration", "8"],
    "tickets": ["--draws", "2"],
    "train.rounds=200": ["--local"],
}
"""What is added to a command that has the word."""


def test_the_commands_on_your_own_text_run(tmp_path: Path, text_folder: Path, run: Run) -> None:
    (tmp_path / "my_texts").symlink_to(text_folder)
    assert [words[1] for words in MINE][:3] == ["train", "tickets", "generate"]
    for words in MINE:
        more = [option for word, options in FASTER.items() if word in words for option in options]
        tiny = [SMALLER.get(word, word) for word in words]
        status, out, err = run(*tiny[1:], *more)
        assert status == 0, f"{words}: {out}{err}"
    assert (tmp_path / "report.html").read_text().count("<svg") == 3
    assert (tmp_path / "runs" / "mine" / "deployed" / "phone" / "model.safetensors").is_file()


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 140


def test_the_map_of_the_code_has_every_file() -> None:
    """Each where it lies; of the pruning papers and the experiments the folders as a whole."""
    named = (ROOT / "docs" / "code.md").read_text().partition("## The files")[2].partition("## ")[0]
    folder, listed = "", set()
    for line in named.splitlines():
        if at := re.match(r"  (\w+)/ ", line):
            folder = f"{at[1]}/"
            listed.add(folder)
        elif line.startswith("  "):
            folder *= line.startswith("    ")
            listed |= {folder + name for name in re.findall(r"\w+\.py", line)}
    package = ROOT / "twist_fl"
    files = {str(path.relative_to(package)) for path in package.rglob("*.py") if not path.name.startswith("__")}
    whole = ("pruning/", "experiments/")
    assert {name for name in listed if name.endswith(".py")} == {name for name in files if not name.startswith(whole)}
    assert {name for name in listed if name.endswith("/")} == {
        f"{path.parent.name}/" for path in package.glob("*/*.py")
    }

"""Files and folders are whole or absent, and a sealed folder shows every change (twist_fl/system/files.py)."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from twist_fl.system.errors import DamagedError
from twist_fl.system.files import SEAL, check_seal, new_file, new_folder, remove_unfinished, save_tensors, write_text


def fill(folder: Path, text: str = "old") -> Path:
    with new_folder(folder, sealed=True) as making:
        (making / "inner").mkdir()
        (making / "inner" / "text").write_text(text)
        save_tensors({"a": torch.arange(6.0)}, making / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("sealed") / "folder")


def test_a_seal_holds_until_something_changes(sealed: Path) -> None:
    check_seal(sealed)
    (sealed / ".DS_Store").touch()  # a file manager's
    check_seal(sealed)


@pytest.mark.parametrize("harm", [Path.unlink, lambda file: file.write_bytes(b"other")])
def test_what_people_put_beside_a_sealed_model_is_let_be(harm: Callable[[Path], object], tmp_path: Path) -> None:
    folder = fill(tmp_path / "folder")
    (folder / "README.md").write_text("mine")
    check_seal(folder)
    (folder / "notes.txt").write_text("mine")
    check_seal(folder, others=True)
    with pytest.raises(DamagedError, match=r"notes\.txt is not what was written"):
        check_seal(folder)
    harm(folder / "model.safetensors")
    with pytest.raises(DamagedError, match=r"model\.safetensors is not what was written"):
        check_seal(folder, others=True)


@given(data=st.data())
def test_any_changed_byte_shows(data: st.DataObject, sealed: Path) -> None:
    file = sealed / data.draw(st.sampled_from([SEAL, "inner/text", "model.safetensors"]))
    content = file.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[place]))
    file.write_bytes(content[:place] + bytes([other]) + content[place + 1 :])
    try:
        with pytest.raises(DamagedError, match="remove the folder"):
            check_seal(sealed)
    finally:
        file.write_bytes(content)


@pytest.mark.parametrize("harm", ["missing", "cut", "more", "no seal"])
def test_any_other_harm_shows_too(harm: str, tmp_path: Path) -> None:
    folder = fill(tmp_path / "folder")
    if harm == "missing":
        (folder / "inner" / "text").unlink()
    elif harm == "cut":
        os.truncate(folder / "model.safetensors", 10)
    elif harm == "more":
        (folder / "tokenizer.json").touch()
    else:
        (folder / SEAL).unlink()
    with pytest.raises(DamagedError, match=str(folder)):
        check_seal(folder)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_the_seal_is_what_sha256sum_reads(sealed: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--strict", SEAL], cwd=sealed, check=True, capture_output=True)


def test_all_files_have_the_modes_that_the_user_asks_for(tmp_path: Path) -> None:
    code = (
        "import os, sys, torch; from pathlib import Path; from twist_fl.system.files import *; os.umask(0o027)\n"
        "with new_folder(Path(sys.argv[1]) / 'made') as making:\n"
        "    write_text('text', making / 'text'); save_tensors({'a': torch.ones(1)}, making / 'tensors')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "made").iterdir()} == {0o640}


def test_a_folder_is_there_at_every_moment_while_it_is_replaced(tmp_path: Path) -> None:
    """A process that only looks never finds it missing or half full."""
    folder = fill(tmp_path / "folder")
    code = (
        "import sys; from pathlib import Path; text = Path(sys.argv[1]) / 'inner' / 'text'\n"
        "print('looking', flush=True)\n"
        "while (found := text.read_text()) != 'end': assert found in ('old', 'new')\n"
    )
    looking = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
    with looking:
        assert looking.stdout is not None
        looking.stdout.readline()
        for text in [*["new", "old"] * 20, "end"]:
            fill(folder, text)
        assert looking.wait(60) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_fails_leaves_the_old_and_nothing_else(tmp_path: Path) -> None:
    folder, file = fill(tmp_path / "folder"), tmp_path / "file"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError), new_folder(folder) as making:
        (making / "half").touch()
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), new_file(file) as making:
        making.write_text("half")
        raise ZeroDivisionError
    check_seal(folder)
    assert file.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / ("b" * 252)  # with a process id it is too long
    with pytest.raises(OSError, match=re.escape(f"'{file}'")), new_file(file):
        pass


@pytest.mark.parametrize("what", ["text", "tensors", "tokenizer", "a file in a folder"])
def test_a_full_disk_names_what_was_to_be_written(what: str, tmp_path: Path) -> None:
    """Of any library that writes; a limit of the size of files stands for the disk's."""
    target = tmp_path / "target"
    tokenizer = Tokenizer(WordLevel({f"a long word, number {i}": i for i in range(200)}, "a long word, number 0"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=re.escape(f"File too large: '{target}'")) as raised:
            if what == "text":
                write_text("text" * 1000, target)
            elif what == "tensors":
                save_tensors({"a": torch.ones(1000)}, target)
            elif what == "tokenizer":
                with new_folder(target) as making:
                    tokenizer.save(str(making / "tokenizer.json"))
            else:
                with new_folder(target) as making:
                    save_tensors({"a": torch.ones(1000)}, making / "tensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_had_begun_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".round-000002.123").mkdir()
    (tmp_path / ".results.json.77").touch()
    kept = [tmp_path / name for name in (".command.lock", "round-000001", ".hidden.x1")]
    for path in kept:
        path.touch()
    remove_unfinished(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)

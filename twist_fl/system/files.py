"""Files and folders that are either whole or absent: written to a temporary name, flushed, and renamed.

A sealed folder also says what must be in it: SHA256SUMS has a hash of every file, as `sha256sum --check` reads it.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import inf, isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twist_fl.system.errors import DamagedError
from twist_fl.system.untrusted import plain

if TYPE_CHECKING:
    import torch

SEAL, CARD = "SHA256SUMS", "README.md"


def write_text(text: str, path: Path) -> None:
    """UTF-8, line ends as they are."""
    with new_file(path) as making:
        making.write_bytes(text.encode())


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A name to write to, which takes the place of `path` when all that was written is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    making = _making(path)
    with _named_by(path, making):
        try:
            making.touch()
            mode = making.stat().st_mode  # what the user's umask says; safetensors has its own opinion
            yield making
            making.chmod(mode)
            _flush(making)
            making.replace(path)
            _flush(path.parent)
        finally:
            making.unlink(missing_ok=True)


@contextmanager
def _named_by(path: Path, making: Path) -> Iterator[None]:
    """An error of the disk is an OSError of the name that the caller knows."""
    try:
        yield
    except OSError as error:
        if error.errno is None or not str(error.filename or making).startswith(str(making)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    except (
        Exception
    ) as error:  # libraries in Rust say it in words: safetensors in a type of its own, tokenizers in none
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None


def _making(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def remove_unfinished(folder: Path) -> None:
    """What a process that was killed had begun in `folder`. Nobody else may be writing there."""
    for path in folder.glob(".*.*"):
        if re.fullmatch(r"\..+\.\d+", path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _flush(path: Path) -> None:
    """Onto the disk: a file's content, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_NOT_FINITE = {"Infinity": inf, "-Infinity": -inf, "NaN": nan}


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: infinities and not-a-number are strings, as in protobuf's JSON."""
    return json.dumps(_named(value), indent=indent, allow_nan=False)


def _named(value: Any) -> Any:
    if isinstance(value, float) and not isfinite(value):
        return json.dumps(value)
    if isinstance(value, Mapping):
        return {key: _named(each) for key, each in value.items()}
    return [_named(each) for each in value] if isinstance(value, (list, tuple)) else value


def from_json(text: str | bytes) -> Any:
    """The inverse of `to_json`."""
    return json.loads(text, object_hook=lambda fields: {key: _number(value) for key, value in fields.items()})


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(each) for each in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def write_json(value: Any, path: Path) -> None:
    write_text(to_json(value, indent=1), path)


def read_json(path: Path, kind: type = object) -> Any:
    """Raises DamagedError for what is not JSON of that kind: dict or list."""
    try:
        found = from_json(path.read_text(encoding="utf-8"))
        if not isinstance(found, kind):
            raise ValueError(f"it holds a {type(found).__name__}, not a {kind.__name__}")
        return found
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged: {_reason(error)}. Restore it, or remove it") from error


def _reason(error: Exception) -> str:
    return "nested too deep" if isinstance(error, RecursionError) else str(error)


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    with new_file(path) as making:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, making, {"format": "pt"})


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """In memory of their own: they may be changed in place, and the file may go."""
    from safetensors.torch import load_file

    return {name: tensor.clone() for name, tensor in load_file(path).items()}


@contextmanager
def new_folder(path: Path, sealed: bool = False) -> Iterator[Path]:
    """A folder to fill, which takes the place of `path` when all of it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    making = _making(path)
    shutil.rmtree(making, ignore_errors=True)
    try:
        with _named_by(path, making):
            making.mkdir()
            yield making
            if sealed:
                (making / SEAL).write_bytes(_sums(making, _names(making)).encode())
            for each in [*making.rglob("*"), making]:
                _flush(each)
            if path.exists():
                _exchange(making, path)
            else:
                making.replace(path)
            _flush(path.parent)
    finally:
        shutil.rmtree(making, ignore_errors=True)  # what was in its place, if anything


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders. On Linux there is always one under either name; elsewhere for a moment none under `old`."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_cwd, exchange = -100, 2
    if swap is not None and swap(at_cwd, os.fsencode(new), at_cwd, os.fsencode(old), exchange) == 0:
        return
    if swap is not None and ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(old))
    aside = old.with_name(f".{old.name}.old.{os.getpid()}")
    old.replace(aside)
    new.replace(old)
    aside.replace(new)


def check_seal(folder: Path, others: bool = False) -> None:
    """Raises DamagedError unless every file of a sealed folder is there and as written, and no other is.

    `others`: files that were put beside them are let be. A README.md is anybody's to write.
    """
    try:
        sealed = (folder / SEAL).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedError(
            f"{folder} cannot be checked, its {SEAL} is missing or damaged: remove the folder"
        ) from error
    found = _sums(folder, [name for name in _names(folder) if not others or f"  {name}\n" in sealed])
    if found != sealed:
        # Where all lines are alike, the seal itself has changed.
        other = sorted(line.partition("  ")[2] for line in set(found.splitlines()) ^ set(sealed.splitlines()))
        name = plain([*other, SEAL][0])
        raise DamagedError(f"{folder / name} is not what was written (see {SEAL} beside it): remove the folder")


def _sums(folder: Path, names: Iterable[str]) -> str:
    return "".join(f"{_hash(folder / name)}  {name}\n" for name in names)


def _names(folder: Path) -> list[str]:
    """Of all files in a folder, relative to it, but the seal, the card, and hidden ones, which a file manager may put
    there."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (SEAL, CARD) and not path.name.startswith(".")
    )


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def cache_dir() -> Path:
    """What is made again if it is gone: `TWIST_FL_CACHE`, or ~/.cache/twist_fl."""
    return Path(os.environ.get("TWIST_FL_CACHE", "~/.cache/twist_fl")).expanduser()

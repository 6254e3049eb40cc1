"""A path or a name on the Hugging Face hub: told apart before anything is loaded, and no minute spent on a hub that
cannot be reached."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from twist_fl.config.suggest import closest
from twist_fl.system.errors import ConfigError
from twist_fl.system.untrusted import shown

_FILES = (
    *(".txt", ".md", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zip", ".zst", ".raw", ".tokens"),
    *(".bin", ".pt", ".pth", ".ckpt", ".safetensors", ".gguf", ".model", ".yaml", ".yml"),
)
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""Of a model or data set on the hub."""
_SECONDS = 3.0
"""For the hub's first answer."""


def expanded(path: str | Path) -> Path:
    """With the home folder for ~. Raises ConfigError where there is none, and for what cannot be looked for."""
    try:
        found = Path(path).expanduser()
        found.exists()
    except RuntimeError as error:
        raise ConfigError(f"{str(path)!r}: there is no such user here, give the path of the folder") from error
    except OSError as error:
        raise ConfigError(f"{shown(str(path))} cannot be looked for: {error.strerror}") from error
    return found


def is_path(name: str) -> bool:
    """Whether `name` can only be a path: it is there, is no possible name on the hub, or its parent folder is there.

    What is left, "gpt2" or "org/name", may be a name on the hub.
    """
    if not _NAME.fullmatch(name) or name.startswith(".") or name.endswith(_FILES):
        return True
    path = expanded(name)
    return path.exists() or ("/" in name and path.parent.is_dir())


def beside(path: Path) -> str:
    """The nearest name where a path that does not exist would be, or all that is there."""
    parent = path.parent
    if not parent.is_dir():
        missing = next(each for each in reversed(path.parents) if not each.exists())
        return f"; nor does {missing}"
    names = sorted(each.name for each in parent.iterdir() if not each.name.startswith("."))
    if close := closest(path.name, names):
        return f", did you mean {str(parent / close)!r}?"
    where = "here" if parent == Path() else f"in {parent}"
    return f"; {where}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else ""


def local_path(key: str, value: str) -> Path | None:
    """The path that `key`=`value` is; None for a name on the hub. Raises ConfigError if the path is not there."""
    if "://" in value:
        name = value.rstrip("/").partition("://")[2].partition("/")[2]
        raise ConfigError(f"{key}={value!r} is a URL: give the name on the hub, {name or 'org/name'}, or a folder")
    if not is_path(value):
        prepare_hub()
        return None
    path = expanded(value)
    if not path.exists():
        raise ConfigError(f"{key}={value!r} does not exist{beside(path)}")
    return path


def check_folder(key: str, value: str) -> None:
    """Raises ConfigError if a file stands where the folder `key`=`value` is to be."""
    path = expanded(value).absolute()
    there = next(each for each in (path, *path.parents) if each.exists())
    if not there.is_dir():
        raise ConfigError(f"{key}={value!r}: {there} is a file, and a folder is to be there: choose another")


@cache
def prepare_hub() -> bool:
    """Whether the hub answers; if not, this process and its children go on as with HF_HUB_OFFLINE=1.

    So what was downloaded before loads at once, and all else fails at once, where every file would be asked for again
    and again.
    """
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        httpx.head(constants.ENDPOINT, timeout=_SECONDS)
    except httpx.HTTPError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
        return False
    return True


@contextmanager
def reachable(what: str) -> Iterator[None]:
    """Turns a library's failure to load `what` into a ConfigError: where it was looked for, and its first line."""
    try:
        yield
    except (OSError, ValueError) as error:
        if not prepare_hub():
            raise ConfigError(
                f"{what} is neither here nor among what was downloaded before, and the hub cannot be reached: give a "
                "folder, or download it where there is a network"
            ) from error
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{what} is neither a folder here nor on the hub: {reason}") from error

"""What `data.*` names: its parts, and which of them are training and test text."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from twist_fl.config.checks import shown
from twist_fl.config.hub import beside, expanded, is_path, prepare_hub, reachable
from twist_fl.config.schema import DataConfig
from twist_fl.config.suggest import nearest
from twist_fl.data import builtin_text
from twist_fl.data.documents import Piece, Source, held_out, lines, pieces, running_documents, survey
from twist_fl.data.formats import Part, dataset_part, file_part, kind, one_line, some
from twist_fl.data.progress import Meter
from twist_fl.system.errors import ConfigError
from twist_fl.system.plugins import SOURCE

_WIKITEXT = ("Salesforce/wikitext", "wikitext-103-raw-v1")
_VALIDATION = re.compile(r"(?<![a-z])(val|valid|validation|dev)(?![a-z])", re.IGNORECASE)
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SIDES = ("train", "test", "neither")
_CARD = re.compile(r"---\n(?:(?!---).*\n)*?configs:")
"""The beginning of a data set's README.md that says which files are which split of which configuration."""


def find_source(config: DataConfig, meter: Meter) -> Source:
    """Reads all of it once. Raises ConfigError if it is not there, cannot be read, or is no text."""
    parts = _parts(config, meter)
    if not parts:
        return survey(lambda: iter(()), meter)
    train, test = _divide(parts, config, meter)
    if test:
        read = partial(_of_splits, train, test)
        return _filled(survey(read, meter, _num_bytes([*train, *test])), config)
    parts = [replace(part, running=part.running or part.lines) for part in parts]
    documents = partial(_documents, parts)
    return _filled(held_out(documents, config.test_fraction, meter, _num_bytes(parts)), config)


def _num_bytes(parts: Sequence[Part]) -> int | None:
    known = [part.num_bytes for part in parts if part.num_bytes is not None]
    return sum(known) if len(known) == len(parts) else None


def _filled(text: Source, config: DataConfig) -> Source:
    if not text.num_bytes:
        named = f"data.path={config.path!r}" if config.path else f"data.source={config.source}"
        raise ConfigError(f"{named} holds no text")
    return text


def _of_splits(train: Sequence[Part], test: Sequence[Part]) -> Iterator[Piece]:
    """A row is a document, a file of plain text is one; of WikiText each row is a line of running text."""
    for is_train, parts in ((True, train), (False, test)):
        for part in parts:
            if part.lines:
                found = (piece for line in _lines(part) for piece, _ in pieces([line]))
                yield from (Piece(text, False, is_train, part.name) for text in found)
            else:
                documents: Iterable[Iterable[str]] = (
                    [part.texts()] if part.running else ([text] for text in part.texts())
                )
                for document in documents:
                    yield from (Piece(text, ends, is_train, part.name) for text, ends in pieces(document))


def _lines(part: Part) -> Iterator[str]:
    return lines(part.texts()) if part.running else (text for text in part.texts() if text.strip())


def _documents(parts: Sequence[Part], longest: int | None) -> Iterator[tuple[str, str]]:
    """Each with its part's name."""
    for part in parts:
        for text in [part.texts()] if part.running else ([text] for text in part.texts()):
            whole = longest is None and not part.running
            found = text if whole else running_documents(text, *([longest] if longest else []))
            yield from ((part.name, document) for document in found)


def _parts(config: DataConfig, meter: Meter) -> list[Part]:
    parts = SOURCE.find(config.source)(config, meter)
    missing = not parts and config.source != "empty"
    if missing or not isinstance(parts, list) or not all(isinstance(part, Part) for part in parts):
        raise ConfigError(f"data.source={config.source!r} gave {shown(parts)}, expected a list of twist_fl.Part")
    return parts


def builtin(config: DataConfig, meter: Meter) -> list[Part]:
    return [Part("builtin", lambda: iter(builtin_text.documents()))]


def empty(config: DataConfig, meter: Meter) -> list[Part]:
    return []


def files(config: DataConfig, meter: Meter) -> list[Part]:
    if _saved(expanded(config.path or "")):
        return _from_disk(config)
    return [file_part(file, name, config.column) for name, file in _text_files(config, meter)]


def wikitext(config: DataConfig, meter: Meter) -> list[Part]:
    read = files if config.path else hub
    return [replace(part, lines=True) for part in read(config, meter)]


def hub(config: DataConfig, meter: Meter) -> list[Part]:
    repository, name = config.path or _WIKITEXT[0], config.name or (None if config.path else _WIKITEXT[1])
    if is_path(repository) or not _HUB_NAME.fullmatch(repository):
        raise ConfigError(
            f"data.path={repository!r} is no name of a data set on the hub, as owner/name: for a path, use "
            "data.source=files"
        )
    online = prepare_hub()
    import datasets

    datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE or not online
    where = f"data set {repository!r}"
    try:
        found = datasets.load_dataset(repository, name)
    except OSError:
        with reachable(where):
            raise
    except (ValueError, datasets.exceptions.DatasetsError) as error:  # it lists the configurations there are
        raise ConfigError(f"{where}, data.name={name}: {one_line(error)}") from error
    return [dataset_part(split, str(key), config.column, where) for key, split in found.items()]


def _saved(folder: Path) -> bool:
    """By `save_to_disk`."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _from_disk(config: DataConfig) -> list[Part]:
    from datasets import Dataset, load_from_disk

    with reachable(f"data.path={config.path!r}"):
        found: Any = load_from_disk(str(expanded(config.path or "")))
    splits = {"all": found} if isinstance(found, Dataset) else found
    return [dataset_part(split, str(key), config.column, f"{config.path!r}") for key, split in splits.items()]


def _text_files(config: DataConfig, meter: Meter) -> list[tuple[str, Path]]:
    """Files with text, with the names by which they are matched; those of rows, or those of plain text."""
    found = [(name, file) for name, file in _files(config) if file.stat().st_size]
    kinds: dict[str, list[tuple[str, Path]]] = {"rows": [], "text": [], "other": []}
    for name, file in found:
        kinds[kind(file)].append((name, file))
    if not kinds["rows"] and not kinds["text"]:
        what = (
            f": {some([name for name, _ in kinds['other']])}. txt, md, jsonl, json, csv, parquet and arrow are read"
            if found
            else ""
        )
        raise ConfigError(f"data.path={config.path!r} holds no text{what}")
    chosen = max(("text", "rows"), key=lambda each: sum(file.stat().st_size for _, file in kinds[each]))
    if left := [each for other, files in kinds.items() if other != chosen for each in files]:
        aside = "data.path may be a glob" if len(left) > len(kinds["other"]) else "no text"
        names = some([name for name, _ in left])
        meter.say(f"data.path={config.path!r}: {len(kinds[chosen])} files are read; left out: {names} ({aside})")
    if chosen == "rows" and config.name is None:
        _refuse_several(kinds["rows"], config)
    return kinds[chosen]


def _files(config: DataConfig) -> list[tuple[str, Path]]:
    """All files that are not hidden, by their names below the folder."""
    given = config.path or ""
    path = expanded(given)
    if glob.has_magic(given) and not path.exists():
        found = [Path(each) for each in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207 (an absolute pattern)
        if not found:
            raise ConfigError(f"data.path={given!r} matches nothing{beside(_to_first_magic(path))}")
        return [each for base in found for each in _below(base, "" if base.is_file() else base.name)]
    if not path.exists():
        raise ConfigError(f"data.path={given!r} does not exist{beside(path)}")
    if path.is_dir() and (card := path / "README.md").is_file() and _CARD.match(card.read_text(errors="replace")):
        return _by_card(path, config)
    if config.name and path.is_dir():
        path = _configuration(path, config)
    return _below(path)


def _by_card(path: Path, config: DataConfig) -> list[tuple[str, Path]]:
    """A copy of a repository of the hub."""
    from datasets import load_dataset_builder

    name = config.name or (_WIKITEXT[1] if config.source == "wikitext" else None)
    try:
        found: Any = load_dataset_builder(str(path), name).config.data_files
    except ValueError as error:  # it lists the configurations there are
        raise ConfigError(f"data.path={config.path!r}, data.name={name}: {one_line(error)}") from error
    return [(str(split), Path(file)) for split, files in found.items() for file in files]


def _configuration(path: Path, config: DataConfig) -> Path:
    """The folder of that name; WikiText's old layout has its files in one without."""
    names = sorted(each.name for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))
    if config.name in names:
        return path / config.name
    if config.source == "wikitext" and not names:
        return path
    raise ConfigError(
        f"data.name={config.name!r} is no folder in data.path={config.path!r}{nearest(config.name or '', names)}; "
        f"there: {some(names) or 'no folder'}"
    )


def _to_first_magic(path: Path) -> Path:
    return Path(*path.parts[: 1 + next(i for i, part in enumerate(path.parts) if glob.has_magic(part))])


def _below(path: Path, prefix: str = "") -> list[tuple[str, Path]]:
    if path.is_file():
        return [(path.name, path)]
    names = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    visible = sorted((name for name in names if not f"/{name}".count("/.")), key=lambda name: name.split("/"))
    return [((PurePosixPath(prefix) / name).as_posix(), names[name]) for name in visible]


def _refuse_several(files: Sequence[tuple[str, Path]], config: DataConfig) -> None:
    """The hub's layout of a data set with configurations: NAME/train-00000-of-00001.parquet."""
    with_train = {name.split("/")[0] for name, _ in files if PurePosixPath(name).match("*/train-*-of-*")}
    with_train -= {"data"}
    if len(with_train) > 1:
        raise ConfigError(
            f"data.path={config.path!r} has several configurations, {some(sorted(with_train))}: choose one with "
            "data.name"
        )


def _divide(parts: Sequence[Part], config: DataConfig, meter: Meter) -> tuple[list[Part], list[Part]]:
    """Training and test parts; none where all is to be divided by data.test_fraction."""
    sides = [_side(part.name, config) for part in parts]
    train, test, rest = ([part for part, of in zip(parts, sides, strict=True) if of == side] for side in _SIDES)
    if config.test_glob == DataConfig.test_glob and train and not test:
        test = [part for part in rest if _VALIDATION.search(part.name)]
        if test:
            meter.say(f"data.path={config.path!r} has no test split: {test[0].name} stands in for it")
    chosen = (config.train_glob, config.test_glob) != (DataConfig.train_glob, DataConfig.test_glob)
    if len(parts) > 1 and chosen and not (train and test):
        what = "files" if any("." in part.name for part in parts) else f"splits ({some([part.name for part in parts])})"
        raise ConfigError(
            f"of the {len(parts)} {what} of data.path={config.path!r}, data.train_glob={config.train_glob!r} matches "
            f"{len(train)} and data.test_glob={config.test_glob!r} {len(test)}: give both so that each matches, or none"
        )
    return (train, test) if train and test else ([], [])


def _side(name: str, config: DataConfig) -> str:
    """What the name says, or the folder nearest to it."""
    steps = name.split("/")
    for i in range(len(steps), 0, -1):
        path = PurePosixPath(*steps[:i])
        train, test = path.match(config.train_glob), path.match(config.test_glob)
        if train and test:
            raise ConfigError(
                f"{path.name!r} matches data.train_glob={config.train_glob!r} and data.test_glob={config.test_glob!r}: "
                "text that is trained on tests nothing, change one of them"
            )
        if train or test:
            return "train" if train else "test"
    return "neither"

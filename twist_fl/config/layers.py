"""What a configuration is put together from, as plain mappings: a preset or a YAML file, and key=value words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from shlex import quote
from typing import Any, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from twist_fl.config.checks import shown
from twist_fl.config.finding import is_run, listed, runs_in
from twist_fl.config.suggest import meant, nearest, setting_paths
from twist_fl.config.values import convert, item_schema
from twist_fl.system.errors import ConfigError

Layer = dict[str, Any]

hints_of: Callable[[Any], dict[str, Any]] = cache(get_type_hints)


def conf_dir() -> Path:
    """The presets: beside the package in a source tree, inside it in a wheel."""
    package = Path(__file__).resolve().parents[1]
    beside = package.parent
    return (beside if (beside / "server_app.py").is_file() else package / "app") / "conf"


def presets() -> list[str]:
    """Names of the YAML files in `conf/`, for `load_config`."""
    return sorted(path.stem for path in conf_dir().glob("*.yaml"))


def read_preset(preset: str) -> Layer:
    """A preset of `conf/` by its name, or a YAML file. Raises ConfigError."""
    return read_yaml(_preset_file(preset))


def _preset_file(preset: str) -> Path:
    file, names = Path(preset), ", ".join(presets())
    if "=" in preset or not preset.strip():
        raise ConfigError(
            f"{preset!r} stands where a preset or file is expected: {f'demo {preset}'.strip()}, for example"
        )
    if preset in presets():
        return conf_dir() / f"{preset}.yaml"
    if file.is_dir():
        if is_run(file):
            raise ConfigError(f"{preset} is a run: go on with it by `twist-fl train --resume {quote(preset)}`")
        if runs := runs_in(file):
            raise ConfigError(f"{preset} holds runs: name one, {listed(runs)}")
        found = sorted(inside.name for inside in (*file.glob("*.yaml"), *file.glob("*.yml")))
        inside = f" in it ({', '.join(found[:5])})" if found else ""
        raise ConfigError(f"{preset!r} is a folder: give a YAML file{inside}, or a preset ({names})")
    if file.is_file():
        return file
    if file.suffix in (".yaml", ".yml") or "/" in preset:
        beside = [each.name for each in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        if file.stem in presets():
            raise ConfigError(f"no file {preset!r}; the preset is called {file.stem}")
        near = nearest(file.name, beside)
        raise ConfigError(f"no file {preset!r}{near}; give an existing YAML file, or a preset: {names}")
    if runs := [run for run in runs_in(Path("runs")) if preset in run.parts]:
        raise ConfigError(f"no preset {preset!r}, but a run, {listed(runs)}; presets: {names}")
    known = [*presets(), *(run.name for run in runs_in(Path("runs")))]
    raise ConfigError(f"no preset {preset!r}{nearest(preset, known)}; presets: {names}")


def read_yaml(file: Path) -> Layer:
    """Raises ConfigError for what is no YAML of keys and values."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{str(file)!r} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    return parse_yaml(text, str(file))


def parse_yaml(text: str, name: str) -> Layer:
    """The mapping that `text` is; `name` is what an error calls it."""
    try:
        plain = OmegaConf.to_container(OmegaConf.create(text))
        # Of a text that is one word OmegaConf makes a key without a value.
        if isinstance(plain, dict) and list(plain.values()) == [None] and isinstance(yaml.safe_load(text), str):
            raise ConfigError(f"{name!r} holds no settings: a configuration is a mapping of keys to values")
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError, ValueError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ConfigError(f"{name!r} is not YAML: {reason}") from error
    return as_mapping(plain, name)


def as_mapping(plain: Any, name: str = "") -> Layer:
    """Raises ConfigError unless `plain` is one."""
    if not isinstance(plain, dict):
        where = f"{name!r}: " if name else ""
        raise ConfigError(f"{where}a configuration is a mapping of keys to values, not {shown(plain)}")
    return plain


def read_overrides(words: Sequence[str], schema: Any) -> list[Layer]:
    """A layer for each key=value. Raises ConfigError for a word of another form, or an unknown key."""
    return [_override(word, words[i + 1 :], schema) for i, word in enumerate(words)]


def _override(word: str, after: Sequence[str], schema: Any) -> Layer:
    key, equals, value = (part.strip() for part in word.partition("="))
    if not equals or not key:
        raise ConfigError(f"override {word!r} is not of the form key=value{_as_override(word, after, schema)}")
    if not value and after and "=" not in after[0]:
        raise ConfigError(f"{word!r} has no value: write {key}={after[0]} without spaces")
    if value.endswith(",") and after and "=" not in after[0]:
        raise ConfigError(
            f"{word!r} goes on in {after[0]!r}: write {key}={value}{after[0]} without spaces, or in quotes"
        )
    hint = _hint(key, schema)
    if value[:1] == value[-1:] and value[:1] in ("'", '"') and len(value) > 1:
        value = value[1:-1]
    plain: Any = value
    if is_dataclass(hint) or item_schema(hint):
        plain = _structure(key, value, hint)
    for part in reversed(key.split(".")):
        plain = {part: plain}
    return as_mapping(plain)


def _as_override(word: str, after: Sequence[str], schema: Any) -> str:
    """What a word without an equals sign was meant to be."""
    for sign in (":", ":="):
        key, found, value = word.partition(sign)
        if found and value and key.strip() in setting_paths(schema):
            return f": did you mean {key.strip()}={value.strip()}?"
    if word in setting_paths(schema) and after:
        value = after[1] if after[0] in ("=", ":") and len(after) > 1 else after[0]
        if value and "=" not in value:
            return f": did you mean {word}={value}, without spaces?"
    if word in setting_paths(schema):
        return f": what is to be its value? {word}=..."
    return ", for example train.lr=1e-3"


def _structure(key: str, value: str, hint: Any) -> Any:
    """A section, or a list of devices, as YAML in one word."""
    if is_dataclass(hint) and not value.startswith("{"):
        raise ConfigError(_section(key, hint))
    if (inner := item_schema(hint)) and not value.startswith("["):
        raise ConfigError(_no_items(key, value, inner))
    try:
        return OmegaConf.to_container(OmegaConf.create(value))
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(
            f"the value of '{key}={value}' is not YAML: close its brackets, or quote it: '{key}=\"{value}\"'"
        ) from error


def _section(key: str, schema: Any) -> str:
    return f"{key} is a section: set one of its keys, for example {key}.{fields(schema)[0].name}=..."


def _hint(key: str, schema: Any) -> Any:
    """The type of a dotted key's value. Raises ConfigError for an unknown key."""
    hint: Any = schema
    parts = key.split(".")
    for i, part in enumerate(parts):
        hints = hints_of(hint) if is_dataclass(hint) else {}
        if not hints:
            raise ConfigError(f"{key!r} is no key: {'.'.join(parts[:i])} holds one value")
        if part not in hints:
            raise ConfigError(f"unknown key {key!r}{meant(key, schema, hints)}")
        hint = hints[part]
    return hint


def typed(given: Mapping[Any, Any], section: Any, schema: Any, prefix: str = "") -> Layer:
    """`given` with every value of its setting's type; `section` is the part of `schema` that `prefix` leads to.

    Raises ConfigError for an unknown key or a value that its type does not allow.
    """
    hints, defaults, made = hints_of(section), section(), dict[str, Any]()
    for name, value in given.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise ConfigError(f"unknown key {shown(key)}{meant(key, schema, hints)}")
        hint = hints[name]
        if is_dataclass(hint):
            if not isinstance(value, dict):
                raise ConfigError(_section(key, hint))
            made[name] = typed(value, hint, schema, f"{key}.")
        elif inner := item_schema(hint):
            made[name] = _items(key, value, inner)
        else:
            made[name] = convert(key, value, hint, getattr(defaults, name))
    return made


def _items(key: str, value: Any, inner: Any) -> list[Layer]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ConfigError(_no_items(key, value, inner))
    return [typed(item, inner, inner, f"{key}[{i}].") for i, item in enumerate(value)]


def _no_items(key: str, value: Any, inner: Any) -> str:
    names = ", ".join(f"{field.name}: ..." for field in fields(inner))
    return f"{key}={value if isinstance(value, str) else shown(value)} must be a list of mappings: [{{{names}}}]"


def lay_over(below: Layer, layer: Mapping[str, Any]) -> None:
    """Put `layer` into `below`, key by key in sections; a list replaces a list."""
    for name, value in layer.items():
        if isinstance(value, dict) and isinstance(below.get(name), dict):
            lay_over(below[name], value)
        else:
            below[name] = value


def keys_of(layer: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys that a layer sets."""
    for name, value in layer.items():
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"

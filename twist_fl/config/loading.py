"""Layers put together: the defaults of a schema (schema.py), a preset, key=value words; then checked as a whole."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from functools import cache
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from twist_fl.config.checks import NODES, check_values
from twist_fl.config.effects import check_effects
from twist_fl.config.finding import checkpoints_of
from twist_fl.config.hub import check_folder, expanded, is_path, local_path
from twist_fl.config.layers import Layer, as_mapping, keys_of, lay_over, parse_yaml, read_overrides, read_preset, typed
from twist_fl.config.suggest import choice
from twist_fl.system.errors import ConfigError
from twist_fl.system.plugins import names_in


def load(schema: Any, preset: str | None, overrides: Sequence[str], strict: bool, base: str | None = None) -> Any:
    """A `schema` of its defaults or `base` (YAML), then the preset (a name or a YAML file), then `key=value` overrides.

    Raises ConfigError for an unknown preset or key (with the nearest one), a value of another type or out of range; if
    `strict`, for an override that changes nothing and a folder that is not there, too.
    """
    layers = [] if base is None else [parse_yaml(base, "the configuration")]
    layers += [] if preset is None else [read_preset(preset)]
    given = read_overrides(overrides, schema)
    config = from_layers(schema, [*layers, *given])
    for plugin, name in names_in(config):
        plugin.check(name, choice)
    if strict:
        _check_places(config)
        check_effects(config, _merge(schema, layers), {key for layer in given for key in keys_of(layer)})
    return config


def _check_places(config: Any) -> None:
    """Raises ConfigError for a folder that cannot be made, or is not there."""
    if config.dir:
        check_folder("dir", config.dir)
    places = {"model.pretrained": config.model.pretrained, "data.tokenizer": config.data.tokenizer}
    for key, value in (places | {"train.teacher": config.train.teacher}).items():
        if value and is_path(value):
            local_path(key, value)


def from_layers(schema: Any, layers: Sequence[Any]) -> Any:
    """Merge plain mappings over the defaults and check the result."""
    config = _merge(schema, layers)
    check_values(config)
    _make_absolute(config)
    config.data.tokenizer = config.data.tokenizer or config.model.pretrained
    if config.train.distill:
        config.train.teacher = config.train.teacher or config.model.pretrained
    return config


def _merge(schema: Any, layers: Sequence[Any]) -> Any:
    """Not checked yet."""
    given = Layer()
    for layer in layers:
        plain = typed(as_mapping(layer), schema, schema)
        train = plain.get("train", {})
        if "epochs" in train:
            train.setdefault("rounds", None)  # of the two budgets, the one given last counts
        lay_over(given, plain)
    if given.get("data", {}).get("path"):
        given["data"].setdefault("source", "files")
    try:
        # Once for all layers: each merge copies the whole schema.
        return OmegaConf.to_object(OmegaConf.merge(_defaults(schema), OmegaConf.create(given)))
    except OmegaConfBaseException as error:  # of ${other.key}: all else is of its type already
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error


@cache
def _defaults(schema: Any) -> Any:
    """Merging leaves it as it is."""
    return OmegaConf.structured(schema)


def _make_absolute(config: Any) -> None:
    """Folders that exist become absolute: Flower runs the app in another working folder. A run stands for its newest
    checkpoint."""
    places = [(config.data, key) for key in ("path", "private", "tokenizer")]
    places += [(config.model, "pretrained"), (config.train, "teacher")]
    for section, key in places:
        value = getattr(section, key)
        path = expanded(value or "")
        if key == "private" and value == NODES:
            continue
        if value and glob.has_magic(value) and section is config.data and not path.exists():
            setattr(section, key, str(path.absolute()))
        elif value and path.exists():
            newest = [path, *checkpoints_of(path).values()][-1]
            setattr(section, key, str(newest.resolve()))


def from_yaml(schema: Any, text: str) -> Any:
    """Of what `config.to_yaml` wrote. Raises ConfigError."""
    layer = as_mapping(parse_yaml(text, "the configuration"))
    train = layer.get("train")
    if isinstance(train, dict) and train.get("teacher") is None:
        train["distill"] = 0.0  # who is asked is always written down; once a share was, though nobody was asked
    return from_layers(schema, [layer])

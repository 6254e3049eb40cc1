"""`twist-fl keys`: every setting, with what stands below it in the schema."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from textwrap import wrap
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from rich.console import Console

from twist_fl.config.schema import Config
from twist_fl.system.errors import ConfigError
from twist_fl.system.plugins import PLUGINS


def keys(console: Console, words: Sequence[str] = ()) -> None:
    """Every setting with its default, its choices and what it means, as YAML that a preset may begin from.

    With `words` those that have one of them in their name. Raises ConfigError if there are none.
    """
    found = list(_explained(Config(), words))
    if not found:
        raise ConfigError(f"no setting has {' or '.join(words)} in its name: twist-fl keys lists all")
    console.print("\n".join(found), highlight=False, markup=False, soft_wrap=True)


def _explained(section: Any, words: Sequence[str], indent: str = "", prefix: str = "") -> Iterator[str]:
    hints, notes = get_type_hints(type(section)), _notes(type(section))
    plugins = {plugin.key: plugin for plugin in PLUGINS}
    for field in fields(section):
        value, hint, key = getattr(section, field.name), hints[field.name], f"{prefix}{field.name}"
        choices = list(map(str, get_args(hint))) if get_origin(hint) is Literal else []
        if key in plugins:
            choices = [*plugins[key].names, "or module:name of your own"]
        if is_dataclass(value):
            if not (inner := list(_explained(value, words, indent + "  ", f"{key}."))):
                continue
            lines = [f"{indent}{field.name}:", *inner]
        elif not words or any(word in key for word in words):
            plain = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
            lines = [f"{indent}{field.name}: {plain}"]
        else:
            continue
        for text in filter(None, (notes.get(field.name), f"One of {', '.join(choices)}." if choices else "")):
            yield from wrap(text, 110, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        yield from lines


def _notes(section: type) -> dict[str, str]:
    """What stands below each setting in the source of its class, by name."""
    (made,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(made, ast.ClassDef)
    return dict(_below(made.body))


def _below(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for setting, note in pairwise(body):
        match setting, note:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, " ".join(text.split())

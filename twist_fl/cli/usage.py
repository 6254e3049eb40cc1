"""What to say where the command line itself is wrong: an option that is none, a setting given as an option."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import version
from platform import python_version
from shlex import quote

import click

from twist_fl import __version__
from twist_fl.config.schema import Config
from twist_fl.config.shares import Size, normal_size
from twist_fl.config.suggest import closest, nearest, settings_like, settings_named
from twist_fl.config.values import split_list
from twist_fl.system.errors import ConfigError

_PRESETS = ("config", "conf", "cfg", "yaml")


def explain(error: click.UsageError, words: Sequence[str]) -> str:
    """One line for a mistake in `words`, the command line without its first word; the nearest right thing in it."""
    message = " ".join(error.format_message().split()).rstrip(".")
    context = error.ctx
    command = context.command_path if context else " ".join(["twist-fl", *words[:1]])
    match error:
        case click.NoSuchOption():
            return f"{command} has no option {_option(error.option_name, words)}{_instead(error, words)}"
        case click.MissingParameter():
            usage = " ".join(context.command.collect_usage_pieces(context)) if context else ""
            return f"{message}: {command} {usage}; see {command} --help"
        case click.BadParameter():
            return f"{_value_of(error)}; see {command} --help"
    if context and isinstance(context.command, click.Group) and message.startswith("No such command"):
        wrong = message.split("'")[1]
        names = context.command.list_commands(context)
        return f"No such command {wrong!r}{_command(wrong, names)} There are {', '.join(names)}"
    return f"{message}; see {command} --help"


def _value_of(error: click.BadParameter) -> str:
    """'--draws 0 must be 1 or more', of click's '0 is not in the range x>=1'."""
    name = error.param.opts[0] if error.param else "a value"
    message = error.message.rstrip(".")
    if bound := re.fullmatch(r"(\S+) is not in the range x>=(\S+)", message):
        return f"{name} {bound[1]} must be {bound[2]} or more"
    if both := re.fullmatch(r"(\S+) is not in the range (\S+)<=x<=(\S+)", message):
        return f"{name} {both[1]} must be {both[2]} to {both[3]}"
    if kind := re.fullmatch(r"(.+) is not a valid (\w+)(?: range)?", message):
        words = {"int": "a whole number", "integer": "a whole number", "float": "a number"}
        return f"{name} {kind[1]} must be {words.get(kind[2], kind[2])}"
    return f"{name}: {message}"


def _command(wrong: str, names: Sequence[str]) -> str:
    if "=" in wrong:
        return f": settings go behind a command, for example train demo {wrong}."
    return nearest(wrong, names) or "."


def _option(name: str, words: Sequence[str]) -> str:
    """As it was typed: of -lr, click knows -l."""
    return next((word.partition("=")[0] for word in words if word.startswith(name)), name)


def _instead(error: click.NoSuchOption, words: Sequence[str]) -> str:
    """The option or the setting that was meant."""
    context, name = error.ctx, _option(error.option_name, words)
    params = context.command.params if context else []
    options = [option for param in params for option in param.opts if option.startswith("--")]
    key = name.lstrip("-").replace("-", "_")
    takes = any(param.name in ("overrides", "names") for param in params)
    if close := closest(name, options, likeness=0.8):
        return f", did you mean {close}?"
    if found := settings_like(key, Config) if takes else settings_named(key, Config):
        setting = f"{found[0]}={_value(name, words)}"
        if takes:
            return f"; settings are key=value: did you mean {setting}?"
        return f"; {found[0]} is a setting, for `twist-fl train ... {quote(setting)}`"
    if any(name.lstrip("-") in (param.name, *_PRESETS) for param in params) and context:
        return f": its first word is that, twist-fl {context.info_name} {_value(name, words)}"
    if close := closest(name, options):
        return f", did you mean {close}?"
    return f"; it has {', '.join(options)}" if options else ""


def _value(name: str, words: Sequence[str]) -> str:
    """What was given with an option: behind its equals sign, or the next word."""
    for i, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option == name and equals:
            return value
        if option == name and i + 1 < len(words) and not words[i + 1].startswith("--") and "=" not in words[i + 1]:
            return words[i + 1]
    return "..."


def listed_sizes(sizes: str | None) -> list[Size] | None:
    """Of --sizes 8,1/2,3+6. Raises ConfigError."""
    if sizes is None:
        return None
    if not (words := split_list("--sizes", sizes)):
        raise ConfigError("--sizes is empty: give sizes, for example 8,6,4 or 1/2,1/4")
    return [normal_size("--sizes", word) for word in words]


def versions() -> str:
    """This package's version and those it works with, none of them imported."""
    found = [f"{name} {version(name)}" for name in ("flwr", "torch", "transformers")]
    return f"twist_fl {__version__}, {', '.join(found)}, python {python_version()}"

"""Where a user's own code comes in: a policy, an aggregation rule, a data source, a tracker, an export format,
an architecture.

Each is given by the name of one of ours, by the name of an entry point of an installed package, or as `module:name`.
Ours are found in the same way. Nothing is imported before it is used.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from twist_fl.system.environment import WORKING_FOLDER
from twist_fl.system.errors import ConfigError


@dataclass(frozen=True)
class Plugin:
    """A setting that takes a name of `own`, of the entry points in `group`, or `module:name`."""

    key: str
    group: str
    own: Mapping[str, str]
    """Ours, each as module:name."""
    signature: str
    """What is expected, as it is written in Python: `(deal) -> rows`."""
    where: str = "where the server runs"
    """The machines that need the module."""

    @property
    def names(self) -> list[str]:
        """Ours, and those of installed packages."""
        return [*self.own, *sorted(entry_points(group=self.group).names - self.own.keys())]

    def knows(self, name: str) -> bool:
        """Ours are known without a look at what is installed."""
        return name in self.own or name in self.names

    def check(self, name: str, suggest: Callable[[str, Sequence[str]], str] = lambda word, words: "") -> None:
        """Imports nothing. Raises ConfigError, with what `suggest` says, unless `name` is known or module:name."""
        module, colon, attribute = name.partition(":")
        if colon and not (module and attribute):
            raise ConfigError(f"{self.key}={name!r} is not of the form module:name, for example my_module:mine")
        if not colon and not self.knows(name):
            one_of = ", ".join(self.names)
            raise ConfigError(
                f"{self.key}={name!r} must be one of {one_of}, or module:name of your own{suggest(name, self.names)}"
            )

    def find(self, name: str) -> Any:
        """What the name stands for. Raises ConfigError if it cannot be had here, or cannot be called as it will be."""
        self.check(name)
        target = self.own.get(name) or next((e.value for e in entry_points(group=self.group, name=name)), name)
        module, _, attribute = target.partition(":")
        if (here := os.environ.get(WORKING_FOLDER) or str(Path.cwd())) not in sys.path:
            sys.path.append(here)  # last: what lies there hides nothing
        try:
            found = getattr(importlib.import_module(module), attribute, None)
        except (ImportError, SyntaxError, TypeError) as error:  # TypeError: a name that begins with a dot
            raise ConfigError(
                f"{self.key}={name!r}: {error}: install it {self.where}, or name its folder in PYTHONPATH"
            ) from error
        if found is None:
            raise ConfigError(f"{self.key}={name!r}: the module {module} has no {attribute}")
        if self.signature:
            self._check_signature(name, found)
        return found

    def _check_signature(self, name: str, found: Any) -> None:
        expected = f"{self.key}={name!r} must be a function {self.signature}"
        if not callable(found):
            raise ConfigError(f"{expected}, found a {type(found).__name__}")
        try:
            signature = inspect.signature(found)
        except ValueError:  # of a builtin that does not say
            return
        given = self.signature.partition(")")[0].strip("(").split(", ")
        try:
            signature.bind(*given)
        except TypeError as error:
            raise ConfigError(f"{expected}, found {name.rpartition(':')[2]}{signature}: {error}") from error


def _ours(module: str, **names: str) -> dict[str, str]:
    return {name: f"twist_fl.{module}:{attribute}" for name, attribute in names.items()}


ARCHITECTURE = Plugin(
    "model.architecture",
    "twist_fl.architectures",
    _ours(
        "blueprint.block_tables",
        gpt2="GPT2",
        llama="LLAMA",
        mistral="MISTRAL",
        qwen2="QWEN2",
        qwen3="QWEN3",
        opt="OPT",
        gpt_neox="GPT_NEOX",
    ),
    "",  # an object, and not called
    "on every node",
)
POLICY = Plugin(
    "blueprint.policy",
    "twist_fl.policies",
    _ours(
        "blueprint.policies",
        random="RANDOM",
        rolling="ROLLING",
        ordered="ORDERED",
        static="STATIC",
        importance="RANDOM",  # with common blocks by score: `Division.common_blocks`
    ),
    "(deal) -> rows",
)
RULE = Plugin(
    "aggregate.rule",
    "twist_fl.aggregation_rules",
    _ours("training.aggregate", mean="StreamingMean")
    | _ours("training.rules", median="median", trimmed_mean="trimmed_mean"),
    "(layout, state, memory) -> aggregator",
)
SOURCE = Plugin(
    "data.source",
    "twist_fl.sources",
    _ours("data.sources", builtin="builtin", files="files", wikitext="wikitext", hub="hub", empty="empty"),
    "(config, meter) -> parts",
    "on every node",
)
TRACKER = Plugin(
    "log.tracker",
    "twist_fl.trackers",
    _ours("runs.tensorboard", tensorboard="tracker"),
    "(config, folder) -> function of an event",
)
EXPORT_FORMAT = Plugin(
    "format",
    "twist_fl.export_formats",
    _ours("tickets.hf_formats", compact="compact", hf="plain")
    | _ours("tickets.gguf_format", gguf="write")
    | _ours("tickets.onnx_format", onnx="write"),
    "(ticket, folder, tokenizer_folder, dtype) -> words",
    "here",
)
PLUGINS = (ARCHITECTURE, POLICY, RULE, SOURCE, TRACKER)
"""Those that are settings."""
_OF_THE_SERVER = (POLICY, RULE, TRACKER)


def needs(*modules: str, extra: str) -> None:
    """Raises ConfigError, with what to install, unless the packages of an optional extra of this one are there."""
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"this needs {' and '.join(missing)}: pip install 'twist-fl[{extra}]'")


def names_in(config: Any) -> Iterator[tuple[Plugin, str]]:
    """The plugins that are settings, with what a configuration names."""
    for plugin in PLUGINS:
        section, _, key = plugin.key.partition(".")
        if name := getattr(getattr(config, section), key):
            yield plugin, name


def check_plugins(config: Any) -> None:
    """Raises ConfigError if something that the server will call cannot be had here."""
    for plugin, name in names_in(config):
        if plugin in _OF_THE_SERVER and name not in plugin.own:
            plugin.find(name)

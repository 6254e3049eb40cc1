"""Where a user's own code comes in."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from twist_fl.config.schema import from_yaml, load_config, to_yaml
from twist_fl.system.errors import ConfigError
from twist_fl.system.plugins import PLUGINS, POLICY, Plugin

MINE = Plugin("section.key", "twist_fl.tests", {"ours": "operator:sub"}, "(first, second) -> anything", "on every node")


@pytest.mark.parametrize("plugin", PLUGINS)
def test_ours_are_there_and_are_called_as_expected(plugin: Plugin) -> None:
    assert plugin.own
    for name in plugin.own:
        assert callable(plugin.find(name)) == bool(plugin.signature)


def test_a_module_in_the_folder_of_the_command_is_found_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("TWIST_FL_WORKING_FOLDER", str(tmp_path))
    (tmp_path / "lies_in_the_folder.py").write_text("def mine(first, second): return first + second")
    assert MINE.find("lies_in_the_folder:mine")(1, 2) == 3
    assert sys.path[-1] == str(tmp_path)


def test_an_entry_point_of_an_installed_package_is_found_by_its_name(
    user_module: Callable[[str], str], tmp_path: Path
) -> None:
    module = user_module("def mine(first, second=2): return first * second")
    about = tmp_path / "theirs-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[twist_fl.tests]\ndoubled = {module}:mine\nours = {module}:mine\n")
    assert MINE.names == ["ours", "doubled"]
    assert MINE.find("doubled")(4) == 8
    assert MINE.find("ours")(5, 3) == 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("our", "'our' must be one of ours, or module:name of your own"),
        ("a:", "'a:' is not of the form module:name, for example my_module:mine"),
        ("no_such:thing", "'no_such:thing': No module named 'no_such': install it on every node, or name its folder in "
         "PYTHONPATH"),
        ("json:thing", "'json:thing': the module json has no thing"),
        ("json:decoder", "'json:decoder' must be a function (first, second) -> anything, found a module"),
        ("MODULE:one", "'MODULE:one' must be a function (first, second) -> anything, found one(first): too many "
         "positional arguments"),
        ("MODULE:three", "'MODULE:three' must be a function (first, second) -> anything, found three(a, b, c): missing "
         "a required argument: 'c'"),
        ("MODULE:named", "'MODULE:named' must be a function (first, second) -> anything, found named(a, *, b): too "
         "many positional arguments"),
    ],
)  # fmt: skip
def test_what_cannot_be_called_so_is_refused(name: str, reason: str, user_module: Callable[[str], str]) -> None:
    module = user_module("def one(first): ...\ndef three(a, b, c): ...\ndef named(a, *, b): ...")
    with pytest.raises(ConfigError) as caught:
        MINE.find(name.replace("MODULE", module))
    assert str(caught.value).replace(module, "MODULE") == f"section.key={reason}"


def test_a_setting_that_names_nothing_known_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=["blueprint.policy=rollin"])
    assert str(caught.value) == (
        "blueprint.policy='rollin' must be one of random, rolling, ordered, static, importance, or module:name of your "
        "own, did you mean 'rolling'?"
    )


def test_a_configuration_is_read_where_its_package_is_not_installed() -> None:
    """A worker needs no policy."""
    config = load_config()
    config.blueprint.policy = "of_a_package_on_the_server"
    assert from_yaml(to_yaml(config)).blueprint.policy == "of_a_package_on_the_server"
    with pytest.raises(ConfigError, match=r"^blueprint\.policy='of_a_package_on_the_server' must be one of random"):
        POLICY.find(config.blueprint.policy)

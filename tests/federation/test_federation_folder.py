"""`twist-fl federation init`: what is in its folder, who may read it, and what is refused."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twist_fl.federation.federation_folder import create, joined, opened
from twist_fl.system.errors import ConfigError

FILES = {"ca.crt", "ca.key", "server.crt", "server.key", "compose.yaml", "twist-fl-server.service", "federation.json"}
NODE_FILES = {"key", "key.pub", "ca.crt", "compose.yaml", "twist-fl-node.service"}


def test_all_is_there_and_private_keys_are_their_owners(tmp_path: Path) -> None:
    made = create(tmp_path / "lab", ["lab.example.org", "10.0.0.5"], ["a", "b"], 9000)
    assert opened(tmp_path / "lab") == made
    assert {path.name for path in made.folder.iterdir()} == FILES | {"nodes"}
    for name in made.nodes:
        assert {path.name for path in made.node(name).iterdir()} == NODE_FILES
        assert (made.node(name) / "ca.crt").read_bytes() == made.ca.read_bytes()
    for path in made.folder.rglob("*"):
        private = path.name in ("key", "ca.key", "server.key")
        assert (stat.S_IMODE(path.stat().st_mode) & 0o077 == 0) == private, path
        if private:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [made.node_config(name) for name in made.nodes] == [
        "partition-id=0 num-partitions=2",
        "partition-id=1 num-partitions=2",
    ]


def test_nothing_is_overwritten_unless_told(tmp_path: Path) -> None:
    made = create(tmp_path, ["localhost"], ["a", "b"], 8000)
    (made.runs / "first").mkdir(parents=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="holds keys already: give another folder, or --force to make all keys in it"):
        create(tmp_path, ["localhost"], ["c"], 8000)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    again = create(tmp_path, ["localhost"], ["b", "c"], 8000, force=True)
    assert {path.name for path in (tmp_path / "nodes").iterdir()} == {"b", "c"}
    assert again.ca.read_bytes() != before[made.ca]
    assert (made.runs / "first").is_dir()


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not empty: give another folder"):
        create(tmp_path, ["localhost"], ["a"], 8000)


@pytest.mark.parametrize("host", ["http://lab", "lab:8000", "", "my lab", "lab/x", "lab\n"])
def test_a_host_is_a_name_or_an_address_alone(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no host: give the name or the IP address alone.*its port is --port"):
        create(tmp_path / "lab", [host], ["a"], 8000)
    assert not (tmp_path / "lab").exists()


@pytest.mark.parametrize("name", ["../up", "a/b", "", "a b", ".hidden", "-x"])
def test_a_nodes_name_is_a_folders(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="becomes the name of a folder: letters, digits, - and _ only"):
        create(tmp_path / "lab", ["localhost"], [name], 8000)
    assert not (tmp_path / "lab").exists()


def test_each_node_has_a_name_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--node a is given twice"):
        create(tmp_path / "lab", ["localhost"], ["a", "b", "a"], 8000)


def test_a_folder_without_a_federation_is_told_from_one_with(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no federation \(no federation.json\): make one with"):
        opened(tmp_path)
    create(tmp_path / "lab", ["localhost"], ["a"], 8000)
    with pytest.raises(ConfigError, match=r"did you mean .*lab'"):
        opened(tmp_path / "lap")


@given(st.sampled_from(["localhost", "10.0.0.5", "fd00::5", "::1"]), st.integers(1, 2**16 - 1))
def test_an_address_is_a_urls(host: str, port: int) -> None:
    from urllib.parse import urlsplit

    found = urlsplit(f"https://{joined(host, port)}")
    assert (found.hostname, found.port) == (host, port)

"""What a device is sent of a ticket when it has some of it already."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from local_grid import LocalGrid
from shipped import ship, ticket_of

from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.blueprint.drawing import draw_ticket
from twist_fl.federation import deploy, shipping
from twist_fl.federation.connecting import NoWorkersError
from twist_fl.rounds import start
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.resume import at_places
from twist_fl.system.errors import ConfigError
from twist_fl.tickets.device_limits import parse_devices
from twist_fl.tickets.edge_client import EdgeReport
from twist_fl.tickets.export import export_ticket
from twist_fl.training.job import Job

MakeJob = Callable[..., Job]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of its own for each test, and devices that measure nothing."""

    def measure(*given: object) -> EdgeReport:
        return EdgeReport(1, 1, 50.0, 0.001, 0.01, 1e3, 16, 1, 1, 1)

    monkeypatch.setattr("twist_fl.tickets.edge_client.measure", measure)
    monkeypatch.setenv("TWIST_FL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def drawn(job: Job, size: int) -> Blueprint:
    return draw_ticket(job.layout, job.division, (size, size), 0, 0)


def shipped(job: Job, blueprint: Blueprint) -> int:
    """Bytes, of a ticket that has arrived."""
    sent: int = ship(job, partial(shipping.receive, job), blueprint)["bytes_received"]
    return sent


def assert_arrived(job: Job, blueprint: Blueprint, cache: Path, scratch: Path) -> None:
    (folder,) = (cache / "tickets").glob("*/phone")
    export_ticket(ticket_of(job, blueprint), scratch / "expected", job.corpus.tokenizer_folder)
    for file in (scratch / "expected").iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()


def test_a_ticket_that_grows_is_sent_what_is_new_and_one_that_shrinks_nothing(
    tiny_job: MakeJob, cache: Path, tmp_path: Path
) -> None:
    job = tiny_job()
    overhead = 20_000  # the job, names of parts
    had = 0
    for size in (1, 3, 2, 4, 4, 1):
        blueprint = drawn(job, size)
        needed = 4 * job.layout.num_params(blueprint)
        assert abs(shipped(job, blueprint) - max(0, needed - had)) < overhead
        had = max(had, needed)
        assert_arrived(job, blueprint, cache, tmp_path)


def test_a_transfer_that_was_cut_goes_on(
    tiny_job: MakeJob, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "PIECE_BYTES", 20_000)
    job, arrived = tiny_job(), list[int]()
    blueprint = drawn(job, 3)

    def carry(content: RecordDict, messages: int) -> RecordDict:
        if len(arrived) == messages:
            raise ConnectionError
        parts = content.array_records["params"].values() if "params" in content else ()
        arrived.append(sum(len(array.data) for array in parts))
        return shipping.receive(job, content)

    with pytest.raises(ConnectionError):
        ship(job, partial(carry, messages=3), blueprint)
    whole = 4 * job.layout.num_params(blueprint)
    assert arrived[0] == 0
    assert 40_000 < sum(arrived) < whole / 2
    ship(job, partial(carry, messages=-1), blueprint)
    assert sum(arrived) == whole
    assert max(arrived) < 20_000 + 4 * max(tensor.numel() for tensor in ticket_of(job, blueprint).params.values())
    assert_arrived(job, blueprint, cache, tmp_path)


def test_a_damaged_part_is_noticed_and_all_is_sent_again(tiny_job: MakeJob, cache: Path, tmp_path: Path) -> None:
    job = tiny_job()
    blueprint = drawn(job, 2)
    whole = shipped(job, blueprint)
    (file,) = (cache / "parts").rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"the ticket is not what was sent: .* send it again"):
        shipped(job, blueprint)
    assert shipped(job, blueprint) == whole
    assert_arrived(job, blueprint, cache, tmp_path)


def test_other_weights_replace_those_before(tiny_job: MakeJob, cache: Path) -> None:
    job = tiny_job()
    blueprint = drawn(job, 2)
    whole = shipped(job, blueprint)
    other = tiny_job("seed=1")
    object.__setattr__(other, "run_id", job.run_id)
    assert shipped(other, blueprint) == pytest.approx(whole, abs=100)
    assert len(list((cache / "parts").glob("*/phone/*"))) == 1


def test_a_device_that_keeps_nothing_is_named(tiny_job: MakeJob) -> None:
    job = tiny_job()

    def forgets(content: RecordDict) -> RecordDict:
        content.pop("params", None)
        return shipping.receive(job, content)

    with pytest.raises(NoWorkersError, match="device phone does not keep what it is sent"):
        ship(job, forgets, drawn(job, 2))


def test_query_heads_travel_with_keys_of_their_own(tiny_job: MakeJob, cache: Path, tmp_path: Path) -> None:
    llama: tuple[Any, ...] = ("model.architecture=llama", "model.n_head=8", "model.n_kv_head=2", "model.n_embd=64")
    job = tiny_job(*llama, "blueprint.attn_blocks=heads", "blueprint.ffn_blocks=8", "blueprint.num_sub=4")
    for size in (3, 5, 8):
        blueprint = draw_ticket(job.layout, job.division, (size, size), 0, 0)
        shipped(job, blueprint)
        assert_arrived(job, blueprint, cache, tmp_path)


# Many devices


@given(
    nodes=st.lists(st.integers(0, 3), max_size=8),
    at_once=st.integers(1, 4),
    lengths=st.lists(st.integers(0, 3), min_size=8, max_size=8),
    lost=st.sets(st.integers(0, 7)),
)
def test_each_device_has_its_talk_and_no_two_on_one_node_at_a_time(
    nodes: list[int], at_once: int, lengths: list[int], lost: set[int]
) -> None:
    said: dict[int, list[int]] = {place: [] for place in range(len(nodes))}

    def serve(place: int) -> Generator[RecordDict, RecordDict, None]:
        for i in range(lengths[place]):
            answer = yield RecordDict({"it": ConfigRecord({"place": place, "number": i})})
            said[place].append(int(answer.config_records["it"]["number"]))  # type: ignore[arg-type]
        if not lengths[place]:
            raise ConfigError(f"{place} is too slow")

    def carry(messages: Mapping[int, RecordDict]) -> dict[int, deploy.Answer]:
        assert 0 < len(messages) <= at_once
        assert len({nodes[place] for place in messages}) == len(messages)
        assert all(content.config_records["it"]["place"] == place for place, content in messages.items())
        return {place: NoWorkersError(f"{place} is away") if place in lost else messages[place] for place in messages}

    failed = deploy._talk(serve, nodes, at_once, carry)
    served = [place for place in said if lengths[place] and place not in lost]
    assert said == {place: [*range(lengths[place])] if place in served else [] for place in said}
    expected = {
        place: f"{place} is {'away' if lengths[place] else 'too slow'}" for place in said if place not in served
    }
    assert {place: str(error) for place, error in failed.items()} == expected


@given(nodes=st.lists(st.integers(0, 3), min_size=1, max_size=8), at_once=st.integers(1, 4), silent=st.integers(0, 3))
def test_a_silent_node_is_waited_for_once(nodes: list[int], at_once: int, silent: int) -> None:
    asked: list[int] = []

    def serve(place: int) -> Generator[RecordDict, RecordDict, None]:
        yield RecordDict()

    def carry(messages: Mapping[int, RecordDict]) -> dict[int, deploy.Answer]:
        asked.extend(messages)
        return {
            place: deploy.SilentError(f"{place} is silent") if nodes[place] == silent else messages[place]
            for place in messages
        }

    failed = deploy._talk(serve, nodes, at_once, carry)
    there = [place for place, node in enumerate(nodes) if node == silent]
    first, untried = there[:1], there[1:]
    assert sorted(asked) == [place for place in range(len(nodes)) if place not in untried]
    assert {place: str(error) for place, error in failed.items()} == {
        **{place: f"{place} is silent" for place in first},
        **dict.fromkeys(untried, "None"),
    }


def test_devices_played_here_fail_each_for_itself(
    tiny_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create(tiny_job())
    job = at_places(folder.job(), ["deploy.new_tokens=4"])

    def without_text(job: Job, content: RecordDict) -> RecordDict:
        if '"device": "two"' in str(content.config_records["ticket"]["json"]):
            raise ConfigError("device two has no test text")
        return shipping.receive(job, content)

    monkeypatch.setattr(deploy, "receive", without_text)
    devices = parse_devices(["one=1/2,0.000001ms", "two=1/2", "three=1/2"])
    with pytest.raises(ConfigError, match=r"'one': latency_ms=1e-06 is too little.*; device two has no test text$"):
        deploy.deploy_here(folder, job, start(job), devices, lambda text: None)
    assert [row["name"] for row in json.loads((folder.path / "deployed.json").read_text())] == ["three"]


def test_devices_are_served_each_on_its_node_and_who_is_away_is_named_at_the_end(
    tiny_job: MakeJob, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create(tiny_job())
    ended = start(folder.job())
    folder.save(ended, folder.job().model_config, folder.job().corpus.tokenizer_folder)
    job = at_places(folder.job(), ["deploy.at_once=2", "deploy.new_tokens=4"])
    grid = LocalGrid(3, broken=[1])
    broken = sorted(grid.get_node_ids()).index(next(node for node, place in grid.partitions.items() if place == 1))
    names = [f"device-{place}" for place in range(5)]
    with pytest.raises(NoWorkersError) as failed:
        deploy.deploy_run(grid, folder, job, " ".join(f"{name}=1/2,bfloat16" for name in names))
    away = [name for place, name in enumerate(names) if place % 3 == broken]
    assert str(failed.value) == "; ".join(f"device {name} failed: ValueError: no room on this node" for name in away)
    rows = json.loads((folder.path / "deployed.json").read_text())
    assert [row["name"] for row in rows] == [name for name in names if name not in away]
    assert {event["name"] for event in folder.events("device")} == {row["name"] for row in rows}
    assert not folder.events("deployed")

"""Arrow Flight: the same weights as inline, nothing without a token, what breaks goes on, what cannot be said aloud."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.flight as fl
import pytest
import torch
from flwr.app import ConfigRecord, Message
from local_grid import Answer, LocalGrid, assert_same_run, failing

from twist_fl.federation import flight, tensors, transport
from twist_fl.federation.authority import make_certificate
from twist_fl.federation.simulation import free_port
from twist_fl.federation.strategy import TwistStrategy
from twist_fl.federation.transport import FlightHandle, SegmentError
from twist_fl.rounds import run, start
from twist_fl.runs.story import warnings
from twist_fl.system.errors import ConfigError
from twist_fl.training.worker import Task

SIZE = 3 * flight._PIECE + 17


@pytest.fixture(scope="module")
def server() -> Iterator[flight.Server]:
    found = flight.Server("run", "127.0.0.1:0")
    yield found
    found.end()


@pytest.fixture
def offer(server: flight.Server) -> Iterator[flight.Offer]:
    found = server.make(SIZE)
    found.memory.random_(generator=torch.Generator().manual_seed(1))
    yield found
    found.close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight, "_BACKOFF", 0.01)


def put(handle: FlightHandle, start: int, pieces: list[torch.Tensor], schema: pa.Schema = flight._SCHEMA) -> None:
    """What a client may send, whatever an honest one does."""
    options = fl.FlightCallOptions(headers=[(b"token", handle.up.encode())], timeout=60)
    with fl.connect(handle.location, tls_root_certs=handle.certificate.encode()) as client:
        writer, _ = client.do_put(fl.FlightDescriptor.for_command(str(start).encode()), schema, options)
        with writer:
            for piece in pieces:
                array = pa.array(piece.numpy(), type=schema.field(0).type)
                writer.write_batch(pa.RecordBatch.from_arrays([array], schema=schema))


# Both ways


def test_a_task_and_its_reply_are_the_same_bytes_on_both_sides(offer: flight.Offer) -> None:
    handle, sent = offer.handle(), offer.memory.clone()
    found = flight.fetch(handle, "run")
    found.check(handle)
    assert torch.equal(found.memory, sent)
    assert found.memory.data_ptr() % 64 == 0  # a model may compute with it where it lies
    found.memory.add_(1)
    answered = found.handle()
    offer.check(answered)
    assert torch.equal(offer.memory, sent + 1)


def test_the_same_memory_serves_the_next_round_with_other_tokens(offer: flight.Offer) -> None:
    first = offer.handle()
    offer.check(flight.fetch(first, "run").handle())
    second = offer.handle()
    assert not {first.down, first.up} & {second.down, second.up}
    with pytest.raises(SegmentError, match="unknown or void token"):
        flight.fetch(first, "run")
    offer.check(flight.fetch(second, "run").handle())


def test_a_task_can_be_fetched_again_until_its_reply_comes_in(offer: flight.Offer) -> None:
    handle = offer.handle()
    first, again = flight.fetch(handle, "run"), flight.fetch(handle, "run")
    assert torch.equal(first.memory, again.memory)
    put(handle, 0, [first.memory[:5]])
    with pytest.raises(SegmentError, match="the reply has begun to come in where the task was"):
        flight.fetch(handle, "run")


# Connections that break


def test_a_fetch_goes_on_where_it_was(offer: flight.Offer, monkeypatch: pytest.MonkeyPatch) -> None:
    handle, sent = offer.handle(), offer.memory.clone()
    starts: list[int] = []
    read = flight.Offer.read

    def noted(self: flight.Offer, start: int) -> Iterator[pa.RecordBatch]:
        starts.append(start)
        return read(self, start)

    monkeypatch.setattr(flight.Offer, "read", noted)
    monkeypatch.setattr(flight.Fetched, "_fetch", breaking(flight.Fetched._fetch, after=1))
    found = flight.fetch(handle, "run")
    assert torch.equal(found.memory, sent)
    assert starts == [0, flight._PIECE, 2 * flight._PIECE, 3 * flight._PIECE]


def breaking(transfer: Callable[..., None], after: int) -> Callable[..., None]:
    """The transfer, whose client is closed after so many pieces, as long as there is more."""

    def broken(self: flight.Fetched, client: fl.FlightClient, options: fl.FlightCallOptions) -> None:
        reader = client.do_get(fl.Ticket(str(self._done).encode()), options)
        for _ in range(after):
            piece = flight._content(reader.read_chunk().data)
            self.memory.numpy()[self._done : self._done + len(piece)] = piece
            self._done += len(piece)
        if self._done < len(self.memory):
            raise fl.FlightUnavailableError("cable out")

    return broken


def test_a_reply_goes_on_where_it_was(offer: flight.Offer) -> None:
    handle = offer.handle()
    found = flight.fetch(handle, "run")
    found.memory.add_(1)
    put(handle, 0, [found.memory[:1000], found.memory[1000:1500]])
    assert offer.received == 1500
    with pytest.raises(SegmentError, match=r"has 1500 of the reply's \d+ bytes"):
        offer.check(handle)
    handle = offer.handle()
    found = flight.fetch(handle, "run")
    found.memory.add_(1)
    put(handle, 0, [found.memory[:1000]])
    offer.check(found.handle())
    assert torch.equal(offer.memory, found.memory)


def test_attempts_that_get_no_further_end(offer: flight.Offer, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def fail(self: flight.Fetched, client: fl.FlightClient, options: fl.FlightCallOptions) -> None:
        tried.append(1)
        raise fl.FlightUnavailableError("cable out")

    monkeypatch.setattr(flight.Fetched, "_fetch", fail)
    with pytest.raises(SegmentError, match=r"^127\.0\.0\.1:\d+ cannot be reached: cable out"):
        flight.fetch(offer.handle(), "run")
    assert len(tried) == flight._TRIES


# Who is turned away

REFUSED: dict[str, tuple[Callable[[FlightHandle], FlightHandle], str]] = {
    "no token": (lambda handle: replace(handle, down=""), "unknown or void token"),
    "another token": (lambda handle: replace(handle, down="0" * 64), "unknown or void token"),
    "the token of the other direction": (lambda handle: replace(handle, down=handle.up), "unknown or void token"),
    "another run": (lambda handle: replace(handle, name="twist_fl-other-1"), "is not of this run"),
    "another certificate": (
        lambda handle: replace(handle, certificate=make_certificate("127.0.0.1")[0].decode()),
        "cannot be reached: .*(SSL|Ssl|TLS)",
    ),
    "another port": (
        lambda handle: replace(handle, location=f"grpc+tls://127.0.0.1:{free_port()}"),
        r"cannot be reached: .*refused",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_nothing_comes_without_the_token_and_from_no_other_server(case: str, offer: flight.Offer) -> None:
    change, reason = REFUSED[case]
    with pytest.raises(SegmentError, match=reason):
        flight.fetch(change(offer.handle()), "run", probing=True)


def test_a_token_sends_one_reply(offer: flight.Offer) -> None:
    handle = offer.handle()
    answered = flight.fetch(handle, "run").handle()
    before = offer.memory.clone()
    with pytest.raises(fl.FlightServerError, match=f"{SIZE} of {SIZE} bytes are in, not 0"):
        put(handle, 0, [torch.zeros(5, dtype=torch.uint8)])
    offer.check(answered)
    with pytest.raises(fl.FlightUnauthenticatedError, match="unknown or void token"):
        put(handle, 0, [torch.zeros(5, dtype=torch.uint8)])
    assert torch.equal(offer.memory, before)


def test_a_reply_that_is_read_changes_no_more(offer: flight.Offer) -> None:
    handle = offer.handle()
    writer = offer.begin(0)
    offer.write(writer, torch.ones(SIZE, dtype=torch.uint8).numpy())
    offer.check(replace(handle, checksum=transport.checksum(offer.memory)))
    with pytest.raises(fl.FlightServerError, match="the token is void"):
        offer.write(writer, torch.zeros(1, dtype=torch.uint8).numpy())


def test_a_second_writer_takes_the_place_of_the_first(offer: flight.Offer) -> None:
    """A worker whose connection broke comes back before the server has noticed."""
    offer.handle()
    first = offer.begin(0)
    offer.write(first, torch.ones(10, dtype=torch.uint8).numpy())
    second = offer.begin(10)
    with pytest.raises(fl.FlightServerError, match="another writer has come"):
        offer.write(first, torch.zeros(1, dtype=torch.uint8).numpy())
    offer.write(second, torch.ones(1, dtype=torch.uint8).numpy())
    assert offer.received == 11


@pytest.mark.parametrize("start", [-1, 1, SIZE])
def test_a_reply_starts_where_it_is(start: int, offer: flight.Offer) -> None:
    with pytest.raises(fl.FlightServerError, match=f"0 of {SIZE} bytes are in, not {start}"):
        put(offer.handle(), start, [torch.zeros(1, dtype=torch.uint8)])


def test_more_than_the_segment_is_refused(offer: flight.Offer) -> None:
    handle = offer.handle()
    with pytest.raises(fl.FlightServerError, match=f"{SIZE + 1} bytes, where the segment has {SIZE}"):
        put(handle, 0, [torch.zeros(SIZE + 1, dtype=torch.uint8)])
    assert offer.received == 0


def test_what_is_no_piece_of_a_segment_is_refused(offer: flight.Offer) -> None:
    with pytest.raises(pa.ArrowInvalid, match="what arrived is no piece of a segment"):
        put(offer.handle(), 0, [torch.zeros(5)], pa.schema([("bytes", pa.float32())]))


def test_an_oversized_announcement_is_refused_before_memory_is_taken(
    offer: flight.Offer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "empty", lambda *given, **settings: pytest.fail("memory was taken"))
    handle = replace(offer.handle(), num_bytes=2**60)
    with pytest.raises(SegmentError, match=rf"has {2**60} bytes, expected {SIZE}"):
        tensors.open_segment(handle, "run", SIZE)


def test_damaged_bytes_are_refused_on_both_sides(offer: flight.Offer) -> None:
    handle = offer.handle()
    found = flight.fetch(handle, "run")
    found.memory[9] += 1
    with pytest.raises(SegmentError, match="has checksum"):
        found.check(handle)
    answered = found.handle()
    with pytest.raises(SegmentError, match="has checksum"):
        offer.check(replace(answered, checksum=answered.checksum ^ 1))


# Certificates and addresses


def openssl(folder: Path, *lines: str) -> None:
    for line in lines:
        subprocess.run(["openssl", *line.split()], cwd=folder, check=True, capture_output=True)


def test_the_certificate_of_the_superlink(tmp_path: Path) -> None:
    """As docs/nodes.md makes it, signed by an authority of one's own."""
    (tmp_path / "server.ext").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth\n")
    openssl(
        tmp_path,
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=ca -keyout ca.key -out ca.crt",
        "req -newkey rsa:2048 -nodes -subj /CN=localhost -keyout server.key -out server.csr",
        "x509 -req -days 2 -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -extfile server.ext -out server.pem",
    )
    files = [str(tmp_path / name) for name in ("server.pem", "server.key")]
    server = flight.Server("run", "localhost:0", *files)
    offer = server.make(100)
    flight.fetch(offer.handle(), "run")
    server.end()


def test_what_cannot_listen_says_so(server: flight.Server, tmp_path: Path) -> None:
    address = server.location.removeprefix("grpc+tls://")
    with pytest.raises(ConfigError, match=rf"^flower\.flight={address}: nothing can listen there"):
        flight.Server("run", address)
    (tmp_path / "no.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match="is the certificate whole"):
        flight.Server("run", "127.0.0.1:0", *2 * [str(tmp_path / "no.pem")])
    with pytest.raises(ConfigError, match=r"none\.pem cannot be read \(No such file or directory\)"):
        flight.Server("run", "127.0.0.1:0", *2 * [str(tmp_path / "none.pem")])


# A run

BY_FLIGHT = ("flower.transport=flight", "flower.flight=127.0.0.1:0")


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.optimizer_state=server",),
        ("train.optimizer_state=client", "train.variant=masked"),
        ("algorithm=ddp",),
    ],
)
def test_the_app_is_rounds_run(
    overrides: tuple[str, ...], make_strategy: Callable[..., TwistStrategy], tmp_path: Path
) -> None:
    strategy = make_strategy(*BY_FLIGHT, *overrides)
    ours = strategy.run(grid := LocalGrid())
    assert {served.transport for served in grid.served} == {"flight"}
    assert strategy.folder.events("nodes")[0]["flight"] == 3
    for event in strategy.folder.events("round"):
        assert (event["answered"], event["dropped"]) == ([0, 1, 2], {})
        assert event["bytes_via"]["flight"]
        assert not event["bytes_via"]["inline"]
    assert_same_run(ours, run(strategy.job, start(strategy.job), tmp_path / "oracle"))


def test_in_16_bits_it_is_what_inline_gives_for_half_the_bytes(make_strategy: Callable[..., TwistStrategy]) -> None:
    by_flight, inline = (
        make_strategy("flower.wire_dtype=bfloat16", *words) for words in (BY_FLIGHT, ("flower.transport=inline",))
    )
    assert_same_run(by_flight.run(LocalGrid()), inline.run(LocalGrid()))
    (halved,), (whole,) = (
        {event["bytes_down"]["weights"] for event in strategy.folder.events("round")}
        for strategy in (by_flight, make_and_run(make_strategy))
    )
    assert halved * 2 == whole


def make_and_run(make_strategy: Callable[..., TwistStrategy]) -> TwistStrategy:
    strategy = make_strategy("flower.transport=inline")
    strategy.run(LocalGrid())
    return strategy


def test_auto_takes_it_for_nodes_on_other_machines(make_strategy: Callable[..., TwistStrategy], tmp_path: Path) -> None:
    strategy, grid = make_strategy("flower.flight=127.0.0.1:0"), LocalGrid(far=[1])
    ours = strategy.run(grid)
    assert [served.transport for served in grid.served] == ["shm", "flight", "shm"] * 2
    (nodes,) = strategy.folder.events("nodes")
    assert (nodes["shared_memory"], nodes["flight"], nodes["fallbacks"]) == (2, 1, [])
    assert_same_run(ours, run(strategy.job, start(strategy.job), tmp_path / "oracle"))


def test_nodes_that_do_not_reach_the_port_get_theirs_in_messages_and_the_log_says_why(
    make_strategy: Callable[..., TwistStrategy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end_at_once(self: flight.Server, num_bytes: int) -> flight.Offer:
        found = flight.Offer(self, num_bytes)
        self.shutdown()
        return found

    monkeypatch.setattr(flight.Server, "make", end_at_once)
    monkeypatch.setattr(flight.Server, "end", lambda self: None)
    strategy = make_strategy(*BY_FLIGHT)
    ours = strategy.run(grid := LocalGrid())
    assert {served.transport for served in grid.served} == {"inline"}
    (nodes,) = strategy.folder.events("nodes")
    assert nodes["flight"] == 0
    assert list(warnings(nodes)) == [f"a node's tensors go in Flower's messages: {why}" for why in nodes["fallbacks"]]
    assert len(nodes["fallbacks"]) == 3
    assert all("cannot be reached: " in why for why in nodes["fallbacks"])
    assert_same_run(ours, run(strategy.job, start(strategy.job), tmp_path / "oracle"))


def test_a_node_that_loses_the_port_costs_one_reply(make_strategy: Callable[..., TwistStrategy]) -> None:
    """It is asked again before the next round, and until then says what was wrong."""

    def unplugged(task: Task, message: Message, answer: Answer) -> list[Message]:
        if task.worker == 1 and task.round == 1:
            void = dict(message.content.config_records["flight"]) | {"up": "0" * 64}
            message.content["flight"] = ConfigRecord(void)
            return [refused(message, answer)]
        return [answer()]

    strategy = make_strategy(*BY_FLIGHT)
    strategy.run(LocalGrid(bend=unplugged))
    first, second = strategy.folder.events("round")
    assert "unknown or void token" in first["dropped"]["1"]
    assert second["dropped"] == {}
    assert len(strategy.folder.events("nodes")) == 2


def refused(message: Message, answer: Answer) -> Message:
    with pytest.raises(SegmentError) as error:
        answer()
    return failing(str(error.value))(message)


def test_a_run_leaves_no_port_open(make_strategy: Callable[..., TwistStrategy]) -> None:
    port = free_port()
    for _ in range(2):
        make_strategy("flower.transport=flight", f"flower.flight=127.0.0.1:{port}").run(LocalGrid())

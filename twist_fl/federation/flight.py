"""Tensors by Arrow Flight, for workers on other machines: Flower's messages carry a handle, and its two tokens.

The server keeps a segment per worker, as for shared memory. The worker fetches the task with the token `down` and,
when it has trained, sends the reply with the token `up` into the same memory. Either goes on where it was when the
connection breaks, until the server reads the reply: then both tokens are void. All is TLS: a worker accepts no
certificate but the one in the message, so it trusts the port as far as it trusts Flower's messages. Who has no token is
turned away before a byte of what he sends is read.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as fl
import torch
from numpy.typing import NDArray

from twist_fl.federation.authority import make_certificate
from twist_fl.federation.transport import FlightHandle, Handle, Segment, SegmentError, check_run, checksum, new_name
from twist_fl.system.errors import ConfigError
from twist_fl.system.untrusted import plain

Bytes = NDArray[np.uint8]
_SCHEMA = pa.schema([("bytes", pa.uint8())])
_PIECE = 2**20
"""Bytes of a message: with 4 MiB, gRPC's TLS took half as long again."""
_TRIES, _BACKOFF = 4, 0.5
"""Attempts in a row that get no further, and seconds before the second one, doubled for each that follows."""
_PROBE_SECONDS = 10.0
_PATIENCE, _SLOWEST = 60.0, 1e6
"""Seconds and bytes a second after which an attempt is given up: the next one goes on where it was."""
_CLOSING_SECONDS = 5.0
_KEY = "token"
_BROKEN = (fl.FlightUnavailableError, fl.FlightTimedOutError, fl.FlightCancelledError, fl.FlightInternalError)
"""What a connection that breaks raises; another may fare better."""


def _pieces(memory: torch.Tensor, start: int) -> Iterator[pa.RecordBatch]:
    """The bytes from `start` on, not copied."""
    buffer = pa.py_buffer(memory.numpy())
    for at in range(start, len(memory), _PIECE):
        piece = buffer.slice(at, min(_PIECE, len(memory) - at))
        array = pa.Array.from_buffers(pa.uint8(), len(piece), [None, piece])
        yield pa.RecordBatch.from_arrays([array], schema=_SCHEMA)


def _content(batch: pa.RecordBatch | None) -> Bytes:
    """What arrived, where it lies. Raises pyarrow.ArrowInvalid for what is not as `_pieces` makes it."""
    if batch is None or batch.schema != _SCHEMA:
        raise pa.ArrowInvalid("what arrived is no piece of a segment")
    batch.validate(full=True)
    found: Bytes = batch.column(0).to_numpy(zero_copy_only=True)
    return found


# The server


class Offer(Segment):
    """The server's memory for one worker: open to its two tokens from when a handle is made until its reply is read."""

    kind = "flight"

    def __init__(self, server: Server, num_bytes: int) -> None:
        self.name, self.memory = new_name(server.run_id), torch.zeros(num_bytes, dtype=torch.uint8)
        self._server, self._lock = server, Lock()
        self._received = self._writer = 0

    def handle(self) -> FlightHandle:
        """For a new task: the tokens of the one before are void."""
        self.close()
        down, up = secrets.token_hex(32), secrets.token_hex(32)
        self._received = 0
        server = self._server
        handle = FlightHandle(
            self.name, len(self.memory), checksum(self.memory), server.location, server.certificate, down, up
        )
        server.doors |= {down: (self, "down"), up: (self, "up")}
        return handle

    def check(self, handle: Handle) -> None:
        self.close()  # what is read must not change any more
        if self._received != len(self.memory):
            raise SegmentError(f"segment {self.name} has {self._received} of the reply's {len(self.memory)} bytes")
        super().check(handle)

    def close(self) -> None:
        with self._lock:
            self._writer += 1
        for token in [token for token, (offer, _) in self._server.doors.items() if offer is self]:
            del self._server.doors[token]

    @property
    def received(self) -> int:
        """Bytes of the reply that are in."""
        return self._received

    def read(self, start: int) -> Iterator[pa.RecordBatch]:
        if self._received:
            raise fl.FlightServerError("the reply has begun to come in where the task was")
        return _pieces(self.memory, start)

    def begin(self, start: int) -> int:
        """A new writer, in place of the one before; its number."""
        with self._lock:
            if start != self._received or start == len(self.memory):
                raise fl.FlightServerError(f"{self._received} of {len(self.memory)} bytes are in, not {start}")
            self._writer += 1
            return self._writer

    def write(self, writer: int, piece: Bytes) -> None:
        with self._lock:
            if writer != self._writer:
                raise fl.FlightServerError("the token is void: the round has gone on, or another writer has come")
            end = self._received + len(piece)
            if end > len(self.memory):
                raise fl.FlightServerError(f"{end} bytes, where the segment has {len(self.memory)}")
            self.memory.numpy()[self._received : end] = piece
            self._received = end


class _Pass(fl.ServerMiddleware):  # type: ignore[misc]
    """Of a call that may go on: which memory it is for."""

    def __init__(self, offer: Offer) -> None:
        self.offer = offer


class _Doorkeeper(fl.ServerMiddlewareFactory):  # type: ignore[misc]
    """Asks each call for its token before anything that follows is read."""

    def __init__(self, doors: Mapping[str, tuple[Offer, str]]) -> None:
        self._doors = doors

    def start_call(self, info: Any, headers: Mapping[str, Any]) -> _Pass:
        (token,) = headers.get(_KEY, [""])[:1]
        offer, direction = self._doors.get(token, (None, ""))
        wanted = {fl.FlightMethod.DO_GET: "down", fl.FlightMethod.DO_PUT: "up", fl.FlightMethod.DO_ACTION: "up"}
        if offer is None or direction != wanted.get(info.method):
            raise fl.FlightUnauthenticatedError("unknown or void token")
        return _Pass(offer)


class Server(fl.FlightServerBase):  # type: ignore[misc]
    """Listens until `end`. Raises ConfigError for an address or a certificate with which it cannot."""

    def __init__(self, run_id: str, address: str, certificate: str | None = None, key: str | None = None) -> None:
        """`address`: HOST:PORT as nodes name it, a port of 0 for any; the files of a certificate for HOST, or one is
        made for the run. On another host than this machine's loopback, it listens to all networks."""
        self.run_id = run_id
        self.doors: dict[str, tuple[Offer, str]] = {}
        host, _, port = address.rpartition(":")
        listen = host if host in ("localhost", "127.0.0.1", "[::1]") else "0.0.0.0"
        pair = (_read(certificate), _read(key)) if certificate and key else make_certificate(host.strip("[]"))
        self.certificate = pair[0].decode()
        try:
            super().__init__(
                f"grpc+tls://{listen}:{port}",
                tls_certificates=[pair],
                middleware={_KEY: _Doorkeeper(self.doors)},
            )
        except (pa.ArrowException, fl.FlightError, OSError) as error:
            raise ConfigError(
                f"flower.flight={address}: nothing can listen there ({plain(str(error))}): is the port taken, is the "
                "certificate whole and the key its own?"
            ) from error
        self.location = f"grpc+tls://{host}:{self.port}"

    def make(self, num_bytes: int) -> Offer:
        return Offer(self, num_bytes)

    def end(self) -> None:
        """All tokens are void; calls that go on end at their next piece, and are not waited for long."""
        for offer, _ in list(self.doors.values()):
            offer.close()
        closing = Thread(target=self.shutdown, daemon=True)
        closing.start()
        closing.join(_CLOSING_SECONDS)

    def do_get(self, context: Any, ticket: fl.Ticket) -> fl.RecordBatchStream:
        pieces = context.get_middleware(_KEY).offer.read(int(ticket.ticket))
        return fl.RecordBatchStream(pa.RecordBatchReader.from_batches(_SCHEMA, pieces))

    def do_put(self, context: Any, descriptor: fl.FlightDescriptor, reader: Any, _: Any) -> None:
        offer: Offer = context.get_middleware(_KEY).offer
        writer = offer.begin(int(descriptor.command))
        for chunk in reader:
            offer.write(writer, _content(chunk.data))

    def do_action(self, context: Any, action: fl.Action) -> Iterator[bytes]:
        """How many bytes of the reply are in, whatever the action."""
        yield str(context.get_middleware(_KEY).offer.received).encode()


def _read(file: str) -> bytes:
    try:
        return Path(file).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read ({error.strerror}): flower.flight_certificate and flower.flight_key name files, "
            "with absolute paths"
        ) from error


# A worker


class Fetched(Segment):
    """A worker's memory: it holds the task, in which it trains; its handle is made when the reply has arrived."""

    kind = "flight"

    def __init__(self, handle: FlightHandle) -> None:
        self.name, self._handle = handle.name, handle
        self.memory = torch.empty(handle.num_bytes, dtype=torch.uint8)
        self._done = 0

    def fetch(self, tries: int, seconds: float) -> None:
        """Raises SegmentError if the task cannot be had."""
        self._persist(self._fetch, self._handle.down, tries, seconds)

    def handle(self) -> FlightHandle:
        """Sends the reply. Raises SegmentError."""
        self._done = 0
        self._persist(self._send, self._handle.up, _TRIES, _PATIENCE + len(self.memory) / _SLOWEST)
        return replace(self._handle, checksum=checksum(self.memory))

    def close(self) -> None:
        """The server's part."""

    def _persist(
        self,
        attempt: Callable[[fl.FlightClient, fl.FlightCallOptions], None],
        token: str,
        tries: int,
        seconds: float,
    ) -> None:
        options = fl.FlightCallOptions(timeout=seconds, headers=[(_KEY.encode(), token.encode())])
        where, failed = self._handle.location.removeprefix("grpc+tls://"), 0
        while True:
            before = self._done
            try:
                with fl.connect(self._handle.location, tls_root_certs=self._handle.certificate.encode()) as client:
                    return attempt(client, options)
            except _BROKEN as error:
                failed = 1 if self._done > before else failed + 1
                if failed >= tries:
                    raise SegmentError(f"{where} cannot be reached: {_words(error)}") from error
            except (fl.FlightError, pa.ArrowException, OSError) as error:
                raise SegmentError(f"{where} refuses: {_words(error)}") from error
            time.sleep(_BACKOFF * 2 ** (failed - 1))

    def _fetch(self, client: fl.FlightClient, options: fl.FlightCallOptions) -> None:
        reader, memory = client.do_get(fl.Ticket(str(self._done).encode()), options), self.memory.numpy()
        for chunk in reader:
            piece = _content(chunk.data)
            if self._done + len(piece) > len(self.memory):
                raise pa.ArrowInvalid(f"more arrives than the {len(self.memory)} bytes announced")
            memory[self._done : self._done + len(piece)] = piece
            self._done += len(piece)

    def _send(self, client: fl.FlightClient, options: fl.FlightCallOptions) -> None:
        (there,) = client.do_action(fl.Action("received", b""), options)
        self._done = int(there.body.to_pybytes())
        if self._done == len(self.memory):  # all is there, only the answer was lost
            return
        where = fl.FlightDescriptor.for_command(str(self._done).encode())
        writer, _ = client.do_put(where, _SCHEMA, options)
        with writer:
            for piece in _pieces(self.memory, self._done):
                writer.write_batch(piece)


def _words(error: BaseException) -> str:
    """Without the addresses in the process that gRPC adds."""
    text = str(error)
    with suppress(ValueError):
        text = text[: text.index(". gRPC client debug context")]
    return plain(text, 200)


def fetch(handle: FlightHandle, run_id: str, probing: bool = False) -> Fetched:
    """The task's memory, here. Raises SegmentError."""
    check_run(handle, run_id)
    found = Fetched(handle)
    seconds = _PROBE_SECONDS if probing else _PATIENCE + handle.num_bytes / _SLOWEST
    found.fetch(1 if probing else _TRIES, seconds)
    return found

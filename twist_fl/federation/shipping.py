"""A ticket's way to an edge client, in parts: a device is sent those it does not have, and says what it measured.

Whatever is on the device stays there: a ticket that grows is sent its new blocks, one that shrinks nothing, and a
transfer that was cut goes on. No message is larger than PIECE_BYTES by more than one part.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from flwr.app import ConfigRecord, RecordDict

from twist_fl.blueprint.blocks import Layout
from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.config.checks import check_name
from twist_fl.config.devices import DeviceConfig
from twist_fl.federation import tensors
from twist_fl.federation.connecting import NoWorkersError
from twist_fl.model.shared_keys import with_copies
from twist_fl.model.subnet import State
from twist_fl.system.errors import ConfigError
from twist_fl.system.files import cache_dir
from twist_fl.system.untrusted import Field, plain, read_exactly, read_fields, shown
from twist_fl.tickets import edge_client
from twist_fl.tickets.export import Ticket, export_ticket, fold_ticket, ticket_digest
from twist_fl.tickets.parts import Shelf, parts_of, put_together, take_parts
from twist_fl.training.job import Job

Found = TypeVar("Found")
Talk = Generator[RecordDict, RecordDict, Found]
"""Messages to one device, each of which is sent its answer; and what comes of it."""
TIMES = ("latency_ms", "prompt_ms")
"""Limits that only the device itself can measure."""
PIECE_BYTES = 64_000_000

_TICKET = {
    **dict.fromkeys(("device", "blueprint", "digest", "state"), Field(str)),
    **dict.fromkeys(TIMES, Field(float, 0, or_null=True)),
    "context": Field(int, 2),
    "text": Field(list),
}
_REPORT = {
    **dict.fromkeys(("num_params", "weight_bytes", "context_tokens", "threads"), Field(int, 1)),
    **dict.fromkeys(("peak_memory_bytes", "perplexity_memory_bytes"), Field(int)),
    "perplexity": Field(float, or_null=True),
    **dict.fromkeys(("seconds_per_token", "seconds_per_prompt", "prompt_tokens_per_second"), Field(float, 0)),
}


class Weights:
    """The full model's in one precision, for every device that wants them: made and read once."""

    def __init__(self, params: State, dtype: str) -> None:
        """Of float32 no copy."""
        self.params: State = {key: tensor.to(getattr(torch, dtype)) for key, tensor in params.items()}
        self.name = ticket_digest("", "", self.params)[:32]
        """By what is in them: a device keeps what it was sent under it."""


@dataclass(frozen=True)
class Shipment:
    """What goes to one device."""

    job: Job
    device: DeviceConfig
    text: tuple[int, int]
    """The device's place among all, and their number: each has its own test text."""
    weights: Weights
    context: int

    def ship(self, blueprint: Blueprint, ticket: Ticket) -> Talk[dict[str, Any]]:
        """What the device measured of the ticket, and the bytes it was sent for it. Raises NoWorkersError."""
        own, held = self.job.layout.own_keys(blueprint)
        whole, wanted = with_copies(own, self.weights.params), {name for name, _ in parts_of(own, held)}
        state = f"{self.weights.name}-{own.sizes['kv_heads']}"
        parts: State = {}
        sent, missing = 0, len(wanted) + 1
        while True:
            content = self.to_records(blueprint, ticket, state, parts)
            sent += sum(tensors.num_bytes(content).values())
            answer = self._answer((yield content), wanted)
            if isinstance(answer, dict):
                return _row(answer) | {"bytes_received": sent}
            if len(answer) >= missing:
                raise NoWorkersError(f"device {self.device.name} does not keep what it is sent")
            missing, parts = len(answer), self._piece(own, whole, answer)

    def to_records(
        self, blueprint: Blueprint, ticket: Ticket, state: str, parts: Mapping[str, torch.Tensor]
    ) -> RecordDict:
        fields = {
            "device": self.device.name,
            "blueprint": blueprint.to_json(),
            "digest": ticket.digest,
            "state": state,
            **{key: getattr(self.device, key) for key in TIMES},
            "context": self.context,
            "text": self.text,
        }
        content = RecordDict(
            {
                "job": ConfigRecord({"json": self.job.to_json()}),
                "ticket": ConfigRecord({"json": json.dumps(fields)}),
            }
        )
        if parts:
            content["params"] = tensors.to_arrays(parts)
        return content

    def _answer(self, content: RecordDict, wanted: set[str]) -> dict[str, Any] | list[str]:
        """The report, or the names of the parts that are missing."""
        try:
            text = str(content.config_records["report"]["json"])
            missing = read_fields(text, {}).get("missing")
            if missing is None:
                return read_exactly(text, _REPORT)
            if not isinstance(missing, list) or not missing or not wanted.issuperset(map(str, missing)):
                raise ValueError(f"missing={shown(missing)} is no list of the ticket's parts")
            return missing
        except (KeyError, ValueError) as error:
            reason = plain(f"{type(error).__name__}: {error}")
            raise NoWorkersError(f"device {self.device.name} sent a malformed report: {reason}") from error

    @staticmethod
    def _piece(own: Layout, whole: State, missing: list[str]) -> State:
        """The first of the parts, as many as a message may have."""
        found: State = {}
        size = 0
        for name, part in take_parts(own, whole, missing).items():
            if size > PIECE_BYTES:
                break
            found[name], size = part.contiguous(), size + part.nbytes
        return found


def _row(measured: dict[str, Any]) -> dict[str, Any]:
    return {
        "weight_mb": measured["weight_bytes"] / 1e6,
        "ms_per_token": 1000 * measured["seconds_per_token"],
        "ms_per_prompt": 1000 * measured["seconds_per_prompt"],
        "peak_mb": measured["peak_memory_bytes"] / 1e6,
        **measured,
    }


def receive(job: Job, content: RecordDict) -> RecordDict:
    """On the edge client: keep what came, and say what is missing; or, of a ticket that is all here, check the hash,
    write the dense model, and measure it on local text in a fresh process.

    Raises ValueError for what is no message of `Shipment`, and for a ticket that is not what was meant.
    """
    fields = read_exactly(str(content.config_records["ticket"]["json"]), _TICKET)
    for key in ("device", "state"):
        check_name(key, fields[key])
    if len(fields["text"]) != 2 or not all(Field(int, 0).holds(number) for number in fields["text"]):
        raise ValueError(f"text={shown(fields['text'])} is no place and number of devices")
    place, of = fields["text"]
    if place >= of:
        raise ValueError(f"text={[place, of]} is a place beyond the number of devices")
    windows = job.corpus.test[place::of][: job.config.deploy.windows]
    if not len(windows):
        raise ConfigError(f"device {fields['device']} has no test text to measure a ticket on: give the run more of it")
    blueprint = Blueprint.from_json(fields["blueprint"])
    job.layout.check_blueprint(blueprint)
    own, held = job.layout.own_keys(blueprint)
    shelf = Shelf(cache_dir() / "parts" / job.run_id / fields["device"], fields["state"])
    if "params" in content.array_records:
        shelf.put(own, held, tensors.from_arrays(content.array_records["params"]))
    if missing := shelf.missing(own, held):
        return RecordDict({"report": ConfigRecord({"json": json.dumps({"missing": missing})})})
    folder = cache_dir() / "tickets" / job.run_id / fields["device"]
    sliced = put_together(own, held, shelf.parts(own, held))
    ticket = fold_ticket(own, sliced, job.model_config.to_dict(), held, job.config.blueprint.scale)
    if ticket.digest != fields["digest"]:
        shelf.clear()
        raise ValueError(
            f"the ticket is not what was sent: SHA-256 is {ticket.digest}, expected {shown(fields['digest'])}: all its "
            "parts are removed here, send it again"
        )
    export_ticket(ticket, folder, job.corpus.tokenizer_folder)
    limits = {key: fields[key] for key in TIMES}
    asked = edge_client.Measurement(job.config.deploy.new_tokens, fields["context"], **limits)
    measured = asdict(edge_client.measure(folder, windows, asked))
    return RecordDict({"report": ConfigRecord({"json": json.dumps(measured)})})

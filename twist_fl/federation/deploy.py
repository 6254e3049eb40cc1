"""Ship tickets of a trained run to edge clients through Flower, and collect what they measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from math import ceil
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.blueprint.drawing import draw_ticket
from twist_fl.config.checks import check_name
from twist_fl.config.devices import DeviceConfig
from twist_fl.config.sizes import TicketSize, ticket_sizes
from twist_fl.federation import tensors, wire
from twist_fl.federation.connecting import NoWorkersError
from twist_fl.federation.exchange import exchange
from twist_fl.model.subnet import State
from twist_fl.rounds import RunState
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.errors import ConfigError
from twist_fl.system.files import cache_dir, write_json
from twist_fl.system.units import size_label
from twist_fl.system.untrusted import Field, plain, read_exactly, shown
from twist_fl.tickets import edge_client
from twist_fl.tickets.device_limits import parse_devices
from twist_fl.tickets.export import (
    Ticket,
    export_ticket,
    in_dtype,
    limit_of_size,
    make_ticket,
    next_sizes,
    plan_tickets,
    ticket_memory_bytes,
)
from twist_fl.training.job import Job

MESSAGE_TYPE = "query.ticket"
TIMES = ("latency_ms", "prompt_ms")
"""Limits that only the device itself can measure."""


_TICKET = {
    **dict.fromkeys(("device", "config", "blueprint", "digest"), Field(str)),
    **dict.fromkeys(TIMES, Field(float, 0, or_null=True)),
    "context": Field(int, 2),
    "text": Field(list),
}
_REPORT = {
    **dict.fromkeys(("num_params", "weight_bytes", "context_tokens", "threads", "bytes_received"), Field(int, 1)),
    **dict.fromkeys(("peak_memory_bytes", "perplexity_memory_bytes"), Field(int)),
    "perplexity": Field(float, or_null=True),
    **dict.fromkeys(("seconds_per_token", "seconds_per_prompt", "prompt_tokens_per_second"), Field(float, 0)),
}


def default_devices(job: Job) -> list[DeviceConfig]:
    """Three devices that just fit the whole model, half of its blocks and a quarter."""
    sizes = ticket_sizes(job.layout, job.division)
    devices = []
    for name, share in (("laptop", 1.0), ("phone", 0.5), ("watch", 0.25)):
        size = [sizes[0], *(size for size in sizes if size.share <= share)][-1]
        blueprint = draw_ticket(job.layout, job.division, size.num_sub, job.config.seed, 0)
        needed = ticket_memory_bytes(job.layout, blueprint)
        devices.append(DeviceConfig(name, ceil(needed / 1e4) / 1e2))
    return devices


def devices_of(job: Job, pairs: Iterable[str]) -> list[DeviceConfig]:
    """The devices given, else the configuration's, else three defaults. Raises ConfigError."""
    return parse_devices(pairs) or job.config.deploy.devices or default_devices(job)


Carry = Callable[[int, DeviceConfig, RecordDict], RecordDict]
"""Takes a ticket's message to the device of that place, and brings back what it measured."""


def deploy_run(grid: Grid, folder: RunFolder, job: Job, devices: str = "") -> None:
    """`_deploy` to the nodes of a Flower network, what a run has trained."""
    with folder.lock("server"), folder.failures_logged():
        state = folder.load()
        if state is None:
            raise ConfigError(f"{folder.path} has no checkpoint yet: train first")
        job = job.scored(state.scores)
        nodes = sorted(grid.get_node_ids())
        if not nodes:
            raise NoWorkersError("no edge client is connected")

        def carry(place: int, device: DeviceConfig, content: RecordDict) -> RecordDict:
            return _by_flower(grid, nodes[place % len(nodes)], job, device, content)

        _deploy(folder, job, state, devices_of(job, devices.split()), carry)


def deploy_here(
    folder: RunFolder, job: Job, state: RunState, devices: Sequence[DeviceConfig], say: Callable[[str], None]
) -> None:
    """`_deploy` to devices that this process plays, by the same messages."""

    def carry(place: int, device: DeviceConfig, content: RecordDict) -> RecordDict:
        say(f"{device.name}: device {place + 1} of {len(devices)} measures its ticket")
        return receive(job, content)

    with folder.lock("server"), folder.failures_logged():
        _deploy(folder, job, state, devices, carry)


def _deploy(folder: RunFolder, job: Job, state: RunState, devices: Sequence[DeviceConfig], carry: Carry) -> None:
    """For each device: plan, draw, fold, ship, log what it measured; `folder` gets deployed.json and deployed/NAME/.

    Devices are served one after another, so that they do not disturb each other's latency. Raises ConfigError when
    all have been served, if some are too slow with every ticket.
    """
    # All are planned before any is served: an impossible device is refused before anything starts.
    plans = [(device, plan_device(job, device)) for device in devices]
    rows, too_slow = [], []
    for place, (device, tickets) in enumerate(plans):
        ship = partial(_ship, partial(carry, place, device), job, device, (place, len(plans)))
        try:
            ticket, row = settle(job, state.params, device, tickets, ship)
        except ConfigError as error:
            too_slow.append(str(error))
            continue
        rows.append(row)
        export_ticket(ticket, folder.path / "deployed" / device.name, job.corpus.tokenizer_folder)
        write_json(rows, folder.path / "deployed.json")
        folder.log("device", round=state.round, **row)
    if too_slow:
        raise ConfigError("; ".join(too_slow))
    folder.log("deployed", round=state.round)


def plan_device(job: Job, device: DeviceConfig) -> dict[TicketSize, Blueprint]:
    """`deploy.plan_tickets`. Raises ConfigError if none fits, or if the device's latency could not be measured."""
    context, new_tokens = _context(job, device), job.config.deploy.new_tokens
    if context > job.layout.sizes["positions"]:
        most = job.layout.sizes["positions"]
        raise ConfigError(
            f"deploy.devices {device.name!r}: context={context} is more than the model has seen: use {most} at most"
        )
    if new_tokens >= context:
        raise ConfigError(
            f"deploy.new_tokens={new_tokens} does not fit a context of {context}: use at most {context - 1}"
        )
    return plan_tickets(job.layout, job.division, device, job.config.seed)


def _context(job: Job, device: DeviceConfig) -> int:
    return device.context or job.layout.sizes["positions"]


def settle(
    job: Job,
    params: State,
    device: DeviceConfig,
    tickets: dict[TicketSize, Blueprint],
    ship: Callable[[Ticket], dict[str, Any]],
) -> tuple[Ticket, dict[str, Any]]:
    """`ship` the largest of `tickets` and, while the device is slower with it than its limit, a smaller one.

    Returns the ticket that stays, and its row. Raises ConfigError if the device is too slow with the smallest, too.
    """
    sizes, tried = list(tickets), list[dict[str, Any]]()
    limited_by = limit_of_size(job.layout, job.division, device, sizes[0])
    while True:
        blueprint = tickets[sizes[0]]
        ticket = make_ticket(job.layout, params, job.model_config.to_dict(), blueprint, job.config.blueprint.scale)
        if device.dtype != "float32":
            ticket = in_dtype(ticket, device.dtype)
        planned_mb = ticket_memory_bytes(job.layout, blueprint, device.context, device.dtype) / 1e6
        tried.append({**sizes[0].row, "planned_mb": planned_mb, "digest": ticket.digest, **ship(ticket)})
        took = {"latency_ms": tried[-1]["ms_per_token"], "prompt_ms": tried[-1]["ms_per_prompt"]}
        limits = {key: limit for key in TIMES if (limit := getattr(device, key)) is not None}
        slowest = max(limits, key=lambda key: took[key] / limits[key], default=None)
        if slowest is None or took[slowest] <= limits[slowest]:
            return ticket, _row(device, tried, limited_by)
        limited_by = slowest.removesuffix("_ms")
        if not (sizes := next_sizes(sizes, took[slowest], limits[slowest])):
            what = "a token" if slowest == "latency_ms" else "the prompt"
            raise ConfigError(
                f"deploy.devices {device.name!r}: {slowest}={limits[slowest]:g} is too little; with the smallest "
                f"possible ticket, {size_label(tried[-1])}, {what} took {took[slowest]:.3g} ms: use a higher limit"
            )


def _row(device: DeviceConfig, tried: list[dict[str, Any]], limited_by: str | None) -> dict[str, Any]:
    """What is reported of a device: its limits and the one that decided, the ticket that stays, and what all that it
    tried cost."""
    return {
        **asdict(device),
        "limited_by": limited_by,
        **tried[-1],
        "bytes_received": sum(each["bytes_received"] for each in tried),
        "tried": [{key: each[key] for key in ("size", "ms_per_token")} for each in tried],
    }


def _ship(
    carry: Callable[[RecordDict], RecordDict], job: Job, device: DeviceConfig, text: tuple[int, int], ticket: Ticket
) -> dict[str, Any]:
    """What the device measured; `text` is its place among the devices, and their number: each has its own test text."""
    answer = carry(_to_records(job, device, text, ticket))
    try:
        measured = read_exactly(str(answer.config_records["report"]["json"]), _REPORT)
    except (KeyError, ValueError) as error:
        reason = plain(f"{type(error).__name__}: {error}")
        raise NoWorkersError(f"device {device.name} sent a malformed report: {reason}") from error
    return {
        "weight_mb": measured["weight_bytes"] / 1e6,
        "ms_per_token": 1000 * measured["seconds_per_token"],
        "ms_per_prompt": 1000 * measured["seconds_per_prompt"],
        "peak_mb": measured["peak_memory_bytes"] / 1e6,
        **measured,
    }


def _by_flower(grid: Grid, node: int, job: Job, device: DeviceConfig, content: RecordDict) -> RecordDict:
    message = Message(content, dst_node_id=node, message_type=MESSAGE_TYPE)
    replies = list(exchange(grid, [message], job.config.flower, job.config.flower.round_timeout))
    if not replies:
        raise NoWorkersError(f"device {device.name} did not answer within {job.config.flower.round_timeout:g} s")
    if replies[0].has_error():
        raise NoWorkersError(f"device {device.name} failed: {wire.error_of(replies[0])}")
    return replies[0].content


def _to_records(job: Job, device: DeviceConfig, text: tuple[int, int], ticket: Ticket) -> RecordDict:
    fields = {
        "device": device.name,
        "config": ticket.config_json,
        "blueprint": ticket.blueprint.to_json(),
        "digest": ticket.digest,
        **{key: getattr(device, key) for key in TIMES},
        "context": _context(job, device),
        "text": text,
    }
    return RecordDict(
        {
            "job": ConfigRecord({"json": job.to_json()}),
            "ticket": ConfigRecord({"json": json.dumps(fields)}),
            "params": tensors.to_arrays(ticket.params),
        }
    )


def receive(job: Job, content: RecordDict) -> RecordDict:
    """On the edge client: check the hash, write the dense model, measure it on local text in a fresh process."""
    fields = read_exactly(str(content.config_records["ticket"]["json"]), _TICKET)
    check_name("device", fields["device"])
    if len(fields["text"]) != 2 or not all(Field(int, 0).holds(number) for number in fields["text"]):
        raise ValueError(f"text={shown(fields['text'])} is no place and number of devices")
    place, of = fields["text"]
    if place >= of:
        raise ValueError(f"text={[place, of]} is a place beyond the number of devices")
    windows = job.corpus.test[place::of][: job.config.deploy.windows]
    if not len(windows):
        raise ConfigError(f"device {fields['device']} has no test text to measure a ticket on: give the run more of it")
    params = tensors.from_arrays(content.array_records["params"])
    folder = cache_dir() / "tickets" / job.run_id / fields["device"]
    edge_client.receive_ticket(
        fields["config"], fields["blueprint"], params, fields["digest"], folder, job.corpus.tokenizer_folder
    )
    limits = {key: fields[key] for key in TIMES}
    asked = edge_client.Measurement(job.config.deploy.new_tokens, fields["context"], **limits)
    measured = asdict(edge_client.measure(folder, windows, asked))
    measured["bytes_received"] = sum(tensors.num_bytes(content).values())
    return RecordDict({"report": ConfigRecord({"json": json.dumps(measured)})})

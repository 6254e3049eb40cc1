"""Ship tickets of a trained run to edge clients through Flower, and collect what they measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from math import ceil
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from twist_fl import edge, tensors, wire
from twist_fl.blueprint import Blueprint, draw_ticket
from twist_fl.checkpoint import RunFolder
from twist_fl.config import ConfigError, DeviceConfig
from twist_fl.data import cache_dir
from twist_fl.deploy import Ticket, export_ticket, legal_sizes, make_ticket, plan_ticket, ticket_memory_bytes
from twist_fl.evaluate import ticket_sizes
from twist_fl.files import write_text
from twist_fl.job import Job
from twist_fl.strategy import NoWorkersError, exchange

MESSAGE_TYPE = "query.ticket"
_LOCAL_WINDOWS = 64
"""Windows of the test split that stand for a device's own text."""


def parse_devices(pairs: Iterable[str]) -> list[DeviceConfig]:
    """`NAME=MB` pairs; a name becomes the name of a folder. Raises ConfigError."""
    devices: list[DeviceConfig] = []
    for pair in pairs:
        found = re.fullmatch(r"(\w[\w.-]*)=(\d+\.?\d*|\.\d+)", pair)
        if not found:
            raise ConfigError(f"device {pair!r} is not NAME=MEMORY_IN_MB, for example phone=3.5")
        if found[1] in {device.name for device in devices}:
            raise ConfigError(f"device {found[1]!r} is given twice: give each its own name")
        devices.append(DeviceConfig(found[1], float(found[2])))
    return devices


def default_devices(job: Job) -> list[DeviceConfig]:
    """Three devices that just fit the whole model, half of its blocks and a quarter."""
    sizes = legal_sizes(job.layout, job.division)
    devices = []
    for name, share in (("laptop", 1.0), ("phone", 0.5), ("watch", 0.25)):
        size = max((s for s in sizes if s <= share * sizes[-1]), default=sizes[0])
        num_sub = ticket_sizes(job.layout, job.division, size)
        blueprint = draw_ticket(job.layout, job.division, num_sub, job.config.seed, 0)
        needed = ticket_memory_bytes(job.layout, blueprint)
        devices.append(DeviceConfig(name, ceil(needed / 1e4) / 1e2))
    return devices


def devices_of(job: Job, pairs: Iterable[str]) -> list[DeviceConfig]:
    """The devices given, else the configuration's, else three defaults. Raises ConfigError."""
    return parse_devices(pairs) or job.config.deploy.devices or default_devices(job)


def deploy_run(grid: Grid, folder: RunFolder, job: Job, devices: str = "") -> None:
    """For each device: plan, draw, fold, ship, and log what it measured; writes deployed.json and deployed/NAME/.

    Devices are served one after another, so that they do not disturb each other's latency.
    """
    with folder.lock("server"), folder.failures_logged():
        state = folder.load()
        if state is None:
            raise ConfigError(f"{folder.path} has no checkpoint yet: train first")
        job = job.scored(state.scores)
        nodes = sorted(grid.get_node_ids())
        if not nodes:
            raise NoWorkersError("no edge client is connected")
        targets = devices_of(job, devices.split())
        model_config = job.model_config.to_dict()
        # All tickets are planned before any is shipped: an impossible device is refused before anything starts.
        tickets = [
            make_ticket(job.layout, state.params, model_config, plan_device(job, device), job.config.blueprint.scale)
            for device in targets
        ]
        rows = []
        for place, (device, ticket) in enumerate(zip(targets, tickets, strict=True)):
            content = _to_records(job, device, ticket, place, len(targets))
            node = nodes[place % len(nodes)]
            message = Message(content, dst_node_id=node, message_type=MESSAGE_TYPE)
            replies = list(exchange(grid, [message], job.config.flower, job.config.flower.round_timeout))
            rows.append(_row(job, device, ticket, replies))
            export_ticket(ticket, folder.path / "deployed" / device.name, job.corpus.tokenizer_folder)
            folder.log("device", round=state.round, **rows[-1])
        write_text(json.dumps(rows, indent=1), folder.path / "deployed.json")
        folder.log("deployed", round=state.round)


def plan_device(job: Job, device: DeviceConfig) -> Blueprint:
    """The largest ticket that fits the device. Raises ConfigError if none does, or if it could not be measured."""
    context, new_tokens = job.layout.sizes["positions"], job.config.deploy.new_tokens
    if new_tokens >= context:
        raise ConfigError(
            f"deploy.new_tokens={new_tokens} does not fit a context of {context}: use at most {context - 1}"
        )
    return plan_ticket(job.layout, job.division, device.memory_mb * 1e6, job.config.seed, 0, device.name)


def _to_records(job: Job, device: DeviceConfig, ticket: Ticket, place: int, of: int) -> RecordDict:
    fields = {
        "device": device.name,
        "config": ticket.config_json,
        "blueprint": ticket.blueprint.to_json(),
        "digest": ticket.digest,
        "text": [place, of],
    }
    return RecordDict(
        {
            "job": ConfigRecord({"json": job.to_json()}),
            "ticket": ConfigRecord({"json": json.dumps(fields)}),
            "params": tensors.to_arrays(ticket.params),
        }
    )


def _row(job: Job, device: DeviceConfig, ticket: Ticket, replies: list[Message]) -> dict[str, Any]:
    if not replies:
        raise NoWorkersError(f"device {device.name} did not answer within {job.config.flower.round_timeout:g} s")
    if replies[0].has_error():
        raise NoWorkersError(f"device {device.name} failed: {wire.error_of(replies[0])}")
    measured = json.loads(str(replies[0].content.config_records["report"]["json"]))
    layer = job.division.undivided_first
    kind = 0 if job.division.divides("attn") else 1
    return {
        "name": device.name,
        "memory_mb": device.memory_mb,
        "planned_mb": ticket_memory_bytes(job.layout, ticket.blueprint) / 1e6,
        "size": ticket.blueprint.shape[kind][layer],
        "of": ticket.blueprint.num_blocks[kind],
        "digest": ticket.digest,
        "weight_mb": measured["weight_bytes"] / 1e6,
        "ms_per_token": 1000 * measured["seconds_per_token"],
        "peak_mb": measured["peak_memory_bytes"] / 1e6,
        **measured,
    }


def receive(job: Job, content: RecordDict) -> RecordDict:
    """On the edge client: check the hash, write the dense model, measure it on local text in a fresh process."""
    fields = json.loads(str(content.config_records["ticket"]["json"]))
    params = tensors.from_arrays(content.array_records["params"])
    folder = cache_dir() / "tickets" / job.run_id / fields["device"]
    edge.receive_ticket(
        fields["config"], fields["blueprint"], params, fields["digest"], folder, job.corpus.tokenizer_folder
    )
    place, of = fields["text"]
    windows = job.corpus.test[place::of][:_LOCAL_WINDOWS]
    measured = asdict(edge.measure(folder, windows, job.config.deploy.new_tokens))
    measured["bytes_received"] = sum(tensors.num_bytes(content).values())
    return RecordDict({"report": ConfigRecord({"json": json.dumps(measured)})})

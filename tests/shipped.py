"""A ticket on its way to a device, without Flower."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.app import RecordDict

from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.config.devices import DeviceConfig
from twist_fl.federation.shipping import Shipment, Weights
from twist_fl.model.shared_keys import with_copies
from twist_fl.rounds import start
from twist_fl.tickets.export import Ticket, make_ticket
from twist_fl.tickets.parts import parts_of, take_parts
from twist_fl.training.job import Job

Carry = Callable[[RecordDict], RecordDict]


def ticket_of(job: Job, blueprint: Blueprint) -> Ticket:
    """Of the job's first weights."""
    fields, scale = job.model_config.to_dict(), job.config.blueprint.scale
    return make_ticket(job.layout, start(job).params, fields, blueprint, scale)


def shipment(job: Job) -> Shipment:
    return Shipment(job, DeviceConfig("phone", 3.0), (0, 1), Weights(start(job).params, "float32"), 16)


def ship(job: Job, carry: Carry, blueprint: Blueprint) -> dict[str, Any]:
    talk = shipment(job).ship(blueprint, ticket_of(job, blueprint))
    content = next(talk)
    while True:
        try:
            content = talk.send(carry(content))
        except StopIteration as end:
            return dict(end.value)


def whole_ticket(job: Job, blueprint: Blueprint) -> RecordDict:
    """One message that has it all."""
    own, held = job.layout.own_keys(blueprint)
    given = shipment(job)
    parts = take_parts(own, with_copies(own, given.weights.params), [name for name, _ in parts_of(own, held)])
    return given.to_records(blueprint, ticket_of(job, blueprint), "state", parts)

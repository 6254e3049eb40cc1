"""Which tickets of a trained run edge clients get, through Flower or in this process, and what they measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from math import ceil
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.blueprint.drawing import draw_ticket
from twist_fl.config.devices import DeviceConfig
from twist_fl.config.sizes import TicketSize, ticket_sizes
from twist_fl.federation import wire
from twist_fl.federation.connecting import NoWorkersError
from twist_fl.federation.exchange import exchange
from twist_fl.federation.shipping import TIMES, Shipment, Talk, Weights, receive
from twist_fl.model.subnet import State
from twist_fl.rounds import RunState
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.errors import ConfigError
from twist_fl.system.files import write_json
from twist_fl.system.units import size_label
from twist_fl.tickets.device_limits import parse_devices
from twist_fl.tickets.export import (
    Ticket,
    export_ticket,
    limit_of_size,
    make_ticket,
    next_sizes,
    plan_tickets,
    ticket_memory_bytes,
)
from twist_fl.training.job import Job

MESSAGE_TYPE = "query.ticket"


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


class SilentError(NoWorkersError):
    """A node has not answered in time."""


Failure = ConfigError | NoWorkersError
Answer = RecordDict | Failure
Carry = Callable[[Mapping[int, RecordDict]], Mapping[int, Answer]]
"""Takes messages to the devices of these places, and brings their answers."""


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

        wanted = devices_of(job, devices.split())
        of = [nodes[place % len(nodes)] for place in range(len(wanted))]
        _deploy(folder, job, state, wanted, of, partial(_by_flower, grid, job, wanted, of))


def deploy_here(
    folder: RunFolder, job: Job, state: RunState, devices: Sequence[DeviceConfig], say: Callable[[str], None]
) -> None:
    """`_deploy` to devices that this process plays, by the same messages."""

    def carry(messages: Mapping[int, RecordDict]) -> dict[int, Answer]:
        found: dict[int, Answer] = {}
        for place, content in messages.items():
            if "params" not in content:
                say(f"{devices[place].name}: device {place + 1} of {len(devices)} gets its ticket and measures it")
            try:
                found[place] = receive(job, content)
            except ConfigError as error:
                found[place] = error
        return found

    with folder.lock("server"), folder.failures_logged():
        _deploy(folder, job, state, devices, [0] * len(devices), carry)


def _deploy(
    folder: RunFolder, job: Job, state: RunState, devices: Sequence[DeviceConfig], nodes: Sequence[int], carry: Carry
) -> None:
    """For each device: plan, draw, fold, ship, log what it measured; `folder` gets deployed.json and deployed/NAME/.

    `nodes`: where each device is; of a node's devices one is served at a time, and deploy.at_once of all. When all
    have been served, raises NoWorkersError if some have not answered, ConfigError if some are too slow with every
    ticket or have no text, and names them all.
    """
    # All are planned before any is served: an impossible device is refused before anything starts.
    plans = [plan_device(job, device) for device in devices]
    weights = cache(partial(Weights, state.params))
    rows: dict[int, dict[str, Any]] = {}

    def serve(place: int) -> Talk[None]:
        device, text = devices[place], (place, len(devices))
        sent = weights(device.dtype)
        ship = Shipment(job, device, text, sent, _context(job, device)).ship
        ticket, row = yield from settle(job, sent.params, device, plans[place], ship)
        rows[place] = row
        export_ticket(ticket, folder.path / "deployed" / device.name, job.corpus.tokenizer_folder)
        write_json([rows[place] for place in sorted(rows)], folder.path / "deployed.json")
        folder.log("device", round=state.round, **row)

    if failed := _talk(serve, nodes, job.config.deploy.at_once, carry):
        kind = ConfigError if all(isinstance(error, ConfigError) for error in failed.values()) else NoWorkersError
        untried = "device {} was not tried: its node has not answered"
        raise kind("; ".join(str(failed[place] or untried.format(devices[place].name)) for place in sorted(failed)))
    folder.log("deployed", round=state.round)


def _talk(
    serve: Callable[[int], Talk[None]], nodes: Sequence[int], at_once: int, carry: Carry
) -> dict[int, Failure | None]:
    """Serve the device of every place; what has failed, None where it was not tried for a node that is silent.

    Up to `at_once` devices, each on a node of its own, get a message at a time; the next go out when all have answered.
    """
    waiting, talks = list(range(len(nodes))), dict[int, Talk[None]]()
    failed: dict[int, Failure | None] = {}
    answers: Mapping[int, Answer] = {}
    while True:
        messages = {}
        for place in (*answers, *waiting):
            if place not in talks:
                if place in failed or len(talks) == at_once or nodes[place] in {nodes[other] for other in talks}:
                    continue
                waiting.remove(place)
                talks[place] = serve(place)
            answer = answers.get(place)
            try:
                if answer is None:
                    messages[place] = next(talks[place])
                elif isinstance(answer, Failure):
                    talks[place].throw(answer)
                else:
                    messages[place] = talks[place].send(answer)
            except (ConfigError, NoWorkersError) as error:
                failed[place] = error
                del talks[place]
                if isinstance(error, SilentError):  # it may still be at work, and another would wait as long
                    untried = [other for other in waiting if nodes[other] == nodes[place]]
                    failed |= dict.fromkeys(untried)
                    waiting = [other for other in waiting if other not in untried]
            except StopIteration:
                del talks[place]
        if not messages:
            return failed
        answers = carry(messages)


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
    ship: Callable[[Blueprint, Ticket], Talk[dict[str, Any]]],
) -> Talk[tuple[Ticket, dict[str, Any]]]:
    """`ship` the largest of `tickets` and, while the device is slower with it than its limit, a smaller one.

    Returns the ticket that stays, and its row. Raises ConfigError if the device is too slow with the smallest, too.
    """
    sizes, tried = list(tickets), list[dict[str, Any]]()
    limited_by = limit_of_size(job.layout, job.division, device, sizes[0])
    while True:
        blueprint = tickets[sizes[0]]
        ticket = make_ticket(job.layout, params, job.model_config.to_dict(), blueprint, job.config.blueprint.scale)
        planned_mb = ticket_memory_bytes(job.layout, blueprint, device.context, device.dtype) / 1e6
        measured = yield from ship(blueprint, ticket)
        tried.append({**sizes[0].row, "planned_mb": planned_mb, "digest": ticket.digest, **measured})
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


def _by_flower(
    grid: Grid, job: Job, devices: Sequence[DeviceConfig], nodes: Sequence[int], contents: Mapping[int, RecordDict]
) -> dict[int, Answer]:
    flower = job.config.flower
    messages = (
        Message(content, dst_node_id=nodes[place], message_type=MESSAGE_TYPE, group_id=str(place))
        for place, content in contents.items()
    )
    found: dict[int, Answer] = {
        place: SilentError(f"device {devices[place].name} did not answer within {flower.round_timeout:g} s")
        for place in contents
    }
    for reply in exchange(grid, messages, flower, flower.round_timeout):
        place = int(reply.metadata.group_id)
        if reply.has_error():
            found[place] = NoWorkersError(f"device {devices[place].name} failed: {wire.error_of(reply)}")
        else:
            found[place] = reply.content
    return found

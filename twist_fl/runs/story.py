"""What a run has come to, told from its events: the same words on a terminal, under `flwr run --stream` and afterwards.

A `Story` keeps what is shown and no more, however long the run is. Nothing here needs torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from twist_fl.runs.events import Event, EventReader
from twist_fl.system.units import count, duration_text, human_bytes, perplexity_text, size_label

_RECENT = 20
"""Rounds whose time says how long a round takes."""


class Story:
    """Where a run stands, as far as its events say. What they do not say is None or empty."""

    def __init__(self) -> None:
        self.state = "starting"
        self.ended: str | None = None
        """done or failed."""
        self.round = self.num_rounds = 0
        self.start: Event = {}
        self.nodes: Event = {}
        self.loss: float | None = None
        self.perplexity = ""
        self.evaluated = 0
        """The round after which it was measured."""
        self.federated: Event = {}
        """The workers' last evaluation."""
        self.seconds = 0.0
        """The last round's."""
        self.down = self.up = 0
        self.via: dict[str, int] = {}
        self.lost: dict[str, tuple[int, str]] = {}
        """By worker: how many of its replies did not count, and why the last did not."""
        self.tickets: dict[int, int] = {}
        """By size: how many have been evaluated."""
        self.results: Event = {}
        self._last_end: datetime | None = None
        self.last: datetime | None = None
        """The time of the last event."""
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._first: tuple[int, datetime] | None = None
        """The first round since the run was started, and when it ended."""

    def add(self, event: Event) -> None:
        """What comes next."""
        self.last = datetime.fromisoformat(event["time"]) if "time" in event else None
        changes: Mapping[str, Callable[[Event], None]] = {
            "start": self._on_start,
            "waiting": self._on_waiting,
            "asked": self._on_asked,
            "nodes": self._on_nodes,
            "round": self._on_round,
            "evaluating": self._on_evaluating,
            "eval": self._on_eval,
            "federated": self._on_federated,
            "ticket": self._on_ticket,
            "results": self._on_results,
            "done": self._on_end,
            "failed": self._on_end,
        }
        if event["event"] in changes:
            changes[event["event"]](event)

    def _on_start(self, event: Event) -> None:
        self.start, self.ended = event, None
        self.round, self.num_rounds = event["round"], event["num_rounds"]
        self.tickets, self.results = {}, {}
        self._first = None
        self.state = f"starting round {self.round + 1} of {self.num_rounds}"

    def _on_waiting(self, event: Event) -> None:
        self.state = waiting_text(event)

    def _on_asked(self, event: Event) -> None:
        self.state = asked_text(event)

    def _on_nodes(self, event: Event) -> None:
        self.nodes = event
        self._next()

    def _next(self) -> None:
        going_on = self.round < self.num_rounds
        self.state = f"training round {self.round + 1} of {self.num_rounds}" if going_on else "evaluating the model"

    def _on_round(self, event: Event) -> None:
        self.round, self.loss, self.seconds = event["round"], event["loss"], event["seconds"]
        self._add_traffic(event)
        for way, size in event.get("bytes_via", {}).items():
            self.via[way] = self.via.get(way, 0) + size
        for worker, reason in event["dropped"].items():
            self.lost[worker] = (self.lost.get(worker, (0, ""))[0] + 1, reason)
        self._recent.append(self.seconds)
        self._last_end = self.last
        if self.last and not self._first:
            self._first = (self.round, self.last)
        self._next()

    def _on_evaluating(self, event: Event) -> None:
        self.state = f"evaluating after round {event['round']} of {self.num_rounds}"

    def _on_eval(self, event: Event) -> None:
        subnets = f" (subnets {perplexity_text(event['subnets'])})" if "subnets" in event else ""
        self.perplexity, self.evaluated = perplexity_text(event["full"]) + subnets, event["round"]
        self._next()

    def _on_federated(self, event: Event) -> None:
        self.federated = event
        self._add_traffic(event)

    def _add_traffic(self, event: Event) -> None:
        self.down += sum(event["bytes_down"].values())
        self.up += sum(event["bytes_up"].values())

    def _on_ticket(self, event: Event) -> None:
        self.tickets[event["size"]] = self.tickets.get(event["size"], 0) + 1
        self.state = f"evaluating tickets of size {event['size']}"

    def _on_results(self, event: Event) -> None:
        self.results = event

    def _on_end(self, event: Event) -> None:
        self.ended = event["event"]
        self.state = "finished" if self.ended == "done" else f"failed: {event['error']}"

    @property
    def num_lost(self) -> int:
        return sum(number for number, _ in self.lost.values())

    @property
    def round_seconds(self) -> float | None:
        """The median of the last rounds."""
        return median(self._recent) if self._recent else None

    @property
    def seconds_left(self) -> float | None:
        """Until the last round is done, at the pace since the run was started, with what was between the rounds."""
        if self.ended or not self._recent:
            return None
        pace = median(self._recent)
        if self._first and self._last_end and self.round > self._first[0]:
            pace = (self._last_end - self._first[1]).total_seconds() / (self.round - self._first[0])
        return pace * (self.num_rounds - self.round)


class Follower:
    """The story of a run that goes on: a look costs what was added to its log since the one before."""

    def __init__(self, log: Path) -> None:
        self.story = Story()
        self._reader = EventReader(log)

    def look(self) -> Iterator[Event]:
        """Tells the story on, and yields each event that is new when it has been told.

        Of a log that a resumed run has rewound, they are those from its last start on.
        """
        events, known = self._reader.read(), 0
        if self._reader.rewound:
            self.story = Story()
            known = max((i for i, event in enumerate(events) if event["event"] == "start"), default=0)
        for i, event in enumerate(events):
            self.story.add(event)
            if i >= known:
                yield event


def held_text(start: Event) -> str:
    """What the settings come to, of a "start" event: an algorithm that divides nothing says so here."""
    held, full = start["subnet_params"], start["num_params"]
    spread = " to ".join(f"{size:,}" for size in dict.fromkeys([min(held), max(held)]))
    part = f"all {full:,}" if min(held) == full else f"{spread} of {full:,}"
    everyone = start.get("workers", len(held))
    drawn = f" a round, drawn from {everyone}" if len(held) < everyone else ""
    return f"each worker (of {len(held)}{drawn}) trains {part} parameters"


def waiting_text(event: Event) -> str:
    missing = event["wanted"] - event["nodes"]
    return f"waiting for {count(missing, 'node')}: {event['nodes']} of {event['wanted']} here"


def asked_text(event: Event) -> str:
    few = f"; {event['wanted']} were wanted, those here share the workers" if event["nodes"] < event["wanted"] else ""
    return f"{count(event['nodes'], 'node')} here, waiting until each has read the text and built its model{few}"


def nodes_text(event: Event) -> str:
    shared, flight = event.get("shared_memory", 0), event.get("flight", 0)
    own = event.get("windows", {}).values()
    came = [
        f"{key}: " + ", ".join(f"node {place}" for place in event[key]) for key in ("gone", "new") if event.get(key)
    ]
    parts = [
        *came,
        f"{shared} of them on the server's machine" if shared else "",
        f"tensors of {flight} by Arrow Flight" if flight else "",
        f"each with its own text: {min(own):,} to {max(own):,} windows" if own else "",
    ]
    return ", ".join(filter(None, [f"{count(event['nodes'], 'node')} ready", *parts]))


def traffic_text(story: Story) -> str:
    """Bytes of the whole run, both ways; how many of them did not cross a network, if any."""
    shared, inline = story.via.get("shm", 0), story.via.get("inline", 0)
    part = f" ({human_bytes(shared)} of both in shared memory)" if shared and inline else ""
    part = part or (" (in shared memory)" if shared else "")
    return f"sent {human_bytes(story.down)}, received {human_bytes(story.up)}{part}"


def round_text(story: Story) -> str:
    """How training goes, in one line: bytes and lost replies are of the whole run, seconds of the last round."""
    if story.loss is None:
        return ""
    when = f" after round {story.evaluated}" if story.evaluated < story.round else ""
    parts = [
        f"loss {story.loss:.3f}",
        f"perplexity {story.perplexity}{when}" if story.perplexity else "",
        traffic_text(story) if story.down or story.up else "",
        f"{story.seconds:.2f} s",
        f"{count(story.num_lost, 'reply')} lost" if story.lost else "",
        f"{duration_text(story.seconds_left)} left" if story.seconds_left else "",
    ]
    return "  ".join(filter(None, parts))


def federated_text(event: Event) -> str:
    whose = "the full model" if event["of"] == "full" else "their subnets"
    found = perplexity_text(event["perplexity"]) if "perplexity" in event else "unknown, nobody answered"
    asked = len(event["answered"]) + len(event["dropped"])
    return f"perplexity of {whose}, as {len(event['answered'])} of {asked} workers find it: {found}"


def results_text(results: Mapping[str, Any]) -> str:
    """Final perplexities and lost replies, of results.json or of a "results" event."""
    tickets = [f"{size_label(ticket)} {perplexity_text(ticket['mean'])}" for ticket in results["tickets"]]
    lost = results.get("lost_replies", 0)
    parts = [
        f"perplexity: full model {perplexity_text(results['full'])}" if "full" in results else "no test text here",
        f"as the workers find it {perplexity_text(results['federated'])}" if "federated" in results else "",
        f"random tickets, mean: {', '.join(tickets)}" if tickets else "",
        f"{count(lost, 'reply')} {'was' if lost == 1 else 'were'} lost" if lost else "",
    ]
    return "; ".join(filter(None, parts))


def lines(event: Event, story: Story) -> Iterator[str]:
    """What is said of an event when the story has been told up to it."""
    round_ = f"round {event.get('round')}"
    match event["event"]:
        case "start":
            yield f"{event['algorithm']}: {event['num_rounds']} rounds; {held_text(event)}"
            if event["round"]:
                yield f"going on after round {event['round']}"
        case "waiting" | "asked" | "failed":
            yield story.state
        case "nodes":
            yield nodes_text(event)
        case "round":
            yield f"{round_} of {story.num_rounds}  {round_text(story)}"
        case "eval":
            yield f"{round_}: perplexity {story.perplexity}"
        case "federated":
            yield f"{round_}: {federated_text(event)}"
        case "saved":
            yield f"{round_}: checkpoint saved"
        case "ticket" if story.tickets[event["size"]] == 1:
            yield story.state
        case "results":
            yield results_text(event)
        case "device":
            yield f"device {event['name']} has its ticket"


def warnings(event: Event) -> Iterator[str]:
    """What an event says that somebody may have to look after."""
    if event["event"] == "nodes":
        yield from (f"a node is not ready: {reason}" for reason in event["failed"])
        yield from (f"a node's tensors go in Flower's messages: {why}" for why in event.get("fallbacks", []))
        yield from (f"worker {worker}: {note}" for worker, note in event.get("notes", {}).items())
    if event["event"] == "tracker":
        yield f"log.tracker={event['name']!r} failed, the run goes on without: {event['error']}"
    if event["event"] == "federated":
        for worker, reason in event["dropped"].items():
            yield f"round {event['round']}: worker {worker} was asked to evaluate, and did not count: {reason}"
    if event["event"] == "round":
        for worker, reason in event["dropped"].items():
            yield f"round {event['round']}: worker {worker} did not count: {reason}"
        for worker, note in event.get("notes", {}).items():
            yield f"round {event['round']}: worker {worker}: {note}"

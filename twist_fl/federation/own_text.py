"""data.private=nodes, a node's side: its worker trains on its own text, of which a hash and two numbers are told."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flwr.app import RecordDict

from twist_fl.config.checks import NODES
from twist_fl.data.node_text import (
    Place,
    keep_tokenizer,
    recall,
    remember,
    tokenizer_named,
    told_digest,
)
from twist_fl.data.own_text import check_batch
from twist_fl.federation import wire
from twist_fl.federation.apps import worker_for
from twist_fl.system.errors import ConfigError
from twist_fl.training.job import Job, job_from_json
from twist_fl.training.worker import Worker

Settings = Mapping[str, Any]
"""Of a node: what its --node-config says."""


def prepare(content: RecordDict, node: Settings, partition: object) -> Worker:
    """The worker that a question is for; a node's own text is read anew. Raises ConfigError, ValueError."""
    job_json = wire.job_of(content)
    if not (tokenizer := tokenizer_named(job_json)):
        return worker_for(job_json)
    keep_tokenizer(wire.tokenizer_of(content), tokenizer)
    whose = f"the node of partition-id={partition}"
    job = job_from_json(job_json, Place(_path(node, whose)))
    with _words_stay_here(whose):
        job.text.read_again()
    check_batch(job.text, job.config.train.batch_size, whose)
    where = Place(_path(node, whose), job.text.digest)
    remember(job.run_id, where)
    return worker_for(job_json, where)


def tell(answer: RecordDict, job: Job) -> None:
    """How much text the node has, and a hash of it."""
    if job.config.data.private == NODES:
        wire.tell_text(answer, told_digest(job.run_id, job.text), job.text.num_windows, job.text.num_test)


def worker_of(content: RecordDict, node: Settings) -> Worker:
    """The worker that any other message is for."""
    job_json = wire.job_of(content)
    if not tokenizer_named(job_json):
        return worker_for(job_json)
    where = recall(job_from_json(job_json).run_id, _path(node, "the node"))
    with _words_stay_here("the node"):
        return worker_for(job_json, where)


def _path(node: Settings, whose: str) -> str:
    if not (path := node.get("data")):
        raise ConfigError(
            f"{whose} has no text of its own, which data.private=nodes trains on: start it with `twist-fl node --data "
            'PATH` (a stock SuperNode: data="PATH" in --node-config)'
        )
    return str(path)


@contextmanager
def _words_stay_here(whose: str) -> Iterator[None]:
    """An error's reply goes to the server, and what a reader says of text that it cannot read may quote it."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  whatever it is, it does not leave this machine
        print(f"twist_fl: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise ConfigError(f"{whose} cannot read its own text: its output says why") from None

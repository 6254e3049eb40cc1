"""Flower's ClientApp, for our own app and for one of yours. The work is in `training/worker.py` and, for deployment,
`tickets/edge_client.py`.

Loading this file loads no torch: a simulation loads it before it starts Ray and its workers.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from twist_fl.federation.actors import prepare_actors


def warm() -> None:
    """Load what a message needs."""
    from twist_fl.federation import own_text, wire  # noqa: F401


def client_app() -> ClientApp:
    """A ClientApp that trains subnets for `TwistStrategy`, and receives tickets. Messages of other kinds are yours.

    `@app.query("mine")` adds one. Taken are `train`, `evaluate`, `query` and `query.ticket`.
    """
    prepare_actors(warm)
    app = ClientApp()
    app.query()(connect)
    app.train()(train)
    app.evaluate()(evaluate)
    app.query("ticket")(receive)
    return app


def connect(message: Message, context: Context) -> Message:
    """Build the worker, so that what is wrong with this node shows before training starts."""
    from twist_fl.federation import own_text, wire

    wire.check_flower(message.content)
    partition = context.node_config.get("partition-id", context.node_id)
    worker = own_text.prepare(message.content, context.node_config, partition)
    content = wire.answer(message.content, worker.job.run_id, partition)
    own_text.tell(content, worker.job)
    return Message(content, reply_to=message)


def train(message: Message, context: Context) -> Message:
    """One interval on one subnet."""
    from twist_fl.federation import own_text, wire

    worker = own_text.worker_of(message.content, context.node_config)
    parcel = wire.task_from_records(worker.job, message.content)
    reply = worker.train(parcel.task, parcel.params, parcel.moments, parcel.in_place)
    content = wire.reply_to_records(worker.job, parcel.task.blueprint, reply, parcel.segment, parcel.params)
    return Message(content, reply_to=message)


def evaluate(message: Message, context: Context) -> Message:
    """The loss of a subnet, or of the full model, on this worker's share of the test text."""
    from twist_fl.federation import evaluating, own_text

    worker = own_text.worker_of(message.content, context.node_config)
    return Message(evaluating.answer(worker, message.content), reply_to=message)


def receive(message: Message, context: Context) -> Message:
    """Keep the parts of a ticket; once all are here, check its hash, write it as a dense model and measure it."""
    from twist_fl.federation import own_text, shipping

    worker = own_text.worker_of(message.content, context.node_config)
    return Message(shipping.receive(worker.job, message.content), reply_to=message)

"""Flower's ClientApp: glue. The work is in `training/worker.py` and, for deployment, in `tickets/edge_client.py`."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from twist_fl.federation import apps, shipping, wire
from twist_fl.federation.actors import replace_dead_actors

replace_dead_actors()
app = ClientApp()


@app.query()
def connect(message: Message, context: Context) -> Message:
    """Build the worker, so that what is wrong with this node shows before training starts."""
    wire.check_flower(message.content)
    worker = apps.worker_for(wire.job_of(message.content))
    partition = context.node_config.get("partition-id", context.node_id)
    return Message(wire.answer(message.content, worker.job.run_id, partition), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One interval on one subnet."""
    worker = apps.worker_for(wire.job_of(message.content))
    parcel = wire.task_from_records(worker.job, message.content)
    reply = worker.train(parcel.task, parcel.params, parcel.moments, parcel.in_place)
    content = wire.reply_to_records(worker.job, parcel.task.blueprint, reply, parcel.segment, parcel.params)
    return Message(content, reply_to=message)


@app.query("ticket")
def receive(message: Message, context: Context) -> Message:
    """Build the shipped ticket's small dense model, check its hash, measure it on local text."""
    worker = apps.worker_for(wire.job_of(message.content))
    return Message(shipping.receive(worker.job, message.content), reply_to=message)

"""Flower's ClientApp: glue. The work is in twist_fl/rounds.py (training) and twist_fl/edge.py (deployment)."""

import time
from dataclasses import replace

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from twist_fl import serve, ship, wire

app = ClientApp()


@app.query()
def connect(message: Message, context: Context) -> Message:
    """Build the worker, so that what is wrong with this node shows before training starts."""
    serve.worker_for(str(message.content.config_records["job"]["json"]))
    partition = context.node_config.get("partition-id", context.node_id)
    return Message(wire.node_record(partition), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One interval on one subnet."""
    started = time.perf_counter()
    job_json, task, params, moments = wire.task_from_records(message.content)
    reply = serve.worker_for(job_json).train(task, params, moments)
    reply = replace(reply, seconds=time.perf_counter() - started)
    return Message(wire.reply_to_records(reply), reply_to=message)


@app.query("ticket")
def receive(message: Message, context: Context) -> Message:
    """Build the shipped ticket's small dense model, check its hash, measure it on local text."""
    return Message(ship.receive(serve.worker_for(ship.job_of(message)).job, message.content), reply_to=message)

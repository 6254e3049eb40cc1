"""A Flower app of your own around TwIST: its strategy with one hook changed, its client, and a result of yours.

FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 flwr run examples/flower_app --stream
"""

from collections.abc import Iterable
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp

from twist_fl import RunFolder, TrainedRun, TwistStrategy, client_app, load_config, make_job


class Telling(TwistStrategy):
    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        arrays, metrics = super().aggregate_train(server_round, replies)  # replies come one by one, and may be dropped
        print(f"my app: round {server_round}: {dict(metrics or {})}", flush=True)
        return arrays, metrics


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    folder = RunFolder(Path(str(context.run_config["folder"])))
    settings = ["train.workers=2", "train.rounds=2", "data.vocab_size=300"]
    folder.create(make_job(load_config("demo", settings)))
    Telling(folder.job(), folder).run(grid)
    trained = TrainedRun(folder.path)
    print(f"my app: a ticket of 3 of 12 blocks: {trained.perplexity(trained.blueprint(size=3)):.1f}", flush=True)


client = client_app()

"""Flower's ServerApp: glue. The work is in twist_fl/serve.py and twist_fl/strategy.py."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from twist_fl.serve import open_run, train_run
from twist_fl.ship import deploy_run

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, or with mode="deploy" ship tickets of a trained run; see [tool.flwr.app.config] for the keys."""
    given = context.run_config
    folder, job = open_run(str(given["run-dir"]), str(given["preset"]), str(given["overrides"]))
    if given["mode"] == "deploy":
        deploy_run(grid, folder, job, str(given["devices"]))
    else:
        train_run(grid, folder, job)

"""Flower's ServerApp: glue. The work is in twist_fl/federation/apps.py and strategy.py."""

import shlex
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from twist_fl.federation.apps import mistakes_in_words, open_run, train_run, wait_for
from twist_fl.federation.deploy import deploy_run
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.resume import at_places
from twist_fl.system.errors import ConfigError

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, or with mode="deploy" ship tickets of a trained run; see [tool.flwr.app.config] for the keys."""
    given = context.run_config
    mode, run_dir = str(given["mode"]), str(given["run-dir"])
    wait_for(str(given["wait-for"]))
    with mistakes_in_words():
        if mode == "train":
            train_run(grid, *open_run(run_dir, str(given["preset"]), str(given["overrides"])))
        elif mode == "deploy":
            folder = RunFolder(Path(run_dir))
            job = at_places(folder.job(), shlex.split(str(given["overrides"])))
            deploy_run(grid, folder, job, str(given["devices"]))
        else:
            raise ConfigError(f'mode={mode!r} must be "train" or "deploy"')

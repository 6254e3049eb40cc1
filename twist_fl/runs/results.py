"""A run's results: full-model perplexity and ticket distributions, with all that is needed to reproduce them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from twist_fl.blueprint.drawing import full_blueprint
from twist_fl.config.schema import Config
from twist_fl.config.sizes import ticket_size
from twist_fl.data.own_text import digests, read_texts
from twist_fl.rounds import RunState
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.cores import usable_cores
from twist_fl.system.errors import ConfigError
from twist_fl.system.files import write_json
from twist_fl.system.provenance import provenance
from twist_fl.tickets import evaluate
from twist_fl.training.job import Job


def final_results(job: Job, state: RunState, folder: RunFolder, threads: int | None = None) -> dict[str, Any]:
    """Write results.json: perplexity of the final model and of random tickets of every size in eval.sizes, if there is
    test text.

    `threads` (CPU) is all cores by default.
    """
    torch.set_num_threads(threads or usable_cores())
    config, division = job.config, job.scored(state.scores).division
    windows = job.corpus.test[: config.eval.max_windows]
    models = job.models()
    results: dict[str, Any] = provenance() | {
        "config": portable_config(config),
        "corpus": job.text.digest,
        "rounds": state.round,
        "lost_replies": sum(len(event["dropped"]) for event in folder.events("round")),
        "num_params": job.layout.num_params(),
        "test_tokens": int(windows.size),
        "tickets": [],
    }
    if len(windows):
        full = [full_blueprint(job.layout)]
        results["full"] = evaluate.subnet_perplexity(models, state.params, full, windows, config.eval.batch_size)
    sizes = dict.fromkeys(ticket_size(job.layout, division, size) for size in config.eval.sizes)
    for size in sizes if len(windows) else ():
        on_ticket = partial(folder.log, "ticket", round=state.round, size=size.row["size"])
        tickets = evaluate.ticket_distribution(
            models,
            state.params,
            division,
            size.num_sub,
            windows,
            tickets=config.eval.tickets,
            seed=config.seed,
            batch_size=config.eval.batch_size,
            on_ticket=on_ticket,
        )
        results["tickets"].append(size.row | tickets.summary())
    for event in folder.events("federated"):
        if event["round"] == state.round and "perplexity" in event:
            results["federated"] = event["perplexity"]
    write_json(results, folder.results_file)
    rows = [{key: ticket[key] for key in ("size", "of", "mean", "std")} for ticket in results["tickets"]]
    told = {key: results[key] for key in ("full", "lost_replies", "federated") if key in results}
    folder.log("results", round=state.round, tickets=rows, **told)
    return results


def portable_config(config: Config) -> dict[str, Any]:
    """The configuration without this machine's folders (of a local path, its last part) and trackers."""
    fields: Any = OmegaConf.to_container(OmegaConf.structured(config))
    del fields["dir"], fields["log"]
    places = ("data.path", "data.private", "data.tokenizer", "model.pretrained", "train.teacher")
    for section, key in (place.split(".") for place in places):
        value = fields[section][key]
        if value and Path(value).is_absolute():
            fields[section][key] = Path(value).name
    return dict(fields)


def refuse_other_settings(folder: RunFolder, wanted: Config) -> None:
    """Raises ConfigError if the run in `folder` was started with other settings than `wanted`, or on other text."""
    job = folder.job()
    found, asked = portable_config(job.config), portable_config(wanted)
    found["train"]["threads"] = asked["train"]["threads"]  # resolved when the run was made
    for section, value in asked.items():
        pairs = value if isinstance(value, dict) else {"": value}
        mine = found[section] if isinstance(value, dict) else {"": found[section]}
        for key, wish in pairs.items():
            if mine.get(key) != wish:
                name = f"{section}.{key}".rstrip(".")
                raise ConfigError(
                    f"{folder.path} holds a run with {name}={mine.get(key)}, asked was {wish}: "
                    "remove it, or choose another --dir"
                )
    if wanted.data != job.config.data and digests(*read_texts(wanted)) != digests(job.text, job.own):
        raise ConfigError(  # a path alone says little
            f"{folder.path} holds a run on other text than data.path={wanted.data.path} has now: "
            "remove it, or choose another --dir"
        )

"""A run that goes on: longer, elsewhere, with other evaluations. What would make it another run is refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from twist_fl.config.checks import NODES
from twist_fl.config.schema import Config, load_config
from twist_fl.config.sizes import layout_of
from twist_fl.data.own_text import read_texts
from twist_fl.model.hf_config import model_config
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.runs.trackers import check_trackers
from twist_fl.system.errors import ConfigError
from twist_fl.system.files import write_text
from twist_fl.system.plugins import check_plugins
from twist_fl.training.fitting import check_weights
from twist_fl.training.job import Job, with_config
from twist_fl.training.schedule import learning_rate

PLACES = ("data.path", "data.private", "data.tokenizer", "model.pretrained", "train.teacher")
"""Where things lie: what is found there must be what the run began with."""
BUDGET = ("train.rounds", "train.epochs")
FREE = ("name", "checkpoint_every", "train.threads", "train.device", "eval.", "deploy.", "flower.", "log.")
"""A key that ends with a dot is a section."""
NOT_FREE = ("flower.wire_dtype",)


class FixedError(ConfigError):
    """A setting that would make a run another one."""


def at_places(job: Job, overrides: Sequence[str]) -> Job:
    """`job` with other PLACES, or settings of deployment, for a command that only looks at the run. Raises ConfigError
    for any other key."""
    return _changed(job, overrides, (*PLACES, "deploy.")) if overrides else job


@dataclass(frozen=True)
class Continued:
    """A run that goes on from round `round`, 0 being its start."""

    job: Job
    round: int
    finished: bool
    """Nothing is left to do."""
    note: str = ""
    """What is not as in a run that was planned so from its start."""


def go_on(folder: RunFolder, overrides: Sequence[str] = ()) -> Continued:
    """Write the settings in `overrides` into the run's folder, and find where it goes on.

    A finished run whose evaluation changes is evaluated again. Raises ConfigError for a setting that would make it
    another run, a budget that is already spent, a damaged checkpoint, a policy or tracker that is not here, or
    while a server is at work in the folder.
    """
    before = folder.job()
    folder.newest()  # what is damaged is refused before anything starts
    job = _changed(before, overrides, (*PLACES, *BUDGET, *FREE)) if overrides else before
    trained = folder.saved_round
    if job.num_rounds < trained:
        spent = f"{trained} rounds" + (
            f" ({trained / job.rounds_per_interval:g} intervals)" if job.rounds_per_interval > 1 else ""
        )
        raise ConfigError(f"{' '.join(overrides)} is {job.num_rounds} rounds, and {spent} are trained: give more")
    check_weights(job.config, job.teacher)
    check_plugins(job.config)
    check_trackers(job.config)
    note = ""
    with folder.lock("server"):
        if job.total_batches > before.total_batches and before.ends_short and trained == before.num_rounds:
            trained, note = _step_back(folder, before)
        note = note or _other_rates(before, job, trained)
        if job.config.eval != before.config.eval:
            folder.results_file.unlink(missing_ok=True)  # what it says is of other settings
        if overrides:
            write_text(job.to_json(), folder.job_file)
    return Continued(job, trained, trained == job.num_rounds and folder.finished(trained), note)


def _step_back(folder: RunFolder, job: Job) -> tuple[int, str]:
    """To the checkpoint before the shorter last interval, which a longer run has whole. If there is none, a note."""
    *others, newest = folder.checkpoints()
    if not others:
        return folder.saved_round, (
            f"round {job.num_rounds} was trained as the run's last and is shorter than the others: from there on, the "
            "run is not the same as one that was planned so long from its start"
        )
    folder.remove(newest)
    return folder.saved_round, ""


def _other_rates(before: Job, job: Job, trained: int) -> str:
    """Says so if batches that are trained would have had other learning rates in a run of the new length."""
    train, batches = job.config.train, min(trained * before.batches_per_round, before.total_batches)
    rates = [[learning_rate(train, batch, each.total_batches) for batch in range(batches)] for each in (before, job)]
    return (
        ""
        if rates[0] == rates[1]
        else (
            f"train.schedule={train.schedule} and train.warmup={train.warmup:g} are shares of the whole run, and the "
            f"{trained} rounds so far were trained by those of {before.num_rounds} rounds: the run is not the same as "
            f"one of {job.num_rounds} rounds from its start"
        )
    )


def _changed(job: Job, overrides: Sequence[str], may_change: Sequence[str]) -> Job:
    """`job` with `overrides`, of which only settings in `may_change` differ. Its text and model stay what they were."""
    base, given = job.config, {word.partition("=")[0] for word in overrides}
    if "model.pretrained" in given and base.data.tokenizer == base.model.pretrained:
        base = replace(base, data=replace(base.data, tokenizer=None))  # the tokenizer moves with its model
    config = load_config(overrides=overrides, base=base)
    _refuse_others(job.config, config, may_change)
    was, is_now = job.config.data.private, config.data.private
    if was != is_now and {None, NODES} & {was, is_now}:
        raise ConfigError(f"data.private={is_now} would make it another run: this one has {was}")
    text, own = job.text, job.own
    if given & set(PLACES):
        _check_model(job, config)
        text, own = read_texts(config)
        job.text.check(text.digest)
        for worker in job.own or {}:
            job.text_of(worker).check((own or {})[worker].digest)
    return with_config(job, config, text, own)


def _refuse_others(old: Config, new: Config, may_change: Sequence[str]) -> None:
    before, after = dict(_settings(asdict(old))), dict(_settings(asdict(new)))
    for key, value in after.items():
        free = any(key == each or (each.endswith(".") and key.startswith(each)) for each in may_change)
        if value != before[key] and not (free and key not in NOT_FREE):
            named = ", ".join(f"{each}*" if each.endswith(".") else each for each in may_change)
            named += f" (not {', '.join(NOT_FREE)})" * ("flower." in may_change)
            raise FixedError(
                f"{key}={value} would make it another run: this one has {before[key]}. What may change: {named}"
            )


def _settings(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _check_model(job: Job, config: Config) -> None:
    """Raises ConfigError if model.pretrained is now a model of other sizes. Its weights count before round 1 only."""
    if config.model.pretrained == job.config.model.pretrained or config.model.pretrained is None:
        return
    layout = layout_of(config, model_config(config).to_dict())
    if layout.params != job.layout.params:
        raise ConfigError(f"model.pretrained={config.model.pretrained!r} has other sizes than the run's model")

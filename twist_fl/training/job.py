"""A job: a configuration with everything it implies (model, layout, division, data) resolved and checked.

Text and torch are looked for when something needs them.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from twist_fl.blueprint.architectures import KINDS, use_architecture
from twist_fl.blueprint.blocks import Layout
from twist_fl.blueprint.blueprint import Blueprint, Scale
from twist_fl.blueprint.division import Debt, Division, Purpose, Scores, generator
from twist_fl.blueprint.drawing import draw_round, draw_ticket, full_blueprint
from twist_fl.blueprint.moments import moment_layouts
from twist_fl.config.checks import NODES, check_name
from twist_fl.config.schema import Config, from_yaml, to_yaml
from twist_fl.config.sizes import layout_of, make_division, of_workers, ticket_size, workers_per_round
from twist_fl.data.corpus import Corpus, Shard, Windows
from twist_fl.data.node_text import NodeText, Place, tokenizer_digest, tokenizer_files, tokenizer_named
from twist_fl.data.own_text import Own, facts, known_facts, own_texts, read_texts
from twist_fl.data.run_text import RunText
from twist_fl.model.hf_config import config_from_dict, model_config
from twist_fl.system.cores import usable_cores
from twist_fl.system.errors import ConfigError
from twist_fl.system.plugins import ARCHITECTURE, check_plugins
from twist_fl.system.untrusted import Field, read_fields
from twist_fl.training import device
from twist_fl.training.fitting import check_fraction, check_teacher, fit_batches, fit_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from twist_fl.model.subnet import ModelCache, State


@dataclass(frozen=True)
class Job:
    """What a configuration comes to: `make_job` gives one."""

    config: Config
    model_fields: Mapping[str, Any]
    """The model's Hugging Face config as plain JSON."""
    layout: Layout
    division: Division
    text: RunText
    run_id: str
    """Random name of the run: clients keep its optimiser state under it."""
    own: Own | None = None
    """With data.private, each worker's text; `text` is then the server's."""

    @property
    def model_config(self) -> PreTrainedConfig:
        return config_from_dict(dict(self.model_fields))

    @property
    def corpus(self) -> Corpus:
        """The tokenised text, opened when it is first asked for. Raises ConfigError: see `RunText.open`."""
        return self.text.open()

    def text_of(self, worker: int) -> RunText:
        """The text of which the worker trains on its shard."""
        return self.text if self.own is None else self.own[worker]

    def windows(self, worker: int) -> Windows:
        """What the ids of the worker's shard are of."""
        return self.text_of(worker).open().train

    def open_texts(self) -> None:
        """What is wrong with any text shows now. Raises ConfigError."""
        for text in (self.text, *(self.own or {}).values()):
            if text.here:
                text.open()

    @property
    def total_batches(self) -> int:
        """Batches each worker trains on in the whole run, if it misses no round: the epochs of the longest shard."""
        train = self.config.train
        if train.rounds:
            return train.rounds * train.interval
        return train.epochs * max(self.shard(worker).batches_per_epoch for worker in self.own or [0])

    @property
    def batches_per_round(self) -> int:
        """Batches of a worker between two aggregations: an interval, and one for DDP."""
        return 1 if self.config.algorithm == "ddp" else self.config.train.interval

    @property
    def rounds_per_interval(self) -> int:
        return self.config.train.interval // self.batches_per_round

    @property
    def num_rounds(self) -> int:
        """Aggregations of the run; before the last, workers may train on fewer batches."""
        return -(-self.total_batches // self.batches_per_round)

    @property
    def ends_short(self) -> bool:
        """Whether the last interval has fewer batches than the others: a longer run would have trained it whole."""
        return self.total_batches % self.batches_per_round > 0

    @cached_property
    def moment_layouts(self) -> dict[str, Layout]:
        """The optimiser's moments that go to the workers and back, and what each is made of; none of DDP's."""
        if self.config.algorithm == "ddp":
            return {}
        return moment_layouts(self.config.train.optimizer_state, self.layout)

    @property
    def clients(self) -> range:
        """The workers that Flower's nodes are; in the hybrid variant, the server is worker 0."""
        return clients(self.config)

    def masks(self, worker: int) -> bool:
        """Whether the worker trains the whole model with other blocks masked, and not a smaller one (section 4.1)."""
        return self.config.train.variant == "masked" or worker not in self.clients

    def given(self, worker: int, blueprint: Blueprint) -> Blueprint:
        """The blocks of which a worker of `blueprint` is given the tensors, and gives them back."""
        return full_blueprint(self.layout) if self.masks(worker) else blueprint

    def always_whole(self, worker: int) -> set[str]:
        """Parameters that the worker holds whole in every round, whatever it is dealt."""
        names = set(self.layout.by_name)
        if self.config.algorithm != "twist":
            return names
        sizes = self.division.num_sub
        dealt = [sizes[worker]] if self.division.assign == "fixed" else sizes
        partial = [kind for i, kind in enumerate(KINDS) if min(s[i] for s in dealt) < self.layout.num_blocks[i]]
        return names - {param.name for param in self.division.params(self.layout) if param.kind in partial}

    def scored(self, scores: Scores | None) -> Job:
        """This job with the importance of its blocks, which blueprint.policy=importance draws by."""
        return replace(self, division=replace(self.division, scores=scores))

    def shard(self, worker: int) -> Shard:
        train, windows = self.config.train, self.text_of(worker).num_windows
        return Shard(self.config.seed, worker, train.workers if self.own is None else 1, windows, train.batch_size)

    def sampled(self, round_: int) -> list[int]:
        """The workers that train in round `round_`, counted from 1: all, or a share of train.fraction."""
        everyone, number = range(self.config.train.workers), workers_per_round(self.config)
        if number == len(everyone):
            return list(everyone)
        always = [worker for worker in everyone if worker not in self.clients]
        rng = generator(self.config.seed, Purpose.WORKERS, round_, 0, 0)
        drawn = rng.choice(self.clients, number - len(always), replace=False)
        return [*always, *sorted(int(worker) for worker in drawn)]

    def blueprints(self, round_: int, debt: Debt = frozenset()) -> list[Blueprint]:
        """What each of the workers `sampled` for round `round_` holds."""
        workers = self.sampled(round_)
        if self.config.algorithm != "twist":
            return [full_blueprint(self.layout)] * len(workers)
        return draw_round(self.layout, of_workers(self.division, workers), self.config.seed, round_, debt)

    def device(self) -> str:
        return device.device(self.config)

    def models(self, device: str | None = None, compile: bool = False, scale: Scale | None = None) -> ModelCache:
        """An empty cache of models; `scale` and `device` are the run's unless given."""
        from twist_fl.model.subnet import ModelCache

        scale = scale or self.config.blueprint.scale
        return ModelCache(self.model_config, self.layout, scale, device or self.device(), compile)

    def initial_state(self) -> State:
        """The pretrained parameters, or random ones from the run's seed."""
        import torch
        from transformers import AutoModelForCausalLM

        from twist_fl.model.pretrained import load_pretrained
        from twist_fl.model.subnet import get_state

        if self.config.model.pretrained:
            return load_pretrained(self.config.model.pretrained, self.layout)
        torch.manual_seed(self.config.seed)
        model = AutoModelForCausalLM.from_config(self.model_config)  # type: ignore[no-untyped-call]
        state = {name: tensor.clone() for name, tensor in get_state(model).items()}
        self.layout.check_names({name: tuple(tensor.shape) for name, tensor in state.items()})
        return state

    def to_json(self) -> str:
        """What a worker needs to rebuild this job without reading the hub or the text again."""
        fields: dict[str, object] = {
            "config": to_yaml(self.config),
            "model": self.model_fields,
            "corpus": self.text.digest,
            "windows": self.text.num_windows,
        }
        if self.config.data.private == NODES:
            fields["tokenizer"] = tokenizer_digest(tokenizer_files(self.corpus.tokenizer_folder))
        elif self.own is not None:
            fields["own"] = [facts(text) for text in self.own.values()]
        return json.dumps(fields | {"run_id": self.run_id}, sort_keys=True)


def clients(config: Config) -> range:
    return range(config.train.variant == "hybrid", config.train.workers)


def make_job(config: Config) -> Job:
    """Resolve `config`, reading model configuration and text.

    Raises ConfigError before any text is read if the sizes alone are impossible or pretrained weights do not fit them.
    """
    check_plugins(config)
    model = model_config(config)
    layout, _ = _divide(config, model.to_dict())
    device.check_memory(layout.num_params(), "the model")
    if config.model.pretrained:
        from twist_fl.model.pretrained import check_pretrained

        check_pretrained(config.model.pretrained, layout)
    text, own = read_texts(config)
    fit_vocabulary(config, model, text.open())
    if own is None:
        fit_batches(config, text.num_windows)
    _set_threads(config)
    job = _job(config, model.to_dict(), text, uuid.uuid4().hex, own)
    check_teacher(config, job.layout, text.open().tokenizer_folder)
    if not job.division.by_importance:  # else it draws by scores
        job.blueprints(1)  # what is wrong with a policy shows before anything starts
    return _described(job)


def model_job(config: Config, text: RunText) -> Job:
    """Of a pretrained model that nothing trains; `text` is not read yet. Raises ConfigError if it cannot be divided."""
    check_plugins(config)
    _set_threads(config)
    job = _job(config, model_config(config).to_dict(), text, uuid.uuid4().hex, None, coverage=False)
    device.check_memory(job.layout.num_params(), "the model")
    return _described(job)


def _described(job: Job) -> Job:
    """Raises ConfigError if a block table of the user's does not describe the model."""
    if job.model_fields["model_type"] not in ARCHITECTURE.own:
        from twist_fl.model.subnet_classes import check_architecture

        check_architecture(job.model_config, job.layout, draw_ticket(job.layout, job.division, (1, 1), 0, 0))
    return job


def job_from_json(text: str, node: Place | None = None) -> Job:
    """The job of a run's folder or of a message. Its text is not looked for before it is needed: it is that of the
    server, or with `node` the node's own.

    Raises ValueError for what is no job. Names that become folders here are such. That the sizes cover all blocks
    was seen when the job was made: a policy of the user's need only be where the server is.
    """
    fields = read_fields(text, {"config": Field(str), "model": Field(dict), "corpus": Field(str), "run_id": Field(str)})
    for key in ("corpus", "run_id"):
        check_name(key, fields[key])
    config = from_yaml(fields["config"])
    run = RunText(config.data, config.train.workers, fields["corpus"], fields.get("windows"))
    own = own_texts(config, run, known_facts(fields.get("own"), config.train.workers))
    if node is not None:
        run = NodeText(config.data, tokenizer_named(text), node)
        own = dict.fromkeys(clients(config), run)
    return _job(config, fields["model"], run, fields["run_id"], own, coverage=False)


def with_config(job: Job, config: Config, text: RunText, own: Own | None) -> Job:
    """The same run with other settings, of those that leave it the same run. Raises ConfigError if they cannot be."""
    _set_threads(config)
    return _job(config, job.model_fields, text, job.run_id, own)


def _set_threads(config: Config) -> None:
    config.train.threads = config.train.threads or max(1, usable_cores() // workers_per_round(config))


def _job(
    config: Config, model: Mapping[str, Any], text: RunText, run_id: str, own: Own | None, coverage: bool = True
) -> Job:
    return Job(config, model, *_divide(config, model, coverage), text, run_id, own)


def _divide(config: Config, model: Mapping[str, Any], coverage: bool = True) -> tuple[Layout, Division]:
    use_architecture(config.model.architecture)
    try:
        layout = layout_of(config, model)
        division = make_division(config, layout)
        coverage = coverage and config.algorithm == "twist"
        division.check(layout, coverage)
        if coverage:
            check_fraction(config, layout, division)
        for size in config.eval.sizes:
            ticket_size(layout, division, size, "eval.sizes")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return layout, division

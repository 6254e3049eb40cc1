"""A job: a configuration with everything it implies (model, layout, division, data) resolved and checked."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from twist_fl import machine
from twist_fl.blocks import KINDS, Layout, make_layout
from twist_fl.blueprint import Blueprint, Debt, Division, Scale, Scores, Sizes, draw_round, full_blueprint
from twist_fl.checks import check_name
from twist_fl.config import BlueprintConfig, Config, ConfigError, from_yaml, to_yaml
from twist_fl.data import Corpus, Shard, find_corpus, load_corpus
from twist_fl.evaluate import ticket_sizes
from twist_fl.family import config_from_dict, model_config
from twist_fl.outside import Field, read_fields
from twist_fl.pretrained import check_pretrained, load_pretrained
from twist_fl.subnet import ModelCache, State, get_state


@dataclass(frozen=True)
class Job:
    config: Config
    model_config: PreTrainedConfig
    layout: Layout
    division: Division
    corpus: Corpus
    run_id: str
    """Random name of the run: clients keep its optimiser state under it."""

    @property
    def total_batches(self) -> int:
        """Batches each worker trains on in the whole run."""
        train = self.config.train
        return train.rounds * train.interval if train.rounds else train.epochs * self.shard(0).batches_per_epoch

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
    def moments_travel(self) -> bool:
        """Whether the optimiser's moments go to the workers and back. DDP's stay on the server."""
        return self.config.train.optimizer_state == "server" and self.config.algorithm != "ddp"

    @property
    def clients(self) -> range:
        """The workers that Flower's nodes are; in the hybrid variant, the server is worker 0."""
        return range(self.config.train.variant == "hybrid", self.config.train.workers)

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
        train = self.config.train
        return Shard(self.config.seed, worker, train.workers, len(self.corpus.train), train.batch_size)

    def blueprints(self, round_: int, debt: Debt = frozenset()) -> list[Blueprint]:
        """What each worker holds in round `round_`, counted from 1."""
        if self.config.algorithm != "twist":
            return [full_blueprint(self.layout)] * self.config.train.workers
        return draw_round(self.layout, self.division, self.config.seed, round_, debt)

    def device(self) -> str:
        return machine.device(self.config)

    def models(self, device: str | None = None, compile: bool = False, scale: Scale | None = None) -> ModelCache:
        """An empty cache of models; `scale` and `device` are the run's unless given."""
        scale = scale or self.config.blueprint.scale
        return ModelCache(self.model_config, self.layout, scale, device or self.device(), compile)

    def initial_state(self) -> State:
        """The pretrained parameters, or random ones from the run's seed."""
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
            "model": self.model_config.to_dict(),
            "corpus": self.corpus.digest,
        }
        fields["run_id"] = self.run_id
        return json.dumps(fields, sort_keys=True)


def make_job(config: Config) -> Job:
    """Resolve `config`, reading model configuration and text.

    Raises ConfigError before anything starts, and before any text is read if the sizes alone are impossible, or if
    pretrained weights do not fit them.
    """
    model = model_config(config)
    layout, _ = _divide(config, model)
    machine.check_memory(layout.num_params(), "the model")
    if config.model.pretrained:
        check_pretrained(config.model.pretrained, layout)
    corpus = load_corpus(config.data, config.train.workers)
    _fit_vocabulary(config, model, corpus)
    _fit_batches(config, corpus)
    config.train.threads = config.train.threads or max(1, machine.usable_cores() // config.train.workers)
    return _job(config, model, corpus, uuid.uuid4().hex)


def job_from_json(text: str) -> Job:
    """The job on a worker. Its own data must be the server's: ConfigError if the hashes differ.

    Raises ValueError for what is no job. Names that become folders here are such.
    """
    fields = read_fields(text, {"config": Field(str), "model": Field(dict), "corpus": Field(str), "run_id": Field(str)})
    for key in ("corpus", "run_id"):
        check_name(key, fields[key])
    config = from_yaml(fields["config"])
    corpus = find_corpus(fields["corpus"], config.data, config.train.workers)
    if corpus.digest != fields["corpus"]:
        raise ConfigError(
            f"this machine's text or tokenizer is not the server's (hash {corpus.digest}, "
            f"expected {fields['corpus']}): give every node the same data"
        )
    return _job(config, config_from_dict(fields["model"]), corpus, fields["run_id"])


def _job(config: Config, model: PreTrainedConfig, corpus: Corpus, run_id: str) -> Job:
    return Job(config, model, *_divide(config, model), corpus, run_id)


def _divide(config: Config, model: PreTrainedConfig) -> tuple[Layout, Division]:
    division = make_division(config)
    try:
        layout = make_layout(model.to_dict(), config.blueprint.ffn_blocks)
        division.check(layout, coverage=config.algorithm == "twist")
        for size in config.eval.sizes:
            ticket_sizes(layout, division, size)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return layout, division


def make_division(config: Config) -> Division:
    """What `config.blueprint` says, not checked."""
    blueprint, workers = config.blueprint, config.train.workers
    return Division(
        blueprint.setting,
        _sizes(blueprint, workers),
        blueprint.undivided_first,
        blueprint.undivided_last,
        tuple(blueprint.common),
        blueprint.policy,
        blueprint.assign,
        drawn_workers=workers,
        num_common=blueprint.num_common,
        ticket_policy=config.eval.ticket_policy,
    )


def _sizes(blueprint: BlueprintConfig, workers: int) -> Sizes:
    """(heads, FFN blocks) of each worker, or those to draw from; a single number stands for all."""
    heads, ffn = blueprint.num_sub, blueprint.num_sub_ffn or blueprint.num_sub
    length = max(len(heads), len(ffn)) if blueprint.assign == "drawn" else workers
    heads, ffn = (sizes * length if len(sizes) == 1 else sizes for sizes in (heads, ffn))
    return tuple(zip(heads, ffn, strict=True))


def _fit_batches(config: Config, corpus: Corpus) -> None:
    train = config.train
    windows = len(corpus.train) // train.workers
    if train.batch_size > windows:
        raise ConfigError(
            f"train.batch_size={train.batch_size} is more than the {windows} windows of data.window="
            f"{config.data.window} tokens that each of {train.workers} workers has: use at most {windows}"
        )


def _fit_vocabulary(config: Config, model: PreTrainedConfig, corpus: Corpus) -> None:
    """A model from scratch takes the tokenizer's vocabulary; a pretrained one must have room for it."""
    if not config.model.pretrained:
        model.vocab_size = corpus.vocab_size
        model.bos_token_id = model.eos_token_id = corpus.end_token
    elif model.vocab_size < corpus.vocab_size:
        raise ConfigError(
            f"the tokenizer has {corpus.vocab_size} tokens and model.pretrained={config.model.pretrained!r} only "
            f"{model.vocab_size}: leave data.tokenizer out, or give the model's own"
        )

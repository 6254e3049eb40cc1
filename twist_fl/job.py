"""A job: a configuration with everything it implies (model, layout, division, data) resolved and checked."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

from twist_fl.blocks import Layout, make_layout
from twist_fl.blueprint import Blueprint, Debt, Division, Scale, Scores, Sizes, draw_round, full_blueprint
from twist_fl.config import BlueprintConfig, Config, ConfigError, from_yaml, to_yaml
from twist_fl.data import Corpus, Shard, load_corpus, open_corpus
from twist_fl.evaluate import ticket_sizes
from twist_fl.machine import usable_cores
from twist_fl.subnet import ModelCache, State, get_state
from twist_fl.tokenizer import reachable


@dataclass(frozen=True)
class Job:
    config: Config
    model_config: GPT2Config
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
        chosen = self.config.train.device
        if chosen != "auto":
            return chosen
        return "cuda" if torch.cuda.is_available() else "cpu"

    def models(self, device: str | None = None, compile: bool = False, scale: Scale | None = None) -> ModelCache:
        """An empty cache of models; `scale` and `device` are the run's unless given."""
        scale = scale or self.config.blueprint.scale
        return ModelCache(self.model_config, self.layout, scale, device or self.device(), compile)

    def initial_state(self) -> State:
        """The pretrained parameters, or random ones from the run's seed."""
        if self.config.model.pretrained:
            model = GPT2LMHeadModel.from_pretrained(self.config.model.pretrained, dtype=torch.float32)
        else:
            torch.manual_seed(self.config.seed)
            model = GPT2LMHeadModel(self.model_config)
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

    Raises ConfigError before anything starts, and before any text is read if the sizes alone are impossible.
    """
    model_config = _model_config(config)
    _divide(config, model_config)
    corpus = load_corpus(config.data, config.train.workers)
    _fit_vocabulary(config, model_config, corpus)
    config.train.threads = config.train.threads or max(1, usable_cores() // config.train.workers)
    return _job(config, model_config, corpus, uuid.uuid4().hex)


def job_from_json(text: str) -> Job:
    """The job on a worker. Its own data must be the server's: ConfigError if the hashes differ."""
    fields = json.loads(text)
    config = from_yaml(fields["config"])
    try:
        corpus = open_corpus(fields["corpus"], config.data.window)
    except FileNotFoundError:
        corpus = load_corpus(config.data, config.train.workers)
    if corpus.digest != fields["corpus"]:
        raise ConfigError(
            f"this machine's text or tokenizer is not the server's (hash {corpus.digest}, "
            f"expected {fields['corpus']}): give every node the same data"
        )
    return _job(config, GPT2Config(**fields["model"]), corpus, fields["run_id"])


def _job(config: Config, model_config: GPT2Config, corpus: Corpus, run_id: str) -> Job:
    return Job(config, model_config, *_divide(config, model_config), corpus, run_id)


def _divide(config: Config, model_config: GPT2Config) -> tuple[Layout, Division]:
    blueprint, workers = config.blueprint, config.train.workers
    try:
        layout = make_layout(model_config.to_dict(), blueprint.ffn_blocks)
        division = Division(
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
        division.check(layout, coverage=config.algorithm == "twist")
        for size in config.eval.sizes:
            ticket_sizes(layout, division, size)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return layout, division


def _sizes(blueprint: BlueprintConfig, workers: int) -> Sizes:
    """(heads, FFN blocks) of each worker, or those to draw from; a single number stands for all."""
    heads, ffn = blueprint.num_sub, blueprint.num_sub_ffn or blueprint.num_sub
    length = max(len(heads), len(ffn)) if blueprint.assign == "drawn" else workers
    heads, ffn = (sizes * length if len(sizes) == 1 else sizes for sizes in (heads, ffn))
    return tuple(zip(heads, ffn, strict=True))


def _model_config(config: Config) -> GPT2Config:
    """The model's sizes; of a model from scratch, the vocabulary is only known with the text."""
    model, window = config.model, config.data.window
    if model.pretrained:
        loaded = _pretrained_config(model.pretrained)
    else:
        loaded = GPT2Config(
            vocab_size=config.data.vocab_size,
            # GPT-2's gelu_new as one fused kernel: the same function, a fifth less time per step on a CPU.
            activation_function="gelu_pytorch_tanh",
            n_positions=model.n_positions,
            n_embd=model.n_embd,
            n_layer=model.n_layer,
            n_head=model.n_head,
            resid_pdrop=model.dropout,
            embd_pdrop=model.dropout,
            attn_pdrop=model.dropout,
            bos_token_id=None,
            eos_token_id=None,
        )
    if window > loaded.n_positions:
        raise ConfigError(f"data.window={window} is longer than the model's context: use at most {loaded.n_positions}")
    return loaded


def _pretrained_config(name: str) -> GPT2Config:
    with reachable(f"model.pretrained={name!r}"):
        loaded: Any = AutoConfig.from_pretrained(name)
    if loaded.model_type != "gpt2":
        raise ConfigError(f"model.pretrained={name!r} is a {loaded.model_type!r} model; only 'gpt2' is known")
    if not loaded.tie_word_embeddings:
        raise ConfigError(f"model.pretrained={name!r} has an untied lm_head: only tied ones are known")
    assert isinstance(loaded, GPT2Config)
    return loaded


def _fit_vocabulary(config: Config, model_config: GPT2Config, corpus: Corpus) -> None:
    """A model from scratch takes the tokenizer's vocabulary; a pretrained one must have room for it."""
    if not config.model.pretrained:
        model_config.vocab_size = corpus.vocab_size
        model_config.bos_token_id = model_config.eos_token_id = corpus.end_token
    elif model_config.vocab_size < corpus.vocab_size:
        raise ConfigError(
            f"the tokenizer has {corpus.vocab_size} tokens and model.pretrained={config.model.pretrained!r} only "
            f"{model_config.vocab_size}: set data.tokenizer to the model's own"
        )

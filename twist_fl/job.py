"""A job: a configuration with everything it implies (model, layout, division, data) resolved and checked."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

from twist_fl.blocks import Layout, make_layout
from twist_fl.blueprint import Blueprint, Debt, Division, draw_round, full_blueprint
from twist_fl.config import Config, ConfigError, from_yaml, to_yaml
from twist_fl.data import Corpus, Shard, load_corpus, open_corpus
from twist_fl.subnet import ModelCache, State, get_state


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
    def num_rounds(self) -> int:
        """Intervals of the run; the last may be shorter."""
        return -(-self.total_batches // self.config.train.interval)

    def shard(self, worker: int) -> Shard:
        train = self.config.train
        return Shard(self.config.seed, worker, train.workers, len(self.corpus.train), train.batch_size)

    def blueprints(self, round_: int, debt: Debt = frozenset()) -> list[Blueprint]:
        """What each worker holds in round `round_`, counted from 1."""
        if self.config.algorithm == "fedavg":
            return [full_blueprint(self.layout)] * self.config.train.workers
        return draw_round(self.layout, self.division, self.config.seed, round_, debt)

    def device(self) -> str:
        chosen = self.config.train.device
        if chosen != "auto":
            return chosen
        return "cuda" if torch.cuda.is_available() else "cpu"

    def models(self, device: str | None = None, compile: bool = False) -> ModelCache:
        scale = self.config.blueprint.scale
        return ModelCache(self.model_config, self.layout, scale, device or self.device(), compile)

    def initial_state(self) -> State:
        """The pretrained parameters, or random ones from the run's seed."""
        if self.config.model.pretrained:
            model = GPT2LMHeadModel.from_pretrained(self.config.model.pretrained, dtype=torch.float32)
        else:
            torch.manual_seed(self.config.seed)
            model = GPT2LMHeadModel(self.model_config)
        return {name: tensor.clone() for name, tensor in get_state(model).items()}

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
    """Resolve `config`, reading model configuration and text. Raises ConfigError before anything starts."""
    corpus = load_corpus(config.data, config.train.workers)
    config.train.threads = config.train.threads or max(1, (os.cpu_count() or 1) // config.train.workers)
    return _make_job(config, _model_config(config, corpus), corpus, uuid.uuid4().hex)


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
    return _make_job(config, GPT2Config(**fields["model"]), corpus, fields["run_id"])


def _make_job(config: Config, model_config: GPT2Config, corpus: Corpus, run_id: str) -> Job:
    blueprint, workers = config.blueprint, config.train.workers
    heads = blueprint.num_sub * (workers if len(blueprint.num_sub) == 1 else 1)
    ffn = blueprint.num_sub_ffn or blueprint.num_sub
    ffn = ffn * (workers if len(ffn) == 1 else 1)
    try:
        layout = make_layout(model_config.to_dict(), blueprint.ffn_blocks)
        division = Division(
            blueprint.setting,
            tuple(zip(heads, ffn, strict=True)),
            blueprint.undivided_first,
            blueprint.undivided_last,
            tuple(blueprint.common),
        )
        if config.algorithm == "twist":
            division.check(layout)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Job(config, model_config, layout, division, corpus, run_id)


def _model_config(config: Config, corpus: Corpus) -> GPT2Config:
    model, window = config.model, config.data.window
    if model.pretrained:
        path = Path(model.pretrained).expanduser()
        if (path.is_absolute() or model.pretrained[0] in "~.") and not (path / "config.json").is_file():
            raise ConfigError(f"model.pretrained={model.pretrained!r} is no folder with a config.json")
        loaded: Any = AutoConfig.from_pretrained(model.pretrained)
        if loaded.model_type != "gpt2":
            raise ConfigError(
                f"model.pretrained={model.pretrained!r} is a {loaded.model_type!r} model; only 'gpt2' is known"
            )
        if not loaded.tie_word_embeddings:
            raise ConfigError(f"model.pretrained={model.pretrained!r} has an untied lm_head: only tied ones are known")
        if loaded.vocab_size < corpus.vocab_size:
            raise ConfigError(
                f"the tokenizer has {corpus.vocab_size} tokens and model.pretrained={model.pretrained!r} only "
                f"{loaded.vocab_size}: set data.tokenizer to the model's own"
            )
    else:
        end = corpus.vocab_size - 1 if config.data.tokenizer else 0
        loaded = GPT2Config(
            vocab_size=corpus.vocab_size,
            # GPT-2's gelu_new as one fused kernel: the same function, a fifth less time per step on a CPU.
            activation_function="gelu_pytorch_tanh",
            n_positions=model.n_positions,
            n_embd=model.n_embd,
            n_layer=model.n_layer,
            n_head=model.n_head,
            resid_pdrop=model.dropout,
            embd_pdrop=model.dropout,
            attn_pdrop=model.dropout,
            bos_token_id=end,
            eos_token_id=end,
        )
    if window > loaded.n_positions:
        raise ConfigError(f"data.window={window} is longer than the model's context: use at most {loaded.n_positions}")
    assert isinstance(loaded, GPT2Config)
    return loaded

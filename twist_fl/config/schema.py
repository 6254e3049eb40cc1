"""Every knob of a run, with its unit and default: the paper's (section 5) where the paper has one.

A configuration is these, then a preset of `conf/` (which holds only what differs), then `key=value` overrides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from omegaconf import OmegaConf

from twist_fl.config import loading
from twist_fl.config.devices import DeployConfig
from twist_fl.config.layers import conf_dir as conf_dir  # noqa: PLC0414
from twist_fl.config.layers import presets as presets  # noqa: PLC0414
from twist_fl.config.shares import Size
from twist_fl.system.errors import ConfigError as ConfigError  # noqa: PLC0414 (the name users import)

Algorithm = Literal["twist", "fedavg", "ddp"]
OptimizerState = Literal["reset", "client", "server", "factored"]
Precision = Literal["float32", "tf32", "bfloat16"]


@dataclass
class ModelConfig:
    """A pretrained checkpoint, or sizes for a model from scratch."""

    pretrained: str | None = None
    """Name on the hub, a folder, a GGUF file (.gguf), or a run (its newest checkpoint); all below is read from it."""
    architecture: str = "gpt2"
    """Of a model from scratch; for a pretrained one of a model_type that is not known, its block table."""
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None
    """Key/value heads; null: as many as n_head."""
    n_embd: int = 768
    n_inner: int | None = None
    """FFN neurons per layer; null: 4 * n_embd."""
    n_positions: int = 1024
    dropout: float = 0.1
    """As far as the architecture has any: llama, mistral and qwen only drop attention weights."""


@dataclass
class DataConfig:
    """Text, tokenizer and windows."""

    source: str = "builtin"
    """builtin: the Python documentation this interpreter carries; files: `path`, also where only that is given;
    wikitext: WikiText, whose rows are lines of running text; hub: a data set of the Hugging Face hub; empty: for
    `private`. Every node reads it itself."""
    path: str | None = None
    """files, wikitext: a file, a folder or a glob of txt, md, jsonl, json, csv, parquet or arrow, also .gz, or what
    save_to_disk wrote (wikitext: default is the hub's); hub: the name of the data set."""
    name: str | None = None
    """The configuration of a data set that has several (wikitext: default is wikitext-103-raw-v1)."""
    column: str | None = None
    """The column of a data set that is the text; null: "text", or the only one of strings."""
    train_glob: str = "*train*"
    """Which files of the folder, folders in it, or splits of the data set to train on; if these two defaults do not
    match both (a validation split stands in for a test split), all text is split by `test_fraction`."""
    test_glob: str = "*test*"
    test_fraction: float = 0.1
    """Share of documents kept for evaluation where the source has no test split of its own."""
    private: str | None = None
    """Each worker trains on text of its own. nodes: what `twist-fl node --data` names, which stays there; a folder: its
    s-th folder or file by name. `source` is then the server's: to test on, and for a tokenizer if there is none."""
    tokenizer: str | None = None
    """Folder, or name on the hub; null: model.pretrained's own, and for a model from scratch a byte-level BPE of
    `vocab_size`, trained on the training text."""
    vocab_size: int = 2048
    window: int = 1024
    """Tokens per training sequence."""


@dataclass
class BlueprintConfig:
    """What is divided, and how much of it a worker holds."""

    setting: Literal["attn", "ffn", "both"] = "both"
    policy: str = "random"
    """Which blocks. random: Algorithm 1; rolling: a window that moves (FedRolex); ordered: the first ones (HeteroFL);
    static: drawn once; importance: Algorithm 1 with the common blocks that score highest."""
    num_sub: list[Size] = field(default_factory=lambda: ["1/2"])
    """What a worker holds of each divided layer: one size for all workers, or one per worker. 6: blocks of attention,
    and as large a part of the FFN; 1/2: a share, to the nearest block; 3+6: attention's blocks and the FFN's. fedavg
    and ddp: all hold all."""
    assign: Literal["fixed", "shuffled", "drawn"] = "fixed"
    """fixed: worker s holds num_sub[s]; shuffled: the list, which goes round if it is short, is dealt out every round
    to those who train; drawn: every worker draws its size from the list every round."""
    attn_blocks: Literal["kv_groups", "heads"] = "kv_groups"
    """Where queries share keys and values. kv_groups: a block is a key/value head with its queries; heads: one query
    head, and all workers hold all keys and values."""
    ffn_blocks: int | None = None
    """FFN blocks per layer (R); null: as many as attention blocks."""
    undivided_first: int = 2
    undivided_last: int = 2
    common: Size = 0
    """Blocks that every worker holds (C), a size as in `num_sub`: the first, or by policy=importance those that score
    highest."""
    rewire: bool = False
    """Before training, sort neurons and heads by their score: the most important into the common blocks, the others
    evenly into the rest. The model computes the same."""
    score: Literal["fisher", "taylor"] = "fisher"
    """fisher: summed squared gradients of a block's parameters; taylor: |sum of parameter x gradient|."""
    score_every: int = 0
    """Rounds between two scorings; 0: once, before the first round."""
    score_windows: int = 32
    """Random windows of the training text that blocks are scored on."""
    scale: Literal["sqrt", "linear", "none"] = "sqrt"


@dataclass
class TrainConfig:
    """Local training and its budget."""

    workers: int = 4
    fraction: float = 1.0
    """Share of the workers that train in a round, drawn anew each time: at least one, and in the hybrid variant always
    the server. They alone are dealt blocks. The others wait: of `rounds` or `epochs`, a worker trains on this share."""
    interval: int = 15
    """Batches between two aggregations; ddp aggregates after every batch."""
    batch_size: int = 2
    """Windows per batch and worker."""
    epochs: int = 3
    rounds: int | None = None
    """Number of intervals, for ddp too; null: as many as `epochs` of a worker's shard need, also if `epochs` is given
    after it, as over a preset's rounds."""
    lr: float = 1e-4
    """The learning rate, or the highest that `schedule` and `warmup` reach."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """Of the learning rate over the whole run, whatever the interval: linear and cosine fall to 0 at its end; wsd
    (warm-up, stable, decay) is constant and falls linearly over the last `decay`."""
    warmup: float = 0.0
    """Share of the run's batches over which the learning rate rises."""
    decay: float = 0.3
    """schedule=wsd: share of the run's batches over which the learning rate falls."""
    distill: float = 0.0
    """Share of the target that is what a teacher expects (distillation); the rest is the text. It is asked once for
    each window that a worker trains on."""
    teacher: str | None = None
    """Folder of a model with the same tokenizer, or of a run: a copy where each worker is; null: model.pretrained."""
    clip_norm: float | None = None
    """Longest gradient, over all that a worker holds; a longer one is scaled down to it. null: as it is."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """adam adds `weight_decay` to the gradient, adamw takes it from the weights (decoupled)."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    optimizer_state: OptimizerState = "reset"
    """reset: new every interval; client: moments of what a worker always holds whole stay with it; server: they travel,
    for three times the bytes; factored: of the second moments the means of rows and columns travel, for 1 to 10 % more
    bytes, and the first are zero at the start of every interval. Not for ddp: its one Adam stays on the server."""
    weighting: Literal["workers", "tokens"] = "workers"
    """Mean over workers, or weighted by the tokens each trained on."""
    variant: Literal["true", "masked", "hybrid"] = "true"
    """true: smaller models; masked: whole models, other blocks multiplied by zero; hybrid: the server is worker 0 and
    masks its own model, the others are true."""
    device: str = "auto"
    threads: int | None = None
    """CPU threads per worker; null: cores / workers."""
    precision: Precision = "float32"
    """Of the products in a step: tf32 needs a CUDA GPU; bfloat16 is autocast. Parameters and Adam are float32."""
    compile: bool = False
    """torch.compile the model's body, once per subnet shape and batch size; needs a C++ compiler."""
    loss_chunk: int = 256
    """Tokens whose logits exist at a time in the loss; a batch of no more tokens takes the model's own loss."""


@dataclass
class AggregateConfig:
    """What the server makes of a round's replies."""

    rule: str = "mean"
    """What replaces a block, of the replies that held it. mean: theirs; median: of each number (FedMedian);
    trimmed_mean: of each number without the quarter at either end, at least one where three hold it. These two weigh
    all workers alike, keep all replies in memory and make moments that travel, too. For ddp, of gradients."""
    optimizer: Literal["mean", "momentum", "nesterov", "adam"] = "mean"
    """mean: what `rule` gives is the next model; else the outer optimiser whose gradient is what the round has changed
    (FedAvgM, DiLoCo, FedAdam), for each block in the rounds in which somebody held it. Not for ddp."""
    server_lr: float = 1.0
    """The outer optimiser's learning rate."""
    momentum: float = 0.9
    """Of momentum and nesterov; adam's beta1."""
    beta2: float = 0.99
    """adam."""
    tau: float = 1e-3
    """adam: what is added to the root of the second moment."""


@dataclass
class EvalConfig:
    """Perplexity on the test split."""

    every: int = 20
    """Intervals between two evaluations of the full model while training; 0: only at the end."""
    federated: Literal["off", "subnet", "full"] = "off"
    """Whether the workers evaluate, too, whenever the server does, each on its share of the same windows: subnet: what
    the round made of its own subnet; full: the full model, which each must have memory for. Not with `train --local`.
    """
    batch_size: int = 8
    watch_windows: int = 64
    """Windows of the test split for the evaluations while training."""
    max_windows: int | None = None
    """Windows of the test split for the final results; null: all."""
    tickets: int = 20
    """Random tickets per size."""
    sizes: list[Size] = field(default_factory=lambda: ["2/3", "1/2", "1/3", "1/4"])
    """Ticket sizes, written as in `blueprint.num_sub`."""
    ticket_policy: Literal["random", "ordered", "importance"] = "random"
    """Which blocks a ticket holds: random ones, the first, or with blueprint.policy=importance the highest scores."""


@dataclass
class FlowerConfig:
    """How the run uses Flower."""

    round_timeout: float = 3600.0
    """Seconds after which a round goes on without the replies still missing."""
    poll_interval: float = 0.05
    """Seconds between two looks for replies; in a long round a 200th of what it has taken so far."""
    connect_timeout: float = 900.0
    """Seconds a node has to read the text and build its worker before the first round."""
    wait_for_nodes: float = 30.0
    """Seconds to wait for as many nodes as workers; after that those present share the workers."""
    transport: Literal["auto", "shm", "flight", "inline"] = "auto"
    """How tensors travel. shm: memory that server and worker share (Linux); flight: by Arrow Flight, over TLS; inline:
    in Flower's messages; auto: shm for every node that shares the server's machine, for others flight where
    flower.flight is set and the node reaches it, else inline."""
    flight: str | None = None
    """HOST:PORT of the server, as nodes name it, for tensors by Arrow Flight; port 0: any free one. The port is opened
    on loopback alone where HOST is localhost or 127.0.0.1, else on all networks."""
    flight_certificate: str | None = None
    """File (PEM) with a certificate for flower.flight's HOST, the SuperLink's for example; null: one is made for the
    run."""
    flight_key: str | None = None
    """File (PEM) with that certificate's private key."""
    wire_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Weights on the way out, and what training has changed on the way back, rounded to nearest; server and workers
    keep float32, and the server what rounding takes away. float16 ends at 65504."""
    cpus_per_worker: int | None = None
    """Simulation: CPU cores reserved per worker; null: cores / workers, at least 1."""
    gpus_per_worker: float = 0.0
    """Simulation: share of a GPU per worker, for example 0.25 for four workers on one."""


@dataclass
class LogConfig:
    """Where else a run's events go, beside events.jsonl."""

    tensorboard: bool = False
    """Loss, perplexity, bytes, seconds, lost replies and ticket perplexities as scalars in the run's folder
    tensorboard; needs the package: pip install 'twist-fl[tensorboard]'."""
    tracker: str | None = None
    """Another tracker: a function, called once with the configuration (a dict) and the run's folder
    (a Path); what it returns is called with every event (a dict), where the server runs."""


@dataclass
class Config:
    """All settings of a run, in sections."""

    name: str = "run"
    algorithm: Algorithm = "twist"
    """fedavg: the same code, every blueprint full; ddp: Adam on the mean gradient of a batch from each worker."""
    seed: int = 0
    dir: str | None = None
    """Folder of the run; null: runs/NAME below the current folder, or ~/twist_fl_runs/NAME under `flwr run`."""
    checkpoint_every: int = 20
    """Intervals between two checkpoints."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    blueprint: BlueprintConfig = field(default_factory=BlueprintConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    aggregate: AggregateConfig = field(default_factory=AggregateConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    flower: FlowerConfig = field(default_factory=FlowerConfig)
    deploy: DeployConfig = field(default_factory=DeployConfig)
    log: LogConfig = field(default_factory=LogConfig)


def load_config(
    preset: str | None = None, overrides: Sequence[str] = (), strict: bool = False, base: Config | None = None
) -> Config:
    """Defaults (or `base`), then the preset (name or file), then `overrides`; `loading.load` says what is refused."""
    config = loading.load(Config, preset, overrides, strict, None if base is None else to_yaml(base))
    assert isinstance(config, Config)
    return config


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def from_yaml(text: str) -> Config:
    config = loading.from_yaml(Config, text)
    assert isinstance(config, Config)
    return config

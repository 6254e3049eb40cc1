"""Every knob of a run, with its unit and default, and how a run's configuration is put together.

A configuration is the defaults below, then a preset of `conf/` (which holds only what differs), then
`key=value` overrides. Defaults are the paper's (section 5) where the paper has one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from twist_fl.checks import ConfigError as ConfigError  # noqa: PLC0414 (the name users import)
from twist_fl.checks import check_values

Algorithm = Literal["twist", "fedavg", "ddp"]
OptimizerState = Literal["reset", "client", "server"]
Precision = Literal["float32", "tf32", "bfloat16"]


@dataclass
class ModelConfig:
    """A pretrained checkpoint, or sizes for a model from scratch."""

    pretrained: str | None = None
    """Name on the Hugging Face hub, a folder, or a run's folder (its newest checkpoint); all below is read from it."""
    architecture: Literal["gpt2", "llama", "mistral", "qwen2", "qwen3", "opt", "gpt_neox"] = "gpt2"
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None
    """Key/value heads, each an attention block with the queries that read it; null: as many as n_head."""
    n_embd: int = 768
    n_inner: int | None = None
    """FFN neurons per layer; null: 4 * n_embd."""
    n_positions: int = 1024
    dropout: float = 0.1
    """As far as the architecture has any: llama, mistral and qwen only drop attention weights."""


@dataclass
class DataConfig:
    """Text, tokenizer and windows."""

    source: Literal["builtin", "files", "wikitext"] = "builtin"
    """builtin: the Python documentation this interpreter carries; files: `path`; wikitext: Salesforce/wikitext."""
    path: str | None = None
    """files: a text file or a folder; wikitext: a local copy of the data set (default: the hub)."""
    name: str = "wikitext-103-raw-v1"
    """wikitext: the configuration of the data set."""
    train_glob: str = "*train*"
    """files: which files of the folder to train on; if these two defaults do not match both, all text is split by
    `test_fraction`."""
    test_glob: str = "*test*"
    test_fraction: float = 0.1
    """Share of documents kept for evaluation where the source has no test split of its own."""
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
    policy: Literal["random", "rolling", "ordered", "static", "importance"] = "random"
    """Which blocks. random: Algorithm 1; rolling: a window that moves (FedRolex); ordered: the first ones (HeteroFL);
    static: drawn once; importance: Algorithm 1 with the common blocks that score highest."""
    num_sub: list[int] = field(default_factory=lambda: [6])
    """Blocks held per divided layer: one number for all workers, or one per worker. fedavg and ddp: all hold all."""
    num_sub_ffn: list[int] | None = None
    """The same for FFN blocks, where it differs from `num_sub`."""
    assign: Literal["fixed", "shuffled", "drawn"] = "fixed"
    """fixed: worker s holds num_sub[s]; shuffled: the list is dealt out anew every round; drawn: every worker draws
    its size from the list, of any length, every round."""
    ffn_blocks: int | None = None
    """FFN blocks per layer (R); null: as many as attention blocks (heads, or key/value heads)."""
    undivided_first: int = 2
    undivided_last: int = 2
    common: list[int] = field(default_factory=list)
    """Block ids that every worker holds (C)."""
    num_common: int = 0
    """policy=importance: how many blocks of each layer are common, those that score highest."""
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
    interval: int = 15
    """Batches between two aggregations; ddp aggregates after every batch."""
    batch_size: int = 2
    """Windows per batch and worker."""
    epochs: int = 3
    rounds: int | None = None
    """Number of intervals, for ddp too; null: as many as `epochs` of a worker's shard need, also if `epochs` is given
    after it, as over a preset's rounds."""
    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    optimizer_state: OptimizerState = "reset"
    """reset: new every interval; client: moments of what a worker always holds whole stay with it; server: they travel.
    Not for ddp: its one Adam stays on the server."""
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
class EvalConfig:
    """Perplexity on the test split."""

    every: int = 20
    """Intervals between two evaluations of the full model while training; 0: only at the end."""
    batch_size: int = 8
    watch_windows: int = 64
    """Windows of the test split for the evaluations while training."""
    max_windows: int | None = None
    """Windows of the test split for the final results; null: all."""
    tickets: int = 20
    """Random tickets per size."""
    sizes: list[int] = field(default_factory=lambda: [8, 6, 4, 3])
    """Ticket sizes, in blocks per divided layer."""
    ticket_policy: Literal["random", "ordered", "importance"] = "random"
    """Which blocks a ticket holds: random ones, the first, or with blueprint.policy=importance the highest scores."""


@dataclass
class FlowerConfig:
    """How the run uses Flower."""

    round_timeout: float = 3600.0
    """Seconds after which a round goes on without the replies still missing."""
    poll_interval: float = 0.05
    """Seconds between two looks for replies."""
    connect_timeout: float = 900.0
    """Seconds a node has to read the text and build its worker before the first round."""
    wait_for_nodes: float = 30.0
    """Seconds to wait for as many nodes as workers; after that those present share the workers."""
    transport: Literal["auto", "shm", "inline"] = "auto"
    """How tensors travel. shm: memory that server and worker share (Linux); inline: in Flower's messages; auto: shm
    for every node that shares the server's machine, else inline."""
    wire_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Weights on the way out, and what training has changed on the way back, rounded to nearest; server and workers
    keep float32, and the server what rounding takes away. float16 ends at 65504."""
    cpus_per_worker: int | None = None
    """Simulation: CPU cores reserved per worker; null: cores / workers, at least 1."""
    gpus_per_worker: float = 0.0
    """Simulation: share of a GPU per worker, for example 0.25 for four workers on one."""


@dataclass
class DeviceConfig:
    """An edge device a ticket is shipped to: the largest that meets all limits given, at least one of these three."""

    name: str = "device"
    memory_mb: float | None = None
    """Memory for the model, in MB of 10^6 bytes: weights in float32 plus the KV cache of one full context."""
    latency_ms: float | None = None
    """Milliseconds a token, as the device itself measures them with the ticket."""
    kappa: float | None = None
    """At most this share of a divided layer's blocks, in (0, 1]."""


@dataclass
class DeployConfig:
    devices: list[DeviceConfig] = field(default_factory=list)
    """What `twist-fl deploy` serves if it is given none: [{name: phone, memory_mb: 2, latency_ms: 20, kappa: 0.5}]."""
    new_tokens: int = 32
    """Tokens generated to measure latency."""


@dataclass
class Config:
    name: str = "run"
    algorithm: Algorithm = "twist"
    """twist; fedavg: the same code with every blueprint full; ddp: one Adam step on the mean gradient of a batch
    from each worker."""
    seed: int = 0
    dir: str | None = None
    """Folder of the run; null: runs/NAME below the current folder, or ~/twist_fl_runs/NAME under `flwr run`."""
    checkpoint_every: int = 20
    """Intervals between two checkpoints."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    blueprint: BlueprintConfig = field(default_factory=BlueprintConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    flower: FlowerConfig = field(default_factory=FlowerConfig)
    deploy: DeployConfig = field(default_factory=DeployConfig)


def conf_dir() -> Path:
    """The presets: beside the package in a source tree, inside it in a wheel."""
    package = Path(__file__).resolve().parent
    beside = package.parent
    return (beside if (beside / "server_app.py").is_file() else package / "app") / "conf"


def presets() -> list[str]:
    return sorted(path.stem for path in conf_dir().glob("*.yaml"))


def load_config(preset: str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then the preset (a name, or a YAML file), then `key=value` overrides.

    Raises ConfigError for an unknown preset or key (with the nearest one) or a value out of range.
    """
    layers: list[Any] = []
    if preset:
        file = Path(preset)
        if file.suffix != ".yaml":
            file = conf_dir() / f"{preset}.yaml"
            if "=" in preset:
                raise ConfigError(f"{preset!r} stands where a preset or file is expected: demo {preset}, for example")
            if preset not in presets():
                raise ConfigError(f"no preset {preset!r}{_nearest(preset, presets())}; presets: {', '.join(presets())}")
        elif not file.is_file():
            raise ConfigError(f"no file {preset!r}: give a preset ({', '.join(presets())}) or an existing YAML file")
        try:
            layers.append(OmegaConf.load(file))
        except YAMLError as error:
            raise ConfigError(f"{str(file)!r} is not YAML: {error}") from error
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r} is not of the form key=value, for example train.lr=1e-3")
        try:
            layers.append(OmegaConf.from_dotlist([override]))
        except YAMLError as error:
            key, _, value = override.partition("=")
            raise ConfigError(
                f"the value of {override!r} is not YAML: close its brackets, or quote it: '{key}=\"{value}\"'"
            ) from error
    return from_layers(layers)


def from_layers(layers: Sequence[Any]) -> Config:
    """Merge plain mappings over the defaults and check the result."""
    merged = OmegaConf.structured(Config)
    for layer in layers:
        plain = OmegaConf.to_container(layer) if OmegaConf.is_config(layer) else layer
        if not isinstance(plain, dict):
            raise ConfigError(f"a configuration is a mapping of keys to values, not {plain!r}")
        _check_keys(plain, Config, "")
        for section, key in (
            ("blueprint", "num_sub"),
            ("blueprint", "num_sub_ffn"),
            ("blueprint", "common"),
            ("eval", "sizes"),
        ):
            values = plain.get(section)
            if isinstance(values, dict) and isinstance(values.get(key), (int, str)):
                values[key] = str(values[key]).split(",")  # one number is a list of one; 6,3 is what --sizes takes
        train = plain.get("train")
        if isinstance(train, dict) and train.get("variant") is True:
            train["variant"] = "true"  # the paper's name for it is YAML's for yes
        if isinstance(train, dict) and "epochs" in train:
            train.setdefault("rounds", None)  # of the two budgets, the one given last counts
        try:
            merged = OmegaConf.merge(merged, OmegaConf.create(plain))
        except OmegaConfBaseException as error:
            raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, Config)
    check_values(config)
    _make_absolute(config)
    config.data.tokenizer = config.data.tokenizer or config.model.pretrained
    return config


def _make_absolute(config: Config) -> None:
    """Folders that exist become absolute: Flower runs the app in another working folder. A run stands for its newest
    checkpoint."""
    for section, key in ((config.data, "path"), (config.data, "tokenizer"), (config.model, "pretrained")):
        value = getattr(section, key)
        if value and (path := Path(value).expanduser()).exists():
            newest = max(path.glob("checkpoints/round-*"), default=path)
            setattr(section, key, str(newest.resolve()))


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(text: str) -> Config:
    return from_layers([OmegaConf.create(text)])


def _nearest(word: str, words: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, words, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _keys(schema: Any, prefix: str = "") -> Iterator[str]:
    """Every key that takes a value, with its sections: train.lr."""
    for field_ in fields(schema):
        default = getattr(schema(), field_.name)
        inner = _keys(type(default), f"{prefix}{field_.name}.") if is_dataclass(default) else [prefix + field_.name]
        yield from inner


def _meant(key: str, section: str, known: Sequence[str]) -> str:
    """The key of that name in any section, else the nearest in this one, else in any."""
    named: dict[str, list[str]] = {}
    for path in _keys(Config):
        named.setdefault(path.rpartition(".")[2], []).append(path)
    inside = [section + near for near in difflib.get_close_matches(key, known, n=1)]
    anywhere = [path for near in difflib.get_close_matches(key, named, n=1) for path in named[near]]
    found = named.get(key) or inside or anywhere
    return f", did you mean {' or '.join(map(repr, found))}?" if found else f"; known here: {', '.join(known)}"


def _check_keys(given: dict[Any, Any], schema: Any, prefix: str) -> None:
    known = {f.name: f for f in fields(schema)}
    defaults = schema()
    for key, value in given.items():
        if key not in known:
            raise ConfigError(f"unknown key {prefix + str(key)!r}{_meant(str(key), prefix, list(known))}")
        default = getattr(defaults, key)
        if is_dataclass(default):
            if not isinstance(value, dict):
                raise ConfigError(
                    f"{prefix}{key} is a section: set one of its keys, for example {prefix}{key}."
                    f"{fields(default)[0].name}=..."
                )
            _check_keys(value, type(default), f"{prefix}{key}.")

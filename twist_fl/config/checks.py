"""What the values of a configuration must satisfy by themselves; what they must together with a model or text is
checked where that is read (`job.py`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from math import inf
from typing import Any

from twist_fl.blueprint.architectures import use_architecture
from twist_fl.config.shares import Size, read_size
from twist_fl.system.errors import ConfigError
from twist_fl.system.plugins import ARCHITECTURE

# Written so that NaN fails each.
_BOUNDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "more than 0": (
        lambda value: value > 0,
        "train.workers train.interval train.batch_size train.epochs train.rounds train.lr train.threads "
        "train.loss_chunk train.clip_norm model.n_layer model.n_head model.n_kv_head model.n_embd model.n_inner "
        "model.n_positions eval.batch_size eval.watch_windows eval.max_windows eval.tickets blueprint.score_windows "
        "checkpoint_every flower.round_timeout flower.poll_interval flower.connect_timeout flower.wait_for_nodes "
        "flower.cpus_per_worker deploy.new_tokens deploy.windows deploy.at_once blueprint.ffn_blocks "
        "aggregate.server_lr aggregate.tau",
    ),
    "0 or more": (
        lambda value: value >= 0,
        "seed blueprint.undivided_first blueprint.undivided_last blueprint.score_every "
        "train.eps train.weight_decay eval.every flower.gpus_per_worker",
    ),
    "at least 2": (lambda value: value >= 2, "data.window"),
    "in [0, 1)": (
        lambda value: 0 <= value < 1,
        "train.beta1 train.beta2 train.warmup aggregate.momentum aggregate.beta2 model.dropout",
    ),
    "in (0, 1]": (lambda value: 0 < value <= 1, "train.decay train.fraction"),
    "in [0, 1]": (lambda value: 0 <= value <= 1, "train.distill"),
    "between 0 and 1": (lambda value: 0 < value < 1, "data.test_fraction"),
}
_MOST = {
    100: "flower.gpus_per_worker",
    1024: "train.threads flower.cpus_per_worker",
    1000: "model.n_layer",
    10_000: "train.workers model.n_head model.n_kv_head",
    100_000: "eval.tickets deploy.new_tokens",
    10_000_000: "data.vocab_size data.window model.n_embd model.n_inner model.n_positions flower.round_timeout "
    "flower.poll_interval flower.connect_timeout flower.wait_for_nodes",
    2**63 - 1: "seed train.interval train.batch_size train.epochs train.rounds train.loss_chunk eval.every "
    "eval.batch_size eval.watch_windows eval.max_windows checkpoint_every blueprint.score_every "
    "blueprint.score_windows blueprint.undivided_first blueprint.undivided_last "
    "blueprint.ffn_blocks",
}
"""Far above what anyone has use for, and below what takes minutes to fail: layers, workers, seconds (of a timeout)."""
NODES = "nodes"
"""data.private where each node brings its own text."""
_NAME = re.compile(r"[\w.+-]*\w[\w.+-]*")
_HOST = re.compile(r"[\w.-]+|\[[\w:.%]+\]")
_LONGEST_NAME = 200
_SMALLEST_VOCABULARY = 257
_DEVICES = ("auto", "cpu", "cuda", "mps", "xpu", "hpu", "mtia", "npu")


def _check_bounds(config: Any) -> None:
    for words, (holds, keys) in _BOUNDS.items():
        for key, value in _values(config, keys):
            if not holds(value):
                raise ConfigError(f"{key}={value} must be {words}")
    for most, keys in _MOST.items():
        for key, value in _values(config, keys):
            if value > most:
                raise ConfigError(f"{key}={value:{'.6g' if value > 1e15 else ''}} is too much: use at most {most}")
    for key, value in _values(
        config, "train.lr train.eps train.weight_decay train.clip_norm aggregate.server_lr aggregate.tau"
    ):
        if value == inf:
            raise ConfigError(f"{key}={value} must be a number, not infinite")
    for key, sizes in _values(config, "blueprint.num_sub eval.sizes"):
        if low := [size for size in sizes if min(amount.number for amount in read_size(key, size)) <= 0]:
            raise ConfigError(f"{key}={_listed(sizes)}: a layer's share is 1 block or more, not {low[0]}")


def check_values(config: Any) -> None:
    """Raises ConfigError for the first value of a `Config` that cannot be."""
    _check_bounds(config)
    check_name("name", config.name)
    _check_device_name(config.train.device)
    for device in config.deploy.devices:
        check_device(device)
    model, blueprint, workers = config.model, config.blueprint, config.train.workers
    if model.pretrained is None and model.n_embd % model.n_head:
        nearest = max(1, round(model.n_embd / model.n_head)) * model.n_head
        raise ConfigError(
            f"model.n_embd={model.n_embd} must be a multiple of model.n_head={model.n_head}: use {nearest}"
        )
    grouped = [name for name in ARCHITECTURE.own if "n_kv_head" in use_architecture(name).keys]
    others = ARCHITECTURE.own.keys() - grouped
    if model.pretrained is None and model.n_kv_head is not None and model.architecture in others:
        raise ConfigError(
            f"model.n_kv_head={model.n_kv_head}: every head of model.architecture={model.architecture} has its own "
            f"keys and values; leave it null, or use one of {', '.join(grouped)}"
        )
    if config.data.source == "files" and not config.data.path:
        raise ConfigError("data.source=files needs data.path: a text file, a folder or a glob")
    if config.data.source == "hub" and not config.data.path:
        raise ConfigError(
            "data.source=hub needs data.path: the name of a data set, for example data.path=roneneldan/TinyStories"
        )
    if config.data.source in ("builtin", "empty") and config.data.path:
        given = f"data.path={config.data.path!r} is not read with data.source={config.data.source}"
        raise ConfigError(f"{given}: add data.source=files")
    _check_private(config)
    _check_flight(config.flower)
    if config.data.tokenizer is None and model.pretrained is None and config.data.vocab_size < _SMALLEST_VOCABULARY:
        raise ConfigError(
            f"data.vocab_size={config.data.vocab_size} must be at least {_SMALLEST_VOCABULARY}: 256 bytes and an end"
        )
    if config.train.distill and not (config.train.teacher or model.pretrained):
        raise ConfigError(
            f"train.distill={config.train.distill:g} has nobody to learn from: give train.teacher=FOLDER, or start "
            "from model.pretrained, which is then the teacher"
        )
    _check_sizes(blueprint, workers)
    _check_policies(config)
    _check_variant(config)


def _check_private(config: Any) -> None:
    data, train = config.data, config.train
    if data.private == NODES and not train.rounds:
        raise ConfigError("data.private=nodes needs train.rounds: how long an epoch is, only the nodes know")
    if data.source != "empty":
        return
    if data.private is None:
        raise ConfigError(
            "data.source=empty is for workers with text of their own: set data.private, or another source"
        )
    if not (data.tokenizer or config.model.pretrained):
        raise ConfigError(
            "data.source=empty has no text to train a tokenizer on: give data.tokenizer, model.pretrained, or the "
            "server text of its own"
        )
    reads = {
        "train.variant=hybrid": train.variant == "hybrid",
        "blueprint.policy=importance": config.blueprint.policy == "importance",
        "blueprint.rewire=true": config.blueprint.rewire,
    }
    for setting, holds in reads.items():
        if holds:
            raise ConfigError(f"{setting} needs text where the server is, and data.source=empty gives it none")


def _check_flight(flower: Any) -> None:
    if flower.flight is None and flower.transport == "flight":
        raise ConfigError("flower.transport=flight needs flower.flight: the server's HOST:PORT, as nodes name it")
    if flower.flight is not None:
        host, _, port = flower.flight.rpartition(":")
        if not _HOST.fullmatch(host) or not port.isdecimal() or int(port) >= 2**16:
            raise ConfigError(
                f"flower.flight={shown(flower.flight)} is not HOST:PORT with a port of 0 to 65535, for example "
                "localhost:9000"
            )
    if (flower.flight_certificate is None) != (flower.flight_key is None):
        raise ConfigError("flower.flight_certificate and flower.flight_key belong together: give both or neither")


def _check_device_name(device: str) -> None:
    kind, _, number = device.partition(":")
    if kind not in _DEVICES or (number and not number.isdecimal()) or device.endswith(":"):
        near = ", did you mean 'cuda'?" if kind in ("gpu", "nvidia") else ""
        raise ConfigError(f"train.device={shown(device)} must be auto, cpu, or a GPU as cuda, cuda:1 or mps{near}")


def _values(config: Any, keys: str) -> Iterator[tuple[str, Any]]:
    """The settings that are not null, with their values."""
    for key in keys.split():
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        if value is not None:
            yield key, value


def _listed(sizes: Sequence[Size]) -> str:
    """As it is written on the command line: 6,3."""
    return ",".join(map(str, sizes)) if sizes else "[]"


def _check_sizes(blueprint: Any, workers: int) -> None:
    sizes = blueprint.num_sub
    if not sizes or (blueprint.assign == "fixed" and len(sizes) not in (1, workers)):
        raise ConfigError(
            f"blueprint.num_sub={_listed(sizes)} has {len(sizes)} entries for train.workers={workers}: give one, or "
            "one each, or blueprint.assign=shuffled to deal them out"
        )


def _check_policies(config: Any) -> None:
    blueprint, by_score = config.blueprint, config.blueprint.policy == "importance"
    if by_score and not blueprint.common:
        raise ConfigError("blueprint.policy=importance needs blueprint.common: at least 1")
    if by_score and config.algorithm != "twist":
        raise ConfigError(f"blueprint.policy=importance divides nothing with algorithm={config.algorithm}: use twist")
    if blueprint.rewire and by_score:
        raise ConfigError("blueprint.policy=importance chooses common blocks, blueprint.rewire makes them: use one")
    if blueprint.rewire and not config.model.pretrained:
        raise ConfigError("blueprint.rewire sorts what is trained already: give model.pretrained=FOLDER_OR_NAME")
    if config.eval.ticket_policy == "importance" and not by_score:
        raise ConfigError("eval.ticket_policy=importance needs the scores of blueprint.policy=importance")


def _check_variant(config: Any) -> None:
    train, variant = config.train, config.train.variant
    if variant != "true" and config.algorithm != "twist":
        raise ConfigError(
            f"train.variant={variant} masks nothing with algorithm={config.algorithm}, where every worker holds all: "
            "use train.variant=true"
        )
    if variant != "hybrid":
        return
    if train.workers < 2:
        raise ConfigError("train.variant=hybrid with train.workers=1 leaves no client beside the server: use 2 or more")
    if train.weight_decay:
        raise ConfigError(
            f"train.variant=hybrid trains the server's own parameters, and train.weight_decay={train.weight_decay:g} "
            "would shrink those that are masked: use 0, or another variant"
        )
    if train.compile:
        raise ConfigError("train.variant=hybrid does not compile the server's model: set train.compile=false")


def check_device(device: Any) -> None:
    """Raises ConfigError unless a `DeviceConfig` has a name for a folder and limits that can be."""
    check_name("deploy.devices", device.name)
    limits = {key: getattr(device, key) for key in ("memory_mb", "latency_ms", "prompt_ms", "kappa")}
    if set(limits.values()) == {None}:
        raise ConfigError(f"deploy.devices {device.name!r} has no limit: give {', '.join(limits)}, or several of them")
    if device.context is not None and device.context < 2:
        raise ConfigError(f"deploy.devices {device.name!r}: context={device.context} must be at least 2 tokens")
    for key, value in limits.items():
        if value is not None and not (0 < value <= 1 if key == "kappa" else 0 < value < inf):
            bound = "in (0, 1]" if key == "kappa" else "more than 0, and finite"
            raise ConfigError(f"deploy.devices {device.name!r}: {key}={value:g} must be {bound}")


def check_name(key: str, name: str) -> None:
    """Names become folders: raises ConfigError for one that could lead elsewhere."""
    if len(name) > _LONGEST_NAME:
        raise ConfigError(f"{key}: {shown(name)} is no name for a folder: use at most {_LONGEST_NAME} letters")
    if not _NAME.fullmatch(name):
        fitting = re.sub(r"[^\w.+-]+", "_", name).strip("._")
        near = f", for example {fitting}" if _NAME.fullmatch(fitting) else ""
        raise ConfigError(
            f"{key}: {shown(name)} is no name for a folder: use letters, digits, '.', '_', '+' and '-'{near}"
        )


def shown(value: Any) -> str:
    """As Python writes it, in one line that is not too long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-1]}"

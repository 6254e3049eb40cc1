"""Settings that change nothing beside others: what a user asked for in vain is refused, not passed over.

What only another algorithm uses is taken: runs that are compared share their settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from twist_fl.config.checks import shown
from twist_fl.system.errors import ConfigError

Reason = Callable[[Any], str | None]
"""Of a configuration: why the keys beside it change nothing, or None."""


def _if(holds: Callable[[Any], Any], reason: str) -> Reason:
    """`reason` may name the configuration's values: {0.algorithm}."""
    return lambda config: reason.format(config) if holds(config) else None


_IDLE: tuple[tuple[str, Reason], ...] = (
    (
        "blueprint.ffn_blocks",
        _if(lambda c: c.blueprint.setting == "attn", "blueprint.setting=attn leaves the FFN whole"),
    ),
    (
        "blueprint.attn_blocks",
        _if(lambda c: c.blueprint.setting == "ffn", "blueprint.setting=ffn leaves attention whole"),
    ),
    (
        "blueprint.score_every",
        _if(lambda c: c.blueprint.policy != "importance", "only blueprint.policy=importance scores blocks again"),
    ),
    (
        "blueprint.score blueprint.score_windows",
        _if(
            lambda c: c.blueprint.policy != "importance" and not c.blueprint.rewire,
            "only blueprint.policy=importance and blueprint.rewire score what is divided",
        ),
    ),
    (
        "blueprint.assign",
        _if(
            lambda c: len(set(c.blueprint.num_sub)) == 1,
            "blueprint.num_sub names one size for all: give several, as 6,4,3,3",
        ),
    ),
    (
        "model.n_layer model.n_head model.n_kv_head model.n_embd model.n_inner model.n_positions model.dropout",
        _if(lambda c: c.model.pretrained, "it is read from model.pretrained={0.model.pretrained}"),
    ),
    (
        "model.architecture",
        _if(
            lambda c: c.model.pretrained and ":" not in c.model.architecture,
            "it is read from model.pretrained={0.model.pretrained}",
        ),
    ),
    (
        "data.vocab_size",
        _if(lambda c: c.data.tokenizer, "the tokenizer is there already: data.tokenizer={0.data.tokenizer}"),
    ),
    (
        "data.name data.column data.train_glob data.test_glob",
        _if(
            lambda c: c.data.source == "builtin" and not c.data.private, "it is for other text than data.source=builtin"
        ),
    ),
    ("train.teacher", _if(lambda c: not c.train.distill, "train.distill=0 never asks it, train.distill=0.5 would")),
    ("train.decay", _if(lambda c: c.train.schedule != "wsd", "it is for train.schedule=wsd")),
    (
        "aggregate.server_lr aggregate.momentum aggregate.beta2 aggregate.tau",
        _if(lambda c: c.aggregate.optimizer == "mean", "aggregate.optimizer=mean has no settings"),
    ),
    (
        "train.weighting",
        _if(
            lambda c: c.aggregate.rule in ("median", "trimmed_mean"),
            "aggregate.rule={0.aggregate.rule} weighs all workers alike",
        ),
    ),
    ("eval.watch_windows eval.federated", _if(lambda c: c.eval.every == 0, "eval.every=0 evaluates at the end alone")),
    ("eval.tickets", _if(lambda c: not c.eval.sizes, "eval.sizes=[] draws none")),
    (
        "flower.flight",
        _if(lambda c: c.flower.transport in ("shm", "inline"), "flower.transport={0.flower.transport} does not use it"),
    ),
    ("flower.flight_certificate flower.flight_key", _if(lambda c: not c.flower.flight, "flower.flight is not set")),
    ("flower.gpus_per_worker", _if(lambda c: c.train.device == "cpu", "train.device=cpu leaves GPUs alone")),
)


def check_effects(config: Any, before: Any, given: Iterable[str]) -> None:
    """Raises ConfigError for a key of `given` that is not what it was `before` and changes nothing."""
    wanted = set(given)
    for keys, reason in _IDLE:
        for key in sorted(wanted & set(keys.split())):
            value = _value(config, key)
            if value != _value(before, key) and (why := reason(config)):
                raise ConfigError(f"{key}={_written(value)} changes nothing: {why}. Leave it out")


def _value(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _written(value: Any) -> str:
    """As in key=value."""
    return ",".join(map(str, value)) if isinstance(value, list) else value if isinstance(value, str) else shown(value)

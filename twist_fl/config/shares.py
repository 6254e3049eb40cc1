"""A share where blocks are counted (0.5, 50%, 1/2): what it comes to of the model at hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NoReturn

from twist_fl.blueprint.architectures import known_architecture
from twist_fl.config.hub import expanded
from twist_fl.system.errors import ConfigError

DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d", "-"))
"""A minus sign is often a dash in what is pasted from a page."""


class ShareError(ConfigError):
    """A share stands where a number of blocks does: `given` as typed, `numbers` what it says."""

    def __init__(self, key: str, given: Sequence[str], numbers: Sequence[Fraction]) -> None:
        super().__init__(f"{key}={','.join(given)} counts blocks, and is given a share")
        self.key, self.given, self.numbers = key, given, numbers


def is_share(share: Fraction, item: Any) -> bool:
    return 0 < share < 1 or (0 < share <= 1 and ("/" in str(item) or "%" in str(item)))


def share_of(item: Any) -> Fraction | None:
    """0.5, .5, 50% and 1/2 as shares; None for what is no number."""
    text = str(item).strip().translate(DASHES)
    percent = text.endswith("%")
    try:
        share = Fraction(text.removesuffix("%").strip())
    except (ValueError, ZeroDivisionError):
        return None
    return share / 100 if percent else share


def blocks_of_share(error: ShareError, of: int, what: str) -> str:
    """'num_sub=0.5 must be a number of blocks, 1 to 12 (heads of a layer): 0.5 of 12 blocks is 6, use num_sub=6'."""
    steps, whole = list[str](), list[str]()
    for text, number in zip(error.given, error.numbers, strict=True):
        if not is_share(number, text):
            whole.append(text)
            continue
        blocks = number * of
        whole.append(str(max(1, round(blocks))))
        steps.append(f"{text} of {of} blocks is {float(blocks):.3g}")
    joined = " " if error.key.startswith("--") else "="
    return (
        f"{error.key}{joined}{','.join(error.given)} must be a number of blocks, 1 to {of} ({what}): "
        f"{', '.join(dict.fromkeys(steps))}, use {error.key}{joined}{','.join(whole)}"
    )


def refuse_share(config: Any, error: ShareError) -> NoReturn:
    """Says how many blocks the share is of the model that `config` is about. Raises ConfigError."""
    raise ConfigError(blocks_of_share(error, *_blocks(config, error.key))) from error


def _blocks(config: Any, key: str) -> tuple[int, str]:
    """Blocks of a layer and what they are; of a checkpoint that is not here, of the paper's model."""
    model = config.model
    of_ffn = key.endswith("num_sub_ffn") or config.blueprint.setting == "ffn"
    if of_ffn and config.blueprint.ffn_blocks:
        return config.blueprint.ffn_blocks, "FFN blocks of a layer"
    if not model.pretrained:
        heads = model.n_kv_head or model.n_head
        return heads, "heads of a layer" if heads == model.n_head else "key/value heads of a layer"
    file = expanded(model.pretrained) / "config.json"
    if file.is_file():
        fields: Mapping[str, Any] = json.loads(file.read_text())
        architecture = known_architecture(fields.get("model_type"))
        keys = architecture.keys if architecture else {}
        for name, what in (("n_kv_head", "key/value heads of a layer"), ("n_head", "heads of a layer")):
            if isinstance(heads := fields.get(keys.get(name, "")), int):
                return heads, what
    return model.n_head, "heads of a layer, here as GPT-2 small has"

"""A folder of a model, opened without running any code but ours and that of transformers, unless asked to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from twist_fl.blueprint.architectures import known_architecture
from twist_fl.model.hf_config import folder_config
from twist_fl.model.subnet_classes import model_class
from twist_fl.system.errors import ConfigError
from twist_fl.system.files import SEAL, check_seal
from twist_fl.system.untrusted import plain

_UNFIT = (SafetensorError, OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
"""What transformers raises of weights it cannot read, and of a config.json with values that it does not know."""


@contextmanager
def no_bars() -> Iterator[None]:
    """transformers shows no progress of its own: of a local folder it is a flash between the lines of a command."""
    bars: Any = logging  # untyped in transformers
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def open_model(folder: Path, trust_remote_code: bool = False) -> Any:
    """The model in `folder`: a ticket by this package's classes, any other by the classes of transformers.

    `trust_remote_code` runs the folder's own code instead. Raises ConfigError if the weights are not exactly those that
    its config says.
    """
    if (folder / SEAL).exists():
        check_seal(folder, others=True)
    auto: Any = AutoModelForCausalLM
    if not trust_remote_code:
        config = folder_config(str(folder), folder)
        if hasattr(config, "heads_per_layer") and known_architecture(config.model_type):
            auto = model_class(config.model_type)
    try:
        with no_bars():
            model, info = auto.from_pretrained(
                folder,
                trust_remote_code=trust_remote_code,
                weights_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except _UNFIT as error:
        why = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else str(error)
        raise ConfigError(f"{folder} holds no model that can be opened: {plain(' '.join(why.split()))}") from error
    for what in ("missing", "unexpected", "mismatched"):
        if wrong := info[f"{what}_keys"]:
            raise ConfigError(
                f"{folder} does not fit its config.json: {len(wrong)} parameters are {what}, for example "
                f"{min(map(str, wrong))}: give the whole model, with the config.json it was saved with"
            )
    return model

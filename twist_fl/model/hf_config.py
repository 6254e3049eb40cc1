"""The Hugging Face config of a run's model: a checkpoint's own, or one from the sizes of `config.model`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twist_fl.blueprint.architectures import (
    architecture_of,
    check_sizes,
    known_architecture,
    sizes_of,
    use_architecture,
)
from twist_fl.config.finding import listed, runs_in
from twist_fl.config.hub import local_path, reachable
from twist_fl.config.schema import Config, ModelConfig
from twist_fl.data.gguf_folder import SUFFIX, as_folder
from twist_fl.system.errors import ConfigError
from twist_fl.system.untrusted import Field, plain, read_fields

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def model_config(config: Config) -> PreTrainedConfig:
    """Of a model from scratch, the vocabulary is only known with the text. Raises ConfigError."""
    model, window = config.model, config.data.window
    use_architecture(model.architecture)
    if model.pretrained:
        loaded = pretrained_config(model.pretrained)
    else:
        loaded = config_from_dict(scratch_fields(model, config.data.vocab_size))
    context = loaded.max_position_embeddings
    if window > context:
        raise ConfigError(f"data.window={window} is longer than the model's context: use at most {context}")
    return loaded


def config_from_dict(fields: dict[str, Any]) -> PreTrainedConfig:
    """The inverse of `PreTrainedConfig.to_dict`."""
    from transformers import AutoConfig

    try:
        loaded: PreTrainedConfig = AutoConfig.for_model(**fields)
    except ValueError as error:
        raise ConfigError(f"transformers has no model of the model_type {fields.get('model_type')!r}") from error
    return loaded


def padding_token(fields: Mapping[str, Any]) -> int | None:
    """A config's own, else its end of text (the first, if it has several)."""
    if fields.get("pad_token_id") is not None:
        return int(fields["pad_token_id"])
    end = fields.get("eos_token_id")
    return end[0] if isinstance(end, list) else end


def pretrained_config(name: str, what: str = "") -> PreTrainedConfig:
    """A checkpoint's own; `what` is what errors call it.

    Raises ConfigError if there is none, or if its model cannot be divided."""
    what = what or f"model.pretrained={name!r}"
    folder = local_path("model.pretrained", name)
    if folder and (runs := runs_in(folder)):
        raise ConfigError(f"{what} holds runs: give {listed(runs)}")
    folder = folder and as_folder(folder)
    if folder and not (folder / "config.json").is_file():
        other = "a run that has a checkpoint, one of its checkpoints, a GGUF file, or a folder of a Hugging Face model"
        inside = sorted(folder.glob(f"*{SUFFIX}"))
        raise ConfigError(f"{what} holds no model (no config.json): give {listed(inside) if inside else other}")
    from transformers import AutoConfig, PreTrainedConfig

    if folder:
        loaded: Any = folder_config(what, folder)
    else:
        with reachable(what):
            loaded = AutoConfig.from_pretrained(name)
    try:
        architecture_of({"model_type": loaded.model_type})
    except ValueError as error:
        raise ConfigError(f"{what}: {error}") from error
    if hasattr(loaded, "heads_per_layer"):
        raise ConfigError(f"{what} is a ticket, whose layers differ in size: give the run it was drawn from")
    assert isinstance(loaded, PreTrainedConfig)
    return loaded


def folder_config(what: str, folder: Path) -> Any:
    """A folder's config.json, of any model that transformers has classes for. Raises ConfigError."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        fields = read_fields((folder / "config.json").read_bytes(), {"model_type": Field(str)})
        if architecture := known_architecture(fields["model_type"]):
            check_sizes(architecture, fields, whole=False)
        return AutoConfig.from_pretrained(folder)
    except (StrictDataclassError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{what}: its config.json is not a model's: {plain(reason)}") from error


def scratch_fields(model: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """The config of a model of these sizes as far as it is not its architecture's default. Raises ConfigError."""
    architecture = use_architecture(model.architecture)
    sizes = {
        "n_layer": model.n_layer,
        "n_head": model.n_head,
        "n_kv_head": model.n_kv_head or model.n_head,
        "n_embd": model.n_embd,
        "n_inner": model.n_inner or 4 * model.n_embd,
        "n_positions": model.n_positions,
        "d_head": model.n_embd // model.n_head,
    }
    fields: dict[str, Any] = {key: sizes[name] for name, key in architecture.keys.items()}
    fields |= dict.fromkeys(architecture.dropout, model.dropout) | dict(architecture.scratch)
    fields |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    fields |= {"model_type": architecture.model_type, "vocab_size": vocab_size}
    try:
        sizes_of(architecture, fields)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return fields

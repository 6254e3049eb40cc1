"""What must fit together before a run starts: text and batches, vocabulary and model, few workers and all blocks."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twist_fl.blueprint.blocks import Layout
from twist_fl.blueprint.division import Division
from twist_fl.config.schema import Config
from twist_fl.config.sizes import smallest_share
from twist_fl.data.corpus import Corpus
from twist_fl.data.tokenizer import load_tokenizer
from twist_fl.model.hf_config import folder_config
from twist_fl.system.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def fit_batches(config: Config, num_windows: int) -> None:
    """Raises ConfigError if a worker's part of one text is less than a batch."""
    train = config.train
    windows = num_windows // train.workers
    if train.batch_size > windows:
        raise ConfigError(
            f"train.batch_size={train.batch_size} is more than the {windows} windows of data.window="
            f"{config.data.window} tokens that each of {train.workers} workers has: use at most {windows}"
        )


def fit_vocabulary(config: Config, model: PreTrainedConfig, corpus: Corpus) -> None:
    """A model from scratch takes the tokenizer's vocabulary; a pretrained one must have room for it."""
    if not config.model.pretrained:
        model.vocab_size = corpus.vocab_size
        model.bos_token_id = model.eos_token_id = corpus.end_token
    elif model.vocab_size < corpus.vocab_size:
        raise ConfigError(
            f"the tokenizer has {corpus.vocab_size} tokens and model.pretrained={config.model.pretrained!r} only "
            f"{model.vocab_size}: leave data.tokenizer out, or give the model's own"
        )


def check_fraction(config: Config, layout: Layout, division: Division) -> None:
    """Raises ConfigError if the workers that train.fraction may leave a round cannot cover all blocks."""
    try:
        smallest_share(config, division).check(layout)
    except ValueError as error:
        raise ConfigError(
            f"train.fraction={config.train.fraction:g} of {config.train.workers} workers: {error}"
        ) from error


def teacher_fields(name: str) -> dict[str, Any]:
    """The config of the model in train.teacher=`name`. Raises ConfigError where there is none."""
    if not (Path(name) / "config.json").is_file():
        raise ConfigError(
            f"train.teacher={name!r} is no folder of a model: give one with its config.json and weights, or a run; one "
            "on the hub has to be downloaded first"
        )
    fields: dict[str, Any] = folder_config(f"train.teacher={name!r}", Path(name)).to_dict()
    return fields


def weights_digest(folder: Path) -> str:
    """SHA-256 of the files that weights may be in, by name."""
    content = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")):
        with file.open("rb") as opened:
            content.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return content.hexdigest()


def check_weights(config: Config, digest: str | None) -> None:
    """Raises ConfigError if the run's teacher is not here, or has other weights than those of `digest`."""
    if not config.train.distill:
        return
    name = str(config.train.teacher)
    if not Path(name).is_dir():
        raise ConfigError(f"train.teacher={name!r} is not on this machine: copy it to the same place")
    if weights_digest(Path(name)) != digest:
        raise ConfigError(
            f"train.teacher={name!r} has other weights than when the run began: bring those back, or name the folder "
            "where they are now"
        )


def check_teacher(config: Config, layout: Layout, tokenizer: Path) -> str | None:
    """The digest of the teacher's weights, if there is one.

    Raises ConfigError for a teacher of other tokens than those of the folder `tokenizer`, or of a context shorter than
    a window. A teacher without a tokenizer is taken to have this one.
    """
    if not config.train.distill:
        return None
    name = str(config.train.teacher)
    fields = teacher_fields(name)
    vocabulary, window = layout.sizes["vocab"], config.data.window
    if fields.get("vocab_size") != vocabulary:
        raise ConfigError(
            f"train.teacher={name!r} has a vocabulary of {fields.get('vocab_size')} tokens, and the model one of "
            f"{vocabulary}: give a teacher with the same tokenizer"
        )
    if (Path(name) / "tokenizer.json").is_file():
        theirs, ours = (load_tokenizer(str(folder)).get_vocab() for folder in (name, tokenizer))
        if theirs != ours:
            token = min(theirs.items() ^ ours.items())[0]
            raise ConfigError(
                f"train.teacher={name!r} has another tokenizer than the text (token {token!r}: {theirs.get(token)}, "
                f"here {ours.get(token)}): give a teacher with the same one"
            )
    context = fields.get("max_position_embeddings") or fields.get("n_positions") or window
    if context < window:
        raise ConfigError(f"train.teacher={name!r} has a context of {context} tokens: use data.window={context}")
    return weights_digest(Path(name))

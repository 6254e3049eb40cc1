"""The nearest right thing: a setting, a choice, a name, for what was typed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

KEY_SYNONYMS = {
    "name": "run_name experiment exp_name project",
    "algorithm": "algo method strategy aggregation",
    "seed": "random_seed manual_seed rng",
    "dir": "output_dir out_dir out output save_dir log_dir run_dir folder work_dir",
    "checkpoint_every": "save_steps save_every checkpoint_freq save_interval",
    "model.pretrained": "model_name model_name_or_path model_id model_path checkpoint pretrained_model base_model "
    "init_from model.name model.path",
    "model.architecture": "model_type arch family",
    "model.n_layer": "num_layers num_hidden_layers layers n_layers depth",
    "model.n_head": "num_heads num_attention_heads heads n_heads attention_heads",
    "model.n_kv_head": "num_key_value_heads kv_heads num_kv_heads",
    "model.n_embd": "hidden_size d_model hidden_dim embed_dim embedding_size width n_embed dim",
    "model.n_inner": "intermediate_size ffn_dim d_ff ffn_size mlp_dim",
    "model.n_positions": "max_position_embeddings context context_length context_size n_ctx",
    "data.source": "dataset dataset_name data_set corpus",
    "data.path": "data_dir dataset_path train_file data_path text text_file data_root",
    "data.name": "dataset_config config_name dataset_config_name subset",
    "data.column": "text_column text_field text_key text_column_name content_column",
    "data.train_glob": "split train_split",
    "data.test_glob": "test_split eval_split validation_split validation_file test_file",
    "data.test_fraction": "test_size val_fraction validation_split_percentage",
    "data.tokenizer": "tokenizer_name tokenizer_path",
    "data.vocab_size": "vocab vocabulary n_vocab",
    "data.window": "seq_len sequence_length seq_length block_size max_length max_seq_len max_seq_length bptt",
    "blueprint.num_sub": "sparsity kappa keep ratio density keep_ratio prune_ratio pruning_ratio n_sub subnet_size "
    "width_multiplier capacity blocks num_blocks num_sub_ffn",
    "blueprint.common": "num_common",
    "blueprint.setting": "prune divide target",
    "blueprint.policy": "sampling selection",
    "train.workers": "num_clients clients n_clients client num_workers n_workers num_nodes nodes num_supernodes "
    "world_size nproc_per_node",
    "train.fraction": "fraction_fit fraction_train client_fraction participation participation_rate frac "
    "sample_fraction clients_per_round",
    "train.interval": "local_steps local_epochs local_iterations sync_every num_local_steps local_updates",
    "train.batch_size": "batch bs per_device_train_batch_size train_batch_size micro_batch_size",
    "train.epochs": "num_epochs num_train_epochs n_epochs",
    "train.rounds": "num_rounds n_rounds communication_rounds num_server_rounds max_steps steps global_rounds",
    "train.lr": "learning_rate learningrate step_size eta",
    "train.beta1": "adam_beta1 betas",
    "train.schedule": "scheduler lr_scheduler lr_schedule lr_scheduler_type",
    "train.warmup": "warmup_steps warmup_ratio warm_up",
    "train.clip_norm": "max_grad_norm grad_clip clip gradient_clipping",
    "train.optimizer": "optim optimiser",
    "aggregate.rule": "aggregator aggregation_rule robust_aggregation",
    "aggregate.server_lr": "server_learning_rate outer_lr",
    "aggregate.momentum": "server_momentum outer_momentum",
    "aggregate.optimizer": "server_optimizer outer_optimizer",
    "train.beta2": "adam_beta2",
    "train.eps": "adam_epsilon epsilon",
    "train.weight_decay": "wd l2",
    "train.threads": "num_threads omp_num_threads",
    "train.device": "gpu cuda accelerator use_gpu no_cuda",
    "train.precision": "dtype fp16 bf16 amp torch_dtype mixed_precision autocast",
    "train.compile": "torch_compile",
    "eval.every": "eval_every eval_steps eval_interval evaluate_every",
    "eval.federated": "fraction_evaluate fraction_eval federated_evaluation client_evaluation evaluate_clients",
    "eval.batch_size": "eval_batch_size per_device_eval_batch_size test_batch_size",
    "eval.sizes": "ticket_sizes",
    "eval.tickets": "num_tickets draws",
    "flower.round_timeout": "timeout",
    "flower.gpus_per_worker": "num_gpus gpus client_gpus",
    "flower.cpus_per_worker": "num_cpus cpus client_cpus",
    "deploy.devices": "edge_devices",
}
"""What other tools call a setting, by our name for it."""

NO_SETTING = {
    "alpha dirichlet iid partition partitioner": "each worker gets an equal random part of the text (i.i.d.)",
    "gradient_accumulation_steps accumulation_steps": "batches are not split: train.batch_size is what a worker takes "
    "at once",
}
"""Settings of other tools that have no counterpart, and what is so here."""

CHOICE_SYNONYMS = {
    "files": "text txt folder local path custom own dir csv jsonl",
    "wikitext": "wiki wikitext103 wikitext2",
    "hub": "huggingface hf datasets hfhub",
    "builtin": "default demo python",
    "attn": "heads head attention mha",
    "ffn": "mlp feedforward",
    "both": "all",
    "float32": "fp32 f32 full single",
    "bfloat16": "bf16 mixed amp",
    "float16": "fp16 half f16",
    "gpt_neox": "pythia neox gptneox",
    "gpt2": "gpt openaigpt",
    "fedavg": "federatedaveraging fed avg",
    "ddp": "distributeddataparallel sgd",
    "true": "physical sliced yes",
    "masked": "mask",
    "shm": "sharedmemory memory shared",
    "inline": "grpc message messages network",
    "reset": "none no stateless",
}


def _plain(word: str) -> str:
    """learningRate, learning-rate and LEARNING_RATE are one."""
    return word.lower().replace("_", "").replace("-", "")


_KEYS = {_plain(word): key for key, words in KEY_SYNONYMS.items() for word in words.split()}
_NOTES = {_plain(word): note for words, note in NO_SETTING.items() for word in words.split()}
_CHOICES = {_plain(word): choice for choice, words in CHOICE_SYNONYMS.items() for word in words.split()}


def closest(word: str, words: Iterable[str], likeness: float = 0.6) -> str | None:
    """The one of `words` that is most like `word`, if any is (1 is equal); capitals do not count."""
    by_case = {known.lower(): known for known in words}
    begun = [known for known in by_case if len(word) > 2 and known.startswith(word.lower())]
    if len(begun) == 1:
        return by_case[begun[0]]
    close = difflib.get_close_matches(word.lower(), by_case, n=1, cutoff=likeness)
    return by_case[close[0]] if close else None


def nearest(word: str, words: Iterable[str]) -> str:
    """', did you mean 'demo'?', or nothing."""
    close = closest(word, words)
    return f", did you mean {close!r}?" if close else ""


def choice(word: str, choices: Sequence[str]) -> str:
    """As `nearest`, of a setting's choices, by what others call them too."""
    named = _CHOICES.get(_plain(word))
    found = [known for known in choices if _plain(known) == _plain(word) or known == named]
    return f", did you mean {found[0]!r}?" if found else nearest(word, choices)


def setting_paths(schema: Any, prefix: str = "") -> Iterator[str]:
    """Every key that takes a value, with its sections: train.lr."""
    for field in fields(schema):
        default = getattr(schema(), field.name)
        if is_dataclass(default):
            yield from setting_paths(type(default), f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def settings_named(key: str, schema: Any) -> list[str]:
    """The settings that an unknown `key` (dotted or not) names: in another section, or as other tools do."""
    if found := _KEYS.get(_plain(key)):
        return [found]
    plain = _plain(key.rpartition(".")[2])
    same = [path for path in setting_paths(schema) if _plain(path.rpartition(".")[2]) == plain]
    return same or ([_KEYS[plain]] if plain in _KEYS else [])


def settings_like(key: str, schema: Any) -> list[str]:
    """`settings_named`, else the nearest name in the key's section, else in any."""
    section, _, name = key.rpartition(".")
    if (found := settings_named(key, schema)) or _plain(name) in _NOTES:
        return found
    named: dict[str, list[str]] = {}
    for path in setting_paths(schema):
        named.setdefault(_plain(path.rpartition(".")[2]), []).append(path)
    inside = [plain for plain, paths in named.items() if any(path.startswith(f"{section}.") for path in paths)]
    if section and (close := difflib.get_close_matches(_plain(name), inside, n=1)):
        return [path for path in named[close[0]] if path.startswith(f"{section}.")]
    return [path for close in difflib.get_close_matches(_plain(name), named, n=1) for path in named[close]]


def meant(key: str, schema: Any, known: Iterable[str] = ()) -> str:
    """What to say behind an unknown key: ', did you mean 'train.lr'?', what is so here, or the keys known there."""
    if found := settings_like(key, schema):
        return f", did you mean {' or '.join(map(repr, found))}?"
    if note := _NOTES.get(_plain(key.rpartition(".")[2])):
        return f": {note}"
    return f"; known here: {', '.join(known)}" if known else ""

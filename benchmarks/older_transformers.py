"""Tickets of every architecture, opened and run by other versions of transformers, each in a process of its own.

    pip install --target /tmp/4.46 --no-deps transformers==4.46.3 "tokenizers<0.21" "huggingface_hub<1"
    python benchmarks/older_transformers.py /tmp/4.46 ...

torch and the rest come from the environment that runs this. A line for each ticket and version: the relative error of
its logits against ours, or the last line of what failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from twist_fl.blueprint.blocks import make_layout
from twist_fl.blueprint.division import Division
from twist_fl.blueprint.drawing import draw_ticket
from twist_fl.data.tokenizer import load_tokenizer, train_tokenizer
from twist_fl.model.hf_config import config_from_dict
from twist_fl.model.subnet import ModelCache
from twist_fl.tickets.export import export_ticket, make_ticket

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from families import CONFIGS, FFN_BLOCKS

TEXTS = ["the cat", "the cat sat on , a mat .<|endoftext|>the dog"]
_ROTATED = {
    "llama theta": {"rope_type": "default", "rope_theta": 500000.0},
    "llama llama3": {
        **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8},
    },
    "mistral theta": {"rope_type": "default", "rope_theta": 1e6},
    "qwen2 theta": {"rope_type": "default", "rope_theta": 1e6},
    "qwen3 theta": {"rope_type": "default", "rope_theta": 1e6},
    "gpt_neox rotated": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
}
"""Rotations that are not the defaults: a version that does not read them gives other logits."""

OPENED = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, scratch = sys.argv[1:]
expected = torch.load(folder + "/../expected.pt")
tokenizer = AutoTokenizer.from_pretrained(folder)
texts = json.load(open(folder + "/../texts.json"))
assert [tokenizer(text)["input_ids"] for text in texts] == expected["tokens"], "tokens"
assert [tokenizer.decode(ids) for ids in expected["tokens"]] == texts, "decoded"
padded = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
assert sorted(padded) == ["attention_mask", "input_ids"], "inputs " + str(list(padded))
assert padded["input_ids"].shape[1] == min(12, max(map(len, expected["tokens"]))), "padding"
model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert type(model).__name__.startswith("Subnet") and not any(info.values()), info
def logits(model):
    with torch.inference_mode():
        return model.eval()(torch.arange(40, 52)[None]).logits
def error(model):
    got = logits(model)
    return float((got - expected["logits"]).norm() / expected["logits"].norm())
found = error(model)
inputs = tokenizer(texts[0], return_tensors="pt")
made = [model.generate(**inputs, do_sample=False, max_new_tokens=5, use_cache=c).tolist() for c in (True, False)]
assert made[0] == made[1] and len(made[0][0]) == 5 + inputs["input_ids"].shape[1], "generated"
model.save_pretrained(scratch + "/again")
assert error(AutoModelForCausalLM.from_pretrained(scratch + "/again", trust_remote_code=True)) == found, "saved again"
whole = AutoModelForCausalLM.from_config(type(model.config).__mro__[1](**expected["config"]))
assert not type(whole).__name__.startswith("Subnet"), "plain models open as tickets"
print(transformers.__version__, found)
"""


def tickets() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, config in CONFIGS.items():
        yield name, config.to_dict()
    for name, rope in _ROTATED.items():
        yield name, CONFIGS[name.split()[0]].to_dict() | {"rope_parameters": rope}


def export(fields: dict[str, Any], tokenizer: Path, folder: Path) -> None:
    fields = fields | {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    config = config_from_dict(fields)
    layout = make_layout(config.to_dict(), FFN_BLOCKS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = {param.name: 0.3 * torch.randn(param.shape) for param in layout.params}
    blueprint = draw_ticket(layout, Division("both", ((2, 3),) * 2, 1, 1), (2, 3), 0, 0)
    export_ticket(make_ticket(layout, state, config.to_dict(), blueprint, "sqrt"), folder / "ticket", tokenizer)
    ours: Any = ModelCache(config, layout, "sqrt").load_sliced(blueprint, state)
    ours.eval()
    with torch.inference_mode():
        logits = ours(torch.arange(40, 52)[None]).logits
    tokens = [load_tokenizer(str(tokenizer))(text)["input_ids"] for text in TEXTS]
    torch.save({"logits": logits, "tokens": tokens, "config": fields}, folder / "expected.pt")
    (folder / "texts.json").write_text(json.dumps(TEXTS))


def opened(folder: Path, libraries: Path | None) -> str:
    """The error of the logits, or what failed."""
    with tempfile.TemporaryDirectory() as scratch:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{scratch}/modules", "OMP_NUM_THREADS": "1"}
        if libraries:
            environment["PYTHONPATH"] = str(libraries.resolve())
        command = [sys.executable, "-c", OPENED, str(folder / "ticket"), scratch]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=scratch)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1][:160]
    version, error = done.stdout.split()[-2:]
    return f"{float(error):.0e} ({version})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("libraries", type=Path, nargs="*", help="folders of pip install --target")
    parser.add_argument("--only", nargs="*", help="tickets by name")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = Path(scratch) / "tokenizer"
        trained = train_tokenizer(["the cat sat on , a mat . the dog"] * 9, 300)
        trained.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
        trained.save_pretrained(tokenizer)
        for name, fields in tickets():
            if given.only and name not in given.only:
                continue
            folder = Path(scratch) / name.replace(" ", "-")
            folder.mkdir()
            export(fields, tokenizer, folder)
            for libraries in [*given.libraries, None]:
                print(f"{name:22} {libraries.name if libraries else 'here':10} {opened(folder, libraries)}", flush=True)


if __name__ == "__main__":
    main()

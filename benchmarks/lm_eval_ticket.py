"""A ticket in EleutherAI's lm-eval: a task of a local text, beside what plain transformers gives for the same text.

    pip install "lm-eval[hf]"
    twist-fl export RUN --size 1/2 --out ticket        # or --format hf
    python benchmarks/lm_eval_ticket.py ticket my_text.txt

A text of fewer tokens than the model's context, read once: the two numbers must agree to 0.1 %, or the status is 1.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

TASK = """
task: local_text
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: byte_perplexity
"""


def by_lm_eval(folder: Path, text: str) -> float:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "text.jsonl"
        file.write_text(json.dumps({"text": text}))
        (Path(scratch) / "local_text.yaml").write_text(TASK.format(file=file))
        found: Any = simple_evaluate(
            model="hf",
            model_args=f"pretrained={folder},trust_remote_code=True,dtype=float32",
            tasks=["local_text"],
            task_manager=TaskManager(include_path=scratch, include_defaults=False),
            device="cpu",
            bootstrap_iters=0,
        )
    return float(found["results"]["local_text"]["byte_perplexity,none"])


def by_transformers(folder: Path, text: str) -> float:
    """exp(nats / byte): every token after the end-of-text token, in one window."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    window = torch.cat([torch.tensor([[tokenizer.eos_token_id]]), ids], 1)
    with torch.inference_mode():
        logits = model.eval()(window).logits[0, :-1]
    nats = torch.nn.functional.cross_entropy(logits, ids[0], reduction="sum")
    return math.exp(float(nats) / len(text.encode()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an exported ticket: compact or hf")
    parser.add_argument("text", type=Path)
    given = parser.parse_args()
    text = given.text.read_text()
    theirs, ours = by_lm_eval(given.folder, text), by_transformers(given.folder, text)
    print(f"perplexity a byte: lm-eval {theirs:.6f}, transformers {ours:.6f}, ratio {theirs / ours:.6f}")
    raise SystemExit(abs(theirs / ours - 1) > 1e-3)


if __name__ == "__main__":
    main()

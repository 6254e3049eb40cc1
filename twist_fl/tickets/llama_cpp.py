"""What llama.cpp says of a GGUF file: `python -m twist_fl.tickets.llama_cpp FILE`, asked on standard input.

In a process of its own, since llama.cpp ends its process where it meets what it did not expect. No torch here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twist_fl.system.errors import LaunchError

_FORCE = 1e4
"""A bias that makes any token the likeliest; the probability that is told is the one without it."""


def ask(file: Path, tokens: Sequence[int], text: str, token_of_text: int) -> dict[str, Any]:
    """`logprobs` of each of `tokens` after the first and the `likeliest` there; `text_tokens`, those of `text`.

    llama.cpp tells nothing of a token that is a part of a letter only: its logprob is None. `token_of_text` is one of
    which it does. Raises LaunchError with the end of what llama.cpp said, if it does not open the file.
    """
    asked = {"tokens": list(tokens), "text": text, "token_of_text": token_of_text}
    command = [sys.executable, "-m", "twist_fl.tickets.llama_cpp", str(file)]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaunchError(f"llama.cpp does not open the file that was written: {done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def answer(file: str, asked: dict[str, Any]) -> dict[str, Any]:
    import xllamacpp

    params, context = xllamacpp.CommonParams(), max(64, len(asked["tokens"]) + 1)
    params.model.path = file
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = context, 1, 0, False
    # As the ticket computes: numbers of 32 bits in the cache, too, and one thread.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)

    def complete(prompt: Any, forced: int) -> dict[str, Any]:
        bias = [[forced, _FORCE]]
        given = {"prompt": prompt, "temperature": 0, "logprobs": 1, "n_predict": 1, "logit_bias": bias}
        found: dict[str, Any] = server.handle_completions(given)
        if "choices" not in found:
            raise RuntimeError(f"llama.cpp answers {found}")
        return found

    def said(prompt: Sequence[int], forced: int) -> dict[str, Any] | None:
        """What is told of a token that is forced to be next."""
        told = complete(prompt, forced)["choices"][0]["logprobs"]
        if told is None:
            return None
        (only,) = told["content"]
        if only["id"] != forced:
            raise RuntimeError(f"llama.cpp chose token {only['id']}, which was to be {forced}")
        return dict(only)

    tokens, logprobs, likeliest = asked["tokens"], list[float | None](), list[int]()
    for place, token in enumerate(tokens[1:], start=1):
        found = said(tokens[:place], token)
        logprobs.append(found["logprob"] if found else None)
        other = found or said(tokens[:place], asked["token_of_text"])
        if other is None:
            raise RuntimeError(f"llama.cpp tells nothing of token {asked['token_of_text']}")
        likeliest.append(other["top_logprobs"][0]["id"])
    counted = complete(asked["text"], asked["token_of_text"])["usage"]["prompt_tokens"]
    return {"logprobs": logprobs, "likeliest": likeliest, "text_tokens": counted}


if __name__ == "__main__":
    print("\n" + json.dumps(answer(sys.argv[1], json.load(sys.stdin))))

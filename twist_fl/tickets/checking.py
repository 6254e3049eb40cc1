"""Is an export the ticket? What a runtime says of tokens that the ticket wrote, beside what the ticket says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, isfinite
from typing import Any

import torch

from twist_fl.blueprint.architectures import architecture_of
from twist_fl.blueprint.blocks import make_layout
from twist_fl.model.hf_config import config_from_dict
from twist_fl.model.subnet import build_model, load_state
from twist_fl.system.errors import ConfigError, LaunchError
from twist_fl.tickets.export import Ticket

TOKENS = 48
"""Enough to tell a wrong rotation, which shows at far positions, and still quick."""
OFF_PERCENT, TIE = 0.1, 1e-3
"""Of an export with the ticket's own numbers: how far its perplexity may be off, and how far in nats a token that it
finds likeliest may be below the one that the ticket does."""


@dataclass(frozen=True)
class Answers:
    """Of a runtime, at every token but the last, given those before: the log-probability of the next one, None where
    it does not tell, and which is the likeliest."""

    logprobs: Sequence[float | None]
    likeliest: Sequence[int]


def check_dtype(format: str, dtype: str, known: Sequence[str]) -> None:
    if dtype not in known:
        raise ConfigError(f"--dtype {dtype!r}: the format {format} has {', '.join(known)}")


class Probe:
    """Tokens of the ticket's own: half are drawn from its distributions, so that their perplexity is that of its texts,
    and half are its greedy continuation, so that a runtime that finds the same tokens likeliest writes the same."""

    def __init__(self, ticket: Ticket) -> None:
        self.model = ticket_model(ticket)
        context = ticket.model_config[architecture_of(ticket.model_config).keys["n_positions"]]
        self.tokens = _written(self.model, ticket.model_config, min(TOKENS, context))

    def compare(self, answers: Answers, exact: bool) -> str:
        """In words. Raises LaunchError if an export that is `exact` does not say what the ticket says."""
        asked = len(self.tokens) - 1
        told = [place for place, logprob in enumerate(answers.logprobs) if logprob is not None]
        if not told or len(answers.logprobs) != asked or len(answers.likeliest) != asked:
            raise LaunchError(f"the export cannot be checked: it answers {len(told)} of {asked} questions")
        said = distributions(self.model, self.tokens)[:-1]
        mine = said.gather(1, torch.tensor(self.tokens[1:])[:, None])[told, 0]
        theirs = torch.tensor([answers.logprobs[place] for place in told], dtype=torch.float64)
        off = 100 * (exp(float((mine - theirs).mean())) - 1)
        likeliest = torch.tensor(answers.likeliest)
        below = float((said.amax(1) - said.gather(1, likeliest[:, None])[:, 0]).max())
        same = int((said.argmax(1) == likeliest).sum())
        words = f"{same} of {asked} likeliest tokens are the ticket's, perplexity {abs(off):.2g} % off"
        if not isfinite(off) or (exact and (abs(off) > OFF_PERCENT or below > TIE)):
            raise LaunchError(
                f"the export is not the ticket: {words}, where at most {OFF_PERCENT} % and the same tokens are "
                "expected: nothing was written; this is a defect, please report it with the model's config.json"
            )
        return words


def ticket_model(ticket: Ticket) -> Any:
    """The ticket in float32, as this package's own classes compute it."""
    layout = make_layout(ticket.model_config, ticket.blueprint.num_blocks[1])
    model: Any = build_model(config_from_dict(ticket.model_config), layout, ticket.blueprint, "none")
    load_state(model, ticket.params)
    return model.eval()


def answers(said: torch.Tensor, tokens: Sequence[int]) -> Answers:
    """Of a runtime's logits at every one of `tokens`."""
    found = said[:-1].double().log_softmax(1)
    return Answers(found.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist(), found.argmax(1).tolist())


@torch.inference_mode()
def distributions(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Log-probabilities of all tokens at every position, of a model of transformers."""
    logits: torch.Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits.double().log_softmax(1)


@torch.inference_mode()
def _written(model: Any, config: dict[str, Any], length: int) -> list[int]:
    """Always the same, after its begin or end of text."""
    ends = [config.get(name) for name in ("bos_token_id", "eos_token_id")]
    firsts = [end[0] if isinstance(end, list) else end for end in ends]
    tokens, cache = [next((first for first in firsts if first is not None), 0)], None
    generator = torch.Generator().manual_seed(0)
    while len(tokens) < length:
        output = model(torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True)
        cache, logits = output.past_key_values, output.logits[0, -1].float()
        drawn = len(tokens) < length // 2
        next_one = torch.multinomial(logits.softmax(0), 1, generator=generator) if drawn else logits.argmax()
        tokens.append(int(next_one))
    return tokens

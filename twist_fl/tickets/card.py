"""The README.md beside every exported ticket: what it is, where it comes from, and what was checked."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from twist_fl import __version__
from twist_fl.system.units import perplexity_text
from twist_fl.system.untrusted import plain
from twist_fl.tickets.export import Ticket, keep


@dataclass(frozen=True)
class Source:
    """Where a ticket comes from."""

    name: str
    """Of the run, or of the model."""
    rounds: int | None
    """Of training; None of a model as it is."""
    base: str | None
    """The checkpoint that training began with; None from scratch."""
    licence: str | None
    """The base's, as its model card has it."""
    test: str | None = None
    """The ticket's perplexity, in words, if it is known."""


def licence_of(folder: Path | None) -> str | None:
    """What the model card in a folder says."""
    file = folder / "README.md" if folder else None
    if file is None or not file.is_file():
        return None
    head = re.match(r"---\n(.*?)\n---", file.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = re.search(r"^license: *['\"]?([\w.+-]+)['\"]? *$", head[1], re.MULTILINE) if head else None
    return found[1] if found else None


def known_perplexity(value: float, tokens: int) -> str:
    return f"{perplexity_text(value)} on {tokens:,} test tokens, of the ticket in float32"


_OPENED_BY = {
    "compact": 'AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)  # modeling_subnet.py is in it',
    "hf": 'AutoModelForCausalLM.from_pretrained("FOLDER")',
    "gguf": "llama-cli -m FOLDER/model.gguf -p TEXT",
    "onnx": 'onnxruntime.InferenceSession("FOLDER/model.onnx")  # beside it: tokenizer.json',
}


def model_card(ticket: Ticket, source: Source, format: str, dtype: str, checked: str | None, size: str) -> str:
    kappa = ", ".join(f"{share:.3g} of {kind}" for kind, share in keep(ticket.blueprint).items())
    trained = source.rounds is not None
    rows = {
        "source": f"run `{plain(source.name)}` after {source.rounds} rounds of training with twist_fl {__version__}"
        if trained
        else f"`{plain(source.name)}` as it is, drawn with twist_fl {__version__}",
        "base model": plain(source.base) if source.base else "none, trained from scratch",
        "licence": source.licence or ("that of the base model" if source.base else "none was stated"),
        "blocks kept (kappa)": kappa,
        "parameters": f"{ticket.num_params:,}",
        "perplexity": source.test or "not measured",
        "format": f"{format}, {dtype}, {size} on disk",
        "checked": checked or "not by its format",
        "hash of the ticket in float32": f"`{ticket.digest}`",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    front = ["library_name: transformers"] * (format in ("compact", "hf")) + ["pipeline_tag: text-generation"]
    front += [f"license: {source.licence}"] * bool(source.licence)
    opened = f"\n```\n{_OPENED_BY[format]}\n```\n" if format in _OPENED_BY else ""
    blueprint = json.dumps(json.loads(ticket.blueprint.to_json()))
    what = "transformer that was trained by TwIST (arXiv 2511.03983)" if trained else "transformer"
    return (
        f"---\n{chr(10).join(front)}\n---\n\n# A ticket of {plain(source.name)}\n\n"
        f"A random structured subnet of a {what}: whole heads and "
        f"neurons are left out, and what is left is dense.\n{opened}\n| | |\n|---|---|\n{table}\n\n"
        f"Blueprint, the blocks kept of each layer:\n\n```json\n{blueprint}\n```\n"
    )

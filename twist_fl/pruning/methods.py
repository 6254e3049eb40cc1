"""Post-training pruning of a checkpoint: every method under one name and one signature (spec, section 9).

The divided layers and kinds alone are pruned, to the sparsity 1 - size / blocks of a layer: `sparsegpt`, `wanda`,
`zpruner` and `magnitude` set single weights of each matrix to zero; `block` and the random tickets `se` and
`se-unscaled` drop whole blocks and leave the weights alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from twist_fl.blueprint.blueprint import Blueprint, Scale
from twist_fl.blueprint.drawing import draw_ticket, full_blueprint
from twist_fl.config.shares import Size
from twist_fl.config.sizes import TicketSize, ticket_size
from twist_fl.data.corpus import Windows
from twist_fl.data.tokenizer import copy_tokenizer
from twist_fl.model.saved import no_bars
from twist_fl.model.subnet import State, get_state, load_state
from twist_fl.pruning import magnitude, sparsegpt, wanda, zpruner
from twist_fl.pruning.calibrate import Inputs, Matrix, Say, Statistic, divided_matrices, draw_windows, layer_inputs
from twist_fl.pruning.fisher import keep_best
from twist_fl.pruning.measure import measured
from twist_fl.pruning.names import CALIBRATED, METHODS, TICKETS
from twist_fl.system.errors import ConfigError
from twist_fl.system.files import new_folder
from twist_fl.system.threads import ranges
from twist_fl.tickets.evaluate import subnet_perplexity, ticket_distribution
from twist_fl.tickets.export import export_ticket, make_ticket
from twist_fl.training.importance import block_scores
from twist_fl.training.job import Job

PruneMatrix = Callable[[torch.Tensor, Inputs, Fraction, Say], torch.Tensor]
"""(weight (out, in), its inputs, share to remove, where to say what is unusual) -> the pruned weight."""

_WEIGHTS: dict[str, tuple[PruneMatrix, Statistic | None]] = {
    "sparsegpt": (sparsegpt.prune, sparsegpt.statistic),
    "wanda": (wanda.prune, wanda.statistic),
    "zpruner": (zpruner.prune, zpruner.statistic),
    "magnitude": (magnitude.prune, None),
}


@dataclass(frozen=True, eq=False)
class Pruned:
    """A checkpoint pruned to `size`, in blocks of each divided layer or as a share of its weights; and the cost."""

    method: str
    size: TicketSize
    params: State
    """Full shapes: with zeros, or, of methods that drop blocks, the checkpoint's own tensors."""
    blueprint: Blueprint | None
    """The kept blocks; None of methods that set single weights to zero."""
    scale: Scale
    """Of the output projections' inputs, in evaluation and when it is shipped."""
    seconds: float
    peak_bytes: int
    """See `measure.Cost`."""
    calibration_tokens: int
    notes: list[str] = field(default_factory=list)
    """What did not go as usual, for example more damping."""


def prune(
    job: Job,
    params: Mapping[str, torch.Tensor],
    method: str,
    size: Size | TicketSize,
    *,
    seed: int,
    calibration_windows: int = 128,
    say: Say = print,
) -> Pruned:
    """Prune the full state `params`, which is not changed, by one of METHODS. What is unusual is said at once.

    `seed` draws the calibration windows, and the ticket: the first of `ticket_distribution`. Raises ConfigError for an
    unknown method, an impossible size, more windows than there are or weights that are not finite.
    """
    if method not in METHODS:
        raise ConfigError(f"no pruning method {method!r}: choose one of {', '.join(METHODS)}")
    chosen = size if isinstance(size, TicketSize) else ticket_size(job.layout, job.division, size)
    for name, extremes in ranges(params).items():
        if not all(map(isfinite, extremes)):
            raise ConfigError(f"{name} has values that are not finite, of which nothing can be pruned: train it anew")
    state, blueprint, windows = dict(params), None, job.corpus.train[:0]
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        say(text)

    with measured(job.device()) as cost:
        if method in CALIBRATED:
            windows = draw_windows(job.corpus.train, calibration_windows, seed)
        if method in _WEIGHTS:
            state |= _prune_weights(job, params, method, chosen, windows, note)
        elif method == "block":
            blueprint = keep_best(job.layout, block_scores(job, params, windows), chosen.num_sub)
        else:
            blueprint = draw_ticket(job.layout, job.division, chosen.num_sub, seed, 0)
    # Michel et al. drop heads without a factor for the rest; a ticket has the factor it would have had in training.
    scale: Scale = job.config.blueprint.scale if method == "se" else "none"
    return Pruned(
        method, chosen, state, blueprint, scale, cost.seconds, cost.peak_bytes, int(windows.size), notes
    )  # fmt: skip


def _prune_weights(
    job: Job, params: Mapping[str, torch.Tensor], method: str, size: TicketSize, windows: Windows, note: Say
) -> State:
    """The pruned weights by name, layer by layer, each layer calibrated on what the pruned ones before it give."""
    prune_matrix, statistic = _WEIGHTS[method]
    matrices = divided_matrices(job.layout, job.division)
    layers: Iterable[tuple[list[Matrix], Mapping[str, Inputs]]]
    if statistic is None:
        weights = {matrix.param.name: params[matrix.param.name].clone() for matrix in matrices}
        layers = [(matrices, {matrix.module: Inputs(torch.empty(0), 0) for matrix in matrices})]
    else:
        model = job.models().load_sliced(full_blueprint(job.layout), params)
        weights = get_state(model)
        layers = layer_inputs(model, matrices, windows, job.config.eval.batch_size, statistic)
    for group, inputs in layers:
        for matrix in group:
            weight = weights[matrix.param.name]
            say, share = partial(_say_of, matrix, note), 1 - size.share_of(matrix.param.kind)
            matrix.put(prune_matrix(matrix.take(weight), inputs[matrix.module], share, say), weight)
    return {name: weights[name].to(params[name].device) for name in {matrix.param.name for matrix in matrices}}


def _say_of(matrix: Matrix, say: Say, text: str) -> None:
    say(f"{matrix.name}: {text}")


def pruned_perplexity(job: Job, pruned: Pruned, windows: Windows, batch_size: int) -> float:
    """Exact perplexity on `windows`: of the full-size model with zeros, or of the subnet of the kept blocks."""
    blueprint = pruned.blueprint or full_blueprint(job.layout)
    return subnet_perplexity(job.models(scale=pruned.scale), pruned.params, [blueprint], windows, batch_size)


def pruned_perplexities(
    job: Job, pruned: Pruned, windows: Windows, batch_size: int, *, draws: int, seed: int
) -> tuple[float, ...]:
    """Of a random ticket those of `draws` tickets, the first being `pruned`; of any other method the one there is."""
    if pruned.method not in TICKETS or pruned.size.is_whole:
        return (pruned_perplexity(job, pruned, windows, batch_size),)
    return ticket_distribution(
        job.models(scale=pruned.scale),
        pruned.params,
        job.division,
        pruned.size.num_sub,
        windows,
        tickets=draws,
        seed=seed,
        batch_size=batch_size,
    ).perplexities


def zeros(job: Job, pruned: Pruned) -> dict[str, tuple[int, int]]:
    """(weights that are zero or dropped, weights in all) of each matrix that pruning is about, by its name."""
    found = {}
    for matrix in divided_matrices(job.layout, job.division):
        weight = matrix.take(pruned.params[matrix.param.name])
        held = job.layout.held(matrix.param, pruned.blueprint)
        kept = weight.numel() if held is None else weight.numel() * len(held) // matrix.param.num_blocks
        left = int(weight.count_nonzero()) if pruned.blueprint is None else kept
        found[matrix.name] = weight.numel() - left, weight.numel()
    return found


def sparsity(job: Job, pruned: Pruned) -> float:
    """Share of the divided matrices' weights that are zero or dropped."""
    counted = zeros(job, pruned).values()
    return sum(zero for zero, _ in counted) / sum(num for _, num in counted)


def save_pruned(job: Job, pruned: Pruned, folder: Path) -> None:
    """Write `folder` for `AutoModelForCausalLM.from_pretrained`, tokenizer included.

    Unstructured: the plain full-size model with zeros in it. Structured: the small dense model, as tickets are shipped
    (trust_remote_code=True).
    """
    tokenizer_folder = job.corpus.tokenizer_folder
    if pruned.blueprint is not None:
        ticket = make_ticket(job.layout, pruned.params, job.model_config.to_dict(), pruned.blueprint, pruned.scale)
        export_ticket(ticket, folder, tokenizer_folder)
        return
    auto: Any = AutoModelForCausalLM  # untyped in transformers
    model = auto.from_config(job.model_config, dtype=torch.float32)  # a checkpoint in 16 bits was trained further in 32
    load_state(model, pruned.params)
    with new_folder(folder, sealed=True) as making, no_bars():
        model.save_pretrained(making)
        copy_tokenizer(tokenizer_folder, making)

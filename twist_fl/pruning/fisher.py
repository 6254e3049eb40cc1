"""Block Prune (after Michel et al., 2019): whole blocks go, those of lowest empirical Fisher information."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from twist_fl.blocks import KINDS, Kind, Layout
from twist_fl.blueprint import Blueprint, full_blueprint
from twist_fl.config import ConfigError
from twist_fl.data import Windows
from twist_fl.job import Job
from twist_fl.pruning.calibrate import divided_params
from twist_fl.train import next_token_loss

Scores = dict[tuple[Kind, int], npt.NDArray[np.float64]]


def block_scores(job: Job, params: Mapping[str, torch.Tensor], windows: Windows) -> Scores:
    """Empirical Fisher information of every block of each divided (kind, layer), an array over the layer's blocks.

    A block's score is the sum over its parameters (weights and its own biases) and over the windows of
    (d log p(window) / d parameter)^2. A window is a sample: gradients are squared one window at a time, never those
    of a batch, whose sum would cancel. Dropout is off; squares and sums are float64.
    """
    model: torch.nn.Module = job.models().load_sliced(full_blueprint(job.layout), params)
    model.eval()
    divided = divided_params(job.layout, job.division)
    named = dict(model.named_parameters())
    weights = [named[param.name] for param in divided]
    scores: dict[tuple[Kind, int], torch.Tensor] = {}
    for row in windows:
        window = torch.tensor(row[None], dtype=torch.int64, device=weights[0].device)
        gradients = torch.autograd.grad(next_token_loss(model, window, reduction="sum"), weights)
        for param, gradient in zip(divided, gradients, strict=True):
            assert param.kind is not None
            assert param.layer is not None
            squares = gradient.reshape(param.blocked(param.num_blocks)).double().square().sum((0, 1, 3))
            key = param.kind, param.layer
            scores[key] = scores[key].add_(squares) if key in scores else squares
    if not all(score.isfinite().all() for score in scores.values()):
        raise ConfigError("the model's gradients are not finite: it has diverged, its blocks cannot be ranked")
    return {key: score.cpu().numpy() for key, score in scores.items()}


def keep_best(layout: Layout, scores: Scores, num_sub: tuple[int, int]) -> Blueprint:
    """The blueprint of the `num_sub` = (heads, FFN blocks) highest scores of each layer; of equal ones, later blocks.

    Layers and kinds without scores are whole.
    """
    rows = {kind: list(full_blueprint(layout).attn if kind == "attn" else full_blueprint(layout).ffn) for kind in KINDS}
    for (kind, layer), score in scores.items():
        dropped = len(score) - num_sub[KINDS.index(kind)]
        rows[kind][layer] = tuple(sorted(np.argsort(score, kind="stable")[dropped:].tolist()))
    return Blueprint(layout.num_blocks, tuple(rows["attn"]), tuple(rows["ffn"]))

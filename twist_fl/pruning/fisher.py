"""Block Prune (after Michel et al., 2019): whole blocks go, those of lowest empirical Fisher information."""

from __future__ import annotations

from math import isfinite

import numpy as np

from twist_fl.blueprint.architectures import KINDS
from twist_fl.blueprint.blocks import Layout
from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.blueprint.division import Scores
from twist_fl.blueprint.drawing import full_blueprint
from twist_fl.system.errors import ConfigError


def keep_best(layout: Layout, scores: Scores, num_sub: tuple[int, int]) -> Blueprint:
    """The blueprint of the `num_sub` = (heads, FFN blocks) highest scores of each layer; of equal ones, later blocks.

    Layers and kinds without scores are whole. Raises ConfigError for scores that are not finite.
    """
    if not all(isfinite(score) for layer_scores in scores.values() for score in layer_scores):
        raise ConfigError("the model's gradients are not finite: it has diverged, its blocks cannot be ranked")
    rows = {kind: list(full_blueprint(layout).attn if kind == "attn" else full_blueprint(layout).ffn) for kind in KINDS}
    for (kind, layer), score in scores.items():
        dropped = len(score) - num_sub[KINDS.index(kind)]
        rows[kind][layer] = tuple(sorted(np.argsort(score, kind="stable")[dropped:].tolist()))
    return Blueprint(layout.num_blocks, tuple(rows["attn"]), tuple(rows["ffn"]))

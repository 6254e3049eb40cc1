"""Wanda (Sun et al., 2024, arXiv 2306.11695): in each output row the lowest |w_ij| ||x_j||_2 go; no update."""

from __future__ import annotations

from fractions import Fraction

import torch

from twist_fl.pruning.calibrate import Inputs, Say
from twist_fl.pruning.choose import counts, lowest


def statistic(x: torch.Tensor) -> torch.Tensor:
    """Squared norm of each input over the tokens `x` (N, in)."""
    return x.square().sum(0, dtype=torch.float64)


def prune(weight: torch.Tensor, inputs: Inputs, share: Fraction, say: Say) -> torch.Tensor:
    """`weight` (out, in) without the lowest `share` of each row.

    Where that is no whole number of weights, rows differ by one, so that the matrix loses exactly its share.
    """
    scores = weight.double().abs() * inputs.total.sqrt()
    rows, columns = weight.shape
    return weight.masked_fill(lowest(scores, counts(share, [columns] * rows)), 0)

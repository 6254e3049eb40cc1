"""Z-Pruner (Bhuiyan et al., 2025, arXiv 2508.15828) as its authors' code computes it.

The TwIST paper calls it structured and free of data; the published code is neither: single weights go, and
calibration norms are in the score.
"""

from __future__ import annotations

from fractions import Fraction

import torch

from twist_fl.pruning.calibrate import Inputs, Say
from twist_fl.pruning.choose import counts, lowest_of_all
from twist_fl.pruning.wanda import statistic as statistic  # noqa: PLC0414 (the same one)


def prune(weight: torch.Tensor, inputs: Inputs, share: Fraction, say: Say) -> torch.Tensor:
    """`weight` (out, in) without the lowest `share` of importance x ||x_j||^1.5 of the whole matrix."""
    scores = importance(weight.double()) * inputs.total.pow(0.75)
    return weight.masked_fill(lowest_of_all(scores, *counts(share, [weight.numel()])), 0)


def importance(weight: torch.Tensor) -> torch.Tensor:
    """a |z_R|^3 + (1 - a) |z_C|^3 with z-scores over the matrix of the row- and the column-normalised weights.

    a = 0.7 (1 - 0.3 p), p the share of weights with |w| < 0.1 mean |w|.
    """
    magnitude = weight.abs()
    sparse = (magnitude < 0.1 * magnitude.mean()).double().mean()
    a = 0.7 * (1 - 0.3 * sparse)
    rows, columns = (z_scores(_ratio(weight, weight.norm(dim=dim, keepdim=True))) for dim in (1, 0))
    return a * rows.abs() ** 3 + (1 - a) * columns.abs() ** 3


def z_scores(values: torch.Tensor) -> torch.Tensor:
    """(v - mean) / std; all zero where all are equal.

    The population's std: the sample's, as the authors take, only multiplies every score of a matrix by one factor.
    """
    return _ratio(values - values.mean(), values.std(correction=0))


def _ratio(values: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """values / norms, and 0 for a norm of 0: a row or column of zeros stays one."""
    return torch.where(norms > 0, values / norms, 0.0)

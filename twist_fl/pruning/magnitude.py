"""Magnitude pruning: the smallest |w| of the matrix go. No data."""

from __future__ import annotations

from fractions import Fraction

import torch

from twist_fl.pruning.calibrate import Inputs, Say
from twist_fl.pruning.choose import counts, lowest_of_all


def prune(weight: torch.Tensor, inputs: Inputs, share: Fraction, say: Say) -> torch.Tensor:
    """`weight` (out, in) without the `share` of smallest magnitude of the whole matrix."""
    return weight.masked_fill(lowest_of_all(weight.abs(), *counts(share, [weight.numel()])), 0)

"""SparseGPT (Frantar & Alistarh, 2023, arXiv 2301.00774): remove weights and make the kept ones take over.

Everything after the sum of x x^T is computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch

from twist_fl.pruning.calibrate import Inputs, Say
from twist_fl.pruning.choose import counts, lowest_of_all
from twist_fl.system.errors import ConfigError

BLOCK = 128
"""Columns whose weights compete with each other for removal."""
DAMPING = 0.01
"""Of the Hessian's mean diagonal, added to the diagonal."""
_LARGEST_DAMPING = 1e6
_ROUNDING = 1e-12
"""Smaller squared pivots, as a share of the mean diagonal, are zero; those of any sum x x^T are above DAMPING."""


def statistic(x: torch.Tensor) -> torch.Tensor:
    """Sum of x x^T (in, in) over the tokens `x` (N, in), in x's dtype; batches are added up in float64."""
    return x.T @ x


def prune(weight: torch.Tensor, inputs: Inputs, share: Fraction, say: Say, block: int = BLOCK) -> torch.Tensor:
    """`weight` (out, in) without the lowest w^2 / U_jj^2 of each (out x `block`) part, the others updated.

    H = 2/n sum x x^T over n windows, U the upper Cholesky factor of H^-1. Column by column, the error w_j / U_jj of
    each removed weight times U_j goes into the columns to the right. An input that was always zero has H_jj = 1, and
    its weights go first. Raises ConfigError if no damping makes H positive definite.
    """
    hessian = inputs.total * (2 / inputs.num_windows)
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    factor = inverse_factor(hessian, say)
    kept = weight.to(torch.float64, copy=True)
    rows, columns = kept.shape
    starts = range(0, columns, block)
    num_dead = [rows * int(dead[start : start + block].sum()) for start in starts]
    sizes = [rows * min(block, columns - start) for start in starts]
    for start, num in zip(starts, block_counts(share, sizes, num_dead, say), strict=True):
        columns_here = slice(start, start + block)
        part, upper = kept[:, columns_here], factor[columns_here, columns_here]
        scores = (part / upper.diagonal()).square()
        scores[:, dead[columns_here]] = -1
        removed = lowest_of_all(scores, num)
        errors = torch.zeros_like(part)
        for j in range(part.shape[1]):
            errors[:, j] = part[:, j].masked_fill(~removed[:, j], 0) / upper[j, j]
            part[:, j:] -= errors[:, j, None] * upper[j, j:]
        part.masked_fill_(removed, 0)  # what is left of w - w is rounding
        kept[:, start + block :] -= errors @ factor[columns_here, start + block :]
    return kept.to(weight.dtype)


def block_counts(share: Fraction, sizes: Sequence[int], num_dead: Sequence[int], say: Say) -> list[int]:
    """Weights to remove from each block of columns: its share, but at least the weights of its dead inputs.

    What that takes too much from some blocks the others lose less, so the sum is round(share x weights) always. If
    the dead inputs alone have more weights than that, only so many of them go.
    """
    wanted = counts(share, sizes)
    total, all_dead = sum(wanted), sum(num_dead)
    if all_dead > total:
        if total:
            say(f"{all_dead} weights have inputs that are always zero, {total} were to be removed: the others stay")
        return counts(Fraction(total, all_dead), num_dead)
    raised = [max(pair) for pair in zip(wanted, num_dead, strict=True)]
    excess = sum(raised) - total
    if not excess:
        return raised
    spare = [num - dead for num, dead in zip(raised, num_dead, strict=True)]
    less = counts(Fraction(excess, sum(spare)), spare)
    return [num - taken for num, taken in zip(raised, less, strict=True)]


def inverse_factor(hessian: torch.Tensor, say: Say) -> torch.Tensor:
    """Upper triangular U with U^T U = (H + damping I)^-1, the damping a share of H's mean diagonal.

    10 times more of it, and said aloud, until the sum is positive definite beyond rounding. Turned by 180 degrees,
    H = R R^T with R upper triangular, so U = R^-1: no inverse of H is formed.
    """
    mean = hessian.diagonal().mean()
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    damping = DAMPING
    while damping <= _LARGEST_DAMPING:
        turned = (hessian + damping * mean * identity).flip(0, 1)
        lower, failed = torch.linalg.cholesky_ex(turned)
        if not failed and lower.diagonal().min() ** 2 > _ROUNDING * mean:
            upper: torch.Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            return upper
        damping *= 10
        say(f"the Hessian is not positive definite: damping raised to {damping:g} of its mean diagonal")
    raise ConfigError("no damping makes the Hessian positive definite: are the calibration activations finite?")

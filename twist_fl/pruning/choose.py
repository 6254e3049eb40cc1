"""Which weights go: exact counts, ties broken by index."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

import torch


def counts(share: Fraction, sizes: Sequence[int]) -> list[int]:
    """How many weights of each part to remove: after every part, round(share x the weights so far) in all.

    So the parts of a matrix add up to exactly round(share x its weights), and each is within one of its own share.
    """
    ends = [round(share * end) for end in accumulate(sizes, initial=0)]
    return [end - start for start, end in pairwise(ends)]


def lowest(scores: torch.Tensor, num: Sequence[int]) -> torch.Tensor:
    """Bool (R, C): the `num[r]` lowest of each row r of `scores` (R, C); of equal ones those of lower index."""
    order = scores.sort(dim=1, stable=True).indices
    first = torch.arange(scores.shape[1], device=scores.device) < torch.tensor(num, device=scores.device)[:, None]
    return torch.zeros_like(first).scatter_(1, order, first)


def lowest_of_all(scores: torch.Tensor, num: int) -> torch.Tensor:
    """Bool (R, C): the `num` lowest of the whole of `scores` (R, C); of equal ones the earlier in row-major order.

    As `lowest` of one long row, without sorting it.
    """
    flat = scores.reshape(-1)
    if num == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    bound = flat.kthvalue(num).values
    removed = flat < bound
    at_bound = (flat == bound).nonzero().squeeze(1)
    removed[at_bound[: num - int(removed.sum())]] = True
    return removed.view(scores.shape)

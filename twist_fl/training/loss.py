"""Cross-entropy of a linear head whose (tokens x vocabulary) logits never exist whole.

With GPT-2's vocabulary the logits of 2 x 1024 tokens are 0.4 GB, and the plain loss keeps several copies of
them. Here the tokens go through the head in chunks, and each chunk's gradient is taken at once, while its
logits are there: three matrix products as in the plain loss, nothing computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

LOSS_CHUNK = 256
"""Tokens per chunk: large enough for fast products, 51 MB of logits with GPT-2's vocabulary."""


@dataclass(frozen=True)
class SoftTargets:
    """For each of N predicted tokens the K tokens it may be, (N, K) int64, and their shares, (N, K), in all 1."""

    tokens: torch.Tensor
    shares: torch.Tensor

    def loss(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Sum over N tokens of the cross-entropy with these shares; `log_probs` is (N, V)."""
        return -(self.shares.to(log_probs.dtype) * log_probs.gather(1, self.tokens)).sum()


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    chunk: int = LOSS_CHUNK,
    soft: SoftTargets | None = None,
) -> torch.Tensor:
    """Sum over N tokens of -log softmax(hidden weight^T)[target], in nats.

    `hidden` is (N, d), `weight` (V, d), `targets` (N,) int64. Equal to the plain loss, gradients too, up to the
    order of summation, which `chunk` (tokens) fixes. Under autocast the products are in autocast's dtype. With `soft`
    the gradient is that of the cross-entropy with it; the value stays.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            loss: torch.Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, chunk, dtype, soft)  # type: ignore[no-untyped-call]
            return loss
        x, w = hidden.to(dtype), weight.to(dtype)
        losses = [_chunk_loss(x[i : i + chunk], targets[i : i + chunk], w)[0] for i in range(0, len(x), chunk)]
        return torch.stack(losses).sum().to(_wide(dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype losses are computed in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def _chunk_loss(x: torch.Tensor, targets: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The chunk's summed loss, float64, and its log-probabilities (c, V)."""
    log_probs = F.log_softmax(F.linear(x, w), dim=1, dtype=_wide(w.dtype))
    return F.nll_loss(log_probs, targets, reduction="sum").double(), log_probs


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient of the sum is ready after forward; backward only multiplies it by the incoming scalar."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        chunk: int,
        dtype: torch.dtype,
        soft: SoftTargets | None,
    ) -> torch.Tensor:
        x, w = hidden.to(dtype), weight.to(dtype)
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            loss, log_probs = _chunk_loss(x[rows], targets[rows], w)
            total += loss
            grad = log_probs.exp_()  # (c, V): softmax - target, in the same memory
            if soft is None:
                grad.scatter_add_(1, targets[rows, None], grad.new_full((1, 1), -1.0).expand(len(grad), 1))
            else:
                grad.scatter_add_(1, soft.tokens[rows], -soft.shares[rows].to(grad.dtype))
            grad = grad.to(dtype)
            torch.mm(grad, w, out=grad_x[rows])
            if dtype == weight.dtype:
                grad_weight.addmm_(grad.T, x[rows])
            else:
                grad_weight.add_(grad.T @ x[rows])
        ctx.save_for_backward(grad_x.to(hidden.dtype), grad_weight)
        return total.to(_wide(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grad_loss), grad_weight.mul_(grad_loss), None, None, None, None

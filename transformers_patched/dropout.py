"""Cheap dropout on a CPU: masks from random words, kept as bytes (`loralib.dropout_masks`).

    y = keep * x / (1 - q),    P(keep = 0) = q,    q = round(256 p) / 256

q is p to the nearest 1/256: Hugging Face's default 0.1 becomes 26/256 = 0.1016. The scale belongs
to q, so E[y] = x exactly. Where 1/256 is too coarse, off by more than 5 % of p (p = 0.01, say),
steps of 1/65536 are taken instead. Other devices use torch's own kernel and p.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loralib.dropout_masks import draw_mask, masked, scale_in_force


def check_probability(p: float) -> float:
    """Returns `p` as a float, or raises ValueError where it is no probability."""
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability must be a number from 0 to 1, not {p!r}")
    return float(p)


class _Dropout(torch.autograd.Function):
    """y = keep * x * scale; dx = keep * dy * scale. Kept for backward: one byte per element."""

    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        x = x.contiguous()
        keep, ctx.scale = draw_mask(x, p), scale_in_force(p, x.device)
        ctx.save_for_backward(keep)
        return masked(x, keep).mul_(ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return masked(grad.contiguous(), keep).mul_(ctx.scale), None


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Zeroes elements of `x` with probability `p` and scales the others up to keep the mean.

    `x` itself is returned when not training or p = 0. The draw follows `torch.manual_seed`.
    """
    if not training or p == 0.0:
        return x
    if x.device.type != "cpu":
        return nn.functional.dropout(x, p, training=True)
    return _Dropout.apply(x, p)


class Dropout(nn.Module):
    """`dropout` as a module; free of cost in evaluation."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = check_probability(p)

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"

"""Dropout whose mask is drawn from random machine words, many elements at a time.

Drawing one Bernoulli number per element costs more on a CPU than the matrix product beside it. Here a
64-bit random word serves eight elements: each of its bytes, uniform on 0..255, drops its element
where it is below k, so that

    P(drop) = k / 256,    y = x * keep / (1 - k / 256),    k = round(256 p)

The probability in force is therefore p to the nearest 1/256: Hugging Face's default 0.1 becomes
26/256 = 0.1016, and the scale is that of the probability in force, so E[y] = x exactly. Where a byte
would be off by more than 5 % of p (p = 0.01, say), elements are drawn from 16-bit words instead.
Backward keeps one byte per element, never a float. On other devices torch's own kernel is used.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def check_probability(p: float) -> float:
    """Returns `p` as a float, or raises ValueError where it is no probability."""
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability must be a number from 0 to 1, not {p!r}")
    return float(p)


def resolve(p: float) -> tuple[int, int]:
    """The probability `p` as (k, levels): elements are dropped with probability k / levels."""
    k = round(p * 256)
    return (k, 256) if abs(k / 256 - p) <= 0.05 * p else (max(1, round(p * 65536)), 65536)


def probability_in_force(p: float) -> float:
    """The probability with which a CPU element is dropped when `p` is asked for."""
    k, levels = resolve(p)
    return k / levels


def keep_mask(count: int, p: float) -> tuple[Tensor, float]:
    """Draws which of `count` elements stay, from torch's global CPU generator.

    Returns:
        A boolean vector (count,), True where the element stays, and the scale 1 / (1 - k / levels).
    """
    k, levels = resolve(p)
    if k == levels:
        return torch.zeros(count, dtype=torch.bool), 0.0
    width = 1 if levels == 256 else 2
    words = torch.empty(math.ceil(count * width / 8), dtype=torch.int64)
    words.random_(-(2**63), None)  # without bounds torch leaves the sign bit, and so one byte, biased
    draws = words.view(torch.int8 if width == 1 else torch.int16)[:count]  # uniform, signed
    return draws >= k - levels // 2, levels / (levels - k)


class _Dropout(torch.autograd.Function):
    """y = x * keep * scale; dx = dy * keep * scale."""

    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        keep, ctx.scale = keep_mask(x.numel(), p)
        keep = keep.view(x.shape)
        ctx.save_for_backward(keep)
        return x.mul(keep).mul_(ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return grad.mul(keep).mul_(ctx.scale), None


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Zeroes elements of `x` with probability `p` (to the nearest 1/256) and scales the others up.

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

"""Dropout masks that cost little to draw and a byte per element to keep.

On a CPU a Bernoulli draw per element takes longer than the layer's matrix product. There the mask
comes from 64-bit random words read as bytes (or as 16-bit pieces where 1/256 is too coarse for p):

    P(drop) = k / levels,    k = round(p * levels),    levels = 256 or 65536

so p is met to the nearest level, and `scale_in_force` is the 1 / (1 - k/levels) that belongs to the
probability in effect. A kept element's mask byte is -1 and a dropped one's 0: sign extension makes
them all ones and all zeros, which a bitwise *and* applies to a float without a conversion.
Other devices, and compiled code, keep a boolean mask drawn by torch's own kernel with p itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SAME_WIDTH = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def _bytewise(device: torch.device) -> bool:
    return device.type == "cpu" and not torch.compiler.is_compiling()


def _levels(p: float) -> tuple[int, int]:
    """(k, levels) of a CPU mask: to 5 % of p and of 1 - p, which every scale depends on."""
    for levels in (256, 65536):
        k = round(p * levels)
        if abs(k / levels - p) <= 0.05 * min(p, 1.0 - p):
            return k, levels
    return (max(1, min(k, levels - 1)), levels) if p < 1.0 else (levels, levels)


def scale_in_force(p: float, device: torch.device) -> float:
    """The factor of the elements that stay; 0 where none do."""
    if _bytewise(device):
        k, levels = _levels(p)
        p = k / levels
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def draw_mask(x: Tensor, p: float) -> Tensor:
    """A mask for `x` from the global generator: int8 (-1 keeps, 0 drops) on a CPU, else bool."""
    if not _bytewise(x.device):
        return torch.rand(x.shape, device=x.device) >= p
    k, levels = _levels(p)
    if k == levels:
        return torch.zeros(x.shape, dtype=torch.int8)  # nothing stays
    width, piece = (1, torch.int8) if levels == 256 else (2, torch.int16)
    words = torch.empty((x.numel() * width + 7) // 8, dtype=torch.int64)
    words.random_(-(2**63), None)  # without bounds the sign bit would never be drawn
    pieces = words.view(piece)[: x.numel()]  # uniform over the signed range
    first = k - levels // 2  # the lowest value that stays
    # clamping to {first - 1, first} instead of comparing: several times faster on a CPU
    return pieces.clamp_(first - 1, first).neg_().add_(first - 1).to(torch.int8).view(x.shape)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where the mask keeps, 0 elsewhere; not scaled."""
    if mask.dtype == torch.bool:
        return x * mask
    integer = _SAME_WIDTH[x.dtype]
    return torch.bitwise_and(x.view(integer), mask.to(integer)).view(x.dtype)

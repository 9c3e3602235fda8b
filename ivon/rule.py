"""The formulas of IVON on flat vectors (Shen et al. 2024, arXiv 2402.17641, algorithm 1).

The posterior of every weight is N(m, σ²) with σ² = 1/(ess·(h + δ)): h is the estimate of the mean
loss's curvature, δ (`weight_decay`) the prior's share of the precision, ess the number of rows that
the loss is a mean of. All vectors have one length (n,) and are fp32 or fp64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def precision(hess: Tensor, weight_decay: float) -> Tensor:
    """h + δ, kept above zero where rounding would not."""
    return (hess + weight_decay).clamp_min_(torch.finfo(hess.dtype).tiny)


def std(hess: Tensor, ess: float, weight_decay: float) -> Tensor:
    """σ = 1/√(ess·(h + δ))."""
    return precision(hess, weight_decay).mul_(ess).rsqrt_()


def update_hess_(hess: Tensor, statistic: Tensor, hess_approx: str, group: dict[str, Any]) -> None:
    """h ← h + b(f − h) + ½b²(h − f)²/(h + δ), with b = 1 − β₂, in place.

    f is `ess·(h + δ)·mean(noise·gradient)` (Price's theorem) or `ess·mean(gradient²)`. Written with
    x = b(f − h)/(h + δ), h + δ is multiplied by 1 + x + x²/2 ≥ ½: it stays positive whatever f is.

    Args:
        statistic: mean(noise·gradient) for "price", mean(gradient²) for "gradsq".
    """
    ess, b = group["ess"], 1 - group["beta2"]
    scale = precision(hess, group["weight_decay"])
    if hess_approx == "price":
        gap = torch.addcmul(hess, scale, statistic, value=-ess)  # h − f
    else:
        gap = torch.add(hess, statistic, alpha=-ess)
    hess.add_(gap, alpha=-b)
    hess.addcdiv_(gap.square_(), scale, value=b * b / 2)


def update_mean_(
    mean: Tensor,
    momentum: Tensor,
    hess: Tensor,
    group: dict[str, Any],
    *,
    debias: bool,
    rescale_lr: bool,
) -> None:
    """m ← m − η·clip((g/(1 − β₁ᵗ) + δm)/(h + δ), ±radius), with the new g, h and t, in place.

    η = lr·(h₀ + δ), so that lr means what it means for SGD while h is near h₀, or η = lr.
    """
    weight_decay, radius = group["weight_decay"], group["clip_radius"]
    bias = 1 - group["beta1"] ** group["step"] if debias else 1.0
    direction = torch.div(momentum, bias).add_(mean, alpha=weight_decay)
    direction.div_(precision(hess, weight_decay))
    if math.isfinite(radius):
        direction.clamp_(-radius, radius)
    rate = group["lr"] * (group["hess_init"] + weight_decay) if rescale_lr else group["lr"]
    mean.sub_(direction, alpha=rate)

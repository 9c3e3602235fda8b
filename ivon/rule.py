"""The formulas of IVON on flat vectors (Shen et al. 2024, arXiv 2402.17641, algorithm 1).

The posterior of every weight is N(m, σ²) with σ² = 1/(ess·(h + δ)): h is the estimate of the mean
loss's curvature, δ (`weight_decay`) the prior's share of the precision, ess the number of rows that
the loss is a mean of. All vectors have one length (n,) and are fp32 or fp64.
"""

from __future__ import annotations

import math
from typing import TypedDict

import torch
from torch import Tensor


class GroupOptions(TypedDict):
    """What a parameter group says; the formulas' symbols are in brackets."""

    lr: float  # [lr]
    ess: float  # [ess]
    hess_init: float  # [h₀]
    beta1: float  # [β₁]
    beta2: float  # [β₂]
    weight_decay: float  # [δ]
    clip_radius: float  # [radius]
    step: int  # [t]


def std(hess: Tensor, ess: float, weight_decay: float) -> Tensor:
    """σ = 1/√(ess·(h + δ))."""
    return torch.add(hess, weight_decay).mul_(ess).rsqrt_()  # (n,)


def update_hess_(hess: Tensor, statistic: Tensor, hess_approx: str, group: GroupOptions) -> None:
    """h ← h + b(f − h) + ½b²(h − f)²/(h + δ), with b = 1 − β₂, in place.

    f is `ess·(h + δ)·mean(noise·gradient)` (Price's theorem) or `ess·mean(gradient²)`. Written with
    x = b(f − h)/(h + δ), h + δ is multiplied by 1 + x + x²/2 ≥ ½: it stays positive whatever f is.

    Args:
        hess: h (n,), changed in place.
        statistic: (n,), mean(noise·gradient) for "price", mean(gradient²) for "gradsq".
        hess_approx: "price" or "gradsq".
        group: ess, δ and β₂ are used.
    """
    ess, weight_decay, b = group["ess"], group["weight_decay"], 1 - group["beta2"]
    scale = torch.add(hess, weight_decay)  # h + δ (n,)
    if hess_approx == "price":
        gap = torch.addcmul(hess, scale, statistic, value=-ess)  # h − f (n,)
    else:
        gap = torch.add(hess, statistic, alpha=-ess)  # h − f (n,)
    hess.add_(gap, alpha=-b)
    hess.addcdiv_(gap.square_(), scale, value=b * b / 2)
    hess.clamp_min_((2**-20 - 1) * weight_decay)  # for rounding, after many halvings in a row


def update_mean_(
    mean: Tensor,
    momentum: Tensor,
    hess: Tensor,
    group: GroupOptions,
    *,
    debias: bool,
    rescale_lr: bool,
) -> None:
    """m ← m − η·clip((g/(1 − β₁ᵗ) + δm)/(h + δ), ±radius), with the new g, h and t, in place.

    η = lr·(h₀ + δ), so that lr means what it means for SGD while h is near h₀, or η = lr. The
    correction of the bias, 1 − β₁ᵗ, is multiplied through, which saves a pass over memory.

    Args:
        mean: m (n,), changed in place.
        momentum: g (n,).
        hess: h (n,).
        group: everything but ess and β₂ is used.
        debias: divide g by 1 − β₁ᵗ; else g is taken as it is.
        rescale_lr: η = lr·(h₀ + δ); else η = lr.
    """
    weight_decay, radius = group["weight_decay"], group["clip_radius"]
    bias = 1 - group["beta1"] ** group["step"] if debias else 1.0
    direction = torch.add(momentum, mean, alpha=weight_decay * bias)  # (n,)
    direction.div_(torch.add(hess, weight_decay))
    if math.isfinite(radius):
        direction.clamp_(-radius * bias, radius * bias)
    rate = group["lr"] * (group["hess_init"] + weight_decay) if rescale_lr else group["lr"]
    mean.sub_(direction, alpha=rate / bias)

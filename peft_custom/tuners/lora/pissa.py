"""PiSSA: the adapter starts as the principal part of W, the base keeps the rest."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .config import LoraConfig

if TYPE_CHECKING:
    from .layer import LoraLayer


def principal_factors(weight: Tensor, r: int, scaling: float, init: str) -> tuple[Tensor, Tensor]:
    """A₀ = √(S/s) Rᵀ and B₀ = L √(S/s) from the r largest singular triplets of W = L S Rᵀ.

    Args:
        weight: W, (out, in).
        r: rank, at most min(out, in).
        scaling: s, so that s·B₀A₀ is the rank-r part of W.
        init: `"pissa"` (full SVD) or `"pissa_niter_<k>"` (randomised, k power iterations).

    Returns:
        A₀ (r, in) and B₀ (out, r), in at least fp32; B₀ᵀB₀ = diag(S/s).
    """
    if r > min(weight.shape):
        raise ValueError(
            f"init_lora_weights={init!r}: rank {r} exceeds the {min(weight.shape)} singular values "
            f"of a {tuple(weight.shape)} weight"
        )
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if init == "pissa":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        left, values, right = left[:, :r], values[:r], right[:r]
    else:
        left, values, rows = torch.svd_lowrank(weight, q=r, niter=int(init.rsplit("_", 1)[-1]))
        right = rows.T
    root = torch.sqrt(values / scaling)  # (r,)
    return root[:, None] * right, left * root


def as_plain_lora(
    config: LoraConfig, tensors: dict[str, Tensor], adapter: str, layers: dict[str, LoraLayer]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The adapter relative to the original W: s·(BA − B₀A₀) = s·[B, −B₀][A; A₀], of rank 2r.

    α grows with the rank so that s stays: by 2, or by √2 where s = α/√r.
    """
    result = dict(tensors)
    for name, layer in layers.items():
        if adapter in layer.pissa_initial:
            A0, B0, _ = layer.pissa_initial[adapter]
            key_A, key_B = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
            result[key_A] = torch.cat([tensors[key_A], A0])
            result[key_B] = torch.cat([tensors[key_B], -B0], dim=1)
    growth = math.sqrt(2.0) if config.use_rslora else 2
    config.r *= 2
    config.lora_alpha *= growth
    config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
    config.alpha_pattern = {key: growth * alpha for key, alpha in config.alpha_pattern.items()}
    config.init_lora_weights = True
    return config, result

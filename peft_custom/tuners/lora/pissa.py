"""PiSSA: the adapter starts as the principal part of W, the base keeps the rest."""

from __future__ import annotations

import torch
from torch import Tensor


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

"""Starts that move a part of W into the adapter; the base keeps the rest.

| `init_lora_weights` | B₀ | A₀ | of |
|---|---|---|---|
| `pissa`, `pissa_niter_<k>` | L √(S/s) | √(S/s) Rᵀ | the r largest singular triplets, W = L S Rᵀ |
| `olora` (arXiv 2406.01775) | r columns of Q | r rows of R | the first, W = Q R |

Either way the base becomes W − s·B₀A₀.
"""

from __future__ import annotations

import torch
from torch import Tensor

PREFIXES = ("pissa", "olora")


def moves_base(init: object) -> bool:
    """Whether a start changes the base weight."""
    return isinstance(init, str) and init.startswith(PREFIXES)


def base_factors(weight: Tensor, r: int, scaling: float, init: str) -> tuple[Tensor, Tensor]:
    """A₀ (r, in) and B₀ (out, r) of a start, in at least fp32.

    Args:
        weight: W, (out, in).
        r: rank, at most min(out, in).
        scaling: s.
        init: `"pissa"` (full SVD), `"pissa_niter_<k>"` (randomised, k power iterations), `"olora"`.
    """
    if r > min(weight.shape):
        raise ValueError(
            f"init_lora_weights={init!r}: rank {r} exceeds the {min(weight.shape)} singular values "
            f"of a {tuple(weight.shape)} weight"
        )
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if init == "olora":
        Q, R = torch.linalg.qr(weight)
        return R[:r].contiguous(), Q[:, :r].contiguous()
    if init == "pissa":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        left, values, right = left[:, :r], values[:r], right[:r]
    else:
        left, values, rows = torch.svd_lowrank(weight, q=r, niter=int(init.rsplit("_", 1)[-1]))
        right = rows.T
    root = torch.sqrt(values / scaling)  # (r,)
    return root[:, None] * right, left * root

"""DoRA (Liu et al. 2024, eq. 5): the rows of W + s·B A brought to lengths that train.

    W' = diag(m / n) (W + s·B A),    n_i = ‖W_i + s·B_i A‖, a constant in the gradient (section 4.3)

m starts as n, so that training starts from the base model. The sum is not formed for its lengths:

    n_i² = ‖W_i‖² + 2s·⟨W_i Aᵀ, B_i⟩ + s²·⟨B_i (A Aᵀ), B_i⟩
"""

from __future__ import annotations

import torch
from torch import Tensor

from loralib import functional as lora


@torch.no_grad()
def row_lengths(weight: Tensor, A: Tensor, B: Tensor, s: lora.Scaling, transposed: bool) -> Tensor:
    """n (out,), fp32.

    Args:
        weight: W (out, in), or (in, out) if `transposed`.
        A, B: (r, in) and (out, r).
        s: the scale of B A, or of each of its components (r,).
        transposed: how W is stored.
    """
    with lora.without_autocast(A):
        W = weight.to(A.dtype)
        squares = torch.linalg.vector_norm(W, dim=0 if transposed else 1).square()  # (out,)
        sB = s * B  # (out, r)
        WA = (A @ W).T if transposed else W @ A.T  # (out, r)
        squares += ((2.0 * WA + sB @ (A @ A.T)) * sB).sum(1)
    return squares.clamp_(min=0.0).sqrt_()


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: lora.Scaling,
    p: float,
    transposed: bool,
    gain: Tensor,
) -> Tensor:
    """x W'ᵀ + b = g ∘ (x Wᵀ + s·(drop(x) Aᵀ) Bᵀ) + b.

    Args:
        x: (..., in).
        weight, bias, A, B, scaling, p, transposed: as in `loralib.functional.lora_linear`.
        gain: g = m / n, (out,), with the gradient of m.

    Returns:
        (..., out) in the compute dtype.
    """
    u = lora.lora_linear(x, weight, None, A, B, scaling, p, transposed)
    g = gain.to(u.dtype)
    return u * g if bias is None else torch.addcmul(bias.to(u.dtype), u, g)

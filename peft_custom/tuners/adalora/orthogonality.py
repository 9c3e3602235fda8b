"""The regulariser that keeps A's rows and B's columns near orthonormal, and its gradient.

    R = γ/2n · Σ ( ‖A Aᵀ − I‖_F + ‖Bᵀ B − I‖_F )        over the n adapted matrices
    ∂‖A Aᵀ − I‖_F/∂A = 2 (A Aᵀ − I) A / ‖A Aᵀ − I‖_F     0 at the minimum

Zhang et al. 2023 write the squared norm (eq. 4); every implementation, theirs included, takes the
norm itself and its mean, which is what published weights γ are for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .triplets import Stack, Triplets


def _deviation(stack: Stack, X: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrices − I, (n, r, r), of rows or of columns, and their Frobenius norms (n,)."""
    gram = torch.bmm(X, X.mT) if stack.axis == 2 else torch.bmm(X.mT, X)
    gram.diagonal(dim1=1, dim2=2).sub_(1.0)
    return gram, torch.linalg.vector_norm(gram, dim=(1, 2))


@torch.no_grad()
def add_gradient(stack: Stack, factor: float, values: Tensor, gradients: Tensor) -> Tensor:
    """Adds the gradient of factor · Σ norms to a stack's gradients.

    Args:
        stack: one of the stacks of A or B.
        factor: γ/2n.
        values: the parameters (n, rows, columns).
        gradients: their gradients, gathered; added to, as are the gradients proper.

    Returns:
        The norms, (n,).
    """
    deviation, norms = _deviation(stack, values)
    deviation.mul_((2.0 * factor / norms.clamp(min=1e-30))[:, None, None])
    pair = (deviation, values) if stack.axis == 2 else (values, deviation)
    stack.put_gradients(gradients.baddbmm_(*pair))
    return norms


def penalty(triplets: Triplets, weight: float) -> Tensor:
    """R as a scalar tensor with a graph, for loops that add it to their loss themselves."""
    norms = [
        _deviation(stack, torch.stack(stack.parameters))[1] for stack in (*triplets.A, *triplets.B)
    ]
    return torch.cat(norms).mean() * weight

"""The regulariser that keeps A's rows and B's columns near orthonormal, and its gradient.

    R = γ/2n · Σ ( ‖A Aᵀ − I‖_F + ‖Bᵀ B − I‖_F )        over the n adapted matrices
    ∂‖A Aᵀ − I‖_F/∂A = 2 (A Aᵀ − I) A / ‖A Aᵀ − I‖_F     0 at the minimum

Zhang et al. 2023 write the squared norm (eq. 4); every implementation, theirs included, takes the
norm itself and its mean, which is what published weights γ are for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .triplets import Triplets


def _norms(gram: Tensor) -> Tensor:
    """Turns Gram matrices (n, r, r) into their differences from I, in place; Frobenius norms."""
    gram.diagonal(dim1=1, dim2=2).sub_(1.0)
    return torch.linalg.vector_norm(gram, dim=(1, 2))  # (n,)


@torch.no_grad()
def add_gradient(triplets: Triplets, weight: float, values: Tensor, scratch: Tensor) -> Tensor:
    """Adds R's gradient to that of every A and B and returns R, both on the device.

    Args:
        triplets: whose parameters have gradients.
        weight: γ.
        values: flat vector of the parameters' values.
        scratch: flat vector to write to.

    Returns:
        R as a scalar tensor.
    """
    matrices = sum(stack.shape[0] for stack in (*triplets.A, *triplets.B))
    factor = weight / matrices
    gradients: list[Tensor] = []
    additions: list[Tensor] = []
    norms: list[Tensor] = []
    for stacks, rows in ((triplets.A, True), (triplets.B, False)):
        for stack in stacks:
            X, step = stack.of(values), stack.of(scratch)
            gram = torch.bmm(X, X.mT) if rows else torch.bmm(X.mT, X)  # (n, r, r)
            norm = _norms(gram)
            slope = gram.mul_((2.0 * factor / norm.clamp(min=1e-30))[:, None, None])
            torch.bmm(slope, X, out=step) if rows else torch.bmm(X, slope, out=step)
            norms.append(norm)
            gradients += [p.grad for p in stack.parameters]
            additions += step.unbind()
    torch._foreach_add_(gradients, additions)
    return torch.cat(norms).sum() * factor


def penalty(triplets: Triplets, weight: float) -> Tensor:
    """R as a scalar tensor with a graph, for loops that add it to their loss themselves."""
    norms = []
    for stacks, rows in ((triplets.A, True), (triplets.B, False)):
        for stack in stacks:
            X = torch.stack(stack.parameters)
            norms.append(_norms(torch.bmm(X, X.mT) if rows else torch.bmm(X.mT, X)))
    return torch.cat(norms).mean() * weight

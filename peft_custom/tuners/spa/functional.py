"""Ŵ = E(M) ∘ (W + Σ_k B_k ⊗ P_k) of a frozen W, with a backward pass that never forms W'.

With G = ∂L/∂Ŵ, its blocks as rows (o/p·i/q, p·q), and H = G Pᵀ (o/p·i/q, K):

    ∂L/∂B = M ∘ H      ∂L/∂P = (M ∘ B)ᵀ G      ∂L/∂M = Σ_block G ∘ W + Σ_k B_k ∘ H_k

for all blocks of M, also those of which nothing is left: Σ_block G ∘ W' needs no W' that way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def as_blocks(weight: Tensor, a: int, b: int) -> Tensor:
    """(a·p, b·q) → a view (a, p, b, q)."""
    return weight.unflatten(1, (b, -1)).unflatten(0, (a, -1))


def apply_blocks(weight: Tensor, mask: Tensor) -> Tensor:
    """E(M) ∘ W: (out, in) and (out/p, in/q) → (out, in)."""
    return (as_blocks(weight, *mask.shape) * mask[:, None, :, None]).flatten(2).flatten(0, 1)


def mixture(B: Tensor, P: Tensor) -> Tensor:
    """Σ_k B_k ⊗ P_k: (K, a, b) and (K, p, q) → (a·p, b·q)."""
    (K, a, b), (_, p, q) = B.shape, P.shape
    blocks = B.reshape(K, a * b).T @ P.reshape(K, p * q)  # (a·b, p·q)
    return blocks.view(a, b, p, q).transpose(1, 2).reshape(a * p, b * q)


class _MaskedMixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, B: Tensor, P: Tensor, M: Tensor) -> Tensor:
        ctx.save_for_backward(W, B, P, M)
        (K, a, b), (_, p, q) = B.shape, P.shape
        update = (B * M).view(K, a * b).T @ P.reshape(K, p * q)  # (a·b, p·q)
        out = as_blocks(W, a, b) * M[:, None, :, None]  # (a, p, b, q), in M's dtype
        out += update.view(a, b, p, q).transpose(1, 2)
        return out.flatten(2).flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        W, B, P, M = ctx.saved_tensors
        (K, a, b), (_, p, q) = B.shape, P.shape
        blocks = as_blocks(G, a, b)
        rows = blocks.transpose(1, 2).reshape(a * b, p * q)
        H = P.reshape(K, p * q) @ rows.T  # (K, a·b)
        grad_P = ((B * M).view(K, a * b) @ rows).view(K, p, q)
        grad_M = None
        if ctx.needs_input_grad[3]:
            grad_M = (blocks * as_blocks(W, a, b)).sum((1, 3))
            grad_M += (H * B.reshape(K, a * b)).sum(0).view(a, b)
        return None, H.view(K, a, b) * M, grad_P, grad_M


def masked_mixture(W: Tensor, B: Tensor, P: Tensor, M: Tensor) -> Tensor:
    """Ŵ (out, in) in M's dtype.

    Args:
        W: (a·p, b·q), frozen.
        B: (K, a, b).
        P: (K, p, q).
        M: (a, b).
    """
    return _MaskedMixture.apply(W, B, P, M)

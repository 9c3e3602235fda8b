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

# Share of the blocks up to which products over them alone are faster (benchmarks/pruning_step.py).
MOST_KEPT = 0.8


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


def _kept(M: Tensor) -> Tensor | None:
    """Places of the blocks that are left; None where taking them out of the others saves nothing.

    On a GPU nothing is counted: the host would wait for the device.
    """
    if M.device.type != "cpu":
        return None
    kept = M.flatten().nonzero().squeeze(1)
    return kept if len(kept) <= MOST_KEPT * M.numel() else None


def _weights(B: Tensor, M: Tensor, kept: Tensor | None) -> Tensor:
    """M ∘ B as (K, blocks), of all blocks or of those that are left."""
    flat = (B * M).flatten(1)
    return flat if kept is None else flat.index_select(1, kept)


class _MaskedMixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, B: Tensor, P: Tensor, M: Tensor) -> Tensor:
        ctx.save_for_backward(W, B, P, M)
        (_, a, b), (_, p, q) = B.shape, P.shape
        kept = _kept(M)
        update = _weights(B, M, kept).T @ P.flatten(1)  # (a·b or fewer, p·q)
        if kept is not None:
            update = update.new_zeros(a * b, p * q).index_copy_(0, kept, update)
        out = update.new_empty(a, p, b, q)
        update = update.view(a, b, p, q).transpose(1, 2)
        torch.addcmul(update, as_blocks(W.to(M.dtype), a, b), M[:, None, :, None], out=out)
        return out.flatten(2).flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        W, B, P, M = ctx.saved_tensors
        (K, a, b), (_, p, q) = B.shape, P.shape
        rows = as_blocks(G, a, b).transpose(1, 2).reshape(a * b, p * q)
        H = P.flatten(1) @ rows.T  # (K, a·b)
        kept = _kept(M)
        read = rows if kept is None else rows.index_select(0, kept)
        grad_P = (_weights(B, M, kept) @ read).view(K, p, q)
        grad_M = None
        if ctx.needs_input_grad[3]:
            sums = (G * W).reshape(-1, q) @ G.new_ones(q)  # over the columns of every block
            grad_M = sums.view(a, p, b).sum(1)
            grad_M += (H * B.flatten(1)).sum(0).view(a, b)
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

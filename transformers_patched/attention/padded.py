"""Attention in the padded form (B, heads, L, d): torch's fused kernel, and the probabilities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dropout import dropout
from ..layout import SequenceLayout


def padded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    layout: SequenceLayout,
    scale: float,
    p: float,
    num_rows: int,
) -> Tensor:
    """dropout(softmax(scale · Q Kᵀ + bias)) V by torch's fused kernel, as tokens again.

    Args:
        q: (B, heads, L, d); `k` and `v` likewise.
        bias: Added to the scores and broadcast to (B, heads, L, L): the mask of padding keys, and
            whatever else a model adds. None adds nothing.
        layout: Where the sequences are.
        scale: Factor of the scores.
        p: Dropout probability.
        num_rows: The length of the result's first dimension; rows beyond the tokens are filler.

    Returns:
        (*tokens, heads, d).
    """
    if p > 0.0 and q.device.type == "cpu":  # where the fused kernel has no dropout
        context = dropout(padded_probabilities(q, k, bias, scale), p) @ v
    else:
        context = F.scaled_dot_product_attention(q, k, v, bias, dropout_p=p, scale=scale)
    return tokens_of(context, layout, num_rows)


def tokens_of(context: Tensor, layout: SequenceLayout, num_rows: int) -> Tensor:
    """(B, heads, L, d) to (*tokens, heads, d), with filler up to `num_rows`."""
    context = layout.unpad(layout.clear_empty(context.transpose(1, 2)))
    return context if context.shape[0] == num_rows else layout.round_up_rows(context)


def padded_probabilities(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """softmax(scale · Q Kᵀ + bias), (B, heads, L, L), of q and k (B, heads, L, d)."""
    scores = (q @ k.transpose(-1, -2)) * scale
    return torch.softmax(scores if bias is None else scores + bias, dim=-1)

"""Attention of every model, for padded and packed tokens, through one function.

    context = dropout(softmax(Q Kᵀ / sqrt(d) + mask)) V        for every sequence and head
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from transformers_patched.dropout import dropout
from transformers_patched.layout import Layout


def attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, p: float = 0.0
) -> Tensor:
    """softmax(Q Kᵀ / sqrt(d)) V within every sequence of `layout`; padding is never attended to.

    Args:
        query: (*tokens, heads, d), tokens = (B, L) or packed (T,).
        key: Same shape.
        value: Same shape.
        layout: Where the sequences are.
        p: Dropout probability in force on the attention probabilities (0.0 in evaluation).

    Returns:
        The context, of the shape of `query`. Sequences without any real token get zeros.
    """
    layout.check_tokens(query, "query")
    q, k, v = (layout.pad(x).transpose(1, 2) for x in (query, key, value))  # (B, h, L, d)
    bias = layout.bias(q.dtype)
    if p == 0.0:
        context = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    else:
        context = dropout(_probabilities(q, k, bias), p) @ v
    context = context.transpose(1, 2)
    if layout.nonempty is not None:
        context = context * layout.nonempty[:, None, None, None]
    return layout.unpad(context)


def attention_probabilities(query: Tensor, key: Tensor, layout: Layout) -> Tensor:
    """softmax(Q Kᵀ / sqrt(d)) as (B, heads, L, L), padded whatever the layout; zero at padding keys."""
    layout.check_tokens(query, "query")
    q, k = (layout.pad(x).transpose(1, 2) for x in (query, key))
    probabilities = _probabilities(q, k, layout.bias(q.dtype))
    if layout.nonempty is None:
        return probabilities
    return probabilities * layout.nonempty[:, None, None, None]


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    scores = (q @ k.transpose(-1, -2)) * (1.0 / math.sqrt(q.shape[-1]))  # (B, h, L, L)
    return torch.softmax(scores if bias is None else scores + bias, dim=-1)

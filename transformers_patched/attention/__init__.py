"""Attention of every model, for padded and packed tokens, through one function.

context = dropout(softmax(Q Kᵀ / sqrt(d) + mask)) V        for every sequence and head
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import SequenceLayout
from .grouped import GroupedAttention, grouped_products
from .padded import padded_attention, padded_probabilities, tokens_of

__all__ = ["attention", "attention_probabilities"]

# The longest sequences for which batched products serve on a CPU, from benchmarks/attention.py
# (forward + backward in ms on 2 cores with AMX, 12 heads, products / fused kernel):
#
#     tokens                       bf16, d 64     bf16, d 32     fp32, d 64     fp32, d 32
#     packed, 16 of 25 to 90        6.8 / 32.2     4.9 / 29.4     6.3 / 13.4     4.0 /  7.7
#     packed, 4 of 128 to 256       6.7 / 17.7     5.6 / 14.7     9.4 / 15.9     6.8 /  9.6
#     packed, 4 of 256 to 512      19.2 / 40.1    15.4 / 32.1    36.6 / 42.7    23.5 / 25.9
#     padded, 4 of up to 256        9.2 / 17.7     7.3 / 14.7    14.9 / 15.9     9.8 /  9.6
#     padded, 4 of up to 512       31.3 / 40.1    25.7 / 32.1    67.1 / 42.7    44.9 / 25.9
#
# Beyond, the L² scores also cost memory. The fused kernel has no dropout on a CPU.
LONGEST_PRODUCTS = 512
LONGEST_PRODUCTS_PADDED_FP32 = 256


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SequenceLayout,
    p: float = 0.0,
    causal: bool = False,
) -> Tensor:
    """softmax(Q Kᵀ / sqrt(d)) V within every sequence of `layout`; padding is never attended to.

    Args:
        query: (*tokens, heads, d), tokens = (B, L) or packed (T,).
        key: Same shape.
        value: Same shape.
        layout: Where the sequences are.
        p: Dropout probability of the attention probabilities; 0.0 in evaluation.
        causal: Every token looks at itself and those before it. What padding itself then gets, of
            which nothing real ever reads, is left open.

    Returns:
        The context, of the shape of `query`. Sequences without any real token get zeros.
    """
    _check_shapes(query, key, value, layout)
    if query.device.type == "cpu" and not torch.compiler.is_compiling():
        wide_rectangle = not layout.is_packed and query.dtype == torch.float32
        longest = LONGEST_PRODUCTS_PADDED_FP32 if wide_rectangle else LONGEST_PRODUCTS
        if p > 0.0 or layout.max_seqlen <= longest:
            products = grouped_products(layout, query, causal)
            return layout.clear_empty(GroupedAttention.apply(query, key, value, products, p))
    if query.is_cuda and layout.is_packed and p == 0.0 and _varlen_takes(query):
        return _varlen(query, key, value, layout, causal)
    q, k, v = (layout.pad(x).transpose(1, 2) for x in (query, key, value))  # (B, heads, L, d)
    scale = 1.0 / math.sqrt(q.shape[-1])
    if causal and p == 0.0 and layout.pads_right:  # the kernel's own triangle leaves out half
        context = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return tokens_of(context, layout, len(query))
    bias = layout.causal_bias(q.dtype) if causal else layout.bias(q.dtype)
    return padded_attention(q, k, v, bias, layout, scale, p, len(query))


def attention_probabilities(
    query: Tensor, key: Tensor, layout: SequenceLayout, causal: bool = False
) -> Tensor:
    """softmax(Q Kᵀ / sqrt(d)) as (B, heads, L, L), padded whatever the layout."""
    layout.check_tokens(query, "query")
    q, k = (layout.pad(x).transpose(1, 2) for x in (query, key))  # (B, heads, L, d)
    scale = 1.0 / math.sqrt(q.shape[-1])
    bias = layout.causal_bias(q.dtype) if causal else layout.bias(q.dtype)
    return layout.clear_empty(padded_probabilities(q, k, bias, scale))


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout) -> None:
    layout.check_tokens(query, "query")
    if key.shape != query.shape or value.shape != query.shape:
        raise ValueError(
            "query, key and value must have one shape (*tokens, heads, head size), not "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )


def _varlen_takes(query: Tensor) -> bool:
    """Whether torch's kernel for packed tokens takes this dtype and head size."""
    d = query.shape[-1]
    return query.dtype in (torch.float16, torch.bfloat16) and d % 8 == 0 and d <= 256


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, causal: bool
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    offsets, longest = layout.cu_seqlens, layout.max_seqlen
    window = (-1, 0 if causal else -1)  # how many tokens before and after; -1 is all
    return varlen_attn(query, key, value, offsets, offsets, longest, longest, window_size=window)

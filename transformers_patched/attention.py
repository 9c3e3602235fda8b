"""Attention of every model, for padded and packed tokens, through one function.

context = dropout(softmax(Q Kᵀ / sqrt(d) + mask)) V        for every sequence and head
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loralib.dropout_masks import draw_mask, masked, scale_in_force

from .dropout import dropout
from .layout import HeadPlan, Layout

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


def attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, p: float = 0.0) -> Tensor:
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
    _check_shapes(query, key, value, layout)
    if query.device.type == "cpu" and not torch.compiler.is_compiling():
        wide_rectangle = not layout.is_packed and query.dtype == torch.float32
        longest = LONGEST_PRODUCTS_PADDED_FP32 if wide_rectangle else LONGEST_PRODUCTS
        if p > 0.0 or layout.length <= longest:
            plan = layout.head_plan(query)
            return _clear_empty(_BatchedProducts.apply(query, key, value, plan, p), layout)
    if query.is_cuda and layout.is_packed and p == 0.0 and _varlen_takes(query):
        return _varlen(query, key, value, layout)
    return _padded_attention(query, key, value, layout, p)


def attention_probabilities(query: Tensor, key: Tensor, layout: Layout) -> Tensor:
    """softmax(Q Kᵀ / sqrt(d)) as (B, heads, L, L), padded whatever the layout."""
    layout.check_tokens(query, "query")
    q, k = (layout.pad(x).transpose(1, 2) for x in (query, key))
    return _clear_empty(_probabilities(q, k, layout.bias(q.dtype)), layout)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> None:
    layout.check_tokens(query, "query")
    if key.shape != query.shape or value.shape != query.shape:
        raise ValueError(
            "query, key and value must have one shape (*tokens, heads, head size), not "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )


# ---------------------------------------------------------------------- torch's fused kernels


def _padded_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, p: float
) -> Tensor:
    """torch's fused kernel on the padded form (B, heads, L, d)."""
    q, k, v = (layout.pad(x).transpose(1, 2) for x in (query, key, value))
    bias = layout.bias(q.dtype)
    if p > 0.0 and q.device.type == "cpu":
        context = dropout(_probabilities(q, k, bias), p) @ v
    else:
        context = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p)
    context = layout.unpad(_clear_empty(context.transpose(1, 2), layout))
    return context if context.shape == query.shape else layout.fill(context)


def _varlen_takes(query: Tensor) -> bool:
    """Whether torch's kernel for packed tokens takes this dtype and head size."""
    d = query.shape[-1]
    return query.dtype in (torch.float16, torch.bfloat16) and d % 8 == 0 and d <= 256


def _varlen(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    offsets, longest = layout.cu_seqlens, layout.length
    return varlen_attn(query, key, value, offsets, offsets, longest, longest)


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    scores = (q @ k.transpose(-1, -2)) * (1.0 / math.sqrt(q.shape[-1]))  # (B, h, L, L)
    return torch.softmax(scores if bias is None else scores + bias, dim=-1)


def _clear_empty(x: Tensor, layout: Layout) -> Tensor:
    """Zeroes what belongs to sequences without any real token."""
    return x if layout.nonempty is None else x * layout.nonempty[:, None, None, None]


# ---------------------------------------------------------------------- batched products on a CPU


class _BatchedProducts(torch.autograd.Function):
    """O = D(P) V with P = softmax(s Q Kᵀ), s = 1/sqrt(d), D(P) = c M∘P, as batched matrix products.

    With G = dL/dO:

        dV = D(P)ᵀ G
        dS = P ∘ (c M∘(G Vᵀ) - rowsum(P ∘ c M∘(G Vᵀ)))
        dQ = s dS K,   dK = s dSᵀ Q

    Kept for backward: Q, K, V in padded form, P in the compute dtype, and M as one byte per score.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, plan: HeadPlan, p: float) -> Tensor:
        q, k, v = plan.gather(query), plan.gather(key), plan.gather(value)  # (rows, d)
        probabilities = _grouped_softmax(q, k, plan)  # (scores,)
        keep, dropped, c = None, probabilities, 1.0
        if p > 0.0:
            keep, c = draw_mask(probabilities, p), scale_in_force(p, q.device)
            dropped = masked(probabilities, keep)
        context = torch.empty_like(v)
        for group in plan.groups:
            _product(group.squares(dropped), group.matrices(v), c, group.matrices(context))
        ctx.save_for_backward(q, k, v, probabilities, keep)
        ctx.plan, ctx.c = plan, c
        ctx.num_rows = query.shape[0]
        return plan.scatter(context, ctx.num_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, probabilities, keep = ctx.saved_tensors
        plan, c, s = ctx.plan, ctx.c, 1.0 / math.sqrt(q.shape[-1])
        g = plan.gather(grad, zero_padding=True)
        dp, dropped = torch.empty_like(probabilities), probabilities
        for group in plan.groups:
            gv = group.matrices(v).transpose(1, 2)
            _product(group.matrices(g), gv, c, group.squares(dp))
        if keep is not None:
            dropped, dp = masked(probabilities, keep), masked(dp, keep)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for group in plan.groups:
            pd, gg = group.squares(dropped), group.matrices(g)
            _product(pd.transpose(1, 2), gg, c, group.matrices(dv))
            probs = group.squares(probabilities)
            ds = _softmax_gradient(group.squares(dp), probs)
            _product(ds, group.matrices(k), s, group.matrices(dq))
            _product(ds.transpose(1, 2), group.matrices(q), s, group.matrices(dk))
        dq, dk, dv = (plan.scatter(x, ctx.num_rows) for x in (dq, dk, dv))
        return dq, dk, dv, None, None


def _softmax_gradient(grad: Tensor, probabilities: Tensor) -> Tensor:
    """P ∘ (G - rowsum(P ∘ G)), (…, L, L).

    torch takes narrow types one number at a time where a row is shorter than the 32 numbers of a
    vector, which costs ten times as much as the way through fp32.
    """
    dtype = probabilities.dtype
    if dtype in (torch.bfloat16, torch.float16) and probabilities.shape[-1] < 32:
        grad, probabilities = grad.float(), probabilities.float()
    wide = probabilities.dtype
    return torch.ops.aten._softmax_backward_data(grad, probabilities, -1, wide).to(dtype)


def _product(a: Tensor, b: Tensor, factor: float, out: Tensor) -> None:
    """out = factor · a b, batched; the factor is applied inside the product."""
    torch.baddbmm(out, a, b, beta=0.0, alpha=factor, out=out)


def _grouped_softmax(q: Tensor, k: Tensor, plan: HeadPlan) -> Tensor:
    """P = softmax(Q Kᵀ / sqrt(d) + bias) of every group, as one vector (scores,).

    A softmax may be shifted by any constant. Shifting by the row maximum guards against overflow,
    but in bf16 it costs twice the exponential itself. So the exponentials are taken unshifted, and
    only where a row sum then leaves the safe range is everything done again with the shift.
    They are taken to the base 2, with log2(e) in the factor of the product: the fp32 library's exp
    is ten times slower where it underflows, as it does at every padding key.
    """
    s = 1.0 / math.sqrt(q.shape[-1])
    flat = q.new_empty(plan.num_scores)
    squares = [group.squares(flat) for group in plan.groups]
    if q.dtype != torch.float16:  # its range is too small
        _grouped_scores(q, k, plan, s * math.log2(math.e), squares)
        flat.exp2_()
        sums = [x.sum(-1, keepdim=True) for x in squares]
        if all(_in_range(x) for x in sums):
            for x, total in zip(squares, sums, strict=True):
                x.div_(total)
            return flat
    _grouped_scores(q, k, plan, s, squares)
    for x in squares:
        x.copy_(torch.softmax(x, dim=-1))
    return flat


def _grouped_scores(q: Tensor, k: Tensor, plan: HeadPlan, factor: float, out: list[Tensor]) -> None:
    """out = factor · Q Kᵀ + bias for every group."""
    for group, bias, scores in zip(plan.groups, plan.biases(q.dtype), out, strict=True):
        a, b = group.matrices(q), group.matrices(k).transpose(1, 2)
        if bias is None:
            _product(a, b, factor, scores)
        else:
            torch.baddbmm(bias, a, b, alpha=factor, out=scores)


def _in_range(sums: Tensor) -> bool:
    """Whether no row sum of exponentials has come near overflow or vanished (NaN: no)."""
    low, high = torch.aminmax(sums)
    return float(low) > 1e-20 and float(high) < 1e30

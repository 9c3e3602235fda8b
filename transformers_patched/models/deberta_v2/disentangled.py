"""Disentangled attention (He et al. 2021, arXiv:2006.03654, eq. 2-4), for padded and packed tokens.

    S[i, j] = s (q_i·k_j + q_i·K[δ] + k_j·Q[δ]),    δ = bucket(i - j),    s = 1 / sqrt(d·terms)
    context = dropout(softmax(S + mask)) V

for every sequence and head: content to content, content to position (c2p) and position to content
(p2c). K and Q are projections of one table of relative positions, the same for all sequences.

δ depends on i - j alone. So one product of all queries with K, its rows in the order of
i - j = L-1, ..., -L, is a matrix (L, 2L) in which the L numbers that query i needs stand side by
side, one place further left for every further query: a strided view (`relative_shift`, known from
Transformer-XL). No score is gathered by an index of its own, and no index (L, L) exists.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...attention.grouped import GroupedProducts, grouped_products, product
from ...attention.padded import padded_attention, padded_probabilities
from ...layout import SequenceLayout

# ---------------------------------------------------------------------- relative positions


class RelativePositions:
    """Which rows of the relative table the differences i - j of a batch read; one per forward pass.

    Differences up to buckets / 2 have a row each; further ones share rows, by their logarithm, up
    to `max_distance`. Without buckets every difference has its own.

    Attributes:
        first, last: The rows that sequences of this length can read are `first` to `last` - 1.
    """

    def __init__(
        self, length: int, buckets: int, max_distance: int, device: torch.device | str
    ) -> None:
        self.buckets, self.max_distance, self.device = buckets, max_distance, device
        self.span = buckets if buckets > 0 else max_distance  # the table has 2·span rows
        reach = min(self.span, _reach(length, buckets, max_distance))
        self.first, self.last = self.span - reach, min(self.span + reach + 1, 2 * self.span)
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}

    def rows(self, length: int) -> tuple[Tensor, Tensor]:
        """(2·length,) rows, counted from `first`, of i - j = length-1, ..., -length, and negated.

        The first serve c2p, the second p2c. A `length` beyond the batch's reads the outermost rows.
        """
        if length not in self._rows:
            distance = torch.arange(length - 1, -length - 1, -1, device=self.device)
            self._rows[length] = self._row(distance), self._row(-distance)
        return self._rows[length]

    def _row(self, distance: Tensor) -> Tensor:
        bucket = log_buckets(distance, self.buckets, self.max_distance)
        return (bucket + self.span).clamp(self.first, self.last - 1) - self.first


def log_buckets(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """sign(x)·(m + ceil((m - 1)·log(|x| / m) / log((D - 1) / m))) where |x| > m = buckets / 2.

    x itself elsewhere, or where there are no buckets. The logarithms are fp32, as Transformers
    takes them: at the edge of a bucket the rounding decides.
    """
    if buckets <= 0:
        return distance
    half = buckets // 2
    # Within m the logarithm is not read; clamping keeps it finite there.
    size = distance.abs().clamp(min=half)
    widest = torch.log(torch.tensor((max_distance - 1) / half))
    steps = torch.ceil(torch.log(size / half) / widest * (half - 1)) + half
    return distance.where(size <= half, (steps * distance.sign()).long())


def _reach(length: int, buckets: int, max_distance: int) -> int:
    """At least |bucket(x)| for every |x| <= `length`, as an integer without asking a device."""
    half = buckets // 2
    if buckets <= 0 or length <= half:
        return length
    share = math.log(length / half) / math.log((max_distance - 1) / half)
    return half + 1 + math.ceil(share * half)


def relative_shift(x: Tensor) -> Tensor:
    """(..., L, 2L) to the view (..., L, L) with out[i, j] = x[i, L-1-i+j]; `x` is contiguous."""
    n = x.shape[-2]
    # Read in rows of 2L - 1 numbers instead of 2L, every row starts one place further left.
    return x.flatten(-2)[..., n - 1 : -1].unflatten(-1, (n, 2 * n - 1))[..., :n]


# ---------------------------------------------------------------------- attention


def disentangled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    positions: RelativePositions,
    layout: SequenceLayout,
    scale: float,
    p: float = 0.0,
) -> Tensor:
    """dropout(softmax(s (q·k + q·K[δ] + k·Q[δ]))) V within every sequence of `layout`.

    Args:
        query: (*tokens, heads, d), tokens = (B, L) or packed (T,); `key` and `value` likewise.
        pos_key: K, (rows, heads, d), rows `first` to `last` of the table; None leaves c2p out.
        pos_query: Q, likewise, for p2c.
        positions: Which row belongs to which i - j.
        layout: Where the sequences are.
        scale: s.
        p: Dropout probability of the attention probabilities; 0.0 in evaluation.

    Returns:
        The context, of the shape of `query`. Sequences without any real token get zeros.
    """
    layout.check_tokens(query, "query")
    if _on_cpu(query):
        products = grouped_products(layout, query)
        c2p, p2c = _tables(pos_key, pos_query, positions, products.groups[0].length)
        context = _Disentangled.apply(query, key, value, c2p, p2c, products, scale, p)
        return layout.clear_empty(context)
    q, k, v = (layout.pad(x).transpose(1, 2) for x in (query, key, value))  # (B, h, L, d)
    bias = _bias(q, k, *_tables(pos_key, pos_query, positions, layout.max_seqlen), layout, scale)
    return padded_attention(q, k, v, bias, layout, scale, p, len(query))


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def disentangled_probabilities(
    query: Tensor,
    key: Tensor,
    pos_key: Tensor | None,
    pos_query: Tensor | None,
    positions: RelativePositions,
    layout: SequenceLayout,
    scale: float,
) -> Tensor:
    """The softmax of `disentangled_attention` as (B, heads, L, L), padded whatever the layout."""
    q, k = (layout.pad(x).transpose(1, 2) for x in (query, key))
    bias = _bias(q, k, *_tables(pos_key, pos_query, positions, layout.max_seqlen), layout, scale)
    return layout.clear_empty(padded_probabilities(q, k, bias, scale))


def _tables(
    pos_key: Tensor | None, pos_query: Tensor | None, positions: RelativePositions, length: int
) -> tuple[Tensor | None, Tensor | None]:
    """K and Q as (heads, 2·length, d), their rows in the order that `relative_shift` asks for."""

    def one(x: Tensor | None, rows: Tensor) -> Tensor | None:
        if x is None:
            return None
        return F.embedding(rows, x.flatten(1)).unflatten(1, x.shape[1:]).transpose(0, 1)

    c2p_rows, p2c_rows = positions.rows(length)
    return one(pos_key, c2p_rows), one(pos_query, p2c_rows)


def _bias(
    q: Tensor, k: Tensor, c2p: Tensor | None, p2c: Tensor | None, layout: SequenceLayout, s: float
) -> Tensor | None:
    """(B, heads, L, L) or broadcast to it: both position terms, and the mask of padding keys."""
    bias = layout.bias(q.dtype)  # (B, 1, 1, L)
    if c2p is not None:  # the product is (B, heads, L, 2L)
        term = relative_shift((q * s) @ c2p.transpose(-1, -2))
        bias = term if bias is None else term + bias
    if p2c is not None:
        term = relative_shift((k * s) @ p2c.transpose(-1, -2)).transpose(-1, -2)
        bias = term if bias is None else term + bias
    return bias


# ---------------------------------------------------------------------- batched products on a CPU


class _Disentangled(torch.autograd.Function):
    """O = D(P) V with P = softmax(S + mask), D(P) = c M∘P, as batched matrix products per group.

    With dV and dS as `GroupedProducts.score_gradients` gives them, and B(dS) the gradient of the
    shifted views, a band in zeros:

        dq = s (dS k  + B(dS) K),    dK = s B(dS)ᵀ q
        dk = s (dSᵀ q + B(dSᵀ) Q),   dQ = s B(dSᵀ)ᵀ k

    Kept for backward: q, k, v in padded form, K, Q, P, and M as one byte per score.
    """

    @staticmethod
    def forward(
        ctx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        c2p: Tensor | None,
        p2c: Tensor | None,
        products: GroupedProducts,
        s: float,
        p: float,
    ) -> Tensor:
        q, k, v = (products.gather(x) for x in (query, key, value))  # (rows, d)
        probabilities = q.new_empty(products.num_scores)  # (scores,)
        for group, bias in zip(products.groups, products.biases(q.dtype), strict=True):
            scores = group.squares(probabilities)  # (n·h, L, L)
            qg, kg = group.matrices(q), group.matrices(k)  # (n·h, L, d)
            zero = q.new_zeros(()) if bias is None else bias
            torch.baddbmm(zero, qg, kg.transpose(1, 2), alpha=s, out=scores)
            by_head = scores.unflatten(0, (-1, products.heads)).transpose(0, 1)  # (h, n, L, L)
            room = scores.new_empty(*by_head.shape[:-1], 2 * group.length)
            if c2p is not None:
                by_head += _position_term(qg, c2p, s, room)
            if p2c is not None:
                by_head.transpose(-1, -2).add_(_position_term(kg, p2c, s, room))
            scores.copy_(torch.softmax(scores, dim=-1))
        context, keep, c = products.weighted_values(probabilities, v, p)
        ctx.save_for_backward(q, k, v, c2p, p2c, probabilities, keep)
        ctx.products, ctx.s, ctx.c = products, s, c
        ctx.num_rows = query.shape[0]
        return products.scatter(context, ctx.num_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, c2p, p2c, probabilities, keep = ctx.saved_tensors
        products, s = ctx.products, ctx.s
        g = products.gather(grad, zero_padding=True)  # (rows, d)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dc2p = torch.zeros_like(c2p) if ctx.needs_input_grad[3] else None
        dp2c = torch.zeros_like(p2c) if ctx.needs_input_grad[4] else None
        for group, ds in products.score_gradients(g, probabilities, v, keep, ctx.c, dv):
            qg, kg = group.matrices(q), group.matrices(k)  # (n·h, L, d)
            product(ds, kg, s, group.matrices(dq))
            product(ds.transpose(1, 2), qg, s, group.matrices(dk))
            by_head = ds.unflatten(0, (-1, products.heads)).transpose(0, 1)  # (h, n, L, L)
            band = ds.new_zeros(*by_head.shape[:-1], 2 * group.length)
            if c2p is not None:
                relative_shift(band).copy_(by_head)
                _position_gradients(band, qg, c2p, s, group.matrices(dq), dc2p)
            if p2c is not None:
                relative_shift(band).copy_(by_head.transpose(-1, -2))
                _position_gradients(band, kg, p2c, s, group.matrices(dk), dp2c)
        dq, dk, dv = (products.scatter(x, ctx.num_rows) for x in (dq, dk, dv))
        return dq, dk, dv, dc2p, dp2c, None, None, None


def _position_term(x: Tensor, table: Tensor, s: float, room: Tensor) -> Tensor:
    """`relative_shift` (h, n, L, L) of s x Tᵀ for the rows x (n·h, L, d) of a group.

    Args:
        table: T, (h, 2·longest, d), which serves the groups of all lengths.
        room: (h, n, L, 2L), where the product is put.
    """
    middle = _middle(table, x.shape[1])
    product(_rows_by_head(x, table), middle.transpose(1, 2), s, room.flatten(1, 2))
    return relative_shift(room)


def _position_gradients(
    band: Tensor, x: Tensor, table: Tensor, s: float, dx: Tensor, dtable: Tensor | None
) -> None:
    """Adds the gradients of `_position_term` to `dx` (n·h, L, d) and, where wanted, `dtable`.

    Args:
        band: (h, n, L, 2L), the gradient of the shifted view in its place and zeros around it.
    """
    h, n, length, _ = band.shape
    flat, middle = band.flatten(1, 2), _middle(table, length)  # (h, n·L, 2L), (h, 2L, d)
    back = torch.bmm(flat, middle).unflatten(1, (n, length)).transpose(0, 1)  # (n, h, L, d)
    dx.unflatten(0, (n, h)).add_(back, alpha=s)
    if dtable is not None:
        rows = _rows_by_head(x, table)
        _middle(dtable, length).add_(torch.bmm(flat.transpose(1, 2), rows), alpha=s)


def _rows_by_head(x: Tensor, table: Tensor) -> Tensor:
    """(n·h, L, d) to (h, n·L, d): all sequences' rows of a head meet its table in one product."""
    return x.unflatten(0, (-1, table.shape[0])).transpose(0, 1).flatten(1, 2)


def _middle(table: Tensor, length: int) -> Tensor:
    """The rows (h, 2·length, d) of a longer table that sequences of `length` read."""
    longest = table.shape[1] // 2
    return table[:, longest - length : longest + length]

"""Attention on a CPU as batched matrix products, one batch per group of sequences of like length.

    O = D(P) V,    P = softmax(S + mask),    D(P) = c M∘P

What an attention needs beside its scores S is shared: the groups and the rows they work on
(`GroupedProducts`), the values weighted with P, and the way back from O to S and V. Plain attention
(`GroupedAttention`) adds S = s Q Kᵀ; DeBERTa's adds its position terms, see `disentangled.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loralib.dropout_masks import draw_mask, masked, scale_in_force

from ..layout import NO_STEP, SequenceLayout, round_up

# The lowest number added to the score of a padding key. It is finite, so that a row without any key
# has a softmax; and bf16, which has the range of fp32, can represent it.
LOWEST = torch.finfo(torch.bfloat16).min
LENGTH_STEP = 16, 1 / 8  # of bf16 lengths, see `_cut` and `layout.round_up`
# Where lengths are not rounded, sequences at least this fraction as long as the longest of their
# group share its matrix products.
SHORTEST_IN_GROUP = 0.85
# torch's softmax kernels take narrow types in vectors of this many numbers.
VECTOR = 32 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 16
SHORT_ROW = 32  # rows of fewer numbers gain from fp32 where they do not fill their vectors


@dataclass(frozen=True)
class LengthGroup:
    """Sequences of similar length that share their matrix products.

    Attributes:
        count: Products in the batch: sequences of the group times heads.
        length: L, the length of the longest of them.
        row: Where the group's count·L rows of d numbers start among all rows.
        score: Where its count·L·L scores start among all scores.
        bias: fp32, added to the scores (count, L, L) and broadcast to them: 0 where a query may
            look at a key and LOWEST elsewhere; (count, 1, L) at padding keys, (1, L, L) at later
            tokens. None adds nothing.
    """

    count: int
    length: int
    row: int
    score: int
    bias: Tensor | None

    def matrices(self, x: Tensor) -> Tensor:
        """This group's (count, L, d) among all rows (rows, d), which are contiguous."""
        n, d = self.length, x.shape[1]
        return x.as_strided((self.count, n, d), (n * d, d, 1), self.row * d + x.storage_offset())

    def squares(self, x: Tensor) -> Tensor:
        """This group's (count, L, L) among all scores (scores,)."""
        n = self.length
        return x.as_strided((self.count, n, n), (n * n, n, 1), self.score)


class GroupedProducts:
    """Rows (group, sequence, head, position) of d numbers, and the products over every group.

    One `index_select` over rows of a single head pads *and* transposes the packed tokens
    (T, heads, d); its inverse brings context and gradients back. A rectangle of padded tokens is
    one group and needs no indices.

    Attributes:
        heads: Number of heads.
        groups: In the order of their rows and scores.
        num_rows: Rows of all groups, padding within a group included.
        num_scores: Scores of all groups.
        indices: (num_rows,) the row of the tokens (T·heads, d) that each row comes from.
        inverse: (T·heads,) the row that each row of the tokens went to.
        padding: The rows that are padding; None where there are none.
    """

    def __init__(
        self,
        heads: int,
        groups: list[LengthGroup],
        indices: Tensor | None = None,
        inverse: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> None:
        self.heads = heads
        self.groups = groups
        last = groups[-1]
        self.num_rows = last.row + last.count * last.length
        self.num_scores = last.score + last.count * last.length**2
        self.indices, self.inverse, self.padding = indices, inverse, padding
        self._bias: dict[torch.dtype, list[Tensor | None]] = {}

    # ------------------------------------------------------------------ tokens <-> rows

    def gather(self, x: Tensor, zero_padding: bool = False) -> Tensor:
        """(*tokens, heads, d) to (rows, d); padding repeats some token unless it is to be zero."""
        if self.indices is None:  # (B, L, heads, d)
            # of a fused q, k, v a single head stays a view of every third row
            return x.transpose(1, 2).reshape(self.num_rows, -1).contiguous()
        rows = x.reshape(-1, x.shape[-1]).index_select(0, self.indices)
        if zero_padding and self.padding is not None:
            rows.index_fill_(0, self.padding, 0)
        return rows

    def scatter(self, rows: Tensor, num_rows: int | None = None) -> Tensor:
        """(rows, d) to (*tokens, heads, d), the inverse of `gather`; filler rows get zeros.

        Args:
            rows: One row per head, sequence and position.
            num_rows: With packed tokens, how many rows to return, filler included; default T.
        """
        d = rows.shape[-1]
        if self.inverse is None:
            group = self.groups[0]
            padded = rows.view(-1, self.heads, group.length, d).transpose(1, 2)  # (B, L, heads, d)
            return padded.contiguous()
        real = len(self.inverse)
        total = real if num_rows is None else num_rows * self.heads
        tokens = rows.new_empty(total, d)
        torch.index_select(rows, 0, self.inverse, out=tokens[:real])
        tokens[real:].zero_()
        return tokens.view(-1, self.heads, d)

    def biases(self, dtype: torch.dtype) -> list[Tensor | None]:
        """The bias of every group in `dtype`."""
        if dtype not in self._bias:
            self._bias[dtype] = [
                None
                if group.bias is None
                else group.bias.clamp(min=max(LOWEST, torch.finfo(dtype).min)).to(dtype)
                for group in self.groups
            ]
        return self._bias[dtype]

    # ------------------------------------------------------------------ products

    def weighted_values(
        self, probabilities: Tensor, v: Tensor, p: float
    ) -> tuple[Tensor, Tensor | None, float]:
        """O = D(P) V with a newly drawn dropout mask.

        Args:
            probabilities: P, (scores,).
            v: V, (rows, d).
            p: Dropout probability.

        Returns:
            O (rows, d), M as one byte per score (None without dropout), and c.
        """
        keep, dropped, c = None, probabilities, 1.0
        if p > 0.0:
            keep, c = draw_mask(probabilities, p), scale_in_force(p, v.device)
            dropped = masked(probabilities, keep)
        context = torch.empty_like(v)
        for group in self.groups:
            product(group.squares(dropped), group.matrices(v), c, group.matrices(context))
        return context, keep, c

    def score_gradients(
        self,
        grad: Tensor,
        probabilities: Tensor,
        v: Tensor,
        keep: Tensor | None,
        c: float,
        dv: Tensor,
    ) -> Iterator[tuple[LengthGroup, Tensor]]:
        """The way back from O to V, which is put into `dv`, and to S, given group by group.

        With G = dL/dO:

            dV = D(P)ᵀ G
            dS = P ∘ (c M∘(G Vᵀ) - rowsum(P ∘ c M∘(G Vᵀ)))

        Args:
            grad: G, (rows, d), zero at padding.
            probabilities, v, keep, c: Those of `weighted_values`.
            dv: (rows, d), filled up to the group given last.

        Yields:
            Each group with its dS, (count, L, L).
        """
        dropped, dp = probabilities, torch.empty_like(probabilities)
        for group in self.groups:
            vt = group.matrices(v).transpose(1, 2)  # (count, d, L)
            product(group.matrices(grad), vt, c, group.squares(dp))
        if keep is not None:
            dropped, dp = masked(probabilities, keep), masked(dp, keep)
        for group in self.groups:
            pt = group.squares(dropped).transpose(1, 2)
            product(pt, group.matrices(grad), c, group.matrices(dv))
            yield group, softmax_gradient(group.squares(dp), group.squares(probabilities))


def product(a: Tensor, b: Tensor, factor: float, out: Tensor) -> None:
    """out = factor · a b, batched; the factor is applied inside the product."""
    torch.baddbmm(out, a, b, beta=0.0, alpha=factor, out=out)


def softmax_gradient(grad: Tensor, probabilities: Tensor) -> Tensor:
    """P ∘ (G - rowsum(P ∘ G)), (…, L, L).

    torch takes narrow types one number at a time where they do not fill a vector, which costs short
    rows two to ten times as much as the way through fp32.
    """
    dtype, n = probabilities.dtype, probabilities.shape[-1]
    if dtype in (torch.bfloat16, torch.float16) and n < SHORT_ROW and n % VECTOR:
        grad, probabilities = grad.float(), probabilities.float()
    wide = probabilities.dtype
    return torch.ops.aten._softmax_backward_data(grad, probabilities, -1, wide).to(dtype)


# ---------------------------------------------------------------------- which groups


def grouped_products(
    layout: SequenceLayout, query: Tensor, causal: bool = False
) -> GroupedProducts:
    """The groups of `layout` for queries (*tokens, heads, d); made once per layout."""
    # bf16 products are compiled for their very shape, so lengths are rounded to a few (see `_cut`)
    step = LENGTH_STEP if query.dtype == torch.bfloat16 else NO_STEP
    heads = query.shape[-2]
    key = "grouped products", heads, step, causal
    if key not in layout.cache:
        layout.cache[key] = (
            _plan_padded(layout, heads, causal)
            if layout.cu_seqlens is None
            else _plan_packed(layout.cu_seqlens, heads, step, causal)
        )
    return layout.cache[key]


def _plan_padded(layout: SequenceLayout, heads: int, causal: bool) -> GroupedProducts:
    """One group, the rectangle as it is."""
    count, length = layout.num_sequences * heads, layout.max_seqlen
    bias = None
    if causal:
        bias = layout.causal_bias(torch.float32).clamp(min=LOWEST)  # (1 or B, 1, L, L)
        if len(bias) > 1:
            bias = bias.expand(-1, heads, -1, -1)
        bias = bias.flatten(0, 1)  # (1 or count, L, L)
    elif layout.key_mask is not None:
        bias = _key_bias(layout.key_mask[:, None], heads)
    return GroupedProducts(heads, [LengthGroup(count, length, 0, 0, bias)])


def _plan_packed(
    cu_seqlens: Tensor, heads: int, step: tuple[int, float], causal: bool
) -> GroupedProducts:
    """Sequences sorted by length and cut into groups: short ones do not pay for long ones.

    The length of a group is rounded up by `step`, see `round_up`. A row stands for one position of
    one head of one sequence, in the order (group, sequence, head, position); the tokens' own rows,
    (T, heads, d) flattened, have the order (sequence, position, head).
    """
    offsets = cu_seqlens.tolist()
    lengths = [end - start for start, end in zip(offsets, offsets[1:], strict=False)]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # longest first
    groups: list[LengthGroup] = []
    sources, real = [], []  # of every group: its rows' places among the tokens', and which are real
    row = score = 0
    head = torch.arange(heads)[:, None]  # (h, 1)
    for members in _cut(order, lengths, step):
        length = round_up(lengths[members[0]], step)
        starts = torch.tensor([offsets[i] for i in members])[:, None, None]  # (members, 1, 1)
        sizes = torch.tensor([lengths[i] for i in members])[:, None, None]
        position = torch.arange(length)  # (L,)
        inside = position < sizes  # (members, 1, L)
        # Padding reads its sequence's first token: any row would do, its key is masked.
        token = starts + position * inside  # (members, 1, L)
        sources.append((token * heads + head).flatten())  # (members·h·L,)
        real.append(inside.expand(-1, heads, -1).flatten())
        bias = None
        if causal:  # padding is later than every token
            bias = torch.full((1, length, length), LOWEST).triu_(1)
        elif lengths[members[-1]] < length:  # some key of some member is padding
            bias = _key_bias(inside, heads)
        count = len(members) * heads
        groups.append(LengthGroup(count, length, row, score, bias))
        row, score = row + count * length, score + count * length**2
    indices, is_real = torch.cat(sources), torch.cat(real)  # (rows,)
    # Every token's row occurs once among the real ones, so the inverse is a permutation of them.
    occupied = is_real.nonzero().flatten()  # (T·h,)
    inverse = torch.empty_like(occupied)
    inverse[indices[occupied]] = occupied
    padding = (~is_real).nonzero().flatten()
    return GroupedProducts(heads, groups, indices, inverse, padding if padding.numel() else None)


def _key_bias(real: Tensor, heads: int) -> Tensor:
    """(n, 1, L) bool, True at real keys, to (n·heads, 1, L) fp32: 0 there and LOWEST elsewhere."""
    return torch.zeros(real.shape).masked_fill_(~real, LOWEST).repeat_interleave(heads, dim=0)


def _cut(order: list[int], lengths: list[int], step: tuple[int, float]) -> list[list[int]]:
    """Groups sequences, which are given longest first.

    With NO_STEP similar lengths share a group. Else one rounded length does, in groups of 1, 2, 4,
    ... members: every shape has been met after a few batches. A bf16 product of a new shape costs
    a CPU 0.7 ms and 0.8 MB, where computing it takes 0.02 to 0.1 ms.
    """
    groups: list[list[int]] = []
    if step == NO_STEP:
        for i in order:
            if groups and lengths[i] >= SHORTEST_IN_GROUP * lengths[groups[-1][0]]:
                groups[-1].append(i)
            else:
                groups.append([i])
        return groups
    for _, same in groupby(order, key=lambda i: round_up(lengths[i], step)):
        members = list(same)
        while members:
            size = 1 << (len(members).bit_length() - 1)  # the largest power of two among them
            groups.append(members[:size])
            members = members[size:]
    return groups


# ---------------------------------------------------------------------- plain attention


class GroupedAttention(torch.autograd.Function):
    """O = D(P) V with P = softmax(s Q Kᵀ + mask), s = 1/sqrt(d).

    With dV and dS as `GroupedProducts.score_gradients` gives them:

        dQ = s dS K,   dK = s dSᵀ Q

    Kept for backward: Q, K, V in padded form, P in the compute dtype, and M as one byte per score.
    """

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, products: GroupedProducts, p: float
    ) -> Tensor:
        q, k, v = (products.gather(x) for x in (query, key, value))  # (rows, d)
        probabilities = _grouped_softmax(q, k, products)  # (scores,)
        context, keep, c = products.weighted_values(probabilities, v, p)
        ctx.save_for_backward(q, k, v, probabilities, keep)
        ctx.products, ctx.c = products, c
        ctx.num_rows = query.shape[0]
        return products.scatter(context, ctx.num_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, probabilities, keep = ctx.saved_tensors
        products, s = ctx.products, 1.0 / math.sqrt(q.shape[-1])
        g = products.gather(grad, zero_padding=True)  # (rows, d)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for group, ds in products.score_gradients(g, probabilities, v, keep, ctx.c, dv):
            product(ds, group.matrices(k), s, group.matrices(dq))
            product(ds.transpose(1, 2), group.matrices(q), s, group.matrices(dk))
        dq, dk, dv = (products.scatter(x, ctx.num_rows) for x in (dq, dk, dv))
        return dq, dk, dv, None, None


def _grouped_softmax(q: Tensor, k: Tensor, products: GroupedProducts) -> Tensor:
    """P = softmax(Q Kᵀ / sqrt(d) + bias) of every group, as one vector (scores,).

    A softmax may be shifted by any constant. Shifting by the row maximum guards against overflow,
    but in bf16 it costs twice the exponential itself. So the exponentials are taken unshifted, and
    only where a row sum then leaves the safe range is everything done again with the shift.
    They are taken to the base 2, with log2(e) in the factor of the product: the fp32 library's exp
    is ten times slower where it underflows, as it does at every padding key.
    """
    s = 1.0 / math.sqrt(q.shape[-1])
    flat = q.new_empty(products.num_scores)
    squares = [group.squares(flat) for group in products.groups]  # (count, L, L) each
    if q.dtype != torch.float16:  # its range is too small
        _grouped_scores(q, k, products, s * math.log2(math.e), squares)
        flat.exp2_()
        sums = [x.sum(-1, keepdim=True) for x in squares]  # (count, L, 1) each
        if all(_in_range(x) for x in sums):
            for x, total in zip(squares, sums, strict=True):
                x.div_(total)
            return flat
    _grouped_scores(q, k, products, s, squares)
    for x in squares:
        x.copy_(torch.softmax(x, dim=-1))
    return flat


def _grouped_scores(
    q: Tensor, k: Tensor, products: GroupedProducts, factor: float, out: list[Tensor]
) -> None:
    """out = factor · Q Kᵀ + bias for every group."""
    for group, bias, scores in zip(products.groups, products.biases(q.dtype), out, strict=True):
        a, b = group.matrices(q), group.matrices(k).transpose(1, 2)
        if bias is None:
            product(a, b, factor, scores)
        else:
            torch.baddbmm(bias, a, b, alpha=factor, out=scores)


def _in_range(sums: Tensor) -> bool:
    """Whether no row sum of exponentials has come near overflow or vanished (NaN: no)."""
    low, high = torch.aminmax(sums)
    return float(low) > 1e-20 and float(high) < 1e30

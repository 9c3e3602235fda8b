"""A linear layer that leaves out the blocks of its weight that are 0, where that is faster.

    y = x Wᵀ + b,   W in rows of blocks:   y_a = x[:, columns of row a's blocks left] W_aᵀ + b_a

Compacted models have such layers where blocks stay scattered. A layer looks for itself which blocks
are left, and takes the whole product where they are many. Its weight is an ordinary
one: files, training, adapters and merging know nothing of blocks, and a block that training fills
is computed with from then on.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .weight_cache import Kept, kept_weight

# The crossover, from benchmarks/block_products.py: blocks of 32 × 32 at random places, fp32, one
# thread of a Zen 2 (AVX2); ms of the whole product, and what rows of blocks take in multiples of
# it where that share of the blocks is left:
#
#     out × in       tokens    whole   50 %    40 %    30 %    10 %
#      384 × 384           128      0.6    1.30    1.18    0.99    0.83
#      384 × 384          1024      4.5    1.21    1.07    0.86    0.54
#     1536 × 384           128      2.5    1.09    0.98    0.82    0.62
#     1536 × 384          1024     18.4    1.04    0.91    0.75    0.42
#      384 × 1536          128      2.5    1.07    0.89    0.78    0.43
#      384 × 1536         1024     17.9    1.10    0.94    0.76    0.40
#      768 × 768           128      2.7    1.17    0.86    0.73    0.47
#      768 × 768          1024     20.6    0.89    0.77    0.64    0.32
#     3072 × 768           128     11.8    0.76    0.69    0.54    0.31
#     3072 × 768          1024     72.3    0.97    0.80    0.64    0.30
#      768 × 3072          128     10.6    0.82    0.72    0.62    0.29
#      768 × 3072         1024     90.0    1.00    0.79    0.57    0.24
#
# At 0.3 they are faster everywhere, at 0.4 not in small matrices. torch's product with a BSR matrix
# takes 1.4 to 2.1 of the whole at 0.4 and 0.4 to 0.7 at 0.1. bf16 and GPUs are not measured: they
# take the whole product.
DENSEST = 0.35  # share of the blocks up to which rows of blocks are faster
FEWEST_TOKENS = 128
TOKENS_AT_ONCE = 512  # of which the inputs (in, 512) stay in a core's cache


class BlockRow(NamedTuple):
    """One row of blocks.

    Attributes:
        columns: int64 (c,), which inputs its blocks read.
        weight: (p, c).
        bias: (p, 1).
    """

    columns: Tensor
    weight: Tensor
    bias: Tensor


class BlockSparseLinear(nn.Linear):
    """`nn.Linear`; without gradients, in fp32 on a CPU, over the blocks that are not 0.

    Attributes:
        block: (p, q), rows and columns of a block.
    """

    def __init__(
        self, inputs: int, outputs: int, block: tuple[int, int], bias: bool = True
    ) -> None:
        super().__init__(inputs, outputs, bias)
        self.block = block
        self._kept: Kept | None = None  # what `_rows` found

    @classmethod
    def of(cls, layer: nn.Linear, block: tuple[int, int]) -> BlockSparseLinear:
        """`layer` with its own parameters, computed by blocks."""
        with torch.device("meta"):
            new = cls(layer.in_features, layer.out_features, block, layer.bias is not None)
        new.weight, new.bias = layer.weight, layer.bias
        return new.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """x (*tokens, in) → (*tokens, out)."""
        if not self._takes(x):
            self._kept = None
            return super().forward(x)
        parts = (self.weight,) if self.bias is None else (self.weight, self.bias)
        self._kept = kept_weight(self._kept, parts, self.block, self._rows)
        rows = None if self._kept is None else self._kept[1]
        if not rows or x.numel() < FEWEST_TOKENS * self.in_features:
            return super().forward(x)
        return block_product(x, rows, self.out_features)

    def _takes(self, x: Tensor) -> bool:
        learns = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        plain = x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32
        return plain and not learns and not torch.is_autocast_enabled("cpu")

    def is_sparse(self) -> bool:
        """Whether so few blocks are left that they are faster than the whole product."""
        left = blocks_left(self.weight, self.block)
        return left is not None and float(left.float().mean()) <= DENSEST

    def _rows(self) -> list[BlockRow]:
        """The rows of blocks; none where the whole product is faster."""
        return self.block_rows() if self.is_sparse() else []

    def block_rows(self) -> list[BlockRow]:
        """The blocks that are left, by rows of blocks; none where they do not divide the weight."""
        weight, left = self.weight.detach(), blocks_left(self.weight, self.block)
        if left is None:
            return []
        bias = weight.new_zeros(len(weight)) if self.bias is None else self.bias.detach()
        p, q = self.block
        rows = []
        for row, w, b in zip(left, weight.split(p), bias.split(p), strict=True):
            columns = row.repeat_interleave(q).nonzero().squeeze(1)
            rows.append(BlockRow(columns, w[:, columns].contiguous(), b[:, None]))
        return rows

    def train(self, mode: bool = True) -> BlockSparseLinear:
        """Sets the mode; blocks are looked for anew."""
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # copies look for themselves

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockSparseLinear:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return new


def blocks_left(weight: Tensor, block: tuple[int, int]) -> Tensor | None:
    """bool (out/p, in/q): which blocks of a weight (out, in) are not 0; None: they do not fit."""
    p, q = block
    if weight.shape[0] % p or weight.shape[1] % q:
        return None
    return weight.detach().ne(0).unflatten(1, (-1, q)).unflatten(0, (-1, p)).any(3).any(1)


def block_product(x: Tensor, rows: list[BlockRow], outputs: int) -> Tensor:
    """x (*tokens, in) times the rows of blocks, with bias → (*tokens, outputs), no gradient."""
    flat = x.detach().flatten(0, -2)
    y = flat.new_empty(len(flat), outputs)
    p = len(rows[0].weight)
    for part, result in zip(flat.split(TOKENS_AT_ONCE), y.split(TOKENS_AT_ONCE), strict=True):
        across = part.T.contiguous()  # (in, n)
        sums = across.new_empty(outputs, len(part))
        for row, into in zip(rows, sums.split(p), strict=True):
            read = across.index_select(0, row.columns)  # (c, n)
            torch.addmm(row.bias, row.weight, read, out=into)
        result.copy_(sums.T)
    return y.unflatten(0, x.shape[:-1])

"""`BlockSparseLinear` computes what `nn.Linear` computes, whatever becomes of its weight."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from loralib import block_sparse
from loralib.block_sparse import BlockSparseLinear, block_product, blocks_left


def sparse(density: float = 0.2, bias: bool = True, seed: int = 0) -> BlockSparseLinear:
    """24 → 40 in blocks of 8 × 4, frozen."""
    torch.manual_seed(seed)
    layer = BlockSparseLinear(24, 40, (8, 4), bias).requires_grad_(False)
    mask = (torch.rand(5, 6) < density).float()
    layer.weight.mul_(mask.repeat_interleave(8, 0).repeat_interleave(4, 1))
    return layer


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 9),
)
def test_rows_of_blocks_equal_the_whole_product(
    density: float, chunks: int, bias: bool, seed: int
) -> None:
    """Over several chunks of tokens, with rows of which nothing is left."""
    layer = sparse(density, bias, seed)
    x = torch.randn(3, 7 * chunks, 24)
    wanted = nn.functional.linear(x, layer.weight, layer.bias)
    before, block_sparse.TOKENS_AT_ONCE = block_sparse.TOKENS_AT_ONCE, 8
    try:
        found = block_product(x, layer.block_rows(), 40)
    finally:
        block_sparse.TOKENS_AT_ONCE = before
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the products by blocks."""
    seen: list[int] = []

    def counted(x: torch.Tensor, rows: list, outputs: int) -> torch.Tensor:
        seen.append(1)
        return block_product(x, rows, outputs)

    monkeypatch.setattr(block_sparse, "block_product", counted)
    return seen


def test_it_sees_every_change_of_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = products(monkeypatch)
    layer, x = sparse(), torch.randn(128, 24)

    def check(by_blocks: bool) -> None:
        seen.clear()
        wanted = nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), wanted, atol=1e-6, rtol=1e-5)
        assert bool(seen) == by_blocks

    check(True)
    layer.weight.mul_(2.0)
    check(True)
    layer.bias.add_(1.0)
    check(True)
    layer.load_state_dict(sparse(seed=3).state_dict())
    check(True)
    layer.weight = nn.Parameter(sparse(seed=4).weight, requires_grad=False)
    check(True)
    layer.weight.data.mul_(3.0)  # no trace, but the mode is set
    layer.eval()
    check(True)
    layer.weight.add_(1.0)  # nothing is 0
    check(False)
    assert copy.deepcopy(layer)._kept is None


def test_where_it_takes_the_whole_product(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = products(monkeypatch)
    layer, x = sparse(), torch.randn(128, 24)
    layer(x[:127])
    layer.bfloat16()(x.bfloat16())
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    layer(x.clone().requires_grad_()).sum().backward()
    layer.requires_grad_(True)(x).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.ne(0).all()
    assert not seen
    with torch.no_grad():
        layer(x)
    assert seen


def test_blocks_that_do_not_fit() -> None:
    layer = BlockSparseLinear(24, 40, (7, 4)).requires_grad_(False)
    layer.weight.zero_()
    assert blocks_left(layer.weight, (7, 4)) is None and not layer.is_sparse()
    torch.testing.assert_close(layer(torch.ones(128, 24)), layer.bias.expand(128, 40))

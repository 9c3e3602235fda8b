"""Layouts: moves between packed and padded tokens, indices, and refusal of wrong offsets."""

import pytest
import torch

from transformers_patched.attention.grouped import grouped_products
from transformers_patched.layout import SequenceLayout

LENGTHS = [4, 1, 6, 3]
OFFSETS = torch.tensor([0, 4, 5, 11, 14], dtype=torch.int32)


def layout() -> SequenceLayout:
    return SequenceLayout.packed(OFFSETS, 6, 14)


@pytest.mark.parametrize("rest", [(), (3,), (2, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_pad_places_every_token_and_unpad_returns_it(rest, dtype) -> None:
    x = torch.randint(1, 100, (14, *rest)).to(dtype)
    padded = layout().pad(x)
    assert padded.shape == (4, 6, *rest)
    for i, n in enumerate(LENGTHS):
        assert torch.equal(padded[i, :n], x[OFFSETS[i] : OFFSETS[i + 1]])
        assert not padded[i, n:].any()
    assert torch.equal(layout().unpad(padded), x)


def test_both_moves_have_exact_gradients() -> None:
    x = torch.randn(14, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(layout().pad, x)
    y = torch.randn(4, 6, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(layout().unpad, y)


def test_padded_tokens_pass_through() -> None:
    rectangle = SequenceLayout.padded(None, 2, 3, "cpu")
    x = torch.randn(2, 3, 4)
    assert rectangle.pad(x) is x and rectangle.unpad(x) is x


def test_places_of_tokens() -> None:
    assert layout().position_ids(2).tolist() == [2, 3, 4, 5, 2, 2, 3, 4, 5, 6, 7, 2, 3, 4]
    assert layout().sequence_ids().tolist() == [0] * 4 + [1] + [2] * 6 + [3] * 3
    assert layout().cls_index().tolist() == [0, 4, 5, 11]
    assert layout().num_sequences == 4
    rectangle = SequenceLayout.padded(None, 2, 3, "cpu")
    assert rectangle.cls_index().tolist() == [0, 3]
    assert rectangle.position_ids(1).tolist() == [[1, 2, 3]]


def test_a_mask_of_ones_is_no_mask() -> None:
    assert SequenceLayout.padded(torch.ones(2, 3, dtype=torch.long), 2, 3, "cpu").key_mask is None
    assert SequenceLayout.packed(torch.tensor([0, 3, 6], dtype=torch.int32), 3).key_mask is None


def test_a_generous_max_seqlen_costs_nothing() -> None:
    assert SequenceLayout.packed(OFFSETS, 512, 14).max_seqlen == 6


@pytest.mark.parametrize(
    "offsets, max_seqlen, tokens, message",
    [
        ([1, 4], 4, None, "start with 0, not 1"),
        ([0, 4, 4, 6], 4, None, "sequence 1, from 4 to 4, is empty"),
        ([0, 4, 2], 4, None, "sequence 1.*ends before it starts"),
        ([0, 4, 6], 4, 7, "ends at 6, but there are 7 tokens"),
        ([0, 4, 6], 3, 6, "max_seqlen is 3, but sequence 0 has 4"),
        ([0], 3, None, "at least two offsets"),
        ([0, 2], 0, None, "max_seqlen must be at least 1"),
    ],
)
def test_wrong_offsets_are_refused_in_words(offsets, max_seqlen, tokens, message) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceLayout.packed(torch.tensor(offsets, dtype=torch.int32), max_seqlen, tokens)


def test_wrong_types_and_shapes_are_refused_in_words() -> None:
    with pytest.raises(TypeError, match="int32, not torch.float32"):
        SequenceLayout.packed(torch.tensor([0.0, 2.0]), 2)
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        SequenceLayout.padded(torch.ones(2, 4, dtype=torch.long), 2, 3, "cpu")
    with pytest.raises(TypeError, match="bool or integer"):
        SequenceLayout.padded(torch.zeros(2, 3), 2, 3, "cpu")
    with pytest.raises(ValueError, match="padded layout"):
        SequenceLayout.padded(None, 2, 3, "cpu").check_tokens(torch.zeros(3, 2, 1), "query")


def test_rounded_lengths_come_in_few_shapes() -> None:
    seen, asked = set(), 0
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(25, 90, (16,), generator=generator)
        cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
        query = torch.zeros(1, 2, 4, dtype=torch.bfloat16)
        groups = grouped_products(SequenceLayout.packed(cu_seqlens, 90), query).groups
        assert sum(group.count for group in groups) == 16 * 2
        shapes = {(group.count, group.length) for group in groups}
        seen |= shapes
        asked += len(shapes)
    assert len(seen) <= 20 < asked / 10

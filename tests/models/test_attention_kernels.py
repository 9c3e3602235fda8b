"""Attention against its formula: padded, packed, ragged, masked, with dropout, by dtype."""

import math

import pytest
import torch
from torch import Tensor

from loralib.dropout_masks import scale_in_force
from transformers_patched import attention as module
from transformers_patched.attention import attention, attention_probabilities
from transformers_patched.attention.grouped import softmax_gradient
from transformers_patched.layout import SequenceLayout

LENGTHS = [3, 17, 1, 9, 16, 5, 2]


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def formula(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """softmax(QKᵀ/√d)V, one sequence and one head at a time, packed (T, heads, d)."""
    out, start = torch.empty_like(v), 0
    for n in lengths:
        rows = slice(start, start + n)
        for h in range(q.shape[1]):
            scores = q[rows, h] @ k[rows, h].T / math.sqrt(q.shape[-1])
            out[rows, h] = scores.softmax(-1) @ v[rows, h]
        start += n
    return out


def draw(tokens: int, heads: int, d: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens * d + heads)
    return [torch.randn(tokens, heads, d, generator=generator).to(dtype) for _ in range(3)]


def packed(lengths: list[int] = LENGTHS) -> SequenceLayout:
    return SequenceLayout.packed(offsets(lengths), max(lengths), sum(lengths))


def padded(lengths: list[int] = LENGTHS, width: int | None = None) -> SequenceLayout:
    width = max(lengths) if width is None else width
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return SequenceLayout.padded(mask, len(lengths), width, "cpu")


@pytest.mark.parametrize("heads, d", [(1, 5), (3, 8), (12, 32)])
def test_packed_padded_and_the_formula_agree(heads: int, d: int) -> None:
    q, k, v = draw(sum(LENGTHS), heads, d)
    expected = formula(q, k, v, LENGTHS)
    layout = packed()
    assert torch.allclose(attention(q, k, v, layout), expected, atol=1e-5)
    padded_qkv = [layout.pad(x) for x in (q, k, v)]
    context = attention(*padded_qkv, padded())
    assert torch.allclose(layout.unpad(context), expected, atol=1e-5)


@pytest.mark.parametrize("make", [packed, padded])
def test_the_fused_kernel_of_long_sequences_agrees(make, monkeypatch) -> None:
    monkeypatch.setattr(module, "GroupedAttention", None)  # so that nothing else can be at work
    monkeypatch.setattr(module, "LONGEST_PRODUCTS", 8)
    monkeypatch.setattr(module, "LONGEST_PRODUCTS_PADDED_FP32", 8)
    q, k, v = draw(sum(LENGTHS), 2, 8)
    layout, to_padded = make(), packed()
    args = (q, k, v) if layout.is_packed else [to_padded.pad(x) for x in (q, k, v)]
    context = attention(*args, layout)
    context = context if layout.is_packed else to_padded.unpad(context)
    assert torch.allclose(context, formula(q, k, v, LENGTHS), atol=1e-5)


def test_gradients_are_those_of_the_formula() -> None:
    q, k, v = (x.requires_grad_() for x in draw(sum(LENGTHS), 3, 8))
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((formula(q, k, v, LENGTHS) * weight).sum(), (q, k, v))
    actual = torch.autograd.grad((attention(q, k, v, packed()) * weight).sum(), (q, k, v))
    for a, b in zip(actual, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("make", [packed, padded])
def test_gradcheck_ragged_with_a_fixed_dropout_mask(make, p: float) -> None:
    lengths = [3, 6, 1]
    layout = make(lengths)
    shape = (10, 2, 3) if layout.is_packed else (3, 6, 2, 3)
    args = [torch.randn(shape, dtype=torch.double, requires_grad=True) for _ in range(3)]

    def run(*qkv: Tensor) -> Tensor:
        torch.manual_seed(5)
        return attention(*qkv, layout, p)

    assert torch.autograd.gradcheck(run, args)


def test_bf16_stays_within_its_precision() -> None:
    q, k, v = draw(sum(LENGTHS), 12, 64)
    low = [x.bfloat16() for x in (q, k, v)]
    expected = formula(*(x.float() for x in low), LENGTHS)
    assert (attention(*low, packed()).float() - expected).abs().max() < 0.03
    assert attention(*low, packed()).dtype == torch.bfloat16


@pytest.mark.parametrize("factor", [0.0, 60.0, 1e4])
def test_scores_of_any_size_are_safe(factor: float) -> None:
    """Row maxima far from zero leave the range of unshifted exponentials; nothing may overflow."""
    q, k, v = (x.double() for x in draw(sum(LENGTHS), 2, 8))
    k = k * factor
    for sign in (1.0, -1.0):
        q_shifted = q.abs() * sign
        k_shifted = k.abs()
        expected = formula(q_shifted, k_shifted, v, LENGTHS)
        actual = attention(q_shifted.float(), k_shifted.float(), v.float(), packed())
        assert torch.allclose(actual.double(), expected, atol=2e-3 if factor > 100 else 1e-4)


def test_a_sequence_without_real_tokens_gives_zeros_and_zero_gradients() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    layout = SequenceLayout.padded(mask, 2, 3, "cpu")
    args = [torch.randn(2, 3, 2, 4, requires_grad=True) for _ in range(3)]
    context = attention(*args, layout)
    assert torch.equal(context[1], torch.zeros(3, 2, 4))
    assert torch.equal(attention_probabilities(*args[:2], layout)[1], torch.zeros(2, 3, 3))
    context.sum().backward()
    for x in args:
        assert x.grad.isfinite().all() and torch.equal(x.grad[1], torch.zeros(3, 2, 4))


def test_padding_is_not_attended_to_wherever_it_is() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 1]])
    q, k, v = (torch.randn(1, 5, 2, 4) for _ in range(3))
    real = mask[0].bool()
    expected = formula(q[0, real], k[0, real], v[0, real], [3])
    actual = attention(q, k, v, SequenceLayout.padded(mask, 1, 5, "cpu"))[0, real]
    assert torch.allclose(actual, expected, atol=1e-5)


def test_probabilities_are_padded_and_rows_sum_to_one_over_real_keys() -> None:
    q, k, _ = draw(sum(LENGTHS), 2, 8)
    probabilities = attention_probabilities(q, k, packed())
    assert probabilities.shape == (len(LENGTHS), 2, max(LENGTHS), max(LENGTHS))
    for i, n in enumerate(LENGTHS):
        assert torch.allclose(probabilities[i, :, :n, :n].sum(-1), torch.ones(2, n))
        assert torch.equal(probabilities[i, :, :n, n:], torch.zeros(2, n, max(LENGTHS) - n))


def test_dropout_acts_on_the_probabilities_at_the_rate_in_force() -> None:
    """With V = identity the context is the dropped-out row of probabilities itself."""
    n, p = 64, 0.25
    layout = packed([n, n])
    q, k, _ = draw(2 * n, 3, n)
    v = torch.eye(n)[:, None].expand(n, 3, n).repeat(2, 1, 1)
    plain = attention(q, k, v, layout)
    torch.manual_seed(0)
    dropped = attention(q, k, v, layout, p)
    kept = dropped != 0
    assert torch.allclose(dropped[kept], plain[kept] * scale_in_force(p, q.device), atol=1e-6)
    count = kept.numel()
    deviation = math.sqrt(p * (1 - p) / count)
    assert abs((~kept).float().mean().item() - p) < 5 * deviation


@pytest.mark.parametrize("make", [packed, padded])
def test_the_mean_over_dropout_draws_is_the_context_without(make) -> None:
    q, k, v = draw(sum(LENGTHS), 2, 8)
    layout = make()
    if not layout.is_packed:
        q, k, v = (packed().pad(x) for x in (q, k, v))
    torch.manual_seed(0)
    draws = torch.stack([attention(q, k, v, layout, 0.1) for _ in range(400)])
    error = (draws.mean(0) - attention(q, k, v, layout)).abs()
    assert (error <= 5 * draws.std(0) / math.sqrt(400) + 1e-5).all()
    assert draws.std(0).max() > 0.1


def test_the_draw_follows_the_seed() -> None:
    q, k, v = draw(sum(LENGTHS), 2, 8)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(attention(q, k, v, packed(), 0.2))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_compiles_as_one_graph() -> None:
    mask = torch.arange(5) < torch.tensor([5, 3])[:, None]
    q, k, v = (torch.randn(2, 5, 2, 4) for _ in range(3))

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attention(q, k, v, SequenceLayout.padded(mask, 2, 5, "cpu"))

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(q, k, v, mask), run(q, k, v, mask), atol=1e-6)


def test_wrong_shapes_are_named() -> None:
    q, k, v = draw(10, 2, 8)
    with pytest.raises(ValueError, match="query.*53.*packed"):
        attention(q, k, v, packed())
    with pytest.raises(ValueError, match="key"):
        attention(q, k[:9], v, packed([6, 4]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_packed_and_padded_agree_with_the_formula_on_a_gpu(dtype: torch.dtype, p: float) -> None:
    q, k, v = draw(sum(LENGTHS), 4, 32, dtype)
    expected = formula(q.float(), k.float(), v.float(), LENGTHS)
    layout = SequenceLayout.packed(offsets(LENGTHS).cuda(), max(LENGTHS), sum(LENGTHS))
    torch.manual_seed(0)
    args = [x.cuda() for x in (q, k, v)]
    draws = [attention(*args, layout, p).float().cpu() for _ in range(1 if p == 0.0 else 300)]
    tolerance = (1e-5 if dtype == torch.float32 else 0.03) if p == 0.0 else 0.3
    assert (torch.stack(draws).mean(0) - expected).abs().max() < tolerance
    if p > 0.0:
        assert not torch.equal(draws[0], draws[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [5, 16, 31, 32, 40])
def test_gradient_of_softmax_on_either_side_of_a_vector(dtype: torch.dtype, length: int) -> None:
    torch.manual_seed(0)
    P = torch.randn(3, length, length).softmax(-1).to(dtype)
    G = torch.randn(3, length, length).to(dtype)
    found = softmax_gradient(G, P)
    p, g = P.double(), G.double()
    expected = p * (g - (p * g).sum(-1, keepdim=True))
    assert found.dtype == dtype
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=rounding)

"""Dropout from random words: the rate in force, the scale, the seed, the gradient."""

import math

import pytest
import torch

from loralib.dropout_masks import scale_in_force
from transformers_patched.dropout import Dropout, dropout

COUNT = 1_000_003  # no multiple of a word
CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("p", [0.001, 0.01, 0.05, 0.1, 0.5, 0.9])
def test_the_probability_in_force_is_the_stated_one(p: float) -> None:
    force = 1 - 1 / scale_in_force(p, CPU)
    assert abs(force - p) <= 0.05 * p
    torch.manual_seed(0)
    y = dropout(torch.ones(COUNT), p)
    share = (y == 0).double().mean().item()
    assert abs(share - force) < 5 * math.sqrt(force * (1 - force) / COUNT)
    assert torch.allclose(y[y != 0], torch.tensor(1 / (1 - force)))


def test_a_tenth_is_26_of_256_and_small_probabilities_have_finer_steps() -> None:
    assert scale_in_force(0.1, CPU) == pytest.approx(256 / 230, rel=1e-15)
    assert scale_in_force(0.01, CPU) == pytest.approx(65536 / (65536 - 655), rel=1e-15)


@pytest.mark.parametrize("offset", range(8))
def test_every_byte_of_a_word_has_the_same_rate_and_they_are_independent(offset: int) -> None:
    torch.manual_seed(offset)
    n = 200_000
    dropped = (dropout(torch.ones(8 * n), 0.5) == 0).view(n, 8).double()
    rate = dropped[:, offset].mean().item()
    assert abs(rate - 0.5) < 5 * 0.5 / math.sqrt(n)
    other = dropped[:, (offset + 1) % 8]
    together = (dropped[:, offset] * other).mean().item()
    assert abs(together - 0.25) < 5 * math.sqrt(0.25 * 0.75 / n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_elements_are_kept_exactly_in_every_dtype_and_the_gradient_has_the_same_mask(dtype) -> None:
    x = torch.randn(7, 13).to(dtype).requires_grad_()
    torch.manual_seed(1)
    y = dropout(x, 0.5)
    kept = y != 0
    assert torch.equal(y[kept], x[kept] * 2)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, kept.to(dtype) * 2)
    assert 0 < kept.sum() < kept.numel()


def test_strided_input_and_gradcheck() -> None:
    x = torch.randn(5, 6, dtype=torch.double).t().requires_grad_()

    def run(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return dropout(x, 0.4)

    assert torch.autograd.gradcheck(run, x)


def test_the_draw_follows_the_seed_and_moves_on() -> None:
    x = torch.ones(1000)
    torch.manual_seed(7)
    first, second = dropout(x, 0.1), dropout(x, 0.1)
    torch.manual_seed(7)
    assert torch.equal(dropout(x, 0.1), first)
    assert not torch.equal(first, second)


def test_nothing_happens_in_evaluation_or_at_zero() -> None:
    x = torch.randn(4, 4)
    module = Dropout(0.3)
    assert not torch.equal(module(x), x)
    assert module.eval()(x) is x
    assert Dropout(0.0)(x) is x


def test_everything_is_dropped_at_one() -> None:
    assert torch.equal(dropout(torch.randn(100), 1.0), torch.zeros(100))


def test_what_is_saved_is_one_byte_per_element() -> None:
    saved = []
    x = torch.randn(64, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dropout(x, 0.1)
    assert sum(t.numel() * t.element_size() for t in saved) == x.numel()


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan"), "0.1", True])
def test_what_is_no_probability_is_refused(p) -> None:
    with pytest.raises(ValueError, match="number from 0 to 1"):
        Dropout(p)
    assert repr(Dropout(0.25)) == "Dropout(p=0.25)"

"""GELU's fast form against the formula in double precision."""

import math

import pytest
import torch
from torch import Tensor

from transformers_patched import heads


def formula(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("strided", [False, True])
def test_gelu_and_its_gradient(strided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "NUMBERS_AT_ONCE", 100)  # pieces, the last one shorter
    torch.manual_seed(0)
    x = torch.cat([torch.randn(9, 37) * 3, torch.linspace(-40, 40, 37)[None]])
    x = x.T if strided else x
    grad = torch.randn_like(x)
    wide, narrow = x.double().requires_grad_(), x.clone().requires_grad_()
    expected, found = formula(wide), heads.activation("gelu_new")(narrow)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-7)
    expected.backward(grad.double())
    found.backward(grad)
    torch.testing.assert_close(narrow.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)


def test_no_elements() -> None:
    assert heads.activation("gelu_new")(torch.empty(0, 5)).shape == (0, 5)

"""y = base(x) + B (m ⊙ A x), m a mask over the r components."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_custom import BaseTunerLayer


class Factors(nn.Module):
    """A (r, in), B (out, r) and the mask (r,) of one adapter."""

    def __init__(self, base: nn.Linear, r: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(r, base.in_features) / base.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(base.out_features, r))
        self.register_buffer("mask", torch.ones(r))


class ToyLayer(BaseTunerLayer):
    """A linear layer with masked increments."""

    adapter_containers: ClassVar[tuple[str, ...]] = ("toy",)

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__(base_layer)
        self.toy = nn.ModuleDict()

    def increment(self, x: Tensor, adapter: str) -> Tensor:
        factors = self.toy[adapter]
        return F.linear(F.linear(x, factors.A) * factors.mask, factors.B)

    def get_delta_weight(self, adapter: str) -> Tensor:
        factors = self.toy[adapter]
        return (factors.B * factors.mask) @ factors.A

    def bind(self, adapter: str) -> Any:
        return adapter

    def forward_one(self, x: Tensor, bound: Any, *args: Any, **kwargs: Any) -> Tensor:
        return self.base_layer(x) + self.increment(x, bound)

"""AdaLoRA on a layer: y = base(x) + s·B(E ∘ m ∘ A(dropout(x))), s = α/(init_r + 10⁻⁵).

| tensor | shape | name |
|---|---|---|
| A | (r, in) | `lora_A.<adapter>` |
| E | (r, 1) | `lora_E.<adapter>` |
| B | (out, r) | `lora_B.<adapter>` |
| m | (r,) | `lora_mask.<adapter>.keep`, a buffer: ones until the ranks are final |
| init_r | (1,) | `ranknum.<adapter>`, frozen, as in PEFT |

r is init_r, or what a file's `rank_pattern` leaves of it; the scale is that of init_r in any case.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from loralib import functional as lora

from ..low_rank import LowRankLayer, RankMask, linear_geometry
from .functional import svd_linear, svd_update

STD = 0.02  # of A and B at the start (Zhang et al. 2023), and of E where PEFT 0.11 draws it


class Bound(NamedTuple):
    """What `SVDLinear.forward_one` reads.

    Attributes:
        A, E, B: (r, in), (r, 1) and (out, r).
        mask: the module of m, as a move to another device makes a new buffer.
        scaling: s.
        dropout: probability in training.
    """

    A: nn.Parameter
    E: nn.Parameter
    B: nn.Parameter
    mask: RankMask
    scaling: float
    dropout: float


class SVDLinear(LowRankLayer):
    """AdaLoRA on `nn.Linear` or Hugging Face's `Conv1D` (whose weight is stored (in, out))."""

    adapter_containers: ClassVar[tuple[str, ...]] = ("lora_A", "lora_E", "lora_B")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.in_features, self.out_features, self.fan_in_fan_out = linear_geometry(base_layer)
        self.patterns: dict[str, tuple[bool, ...]] = {}  # of init_r components, which there are

    def _make_containers(self) -> None:
        self.lora_A = nn.ParameterDict()
        self.lora_E = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.lora_mask = nn.ModuleDict()
        self.ranknum = nn.ParameterDict()

    def add_adapter(
        self,
        adapter: str,
        pattern: tuple[bool, ...],
        lora_alpha: float,
        lora_dropout: float = 0.0,
        init_lora_weights: bool | str = True,
    ) -> None:
        """Creates and initialises adapter `adapter`, of the components that `pattern` keeps."""
        self.patterns[adapter] = pattern
        alpha = lora_alpha if lora_alpha > 0 else len(pattern)
        self._register(adapter, sum(pattern), alpha, lora_dropout)
        self.initialise(adapter, init_lora_weights)

    def _create(self, adapter: str, r: int) -> None:
        device = self.base_layer.weight.device
        fp32 = {"dtype": torch.float32, "device": device}
        self.lora_A[adapter] = nn.Parameter(torch.zeros(r, self.in_features, **fp32))
        self.lora_E[adapter] = nn.Parameter(torch.zeros(r, 1, **fp32))
        self.lora_B[adapter] = nn.Parameter(torch.zeros(self.out_features, r, **fp32))
        self.lora_mask[adapter] = RankMask(r, device)
        initial = torch.full((1,), float(len(self.patterns[adapter])), **fp32)
        self.ranknum[adapter] = nn.Parameter(initial, requires_grad=False)

    def set_scale(self, adapter: str, factor: float) -> None:
        """Multiplies the adapter's own scale α/(init_r + 10⁻⁵) by `factor`."""
        init_r = len(self.patterns[adapter])
        self._scaling[adapter] = factor * self.lora_alpha[adapter] / (init_r + 1e-5)
        self.rebind()

    @torch.no_grad()
    def initialise(self, adapter: str, init: bool | str) -> None:
        """Draws A, B and perhaps E as `AdaLoraConfig.init_lora_weights` says."""
        std = STD if init else 1.0
        A, E, B = self.triplets(adapter)
        A.normal_(0.0, std)
        B.normal_(0.0, std)
        if init is not True:
            E.normal_(0.0, std)

    def factors(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B of one adapter."""
        return self.lora_A[adapter], self.lora_B[adapter]

    def triplets(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """A, E and B of one adapter."""
        return self.lora_A[adapter], self.lora_E[adapter], self.lora_B[adapter]

    def mask(self, adapter: str) -> Tensor:
        """m (r,), live."""
        return self.lora_mask[adapter].keep

    @torch.no_grad()
    def cut(self, adapter: str) -> None:
        """Removes the components that the mask has pruned; the output stays."""
        kept = self.mask(adapter) != 0
        pattern = self.pattern(adapter)
        A, E, B = self.triplets(adapter)
        for box, old, new in (
            (self.lora_A, A, A[kept]), (self.lora_E, E, E[kept]), (self.lora_B, B, B[:, kept]),
        ):  # fmt: skip
            box[adapter] = nn.Parameter(new.clone(), requires_grad=old.requires_grad)
        self.lora_mask[adapter].keep = torch.ones_like(self.mask(adapter)[kept])
        self.r[adapter], self.patterns[adapter] = sum(pattern), pattern
        self.rebind()

    def pattern(self, adapter: str) -> tuple[bool, ...]:
        """Which of the init_r components there are that the mask keeps."""
        live = iter(self.mask(adapter).tolist())
        return tuple(here and next(live) != 0 for here in self.patterns[adapter])

    def delete_adapter(self, name: str) -> None:
        super().delete_adapter(name)
        self.patterns.pop(name, None)
        for box in (self.lora_mask, self.ranknum):
            if name in box:
                del box[name]

    def bind(self, adapter: str) -> Bound:
        options = self._scaling[adapter], self.lora_dropout[adapter]
        return Bound(*self.triplets(adapter), self.lora_mask[adapter], *options)

    def forward_one(self, x: Tensor, bound: Bound, *args: object, **kwargs: object) -> Tensor:
        """x Wᵀ + b + s·(drop(x)Aᵀ ∘ E ∘ m)Bᵀ, in one fused map where the base is a plain one."""
        base = self._modules["base_layer"]
        p = bound.dropout if self.training else 0.0
        own = bound.A, bound.E, bound.B, bound.mask.keep, bound.scaling, p
        if self.base_is_plain():
            return svd_linear(x, base.weight, base.bias, *own, self.fan_in_fan_out)
        out = base(x, *args, **kwargs)
        return out + svd_update(x, *own).to(out.dtype)

    def increment(self, x: Tensor, adapter: str) -> Tensor:
        options = self.mask(adapter), self._scaling[adapter], self.dropout_now(adapter)
        return svd_update(x, *self.triplets(adapter), *options)

    def get_delta_weight(self, adapter: str) -> Tensor:
        A, E, B = self.triplets(adapter)
        A = A * (E * self.mask(adapter)[:, None])  # (r, in)
        return lora.delta_weight(A, B, self._scaling[adapter], self.fan_in_fan_out)

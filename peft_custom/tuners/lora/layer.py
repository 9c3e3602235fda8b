"""LoRA on a layer: y = base(x) + s·B(A(dropout(x))), s = α/r or α/√r (Hu et al. 2021, eq. 3).

| base | A | B | their names |
|---|---|---|---|
| `nn.Linear`, `Conv1D` | (r, in) | (out, r) | `lora_A.<adapter>.weight`, `lora_B.…` |
| `nn.Embedding` | (r, num) | (dim, r) | `lora_embedding_A.<adapter>`, `lora_embedding_B.…` |
| `nn.Conv2d` | (r, in, kh, kw) | (out, r, 1, 1) | as for `nn.Linear` |

A and B are fp32 whatever the base's dtype.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loralib import functional as lora

from ..low_rank import LowRankLayer, linear_geometry
from .base_starts import base_factors, moves_base
from .dora import dora_linear, row_lengths


class Factor(nn.Module):
    """One low-rank factor: a module with a `weight`, so that its name ends in `.weight`."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}"


class LoraLayer(LowRankLayer):
    """What the kinds of base layer share: factors A and B, their scale and initialisation."""

    adapter_containers: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self._rslora: dict[str, bool] = {}
        # PiSSA took s·B₀A₀ out of the base weight; kept to put it back, per adapter.
        self.taken_out: dict[str, tuple[Tensor, Tensor, float]] = {}

    def _make_containers(self) -> None:
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()

    def factors(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B of one adapter, as parameters."""
        return self.lora_A[adapter].weight, self.lora_B[adapter].weight

    def set_scale(self, adapter: str, factor: float) -> None:
        """Multiplies the adapter's own scale α/r (or α/√r) by `factor`."""
        divisor = self.r[adapter] ** (0.5 if self._rslora[adapter] else 1.0)
        self._scaling[adapter] = factor * self.lora_alpha[adapter] / divisor
        self.rebind()

    def add_adapter(
        self,
        adapter: str,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
    ) -> None:
        """Creates and initialises adapter `adapter` of rank r."""
        self._rslora[adapter] = use_rslora
        self._register(adapter, r, lora_alpha, lora_dropout)
        self.initialise(adapter, init_lora_weights)

    @torch.no_grad()
    def initialise(self, adapter: str, init: bool | str) -> None:
        """Draws A and B as `LoraConfig.init_lora_weights` says."""
        A, B = self.factors(adapter)
        bound = 1.0 / math.sqrt(A[0].numel())  # kaiming_uniform(a=√5): 1/√fan_in
        if moves_base(init):
            self._start_from_base(adapter, str(init))
            return
        if init == "gaussian":
            A.normal_(0.0, 1.0 / self.r[adapter])
        else:
            A.uniform_(-bound, bound)
        if init is False:  # B otherwise stays 0, and training starts from the base model
            B.uniform_(-1.0 / math.sqrt(self.r[adapter]), 1.0 / math.sqrt(self.r[adapter]))

    def _start_from_base(self, adapter: str, init: str) -> None:
        raise ValueError(
            f"init_lora_weights={init!r} is for linear layers, not {type(self.base_layer).__name__}"
        )

    def delete_adapter(self, name: str) -> None:
        super().delete_adapter(name)
        self._rslora.pop(name, None)


class Bound(NamedTuple):
    """What `Linear.forward_one` reads: modules, as a move to another device makes new tensors.

    Attributes:
        A, B: the factors' modules.
        scaling: s.
        dropout: probability in training.
    """

    A: Factor
    B: Factor
    scaling: float
    dropout: float


class Linear(LoraLayer):
    """LoRA on `nn.Linear` or Hugging Face's `Conv1D` (whose weight is stored (in, out))."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.in_features, self.out_features, self.fan_in_fan_out = linear_geometry(base_layer)

    def _create(self, adapter: str, r: int) -> None:
        device = self.base_layer.weight.device
        self.lora_A[adapter] = Factor((r, self.in_features), device)
        self.lora_B[adapter] = Factor((self.out_features, r), device)

    def bind(self, adapter: str) -> Bound | None:
        if self.taken_out and (self.merged or adapter not in self.taken_out):
            return None  # a PiSSA adapter's first part has to be added back, or taken away
        A, B = self.lora_A[adapter], self.lora_B[adapter]
        return Bound(A, B, self._scaling[adapter], self.lora_dropout[adapter])

    def forward_one(self, x: Tensor, bound: Bound, *args: Any, **kwargs: Any) -> Tensor:
        """x Wᵀ + b + s·drop(x)AᵀBᵀ, in one fused map where the base layer is a plain one."""
        base = self._modules["base_layer"]
        p = bound.dropout if self.training else 0.0
        own = bound.A.weight, bound.B.weight, bound.scaling, p
        if self.base_is_plain():
            return lora.lora_linear(x, base.weight, base.bias, *own, self.fan_in_fan_out)
        out = base(x, *args, **kwargs)
        return out + lora.lora_update(x, *own).to(out.dtype)

    def increment(self, x: Tensor, adapter: str) -> Tensor:
        A, B = self.factors(adapter)
        return lora.lora_update(x, A, B, self._scaling[adapter], self.dropout_now(adapter))

    def forward_several(
        self, x: Tensor, adapters: tuple[str, ...], *args: Any, **kwargs: Any
    ) -> Tensor:
        out = super().forward_several(x, adapters, *args, **kwargs)
        for adapter, (A, B, scaling) in self.taken_out.items():
            # Without its PiSSA adapter the layer is the original one: its first part is added back,
            # in a merged weight as well, and there taken away again where the adapter acts.
            if self.merged == (adapter in adapters):
                sign = -1.0 if self.merged else 1.0
                out = out + lora.lora_update(x, A, B, sign * scaling).to(out.dtype)
        return out

    def get_delta_weight(self, adapter: str) -> Tensor:
        A, B = self.factors(adapter)
        return lora.delta_weight(A, B, self._scaling[adapter], self.fan_in_fan_out)

    def merged_weight(self, names: list[str]) -> Tensor:
        total = super().merged_weight(names)
        for adapter, (A, B, scaling) in self.taken_out.items():
            if adapter not in names:
                total += lora.delta_weight(A, B, scaling, self.fan_in_fan_out).to(total)
        return total

    def _start_from_base(self, adapter: str, init: str) -> None:
        base = self.base_layer.weight
        if base.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"init_lora_weights={init!r} splits the base weight, which {base.dtype} cannot "
                "hold exactly; load the base in float32"
            )
        if self.taken_out or self.merged:
            raise ValueError(
                "PiSSA starts from the original weight: no second PiSSA adapter, and "
                "no merged one, on the same layer"
            )
        A, B = self.factors(adapter)
        weight = base.detach().T if self.fan_in_fan_out else base.detach()
        scaling = self._scaling[adapter]
        A0, B0 = base_factors(weight, self.r[adapter], scaling, init)
        A.copy_(A0)
        B.copy_(B0)
        self.taken_out[adapter] = (A0.float(), B0.float(), scaling)
        base.data -= lora.delta_weight(A, B, scaling, self.fan_in_fan_out).to(base)

    @torch.no_grad()
    def restore_base(self, adapter: str | None = None) -> None:
        for name in [adapter] if adapter is not None else list(self.taken_out):
            if name in self.taken_out:
                A, B, scaling = self.taken_out.pop(name)
                self.base_layer.weight.data += lora.delta_weight(
                    A, B, scaling, self.fan_in_fan_out
                ).to(self.base_layer.weight)


class Embedding(LoraLayer):
    """LoRA on `nn.Embedding`: row i of the table plus s·B A[:, i]. A starts at 0, B at N(0, 1)."""

    adapter_containers: ClassVar[tuple[str, ...]] = ("lora_embedding_A", "lora_embedding_B")

    def _make_containers(self) -> None:
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()

    def factors(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        return self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]

    def _create(self, adapter: str, r: int) -> None:
        base = self.base_layer
        fp32 = {"dtype": torch.float32, "device": base.weight.device}
        self.lora_embedding_A[adapter] = nn.Parameter(torch.zeros(r, base.num_embeddings, **fp32))
        self.lora_embedding_B[adapter] = nn.Parameter(torch.zeros(base.embedding_dim, r, **fp32))

    @torch.no_grad()
    def initialise(self, adapter: str, init: bool | str) -> None:
        A, B = self.factors(adapter)
        if moves_base(init):
            self._start_from_base(adapter, str(init))
        B.normal_()
        if init is False:
            A.normal_()

    def bind(self, adapter: str) -> tuple[Tensor, Tensor, float]:
        """(A, B, scaling): the arguments of `_lookup`."""
        return (*self.factors(adapter), self._scaling[adapter])

    def forward_one(
        self, x: Tensor, bound: tuple[Tensor, Tensor, float], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Looked-up row plus its low-rank correction."""
        out = self.base_layer(x)
        return out + self._lookup(x, *bound).to(out.dtype)

    def _lookup(self, ids: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        return lora.lora_embedding(ids, A, B, scaling, padding_idx=self.base_layer.padding_idx)

    def increment(self, x: Tensor, adapter: str) -> Tensor:
        return self._lookup(x, *self.factors(adapter), self._scaling[adapter])

    def get_delta_weight(self, adapter: str) -> Tensor:
        A, B = self.factors(adapter)
        return lora.delta_weight(A, B, self._scaling[adapter], True)  # (num, dim)

    @property
    def num_embeddings(self) -> int:
        return self.base_layer.num_embeddings

    @property
    def padding_idx(self) -> int | None:
        return self.base_layer.padding_idx


class Conv2d(LoraLayer):
    """LoRA on `nn.Conv2d`: a convolution to r channels with the base's geometry, then 1×1."""

    def _create(self, adapter: str, r: int) -> None:
        base = self.base_layer
        device = base.weight.device
        self.lora_A[adapter] = Factor((r, base.in_channels, *base.kernel_size), device)
        self.lora_B[adapter] = Factor((base.out_channels, r, 1, 1), device)

    def increment(self, x: Tensor, adapter: str) -> Tensor:
        A, B = self.factors(adapter)
        base = self.base_layer
        x = x.to(lora.compute_dtype(x, base.weight))
        x = F.dropout(x, self.dropout_now(adapter), self.training)
        padding = base.padding
        if base.padding_mode != "zeros":
            x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
            padding = 0
        hidden = F.conv2d(x, A.to(x.dtype), None, base.stride, padding, base.dilation)
        return F.conv2d(hidden, B.to(x.dtype)) * self._scaling[adapter]  # hidden: (n, r, h', w')

    def bind(self, adapter: str) -> str:
        """The adapter's name: a convolution is heavy enough for `increment` to serve."""
        return adapter

    def forward_one(self, x: Tensor, bound: str, *args: Any, **kwargs: Any) -> Tensor:
        out = self.base_layer(x)
        return out + self.increment(x, bound).to(out.dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        A, B = self.factors(adapter)
        delta = lora.delta_weight(A.flatten(1), B.flatten(1), self._scaling[adapter])
        return delta.view(self.base_layer.weight.shape)  # (out, in, kh, kw)

"""DyLoRA on a layer: y = base(x) + (α/b)·B[:, :b](A[:b](dropout(x))), 1 ≤ b ≤ R (Algorithm 1).

Shapes and names of A and B are LoRA's at rank R; a `loralib.dylora.NestedRank` says b.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loralib import functional as lora
from loralib.dylora import NestedLayer, NestedRank

from ..lora import layer as plain


class DyLoraLayer(NestedLayer, plain.LoraLayer):
    """What the kinds of base layer share; mixed in before LoRA's own wrapper."""

    def __init__(self, base_layer: torch.nn.Module) -> None:
        super().__init__(base_layer)
        self.nested: dict[str, NestedRank] = {}

    def add_adapter(
        self,
        adapter: str,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
    ) -> None:
        """Creates and initialises adapter `adapter` of largest rank r; it computes with that."""
        self.nested[adapter] = NestedRank(r)
        super().add_adapter(adapter, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights)

    def delete_adapter(self, name: str) -> None:
        super().delete_adapter(name)
        self.nested.pop(name, None)

    def nested_ranks(self) -> list[NestedRank]:
        """Those of the active adapters."""
        return [self.nested[name] for name in self.active_adapters if name in self.nested]

    def rank_changed(self) -> None:
        if self.merged:  # from the kept weight, so that nothing of the former rank stays
            names = list(self.merged_adapters)
            self.unmerge()
            self.merge(names)

    def _alpha(self, adapter: str) -> float:
        return self._scaling[adapter] * self.r[adapter]  # as `set_scale` left it

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW at the rank of evaluation."""
        b = self.nested[adapter].chosen.rank
        A, B = self.nested[adapter].plain_factors(*self.factors(adapter), b)
        transposed = getattr(self, "fan_in_fan_out", True)  # an embedding's table is (num, dim)
        return lora.delta_weight(A, B, self._alpha(adapter) / b, transposed)

    def increment(self, x: Tensor, adapter: str) -> Tensor:
        if self._routes is not None and self.nested[adapter].batched is not None:
            raise ValueError("adapter_names and batched_ranks exclude each other: use one of them")
        options = self._alpha(adapter), self.dropout_now(adapter), self.nested[adapter]
        return self._update(x, *self.factors(adapter), *options)

    def _update(
        self, x: Tensor, A: Tensor, B: Tensor, alpha: float, p: float, nested: NestedRank
    ) -> Tensor:
        """(α/b)·B[:, :b] A[:b] drop(x), at the current rank or at those of a batch of several."""
        raise NotImplementedError


class NestedBound(NamedTuple):
    """What `Linear.forward_one` reads.

    Attributes:
        A, B: the factors' modules, at rank R.
        alpha: α, the scale times the rank.
        dropout: probability in training.
        nested: says the rank.
    """

    A: plain.Factor
    B: plain.Factor
    alpha: float
    dropout: float
    nested: NestedRank


class Linear(DyLoraLayer, plain.Linear):
    """DyLoRA on `nn.Linear` or Hugging Face's `Conv1D` (whose weight is stored (in, out))."""

    def bind(self, adapter: str) -> NestedBound:
        A, B, nested = self.lora_A[adapter], self.lora_B[adapter], self.nested[adapter]
        return NestedBound(A, B, self._alpha(adapter), self.lora_dropout[adapter], nested)

    def forward_one(self, x: Tensor, bound: NestedBound, *args: object, **kwargs: object) -> Tensor:
        """Base and update in one fused map where the base layer is a plain one."""
        base = self._modules["base_layer"]
        p = bound.dropout if self.training else 0.0
        own = bound.A.weight, bound.B.weight, bound.alpha, p, bound.nested
        if self.base_is_plain():
            return self._map(x, base.weight, base.bias, *own)
        out = base(x, *args, **kwargs)
        return out + self._update(x, *own).to(out.dtype)

    def _map(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        alpha: float,
        p: float,
        nested: NestedRank,
    ) -> Tensor:
        """The update, with the base's x Wᵀ + b where its weight is given, (..., out)."""
        transposed = self.fan_in_fan_out
        if nested.batched is not None:
            rank_scales = nested.batched.scales(x, x.shape[:-1].numel())
            return lora.lora_batched_ranks(
                x, weight, bias, A, B, alpha, rank_scales, fan_in_fan_out=transposed
            )
        active = nested.current(self.training)
        scaling = nested.scaling(alpha, active.rank, x.device)
        return lora.lora_linear(x, weight, bias, A, B, scaling, p, transposed, active)

    def _update(
        self, x: Tensor, A: Tensor, B: Tensor, alpha: float, p: float, nested: NestedRank
    ) -> Tensor:
        return self._map(x, None, None, A, B, alpha, p, nested)


class Embedding(DyLoraLayer, plain.Embedding):
    """DyLoRA on `nn.Embedding`: row i of the table plus (α/b)·B[:, :b] A[:b, i]."""

    def bind(self, adapter: str) -> str:
        """The adapter's name: `increment` reads the rest."""
        return adapter

    def forward_one(self, x: Tensor, bound: str, *args: object, **kwargs: object) -> Tensor:
        out = self.base_layer(x)
        return out + self.increment(x, bound).to(out.dtype)

    def _update(
        self, x: Tensor, A: Tensor, B: Tensor, alpha: float, p: float, nested: NestedRank
    ) -> Tensor:
        padding = self.base_layer.padding_idx
        if nested.batched is not None:
            rank_scales = nested.batched.scales(x, x.numel())
            return lora.lora_embedding(x, A, B, alpha, padding_idx=padding, rank_scales=rank_scales)
        active = nested.current(self.training)
        scaling = nested.scaling(alpha, active.rank, x.device)
        return lora.lora_embedding(x, A, B, scaling, padding_idx=padding, active=active)

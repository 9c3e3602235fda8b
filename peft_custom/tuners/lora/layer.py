"""LoRA on a layer: y = base(x) + s·B(A(dropout(x))), s = α/r or α/√r (Hu et al. 2021, eq. 3).

| base | A | B | their names |
|---|---|---|---|
| `nn.Linear`, `Conv1D` | (r, in) | (out, r) | `lora_A.<adapter>.weight`, `lora_B.…` |
| `nn.Embedding` | (r, num) | (dim, r) | `lora_embedding_A.<adapter>`, `lora_embedding_B.…` |
| `nn.Conv2d` | (r, in, kh, kw) | (out, r, 1, 1) | as for `nn.Linear` |

A and B are fp32 whatever the base's dtype. Linear layers may have more: `lora_magnitude_vector` of
DoRA (`dora.py`), and with `rank_from` a mask `lora_ranks` of the components that there are, until
files are written without the others (`data_ranks.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loralib import functional as lora
from loralib.weight_cache import Kept, kept_weight

from ..low_rank import LowRankLayer, RankMask, linear_geometry
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
        # PiSSA or OLoRA took s·B₀A₀ out of the base weight; kept to put it back, per adapter.
        self.taken_out: dict[str, tuple[Tensor, Tensor, float]] = {}

    def _make_containers(self) -> None:
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()

    def factors(self, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B of one adapter, as parameters."""
        return self.lora_A[adapter].weight, self.lora_B[adapter].weight

    def rank(self, adapter: str) -> int:
        """How many components there are."""
        return self.r[adapter]

    @property
    def magnitudes(self) -> Mapping[str, nn.Parameter]:
        """m of DoRA by adapter; of linear layers only."""
        return {}

    def add_magnitude(self, adapter: str) -> None:
        """Makes a DoRA adapter of a fresh one."""
        raise NotImplementedError(f"use_dora is for linear layers, not {self._kind()}")

    def add_rank_mask(self, adapter: str, r: int) -> None:
        """Lets a fresh adapter begin with r of its components, until `prepare` says which."""
        raise NotImplementedError(f"rank_from is for linear layers, not {self._kind()}")

    def _kind(self) -> str:
        return type(self.base_layer).__name__

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

    def refit(
        self, adapter: str, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool
    ) -> None:
        """Takes other options for an adapter there is; of another rank, its factors become 0."""
        trained = any(p.requires_grad for p in self.adapter_parameters(adapter))
        self._rslora[adapter] = use_rslora
        if r != self.r[adapter]:
            self._create(adapter, r)
        for parameter in self.adapter_parameters(adapter):
            parameter.requires_grad_(trained)
        self.r[adapter], self.lora_alpha[adapter] = r, lora_alpha
        self.lora_dropout[adapter] = lora_dropout
        self.set_scale(adapter, 1.0)

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
        raise ValueError(f"init_lora_weights={init!r} is for linear layers, not {self._kind()}")

    def delete_adapter(self, name: str) -> None:
        super().delete_adapter(name)
        self._rslora.pop(name, None)


class Bound(NamedTuple):
    """What `Linear.forward_one` reads: modules, as a move to another device makes new tensors.

    Attributes:
        A, B: the factors' modules.
        scaling: s.
        dropout: probability in training.
        ranks: which components there are; None: all.
        dora: the adapter's name where it has a magnitude.
    """

    A: Factor
    B: Factor
    scaling: float
    dropout: float
    ranks: RankMask | None
    dora: str | None


class Linear(LoraLayer):
    """LoRA on `nn.Linear` or Hugging Face's `Conv1D` (whose weight is stored (in, out))."""

    adapter_containers: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "lora_magnitude_vector")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.in_features, self.out_features, self.fan_in_fan_out = linear_geometry(base_layer)
        self._lengths: dict[str, Kept] = {}  # DoRA's n, kept in evaluation

    def _make_containers(self) -> None:
        super()._make_containers()
        self.lora_magnitude_vector = nn.ParameterDict()
        self.lora_ranks = nn.ModuleDict()

    def _create(self, adapter: str, r: int) -> None:
        device = self.base_layer.weight.device
        self.lora_A[adapter] = Factor((r, self.in_features), device)
        self.lora_B[adapter] = Factor((self.out_features, r), device)

    def bind(self, adapter: str) -> Bound | None:
        if self.taken_out and (self.merged or adapter not in self.taken_out):
            return None  # a PiSSA adapter's first part has to be added back, or taken away
        dora = adapter if adapter in self.lora_magnitude_vector else None
        if dora and self.merged:
            return None  # another adapter is in the weight, whose rows DoRA scales without it
        A, B = self.lora_A[adapter], self.lora_B[adapter]
        ranks = self.lora_ranks[adapter] if adapter in self.lora_ranks else None
        return Bound(A, B, self._scaling[adapter], self.lora_dropout[adapter], ranks, dora)

    def forward_one(self, x: Tensor, bound: Bound, *args: Any, **kwargs: Any) -> Tensor:
        """x Wᵀ + b + s·drop(x)AᵀBᵀ, in one fused map where the base layer is a plain one."""
        base = self._modules["base_layer"]
        p = bound.dropout if self.training else 0.0
        s = bound.scaling if bound.ranks is None else bound.scaling * bound.ranks.keep
        own = bound.A.weight, bound.B.weight, s, p
        if self.base_is_plain():
            where = x, base.weight, base.bias, *own, self.fan_in_fan_out
            if bound.dora:
                return dora_linear(*where, self._gain(bound.dora))
            return lora.lora_linear(*where)
        out = base(x, *args, **kwargs)
        if bound.dora:
            return out + self.increment(x, bound.dora).to(out.dtype)
        return out + lora.lora_update(x, *own).to(out.dtype)

    def increment(self, x: Tensor, adapter: str) -> Tensor:
        own = *self.factors(adapter), self._scale(adapter), self.dropout_now(adapter)
        if adapter not in self.lora_magnitude_vector:
            return lora.lora_update(x, *own)
        x = x.to(lora.compute_dtype(x, self.base_layer.weight))
        W = self._unmerged().to(x.dtype)
        whole = dora_linear(x, W, None, *own, self.fan_in_fan_out, self._gain(adapter))
        return whole - F.linear(x, W.T if self.fan_in_fan_out else W)

    # --- scales of components and of rows --------------------------------------------------------
    def _scale(self, adapter: str) -> lora.Scaling:
        """s, or one for every component where a mask says which there are."""
        s = self._scaling[adapter]
        return s * self.lora_ranks[adapter].keep if adapter in self.lora_ranks else s

    def add_rank_mask(self, adapter: str, r: int) -> None:
        A, B = self.factors(adapter)
        self.lora_ranks[adapter] = mask = RankMask(self.r[adapter], A.device)
        mask.keep[r:], A.data[r:], B.data[:, r:] = 0, 0, 0
        self.rebind()

    def has_rank_mask(self, adapter: str) -> bool:
        """Whether the adapter's ranks come from data."""
        return adapter in self.lora_ranks

    def rank(self, adapter: str) -> int:
        masked = self.has_rank_mask(adapter)
        return int(self.lora_ranks[adapter].keep.sum()) if masked else self.r[adapter]

    @torch.no_grad()
    def set_components(self, adapter: str, rows: Tensor) -> None:
        """A becomes `rows` (k, in) and B 0; there are k components, at most as many as fit."""
        A, B = self.factors(adapter)
        keep, k = self.lora_ranks[adapter].keep, len(rows)
        A.zero_(), B.zero_(), keep.zero_()
        A[:k], keep[:k] = rows, 1

    @property
    def magnitudes(self) -> Mapping[str, nn.Parameter]:
        return self.lora_magnitude_vector

    def add_magnitude(self, adapter: str) -> None:
        self.lora_magnitude_vector[adapter] = nn.Parameter(self._row_lengths(adapter))
        self.rebind()

    def _unmerged(self) -> Tensor:
        """W as it is without any adapter."""
        return self.base_layer.weight.detach() if self._kept is None else self._kept

    @torch.no_grad()
    def _row_lengths(self, adapter: str) -> Tensor:
        where = self._unmerged(), *self.factors(adapter), self._scale(adapter)
        return row_lengths(*where, self.fan_in_fan_out)

    def _gain(self, adapter: str) -> Tensor:
        """DoRA's m / n, (out,). While nothing is trained n is kept, see `loralib.weight_cache`."""
        kept = None
        if torch.is_grad_enabled():
            self._lengths.pop(adapter, None)
        else:
            parts = self._unmerged(), *self.factors(adapter)
            before, options = self._lengths.get(adapter), self._scaling[adapter]
            kept = kept_weight(before, parts, options, lambda: self._row_lengths(adapter))
            if kept is not None:
                self._lengths[adapter] = kept
        n = self._row_lengths(adapter) if kept is None else kept[1]
        return self.lora_magnitude_vector[adapter] / n

    def train(self, mode: bool = True) -> Linear:
        """Sets the mode; kept lengths are dropped."""
        self._lengths.clear()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lengths": {}}  # copies make their own

    def delete_adapter(self, name: str) -> None:
        super().delete_adapter(name)
        self._lengths.pop(name, None)
        if name in self.lora_ranks:
            del self.lora_ranks[name]

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

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        A, B = self.factors(adapter)
        if adapter in self.lora_ranks:
            A = A * self.lora_ranks[adapter].keep[:, None]
        delta = lora.delta_weight(A, B, self._scaling[adapter], self.fan_in_fan_out)
        if adapter not in self.lora_magnitude_vector:
            return delta
        W, g = self._unmerged().to(delta.dtype), self._gain(adapter)
        return (W + delta) * (g if self.fan_in_fan_out else g[:, None]) - W

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
                "PiSSA and OLoRA start from the original weight: no second PiSSA or OLoRA adapter, "
                "and no merged one, on the same layer"
            )
        A, B = self.factors(adapter)
        weight = base.detach().T if self.fan_in_fan_out else base.detach()
        scaling = self._scaling[adapter]
        A0, B0 = base_factors(weight, self.r[adapter], scaling, init)
        A.copy_(A0)
        B.copy_(B0)
        self.taken_out[adapter] = (A0.float(), B0.float(), scaling)
        base.data -= lora.delta_weight(A, B, scaling, self.fan_in_fan_out).to(base)

    @property
    def base_moved(self) -> bool:
        return bool(self.taken_out)

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

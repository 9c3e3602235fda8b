"""Layers with a low-rank update, drop-in for torch's own and for Microsoft's `loralib`.

    y = x (W + s·B A)ᵀ + b,    s = lora_alpha / r       (Hu et al. 2021, eq. 3; W frozen)

Names, arguments, initialisation and state dicts are those of Microsoft's package. What differs is
merging (see `LoRALayer`): `train()` and `eval()` never change a stored weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional as lora
from .base import LoRALayer, checked_rank


class _LinearLayer(LoRALayer, nn.Linear):
    """`Linear` and `MergedLinear`: a linear layer with an update for each enabled segment."""

    def _init_linear(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        enabled: tuple[bool, ...],
        fan_in_fan_out: bool,
        merge_weights: bool,
        **kwargs: Any,
    ) -> None:
        r = checked_rank(type(self).__name__, r)
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        self.fan_in_fan_out = fan_in_fan_out
        self.segments = enabled
        if fan_in_fan_out:
            self.weight.data = self.weight.data.T.contiguous()  # (in, out)
        n = sum(enabled)
        m = out_features // len(enabled)
        shapes = ((r * n, in_features), (m * n, r)) if n else None
        self._init_lora(r, lora_alpha, lora_dropout, merge_weights, shapes)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """weight, bias and A ~ U(±1/√in), whichever way the weight is stored; B = 0."""
        bound = 1.0 / math.sqrt(self.in_features) if self.in_features > 0 else 0.0
        self.weight.uniform_(-bound, bound)
        if self.bias is not None:
            self.bias.uniform_(-bound, bound)
        self.reset_lora_parameters()

    def _plain(self, x: Tensor, weight: Tensor) -> Tensor:
        x = x.to(lora.compute_dtype(x, weight))
        return F.linear(x, weight.T if self.fan_in_fan_out else weight, self.bias)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """s·B_j A_j in the rows of each enabled segment, 0 elsewhere; as the weight is stored."""
        (A, B), n = self._acting(), sum(self.segments)
        m = self.out_features // len(self.segments)
        delta = torch.zeros(self.out_features, self.in_features, dtype=A.dtype, device=A.device)
        starts = [j * m for j, on in enumerate(self.segments) if on]
        for start, A_j, B_j in zip(starts, A.chunk(n), B.chunk(n), strict=True):
            delta[start : start + m] = lora.delta_weight(A_j, B_j, self.scaling)
        return delta.T.contiguous() if self.fan_in_fan_out else delta

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + b plus s·(drop(x) A_jᵀ) B_jᵀ in each enabled segment; (..., in) -> (..., out)."""
        if self._is_plain():
            return self._plain(x, self.weight)
        if (weight := self._evaluation_weight(x)) is not None:
            return self._plain(x, weight)
        return self._adapted(x)

    def _adapted(self, x: Tensor) -> Tensor:
        return lora.lora_merged_linear(
            x, self.weight, self.bias, self.lora_A, self.lora_B, self.scaling,
            self.segments, self.dropout_now, self.fan_in_fan_out,
        )  # fmt: skip


class Linear(_LinearLayer):
    """`nn.Linear` with a low-rank update: y = x Wᵀ + b + s·(drop(x) Aᵀ) Bᵀ, A (r, in), B (out, r).

    Args:
        r: rank; 0 makes the plain layer.
        lora_alpha: s = lora_alpha / r.
        lora_dropout: dropout on the update's input, in training only.
        fan_in_fan_out: the weight is stored (in, out), as GPT-2's Conv1D does.
        merge_weights: evaluation without gradients uses a cached merged weight.
        **kwargs: of `nn.Linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        self._init_linear(
            in_features, out_features, r, lora_alpha, lora_dropout, (True,),
            fan_in_fan_out, merge_weights, **kwargs,
        )  # fmt: skip


class MergedLinear(_LinearLayer):
    """Several linear layers in one (q, k, v), some of them with a low-rank update of their own.

    The output is len(enable_lora) segments of m columns; the n enabled ones have their own factors:
    A (r·n, in) and B (m·n, r) hold them one above the other. The other arguments are `Linear`'s.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        segments = tuple(bool(on) for on in enable_lora)
        if not segments or out_features % len(segments):
            raise ValueError(
                f"MergedLinear(out_features={out_features}, enable_lora={list(enable_lora)!r}): "
                "out_features must be a multiple of the number of segments in enable_lora"
            )
        self._init_linear(
            in_features, out_features, r, lora_alpha, lora_dropout, segments,
            fan_in_fan_out, merge_weights, **kwargs,
        )  # fmt: skip
        self.enable_lora = list(segments)


class Embedding(LoRALayer, nn.Embedding):
    """`nn.Embedding` with a low-rank update: row i is W[i] + s·B A[:, i], A (r, num), B (dim, r).

    The other way round from `Linear`, A starts at 0 and B at N(0, 1).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        r = checked_rank("Embedding", r)
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        shapes = ((r, num_embeddings), (embedding_dim, r))
        self._init_lora(r, lora_alpha, 0.0, merge_weights, shapes)

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """A = 0, B ~ N(0, 1)."""
        if self.__dict__.get("adapted"):
            self.lora_A.zero_()
            self.lora_B.normal_()

    def delta_weight(self) -> Tensor:
        return lora.delta_weight(*self._acting(), self.scaling, True)  # (num, dim)

    def forward(self, ids: Tensor) -> Tensor:
        """W[ids] + s·Aᵀ[ids] Bᵀ, (..., dim)."""
        if self._is_plain():
            return super().forward(ids)
        options = {
            "padding_idx": self.padding_idx,
            "max_norm": self.max_norm,
            "norm_type": self.norm_type,
            "scale_grad_by_freq": self.scale_grad_by_freq,
        }
        # max_norm shortens the rows of W and of Aᵀ each by itself: a sum of them cannot stand in.
        if self.max_norm is None and (weight := self._evaluation_weight(ids)) is not None:
            return F.embedding(ids, weight, **options)
        out = super().forward(ids)
        return out + self._update(ids, **options).to(out.dtype)

    def _update(self, ids: Tensor, **options: int | float | None) -> Tensor:
        return lora.lora_embedding(ids, self.lora_A, self.lora_B, self.scaling, **options)


class ConvLoRA(LoRALayer):
    """A convolution whose kernel has a low-rank update: W + s·(B A reshaped to W's shape).

    Mixed into `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d` below. For kernels of k × k, A is
    (r·k, in·k) and B (out/groups·k, r·k), Microsoft's shapes. These do not fit other kernels, for
    which A is (r, in/groups·k₁·k₂…) and B (out, r). Dropout acts on the update's input.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        r = checked_rank(type(self).__name__, r)
        super().__init__(in_channels, out_channels, kernel_size, **kwargs)
        k = self.kernel_size[0]
        if self.kernel_size == (k, k):
            shapes = ((r * k, in_channels * k), (out_channels // self.groups * k, r * k))
        else:
            shapes = ((r, math.prod(self.weight.shape[1:])), (out_channels, r))
        self._init_lora(r, lora_alpha, lora_dropout, merge_weights, shapes)

    def delta_weight(self) -> Tensor:
        return lora.delta_weight(self.lora_A, self.lora_B, self.scaling).view(self.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of x with the updated kernel."""
        if self._is_plain():
            return super().forward(x)
        if (weight := self._evaluation_weight(x)) is not None:
            return self._conv_forward(x.to(weight.dtype), weight, self.bias)
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, self.padding_mode), 0
        return lora.lora_conv(
            x, self.weight, self.bias, self.lora_A, self.lora_B, self.scaling,
            self.stride, padding, self.dilation, self.groups, self.dropout_now,
        )  # fmt: skip

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        # Microsoft's layer has them as `conv.weight` and `conv.bias`, or under both names.
        for name in ("weight", "bias"):
            if (twin := f"{prefix}conv.{name}") in state_dict:
                state_dict.setdefault(prefix + name, state_dict[twin])
                del state_dict[twin]
        super()._load_from_state_dict(state_dict, prefix, *args)


class Conv1d(ConvLoRA, nn.Conv1d):
    """`nn.Conv1d` with a low-rank update; see `ConvLoRA`."""


class Conv2d(ConvLoRA, nn.Conv2d):
    """`nn.Conv2d` with a low-rank update; see `ConvLoRA`."""


class Conv3d(ConvLoRA, nn.Conv3d):
    """`nn.Conv3d` with a low-rank update; see `ConvLoRA`."""

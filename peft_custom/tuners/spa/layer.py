"""`SpaLayer`: a linear map or a convolution computed with its adapted, masked weight.

    y = x Ŵᵀ + b,   Ŵ = E(M) ∘ W'      blocks
    y = (x ∘ E(m)) W'ᵀ + b             units of the inputs; those who make them are dead then
    y = E(m) ∘ (x W'ᵀ + b)             output channels of a layer without partners

W' is the base weight with the adapter's increment. Weights are formed in fp32. In evaluation Ŵ is
kept while nothing that it is made of changes.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from loralib.weight_cache import Kept, kept_weight

from ..low_rank import linear_geometry
from ..tuner_layer import BaseTunerLayer
from .increments import Dense, Increment, LowRank
from .masks import Mask, Masks


class Factors(nn.Module):
    """One adapter of one layer.

    Attributes:
        increment: ΔW.
        bias: the trained bias (out,), fp32; None where it is the base's.
        blocks: mask of the matrix's blocks.
        inputs: mask of the units among the inputs.
        outputs: mask of the output channels.
        masks: all masks of the adapter.
    """

    blocks: Mask | None
    inputs: Mask | None
    outputs: Mask | None
    masks: Masks

    def __init__(self, increment: Increment, bias: Tensor | None) -> None:
        super().__init__()
        self.increment = increment
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())
        self.blocks = self.inputs = self.outputs = None
        self._rows: tuple[Mask, int] | None = None  # of units that a later layer masks; segments

    def make_rows(self, mask: Mask, segments: int) -> None:
        """The rows are units that the layer of `mask` takes for its inputs."""
        self._rows = (mask, segments)  # a tuple: not registered

    def all_masks(self) -> list[Mask]:
        """The masks that act on this layer's weight."""
        rows = None if self._rows is None else self._rows[0]
        return [m for m in (self.blocks, self.inputs, self.outputs, rows) if m is not None]

    def tensors(self) -> list[Tensor]:
        """Everything that Ŵ depends on, beside W."""
        masks = self.masks.items if self.masks.config.global_topk else self.all_masks()
        own = [] if self.bias is None else [self.bias]
        return [*self.increment.tensors(), *own, *(m.mask_scores for m in masks)]

    def final_rows(self) -> Tensor | None:
        """What the rows are multiplied by (out,); None: nothing. Linked units are live or dead."""
        if self.outputs is not None:
            return self.outputs.units(training=False)
        if self._rows is None:
            return None
        mask, segments = self._rows
        live = (mask.units(training=False) > 0).float()  # the later layer has the gate's value
        return live.repeat(segments)


class Bound(NamedTuple):
    """What `forward_one` reads; a tuple, so that the module is registered once."""

    factors: Factors


class SpaLayer(BaseTunerLayer):
    """Structured pruning adapters on `nn.Linear`, `Conv1D` and `nn.Conv1d`, `2d`, `3d`."""

    adapter_containers: ClassVar[tuple[str, ...]] = ("spa",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.convolution = isinstance(base_layer, _ConvNd)
        self.fan_in_fan_out = False
        if self.convolution:
            self.out_features, self.in_features = base_layer.weight.shape[:2]
        else:
            self.in_features, self.out_features, self.fan_in_fan_out = linear_geometry(base_layer)
        self.spa = nn.ModuleDict()
        self._effective: Kept | None = None  # evaluation's Ŵ
        self._kept_bias: Tensor | None = None  # the base's, while merged
        self.register_state_dict_post_hook(_store_unmerged_bias)

    @property
    def matrix_size(self) -> int:
        """Number of weights."""
        return self.base_layer.weight.numel()

    def set_adapter(self, names: list[str], trainable: list[str] | None = None) -> None:
        """Activates `names`; scores that nothing follows from stay frozen."""
        super().set_adapter(names, trainable)
        for f in self.spa.values():
            for mask in (f.blocks, f.inputs, f.outputs):
                if mask is not None and not f.masks.config.trains_scores:
                    mask.mask_scores.requires_grad_(False)

    # --- weights --------------------------------------------------------------------------------
    def _stored(self) -> Tensor:
        """The unmerged base weight as (out, in), or (out, in, *kernel)."""
        weight = self.base_layer.weight if self._kept is None else self._kept
        return weight.T if self.fan_in_fan_out else weight

    def _adapted(self, f: Factors, training: bool) -> Tensor:
        """W' under the mask of its blocks; of a convolution ΔW is the centre of the kernel."""
        weight = self._stored()
        with torch.autocast(weight.device.type, enabled=False):  # weights are formed in fp32
            if f.blocks is not None:
                return f.increment.masked(weight, f.blocks.now(training))
            if not self.convolution:
                return f.increment(weight)
            return weight.float() + self._centred(f.increment.delta())

    def _centred(self, delta: Tensor) -> Tensor:
        """(out, in) → (out, in, *kernel), 0 around the centre."""
        kernel = self.base_layer.kernel_size
        around = [size // 2 for size in reversed(kernel) for _ in range(2)]
        return F.pad(delta.view(*delta.shape, *(1 for _ in kernel)), around)

    @torch.no_grad()
    def adapted_weight(self, adapter: str) -> Tensor:
        """W' as a matrix (out, everything else)."""
        increment = self.spa[adapter].increment
        if self.convolution:
            return (self._stored().float() + self._centred(increment.delta())).flatten(1)
        return increment(self._stored())

    def weight_parts(self, adapter: str) -> list[Tensor]:
        """What W' is made of."""
        return [self.base_layer.weight, *self.spa[adapter].increment.tensors()]

    @torch.no_grad()
    def final_weight(self, adapter: str) -> Tensor:
        """Ŵ with the final masks, dead rows included: (out, in) or (out, in, *kernel)."""
        f = self.spa[adapter]
        f.masks.refresh()
        weight = self._adapted(f, training=False)
        if f.inputs is not None:
            weight = weight * f.inputs.units(training=False)
        rows = f.final_rows()
        return weight if rows is None else weight * rows.view(-1, *(1 for _ in weight.shape[1:]))

    @torch.no_grad()
    def final_bias(self, adapter: str) -> Tensor | None:
        """The bias, 0 for dead rows, (out,)."""
        f = self.spa[adapter]
        bias = self.base_layer.bias if f.bias is None else f.bias
        rows = f.final_rows()
        return bias if rows is None or bias is None else bias * rows

    # --- computing ------------------------------------------------------------------------------
    def bind(self, adapter: str) -> Bound:
        return Bound(self.spa[adapter])

    def forward_one(self, x: Tensor, bound: Bound, *args: object, **kwargs: object) -> Tensor:
        """With the masks of training or the final ones."""
        f = bound.factors
        if torch.is_grad_enabled():
            self._effective = None
        elif not self.training:
            weight = self._cached(f, x.dtype)
            if weight is not None:
                return self._product(x, weight, self.final_bias(self._live[0]))
        if not (self.training and f.masks.driven):
            f.masks.refresh()
        return self._masked(x, f)

    def _masked(self, x: Tensor, f: Factors) -> Tensor:
        """The formulas at the top."""
        training, base = self.training, self._modules["base_layer"]
        bias = base.bias if f.bias is None else f.bias
        if f.inputs is not None:
            x = x * f.inputs.units(training).to(x.dtype)
        if isinstance(f.increment, LowRank) and not self.convolution and f.blocks is None:
            y = self._product(x, self._stored(), bias)  # no gradient of a whole matrix
            y = y + f.increment.update(x.to(f.increment.rows.dtype)).to(y.dtype)
        else:
            weight = self._adapted(f, training)
            y = self._product(x, weight, bias)
        if f.outputs is not None:
            m = f.outputs.units(training).to(y.dtype)
            y = y * (m.view(-1, *(1 for _ in base.kernel_size)) if self.convolution else m)
        return y

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        if self.convolution:
            return self.base_layer._conv_forward(x, weight, bias)
        return F.linear(x, weight, bias)

    def _cached(self, f: Factors, dtype: torch.dtype) -> Tensor | None:
        """Ŵ for evaluation, kept while it is what its parts make."""
        adapter = self._live[0]
        self._effective = kept_weight(
            self._effective,
            (self.base_layer.weight, *f.tensors()),
            (adapter, dtype, f.masks.config.final_threshold),
            lambda: self.final_weight(adapter).to(dtype),
        )
        return None if self._effective is None else self._effective[1]

    def forward_several(
        self, x: Tensor, adapters: tuple[str, ...], *args: Any, **kwargs: Any
    ) -> Tensor:
        """One adapter or none: masks and trained weights do not add up."""
        if len(adapters) > 1:
            raise ValueError(
                f"adapters {list(adapters)} are all active: each computes with a weight of its "
                "own, so only one can be; set_adapter to one of them"
            )
        if not adapters:
            return self.base_output(x, *args, **kwargs)
        f = self.spa[adapters[0]]
        f.masks.refresh()
        return self._masked(x, f)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The unmasked increment W' − W, oriented as the stored weight."""
        increment = self.spa[adapter].increment
        if isinstance(increment, Dense):
            delta = increment.weight.detach() - self._stored()
        else:
            delta = increment.delta().detach()
            delta = self._centred(delta) if self.convolution else delta
        return delta.T if self.fan_in_fan_out else delta

    # --- merging --------------------------------------------------------------------------------
    def merged_weight(self, names: list[str]) -> Tensor:
        """Ŵ with the final masks, oriented as the stored weight."""
        if len(names) > 1:
            raise ValueError(
                f"merging {names}: each of them has a weight and masks of its own, so only one "
                "can be merged; unmerge first"
            )
        weight = self.final_weight(names[0])
        return weight.T if self.fan_in_fan_out else weight

    @torch.no_grad()
    def merge(self, names: list[str] | None = None, keep: bool = True) -> float:
        """Puts Ŵ and the adapter's bias into the base layer."""
        before = list(self.merged_adapters)
        lost = super().merge(names, keep)
        if self.merged_adapters != before and self.base_layer.bias is not None:
            bias = self.final_bias(self.merged_adapters[0])
            if keep:
                self._kept_bias = self.base_layer.bias.detach().clone()
            self.base_layer.bias.data.copy_(bias)
        return lost

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts weight and bias back, bit for bit."""
        if self._kept_bias is not None:
            self.base_layer.bias.data.copy_(self._kept_bias)
            self._kept_bias = None
        super().unmerge()

    # --- what drops evaluation's weight ---------------------------------------------------------
    def rebind(self) -> None:
        self._effective = None
        super().rebind()

    def train(self, mode: bool = True) -> SpaLayer:
        """Sets the mode; evaluation's weight is dropped, and nothing else changes."""
        self._effective = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> SpaLayer:
        self._effective = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_effective": None}  # copies and pickles make their own


def _store_unmerged_bias(
    layer: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    if layer._kept_bias is not None:  # a state dict never holds a merged bias
        state[f"{prefix}base_layer.bias"] = layer._kept_bias

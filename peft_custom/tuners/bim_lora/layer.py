"""`BIMLoRALinear`: a linear map with block-masked low-rank adapters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from loralib.weight_cache import Kept, kept_weight

from ..low_rank import linear_geometry
from ..tuner_layer import BaseTunerLayer
from . import functional as bim
from .config import BimLoraConfig

Watch = Callable[[Tensor, Tensor], Tensor]


class BlockFactors(nn.Module):
    """One adapter of one layer: A (r, in), B (out, r), Z (p, q), all fp32, and τ.

    Attributes:
        temperature: τ, a buffer of one number that is saved with the adapter.
        hard_threshold: in evaluation the mask is m > threshold; None: m itself.
        enabled: False leaves the mask out: plain LoRA.
        trains_mask: whether Z gets gradients.
    """

    def __init__(
        self, out_features: int, in_features: int, config: BimLoraConfig, device: torch.device
    ) -> None:
        super().__init__()
        fp32 = {"dtype": torch.float32, "device": device}
        counts = bim.block_counts(out_features, in_features, config.block_size)
        tau = first_temperature(config)
        self.lora_A = nn.Parameter(torch.empty(config.r, in_features, **fp32))
        self.lora_B = nn.Parameter(torch.zeros(out_features, config.r, **fp32))
        self.block_scores = nn.Parameter(
            torch.full(counts, tau * config.initial_block_score, **fp32)
        )
        self.register_buffer("temperature", torch.tensor(tau, **fp32))
        nn.init.uniform_(self.lora_A, -1.0 / math.sqrt(in_features), 1.0 / math.sqrt(in_features))
        self.block, self.dropout = config.block_size, config.lora_dropout
        self.scaling = config.lora_alpha / config.r
        self.hard_threshold, self.enabled = config.hard_mask_threshold, config.enable_masking
        self.trains_mask = config.train_mask and config.enable_masking

    def mask(self) -> Tensor:
        """m, (p, q), as evaluation uses it: σ(Z/τ), its hard form, or ones."""
        if not self.enabled:
            return torch.ones_like(self.block_scores)
        m = bim.soft_mask(self.block_scores, self.temperature)
        return m if self.hard_threshold is None else (m > self.hard_threshold).to(m)

    def scores(self, training: bool) -> Tensor:
        """The logits of the mask that acts; ±∞ where it is hard, or off."""
        Z = self.block_scores
        if not self.enabled:
            return Z * 0.0 + torch.inf  # with a gradient, 0: DDP waits for one
        if training or self.hard_threshold is None:
            return Z
        infinite = torch.full_like(Z, torch.inf)
        return torch.where(self.mask() > 0.5, infinite, -infinite)

    def extra_repr(self) -> str:
        r, columns = self.lora_A.shape
        return f"in={columns}, out={self.lora_B.shape[0]}, r={r}, block={self.block}"


class Bound(NamedTuple):
    """What `forward_one` reads; a tuple, so that the module is registered once."""

    factors: BlockFactors


def first_temperature(config: BimLoraConfig) -> float:
    """τ before training: the table's first, else τ₀."""
    if config.temperature_schedule == "table":
        return float(config.temperature_table[0][1])
    return float(config.mask_temperature)


class BIMLoRALinear(BaseTunerLayer):
    """y = base(x) + s·drop(x) (E(σ(Z/τ)) ∘ B A)ᵀ on `nn.Linear` or `Conv1D`.

    Called with sizes it makes a base layer of its own and one adapter, `default`, as the original
    class does; `wrap` puts it around an existing layer, without an adapter yet. The original's
    attributes (`lora_A`, `block_scores`, …) are those of the first active adapter.

    Args:
        in_features, out_features: sizes.
        config: a `BimLoraConfig`, or an object with the original's fields.
        r, lora_alpha, lora_dropout, block_size, mask_temperature: instead of the configuration's.
        fan_in_fan_out: not for this constructor: a weight stored (in, out) is wrapped.
        merge_weights: accepted; merging is `merge()`, never a side effect of `eval()`.
        linear_kwargs: of `nn.Linear`.
    """

    adapter_containers: ClassVar[tuple[str, ...]] = ("bim",)
    hard_mask: ClassVar[None] = None  # the original's buffer, which nothing ever read

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: object = None,
        r: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float | None = None,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        block_size: int | None = None,
        mask_temperature: float | None = None,
        **linear_kwargs: Any,
    ) -> None:
        if fan_in_fan_out:
            raise ValueError(
                "fan_in_fan_out=True: this constructor makes an nn.Linear, whose weight is stored "
                "(out, in); BIMLoRALinear.wrap(conv1d) adapts one that is stored (in, out)"
            )
        del merge_weights
        given = BimLoraConfig() if config is None else config
        own = BimLoraConfig.from_reference(
            given,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            block_size=block_size,
            mask_temperature=mask_temperature,
            temperature_schedule=None if mask_temperature is None else "constant",
        )
        self._put_around(nn.Linear(in_features, out_features, **linear_kwargs))
        self.base_layer.requires_grad_(False)
        self.add_adapter("default", own)
        self.set_adapter(["default"])

    @classmethod
    def wrap(cls, base: nn.Module) -> BIMLoRALinear:
        """Around an existing layer; adapters are added with `add_adapter`."""
        layer = cls.__new__(cls)
        layer._put_around(base)
        return layer

    def _put_around(self, base: nn.Module) -> None:
        super().__init__(base)
        self.in_features, self.out_features, self.fan_in_fan_out = linear_geometry(base)
        self.bim = nn.ModuleDict()
        self.watch: Watch | None = None  # while features are collected: (x, y) -> y
        self.bypass = False  # meanwhile, leave the adapters out
        self._effective: Kept | None = None  # evaluation's W + ΔW

    def add_adapter(self, adapter: str, config: BimLoraConfig) -> None:
        """Creates adapter `adapter`: A uniform, B = 0, Z constant."""
        device = self.base_layer.weight.device
        self.bim[adapter] = BlockFactors(self.out_features, self.in_features, config, device)

    def set_adapter(self, names: list[str], trainable: list[str] | None = None) -> None:
        """Activates `names`; a mask that is not to train stays frozen."""
        super().set_adapter(names, trainable)
        for f in self.bim.values():
            if not f.trains_mask:
                f.block_scores.requires_grad_(False)

    # --- computing ------------------------------------------------------------------------------
    def bind(self, adapter: str) -> Bound | None:
        """None while features are collected."""
        return Bound(self.bim[adapter]) if self.watch is None else None

    def forward_one(self, x: Tensor, bound: Bound, *args: object, **kwargs: object) -> Tensor:
        """Base and increment in one map, where the base layer is a plain one."""
        recording = torch.is_grad_enabled()
        if recording and self._effective is not None:
            self._effective = None
        if not self.base_is_plain():
            return self.forward_several(x, self._live, *args, **kwargs)
        f, base, training = bound.factors, self._modules["base_layer"], self.training
        weight = base.weight
        if (
            not recording
            and not training
            and weight.dtype == x.dtype in (torch.float32, torch.float64)
        ):
            W = self._cached(f, weight) if _no_autocast(x) else None
            if W is not None:
                return nn.functional.linear(x, W.T if self.fan_in_fan_out else W, base.bias)
        return bim.block_masked_linear(
            x, weight, base.bias, f.lora_A, f.lora_B, f.scores(training), f.temperature,
            f.scaling, f.block, f.dropout if training else 0.0, self.fan_in_fan_out,
        )  # fmt: skip

    def _cached(self, f: BlockFactors, weight: Tensor) -> Tensor | None:
        """W + ΔW for evaluation, kept while it is what its parts make."""
        self._effective = kept_weight(
            self._effective,
            (weight, f.lora_A, f.lora_B, f.block_scores, f.temperature),
            (f.hard_threshold, f.enabled, f.scaling),
            lambda: bim.effective_weight(
                weight, f.lora_A, f.lora_B, f.mask(), f.scaling, f.block, self.fan_in_fan_out
            ),
        )
        return None if self._effective is None else self._effective[1]

    def rebind(self) -> None:
        self._effective = None
        super().rebind()

    def train(self, mode: bool = True) -> BIMLoRALinear:
        """Sets the mode; evaluation's weight is dropped, and nothing else changes."""
        self._effective = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BIMLoRALinear:
        self._effective = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_effective": None}  # copies and pickles make their own

    def increment(self, x: Tensor, adapter: str) -> Tensor:
        f, training = self.bim[adapter], self.training
        return bim.block_masked_update(
            x, f.lora_A, f.lora_B, f.scores(training), f.temperature, f.scaling, f.block,
            f.dropout if training else 0.0,
        )  # fmt: skip

    def forward_several(
        self, x: Tensor, adapters: tuple[str, ...], *args: object, **kwargs: object
    ) -> Tensor:
        live = () if self.bypass else adapters
        out = super().forward_several(x, live, *args, **kwargs)
        return out if self.watch is None else self.watch(x, out)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        f = self.bim[adapter]
        return bim.delta_weight(
            f.lora_A, f.lora_B, f.mask(), f.scaling, f.block, self.fan_in_fan_out
        )

    # --- the original's view --------------------------------------------------------------------
    def factors(self, adapter: str | None = None) -> BlockFactors:
        """The tensors of one adapter (default: the first active one)."""
        return self.bim[(self.active_adapters or self.adapters)[0] if adapter is None else adapter]

    lora_A = property(lambda self: self.factors().lora_A, doc="A, (r, in).")
    lora_B = property(lambda self: self.factors().lora_B, doc="B, (out, r).")
    block_scores = property(lambda self: self.factors().block_scores, doc="Z, (p, q).")
    scaling = property(lambda self: self.factors().scaling, doc="s.")
    block_size = property(lambda self: self.factors().block, doc="b.")
    n_blocks_out = property(lambda self: self.block_scores.shape[0], doc="p.")
    n_blocks_in = property(lambda self: self.block_scores.shape[1], doc="q.")
    n_blocks_total = property(lambda self: self.block_scores.numel(), doc="p·q.")

    @property
    def mask_temperature(self) -> float:
        """τ; can be set."""
        return float(self.factors().temperature)

    @mask_temperature.setter
    def mask_temperature(self, value: float) -> None:
        self.factors().temperature.fill_(value)

    @property
    def enable_masking(self) -> bool:
        """Whether the mask acts; can be set."""
        return self.factors().enabled

    @enable_masking.setter
    def enable_masking(self, value: bool) -> None:
        self.factors().enabled = value

    @torch.no_grad()
    def get_block_mask(self, soft: bool = True) -> Tensor:
        """E(m), (out, in); with `soft=False` of m > threshold (0.5 unless configured)."""
        f = self.factors()
        m = bim.soft_mask(f.block_scores, f.temperature)
        if not soft:
            m = (m > (0.5 if f.hard_threshold is None else f.hard_threshold)).to(m)
        return bim.expand(m, self.out_features, self.in_features, f.block)


def _no_autocast(x: Tensor) -> bool:
    return x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type)

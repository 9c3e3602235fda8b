"""LoRA's tuner: which layer wraps which base, and with which rank and α."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..base import BaseTuner, BaseTunerLayer, register_tuner
from ..targets import check_patterns, is_conv1d, pattern_value
from .config import LoraConfig
from .layer import Conv2d, Embedding, Linear, LoraLayer


@register_tuner("LORA", LoraConfig)
class LoraModel(BaseTuner):
    """Low-rank adapters on `nn.Linear`, `nn.Embedding`, `nn.Conv2d` and Hugging Face's `Conv1D`."""

    target_types = "Linear, Embedding, Conv2d and Conv1D layers"

    def new_layer(self, base: nn.Module, name: str, config: LoraConfig) -> BaseTunerLayer | None:
        """The wrapper for `base`; None for a type without one."""
        weight = getattr(base, "weight", None)
        if weight is None or not weight.is_floating_point():
            quantised = weight is not None or type(base).__name__.startswith(("Linear4", "Linear8"))
            if quantised:
                raise NotImplementedError(
                    f"{name!r} is a quantised {type(base).__name__}: adapters on quantised bases "
                    "are not implemented; load the base unquantised"
                )
            return None
        if isinstance(base, nn.Conv2d):
            if base.groups != 1:
                raise NotImplementedError(f"{name!r}: LoRA on a grouped Conv2d is not implemented")
            return Conv2d(base)
        if isinstance(base, nn.Embedding):
            return Embedding(base)
        if is_conv1d(base):
            config.fan_in_fan_out = True
            return Linear(base)
        return Linear(base) if isinstance(base, nn.Linear) else None

    def add_to_layer(
        self, layer: BaseTunerLayer, adapter: str, name: str, config: LoraConfig
    ) -> None:
        """Adds the adapter with this module's rank and α."""
        assert isinstance(layer, LoraLayer)
        layer.add_adapter(
            adapter,
            r=pattern_value(config.rank_pattern, name, config.r),
            lora_alpha=pattern_value(config.alpha_pattern, name, config.lora_alpha),
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            init_lora_weights=config.init_lora_weights,
        )

    def check_config(self, config: Any, names: list[str]) -> None:
        """Every key of `rank_pattern` and `alpha_pattern` must fit a chosen module."""
        check_patterns("rank_pattern", config.rank_pattern, names)
        check_patterns("alpha_pattern", config.alpha_pattern, names)

"""An adapter that took a part of W (PiSSA, OLoRA) as a plain LoRA adapter, for files."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .config import LoraConfig
from .layer import LoraLayer


def as_plain_lora(
    layers: Iterable[tuple[str, LoraLayer]],
    adapter: str,
    config: LoraConfig,
    tensors: dict[str, Tensor],
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The adapter relative to the original W: s·(BA − B₀A₀) = s·[B, −B₀][A; A₀], of rank 2r.

    α grows with the rank so that s stays: by 2, or by √2 where s = α/√r. Changes `config`.
    """
    result = dict(tensors)
    for name, layer in layers:
        if adapter in layer.taken_out:
            A0, B0, _ = layer.taken_out[adapter]
            key_A, key_B = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
            result[key_A] = torch.cat([tensors[key_A], A0])
            result[key_B] = torch.cat([tensors[key_B], -B0], dim=1)
    growth = math.sqrt(2.0) if config.use_rslora else 2
    config.r *= 2
    config.lora_alpha *= growth
    config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
    config.alpha_pattern = {key: growth * alpha for key, alpha in config.alpha_pattern.items()}
    config.init_lora_weights = True
    return config, result

"""`MaskAllocator`: what the masks of a model look like."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..tuner_layer import iter_adapters
from .layer import BIMLoRALinear


class MaskAllocator:
    """Reads the masks m = σ(Z/τ) of a model's adapted layers; it changes nothing.

    Args:
        model: has `BIMLoRALinear` layers.
        config: accepted for the original's sake.
        adapter: whose masks (default: each layer's first active adapter).
    """

    def __init__(self, model: nn.Module, config: object = None, adapter: str | None = None) -> None:
        del config
        self.adapter = adapter
        self.bim_modules = {
            name: layer for name, layer in iter_adapters(model) if isinstance(layer, BIMLoRALinear)
        }
        if not self.bim_modules:
            raise ValueError("MaskAllocator: this model has no BIMLoRALinear layer")

    @torch.no_grad()
    def masks(self) -> dict[str, Tensor]:
        """m as evaluation uses it, (p, q), by layer; on the CPU."""
        return {
            name: layer.factors(self.adapter).mask().cpu()
            for name, layer in self.bim_modules.items()
        }

    def get_sparsity_stats(self) -> dict[str, Any]:
        """Mean, spread and extremes of the mask, the share above a half: of all blocks, by layer.

        The original's interface; logs have three of these numbers from `BimLoraHooks.log`.

        Returns:
            `mean_score`, `std_score`, `min_score`, `max_score`, `active_ratio` of all blocks, and
            the same five under `modules[name]`.
        """
        masks = self.masks()
        everything = torch.cat([m.flatten() for m in masks.values()])
        return {**_figures(everything), "modules": {n: _figures(m) for n, m in masks.items()}}

    def histogram(self, bins: int = 20) -> Tensor:
        """How many blocks have a mask within each of `bins` equal parts of [0, 1]."""
        everything = torch.cat([m.flatten() for m in self.masks().values()])
        return torch.histc(everything, bins, 0.0, 1.0)


def _figures(m: Tensor) -> dict[str, float]:
    return {
        "mean_score": float(m.mean()),
        "std_score": float(m.std(correction=0)),
        "min_score": float(m.min()),
        "max_score": float(m.max()),
        "active_ratio": float((m > 0.5).float().mean()),
    }

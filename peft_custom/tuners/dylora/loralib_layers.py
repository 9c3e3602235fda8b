"""`attach` for models whose own code builds `loralib`'s DyLoRA layers, without any tuner."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from loralib import DyLoRALayer

from ... import hooks
from .hooks import DyLoraHooks, NestedFactors, NestedGroup
from .sampling import RankSampling


class LoralibLayers:
    """The loralib DyLoRA layers of one model; equal to any other such object of the same layers."""

    def __init__(self, layers: list[DyLoRALayer]) -> None:
        self.layers = layers

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoralibLayers) and other.layers[0] is self.layers[0]

    def __hash__(self) -> int:
        return id(self.layers[0])

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        """All factors."""
        for layer in self.layers:
            yield from (layer.lora_A, layer.lora_B)

    def training_hooks(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int | None,
        *,
        seed: int = 0,
    ) -> DyLoraHooks:
        """Hooks by the options that `configure_dylora` left on the layers."""
        found = {RankSampling(x.nested.largest, **x.nested.sampling_options) for x in self.layers}
        if len(found) > 1:
            raise ValueError(
                "the model's DyLoRA layers have different r or options, but a step has one rank "
                f"for all of them: {found}"
            )
        layers = [NestedFactors(layer.nested, layer.lora_A, layer.lora_B) for layer in self.layers]
        return DyLoraHooks([NestedGroup(found.pop(), layers)], optimizer, total_steps, seed)


def _layers(model: nn.Module) -> list[DyLoRALayer]:
    return [m for m in model.modules() if isinstance(m, DyLoRALayer) and m.adapted]


def _find(model: nn.Module) -> Iterator[LoralibLayers]:
    if layers := _layers(model):
        yield LoralibLayers(layers)


hooks.owner_finders.append(_find)


def configure_dylora(model: nn.Module, **options: Any) -> None:
    """Says how `attach` trains loralib's DyLoRA layers in `model`; without it, by the defaults.

    Args:
        model: any module with such layers.
        options: `r_min`, `dylora_mode`, `dylora_dist`, `dylora_dense`, as in `DyLoraConfig`.
    """
    layers = _layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no loralib DyLoRA layers to configure")
    for layer in layers:
        RankSampling(layer.nested.largest, **options)
    for layer in layers:
        layer.nested.sampling_options = dict(options)

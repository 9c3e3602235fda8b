"""`attach` for models whose own code builds `loralib`'s DyLoRA layers, without any tuner."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from loralib import DyLoRALayer

from ...hooks import LayerOwner, register_layer_owner
from .hooks import DyLoraHooks, NestedFactors, NestedGroup
from .sampling import RankSampling


@register_layer_owner
class LoralibLayers(LayerOwner[DyLoRALayer]):
    """The loralib DyLoRA layers of one model."""

    @classmethod
    def layers_in(cls, model: nn.Module) -> list[DyLoRALayer]:
        """Those that are adapted (of rank above 0)."""
        return [m for m in model.modules() if isinstance(m, DyLoRALayer) and m.adapted]

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


def configure_dylora(model: nn.Module, **options: int | str | bool | list[int] | None) -> None:
    """Says how `attach` trains loralib's DyLoRA layers in `model`; without it, by the defaults.

    Args:
        model: any module with such layers.
        options: `r_min`, `dylora_mode`, `dylora_dist`, `dylora_dense`, `train_ranks`, as in
            `DyLoraConfig`.
    """
    layers = LoralibLayers.layers_in(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no loralib DyLoRA layers to configure")
    weights = [RankSampling(layer.nested.largest, **options).weights for layer in layers]
    for layer, own in zip(layers, weights, strict=True):
        layer.nested.sampling_options = dict(options)
        layer.weigh(own)
